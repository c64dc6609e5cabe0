"""Every format's layers, read, mean what the format's description says; wrong ones are refused by name; a model of them answers as its wide twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_formats import FORMATS, Format, Layer, ct, mxfp4, nf4

from penstock.core.contract.devices import ModelFacts, RunnerConfig
from penstock.core.protocol.errors import CheckpointError, ConfigError, UnsupportedFeature
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.linear.scheme import Scheme, dequantise
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.driver import Driver, Job
from penstock.plugins.devices.quantising import quantizer_for, say_wide
from penstock.plugins.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
FACTS = ModelFacts(
    architecture="LlamaForCausalLM", model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position=200, rms_norm_eps=1e-5, torch_dtype="float32", tie_word_embeddings=False,
)  # fmt: skip
"""Of the models here."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
LAYERS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32)} | {
    "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
}  # fmt: skip
SHAPES = [(32, 48), (16, 64), (72, 80)]


def settings(path: Path | str, **over: Any) -> RunnerConfig:
    fields: dict[str, Any] = {
        "model_path": str(path), "dtype": "auto", "max_model_len": None, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 1 << 20, "num_gpu_blocks_override": None, "gpu_memory_utilization": 0.9, "load_format": "auto",
        "deterministic": False, "enforce_eager": False, "attention_backend": None, "seed": 0, "threads": 2, "max_logprobs": 20,
    }  # fmt: skip
    return RunnerConfig(**{**fields, **over})


def blamed(name: str, call: str, what: Exception | str) -> Exception:
    return AssertionError(f"{name} {call} {what}")


