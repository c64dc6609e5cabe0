"""For the whole suite: benchmarks run only when they are asked for (`-m benchmarks`)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "benchmarks" not in config.option.markexpr:
        asked = [item for item in items if item.get_closest_marker("benchmarks") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked
