"""The settings of a sequence that are lists, and the columns that a step makes of them.

What it is: bias, allowed tokens, bad words and held-back stop tokens of one slot as host arrays, made once when it is placed; and `Entries`, which puts those of a step's
rows together for three launches, however many rows and words there are: additions to single logits (a ban adds -inf), masks over whole rows, and
words whose last token is banned where the history ends with the rest. Histories are looked at on the device alone; only where they lie in the host's
memory anyway, `Entries` gets them, looks the words up itself (words.py), and what it finds are additions.
What it does not know: logits, other settings, which request a slot serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.core.protocol.columns import EMPTY_F32, EMPTY_I32, F32, I32, Column, i32
from penstock.core.protocol.messages import SlotSampling
from penstock.plugins.devices.words import WordTable


class SlotLists:
    """Of one slot. Token ids are below `vocab`. `looked_up`: Entries will get this slot's history."""

    def __init__(self, place: SlotSampling, vocab: int, *, looked_up: bool = False) -> None:
        params = place.params
        words = params.bad_words_token_ids
        self._banned = np.unique(i32([word[0] for word in words if len(word) == 1]))
        self._stops = np.unique(i32([int(token) for token in place.stop_ids])) if params.min_tokens > 0 else EMPTY_I32
        self._ids = i32(list(params.logit_bias))
        self._values: F32 = np.asarray(list(params.logit_bias.values()), np.float32)
        self._ends = place.prompt_len + params.min_tokens
        self.words = [i32(word) for word in dict.fromkeys(map(tuple, words)) if len(word) > 1]
        self._table: WordTable | None = None
        if looked_up and self.words:
            self._table, self.words = WordTable(self.words), []
        self.sizes = i32([len(word) for word in self.words])
        self.word_tokens: I32 = np.concatenate(self.words) if self.words else EMPTY_I32
        self.mask: I32 | None = None if params.allowed_token_ids is None else _mask(params.allowed_token_ids, vocab)

    def holds_back(self, position: int) -> bool:
        """Are there too few tokens yet for the stop tokens?"""
        return len(self._stops) > 0 and position < self._ends

    def late(self, position: int, slack: int) -> I32:
        """The stop tokens, where a position that may be so much lower than `position` decides whether they are held back."""
        known = not slack or self.holds_back(position) or not self.holds_back(position - slack)
        return EMPTY_I32 if known else self._stops

    @property
    def ends(self) -> int:
        """The first position at which no stop is held back."""
        return self._ends

    def additions(self, position: int, history: I32 | None = None) -> tuple[I32, F32]:
        """(ids, what is added to their logits) for a draw at `position` behind `history` (its tokens from 0 on, and maybe more), if that is known here;
        no id twice, a ban before a bias."""
        banned = np.union1d(self._banned, self._stops) if self.holds_back(position) else self._banned
        if self._table is not None:
            assert history is not None
            completed = self._table.banned(history[max(0, position - self._table.reach) : position])
            banned = np.union1d(banned, completed) if len(completed) else banned
        if not len(banned):
            return self._ids, self._values
        kept = ~np.isin(self._ids, banned)
        ids = np.concatenate([self._ids[kept], banned]).astype(np.int32)
        return ids, np.concatenate([self._values[kept], np.full(len(banned), -np.inf, np.float32)])


def _mask(allowed: Sequence[int], vocab: int) -> I32:
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class Entries:
    """A step's: rows index its logits. `histories`, where the host has them: one a row. `slack`: of each row, by how much its position may be too high. `held`
    are then rows, stop tokens and the positions from which on these may be drawn, of rows where that depends on it; else empty."""

    def __init__(
        self,
        rows: Sequence[int],
        lists: Sequence[SlotLists],
        positions: Sequence[int],
        histories: Sequence[I32] | None = None,
        slack: Sequence[int] = (),
    ) -> None:
        known = [None] * len(rows) if histories is None else histories
        found = [one.additions(position, history) for one, position, history in zip(lists, positions, known, strict=True)]
        counts = [len(ids) for ids, _ in found]
        self.rows: I32 = np.repeat(i32(rows), counts).astype(np.int32)
        self.ids: I32 = np.concatenate([ids for ids, _ in found]) if found else EMPTY_I32
        self.values: F32 = np.concatenate([values for _, values in found]) if found else EMPTY_F32
        self.held: list[I32] = []
        if any(slack):
            late = [one.late(position, most) for one, position, most in zip(lists, positions, slack, strict=True)]
            sizes = [len(stops) for stops in late]
            if any(sizes):
                ends = i32([one.ends for one in lists])
                self.held = [np.repeat(i32(rows), sizes), np.concatenate(late), np.repeat(ends, sizes)]
        self.masked = [(row, one.mask) for row, one in zip(rows, lists, strict=True) if one.mask is not None]
        wordy = [(row, one) for row, one in zip(rows, lists, strict=True) if one.words]
        self.word_rows = self.sizes = self.words = self.starts = EMPTY_I32
        if wordy:
            self.word_rows = np.repeat(i32([row for row, _ in wordy]), [len(one.words) for _, one in wordy])
            self.sizes = np.concatenate([one.sizes for _, one in wordy])
            self.words = np.concatenate([one.word_tokens for _, one in wordy])
            self.starts = (np.cumsum(self.sizes) - self.sizes).astype(np.int32)
        self.longest = int(self.sizes.max()) if wordy else 0

    def masks(self, count: int) -> tuple[Column, Column]:
        """(mask rows one after the other, which of them each of `count` rows has, -1: none)."""
        which = np.full(count, -1, np.int32)
        which[[row for row, _ in self.masked]] = np.arange(len(self.masked))
        return np.concatenate([mask for _, mask in self.masked]), which
