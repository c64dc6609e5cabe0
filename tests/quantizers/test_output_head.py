"""Quantised output heads: of checkpoints that store one, tied or not, and of --lm-head-quantization. The embedding table beside it stays what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS
from test_readers import CONFIG, answers, model_folder

from penstock.core.contract.devices import ModelFacts
from penstock.core.protocol.errors import ConfigError
from penstock.kernels.linear.scheme import Scheme, dequantise, quantise
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.models.builder import Builder
from penstock.plugins.quantizers.online import SCHEMES, Online

VOCAB, HIDDEN = 104, 32
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
CPU = torch.device("cpu")


def changed(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> None:
    """Other fields and tensors (None: away with it)."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    whole = load_file(folder / "model.safetensors") | tensors
    save_file({name: value.contiguous() for name, value in whole.items() if value is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["ct w4a16", "ct w8a8 token", "ct fp8", "gptq 4 sym", "auto-round gptq", "awq", "bnb nf4"])
def test_a_stored_head_is_read_whatever_is_tied(name: str, tied: bool, tmp_path: Path) -> None:
    form = FORMATS[name]
    if "config_groups" in form.config:
        form = form._replace(config=form.config | {"ignore": []})
    form = form._replace(config=form.config | ({"lm_head": True} if name.startswith("gptq") else {}))
    quantised, wide = model_folder(tmp_path, form, 5)
    head = form.make(np.random.default_rng(6), VOCAB, HIDDEN)
    table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.3
    stored: dict[str, torch.Tensor | None] = {f"lm_head{end}": value.contiguous() for end, value in head.tensors.items()}
    changed(quantised, {"vocab_size": VOCAB, "tie_word_embeddings": tied}, {HEAD: None} | stored | {TABLE: table})  # type: ignore[dict-item]
    changed(wide, {"vocab_size": VOCAB}, {HEAD: torch.from_numpy(head.dense).float(), TABLE: table})
    (tokens, logprobs), (expected, others) = answers(quantised), answers(wide)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, others, rtol=2e-3, atol=2e-3)


def twin(tmp_path: Path, word: str, tied: bool) -> tuple[Path, Path]:
    """(a wide model, one whose head has the values that rounding gives)."""
    _, wide = model_folder(tmp_path, None, 9)
    tensors = load_file(wide / "model.safetensors")
    if tied:
        changed(wide, {"tie_word_embeddings": True}, {HEAD: None})
    rounded = dequantise(quantise(tensors[TABLE if tied else HEAD], SCHEMES[word]))
    other = tmp_path / "twin"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors | {HEAD: rounded}, other / "model.safetensors")
    return wide, other


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("word", ["int8", "fp8"])
def test_a_wide_head_is_rounded_if_it_is_asked_for(word: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide, other = twin(tmp_path, word, tied)
    (tokens, logprobs), (expected, others) = answers(wide, lm_head_quantization=word), answers(other)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, others, rtol=2e-3, atol=2e-3)
    assert not np.array_equal(logprobs, answers(wide)[1])
    assert f"--lm-head-quantization {word}" in caplog.text
    assert ("tied" in caplog.text) == tied


def test_both_options_go_together_and_with_a_quantised_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, wide = model_folder(tmp_path / "a", None, 9)
    quantised, _ = model_folder(tmp_path / "b", FORMATS["awq"], 9)
    for path, over in ((wide, {"quantization": "int8"}), (quantised, {})):
        (_, logprobs), (_, others) = answers(path, **over), answers(path, **over, lm_head_quantization="int8")
        gap = float(np.abs(logprobs[:6] - others[:6]).mean())
        assert 0 < gap < 0.1


def test_where_it_has_no_place_it_is_refused(tmp_path: Path) -> None:
    quantised, wide = model_folder(tmp_path, FORMATS["ct w8a8 token"], 5)
    with pytest.raises(ConfigError, match="no plugin knows it") as error:
        answers(wide, lm_head_quantization="int9")
    assert error.value.param == "lm_head_quantization"
    head = FORMATS["ct w8a8 token"].make(np.random.default_rng(6), 97, HIDDEN)
    changed(quantised, {}, {HEAD: None} | {f"lm_head{end}": value for end, value in head.tensors.items()})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="quantised already"):
        answers(quantised, lm_head_quantization="int8")


class Made:
    """A wide source, which counts what is taken."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.taken: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.names

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        self.taken.append(name)
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)))

    def ignore(self, *names: str) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.parametrize("later", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_device_reads_each_tensor_once(tied: bool, later: bool) -> None:
    facts = ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=64, max_position=64, torch_dtype="float32", tie_word_embeddings=tied,
    )  # fmt: skip
    weights = Made(TABLE) if tied else Made(TABLE, HEAD)
    builder = Builder(weights, HostOps(), torch.float32, CPU, None, None, Online("int8", head=True))
    if later:
        builder._later = []
    table, make_head = builder.ends(facts)
    head = make_head()
    builder.finish()
    wide = Made().take(TABLE if tied else HEAD, (VOCAB, 64))
    assert torch.equal(table, Made().take(TABLE, (VOCAB, 64)))
    assert sorted(weights.taken) == sorted(weights.names)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x), x @ dequantise(quantise(wide, Scheme("int8"))).t(), rtol=1e-4, atol=1e-4)
    assert builder.rounded == Scheme("int8")
    assert builder.nbytes == table.nbytes + head.nbytes


def test_a_device_without_kernels_says_so() -> None:
    facts = ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=64, max_position=64, torch_dtype="float32", tie_word_embeddings=True,
    )  # fmt: skip
    builder = Builder(Made(TABLE), TorchOps(), torch.float32, CPU, None, None, Online("int8", head=True))
    with pytest.raises(ConfigError, match="output head of 104 x 64") as error:
        builder.ends(facts)
    assert error.value.param == "lm_head_quantization"
