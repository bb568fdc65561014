"""Everything here is of the tier `trainer`, but for what needs a GPU."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the tests of this folder their tier."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("gpu"):
            item.add_marker("trainer")
