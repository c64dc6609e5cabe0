"""Bad words of the sampler against the reference, over random histories and words that share their ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.sampling.reference import bad_word_ends
from penstock.plugins.devices import words as words_module
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.devices.lists import Entries, SlotLists
from penstock.plugins.devices.rings import Download, Upload
from penstock.plugins.devices.sampler import SlotSampler
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.devices.words import WordTable

VOCAB = 5
tokens = st.integers(0, VOCAB - 1)
words = st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=6)


@given(words, st.lists(tokens, min_size=1, max_size=6), st.integers(0, 3))
def test_the_sampler_bans_what_the_reference_bans(bad: list[list[int]], history: list[int], more: int) -> None:
    place = SlotSampling(slot=0, choice=0, prompt_len=1, params=SamplingParams(bad_words_token_ids=bad))
    wanted = torch.arange(VOCAB, dtype=torch.float32)
    wanted[sorted(set(bad_word_ends(history, bad)))] = -torch.inf
    logits = torch.stack([torch.full((VOCAB,), 7.0), torch.arange(VOCAB, dtype=torch.float32)])
    stale = torch.from_numpy(
        i32([[0] * (len(history) + more), history + [0] * more])
    )  # what stands behind the position is of an earlier sequence
    entries = Entries([1], [SlotLists(place, VOCAB)], [len(history)])
    ops = TorchOps()

    def tensor(column: Any) -> torch.Tensor:
        return torch.from_numpy(column.copy())

    ops.add_bias(logits, tensor(entries.rows), tensor(entries.ids), tensor(entries.values))
    at, where = tensor(i32([-1, 1])), tensor(i32([0, len(history)]))
    columns = (tensor(entries.words), tensor(entries.starts), tensor(entries.sizes))
    ops.ban_words(logits, stale, tensor(entries.word_rows), at, where, *columns, entries.longest)
    assert torch.equal(logits[1], wanted)
    assert (logits[0] == 7.0).all()


@given(words, st.lists(tokens, max_size=8), st.integers(0, 3))
def test_a_look_up_on_the_host_bans_what_the_reference_bans(bad: list[list[int]], history: list[int], more: int) -> None:
    several = [word for word in bad if len(word) > 1]
    behind = i32([*history, *[0] * more])  # what stands behind the position is of an earlier sequence
    wanted = sorted(set(bad_word_ends(history, several)))
    assert WordTable([i32(word) for word in several]).banned(behind[: len(history)]).tolist() == wanted
    lists = SlotLists(SlotSampling(slot=0, choice=0, prompt_len=1, params=SamplingParams(bad_words_token_ids=bad)), VOCAB, looked_up=True)
    entries = Entries([3], [lists], [len(history)], [behind])
    assert entries.ids.tolist() == sorted(set(bad_word_ends(history, bad)))
    assert entries.rows.tolist() == [3] * len(entries.ids)
    assert np.isneginf(entries.values).all()
    assert entries.longest == 0


@given(
    st.lists(st.lists(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 256, 65536]), min_size=2, max_size=5), max_size=9),
    st.data(),
)
def test_a_look_up_compares_whole_tokens(bad: list[list[int]], data: st.DataObject) -> None:
    """Ids whose bytes look alike when they are shifted."""
    pieces = [word[:-1] for word in bad] or [[0]]
    history = [token for part in data.draw(st.lists(st.sampled_from(pieces), max_size=4)) for token in part]
    assert WordTable([i32(word) for word in bad]).banned(i32(history)).tolist() == sorted(set(bad_word_ends(history, bad)))


def test_long_words_that_nearly_fit_are_not_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: of a thousand words of 64 tokens that all differ from the history in their first one, one is compared."""
    history = i32(list(range(100, 163)))
    table = WordTable([i32([1000 + index, *history[1:], 7]) for index in range(1000)] + [i32([*history[-3:], 9])])
    compared: list[tuple[bytes, bytes]] = []
    common = words_module._common

    def counting(one: bytes, other: bytes) -> int:
        compared.append((one, other))
        return common(one, other)

    monkeypatch.setattr(words_module, "_common", counting)
    assert table.banned(history).tolist() == [9]
    assert len(compared) == 1


