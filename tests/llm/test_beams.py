"""Beam search in the Python API, on the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from penstock import LLM, Beam, BeamSearchParams, SamplingParams
from penstock.core.protocol.errors import InvalidRequest


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_cache_memory_bytes=64 << 20, deterministic=True, max_num_seqs=16) as model:
        yield model


def test_sequences_come_best_first_and_begin_with_the_prompt(llm: LLM) -> None:
    many = llm.beam_search(["Penstock is", "What", [5, 9, 12]], BeamSearchParams(beam_width=4, max_tokens=12, length_penalty=0.0))
    for found in many:
        sums = [sequence.cum_logprob for sequence in found.sequences]
        assert len(sums) == 4
        assert sums == sorted(sums, reverse=True)
    best = many[0].sequences[0]
    assert best.text.startswith("Penstock is")
    assert best.text == llm.get_tokenizer().decode(best.tokens)
    greedy = llm.generate("Penstock is", SamplingParams(temperature=0, max_tokens=12, logprobs=0))[0].outputs[0]
    assert best.cum_logprob >= (greedy.cumulative_logprob or 0) - 1e-4 or best.finish_reason == "stop"


def test_the_end_token_is_kept_where_it_is_asked_for(llm: LLM) -> None:
    def best(**more: Any) -> Any:
        return llm.beam_search("Penstock is", BeamSearchParams(beam_width=4, max_tokens=40, **more))[0].sequences

    without, with_it = best(), best(include_stop_str_in_output=True)
    ended = [at for at, one in enumerate(without) if one.finish_reason == "stop"]
    assert ended
    for at in ended:
        assert with_it[at].tokens[:-1] == without[at].tokens
        assert without[at].logprobs == with_it[at].logprobs, "the end token's is there in any case"


def test_generate_and_streams_search_too_and_tell_at_the_end(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=12, beam=Beam(width=4), logprobs=1)
    outputs = llm.generate("Penstock is", params)[0].outputs
    deltas = list(llm.stream_sync("Penstock is", params))
    assert [(delta.index, delta.text, delta.token_ids) for delta in deltas] == [(o.index, o.text, o.token_ids) for o in outputs]
    assert all(delta.finish_reason for delta in deltas)
    assert [len(o.logprobs or []) for o in outputs] == [len(o.token_ids) for o in outputs]


def test_searches_beside_others_change_nothing(llm: LLM) -> None:
    search, plain = SamplingParams(n=3, max_tokens=16, beam=Beam(width=3)), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [f"The number {n} is" for n in range(6)]
    alone = [llm.generate(prompt, params)[0] for prompt, params in zip(prompts, [search, plain] * 3, strict=True)]
    together = llm.generate(prompts, [search, plain] * 3)
    assert [[o.token_ids for o in r.outputs] for r in together] == [[o.token_ids for o in r.outputs] for r in alone]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 65}, "beam_width"),
        ({"beam_width": "4"}, "beam_width"),
        ({"beam_width": 17}, "beam.width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_is_wrong_is_named(llm: LLM, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        llm.beam_search("x", BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | given))
    assert raised.value.param == param
