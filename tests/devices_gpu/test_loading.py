"""Loading: sizes and their errors, memory refused, dummy weights, and a look for a GPU that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.core.contract.host import PluginHost
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.plugins import devices
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.cuda import DTYPES
from penstock.plugins.devices.loading import choose_attention, resolve_dtype
from penstock.plugins.devices.runner import BUCKETS, buckets_for, padded_rows
from penstock.plugins.models.config import decoder_facts, read_config

Make = Callable[..., Any]


def scarce(most: int) -> type[TorchAttention]:
    """On a driver that gives at most `most` blocks."""

    class Scarce(TorchAttention):
        def allocate(self, num_blocks: int) -> Any:
            if num_blocks > most:
                raise torch.OutOfMemoryError("no")
            return super().allocate(num_blocks)

    return Scarce


def test_the_cache_shrinks_and_says_so(folder: Path, host_runner: Make) -> None:
    notes: list[str] = []
    runner = host_runner(folder, attention=scarce(80), notes=notes, num_gpu_blocks_override=100)
    assert runner.num_blocks == 80  # 100, 95, 90, 85, 80 ... each try takes 95 % of the last
    assert any("KV cache reduced to 80 of 100 blocks" in note for note in notes)
    for asked, flag in (
        ({"num_gpu_blocks_override": 100}, "num-gpu-blocks-override"),
        ({"kv_cache_memory_bytes": 1 << 22}, "kv-cache-memory-bytes"),
    ):
        with pytest.raises(ConfigError, match=f"Lower --{flag}") as caught:
            host_runner(folder, attention=scarce(40), **asked)
        assert caught.value.param == flag.replace("-", "_")


def test_the_memory_table_adds_up(folder: Path, host_runner: Make) -> None:
    runner = host_runner(folder)
    memory = runner.memory
    assert memory.weights == sum(p.stat().st_size for p in folder.glob("*.safetensors")) - _header(folder / "model.safetensors")
    assert memory.kv == (1 << 20) // (2 * 2 * 2 * 16 * 16 * 4) * (2 * 2 * 2 * 16 * 16 * 4)
    assert memory.total == memory.weights + memory.workspace + memory.graphs + memory.kv + memory.slack
    assert memory.workspace >= runner.history.nbytes + runner.table.nbytes + runner.sampler.nbytes


def _header(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def test_lengths(folder: Path, host_runner: Make) -> None:
    notes: list[str] = []
    assert host_runner(folder, notes=notes, num_gpu_blocks_override=3).max_model_len == 48
    assert any("max_model_len reduced from 200 to 48" in note for note in notes)
    with pytest.raises(ConfigError, match="--max-model-len 100 does not fit"):
        host_runner(folder, num_gpu_blocks_override=3, max_model_len=100)
    with pytest.raises(ConfigError, match="power of two"):
        host_runner(folder, block_size=48)
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes 100 is less than one block") as caught:
        host_runner(folder, kv_cache_memory_bytes=100)
    assert caught.value.param == "kv_cache_memory_bytes"


def test_wrong_checkpoints_are_named(folder: Path, host_runner: Make) -> None:
    from safetensors.torch import load_file, save_file

    named = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in named.items() if k != "model.layers.1.mlp.up_proj.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        host_runner(folder)
    save_file({**named, "model.extra.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        host_runner(folder)


def test_dummy_weights_need_no_file(folder: Path, host_runner: Make) -> None:
    (folder / "model.safetensors").unlink()
    runner = host_runner(folder, load_format="dummy", seed=3)
    again = host_runner(folder, load_format="dummy", seed=3)
    other = host_runner(folder, load_format="dummy", seed=4)
    assert torch.equal(runner._model._blocks[0].qkv.weight, again._model._blocks[0].qkv.weight)
    assert not torch.equal(runner._model._blocks[0].qkv.weight, other._model._blocks[0].qkv.weight)
    assert runner.fingerprint != other.fingerprint


def test_dtypes(folder: Path) -> None:
    facts = decoder_facts(read_config(folder))
    assert resolve_dtype("auto", facts, DTYPES, "cuda", "bfloat16") == "bfloat16"
    assert resolve_dtype("half", facts, DTYPES, "cuda", "bfloat16") == "float16"
    with pytest.raises(ConfigError, match="--dtype float32 is not supported on the GPU"):
        resolve_dtype("float32", facts, DTYPES, "cuda", "bfloat16")


def test_attention_is_chosen_among_those_of_a_gpu(folder: Path, config_for: Make) -> None:
    facts = decoder_facts(read_config(folder))
    assert choose_attention(config_for(folder), facts, "bfloat16", "cuda").name == "triton"
    with pytest.raises(ConfigError, match=r"native.*Usable: triton, torch"):
        choose_attention(config_for(folder, attention_backend="native"), facts, "bfloat16", "cuda")
    with pytest.raises(ConfigError, match="triton: dtype float32"):
        choose_attention(config_for(folder, attention_backend="triton"), facts, "float32", "cuda")


def test_buckets() -> None:
    assert buckets_for(1) == [1]
    assert buckets_for(5) == [1, 2, 4, 8]
    assert buckets_for(256)[-2:] == [224, 256]
    assert buckets_for(4000) == list(BUCKETS)
    assert (padded_rows(5), padded_rows(4000)) == (8, 4000)


def test_looking_for_a_gpu_imports_nothing() -> None:
    code = (
        "import sys; from penstock.plugins import attention, devices, models, weights; devices.cuda_available();"
        "[hook() for hook in (devices.register_devices, attention.register_attention_backends, models.register_models)];"
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gpu_needs_a_driver_a_build_and_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER_FILES", (str(tmp_path / "none"),))
    assert not devices.cuda_available()
    monkeypatch.setattr(devices, "DRIVER_FILES", (str(tmp_path),))

    class Found:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: Found)
    assert not devices.cuda_available()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert not devices.cuda_available()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert devices.cuda_available()
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if name == "triton" else Found)
    assert not devices.cuda_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_cpu_is_chosen() -> None:
    host = PluginHost("engine").load()
    assert host.choose_device("auto").name == "cpu"
    with pytest.raises(ConfigError, match="no such device"):
        host.choose_device("cuda")
    assert build({}).device == "auto"


def test_tied_embeddings_are_what_the_file_holds(make_folder: Make, host_runner: Make) -> None:
    """As on the CPU, which is compared with transformers: one tensor is both, two different ones are used as they are."""
    from safetensors.torch import load_file, save_file

    folder = make_folder(tie_word_embeddings=True)
    named = load_file(folder / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    named |= {head: torch.flip(named[table], [0])}
    for drop, change, same in (((), {}, False), ((), {head: named[table].clone()}, True), ((head,), {}, True), ((table,), {}, True)):
        kept = {name: value for name, value in {**named, **change}.items() if name not in drop}
        save_file(kept, folder / "model.safetensors")
        model = host_runner(folder)._model
        assert (model.plain.head.weight is model.plain.embedding) == same
        assert torch.equal(model.plain.embedding, kept.get(table, kept.get(head)))
        assert torch.equal(model.plain.head.weight, kept.get(head, kept.get(table)))
        assert model.weights_bytes == sum(value.nbytes for value in kept.values()) - (kept[head].nbytes if same and len(drop) == 0 else 0)


def test_a_plugins_weights_come_before_the_built_in_ones(folder: Path, host_runner: Make) -> None:
    from penstock.core.contract.hookspecs import WeightSourceSpec
    from penstock.plugins.models import register_models
    from penstock.plugins.weights import register_weight_sources
    from penstock.plugins.weights.dummy import DummyWeights

    mine = WeightSourceSpec(
        name="mine",
        api_level=1,
        load_formats=["auto", "odd"],
        factory=lambda path, load_format, *, dtype, **_: DummyWeights(dtype=dtype, seed=3),
    )
    host = SimpleNamespace(
        models=lambda: {spec.name: spec for spec in register_models()},
        quantizers=dict,
        weight_sources=lambda: {**{spec.name: spec for spec in register_weight_sources()}, "mine": mine},
    )
    right = host_runner(folder, load_format="dummy", seed=3)._model._blocks[0].qkv.weight
    assert torch.equal(host_runner(folder, load_format="auto", plugins=host)._model._blocks[0].qkv.weight, right)
    assert torch.equal(host_runner(folder, load_format="odd", plugins=host)._model._blocks[0].qkv.weight, right)
    assert not torch.equal(host_runner(folder, load_format="safetensors", plugins=host)._model._blocks[0].qkv.weight, right)
