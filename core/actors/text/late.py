"""Answers that are over here and not yet in the engine.

What it is: `Late`, of one engine: spans that wait for its last word. Text ends an answer at a stop string, or because its client left; what became of its drafts the
engine says with the row that answers the Abort, or with the end that crossed it. Until then the request's spans wait, at most WAIT_S.
What it does not know: what spans say, why an answer ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from penstock.core.actors.text.ledger import Request
from penstock.core.protocol.messages import StepTokens

WAIT_S = 2.0
"""An engine that says nothing for so long, says nothing of it any more."""


class _Waiting(NamedTuple):
    request: Request
    seqs: set[int]
    record: Callable[[], None]
    until_ns: int


class Late:
    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        """By seq."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def wait(self, request: Request, seqs: set[int], record: Callable[[], None], now_ns: int) -> None:
        """`record` once the engine has told of these, its last ones."""
        one = _Waiting(request, seqs, record, now_ns + round(WAIT_S * 1e9))
        self._waiting.update(dict.fromkeys(seqs, one))

    def figures(self, message: StepTokens) -> None:
        """Of those that waited before this step."""
        for seq, drafted, accepted in zip(message.drafted_seqs.tolist(), message.drafted.tolist(), message.accepted.tolist(), strict=True):
            one = self._waiting.get(seq)
            if one is not None:
                one.request.drafted += drafted
                one.request.accepted += accepted

    def ended(self, message: StepTokens) -> None:
        """Nothing more comes of these."""
        for seq in message.seqs[np.flatnonzero(message.reasons)].tolist():
            one = self._waiting.pop(seq, None)
            if one is not None:
                one.seqs.discard(seq)
                if not one.seqs:
                    one.record()

    def over(self, now_ns: int | None = None) -> None:
        """Nothing more is said (None), or not of those that waited for long enough."""
        for one in {id(one): one for one in self._waiting.values()}.values():
            if now_ns is None or now_ns >= one.until_ns:
                for seq in one.seqs:
                    self._waiting.pop(seq, None)
                one.record()
