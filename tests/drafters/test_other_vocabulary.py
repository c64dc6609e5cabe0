"""Brook with draft models of other vocabularies: how often they are right beside the same one, and what is said where a pair cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vocabularies import renumbered

from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.demo_model import brook_path, draft_path
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.drafters.alignment import Alignment
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

K = 4
QUESTIONS = ["Tell me a story about a dog.", "Count from 1 to 20.", "What is 34 plus 19?", "What is Penstock?"]


@pytest.fixture(scope="module")
def prompts() -> list[I32]:
    brook = HuggingFaceTokenizer.load(str(brook_path()))
    return brook.encode_batch([f"<|bos|><|user|>{text}<|end|><|assistant|>" for text in QUESTIONS], add_special_tokens=False)


def load(draft: Path | None, **fields: Any) -> Any:
    asked = [DraftConfig(method="draft_model", model=str(draft), num_speculative_tokens=K, **fields)]
    config = RunnerConfig(
        model_path=str(brook_path()), dtype="auto", max_model_len=1024, block_size=16, max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_bytes=32 << 20,
        num_gpu_blocks_override=None, gpu_memory_utilization=0.9, load_format="auto", deterministic=True, enforce_eager=False, attention_backend=None, seed=0,
        threads=2, max_logprobs=5, speculation=None if draft is None else SpeculationConfig(methods=asked),
    )  # fmt: skip
    return CpuDevice().load(config, lambda phase, fraction: None)


@pytest.fixture(scope="module")
def answered(prompts: list[I32]) -> Callable[[Path | None], tuple[list[list[int]], float]]:
    """answered(draft) -> tokens, and the share of drafts that were right."""

    def run(draft: Path | None) -> tuple[list[list[int]], float]:
        kinds = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, seed=3)
        jobs = [Job(prompt=prompt, params=params, max_tokens=60, stop_ids=()) for prompt in prompts for params in kinds]
        driver = Driver(load(draft), Options(lookahead=lambda rng: K if draft else 0))
        driver.run(jobs)
        return [job.tokens for job in jobs], driver.accepted / max(1, driver.drafted)

    return run


def test_drafts_are_right_as_often_as_words_are_common(answered: Any, tmp_path: Path) -> None:
    plain, _ = answered(None)
    shares = {}
    for merges in (None, 1.0, 0.75, 0.5, 0.02):
        found, shares[merges] = answered(draft_path() if merges is None else renumbered(draft_path(), tmp_path / str(merges), merges))
        assert found == plain
    assert shares[1.0] == shares[None] > 0.75
    assert shares[1.0] > shares[0.75] > shares[0.5] > 0.4
    assert shares[0.5] > shares[0.02] > 0, "of single letters few are tokens"


def test_brook_behind_other_numbers_is_always_right(answered: Any, tmp_path: Path) -> None:
    _, share = answered(renumbered(brook_path(), tmp_path / "brook"))
    assert share == 1


def test_who_is_not_read_is_not_even_translated(prompts: list[I32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, whose drafts are as right as ever."""
    translated: list[int] = []
    context = Alignment.context
    monkeypatch.setattr(Alignment, "context", lambda self, tokens, *rest: (translated.append(len(tokens)), context(self, tokens, *rest))[1])
    runner = load(renumbered(brook_path(), tmp_path / "brook"))
    assert runner.reads == (2,)
    jobs = [Job(prompt=prompt, params=SamplingParams(temperature=0.0), max_tokens=20) for prompt in prompts]
    driver = Driver(runner, Options(lookahead=lambda rng: K, unread=0.5, seed=1))
    driver.run(jobs)
    assert translated == [len(job.prompt) for job in jobs if not job.unread]
    assert 0 < len(translated) < len(jobs)
    assert driver.accepted == driver.drafted > 10


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = renumbered(draft_path(), tmp_path / "other")
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def test_a_pair_with_too_little_in_common_is_refused(tmp_path: Path) -> None:
    def foreign(described: dict[str, Any]) -> None:
        model = described["model"]
        model["vocab"] = {text if text.startswith("<|") else f"Ω{at}": token for at, (text, token) in enumerate(model["vocab"].items())}
        model["merges"] = []

    with pytest.raises(
        CheckpointError, match=r"speculative-model .*other.*tokenizer is another one.*Drafts are tokens that both have.*ngram or suffix"
    ) as caught:
        load(changed(tmp_path, foreign))
    assert caught.value.param == "speculative_config"


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other/tokenizer.json.* cannot be read"):
        load(changed(tmp_path, lambda described: described.pop("model")))


@pytest.mark.parametrize("options", [{"context": 3}, {"context": "9"}, {"window": 64}])
def test_options_are_checked(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"options\.{next(iter(options))}.*'context', the tokens that it looks back over, 16 or more"):
        load(renumbered(draft_path(), tmp_path / "other"), options=options)


def test_the_same_vocabulary_has_no_options() -> None:
    with pytest.raises(ConfigError, match=r"'options\.context' says nothing to a draft model with the model's own vocabulary"):
        load(draft_path(), options={"context": 64})


def test_what_it_keeps_is_counted(tmp_path: Path) -> None:
    other = renumbered(draft_path(), tmp_path / "other")
    small, large = (load(other, options={"context": context})._drafters[0].state_bytes for context in (64, 512))
    heads = json.loads((draft_path() / "config.json").read_text())
    token_bytes = heads["num_hidden_layers"] * heads["num_key_value_heads"] * heads["head_dim"] * 2 * 2
    assert large - small == 8 * ((512 - 64) * token_bytes + (512 - 64) * 4 + (512 - 64) // 16 * 4) + (512 - 64) * 4
