"""Bad words of the sampler against the reference, over random histories and words that share their ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.sampling.reference import bad_word_ends
from penstock.plugins.devices.lists import Entries, SlotLists
from penstock.plugins.devices.torch_ops import TorchOps

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
