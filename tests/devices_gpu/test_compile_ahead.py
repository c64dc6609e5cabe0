"""A first start compiles its kernels side by side, before anything runs; and they compile for a GPU that this machine need not have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.torch_ops import TorchOps

Make = Callable[..., Any]
EVERYWHERE = {"embedding:_gather", "rmsnorm:_norm", "rope:_rope", "sampling:_survey", "sampling:_choose", "argmax:_pieces", "argmax:_merge"}
EVERYWHERE |= {"attention:_ragged", "attention:_split", "slots:_decode", "slots:_ragged", "slots:_write", "activation:_gated"}
EVERYWHERE |= {"slots:_place", "slots:_set", "slots:_copy", "sampling:_penalise", "sampling:_clear", "sampling:_start", "sampling:_count"}
FAST = EVERYWHERE | {"linear:_skinny"}
CODED = FAST - {"attention:_split"} | {"attention.coded:split"}
EIGHT = (EVERYWHERE - {"activation:_gated"}) | {"w8a8.hopper:_few", "w8a8:_matmul", "w8a8.rounding:_quantise"}
"""With layers whose inputs are rounded, too."""
DETERMINISTIC = EVERYWHERE | {"linear:_invariant", "attention:_join"}


class AheadOps(TorchOps):
    """Says that it can be captured, notes in which mode it is asked for what, and computes."""

    capturable = True

    def __init__(self) -> None:
        self.ahead = False
        self.seen: list[tuple[bool, int]] = []
        self.times = 0

    @contextmanager
    def compile_only(self) -> Iterator[None]:
        self.times += 1
        self.ahead = True
        yield
        self.ahead = False

    def embed(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.ahead, tokens.shape[0]))
        return super().embed(tokens, table)


class AheadAttention(TorchAttention):
    capturable = True


def test_everything_is_asked_for_before_serving_and_leaves_nothing(folder: Path, host_runner: Make) -> None:
    ops, notes = AheadOps(), []
    runner = host_runner(folder, ops=ops, attention=AheadAttention, notes=notes, max_num_seqs=16, max_num_batched_tokens=64)
    assert ops.times == 1
    assert "compiling kernels" in notes
    assert notes.index("compiling kernels") < notes.index("allocating KV cache")
    ahead = {size for early, size in ops.seen if early}
    assert {1, 2, 4, 8, 16} <= ahead, "every size of a decode step that has a kernel of its own"
    assert {7, 16, 48, 49, 64} <= ahead, "odd and even sizes with prefill, and the largest captured one"
    assert not runner.history.any()
    assert (runner.table == -1).all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("", FAST),
        ("deterministic", DETERMINISTIC),
        ("kv:fp8_e4m3", CODED),
        pytest.param("fp8", EIGHT, marks=pytest.mark.long),
        pytest.param("int4", (EVERYWHERE - {"activation:_gated"}) | {"quantised.fragments:_matmul"}, marks=pytest.mark.long),
        pytest.param("deterministic kv:int8", DETERMINISTIC, marks=pytest.mark.long),
    ],
)
def test_every_kernel_compiles_for_hopper(mode: str, wanted: set[str], make_folder: Make, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 3000}
    folder = make_folder("qwen3", torch.bfloat16, **shape)
    script = Path(__file__).with_name("compile_for_hopper.py")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *mode.split()],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = {name.removeprefix("penstock.kernels.").replace(".triton", "") for name in found["compiled"]}
    assert wanted <= names, f"not compiled: {wanted - names}"
    assert found["untouched"], "nothing ran"
    assert found["late"] == 0, "an ordinary step finds all its kernels compiled"
    assert found["built"] == sum(found["compiled"].values()), "and their launchers built"
    assert {"_gather", "_norm", "_rope", "split" if wanted is CODED else "_split", "_survey", "_choose", "_write", "_decode"} <= {
        name for name, _ in found["launched"]
    }
    assert all(mine for _, mine in found["launched"]), "launchers that threads loaded at the same time may be each other's"
