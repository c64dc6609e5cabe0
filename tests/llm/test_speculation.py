"""Speculation through the whole engine, on the demo model: answers are those without, token for token and bit for bit."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams, StructuredOutputsParams
from penstock.core.actors.scheduler.widths import Widths
from penstock.plugins.demo_model import draft_path

sys.path.insert(0, str(Path(__file__).parents[1] / "devices_gpu"))  # pytest's importlib mode does not

from vocabularies import renumbered

COPY = "Repeat this text: the river ran past the mill, past the old bridge, past the mill again, and down to the sea."
QUESTIONS = [COPY, "Tell me a story about a dog."]
PARAMS: list[SamplingParams] = [
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.9, seed=3, max_tokens=40, n=3, logprobs=0),
    SamplingParams(
        temperature=0.7, top_p=0.8, seed=5, max_tokens=40, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, logprobs=1
    ),
    SamplingParams(temperature=0.0, max_tokens=60, stop=["mill, past", " dog"], include_stop_str_in_output=True),
    SamplingParams(temperature=0.0, max_tokens=50, min_tokens=30, bad_words=["river", " the old"], logit_bias={200: 3.0}),
    SamplingParams(
        temperature=1.0, seed=9, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[a-z ]{5,60}"), prompt_logprobs=1
    ),
]


def answers(**settings: Any) -> tuple[list[Any], dict[str, Any]]:
    with LLM(kv_cache_memory_bytes=24 << 20, deterministic=True, max_num_seqs=12, max_num_batched_tokens=96, **settings) as llm:
        asked = [(question, params) for question in QUESTIONS for params in PARAMS]
        chats = [[{"role": "user", "content": question}] for question, _ in asked]
        found = llm.chat(chats, [params for _, params in asked])
        said = [
            [(one.text, one.token_ids, one.finish_reason, one.stop_reason, one.cumulative_logprob, one.logprobs) for one in answer.outputs]
            for answer in found
        ]
        return [said, [answer.prompt_logprobs for answer in found]], {}


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    return answers()[0]


@pytest.mark.parametrize(
    "methods",
    [
        [{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}],
        [{"method": "ngram", "num_speculative_tokens": 3}, {"model": "brook-draft", "num_speculative_tokens": 4}],
        [{"model": "OTHER", "num_speculative_tokens": 4}],
        [{"method": "suffix", "num_speculative_tokens": 3}, {"model": "OTHER", "num_speculative_tokens": 4, "options": {"context": 64}}],
    ],
    ids=["ngram", "ngram and a draft model", "another vocabulary", "suffixes and another vocabulary"],
)
def test_answers_are_those_without(
    methods: list[dict[str, Any]], plain: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if methods[-1].get("model") == "OTHER":
        methods = [*methods[:-1], methods[-1] | {"model": str(renumbered(draft_path(), tmp_path / "other", merges=0.7))}]
    turns = itertools.cycle([9, 9, 2, 9, 0, 9, 1])
    monkeypatch.setattr(Widths, "choose", lambda self, rows: min(next(turns), self.most(rows)))
    accepted: list[int] = []
    verified = Widths.verified
    monkeypatch.setattr(Widths, "verified", lambda self, width, rows: (accepted.extend(rows[1:]), verified(self, width, rows))[1])
    found, _ = answers(speculative_config=json.dumps({"methods": methods}))
    assert found == plain
    assert sum(accepted) > 20


TREES = {
    "brook-medusa": "[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]",
    "brook-eagle3": "[(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0)]",
}


WINDOWED = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40}


@pytest.mark.parametrize(
    ("model", "more"),
    [("brook-medusa", {}), ("brook-eagle3", {}), ("brook-eagle3", {"kv_cache_dtype": "int8", "hf_overrides": WINDOWED})],
    ids=["medusa", "eagle3", "eagle3, windows and eight bits"],
)
def test_answers_are_those_without_a_tree(model: str, more: dict[str, Any], plain: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties, bad words of several tokens and grammars have no drafts then, and their answers stay, too."""
    if more:
        other, plain = plain, answers(**more)[0]
        assert plain != other
    turns = itertools.cycle([9, 9, 0, 9, 9, 9])
    monkeypatch.setattr(Widths, "choose", lambda self, rows: min(next(turns), self.most(rows)))
    accepted: list[int] = []
    verified = Widths.verified
    monkeypatch.setattr(Widths, "verified", lambda self, width, rows: (accepted.extend(rows[1:]), verified(self, width, rows))[1])
    found, _ = answers(speculative_config=json.dumps({"model": model, "speculative_token_tree": TREES[model]}), **more)
    assert found == plain
    assert sum(accepted) > 20
