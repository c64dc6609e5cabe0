"""A beam search: which continuations are followed, and which have ended.

What it is: the arithmetic alone. From the likeliest tokens behind each beam it takes the best that go on, keeps the best that ended, and says when
no better one is to be had. Equal to transformers' generate with num_beams, length_penalty and early_stopping, whose rules these are: of a step's
best `width` continuations those that end are kept as hypotheses, with their log-probabilities' sum / length ** length_penalty as score; the best
`width` that do not end are followed. A continuation whose log-probability is -inf is none: where there are fewer than `width`, the best beam is
followed several times over, as beams of which nothing can come.
What it does not know: slots, blocks, messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.core.protocol.columns import I32, Column, i32
from penstock.core.protocol.sampling import Beam


class Mark(NamedTuple):
    """The log-probabilities of one token of a beam, and of those before it. `ids` and `values`: the token first, then the likeliest."""

    before: Mark | None
    rank: int
    ids: I32
    values: Column


class Hypothesis(NamedTuple):
    """A beam that is over. `stopped`: by its last token, not by its length."""

    score: float
    tokens: I32
    stopped: bool
    mark: Mark | None


class Search:
    """One search. `ends` are tokens that end a beam once there are more than `min_tokens`. `logprobs`: of each token so many of the likeliest are
    kept (None: nothing)."""

    def __init__(self, beam: Beam, ends: list[int], min_tokens: int, max_tokens: int, logprobs: int | None) -> None:
        self.beam = beam
        self.ends = i32(ends)
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self.top = max(beam.width + len(ends), logprobs or 0)
        """How many of the likeliest tokens behind each beam are looked at: enough for `width` that do not end."""
        self.reset()

    def reset(self) -> None:
        """From the beginning."""
        self.length = 0
        """Tokens of each beam."""
        self._scores: npt.NDArray[np.float64] = np.zeros(1)
        self._marks: list[Mark | None] = [None]
        self.done: list[Hypothesis] = []
        """The best that ended, best first; at most `width`."""

    @property
    def beams(self) -> int:
        """One at first, then `width`."""
        return len(self._marks)

    def advance(self, ids: I32, values: Column, history: Callable[[int], I32]) -> tuple[list[int], list[int]] | None:
        """`ids` and `values` [beams, top]: the likeliest tokens behind each beam, and their log-probabilities. `history(beam)` is what a beam has so far.
        The beams from here on, best first: of each the beam that it continues, and its token. None: it is over."""
        width, most = self.beam.width, self._max_tokens
        total = (values.astype(np.float64) + self._scores[:, None]).ravel()
        ends = np.isin(ids, self.ends).ravel()
        order = np.argsort(-total, kind="stable")
        order = order[: np.count_nonzero(total > -np.inf)]
        if self.length < self._min_tokens:
            order = order[~ends[order]]
        self.length += 1
        last = self.length >= most
        best = order[:width]
        self._keep(best if last else best[ends[best]], ids, values, total, ends, history)
        going = order[~ends[order]][:width]
        if last or not going.size or self._over(total[going[0]]):
            return None
        idle = width - going.size
        if idle:
            going = np.concatenate([going, np.repeat(going[:1], idle)])
        parents, tokens = (going // ids.shape[1]).tolist(), ids.ravel()[going].tolist()
        self._marks = [self._mark(place, ids, values) for place in going.tolist()]
        self._scores = total[going]
        if idle:
            self._scores[-idle:] = -np.inf
        return parents, tokens

    def _keep(self, places: Column, ids: I32, values: Column, total: Column, ends: Column, history: Callable[[int], I32]) -> None:
        """These have ended: of all that have, the best stay."""
        for place in places.tolist():
            tokens = np.append(history(place // ids.shape[1]), ids.flat[place]).astype(np.int32)
            score = float(total[place]) / self.length**self.beam.length_penalty
            self.done.append(Hypothesis(score, tokens, bool(ends[place]), self._mark(place, ids, values)))
        self.done.sort(key=lambda one: -one.score)
        del self.done[self.beam.width :]

    def _mark(self, place: int, ids: I32, values: Column) -> Mark | None:
        if self._logprobs is None:
            return None
        beam, at = divmod(place, ids.shape[1])
        shown = [at, *range(min(self._logprobs, int(np.count_nonzero(values[beam] > -np.inf))))]
        return Mark(self._marks[beam], at + 1, ids[beam, shown], values[beam, shown])

    def _over(self, running: float) -> bool:
        """Is no better hypothesis likely than those that ended? `running` is the best beam's sum."""
        beam = self.beam
        if len(self.done) < beam.width:
            return False
        far = self._max_tokens if beam.early_stopping == "never" and beam.length_penalty > 0 else self.length
        return beam.early_stopping is True or not running / far**beam.length_penalty > self.done[-1].score


def marks_of(mark: Mark | None) -> list[Mark]:
    """A hypothesis' log-probabilities, the first token's first."""
    found: list[Mark] = []
    while mark is not None:
        found.append(mark)
        mark = mark.before
    return found[::-1]
