"""From a folder and flags to a runner: checkpoints, sizes, dtypes, plugins, and errors that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penstock.core.contract.hookspecs import AttentionSpec
from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import CheckpointError, ConfigError, EngineFailure, UnsupportedFeature
from penstock.core.protocol.messages import Forward
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.attention import register_attention_backends
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.devices import host_limits, register_devices
from penstock.plugins.devices.driver import Driver, Job
from penstock.plugins.devices.self_test import _difference, self_test
from penstock.plugins.models import register_models
from penstock.plugins.models.api import Columns
from penstock.plugins.weights import register_weight_sources

Load = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0, logprobs=3)


def tokens_of(runner: Any) -> tuple[list[int], list[bytes]]:
    job = Job(prompt=np.arange(30, dtype=np.int32), params=GREEDY, max_tokens=5)
    Driver(runner).run([job])
    return job.tokens, job.logprobs


def test_memory_and_facts_are_exact(folder: Path, load: Load, make_tensors: Any) -> None:
    notes: list[str] = []
    runner = load(folder, notes)
    block_bytes = 2 * 2 * 1 * 16 * 16 * 4
    assert runner.num_blocks == (1 << 20) // block_bytes
    assert runner.memory.kv == runner.num_blocks * block_bytes
    raw = sum(value.nbytes for value in make_tensors().values())
    assert raw <= runner.memory.weights <= 2 * raw  # packed panels are padded
    assert runner.memory.total == runner.memory.weights + runner.memory.workspace + runner.memory.kv + runner.memory.slack
    assert runner.memory.workspace >= 200 * 16 * 4  # the rotary table and the slots
    assert (runner.max_model_len, runner.dtype, runner.attention) == (200, "float32", "native")
    assert runner.kv_layout.endswith(":float32:L2:H1:D16:B16")
    assert notes[0] == "reading config"
    assert notes[-1] == "loaded"


def test_sizes(folder: Path, load: Load) -> None:
    notes: list[str] = []
    small = load(folder, notes, num_gpu_blocks_override=3)
    assert (small.num_blocks, small.max_model_len) == (3, 48)
    assert any("reduced from 200 to 48" in note for note in notes)
    assert load(folder, max_model_len=17).max_model_len == 17
    for over, param in (
        ({"max_model_len": 201}, "max_model_len"),
        ({"max_model_len": 100, "num_gpu_blocks_override": 6}, "max_model_len"),
        ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 1 << 50}, "kv_cache_memory_bytes"),
        ({"num_gpu_blocks_override": 1 << 50}, "num_gpu_blocks_override"),
        ({"block_size": 8}, "block_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": "half"}, "dtype"),
        ({"load_format": "gguf"}, "load_format"),
        ({"attention_backend": "flash"}, "attention_backend"),
    ):
        with pytest.raises(ConfigError) as error:
            load(folder, **over)
        assert error.value.param == param, over


def test_a_cache_that_the_machine_has_no_memory_for_is_said(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "memory_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes 536870912000: a KV cache of \d+ MiB does not fit .* has 1024 MiB"):
        load(folder, kv_cache_memory_bytes=500 << 30)
    monkeypatch.undo()

    real = NativeAttention.allocate

    def refuse(self: NativeAttention, num_blocks: int) -> torch.Tensor:
        if num_blocks > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, num_blocks)

    monkeypatch.setattr("penstock.plugins.attention.native.NativeAttention.allocate", refuse)
    with pytest.raises(ConfigError, match="does not fit here"):
        load(folder)


def test_the_default_cache_is_at_most_half_of_a_small_containers_memory(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, cache in ((800 << 20, 400 << 20), (64 << 30, 1 << 30)):
        monkeypatch.setattr(host_limits, "memory_bytes", lambda memory=memory: memory)
        runner = load(folder, kv_cache_memory_bytes=None)
        assert cache - (1 << 16) < runner.memory.kv <= cache


def test_missing_wrong_and_left_over_tensors_are_named(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    whole = make_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, {k: v for k, v in whole.items() if k != name})
    with pytest.raises(CheckpointError, match="is missing") as error:
        load(folder)
    assert error.value.param == name
    rewrite(folder, {**whole, name: torch.zeros(48, 31)})
    with pytest.raises(CheckpointError, match=r"shape \[48, 31\], the configuration says \[48, 32\]") as error:
        load(folder)
    assert error.value.param == name
    rewrite(folder, {**whole, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(folder)
    rewrite(folder, {**whole, name: torch.zeros(48, 32, dtype=torch.int8)})
    with pytest.raises(UnsupportedFeature, match="no quantization_config"):
        load(folder)
    rewrite(folder, {**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load(folder)


def into_shards(
    folder: Path, whole: dict[str, torch.Tensor], names: tuple[str, str] = ("a.safetensors", "b.safetensors")
) -> dict[str, str]:
    """The tensors in two files, the index to them, and no whole file. Gives the index's table."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    table = {name: names[at % 2] for at, name in enumerate(sorted(whole))}
    for file in names:
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({name: value for name, value in whole.items() if table[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return table


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "/etc/hosts"}}', "outside"),
        (
            '{"weight_map": {"a": "gone.safetensors", "b": "too.safetensors"}}',
            r"gone.safetensors, which does not exist \(nor do 1 more of its 2",
        ),
        ('{"weight_map": [1]}', "no usable"),
        ('{"weight_map": {"a": 3}}', "no usable"),
        ('{"weight_map": {}}', "no usable"),
        ("{}", "no usable"),
        ('{"weight_map": {"a"', "index.json is not valid JSON"),
        ("[" * 100_000, "index.json is nested too deeply"),
        ('{"weight_map": 3}', r"no usable 'weight_map' \(it must be an object"),
        ('{"weight_map": {"a": "config.json"}}', "no readable safetensors file"),
    ],
)
def test_a_shard_index_that_cannot_be_followed_is_named(folder: Path, load: Load, text: str, what: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=what):
        load(folder)


