"""What a grammar may cost, tried before it is taken.

What it is: `affordable`, and `Trial`, which walks some way into a grammar as a model might, on to where the most may follow, and refuses one whose masks
take so long that others would wait for them.
What it does not know: backends, what a grammar is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from penstock.core.contract.grammars import Matcher
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import InvalidRequest
from penstock.plugins.grammars.bounds import mask_of

PREPARE_S = 0.2
"""CPU time that a grammar may take to be prepared, in which an engine makes no other masks."""
STEP_S = 0.08
"""The same for a mask."""
TRIED = 48
"""So many masks are tried."""


def affordable(what: str, took_s: float, most_s: float) -> None:
    """Raises InvalidRequest."""
    if took_s > most_s:
        raise InvalidRequest(f"It takes {took_s:.2f} seconds {what}, but may take {most_s:g}, in which others wait. Make it smaller.")


class Trial:
    """Of one vocabulary."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._words = -(-len(tokens) // 32)
        self._tokens = tokens
        self._going_on: tuple[I32, I32] | None = None

    def walk(self, matcher: Matcher, out: I32) -> None:
        """Through names, into values and out of them. `out` is the first mask. Raises InvalidRequest."""
        if self._going_on is None:
            on = [bool(token) and token[:1] not in b" \t\n\r}]" for token in self._tokens]
            self._going_on = mask_of(on, self._words), mask_of([token[:1] == b'"' for token in self._tokens], self._words)
        draw = random.Random(0)
        going_on, quote = self._going_on
        for step in range(TRIED):
            some = [out & going_on & quote, out & going_on, out] if step % 2 else [out & going_on, out]
            left = next((one for one in some if one.any()), None)
            if left is None:
                return
            token = draw.choice(np.flatnonzero(np.unpackbits(left.view(np.uint8), bitorder="little")).tolist())
            began = time.thread_time()
            if not matcher.consume(token):
                return
            matcher.mask(out)
            affordable("for a token", time.thread_time() - began, STEP_S)
