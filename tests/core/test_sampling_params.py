"""SamplingParams.validate: every wrong value names its field, and nothing gets through that int32 columns cannot carry."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.sampling import INT_LIMIT, SamplingParams

HUGE = [INT_LIMIT, 2**40, 2**63, 10**25]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("field", ["n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"])
def test_counts_beyond_int32_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).validate(max_logprobs=10**30)
    assert caught.value.param == field


@pytest.mark.parametrize("value", [*HUGE, -1])
@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_out_of_range_are_refused_with_and_without_a_vocabulary(field: str, value: int) -> None:
    params = SamplingParams(**{field: {value: 1.0} if field == "logit_bias" else [value]})
    for vocab_size in (None, 100):
        with pytest.raises(InvalidRequest) as caught:
            params.validate(vocab_size=vocab_size)
        assert (caught.value.param or "").startswith("logit_bias." if field == "logit_bias" else f"{field}[0]")
        assert len(caught.value.message) < 150


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"temperature": 1e308},
        {"temperature": 1001.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 101.0},
        {"repetition_penalty": 1e308},
        {"logit_bias": {1: 1e308}},
        {"min_p": float("nan")},
        {"frequency_penalty": float("inf")},
        {"presence_penalty": -2.5},
        {"max_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"allowed_token_ids": []},
        {"logit_bias": {1: 101.0}},
        {"n": 0},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_wrong_values_name_their_field(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**values).validate()
    assert (caught.value.param or "").split(".")[0] == next(iter(values))


def test_what_is_right_passes_unchanged() -> None:
    params = SamplingParams(top_k=INT_LIMIT - 1, seed=-(2**63), logit_bias={99: -100.0}, stop_token_ids=[0, 99])
    assert params.validate(vocab_size=100) is params
