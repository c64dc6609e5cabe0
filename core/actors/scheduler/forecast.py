"""Whether what is admitted now will still fit once it has grown.

What it is: `Forecast`, which knows how long answers have been, and `Outlook`, the memory that those who run will want, to which one is added after the
other who waits. A prompt that fits today makes somebody leave tomorrow, whose tokens are then computed again; where a cache is full of prompts
of 1,000 tokens with as many to come, that is half of all who run. So a sequence is only admitted if the most that all will hold at any time fits:

    max_k sum_{i >= k} (held_i + left_k),   sequences in the order in which they end (left_1 <= left_2 <= ...)

How much is `left` of one that nothing can stop is known: all up to its limit. Of the others each token is taken to be the last with the same chance: stops
over tokens drawn, counted since long, those of sequences that still run included; so that a burst in which only short answers have ended
yet does not make all look short. The quantiles of that distribution are dealt out by slots, for not all are the longest.
What it does not know: blocks' owners, the prefix cache (but for the share of what is held that it saved), order.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from penstock.core.actors.scheduler.slots import DECODE, PREFILL, Index, Slots

F64 = npt.NDArray[np.float64]

FIRST_STOPS, FIRST_DRAWN = 2.0, 1024.0
"""Before anything was seen: one of 512 tokens is the last."""
MEMORY = float(1 << 18)
"""Tokens drawn until what was seen counts half."""
SPREAD = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole parts, lie evenly in [0, 1) wherever one stops."""


class Forecast:
    """Of one engine's answers."""

    def __init__(self) -> None:
        self._drawn = self._stops = 0.0

    def drew(self, tokens: int) -> None:
        """By sequences that might have stopped."""
        self._drawn += tokens
        if self._drawn > MEMORY:
            self._drawn, self._stops = self._drawn / 2, self._stops / 2

    def stopped(self) -> None:
        """One of them did."""
        self._stops += 1

    def left(self, most: F64, stops: npt.NDArray[np.bool_], slots: Index) -> F64:
        """Tokens that sequences in these slots will still draw, of at most `most`; `stops`: whether something may end them before."""
        usual = (self._drawn + FIRST_DRAWN) / (self._stops + FIRST_STOPS)
        drawn = np.ceil(-usual * np.log1p(-((slots + 1) * SPREAD % 1.0)))
        return np.where(stops, np.minimum(drawn, most), most)

    def outlook(self, slots: Slots, total: int, used: int) -> Outlook:
        """Of those that run. `total`, `used`: blocks of the cache; fewer are used than the sequences' own where they share some. Who is parked
        can be made to leave, and wants nothing."""
        index: Index = np.flatnonzero(((slots.phase == PREFILL) | (slots.phase == DECODE)) & ~slots.parked)
        held = slots.capacity[index].astype(np.float64)
        whole = float(held.sum())
        if whole:
            held *= min(1.0, used * slots.block / whole)
        most = (slots.limit[index] - slots.length[index]).astype(np.float64)
        prefilling = np.flatnonzero(slots.phase == PREFILL)
        attached = [0 if (holder := slots.holder[slot]) is None else len(holder.attached) for slot in prefilling.tolist()]
        if any(attached):  # choices that will enter when the prompt is there, and share it
            source = np.repeat(prefilling, attached)
            index = np.concatenate([index, source])
            held = np.concatenate([held, np.zeros(source.size)])
            most = np.concatenate([most, (slots.limit[source] - slots.prompt[source]).astype(np.float64)])
        return Outlook(self, total * slots.block, slots.block, held, self.left(most, slots.stop_count[index] > 0, index))


class Outlook:
    """`held` and `left` of each, in tokens."""

    def __init__(self, forecast: Forecast, room: int, block: int, held: F64, left: F64) -> None:
        self._forecast = forecast
        self._room = room
        self._block = block
        self._held = held
        self._left = left

    def admits(self, tokens: int, held: float, limit: int, stops: bool, choices: int = 1) -> bool:
        """Whether so many choices of a prompt of `tokens`, of which `held` are not in the cache already, fit beside the others: they are among them then. Where nobody
        runs they always do."""
        place = self._held.size
        mine = np.zeros(choices)
        mine[0] = math.ceil(held / self._block) * self._block
        grows = self._forecast.left(
            np.full(choices, float(limit - tokens)), np.full(choices, stops), np.arange(place, place + choices, dtype=np.intp)
        )
        self._held, self._left = np.concatenate([self._held, mine]), np.concatenate([self._left, grows])
        return place == 0 or self.most() <= self._room

    def most(self) -> float:
        """That all will hold at any one time, in tokens; each holds its last block whole."""
        order = np.argsort(self._left)
        left = np.ceil(self._left[order] / self._block) * self._block
        waiting = np.arange(left.size, 0, -1)
        return float((np.cumsum(self._held[order][::-1])[::-1] + left * waiting).max(initial=0.0))
