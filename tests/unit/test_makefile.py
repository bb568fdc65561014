"""``make images``: which commands it gives, with a builder that only writes them down."""

import os
import subprocess
from pathlib import Path

import pytest

from finetune_operator import __version__

ROOT = Path(__file__).parents[2]


def images(tmp_path: Path, *arguments: str) -> list[str]:
    """What the builder is called with."""
    calls = tmp_path / "calls"
    builder = tmp_path / "buildah"
    builder.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    builder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["make", "-s", "images", *arguments], cwd=ROOT, env=environment, check=True)
    return calls.read_text().splitlines()


def test_images_are_built_with_the_names_the_chart_has(tmp_path: Path) -> None:
    assert images(tmp_path) == [
        f"build -f operator/Containerfile -t finetune-operator:{__version__} .",
        f"build -f trainer_image/Containerfile -t finetune-trainer:{__version__} .",
    ]


@pytest.mark.parametrize("registry", ["registry.example.com/team", "registry.example.com/team/"])
def test_images_are_pushed_where_a_registry_is_given(tmp_path: Path, registry: str) -> None:
    assert [call for call in images(tmp_path, f"REGISTRY={registry}") if call.startswith("push")] == [
        f"push registry.example.com/team/finetune-operator:{__version__}",
        f"push registry.example.com/team/finetune-trainer:{__version__}",
    ]
