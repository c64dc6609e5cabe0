"""Beam searches as text sees them: what is refused, and how much room they are given."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import Config
from penstock.core.protocol.messages import Admit
from penstock.core.protocol.sampling import Beam, SamplingParams

NAMES = {"beam": "use_beam_search", "beam.width": "best_of"}


def admitted(bench: Any) -> Admit:
    (admit,) = [message for message in bench.engine if isinstance(message, Admit)]
    return admit


@pytest.mark.parametrize(
    ("facts", "params", "more", "param", "code"),
    [
        ({"beams": False}, {}, {}, "use_beam_search", "unsupported_feature"),
        ({"max_num_seqs": 3}, {}, {}, "best_of", "invalid_value"),
        ({"max_num_batched_tokens": 3}, {}, {}, "best_of", "invalid_value"),
        ({"num_blocks": 5}, {}, {"prompt_ids": i32([1] * 47), "text": None}, "best_of", "invalid_value"),
        ({"num_blocks": 8}, {"max_tokens": 40}, {"explicit": ["max_tokens"]}, "max_tokens", "context_length_exceeded"),
        ({}, {"beam": Beam(width=9, length_penalty=11.0)}, {}, "length_penalty", "invalid_value"),
        ({}, {"n": 5}, {}, "beam.width", "invalid_value"),
        ({}, {"top_k": 3}, {}, "top_k", "invalid_value"),
        ({}, {"stop": ["x"]}, {}, "stop", "invalid_value"),
        ({}, {"bad_words": ["x"]}, {}, "bad_words", "invalid_value"),
        ({}, {"logit_bias": {3: 1.0}}, {}, "logit_bias", "invalid_value"),
        ({}, {"repetition_penalty": 1.1}, {}, "repetition_penalty", "invalid_value"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused_by_name(
    facts: dict[str, Any], params: dict[str, Any], more: dict[str, Any], param: str, code: str, make_bench: Any
) -> None:
    bench = make_bench(up=False)
    bench.up(**{"beams": True} | facts)
    sampling = SamplingParams(**{"beam": Beam(width=4)} | params)
    text = more.pop("text", "the water")
    bench.submit(1, text, sampling=sampling, names=NAMES, **more)
    refused = bench.rejected[1]
    assert (refused.status, refused.param, refused.code) == (400, param, code)
    assert not bench.engine


def test_a_search_has_the_room_that_beams_without_anything_in_common_need(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(beams=True, num_blocks=20, block_size=16)
    bench.submit(1, None, prompt_ids=i32([1] * 40), sampling=SamplingParams(n=2, beam=Beam(width=4)))
    assert admitted(bench).max_tokens == (2 + 18 // 4) * 16 - 40
    assert admitted(bench).choices.tolist() == [0, 1]


def test_the_models_defaults_are_for_drawing(make_bench: Any) -> None:
    bench = make_bench(Config(), up=False, defaults={"top_p": 0.5, "repetition_penalty": 1.2, "max_tokens": 7})
    bench.up(beams=True)
    bench.submit(1, sampling=SamplingParams(beam=Beam(width=2)))
    sampling = admitted(bench).sampling
    assert (sampling.top_p, sampling.repetition_penalty, admitted(bench).max_tokens) == (1.0, 1.0, 7)
