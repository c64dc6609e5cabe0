"""The Triton kernels' tests: on a GPU if there is one, else under Triton's interpreter (tiny shapes), else skipped.

The interpreter must be asked for before triton is imported, and again whenever a kernel runs; elsewhere in the suite nothing uses triton, so the
variable is set here for the import and for each test, and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
_INSTALLED = importlib.util.find_spec("triton") is not None
_REASON = "" if _INSTALLED else "triton is not installed"
if _INSTALLED and not GPU:
    if "triton" in sys.modules and "InterpretedFunction" not in type(sys.modules["triton"].language.sum).__name__:
        _REASON = "triton was imported before its interpreter could be asked for"
    else:
        _before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            for _name in (
                "attention",
                "linear",
                "rmsnorm",
                "rope",
                "activation",
                "embedding",
                "argmax",
                "drafting",
                "sampling",
                "slots",
                "quantised",
                "w8a8",
            ):
                importlib.import_module(f"penstock.kernels.{_name}.triton")
        finally:
            if _before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = _before

collect_ignore_glob = [] if not _REASON else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "kernels_gpu":
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))  # numpy's remarks on inf - inf under the interpreter
            if item.get_closest_marker("gpu") and not GPU:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _row_by_row(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """The interpreter's dot, each row by itself: a BLAS gives a row other bits at another place of the tile, a tensor core does not."""
    product = np.matmul(a.data[..., :, None, :], b.data[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
    return type(d)(product + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", _row_by_row)
        from penstock.kernels import gpu

        gpu.forget_tables()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(11)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
