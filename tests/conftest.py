"""For the whole suite: benchmarks run only when they are asked for (`-m benchmarks`)."""

from __future__ import annotations

import os

import pytest

from penstock.plugins import devices

if devices.cuda_available():
    os.environ.setdefault("PENSTOCK_DEVICE", "cpu")  # the tests that want the GPU name it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "benchmarks" not in config.option.markexpr:
        asked = [item for item in items if item.get_closest_marker("benchmarks") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked
