"""A grammar backend of few words for tests of the machinery: so many tokens out of a range, then the end."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from penstock.core.contract.hookspecs import GrammarSpec, hookimpl
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import InvalidRequest


class Place:
    def __init__(self, low: int, high: int, length: int) -> None:
        self.low, self.high, self.left = low, high, length

    def consume(self, token: int) -> bool:
        self.left -= 1
        return self.left >= 0 and self.low <= token < self.high

    def mask(self, out: I32) -> None:
        if self.low == 13:
            raise RuntimeError("thirteen")
        if self.low == 17:
            raise InvalidRequest("It is seventeen.")
        bits = np.zeros(len(out) * 32, np.uint8)
        if self.left:
            bits[self.low : self.high] = 1
        out[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def may_end(self) -> bool:
        return self.left == 0


class Ranges:
    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.size = len(tokens)

    def compile(self, kind: str, source: str) -> bytes:
        if kind != "regex":
            raise InvalidRequest("Only ranges are known.")
        return source.encode()

    def matcher(self, compiled: bytes) -> Place:
        return Place(*json.loads(compiled))


class RangesTogether(Ranges):
    """See Together. Whoever's grammar is broken fails alone."""

    def masks(self, matchers: Sequence[Place], out: I32) -> dict[int, Exception]:
        failed: dict[int, Exception] = {}
        for at, matcher in enumerate(matchers):
            try:
                matcher.mask(out[at])
            except Exception as error:
                failed[at] = error
        return failed


@hookimpl
def register_grammars() -> list[GrammarSpec]:
    return [GrammarSpec(name="ranges", api_level=1, kinds=["regex"], factory=Ranges, priority=9)]