def reader(config: dict[str, Any]) -> Any:
    made = quantizer_for(settings("."), {"quantization_config": config}, FACTS, "cpu", blamed)
    assert made is not None
    return made


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder, torch.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_means_what_its_format_says(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    form, (n, k) = FORMATS[name], shape
    layer = form.make(np.random.default_rng(), n, k)
    weights = checkpoint(tmp_path, {f"one{end}": value for end, value in layer.tensors.items()})
    quantizer = reader(form.config)
    scheme = quantizer.scheme(weights, "one", n, k)
    assert scheme is not None
    read = quantizer.read(weights, "one", scheme, n, k, CPU)
    weights.ignore("one.g_idx", "one.weight_format", "one.qzeros")
    weights.finish()  # nothing of it was left
    assert torch.equal(dequantise(read), torch.from_numpy(layer.dense).float())
    assert (read.n, read.k, read.scheme) == (n, k, scheme)
    assert read.data.dtype == scheme.dtype
    assert read.data.shape == (n, k if scheme.bits == 8 else -(-k // 2))
    assert read.scales.shape == (scheme.scale_rows(n), scheme.groups(k))
    assert (read.perm is not None) == scheme.permuted
    assert (read.zeros is not None) == scheme.zeros
    assert read.nbytes <= scheme.nbytes(n, k) + 4
    assert quantizer.scheme(weights, "two", n, k) is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_layer_is_refused_by_name(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    form = FORMATS[name]
    whole = form.make(rng, 32, 48).tensors
    quantizer = reader(form.config)

    def read(tensors: dict[str, torch.Tensor]) -> None:
        weights = checkpoint(tmp_path, {f"one{end}": value for end, value in tensors.items()})
        scheme = quantizer.scheme(weights, "one", 32, 48)
        assert scheme is not None
        quantizer.read(weights, "one", scheme, 32, 48, CPU)

    for end in (".qweight", ".weight_packed", ".weight", ".scales", ".weight_scale", ".weight_scale_inv", ".SCB", ".weight.absmax"):
        if end not in whole:
            continue
        value = whole[end]
        wrong = [value[: value.shape[0] // 2].contiguous()] if value.dim() and value.shape[0] > 1 else []
        if value.is_floating_point() and value.dtype.itemsize > 1:
            bad = value.clone()
            bad.view(-1)[0] = float("nan")
            wrong.append(bad)
        for one in wrong:
            with pytest.raises(CheckpointError) as error:
                read({**whole, end: one})
            assert f"one{end}" in error.value.message


def model_folder(folder: Path, form: Format | None, seed: int, wide: set[str] = frozenset()) -> tuple[Path, Path]:  # type: ignore[assignment]
    """(a model whose linear layers are in this format but for those named in `wide`, its twin in float32)."""
    rng = np.random.default_rng(seed)
    plain = {"model.embed_tokens.weight": (97, 32), "model.norm.weight": (32,), "lm_head.weight": (97, 32)}
    for layer in range(2):
        plain |= {f"model.layers.{layer}.{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
    dense = {name: torch.from_numpy(rng.normal(0, 0.3, shape)).float() for name, shape in plain.items()}
    stored = dict(dense)
    for index in range(2):
        for short, (n, k) in LAYERS.items():
            name = f"model.layers.{index}.{short}"
            made = form.make(rng, n, k) if form is not None else Layer({}, rng.normal(0, 0.1, (n, k)))
            dense[f"{name}.weight"] = torch.from_numpy(made.dense).float()
            if form is None or short in wide:
                stored[f"{name}.weight"] = dense[f"{name}.weight"]
            else:
                stored |= {f"{name}{end}": value for end, value in made.tensors.items()}
    for path, tensors, config in ((folder / "q", stored, form and form.config), (folder / "wide", dense, None)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG | ({"quantization_config": config} if config else {})))
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    return folder / "q", folder / "wide"


def answers(path: Path, **over: Any) -> tuple[list[int], np.ndarray[Any, Any]]:
    runner = CpuDevice().load(settings(path, **over), lambda phase, fraction: None)
    job = Job(prompt=np.arange(30, dtype=np.int32), params=SamplingParams(temperature=0.0, logprobs=5), max_tokens=6)
    Driver(runner).run([job])
    return job.tokens, np.concatenate([np.frombuffer(part, dtype=np.float32) for part in job.logprobs])


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_answers_as_its_wide_twin(name: str, tmp_path: Path) -> None:
    quantised, wide = model_folder(tmp_path, FORMATS[name], 7)
    (tokens, logprobs), (expected, others) = answers(quantised), answers(wide)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, others, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("wide", [{"self_attn.k_proj"}, {"mlp.up_proj", "self_attn.o_proj"}, {"mlp.gate_proj"}])
def test_layers_that_stayed_wide_join_quantised_ones(wide: set[str], tmp_path: Path) -> None:
    quantised, twin = model_folder(tmp_path, FORMATS["awq"], 8, wide)
    (tokens, logprobs), (expected, others) = answers(quantised), answers(twin)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, others, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("word", ["int8", "int8-w8a8", "fp8", "int4", "nf4", "mxfp4"])
def test_a_wide_model_is_rounded_while_it_loads(word: str, tmp_path: Path) -> None:
    _, wide = model_folder(tmp_path, None, 9)
    (_, logprobs), (_, exact) = answers(wide, quantization=word), answers(wide)
    gap = float(np.abs(logprobs[:6] - exact[:6]).mean())
    assert 0 < gap < (0.1 if word in ("int8", "int8-w8a8", "fp8") else 1.0)


QUANTIZATION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"quant_method": "exl3"}, UnsupportedFeature, "quant_method"),
    ({"bits": 4}, CheckpointError, "quant_method"),
    ({"quant_method": "gptq", "group_size": 8}, CheckpointError, "bits"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 8}, UnsupportedFeature, "bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, CheckpointError, "group_size"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "marlin"}, UnsupportedFeature, "checkpoint_format"),
    ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, UnsupportedFeature, "version"),
    ({"quant_method": "awq", "bits": 8, "group_size": 8}, UnsupportedFeature, "bits"),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 8, "packing_format": "auto_round:exllamav2"}, UnsupportedFeature, "packing_format"),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, UnsupportedFeature, "format"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, CheckpointError, "config_groups"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"]}}}, UnsupportedFeature, "weights"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 2}}}}, UnsupportedFeature, "num_bits"),
    ({**FORMATS["ct w4a16"].config, "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [{"location": "weight_output"}, {"location": "input"}]}}}}, UnsupportedFeature, "transform_config"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, CheckpointError, "weight_block_size"),
    ({"quant_method": "fp8", "activation_scheme": "none"}, UnsupportedFeature, "activation_scheme"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, UnsupportedFeature, "quant_algo"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, UnsupportedFeature, "bnb_4bit_quant_type"),
    ({"quant_method": "bitsandbytes"}, CheckpointError, "load_in_4bit"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "kind", "param"), QUANTIZATION)
def test_what_cannot_be_read_rightly_is_refused_by_name(config: dict[str, Any], kind: type[Any], param: str) -> None:
    with pytest.raises(kind) as error:
        quantizer_for(settings("."), {"quantization_config": config}, FACTS, "cpu", blamed)
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    ("word", "config", "says"),
    [
        ("int9", None, "Known: fp8, int4, int8, int8-w8a8, mxfp4, nf4"),
        ("awq", None, "config.json has no quantization_config"),
        ("int4", {"quant_method": "awq", "bits": 4, "group_size": 8}, "quantised already"),
    ],
)
def test_wrong_options_are_said(word: str, config: dict[str, Any] | None, says: str) -> None:
    raw = {} if config is None else {"quantization_config": config}
    with pytest.raises(ConfigError, match=says) as error:
        quantizer_for(settings(".", quantization=word), raw, FACTS, "cpu", blamed)
    assert error.value.param == "quantization"


@pytest.mark.parametrize("word", ["awq", "awq_marlin"])
def test_an_option_that_says_what_the_checkpoint_is_is_taken(word: str) -> None:
    raw = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8}}
    assert quantizer_for(settings(".", quantization=word), raw, FACTS, "cpu", blamed) is not None


