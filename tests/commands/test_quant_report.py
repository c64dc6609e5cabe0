"""`penstock quant report`: figures against definitions written out here, and the record that it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.quality import FIGURES, read_record, record_file
from penstock.plugins.commands.quant import comparing
from penstock.plugins.commands.quant.command import quant, quantize
from penstock.plugins.commands.quant.comparing import Layer, Loaded, Prompt, divergence, relative_error, summary, texts_of
from penstock.plugins.commands.quant.report import advice
from penstock.plugins.weights.checkpoint import Checkpoint

BROOK = demo_folder()
TEXTS = ["<|bos|><|user|>What is 3 + 4?", "Hello there, Brook.", "The river flows to the sea."]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quant") / "brook-int4"
    assert CliRunner().invoke(quantize, [str(BROOK), "--scheme", "w4a16", "--out", str(out)]).exit_code == 0
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS) + "\n")
    return file


def asked(*words: object) -> Result:
    return CliRunner().invoke(quant, ["report", *(str(word) for word in words)])


def test_divergence_is_what_its_definition_says() -> None:
    ours, full = torch.randn(5, 7) * 2, torch.randn(5, 7) * 2
    following = torch.tensor([0, 6, 3, 2, 1])
    kl, same, loss, loss_full = divergence(ours, full, following)
    for row in range(5):
        q = [math.exp(value) for value in ours[row].tolist()]
        p = [math.exp(value) for value in full[row].tolist()]
        q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
        meant = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(kl[row]) == pytest.approx(meant, rel=1e-9, abs=1e-12)
        assert bool(same[row]) is (q.index(max(q)) == p.index(max(p)))
        assert float(loss[row]) == pytest.approx(-math.log(q[following[row]]))
        assert float(loss_full[row]) == pytest.approx(-math.log(p[following[row]]))


def test_tokens_that_can_never_come_count_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert float(divergence(logits, logits, torch.tensor([0]))[0]) == 0


def test_figures_are_over_tokens_and_intervals_over_texts() -> None:
    rng = np.random.default_rng(5)

    def prompt(count: int) -> Prompt:
        return Prompt("", rng.random(count), (rng.random(count) > 0.5).astype(float), rng.random(count), rng.random(count))

    prompts = [prompt(count) for count in (3, 50, 17, 4)]
    found = summary(prompts)
    kl = np.concatenate([one.kl for one in prompts])
    assert found.tokens == 74
    assert found.kl_mean == pytest.approx(kl.mean())
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert found.ppl == pytest.approx(math.exp(np.concatenate([one.loss for one in prompts]).mean()))
    assert found.ppl_full == pytest.approx(math.exp(np.concatenate([one.loss_full for one in prompts]).mean()))
    assert found == summary(prompts)
    assert found.ppl_range[0] < found.ppl < found.ppl_range[1]
    assert found.kl_range[0] < found.kl_mean < found.kl_range[1]
    assert summary(prompts[:1]).ppl_range[0] == pytest.approx(summary(prompts[:1]).ppl_range[1])


def test_the_error_of_a_weight() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    assert relative_error(torch.tensor([[3.0, 3.5]]), weight) == pytest.approx(0.1)
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0
    assert relative_error(torch.ones(1, 2), torch.zeros(1, 2)) == 1


def test_layers_that_stand_out_are_advised_more_bits() -> None:
    layers = [Layer("a", "int4", 4, 0.05), Layer("b", "int4", 4, 0.05), Layer("c", "int4", 4, 0.08), Layer("d", "int8", 8, 0.004)]
    assert advice(layers) == [4, 4, 8, 8]
    assert advice([Layer("a", "int4", 4, 0.2), Layer("b", "fp8_e4m3", 8, 0.2)]) == [8, 16]
    assert advice([]) == []


def test_whole_prompts_give_the_logits_that_transformers_gives() -> None:
    from transformers import AutoModelForCausalLM

    tokens = Tokenizer.from_file(str(BROOK / "tokenizer.json")).encode("<|bos|><|user|>Tell me about rivers.").ids
    rows = Loaded(BROOK, dtype="float32", longest=64).logits(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(BROOK, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(rows(0, len(tokens)), theirs.detach(), rtol=1e-3, atol=1e-3)
    assert torch.equal(rows(2, 4), rows(0, len(tokens))[2:4])


def test_a_model_loses_nothing_against_itself() -> None:
    tokenizer = Tokenizer.from_file(str(BROOK / "tokenizer.json"))
    one, other = Loaded(BROOK, longest=64), Loaded(BROOK, longest=64)
    found = summary(comparing.compare(one, other, TEXTS, lambda text: tokenizer.encode(text).ids))
    assert (found.kl_mean, found.kl_p99, found.top1) == (0, 0, 1)
    assert found.ppl == found.ppl_full


def test_the_record_is_written_and_printed(int4: Path, texts: Path, tmp_path: Path) -> None:
    svg = tmp_path / "layers.svg"
    said = asked(int4, "--against", BROOK, "--text", texts, "--json", "--svg", svg)
    assert said.exit_code == 0, said.output
    record = json.loads(said.stdout)
    assert set(record) == {*FIGURES, "record_sha256"}
    assert json.loads(record_file(int4).read_text()) == record
    assert read_record(int4) == (record, "")
    tokenizer = Tokenizer.from_file(str(BROOK / "tokenizer.json"))
    assert record["tokens"] == sum(len(tokenizer.encode(text).ids) - 1 for text in TEXTS)
    assert 0 < record["kl_mean"] < 1
    assert record["kl_mean"] < record["kl_p99"]
    assert len(record["layers"]) == 8 * 7
    assert all(0.05 < layer["error"] < 0.2 and layer["bits"] == 4 for layer in record["layers"])
    assert svg.read_text().count("down_proj") == 8
    again = asked(int4, "--against", BROOK, "--text", texts, "--json")
    assert json.loads(again.stdout) == record


def test_rounding_while_loading_is_measured_without_a_record(texts: Path) -> None:
    before = sorted(file.name for file in BROOK.iterdir())
    said = asked(BROOK, "--quantization", "int4", "--text", texts)
    assert said.exit_code == 0, said.output
    assert "int4, rounded while loading" in said.output
    assert "texts that lose most" in said.output
    assert sorted(file.name for file in BROOK.iterdir()) == before


def test_the_built_in_texts_are_said_to_be_none_of_the_users(int4: Path) -> None:
    said = asked(int4, "--against", BROOK, "--max-texts", 1, "--max-tokens", 16, "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["tokens"] == 15
    assert "They are not yours" in said.stderr


def test_one_of_against_and_quantization_is_needed(int4: Path) -> None:
    for words in ([], ["--against", BROOK, "--quantization", "int4"]):
        said = asked(int4, *words)
        assert said.exit_code == 2
        assert "--against FULL" in said.output


def test_texts_come_in_three_forms(tmp_path: Path) -> None:
    def of(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text)
        return texts_of(tmp_path / name)

    assert of("a.txt", "one\ntwo\n\n\n\nthree\n") == ["one\ntwo", "three"]
    assert of("a.json", '["one", "two"]') == ["one", "two"]
    assert of("a.jsonl", '{"text": "one"}\n{"prompt": "two"}\n\n"three"\n') == ["one", "two", "three"]
    assert of("d.jsonl", '{"text": "one\u2028two"}\n"three"\n') == ["one\u2028two", "three"]  # no line ends there
    for name, text in (("b.json", '{"a": 1}'), ("b.jsonl", "{}"), ("c.json", "[")):
        with pytest.raises(ConfigError, match="--text"):
            of(name, text)
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        of("e.json", r'["good", "a \ud800 b"]')
    with pytest.raises(ConfigError, match="cannot be read"):
        texts_of(tmp_path / "none.txt")


def test_a_picture_that_cannot_be_written_is_said(int4: Path, texts: Path, tmp_path: Path) -> None:
    record_file(int4).unlink(missing_ok=True)
    said = asked(int4, "--against", BROOK, "--text", texts, "--svg", tmp_path / "none" / "layers.svg")
    assert said.exit_code == 2
    assert "there is no folder" in said.output
    said = asked(int4, "--against", BROOK, "--text", texts, "--svg", "/dev/full")
    assert said.exit_code == 1
    assert "--svg /dev/full: cannot be written" in said.output
    assert read_record(int4)[0] is not None  # the work is not lost


def test_texts_of_one_token_are_no_texts(int4: Path, tmp_path: Path) -> None:
    (tmp_path / "short.json").write_text('["a"]')
    said = asked(int4, "--against", BROOK, "--text", tmp_path / "short.json")
    assert said.exit_code
    assert "no text of two tokens" in str(said.exception)


def test_a_model_of_other_shapes_is_not_the_wide_one(int4: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in BROOK.iterdir():
        if file.name != "model.safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(BROOK / "model.safetensors")
    save_file({name: w[:512].contiguous() if "mlp.up" in name else w for name, w in weights.items()}, other / "model.safetensors")
    said = asked(int4, "--against", other, "--text", texts)
    assert isinstance(said.exception, ConfigError)
    assert "is 512 x 256, the quantised model's 768 x 256" in str(said.exception)


def test_what_is_no_checkpoint_is_said(texts: Path, tmp_path: Path) -> None:
    said = asked(tmp_path, "--against", BROOK, "--text", texts)
    assert said.exit_code
    assert "holds no config.json" in str(said.exception)


def test_a_gguf_file_has_its_record_beside_it(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "gguf"))
    import gguf_kit

    folder = tmp_path / "gguf"
    folder.mkdir()
    gguf_kit.convert(BROOK, folder / "brook.gguf", "Q4_0")
    said = asked(folder, "--against", BROOK, "--text", texts, "--json")
    assert said.exit_code == 0, said.output
    record = json.loads((folder / "brook.gguf.quality.json").read_text())
    assert len(record["layers"]) >= 8 * 7
    assert all(0.03 < layer["error"] < 0.2 for layer in record["layers"])


def test_what_awq_moved_into_a_norm_is_no_error(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "awq"
    words = ["--scheme", "w8a16", "--method", "awq", "--calibration", str(texts), "--out", str(out)]
    assert CliRunner().invoke(quantize, [str(BROOK), *words]).exit_code == 0
    moved = Checkpoint(out, torch.float32).raw("model.layers.0.input_layernorm.weight")
    assert not torch.equal(moved, Checkpoint(BROOK, torch.float32).raw("model.layers.0.input_layernorm.weight"))
    record = json.loads(asked(out, "--against", BROOK, "--text", texts, "--json").stdout)
    after_norms = [
        layer["error"] for layer in record["layers"] if layer["name"].endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    ]
    assert len(after_norms) == 8 * 5
    assert max(after_norms) < 0.02


def test_a_kv_cache_of_eight_bits_is_measured_and_leaves_no_record(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "brook"
    folder.mkdir()
    for file in BROOK.iterdir():
        (folder / file.name).symlink_to(file)
    found = {}
    for word in ("int8", "fp8", "fp8_e5m2"):
        said = asked(folder, "--kv-cache-dtype", word, "--text", texts, "--json")
        assert said.exit_code == 0, said.output
        found[word] = json.loads(said.stdout)
        assert not record_file(folder).exists()
    assert 0 < found["int8"]["kl_mean"] < found["fp8"]["kl_mean"] < found["fp8_e5m2"]["kl_mean"] < 0.02
    assert found["fp8"]["scheme"] == "wide, KV cache of fp8_e4m3"
    assert found["int8"]["layers"] == []
