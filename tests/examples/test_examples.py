"""Every example runs: the plugin through the plugin host, the Python API in process, the OpenAI client against a real server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from penstock.core.contract.host import PluginHost
from penstock.core.contract.policy import Waiting
from penstock.plugins.commands.bench.server import started

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_policy_loads_by_the_public_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "shortest_first"))
    host = PluginHost("engine", extra=["penstock_shortest_first"]).load()
    policy: Any = host.schedule_policies()["shortest-first"].factory()
    waiting = Waiting(
        arrival_ns=np.array([1, 2, 3], np.int64),
        priority=np.zeros(3, np.int32),
        waited_s=np.array([1, 1, 61], np.float32),
        prompt_tokens=np.array([50, 40, 900], np.int32),
        cached_tokens=np.array([32, 0, 0], np.int32),
    )
    assert np.argsort(policy.order(waiting)).tolist() == [2, 0, 1]
    sys.modules.pop("penstock_shortest_first", None)


@pytest.mark.slow
def test_the_python_api_example_answers() -> None:
    texts = load(EXAMPLES / "python_api.py").main()
    assert [("42" in t) for t in texts[:2]] == [True, True]
    assert "99" in texts[2]


@pytest.mark.slow
def test_the_openai_client_example_answers() -> None:
    module = load(EXAMPLES / "openai_client.py")
    with started([]) as url:
        assert "42" in module.main(url)