def test_groups_of_act_order_must_have_the_size_that_is_said(tmp_path: Path) -> None:
    layer = FORMATS["gptq 4 act-order"].make(np.random.default_rng(), 32, 48)
    index = layer.tensors[".g_idx"].clone()
    index[0] = (index[0] + 1) % 6
    weights = checkpoint(tmp_path, {f"one{end}": value for end, value in (layer.tensors | {".g_idx": index}).items()})
    with pytest.raises(CheckpointError, match=r"one\.g_idx"):
        reader(FORMATS["gptq 4 act-order"].config).scheme(weights, "one", 32, 48)


@pytest.mark.parametrize(
    ("inputs", "activations"),
    [
        (None, ""),
        ({"num_bits": 8, "strategy": "token", "dynamic": True}, "token"),
        ({"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}, "tensor"),
        (
            {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": False},
            "token",
        ),  # the scale alone would cut off most of the range
    ],
)
def test_how_inputs_are_rounded(inputs: dict[str, Any] | None, activations: str) -> None:
    scheme = reader(ct("int-quantized", inputs, num_bits=8, strategy="channel")).scheme(object(), "model.layers.0.mlp.up_proj", 64, 32)
    assert scheme.activations == activations


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"a": {"targets": ["re:.*one"], "weights": weights}},
    }
    layer = mxfp4(np.random.default_rng(), 16, 64)
    source = checkpoint(tmp_path, {f"one{end}": value for end, value in layer.tensors.items()})
    quantizer = reader(config)
    scheme = quantizer.scheme(source, "one", 16, 64)
    assert torch.equal(dequantise(quantizer.read(source, "one", scheme, 16, 64, CPU)), torch.from_numpy(layer.dense).float())

    tensors = {f"one{end}": value.clone() for end, value in layer.tensors.items()}
    tensors["one.weight_scale"][3, 1] = 255  # no number
    with pytest.raises(CheckpointError, match=r"'one\.weight_scale' holds NaN"):
        quantizer.read(checkpoint(tmp_path, tensors), "one", scheme, 16, 64, CPU)


@pytest.mark.parametrize(("name", "end"), [("gptq 4 act-order", ".g_idx"), ("ct w4a16 ordered", ".weight_g_idx")])
def test_an_order_that_is_missing_is_refused(name: str, end: str, tmp_path: Path) -> None:
    tensors = FORMATS[name].make(np.random.default_rng(), 32, 48).tensors
    weights = checkpoint(tmp_path, {f"one{one}": value for one, value in tensors.items() if one != end})
    with pytest.raises(CheckpointError, match=f"one{end}' is missing"):
        reader(FORMATS[name].config).scheme(weights, "one", 32, 48)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("auto-round gptq", {"extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, "model.layers.0": {"bits": 4, "sym": True}}}),
        ("ct w4a16", {"transform_config": {"config_groups": {"v": {"type": "hadamard", "apply": [{"location": "weight_output"}]}}}}),
    ],
)
def test_settings_that_change_nothing_are_taken(name: str, more: dict[str, Any]) -> None:
    reader(FORMATS[name].config | more)


def test_blocks_that_cross_rows_are_refused(tmp_path: Path) -> None:
    layer = nf4(np.random.default_rng(), 16, 24, block=16, double=False)
    weights = checkpoint(tmp_path, {f"one{end}": value for end, value in layer.tensors.items()})
    with pytest.raises(UnsupportedFeature, match="multiple of 16"):
        reader(FORMATS["bnb nf4"].config).scheme(weights, "one", 16, 24)


def test_layers_that_are_held_wide_are_said_with_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    say_wide({Scheme("int8", 48, zeros=True): (3, 1_230_000_000), Scheme("int4"): (1, 0)}, "CUDA")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("3 layers of int8 (groups of 48, zero points) are held in full width on CUDA")
    assert "1.23 GB more memory" in first
    assert "int4 (no groups)" in second


def test_without_a_configuration_quantised_tensors_are_refused(tmp_path: Path) -> None:
    quantised, _ = model_folder(tmp_path, FORMATS["ct w8a8 token"], 3)
    (quantised / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedFeature, match="no quantization_config"):
        answers(quantised)


@pytest.mark.parametrize("name", ["awq", "gptq 4 sym", "ct fp8", "fp8 blocks", "bnb nf4", "modelopt nvfp4"])
def test_invented_weights_have_the_scheme(name: str, tmp_path: Path) -> None:
    quantised, _ = model_folder(tmp_path, FORMATS[name], 3)
    (quantised / "model.safetensors").unlink()
    assert len(answers(quantised, load_format="dummy")[0]) == 6