def test_the_whole_file_counts_before_an_index(folder: Path, load: Load, make_tensors: Any, caplog: pytest.LogCaptureFixture) -> None:
    new = make_tensors()
    right = tokens_of(load(folder))
    assert not caplog.records
    into_shards(folder, make_tensors(seed=1), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    assert tokens_of(load(folder)) != right
    save_file(new, folder / "model.safetensors")
    for text in (None, "{", '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        if text is not None:
            (folder / "model.safetensors.index.json").write_text(text)
        caplog.clear()
        runner = load(folder)
        assert tokens_of(runner) == right
        (said,) = (record.getMessage() for record in caplog.records)
        assert "read from model.safetensors; ignored: model.safetensors.index.json, model-00001-of-00002.safetensors" in said
    (folder / "model.safetensors.index.json").unlink()
    assert load(folder).fingerprint == runner.fingerprint


def test_shards_are_those_of_the_index(folder: Path, load: Load, make_tensors: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole = make_tensors()
    right = tokens_of(load(folder))
    into_shards(folder, make_tensors(seed=1), ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"))
    table = into_shards(folder, whole)
    assert tokens_of(load(folder)) == right
    assert "ignored: model-00001-of-00003.safetensors, model-00002-of-00003.safetensors" in caplog.text
    # the files count, not where the index says that a tensor is; of one name, the last file's
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip(table, sorted(table.values()), strict=True))}))
    assert tokens_of(load(folder)) == right
    name = next(name for name, file in table.items() if file == "b.safetensors")
    save_file({**{n: v for n, v in whole.items() if table[n] == "a.safetensors"}, name: whole[name] + 1}, folder / "a.safetensors")
    caplog.clear()
    assert tokens_of(load(folder)) == right
    assert f"several files hold {name}; the last" in caplog.text
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which does not exist\."):
        load(folder)


def test_shards_may_lie_in_a_folder_below(folder: Path, load: Load, make_tensors: Any) -> None:
    right = tokens_of(load(folder))
    into_shards(folder, make_tensors(), ("part/a.safetensors", "part/b.safetensors"))
    assert tokens_of(load(folder)) == right


