"""How many prompt tokens a step that also decodes may have: what a latency objective leaves, by step times that were measured.

What it is: `StepTimes`, which learns how long steps take by what is in them, and `Pace`, which chooses from it. A step that decodes should not take longer than
a limit: the one that was stated (`--itl-target-ms`, or a goal of one of those that decode), or STRETCH times the median of all steps that decode. That is meant
of nearly all steps, not of every one: where few others were over it, one may take several times the limit, so that a prompt that comes alone is computed
at once, and so is whatever has piled up. Within the limit short prompts are computed whole and first; long ones in what that leaves, and every so often they go first.
And without a stated limit prompts do not wait for ever: what waits is worked off within a small share of the steps that answers take, or slots would stand
empty. All of it is pure: numbers in, numbers out.
What it does not know: sequences, messages, blocks, whose prompts these are.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

STRETCH = 1.28
"""A step with prompts may take so much longer than half of all do, where nothing is stated."""
LOOSEST = 1.1
"""And so much longer than it takes without prompts, at least: while the median follows a load that grew."""
FOLLOWED = 1 / 1000
"""By half of this share of itself the median goes up or down with a step. Slowly: who asks how even steps are looks at minutes, not at moments."""
PIECES = 4.0
"""A long prompt is computed in about so many steps, as far as the limit lets it: the slower, the more even steps are, and the later its first token."""
TURN = 8
"""After so many steps in which short prompts left nothing to long ones these go first."""
FLUSH = 8.0
"""What waits for so many steps more is worth the last long step that is left; of many left one is taken for less."""
ALLOWED = 0.03
"""Of the steps that decode, so many may take longer than the limit: less than the one in twenty that a P95 leaves."""
MARGIN = 0.95
"""Of a stated limit: what a step is planned to take, since what it takes is not known exactly."""
LONG = 4.0
"""Such a step takes at most so many limits where one is stated; else the whole budget of tokens."""
PURSE = 12
"""So many of them may follow each other, when there was none for long."""
SHARE = 1 / 26
"""Of the steps of a mean answer: within so many what waits is computed, where nothing is stated."""
FADE = 0.25
"""So much of its surplus a rate loses within these steps, once less waits: slowly, so that the last of a prompt is not computed in ever smaller parts."""
FIRST_ANSWER, FEWEST_STEPS = 128.0, 2.0
"""Tokens of an answer before any has ended; steps for what waits, at least."""
LEAST = 32
"""Prompt tokens of a step whatever the limit: all who wait come to their end."""
ANSWERS = 64.0
"""Ended answers after which the mean counts as one of so many."""
KEPT = 1 - 1 / 256
"""What a measured step counts after another of its kind, with or without prompts."""
ENOUGH, SOLVED_EACH = 12, 8
"""Steps of each kind after which times are believed; and steps after which they are reckoned anew."""
SAMPLED = 8
"""Of steps without prompts one in so many is measured: there are many, and they are alike."""
OUTLIER = 3.0
"""A step counts with at most so many times what it was thought to take: a hiccup of the host says nothing of prompts."""
_UNIT = np.array([1.0, 1 / 256, 1 / 256, 1 / 65536, 1 / 1048576])


class StepTimes:
    """Nanoseconds of a step: a constant, so many a token, so many more of each token above `knee` (where multiplying takes longer than reading weights does),
    so many a position that decoding rows read, and a pair of positions that prompts attend. Learned by least squares, none below zero."""

    def __init__(self, knee: int) -> None:
        self._knee = knee or 1 << 30
        self._squares = [np.zeros((5, 5)), np.zeros((5, 5))]
        """Of steps without prompts, and with."""
        self._products = [np.zeros(5), np.zeros(5)]
        self.seen = [0, 0]
        self._fresh = 0
        self._rates = [0.0] * 5

    @property
    def known(self) -> bool:
        return min(self.seen) >= ENOUGH

    def learn(self, tokens: int, positions: int, pairs: int, mixed: bool, ns: int) -> None:
        taken = float(ns)
        if self.known:
            taken = min(taken, OUTLIER * self.time(tokens, positions, pairs))
        row = self._row(tokens, positions, pairs)
        # What the share of the error is matters, not its size: a step of 60 ms must not outweigh ten of 6.
        weight = 1 / max(taken, 1.0)
        scaled = row * weight
        squares, products = self._squares[mixed], self._products[mixed]
        squares *= KEPT
        products *= KEPT
        squares += scaled[:, None] * scaled
        products += scaled * (taken * weight)
        self.seen[mixed] += 1
        self._fresh += 1
        if self._fresh >= SOLVED_EACH and self.known:
            self._solve()

    def time(self, tokens: int, positions: int, pairs: int = 0) -> float:
        base, token, more, read, pair = self._rates
        return base + token * tokens + more * max(0, tokens - self._knee) + read * positions + pair * pairs

    def room(self, tokens: int, positions: int, before: int, limit: float) -> float:
        """Prompt tokens beside `tokens` others, which stand behind `before` of their own, so that the step takes no longer than `limit`."""
        _, token, more, _, pair = self._rates
        left = limit - self.time(tokens, positions)
        if left <= 0:
            return 0.0
        each = token + pair * before
        below = max(0, self._knee - tokens)
        if each * below >= left:
            return left / each
        each_more = each + more
        return below + (left - each * below) / each_more if each_more > 0 else math.inf

    def _row(self, tokens: int, positions: int, pairs: int) -> npt.NDArray[np.float64]:
        row: npt.NDArray[np.float64] = np.array([1.0, tokens, max(0, tokens - self._knee), positions, pairs]) * _UNIT
        return row

    def _solve(self) -> None:
        """What fits best of what is not below zero: whatever comes out below is left out, and the rest is fitted again."""
        self._fresh = 0
        squares, products = self._squares[0] + self._squares[1], self._products[0] + self._products[1]
        squares = squares + np.diag(1e-6 * squares.diagonal() + 1e-30)
        used = [place for place in range(5) if squares[place, place] > 1e-29]
        while used:
            found = np.linalg.solve(squares[np.ix_(used, used)], products[used])
            if (found >= 0).all():
                break
            del used[int(np.argmin(found))]
        rates = np.zeros(5)
        if used:
            rates[used] = found
        self._rates = (rates * _UNIT).tolist()


class Needs:
    """Prompt tokens that wait: `begun` of each prompt that is being computed, `ahead` of each that may be admitted, in order; `waiting` of all for whom there
    are slots; the first prompt stands behind `before` tokens of its own."""

    __slots__ = ("ahead", "before", "begun", "waiting")

    def __init__(self, begun: list[int], ahead: list[int], waiting: int, before: int) -> None:
        self.begun = begun
        self.ahead = ahead
        self.waiting = waiting
        self.before = before

    def shorts(self, room: float) -> int:
        """Tokens of those that fit into `room` together with the ones before."""
        kept = 0
        for count in itertools.chain(self.begun, self.ahead):
            if kept + count <= room:
                kept += count
            elif count <= room:
                break
        return kept

    def long(self, room: float) -> int:
        """Tokens of the first that does not fit; 0: all do."""
        return next((count for count in itertools.chain(self.begun, self.ahead) if count > room), 0)


class Share(NamedTuple):
    """Of a step's tokens, for prompts: `tokens` in all, `kept` of them for short ones (at most `small` tokens to go), whoever stands before them."""

    tokens: int
    kept: int = 0
    small: int = 0


