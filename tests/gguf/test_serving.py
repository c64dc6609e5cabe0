"""GGUF files served: the same answers as the folders that they were made of, and what is refused before anything loads."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_kit import convert, folder_of

from penstock import LLM, SamplingParams
from penstock.core.contract.devices import RunnerConfig
from penstock.core.contract.hookspecs import WeightSourceSpec
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError, PenstockError, PluginFault, UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder, with_model
from penstock.plugins.devices import loading

GREEDY = SamplingParams(temperature=0, max_tokens=24)
CHATS = [[{"role": "user", "content": text}] for text in ("What is 17 + 25?", "Count from 2 to 9.", "What is Penstock?")]
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20}


def answers(model: str | None, **options: Any) -> list[tuple[list[int], list[int], str]]:
    with LLM(model, **SMALL, **options) as llm:
        return [(o.prompt_token_ids, list(o.outputs[0].token_ids), o.outputs[0].text) for o in llm.chat(CHATS, GREEDY)]


@pytest.fixture(scope="module")
def originals() -> list[tuple[list[int], list[int], str]]:
    return answers(None)


@pytest.mark.parametrize("form", ["F32", "BF16"])
def test_brook_answers_as_its_folder(tmp_path: Path, originals: Any, form: str) -> None:
    path = convert(demo_folder(), tmp_path / "brook.gguf", form)
    assert answers(str(path), dtype="bfloat16") == originals


@pytest.mark.parametrize(("form", "said"), [("Q8_0", None), ("Q6_K", None), ("Q4_1", "tensors of Q4_1 are held in full width")])
def test_quantised_files_are_served(tmp_path: Path, originals: Any, form: str, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    path = convert(demo_folder(), tmp_path / "brook.gguf", form)
    with caplog.at_level(logging.INFO, "penstock.weights"):
        found = answers(str(path))
    assert [prompt for prompt, _, _ in found] == [prompt for prompt, _, _ in originals]
    assert f"quantised weights: gguf, mostly {form}" in caplog.text
    assert said is None or said in caplog.text
    if form == "Q8_0":
        assert "42" in found[0][2]


FAMILY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": True},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0, "head_dim": 16},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1000000.0},
    ],
    ids=lambda config: str(config["model_type"]),
)
@pytest.mark.parametrize(("form", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16)])
def test_every_family_answers_as_its_folder(tmp_path: Path, config: dict[str, Any], form: str, dtype: torch.dtype) -> None:
    """The folder's tokenizer is that of the file: --tokenizer takes one, too."""
    shape = {**FAMILY, **config, "dtype": str(dtype).removeprefix("torch.")}
    folder = folder_of(tmp_path / "folder", shape, dtype)
    path = str(convert(folder, tmp_path / "x.gguf", form))
    prompts = [np.random.default_rng(seed).integers(0, 63, 20).tolist() for seed in range(4)]
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    found = []
    for model in (path, str(folder)):
        with LLM(model, tokenizer=path, deterministic=True, **SMALL) as llm:
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=greedy)
        found.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
    assert found[0] == found[1]
    assert len({tuple(ids) for ids, _ in found[0]}) == 4


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    path = convert(demo_folder(), folder / "brook-BF16.gguf", "BF16")
    found = with_model(build({"model": str(folder)}))
    assert (found.model, found.served_model_name) == (str(path), ["some-model"])
    found = with_model(build({"model": str(path)}))
    assert (found.model, found.served_model_name) == (str(path), ["brook-BF16"])
    (folder / "config.json").write_text("{}")
    assert with_model(build({"model": str(folder)})).model == str(path)
    (folder / "model.safetensors").write_bytes(b"")
    assert with_model(build({"model": str(folder)})).model == str(folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(path, folder / "other.gguf")
    with pytest.raises(ConfigError, match=r"holds several GGUF files \(brook-BF16\.gguf, other\.gguf\)\. Name the one to serve"):
        with_model(build({"model": str(folder)}))


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        with_model(build({"model": str(tmp_path / "x.gguf")}))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a file, and none whose name ends in \.gguf"):
        with_model(build({"model": str(tmp_path / "x.bin")}))
    (tmp_path / "y.gguf").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        with_model(build({"model": str(tmp_path / "y.gguf")}))


@pytest.mark.parametrize(
    ("cut", "kind", "said"),
    [
        (lambda data: data[:-5000], CheckpointError, r"x\.gguf: tensor 'blk\.\d.*' ends at byte \d+ of a file of \d+: it is cut off"),
        (lambda data: data[:3000], CheckpointError, r"x\.gguf: the file is cut off or damaged"),
        (lambda data: b"PK\x03\x04" + data[4:], CheckpointError, r"x\.gguf is no GGUF file"),
        (lambda data: data.replace(b"smollm", b"klingo"), UnsupportedFeature, "'tokenizer.ggml.pre' 'klingo'"),
        (lambda data: data.replace(b"llama", b"zebra"), UnsupportedFeature, "architecture 'zebra' is not supported yet. Known: llama"),
        (lambda data: data.replace(b"blk.3.ffn_up", b"blk.3.ffn_xx"), CheckpointError, r"tensor 'blk\.3\.ffn_up\.weight' is missing"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, cut: Callable[[bytes], bytes], kind: type[PenstockError], said: str) -> None:
    path = convert(demo_folder(), tmp_path / "x.gguf", "Q8_0")
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(kind, match=said) as caught, LLM(str(path), **SMALL):
        pass
    assert "\n" not in caught.value.message


def test_other_options_beside_a_file(tmp_path: Path, originals: Any) -> None:
    path = str(convert(demo_folder(), tmp_path / "x.gguf", "BF16"))
    assert answers(path, load_format="gguf") == originals
    assert "42" in answers(path, quantization="int8")[0][2]
    assert [prompt for prompt, _, _ in answers(path, load_format="dummy")] == [prompt for prompt, _, _ in originals]
    with (
        pytest.raises(ConfigError, match=r"--load-format safetensors: .*x\.gguf is nothing that it reads"),
        LLM(path, load_format="safetensors"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"--load-format gguf: .*brook is nothing that it reads"), LLM(load_format="gguf"):
        pass
    assert answers(path, hf_overrides='{"rope_theta": 1.5}') != originals


def test_a_quantised_file_with_made_up_weights_and_with_a_quantisation(tmp_path: Path) -> None:
    path = str(convert(demo_folder(), tmp_path / "x.gguf", "Q4_0"))
    assert len(answers(path, load_format="dummy")) == 3
    assert len(answers(path, quantization="gguf")) == 3
    with pytest.raises(ConfigError, match="--quantization int8: the checkpoint is quantised already"), LLM(path, quantization="int8"):
        pass


class Host:
    """Built-in weight sources, and one more."""

    def __init__(self, **fields: Any) -> None:
        mine = WeightSourceSpec(name="mine", api_level=1, load_formats=["auto"], factory=lambda *_, **__: None, **fields)
        self._specs = (*loading.builtin_weights.register_weight_sources(), mine)

    def weight_sources(self) -> dict[str, WeightSourceSpec]:
        return {spec.name: spec for spec in self._specs}


def runner_config(path: Path, host: Host) -> RunnerConfig:
    settings: dict[str, Any] = dict.fromkeys(RunnerConfig.__struct_fields__)
    return RunnerConfig(**{**settings, "model_path": str(path), "load_format": "auto", "plugins": host})


def test_sources_that_name_no_paths_never_see_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    chosen = [loading.weights_for(runner_config(path, Host())).name for path in (tmp_path, tmp_path / "x.gguf")]
    assert chosen == ["mine", "gguf"]


def test_a_stranger_may_read_files_and_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    said: dict[str, Any] = {"model_type": "mine"}
    config = runner_config(path, Host(matches=lambda path: path.endswith("x.gguf"), config=lambda path: said))
    assert (loading.weights_for(config).name, loading.own_config(config)) == ("mine", said)
    assert loading.own_config(runner_config(tmp_path, Host(matches=lambda path: False, config=lambda path: said))) is None
    with pytest.raises(PluginFault, match=r"The weight source 'mine' is broken: config\(\) returned list, not a dict"):
        loading.own_config(runner_config(path, Host(matches=lambda path: True, config=lambda path: [])))


def test_a_start_without_such_a_file_pays_nothing() -> None:
    code = (
        "import sys\n"
        "from penstock.plugins import quantizers, renderers, tokenizers, weights\n"
        "weights.register_weight_sources(), quantizers.register_quantizers(), tokenizers.register_tokenizers(), renderers.register_chat_renderers()\n"
        "paid = {name for name in sys.modules if name.startswith('penstock.plugins.gguf.') or name in ('numpy', 'torch', 'tokenizers')}\n"
        "assert not paid, paid"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
