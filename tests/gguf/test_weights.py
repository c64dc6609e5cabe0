"""Tensors of a GGUF file against those of the folder it was made of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_kit import KIND, RANDOM, add, blocks_for, convert, fields_of, folder_of, set_fields, side_by_side, torch_rows, write
from safetensors.torch import load_file

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import dequantise
from penstock.plugins.quantizers.ggml import SCHEMES
from penstock.plugins.quantizers.gguf import Gguf
from penstock.plugins.weights.gguf import GgufWeights

HOST = torch.device("cpu")
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "llama": {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama with biases, tied": {
        **BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "tie_word_embeddings": True
    },
    "mistral": {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}  # fmt: skip
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """files(name, form) -> (tensors of the folder, the GGUF file's path)."""

    def make(name: str, form: str = "F32", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, torch.Tensor], str]:
        folder = folder_of(tmp_path / name.replace(" ", "-"), CONFIGS[name], dtype)
        return load_file(folder / "model.safetensors"), str(convert(folder, tmp_path / "x.gguf", form, **options))

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_the_folders(files: Any, name: str) -> None:
    originals, path = files(name)
    weights = GgufWeights(path, torch.float32)
    for tensor, value in originals.items():
        assert weights.has(tensor)
        assert torch.equal(weights.take(tensor, value.shape), value), tensor
    assert weights.has("lm_head.weight") is ("tied" not in name)
    weights.finish()


@pytest.mark.parametrize(("form", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_narrow_floats_are_kept_as_they_are(files: Any, form: str, dtype: torch.dtype) -> None:
    originals, path = files("llama", form, dtype)
    weights = GgufWeights(path, dtype)
    for tensor, value in originals.items():
        found = weights.take(tensor, value.shape)
        assert found.dtype == dtype
        assert torch.equal(found, value), tensor


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q5_0", "Q3_K", "Q6_K"])
def test_a_layer_is_read_in_its_scheme_and_in_order(files: Any, name: str, form: str) -> None:
    originals, path = files(name, form)
    weights, reader = GgufWeights(path, torch.float32), Gguf({"form": form})
    for layer, heads in ((Q, 4), (K, 2), ("model.layers.0.mlp.down_proj", 0), ("lm_head", 0)):
        value = originals[f"{layer}.weight"]
        scheme = reader.scheme(weights, layer, *value.shape)
        assert scheme == SCHEMES[form]
        found = reader.read(weights, layer, scheme, *value.shape, HOST)
        wide = dequantise(found)
        assert torch.equal(wide, GgufWeights(path, torch.float32).take(f"{layer}.weight", value.shape))
        turned = name == "llama" and heads
        stored = side_by_side(value.numpy(), heads) if turned else value.numpy()
        blocks = blocks_for(stored.shape, form) if form in RANDOM else quantize(stored, KIND[form])
        expected = dequantize(blocks, KIND[form])
        assert torch.equal(torch_rows(side_by_side(wide.numpy(), heads) if turned else wide.numpy()), torch_rows(expected))


def test_forms_with_minima_are_held_wide_and_said_once(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    forms = {"token_embd.weight": "Q5_K", "blk.0.attn_v.weight": "Q6_K", "blk.0.attn_output.weight": "Q8_0"}
    originals, path = files("llama", "Q4_K", forms=forms)
    weights, reader = GgufWeights(path, torch.float32), Gguf({"form": "Q4_K"})
    for name, value in originals.items():
        layer = name.removesuffix(".weight")
        scheme = reader.scheme(weights, layer, *value.shape) if value.dim() > 1 and "embed" not in name else None
        assert (scheme is None) == (layer not in ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"))
        if scheme is None:
            weights.take(name, value.shape)
        else:
            reader.read(weights, layer, scheme, *value.shape, HOST)
    with caplog.at_level(logging.WARNING):
        weights.finish()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "penstock.weights"]
    assert "13 tensors of Q4_K are held in full width" in said  # 7 layers twice and the head, but for the two


def test_what_is_missing_wrong_or_left_over_is_named_as_in_the_file(files: Any) -> None:
    originals, path = files("llama", leave=("blk.1.attn_q.weight",))
    weights = GgufWeights(path, torch.float32)
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor 'blk\.1\.attn_q\.weight' is missing") as caught:
        weights.take(f"{Q}.weight", (256, 512))
    assert caught.value.param == "blk.1.attn_q.weight"
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_k\.weight' has shape \[128, 512\], the fields say \[64, 128\]"):
        weights.take(f"{K}.weight", (64, 128))
    with pytest.raises(
        CheckpointError, match=r"holds tensors that this architecture does not use: blk\.0\.attn_k\.weight, .* and \d+ more"
    ):
        weights.finish()
    for name, value in originals.items():
        if weights.has(name) and name != "lm_head.weight":
            weights.take(name, value.shape)
    with pytest.raises(CheckpointError, match=r"does not use: output\.weight\."):
        weights.finish()
    weights.ignore("lm_head.weight")
    weights.finish()


def test_damaged_blocks_are_named(files: Any) -> None:
    _, path = files("llama", "Q8_0")
    data = bytearray(Path(path).read_bytes())
    start = GgufWeights(path, torch.float32)._file.tensors["blk.1.attn_k.weight"].start
    data[start : start + 2] = b"\x00\x7e"
    Path(path).write_bytes(bytes(data))
    weights, reader = GgufWeights(path, torch.float32), Gguf({"form": "Q8_0"})
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_k\.weight' holds NaN or infinite scales"):
        reader.read(weights, K, SCHEMES["Q8_0"], 128, 512, HOST)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_k\.weight' holds NaN or infinite values"):
        weights.take(f"{K}.weight", (128, 512))


def test_rows_that_are_not_those_of_the_heads_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    set_fields(writer, fields_of(CONFIGS["llama"]), {})
    add(writer, "blk.1.attn_q.weight", np.zeros((100, 512), np.float32), "F32")
    write(writer)
    with pytest.raises(CheckpointError, match="has 100 rows, which are not those of 4 heads"):
        GgufWeights(str(tmp_path / "x.gguf"), torch.float32).take(f"{Q}.weight", (100, 512))


def test_identity_changes_with_fields_and_weights(files: Any) -> None:
    _, path = files("llama")
    first = GgufWeights(path, torch.float32).identity()
    assert GgufWeights(path, torch.bfloat16).identity() == first
    data = Path(path).read_bytes()
    for place in (200, len(data) - 100):
        Path(path).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert GgufWeights(path, torch.float32).identity() != first
        except CheckpointError:  # a field became another
            assert place == 200