def test_a_direct_sampler_looks_words_up_at_each_step() -> None:
    """Over a growing history, as the slot's draws write it, and for a slot whose sequence is another one's later."""
    ops, lane = TorchOps(), HostLane(direct=True)
    history = torch.zeros(2, 16, dtype=torch.int32)
    uploads = [Upload(lane, 1, 0) for _ in range(3)]
    sampler = SlotSampler(ops, 2, VOCAB, history, *uploads, lambda column: torch.from_numpy(column), direct=True)
    bad = [[4, 3], [1, 4, 3, 2], [2], [3, 1]]
    for first in (4, 1):
        params = SamplingParams(temperature=0.0, bad_words_token_ids=bad)
        sampler.place([SlotSampling(slot=1, choice=0, prompt_len=1, params=params)])
        drawn = [first]
        history[1] = 0
        history[1, 0] = first
        for position in range(1, 12):
            likely = torch.tensor([[0.0, 3.0, 5.0, 4.0, 2.0]])  # 2, then 3, then 1, then 4
            at, where = torch.tensor([1], dtype=torch.int32), torch.tensor([position], dtype=torch.int32)
            tokens, _ = sampler.sample(likely, i32([1]), i32([position]), at, where, Download(lane, 1, 2).take())
            banned = bad_word_ends(drawn, bad)
            assert int(tokens[0]) == next(token for token in (2, 3, 1, 4, 0) if token not in banned)
            drawn.append(int(tokens[0]))
            history[1, position] = tokens[0]


def test_a_ban_comes_before_a_bias_and_stop_tokens_come_back() -> None:
    params = SamplingParams(logit_bias={2: 5.0, 3: 1.0}, bad_words_token_ids=[[2]], min_tokens=2)
    lists = SlotLists(SlotSampling(slot=0, choice=0, prompt_len=4, params=params, stop_ids=i32([3, 1])), VOCAB)
    early, late = (dict(zip(*(column.tolist() for column in lists.additions(at)), strict=True)) for at in (5, 6))
    assert early == {2: float("-inf"), 1: float("-inf"), 3: float("-inf")}
    assert late == {2: float("-inf"), 3: 1.0}
    assert (lists.holds_back(5), lists.holds_back(6)) == (True, False)


def test_a_word_given_often_is_looked_for_once() -> None:
    params = SamplingParams(bad_words_token_ids=[[1, 2]] * 500 + [[3]] * 9 + [[1, 2, 4]])
    lists = SlotLists(SlotSampling(slot=0, choice=0, prompt_len=1, params=params), VOCAB)
    entries = Entries([0, 2], [lists, lists], [4, 4])
    assert entries.word_rows.tolist() == [0, 0, 2, 2]
    assert entries.words.tolist() == [1, 2, 1, 2, 4] * 2
    assert entries.sizes.tolist() == [2, 3] * 2


def test_many_words_cost_few_operations() -> None:
    """Counted: comparing is done for all words of a step at once, and ends where none fits any more."""
    words = [[a, b, c] for a in range(5, 15) for b in range(5, 15) for c in range(5, 15)]
    lists = SlotLists(SlotSampling(slot=0, choice=0, prompt_len=1, params=SamplingParams(bad_words_token_ids=words)), 16)
    entries = Entries(list(range(8)), [lists] * 8, [3] * 8)
    logits, history = torch.zeros(8, 16), torch.tensor([[1, 6, 7, 0]] * 8, dtype=torch.int32)
    calls = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **(kwargs or {}))

    columns = (entries.word_rows, np.arange(8, dtype=np.int32), i32([3] * 8), entries.words, entries.starts, entries.sizes)
    tensors = [torch.from_numpy(column) for column in columns]
    with Counting():
        TorchOps().ban_words(logits, history, *tensors, entries.longest)
    assert calls < 100
    assert torch.isinf(logits).sum(dim=1).tolist() == [10] * 8
