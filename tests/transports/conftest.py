"""Fixtures of the edge's tests; the parts are in edge_kit.py."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.transports.tracing import NO_TRACING, Tracing

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not

from edge_kit import Edge, FakeText, MakeEdge


@pytest.fixture
def make_edge(tmp_path: Path) -> Iterator[MakeEdge]:
    """make_edge(option=value, ...) -> a running Edge; `routes`: other transports than OpenAI's."""
    with contextlib.ExitStack() as stack:

        def make(
            *,
            text: Callable[[FakeText], None] | None = None,
            tracing: Tracing = NO_TRACING,
            routes: list[Any] | None = None,
            **options: Any,
        ) -> Edge:
            folder = tmp_path / f"edge{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            edge = Edge(folder, options, tracing)
            edge.factories = routes or edge.factories
            if text is not None:
                text(edge.text)
            edge.start()
            stack.callback(edge.stop)
            return edge

        yield make


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture(scope="module")
def shared_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """One edge for tests that leave nothing behind but counts."""
    one = Edge(tmp_path_factory.mktemp("edge"), {}).start()
    yield one
    one.stop()


@pytest.fixture
def script(edge: Edge) -> Iterator[Edge]:
    """The edge, whose script a test may change."""
    before = edge.text.script
    edge.text.received.clear()
    yield edge
    edge.text.script = before