class Pace:
    """`target_ns`: of a step, stated; 0: none is. `knee`: see StepTimes; 0: it is not known."""

    def __init__(self, target_ns: float, knee: int) -> None:
        self.target_ns = target_ns
        self.times = StepTimes(knee)
        self.limit_ns = target_ns
        """Of the step that was planned last with prompts that waited."""
        self._usual = 0.0
        """The median of steps that decode, in ns."""
        self._steps = 0
        self._answer = FIRST_ANSWER
        self._answers = 1.0
        self._purse = float(PURSE)
        """Steps that may take longer; below zero: there were more. Steps, not rows: so that those in which a crowd begins are not the dearer the more of it runs."""
        self._passed = 0
        """Steps, one after the other, in which long prompts got nothing."""
        self._skipped = 0
        self._rate = 0.0
        """Prompt tokens of a step that are due, where nothing is stated."""

    # ------------------------------------------------------------------ what is learned

    def due(self) -> bool:
        """Is a step without prompts to be measured?"""
        self._skipped += 1
        if self._skipped < SAMPLED and self.times.seen[0] >= ENOUGH:
            return False
        self._skipped = 0
        return True

    def rested(self, ns: int) -> None:
        """A step that decoded had no prompts, and took so long."""
        self._purse = min(self._purse + ALLOWED, PURSE)
        self._steps += 1
        part = max(FOLLOWED, 1 / self._steps)
        self._usual = self._usual * (1 + part * (0.5 if ns > self._usual else -0.5)) if self._usual else float(ns)

    def beside(self, ns: int, limit_ns: float) -> None:
        """A step that decoded had prompts, and took so long, where it should not have taken longer than that limit."""
        self.rested(ns)
        if ns > limit_ns > 0:
            self._purse = max(self._purse - 1, -PURSE)

    def answered(self, tokens: int, answers: int) -> None:
        """So many answers have ended, of so many tokens together."""
        self._answers = min(self._answers + answers, ANSWERS)
        self._answer += (tokens / answers - self._answer) * min(1.0, answers / self._answers)

    # ------------------------------------------------------------------ the choice

    def choose(self, tokens: int, positions: int, needs: Needs, budget: int, goal_ns: int = 0) -> Share:
        """For a step whose decodes compute `tokens` tokens and read `positions` positions. `goal_ns`: the strictest that one of these has of its own, as if it
        was stated; 0: none has."""
        times, waiting = self.times, needs.waiting
        if not waiting:
            self._rate = 0.0
        if not waiting or not times.known:
            return Share(budget)
        stated = goal_ns or self.target_ns
        self.limit_ns = stated or max(STRETCH * self._usual, LOOSEST * times.time(tokens, positions))
        room = self._room(tokens, positions, needs, self.limit_ns * MARGIN, budget)
        if self._purse >= 1 and waiting > room * (1 + FLUSH * (1 - self._purse / PURSE)):
            if not stated:
                return Share(budget)
            room = self._room(tokens, positions, needs, stated * MARGIN * LONG, budget)
        kept = needs.shorts(room)
        most = room
        if not stated:
            even = times.room(tokens, positions, needs.before, self._usual)
            steps = max(FEWEST_STEPS, SHARE * self._answer)
            self._rate = max(waiting / steps, self._rate * (1 - FADE / steps))
            most = max(min(room, max(even, kept, needs.long(room) / PIECES, LEAST)), self._rate)
        self._passed = self._passed + 1 if most - kept < min(LEAST, waiting - kept) else 0
        if self._passed >= TURN:
            kept = self._passed = 0
        most = math.ceil(min(most, budget))
        return Share(most, min(kept, most), math.floor(room))

    def _room(self, tokens: int, positions: int, needs: Needs, limit_ns: float, budget: int) -> float:
        """Prompt tokens with which the step takes so long, within what a step has in any case."""
        return min(max(self.times.room(tokens, positions, needs.before, limit_ns), LEAST), budget)
