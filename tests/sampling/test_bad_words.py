"""Bad words of the sampler against the reference, over random histories and words that share their ends."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.sampling.reference import bad_word_ends
from penstock.plugins.devices import sampler

VOCAB = 5
tokens = st.integers(0, VOCAB - 1)
words = st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=6)


@given(words, st.lists(tokens, min_size=1, max_size=6), st.integers(0, 3))
def test_the_sampler_bans_what_the_reference_bans(bad: list[list[int]], history: list[int], more: int) -> None:
    place = SlotSampling(slot=0, choice=0, prompt_len=1, params=SamplingParams(bad_words_token_ids=bad))
    wanted = torch.arange(VOCAB, dtype=torch.float32)
    wanted[sorted(set(bad_word_ends(history, bad)))] = -torch.inf

    logits = torch.arange(VOCAB, dtype=torch.float32)
    stale = i32(history + [0] * more)  # what stands behind the position is of an earlier sequence
    sampler._Lists(place, lambda column: torch.from_numpy(np.array(column))).apply(logits, torch.from_numpy(stale), len(history))
    assert torch.equal(logits, wanted)
