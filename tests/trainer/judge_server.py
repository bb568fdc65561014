"""A judge for tests: an HTTP server on loopback that answers chat completions by a rule and remembers questions."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[["Judge", dict[str, Any]], tuple[int, dict[str, str], Any]]
"""(judge, body) to status, headers and what is said: a text, or a whole document."""


class Judge:
    """What the server knows."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.answered: list[str] = []
        """The bodies of requests that got an answer, as text."""
        self.lock = threading.Lock()
        self.url = ""
        self.at: Callable[[int], None] = lambda count: None
        """Called before the answer with the number of requests so far."""


def answers(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers of a question."""
    text = body["messages"][0]["content"]
    found = [re.search(rf"<answer_{side}>\n(.*?)\n</answer_{side}>", text, re.DOTALL) for side in "ab"]
    assert found[0] and found[1], text
    return found[0][1], found[1][1]


def longer(judge: Judge, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """A judge that prefers the longer answer, and of equally long ones the later in the alphabet."""
    first, second = answers(body)
    letter = "A" if (len(first), first) > (len(second), second) else "B"
    return 200, {}, f"Answer {letter} says more. [[{letter}]]"


def first_place(judge: Judge, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """A judge that always prefers what stands first."""
    return 200, {}, "Clearly. [[A]]"


@contextmanager
def serving(rule: Rule) -> Iterator[Judge]:
    """The judge, at its ``url``."""
    judge = Judge(rule)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.bodies.append(body)
                judge.keys.append(self.headers.get("Authorization", ""))
                count = len(judge.bodies)
            judge.at(count)
            status, headers, said = judge.rule(judge, body) if self.path == "/v1/chat/completions" else (404, {}, {})
            if isinstance(said, str):
                message = {"role": "assistant", "content": said}
                said = {"choices": [{"message": message}], "usage": {"total_tokens": 7}}
            content = json.dumps(said).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                return
            if status == 200:
                with judge.lock:
                    judge.answered.append(json.dumps(body, sort_keys=True))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
