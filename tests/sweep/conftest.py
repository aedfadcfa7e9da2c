"""The whole sweep runs where `-m` asks for what is slow, and not in the ordinary suite."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects it elsewhere: it computes for half an hour."""
    if "slow" in config.getoption("markexpr"):
        return
    whole = [item for item in items if item.name == "test_every_class"]
    if whole:
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in whole]