def test_what_was_not_read_is_said_with_what_is_missing(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    into_shards(folder, make_tensors())
    rewrite(folder, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"embed_tokens.* is missing.*there, but not read: model\.safetensors\.index\.json, a\.saf"):
        load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* \(only a\.safetensors, b\.safetensors\)"):
        load(folder)


def test_a_configuration_without_a_dtype_means_that_of_the_files(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for sharded in (False, True):
            rewrite(folder, make_tensors(dtype), dtype=None)
            if sharded:
                into_shards(folder, make_tensors(dtype))
            assert load(folder).dtype == str(dtype).removeprefix("torch.")
    rewrite(folder, None, torch_dtype="bfloat16")
    assert load(folder).dtype == "bfloat16"
    rewrite(folder, None, dtype="float32")
    assert load(folder).dtype == "float32"


def test_dtypes(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    assert load(folder, dtype="bfloat16").dtype == "bfloat16"
    rewrite(folder, make_tensors(torch.float16), dtype="float16")
    assert load(folder).dtype == "bfloat16"
    assert load(folder, dtype="float").dtype == "float32"


def test_tied_embeddings(folder: Path, load: Load, rewrite: Any, make_tensors: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Like transformers: one tensor is both; two different ones are used as they are, whatever the configuration says."""
    whole = make_tensors()
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    untied = load(folder)
    for lacks in (head, table):
        rewrite(folder, {name: value for name, value in whole.items() if name != lacks})
        with pytest.raises(CheckpointError, match=rf"{lacks}.*is missing"):
            load(folder)
    rewrite(folder, {name: value for name, value in whole.items() if name != head}, tie_word_embeddings=True)
    without = load(folder)
    rewrite(folder, {**whole, head: whole[table].clone()})
    assert (tokens_of(load(folder)), load(folder).memory.weights) == (tokens_of(without), without.memory.weights)
    rewrite(folder, {**{name: value for name, value in whole.items() if name != table}, head: whole[table]})
    assert tokens_of(load(folder)) == tokens_of(without)
    assert "different" not in caplog.text
    rewrite(folder, whole)
    both = load(folder)
    assert tokens_of(both) == tokens_of(untied) != tokens_of(without)
    assert both.memory.weights == untied.memory.weights
    (said,) = (record.getMessage() for record in caplog.records if "different" in record.getMessage())
    assert "'tie_word_embeddings'" in said
    assert head in said
    rewrite(folder, {name: value for name, value in whole.items() if name not in (table, head)})
    with pytest.raises(CheckpointError, match=rf"{table}.*is missing"):
        load(folder)
    rewrite(folder, {**whole, head: torch.zeros(98, 32)})
    with pytest.raises(CheckpointError, match=rf"{head}.*has shape"):
        load(folder)


def test_dummy_weights_depend_on_the_seed_only(folder: Path, load: Load) -> None:
    (folder / "model.safetensors").unlink()
    a, b, c = (load(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert tokens_of(a) == tokens_of(b) != tokens_of(c)
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_fingerprint_changes_with_what_changes_numerics(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    prints = [
        load(folder).fingerprint,
        load(folder, dtype="bfloat16").fingerprint,
        load(folder, attention_backend="torch").fingerprint,
        load(folder, hf_overrides={"rms_norm_eps": 1e-6}).fingerprint,
    ]
    assert load(folder).fingerprint == prints[0]
    rewrite(folder, make_tensors(seed=1))
    prints.append(load(folder).fingerprint)
    assert len(set(prints)) == len(prints)


def test_unknown_architecture(folder: Path, load: Load, rewrite: Any) -> None:
    rewrite(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedFeature, match=r"MambaForCausalLM.*Known: LlamaForCausalLM"):
        load(folder)


def test_head_sizes_that_no_backend_takes(folder: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match="head_dim 24 is no multiple of 16"):
        load(folder, hf_overrides={"head_dim": 24})


def test_parts_come_from_the_plugin_host(folder: Path, load: Load) -> None:
    builtin = {spec.name: spec for spec in register_attention_backends()}
    asked: list[Any] = []
    strange = AttentionSpec(
        name="mine", api_level=2, devices=["cpu"], supports=lambda facts, dtype: None, factory=builtin["torch"].factory, priority=-5
    )
    elsewhere = AttentionSpec(
        name="cuda-only", api_level=2, devices=["cuda"], supports=lambda facts, dtype: None, factory=builtin["torch"].factory, priority=99
    )

    def choose(**facts: Any) -> str | None:
        asked.append(facts["candidates"])
        return "mine"

    host = SimpleNamespace(
        models=lambda: {spec.name: spec for spec in register_models()},
        weight_sources=lambda: {spec.name: spec for spec in register_weight_sources()},
        quantizers=dict,
        attention_backends=lambda: {**builtin, "mine": strange, "cuda-only": elsewhere},
        hook=SimpleNamespace(choose_attention_backend=choose),
    )
    runner = load(folder, plugins=host)
    assert asked == [["native", "torch", "mine"]]
    assert tokens_of(runner)[0] == tokens_of(load(folder, plugins=host, attention_backend="native"))[0]
    assert len(asked) == 1


def test_the_cpu_is_registered_and_honest() -> None:
    spec = next(spec for spec in register_devices() if spec.name == "cpu")
    assert (spec.name, spec.available(), spec.api_level) == ("cpu", True, 1)
    device = spec.factory()
    assert (device.capabilities.depth, device.capabilities.synchronous) == (2, True)
    assert device.capabilities.dtypes == ["bfloat16", "float32"]


def test_warm_up_and_self_test(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for over in ({}, {"max_num_seqs": 1}, {"num_gpu_blocks_override": 8, "max_num_batched_tokens": 5}):
        runner = load(folder, deterministic=True, **over)
        runner.warm_up(said.append)
    assert any("self-test: preempted" in line for line in said)
    with pytest.raises(EngineFailure, match="too small for the self-test"):
        load(folder, deterministic=True, num_gpu_blocks_override=3).warm_up(said.append)
    runner = load(folder, deterministic=True)
    honest = runner._program

    def sensitive(columns: Columns, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        honest(columns, rows, hidden)
        hidden.mul_(1.0 + 1e-6 * (columns.kv_len.shape[0] > 1))  # numerics that depend on the batch

    runner._program = sensitive
    with pytest.raises(
        EngineFailure, match=r"self-test failed on this machine with the attention backend 'native': .*the log-probabilities are not"
    ):
        runner.warm_up(said.append)


def test_the_self_test_looks_beyond_a_seam(folder: Path, load: Load) -> None:
    """Sums that begin anew after so many keys: a fault that shows only there is found, if and only if the runner says where."""
    runner = load(folder, deterministic=True, num_gpu_blocks_override=40)
    seam, far, said = 80, [False], list[str]()
    self_test(runner, said.append, seam)
    assert any("long, preempted" in line for line in said)
    honest, forward = runner._program, runner.forward

    def watched(work: Forward) -> None:
        far[0] = bool(((work.starts + work.counts) > seam).any())
        forward(work)

    def sensitive(columns: Columns, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        honest(columns, rows, hidden)
        hidden.mul_(1.0 + 1e-6 * (far[0] and columns.kv_len.shape[0] > 1))

    runner.forward, runner._program = watched, sensitive
    self_test(runner, said.append)
    with pytest.raises(EngineFailure, match="a sequence run long and batched differs from itself alone"):
        self_test(runner, said.append, seam)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to("gone"), r"model.safetensors cannot be read: it is a link to gone, which does not exist"),
        (lambda path: path.mkdir(), r"model.safetensors cannot be read: it is a folder"),
    ],
)
def test_a_checkpoint_that_is_no_file_is_named(folder: Path, load: Load, make: Any, what: str) -> None:
    (folder / "model.safetensors").unlink()
    make(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=what):
        load(folder)


def test_a_checkpoint_that_may_not_be_read_is_named(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so somebody has to say no."""
    whole = Path.open

    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: permission denied"):
        load(folder)


def test_weights_that_are_no_numbers_are_told_so_and_the_self_test_says_what_differs(folder: Path, load: Load) -> None:
    runner = load(folder)
    real = runner.sample
    runner.attention = "odd"

    def bad(work: Any) -> Any:
        done = real(work)
        return lambda: msgspec.structs.replace(done(), bad_rows=i32([0]))

    runner.sample = bad
    with pytest.raises(CheckpointError, match=r"logits are not finite .* its weights are broken"):
        runner.warm_up(lambda phase: None)
    one, other = (
        Job(prompt=i32([1]), params=SamplingParams(), max_tokens=1, tokens=[5], logprobs=[np.float32([-1.0, value]).tobytes()])
        for value in (-2.0, -2.5)
    )
    assert _difference(one, other) == "the tokens are equal, the log-probabilities are not: at token 1 by up to 0.5"
