"""The fake device's pooled vectors: one for each prompt that asks.

What it is: `FakePool`. A position's hidden state is made of its KV entry, that is of all tokens up to it; a vector is the last one, the first one, or
the mean of all, whatever parts the prompt was computed in.
What it does not know: draws, histories' contents, what the vectors are for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from penstock.core.contract.fake_slots import U64, FakeSlots, mix
from penstock.core.protocol.columns import F32, I32, f32, i32
from penstock.core.protocol.messages import POOL_FIRST, POOL_LAST, Sample


class FakePool:
    """`kv` U64 [blocks, block_size] holds digests; `kinds` are those that are served; `need(ok, what)` raises FakeViolation."""

    def __init__(self, slots: FakeSlots, kv: U64, hidden: int, kinds: tuple[int, ...], need: Callable[[bool, str], None]) -> None:
        self._slots, self._kv, self._hidden, self._kinds, self._need = slots, kv, hidden, kinds, need

    def of(self, work: Sample, slots: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> tuple[F32, I32]:
        """StepDone.pooled and pooled_counts; `slots` and `ends` are the Forward rows'. Nothing has been drawn in this step yet."""
        rows, kinds = work.pool_rows.tolist(), work.pool_kinds.tolist()
        self._need(len(rows) == len(kinds), "pool_rows and pool_kinds differ in length")
        self._need(all(0 <= row < len(slots) for row in rows), "pool_rows names a row that was not computed")
        self._need(set(kinds) <= set(self._kinds), f"a kind of pooling is asked for beyond {self._kinds}")
        done = [bool(ends[row] == self._slots.length[slots[row]]) for row in rows]
        vectors = [self._vector(int(slots[row]), int(ends[row]), kind) for row, kind, all_ in zip(rows, kinds, done, strict=True) if all_]
        return f32(np.concatenate(vectors) if vectors else []), i32([self._hidden * all_ for all_ in done])

    def _vector(self, slot: int, end: int, kind: int) -> npt.NDArray[np.float64]:
        at = np.array([0] if kind == POOL_FIRST else [end - 1] if kind == POOL_LAST else range(end), np.int64)
        size = self._kv.shape[1]
        entries = self._kv[self._slots.table[slot, at // size], at % size]
        numbers = mix(entries[:, None] + np.arange(self._hidden, dtype=np.uint64)) >> np.uint64(40)
        mean: npt.NDArray[np.float64] = (numbers / 2.0**23 - 1).mean(axis=0)
        return mean
