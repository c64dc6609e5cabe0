"""Filters, draws, penalties and log-probabilities against the float64 reference; draws against their distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import native
from penstock.kernels.sampling import api, reference
from penstock.kernels.sampling import torch as portable

IMPLEMENTATIONS = ["native", "torch"]


def columns(rows: int, **over: Any) -> dict[str, torch.Tensor]:
    base: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 1, "choices": 0, "positions": 5}
    kinds = {"top_k": torch.int32, "seeds": torch.int64, "choices": torch.int32, "positions": torch.int32}
    out = {}
    for name, value in {**base, **over}.items():
        values = torch.as_tensor(value, dtype=kinds.get(name, torch.float32))
        out[name] = values.expand(rows).contiguous()
    return out


@pytest.fixture(params=IMPLEMENTATIONS)
def draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "native":
        if native.library() is None:
            pytest.skip("no C kernels on this machine")
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    return api.draw


def draw_with(name: str, logits: torch.Tensor, **over: Any) -> list[int]:
    settings_ = columns(len(logits), **over)
    if name == "native":
        return list(api.draw(logits, **settings_).tolist())
    tokens, _ = portable.draw(logits, **settings_)
    return list(tokens.tolist())


# Published test vectors of Random123's Philox4x32-10.
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: int, want: tuple[int, ...]) -> None:
    assert tuple(reference.philox4x32(list(counter), key).tolist()) == want
    signed = key - (1 << 64) if key >> 63 else key
    c = [torch.tensor([word], dtype=torch.int64) for word in counter]
    word = portable.philox_word(c[0], c[1], counter[2], c[3], torch.tensor([signed]))
    assert word.item() == want[0]


logit_rows = (
    st.integers(2, 60)
    .flatmap(
        lambda n: st.lists(
            st.one_of(st.floats(-12, 12, width=32, allow_subnormal=False), st.sampled_from([0.0, 1.5, -math.inf])), min_size=n, max_size=n
        )
    )
    .filter(lambda row: any(math.isfinite(x) for x in row))
)


@settings(max_examples=150, deadline=None)
@given(
    row=logit_rows,
    temperature=st.floats(0.125, 3, width=32),
    top_k=st.integers(-1, 20),
    top_p=st.one_of(st.just(1.0), st.floats(0.0625, 0.96875, width=32)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0078125, 0.5, width=32)),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 2**31 - 1),
)
def test_draws_equal_the_reference(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, choice: int, position: int
) -> None:
    logits = torch.tensor([row], dtype=torch.float32)
    scaled = (logits / np.float32(temperature)).double().numpy()[0]
    keep = reference.keep_mask(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
    # a filter's edge may fall to either side by rounding: the draw must lie between the two readings
    eps = 1e-5
    narrow = keep & reference.keep_mask(scaled, top_k=top_k, top_p=max(1e-9, top_p - eps) if top_p < 1 else 1.0, min_p=min_p * (1 + eps))
    wide = keep | reference.keep_mask(scaled, top_k=top_k, top_p=top_p + eps, min_p=min_p * (1 - eps))
    for first_k in (top_k,):
        scores = scaled + reference.gumbel(seed, choice, position, np.arange(len(row)))
        allowed = {int(np.argmax(np.where(mask, scores, -np.inf))) for mask in (narrow, keep, wide)}
        for name in IMPLEMENTATIONS if native.library() is not None else ["torch"]:
            got = draw_with(
                name,
                logits,
                temperature=temperature,
                top_k=first_k,
                top_p=top_p,
                min_p=min_p,
                seeds=seed,
                choices=choice,
                positions=position,
            )[0]
            assert got in allowed, (name, got, allowed)
            assert wide[got]


def test_draws_equal_the_reference_on_a_large_vocabulary(draw: Any) -> None:
    rng = np.random.default_rng(3)
    for spread in (0.2, 1.0, 4.0):
        logits = torch.from_numpy(rng.normal(0, spread, (4, 20011)).astype(np.float32))
        for settings_ in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 700, "top_p": 0.8, "min_p": 0.01}, {"temperature": 0.6}):
            over = {"temperature": 1.0, **settings_}
            got = draw(logits, **columns(4, seeds=[7, -3, 2**62, 0], positions=[0, 9, 900, 4], **over)).tolist()
            for i, (seed, position) in enumerate(zip([7, -3, 2**62, 0], [0, 9, 900, 4], strict=True)):
                scaled = (logits[i] / np.float32(over["temperature"])).double().numpy()
                keep = reference.keep_mask(scaled, top_k=over.get("top_k", 0), top_p=over.get("top_p", 1.0), min_p=over.get("min_p", 0.0))
                assert got[i] == int(
                    np.argmax(np.where(keep, scaled + reference.gumbel(seed, 0, position, np.arange(scaled.size)), -np.inf))
                )


def test_reference_draw_uses_the_same_definition() -> None:
    logits = np.array([0.5, 2.0, 1.0, -3.0])
    for position in range(20):
        got = draw_with("torch", torch.from_numpy(logits[None]).float(), temperature=0.5, top_k=3, seeds=9, choices=2, positions=position)[
            0
        ]
        assert got == reference.draw(logits, temperature=0.5, top_k=3, seed=9, choice=2, position=position)
    assert reference.draw(logits, temperature=0.0) == 1


@pytest.mark.parametrize(
    ("settings_", "kept"),
    [({}, None), ({"top_k": 3}, 3), ({"top_p": 0.6}, None), ({"min_p": 0.3}, None), ({"temperature": 2.0}, None)],
)
def test_draws_follow_the_distribution(draw: Any, settings_: dict[str, Any], kept: int | None) -> None:
    """Chi-squared over 20,000 positions: a fair draw exceeds the bound (p = 1e-6) once in a million."""
    logits = np.log(np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.03], np.float64)).astype(np.float32)
    count = 20_000
    rows = torch.from_numpy(np.tile(logits, (count, 1)))
    got = draw(rows, **columns(count, seeds=12345, positions=list(range(count)), **settings_)).numpy()
    scaled = (logits / np.float32(settings_.get("temperature", 1.0))).astype(np.float64)
    keep = reference.keep_mask(scaled, **{k: v for k, v in settings_.items() if k != "temperature"})
    want = reference.softmax(np.where(keep, scaled, -np.inf)) * count
    if kept is not None:
        assert keep.sum() == kept
    seen = np.bincount(got, minlength=len(logits))
    assert (seen[~keep] == 0).all()
    statistic = float((((seen - want) ** 2)[keep] / want[keep]).sum())
    # upper 1e-6 points of chi-squared for 1..6 degrees of freedom
    bound = {1: 23.93, 2: 27.63, 3: 30.67, 4: 33.38, 5: 35.89, 6: 38.26}[int(keep.sum()) - 1]
    assert statistic < bound


def test_seeds_choices_and_positions_are_independent(draw: Any) -> None:
    rows = torch.zeros(4000, 64)
    a = draw(rows, **columns(4000, positions=list(range(4000)))).numpy()
    for over in ({"seeds": 2}, {"choices": 1}, {"seeds": 1 << 32}):
        b = draw(rows, **columns(4000, positions=list(range(4000)), **over)).numpy()
        # two fair streams over 64 tokens agree in 1/64 of the places: 62.5 +- 7.8
        assert 20 < int((a == b).sum()) < 110


def test_a_row_draws_the_same_token_alone_and_in_any_batch(draw: Any) -> None:
    rng = np.random.default_rng(0)
    count, vocab = 33, 4099
    logits = torch.from_numpy(rng.normal(0, 2, (count, vocab)).astype(np.float32))
    over = {
        "temperature": rng.choice([0.0, 0.5, 1.0], count),
        "top_k": rng.choice([0, 1, 40], count),
        "top_p": rng.choice([1.0, 0.9], count),
        "min_p": rng.choice([0.0, 0.05], count),
        "seeds": rng.integers(-(2**62), 2**62, count),
        "choices": rng.integers(0, 4, count),
        "positions": rng.integers(0, 5000, count),
    }
    settings_ = columns(count, **over)
    together = draw(logits, **settings_).tolist()
    order = rng.permutation(count)
    shuffled = draw(logits[order], **{name: value[order].contiguous() for name, value in settings_.items()}).tolist()
    assert [together[i] for i in order] == shuffled
    for i in range(count):
        assert draw(logits[i : i + 1], **{name: value[i : i + 1].contiguous() for name, value in settings_.items()}).tolist() == [
            together[i]
        ]
    greedy = over["temperature"] == 0
    assert [together[i] for i in np.flatnonzero(greedy)] == logits[torch.from_numpy(greedy)].argmax(-1).tolist()


def test_bad_rows(draw: Any) -> None:
    rows = torch.zeros(5, 40)
    rows[1, 39] = math.nan
    rows[2] = -math.inf
    rows[3, 7] = math.inf
    rows[4, :39] = -math.inf
    got = draw(rows, **columns(5)).tolist()
    assert got[1:4] == [-1, -1, -1]
    assert got[0] >= 0
    assert got[4] == 39


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    repetition=st.floats(0.5, 2, width=32),
    frequency=st.floats(-2, 2, width=32, allow_subnormal=False),
    presence=st.floats(-2, 2, width=32, allow_subnormal=False),
)
def test_penalties_equal_the_reference(data: st.DataObject, repetition: float, frequency: float, presence: float) -> None:
    vocab = 17
    tokens = st.lists(st.integers(0, vocab - 1), max_size=30)
    prompt, output = data.draw(tokens), data.draw(tokens)
    row = np.array(data.draw(st.lists(st.floats(-9, 9, width=32, allow_subnormal=False), min_size=vocab, max_size=vocab)), np.float32)
    want = reference.penalise(row.astype(np.float64), prompt, output, repetition=repetition, frequency=frequency, presence=presence)
    counts = torch.from_numpy(np.bincount(np.array(output, np.int64), minlength=vocab).astype(np.int32))[None]
    seen = torch.from_numpy(np.bincount(np.array(prompt, np.int64), minlength=vocab) > 0)[None]
    got = api.penalise(torch.from_numpy(row[None]), counts, seen, *(torch.tensor([x]) for x in (repetition, frequency, presence)))
    assert np.allclose(got.numpy()[0], want, atol=1e-4, rtol=1e-5)


def test_logprobs_equal_the_reference() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (6, 301)).astype(np.float32)
    tokens = rng.integers(0, 301, 6)
    ids, values, ranks = api.logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), 5)
    for row in range(6):
        want = reference.log_softmax(logits[row].astype(np.float64))
        assert ids[row, 0] == tokens[row]
        assert ids[row, 1:].tolist() == np.argsort(-logits[row], kind="stable")[:5].tolist()
        assert np.allclose(values[row].numpy(), want[ids[row].numpy()], atol=1e-5)
        assert int(ranks[row]) == reference.rank(logits[row], int(tokens[row]))
    only, values, _ = api.logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), 0)
    assert only.shape == values.shape == (6, 1)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="temperature must have shape"):
        api.draw(torch.zeros(2, 3), **{**columns(2), "temperature": torch.ones(3)})
    with pytest.raises(ValueError, match="logits must be"):
        api.draw(torch.zeros(2, 3, dtype=torch.bfloat16), **columns(2))
    with pytest.raises(ValueError, match="k must be"):
        api.logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 4)
