"""`penstock quantize`: what is written is read again with the same values, by Penstock and by transformers; nothing is overwritten, and an ended run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.kernels.linear.scheme import Scheme, dequantise
from penstock.plugins.commands.quant import writing
from penstock.plugins.commands.quant.command import quantize
from penstock.plugins.commands.quant.comparing import Loaded, relative_error
from penstock.plugins.commands.quant.forms import FORMATS, scheme_of
from penstock.plugins.quantizers.bitsandbytes import Bitsandbytes
from penstock.plugins.quantizers.compressed import CompressedTensors
from penstock.plugins.weights.checkpoint import Checkpoint

HIDDEN, INNER, VOCAB, LAYERS = 128, 256, 96, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A random model's folder."""
    folder = tmp_path / "wide"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn(VOCAB, HIDDEN), "lm_head.weight": drawn(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for index in range(LAYERS):
        at = f"model.layers.{index}"
        tensors |= {f"{at}.{name}.weight": drawn(*shape) for name, shape in SHAPES.items()}
        tensors |= {f"{at}.{name}.weight": torch.ones(HIDDEN).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


def asked(*words: object) -> Result:
    return CliRunner().invoke(quantize, [str(word) for word in words])


def meant(folder: Path, name: str) -> torch.Tensor:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


def read_back(out: Path) -> dict[str, torch.Tensor]:
    """Every quantised layer as Penstock's reader has it."""
    weights = Checkpoint(out, torch.float32)
    quantizer = CompressedTensors(json.loads((out / "config.json").read_text())["quantization_config"])
    found: dict[str, torch.Tensor] = {}
    for index in range(LAYERS):
        for name, shape in SHAPES.items():
            layer = f"model.layers.{index}.{name}"
            scheme = quantizer.scheme(weights, layer, *shape)
            if scheme is not None:
                found[layer] = dequantise(quantizer.read(weights, layer, scheme, *shape, torch.device("cpu")))
    return found


@pytest.mark.parametrize("word", FORMATS)
def test_what_is_written_is_read_bit_for_bit(word: str, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = asked(wide, "--scheme", word, "--out", out)
    assert said.exit_code == 0, said.output
    assert f"quant report {out} --against {wide}" in said.output
    plan = writing.plan(writing.open_source(wide), word)
    found = read_back(out)
    assert set(found) == set(plan.schemes)
    assert len(found) == LAYERS * len(SHAPES)
    for layer, scheme in plan.schemes.items():
        weight = meant(wide, f"{layer}.weight")
        assert torch.equal(found[layer], dequantise(writing.nearest(plan)(layer, weight, scheme)))
        assert not torch.equal(found[layer], weight.float())
    weights = Checkpoint(out, torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights.raw(name), meant(wide, name))
    assert (out / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("word", ["w4a16", "w8a16", "int8", "fp8", "fp8-block"])
def test_transformers_reads_the_same_weights(word: str, wide: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = tmp_path / "out"
    assert asked(wide, "--scheme", word, "--out", out).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype=torch.bfloat16
    )
    theirs = dict(model.named_modules())
    for layer, ours in read_back(out).items():
        assert torch.equal(theirs[layer].weight.float(), ours.bfloat16().float()), layer


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("word", "head"), [("w4a16", "w4a16"), ("w4a16", "w8a16"), ("w4a16", "fp8"), ("int8", "int8")])
def test_a_quantised_head_is_read_by_both(word: str, head: str, tied: bool, wide: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = "lm_head.weight"
    if tied:
        tensors, source = load_file(wide / "model.safetensors"), "model.embed_tokens.weight"
        save_file(
            {name: value for name, value in tensors.items() if name != "lm_head.weight"}, wide / "model.safetensors", {"format": "pt"}
        )
        config = json.loads((wide / "config.json").read_text())
        (wide / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    out = tmp_path / "out"
    assert asked(wide, "--scheme", word, "--lm-head", head, "--out", out).exit_code == 0
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert "lm_head" not in written["quantization_config"]["ignore"]
    weights, quantizer = Checkpoint(out, torch.float32), CompressedTensors(written["quantization_config"])
    scheme = quantizer.scheme(weights, "lm_head", VOCAB, HIDDEN)
    assert scheme is not None
    assert scheme.kind == scheme_of(head, VOCAB, HIDDEN).kind
    ours = dequantise(quantizer.read(weights, "lm_head", scheme, VOCAB, HIDDEN, torch.device("cpu")))
    plan = writing.plan(writing.open_source(wide), word, (), head)
    assert torch.equal(ours, dequantise(writing.nearest(plan)("lm_head", meant(wide, source), scheme_of(head, VOCAB, HIDDEN))))
    assert torch.equal(weights.raw("model.embed_tokens.weight"), meant(wide, "model.embed_tokens.weight"))
    if word == head:  # forms that differ transformers reads only without widening them
        config = CompressedTensorsConfig(run_compressed=False)
        model = AutoModelForCausalLM.from_pretrained(out, quantization_config=config, dtype=torch.bfloat16)
        assert torch.equal(model.lm_head.weight.float(), ours.bfloat16().float())
        assert torch.equal(model.model.embed_tokens.weight, meant(wide, "model.embed_tokens.weight"))
    else:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    tokens = list(range(1, 40))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].float()
    logits = Loaded(out, longest=64).logits(tokens)(0, len(tokens))
    assert float((logits - theirs).abs().mean() / theirs.std()) < 0.03  # of bfloat16, and of inputs that transformers rounds


def test_a_head_that_does_not_fit_is_said(wide: Path, tmp_path: Path) -> None:
    said = asked(wide, "--scheme", "w4a16", "--lm-head", "fp8-block", "--out", tmp_path / "out")
    assert said.exit_code
    assert "--lm-head fp8-block" in str(said.exception)


def test_an_ended_run_goes_on_with_what_is_missing(wide: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    plan = writing.plan(writing.open_source(wide), "w4a16")
    rounded = writing.nearest(plan)

    class Ended(Exception):
        pass

    def dies(layer: str, weight: torch.Tensor, scheme: Any) -> Any:
        if ".layers.1." in layer:
            raise Ended
        return rounded(layer, weight, scheme)

    partial = writing.start(plan, out, {})
    with pytest.raises(Ended):
        writing.write(plan, partial, dies)
    assert not out.exists()
    before = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(before) == 2

    def notes(layer: str, weight: torch.Tensor, scheme: Any) -> Any:
        seen.append(layer)
        return rounded(layer, weight, scheme)

    assert writing.write(plan, writing.start(plan, out, {}), notes) == 2
    writing.finish(plan, partial, out)
    assert len(seen) == len(SHAPES)
    assert all(".layers.1." in layer for layer in seen)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    whole = tmp_path / "whole"
    writing.write(plan, writing.start(plan, whole, {}), rounded)
    writing.finish(plan, tmp_path / "whole.partial", whole)
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_another_runs_part_is_not_continued(wide: Path, tmp_path: Path) -> None:
    writing.start(writing.plan(writing.open_source(wide), "w4a16"), tmp_path / "out", {"method": "rtn", "ignore": []})
    said = asked(wide, "--scheme", "int8", "--out", tmp_path / "out")
    assert said.exit_code
    assert "unfinished part of this very run" in str(said.exception)


def test_nothing_is_overwritten(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    said = asked(wide, "--scheme", "fp8", "--out", out)
    assert said.exit_code
    assert "holds something already" in str(said.exception)
    assert [file.name for file in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert asked(wide, "--scheme", "fp8", "--out", out).exit_code == 0
    again = asked(out, "--scheme", "fp8", "--out", tmp_path / "twice")
    assert again.exit_code
    assert "quantised already" in str(again.exception)


def test_ignored_layers_stay_wide(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert asked(wide, "--scheme", "w4a16", "--ignore", "*.down_proj", "--ignore", "model.layers.0.*", "--out", out).exit_code == 0
    found = read_back(out)
    assert len(found) == len(SHAPES) - 1
    assert all(layer.startswith("model.layers.1.") for layer in found)
    assert "model.layers.1.mlp.down_proj" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    everything = asked(wide, "--scheme", "w4a16", "--ignore", "*", "--out", tmp_path / "none")
    assert everything.exit_code
    assert "no linear layer" in str(everything.exception)


NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def of_bitsandbytes(out: Path, layer: str) -> torch.Tensor:
    """A layer as bitsandbytes' format says it, from the bytes."""
    state = json.loads(bytes(meant_in(out, f"{layer}.weight.quant_state.bitsandbytes__nf4").tolist()))
    packed, scales = meant_in(out, f"{layer}.weight"), meant_in(out, f"{layer}.weight.absmax")
    assert meant_in(out, f"{layer}.weight.quant_map").tolist() == pytest.approx(NORMAL, abs=0)
    assert packed.shape == (packed.numel(), 1)
    assert state["quant_type"] == "nf4"
    values = [NORMAL[code] for byte in packed[:, 0].tolist() for code in (byte >> 4, byte & 15)]
    return (torch.tensor(values).view(-1, state["blocksize"]) * scales[:, None]).view(state["shape"])


def meant_in(out: Path, name: str) -> torch.Tensor:
    return Checkpoint(out, torch.float32).raw(name)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_nf4_is_what_bitsandbytes_stores(method: str, wide: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "texts.json"
    file.write_text('["a b"]')
    given = [] if method == "rtn" else ["--method", method, "--calibration", file]
    if method != "rtn":
        tokenizer = Tokenizer(WordLevel({"a": 1, "b": 2, "?": 0}, unk_token="?"))
        tokenizer.save(str(wide / "tokenizer.json"))
    said = asked(wide, "--scheme", "nf4", "--lm-head", "nf4", *given, "--out", out)
    assert said.exit_code == 0, said.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_4bit"], config["llm_int8_skip_modules"]) == ("bitsandbytes", True, [])
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")
    quantizer, weights = Bitsandbytes(config), Checkpoint(out, torch.float32)
    shapes = {f"model.layers.{index}.{name}": shape for index in range(LAYERS) for name, shape in SHAPES.items()} | {
        "lm_head": (VOCAB, HIDDEN)
    }
    for layer, shape in shapes.items():
        scheme = quantizer.scheme(weights, layer, *shape)
        assert scheme == Scheme("nf4", 64)
        ours = dequantise(quantizer.read(weights, layer, scheme, *shape, torch.device("cpu")))
        assert torch.equal(ours, of_bitsandbytes(out, layer))
        if method == "rtn":
            error = relative_error(ours, meant(wide, f"{layer}.weight"))
            assert 0.01 < error < 0.12


def test_nf4_and_other_forms_do_not_mix(wide: Path, tmp_path: Path) -> None:
    for scheme, head in (("nf4", "int8"), ("w4a16", "nf4")):
        said = asked(wide, "--scheme", scheme, "--lm-head", head, "--out", tmp_path / "out")
        assert said.exit_code
        assert "nf4 for both or for none" in str(said.exception)


def test_weights_that_are_not_finite_are_named(wide: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = Checkpoint(wide, torch.bfloat16)
    tensors = {one: meant(wide, one) for one in weights._where}
    tensors[name] = tensors[name].clone().fill_(float("nan"))
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    said = asked(wide, "--scheme", "w4a16", "--out", tmp_path / "out")
    assert said.exit_code
    assert name in str(said.exception)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    said = asked(wide, "--scheme", "fp8", "--out", tmp_path / "file" / "out")
    assert said.exit_code
    assert "Name a folder where you may write" in str(said.exception)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    said = asked(wide, "--scheme", "fp8", "--out", tmp_path / "out")
    assert said.exit_code
    assert "Make room" in str(said.exception)
    monkeypatch.undo()
    assert asked(wide, "--scheme", "fp8", "--out", tmp_path / "out").exit_code == 0


def test_a_cut_off_file_is_said(wide: Path, tmp_path: Path) -> None:
    (file,) = wide.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    said = asked(wide, "--scheme", "fp8", "--out", tmp_path / "out")
    assert isinstance(said.exception, CheckpointError)
    assert f"{file} is no readable safetensors file" in str(said.exception)


def test_the_folder_that_one_is_in_cannot_get_a_name(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = asked(wide.absolute(), "--scheme", "fp8", "--out", ".")
    assert isinstance(said.exception, ConfigError)
    assert "--out ." in str(said.exception)


def test_rounding_to_the_nearest_says_that_it_reads_no_texts(wide: Path, tmp_path: Path) -> None:
    said = asked(wide, "--scheme", "fp8", "--calibration", tmp_path / "none.txt", "--samples", 3, "--out", tmp_path / "out")
    assert said.exit_code == 0
    assert "--calibration, --samples without effect" in said.stderr
    assert "without effect" not in asked(wide, "--scheme", "fp8", "--out", tmp_path / "other").stderr
