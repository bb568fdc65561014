"""Answers GET /progress for the simulated pods of a cluster, in whose sandbox it runs: each address with its own file.

    python progress_server.py PORT FOLDER

Standard library only, never imports the project.
"""

from __future__ import annotations

import http.server
import sys
from pathlib import Path


class Answer(http.server.BaseHTTPRequestHandler):
    """What lies in FOLDER/ADDRESS.json, of the address that was called."""

    def do_GET(self) -> None:
        said = Path(sys.argv[2]) / f"{self.connection.getsockname()[0]}.json"
        self.send_response(200 if said.exists() else 503)
        self.end_headers()
        if said.exists():
            self.wfile.write(said.read_bytes())


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Answer).serve_forever()
