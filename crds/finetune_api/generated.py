"""The command of a module that makes a file from the models: it prints, writes or checks it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def command(
    module: str, about: str | None, path: Path, rendered: Callable[[], str], arguments: list[str] | None
) -> int:
    """``python -m finetune_api.<module>``; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m finetune_api.{module}", description=about)
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--check", action="store_true", help="fail where the file is not current")
    chosen = parser.parse_args(arguments)
    text = rendered()
    if chosen.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    elif chosen.check:
        if not path.exists() or path.read_text() != text:
            print(f"{path} is not what the models say; run `make generate`", file=sys.stderr)
            return 1
    else:
        sys.stdout.write(text)
    return 0
