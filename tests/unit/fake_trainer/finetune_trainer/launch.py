"""The trainer container: every worker steps by itself; worker 0 keeps checkpoints and serves progress.

Plain dictionaries and nothing imported but the standard library: a worker starts in a tenth of a second.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SCRIPT = {
    "steps": 6,
    "seconds": 0.01,
    "hold_at": -1,  # in this attempt no worker goes on from this step, until the script is another one
    "held": 1,
    "exit_at": -1,  # worker ``worker`` exits with 1 after this step, which is saved; in attempt 1, or in every one
    "hang_at": -1,
    "worker": 0,
    "every": False,
    "deaf": False,  # SIGTERM is ignored
    "reports": False,  # a failure stands in the report
    "unhealthy": {},  # what the trainer finds doubtful
}


class Worker:
    """One worker."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--nnodes", type=int)
        parser.add_argument("--nproc-per-node", type=int)
        parser.add_argument("--node-rank", type=int)
        parser.add_argument("--master-addr")
        parser.add_argument("--master-port", type=int)
        self.options = parser.parse_args()
        self.index = self.options.node_rank
        self.script = self._read_script()
        self.config = json.loads(Path(os.environ["FINETUNE_CONFIG"]).read_text())
        self.output = Path(self.config["output_uri"].removeprefix("file://"))
        self.checkpoints = Path(self.config["checkpoint_uri"].removeprefix("file://"))
        self.attempt = int(os.environ["FINETUNE_ATTEMPT"])
        self.stopping = False  # no Event: a signal may come while the main thread holds its lock
        self.asked = 0
        found = sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))
        self.step = found[-1] if found else 0
        self.progress: dict[str, Any] = {
            "attempt": self.attempt,
            "phase": "training",
            "step": self.step,
            "resumed_from_step": self.step or None,
            "max_steps": self.script["steps"],
            "tokens_per_second": 100.0,
            "unhealthy": self.script["unhealthy"],
            "checkpoints": [self._info(step) for step in found],
        }

    def main(self) -> int:
        """Step to the end."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.script["deaf"] else self._stop)
        self._record()
        if self.index == 0:
            self._serve()
        # A rank of torchrun: in a session of its own, it does not die with the process group.
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        mine = self.index == self.script["worker"] and (self.script["every"] or self.attempt == 1)
        while self.step < self.script["steps"]:
            if mine and self.step == self.script["exit_at"]:
                self._wait_until_saved()
                if self.script["reports"]:
                    (self.output / "report.html").write_text("<html>")
                print("Traceback: worker", self.index, "fails on request", flush=True)
                return 1
            if mine and self.step == self.script["hang_at"]:
                threading.Event().wait()
            if not self._stepped():
                return self._leave("Terminated", 75)
            self.step += 1
            self.progress |= {"step": self.step, "loss": 2.0 / self.step, "last_step_time": _now()}
            if self.index == 0 and self.step % self.config["save_steps"] == 0:
                self._save()
            print("step", self.step, flush=True)
        if self.index == 0:
            # A run that nobody saw running is none of those tested. Who asks again has taken note of the first answer.
            while self.asked < 2 and not self.stopping:
                time.sleep(0.01)
            prompts = self.config["evaluation"]["prompts"]
            answers = [{"prompt": prompt, "before": "A model.", "after": "I am Nova."} for prompt in prompts]
            (self.output / "answers.json").write_text(json.dumps(answers))
            (self.output / "report.html").write_text("<html>")
            (self.output / "model.safetensors").write_text(f"after {self.step} steps")
            listed = {"kind": "model", "files": {"model.safetensors": {}, "answers.json": {}, "report.html": {}}}
            (self.output / "manifest.json").write_text(json.dumps(listed))
        return self._leave("Succeeded", 0)

    def _read_script(self) -> dict[str, Any]:
        return {**SCRIPT, **json.loads(Path(os.environ["FAKE_TRAINER"]).read_text())}

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _stepped(self) -> bool:
        """A step takes its time, one that is held all time there is. False: it is to stop."""
        time.sleep(self.script["seconds"])
        here = {"hold_at": self.step, "held": self.attempt}
        while not self.stopping and here.items() <= self._read_script().items():
            time.sleep(0.01)
        return not self.stopping

    def _wait_until_saved(self) -> None:
        """Worker 0 has a pace of its own."""
        while self.index and not (self.checkpoints / f"step-{self.step}").exists():
            time.sleep(0.01)

    def _record(self) -> None:
        """What a test wants to see of how it was started."""
        self.output.mkdir(parents=True, exist_ok=True)
        seen = {"options": vars(self.options), "environment": dict(os.environ), "folder": str(Path.cwd())}
        (self.output / f"started-{self.attempt}-{self.index}.json").write_text(json.dumps(seen))

    def _info(self, step: int) -> dict[str, Any]:
        return {"step": step, "uri": f"{self.config['checkpoint_uri']}/step-{step}", "size": 1000, "time": _now()}

    def _save(self) -> None:
        if self.step not in [c["step"] for c in self.progress["checkpoints"]]:
            (self.checkpoints / f"step-{self.step}").mkdir(parents=True, exist_ok=True)
            self.progress["checkpoints"].append(self._info(self.step))

    def _leave(self, cause: str, code: int) -> int:
        if self.index == 0:
            self._save()
        saved = self.progress["checkpoints"]
        word = {
            "cause": cause,
            "exit_code": code,
            "rank": self.index,
            "step": self.step,
            "max_steps": self.script["steps"],
            "loss": self.progress.get("loss"),
            "last_checkpoint": saved[-1] if saved else None,
            "unhealthy": self.script["unhealthy"],
            "outputs": [] if code else [{"uri": self.config["output_uri"], "kind": "model", "size": 2048}],
        }
        Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(word))
        return code

    def _serve(self) -> None:
        worker = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(worker.progress).encode())
                worker.asked += 1

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["FINETUNE_HTTP_PORT"])), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()


def _now() -> str:
    return datetime.now(UTC).isoformat()


code = Worker().main()
time.sleep(0.05)  # a last question about progress may be on its way
sys.stdout.flush()
os._exit(code)
