"""The fake device's draws: which token follows which history.

What it is: `FakeDraws`, a deterministic function of the KV entry before a position, of seed and choice (unless greedy) and of the sampling settings
that a test may use; the check of drafts against it; what a mask allows; and the log-probabilities that are told.
What it does not know: rows that draw nothing, prompts, how columns are refereed (fake_slots.py, fake_device.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from penstock.core.contract.fake_slots import U64, FakeSlots, mix
from penstock.core.protocol.columns import f32, i32
from penstock.core.protocol.messages import LogprobColumns, Sample, SlotSampling

I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]
U8Array = npt.NDArray[np.uint8]
DraftKind = Literal["fair", "right", "wrong", "none", "short", "poor", "echo"]
"""How a drafter guesses: see FakeDraws."""
Script = Callable[[list[int], int], int | None]
"""(history, prompt length) -> the next token, or None for the hash's."""


def fall_of(digest: np.uint64) -> float:
    """By how much each of the likeliest tokens behind a history of that digest is less likely than the one before."""
    return 0.25 + int(mix(np.array([digest], np.uint64))[0] >> np.uint64(33)) % 16 / 8


def likeliest(token: int, top: int, fall: float, vocab: int, allowed: npt.NDArray[np.bool_] | None = None) -> tuple[list[int], list[float]]:
    """Log-probabilities behind a history: the drawn `token` first, then the `top` likeliest of the allowed ones (-inf where there are no more)."""
    order = [k for k in range(vocab if allowed is not None else top) if allowed is None or allowed[(token + k) % vocab]][:top]
    falls = [0, *order, *[0] * (top - len(order))]
    values = [-0.5 - k * fall for k in falls[: 1 + len(order)]] + [-float("inf")] * (top - len(order))
    return [(token + k) % vocab for k in falls], values


def columns_of(
    wanted: list[tuple[int, int, int, int]],
    vocab: int,
    falls: list[float] | None = None,
    allowed: dict[int, npt.NDArray[np.bool_]] | None = None,
) -> LogprobColumns | None:
    """Of each (row, position, token, top) that is wanted: see `likeliest`, with `falls` by place and `allowed` by row."""
    if not wanted:
        return None
    falls, allowed = falls or [1.0] * len(wanted), allowed or {}
    found = [likeliest(w[2], w[3], fall, vocab, allowed.get(w[0])) for w, fall in zip(wanted, falls, strict=True)]
    return LogprobColumns(
        rows=i32([w[0] for w in wanted]),
        positions=i32([w[1] for w in wanted]),
        counts=i32([1 + w[3] for w in wanted]),
        ranks=i32([1] * len(wanted)),
        ids=i32([id for ids, _ in found for id in ids]),
        values=f32([value for _, values in found for value in values]),
    )


class Mask:
    """What Sample.mask allows. `impossible`: rows for which that is nothing."""

    def __init__(self, work: Sample, vocab: int, need: Callable[[bool, str], None]) -> None:
        words = -(-vocab // 32)
        sizes = (len(work.rows), len(work.rows) * (1 + work.lookahead))
        need(len(work.mask_rows) in sizes and len(work.mask) % words == 0, "mask or mask_rows has a wrong size")
        need(bool((work.mask_rows < len(work.mask) // words).all()), "mask_rows names a row that mask does not have")
        bits = np.unpackbits(work.mask.view(np.uint8), bitorder="little").reshape(-1, words * 32)
        self._allowed = bits[:, :vocab].astype(np.bool_)
        ahead = len(work.mask_rows) // max(1, len(work.rows))
        self._rows = work.mask_rows.reshape(len(work.rows), ahead) if len(work.rows) else work.mask_rows.reshape(0, 1)
        first = self._rows[:, 0]
        masked = np.nonzero(first >= 0)[0]
        self.impossible: I32Array = i32(masked[~self._allowed[first[masked]].any(axis=1)])

    def drawn(self, i: int, ahead: int) -> bool:
        return self._row(i, ahead) > -2

    def _row(self, i: int, ahead: int) -> int:
        return int(self._rows[i, ahead]) if ahead < self._rows.shape[1] else -1

    def of(self, i: int, ahead: int = 0) -> npt.NDArray[np.bool_]:
        """Which tokens row `i` may draw behind so many drafts: a flag for each of the vocabulary."""
        row = self._row(i, ahead)
        allowed: npt.NDArray[np.bool_] = np.ones_like(self._allowed[0]) if row < 0 else self._allowed[row]
        return allowed

    def apply(self, tokens: I32Array, value: U64, rows: I64Array, ahead: int) -> None:
        """In place, to what `rows` draw; a row that may draw nothing keeps its token."""
        for i, row in enumerate(rows.tolist()):
            may = self.of(row, ahead)
            if not may[tokens[i]]:
                allowed = np.nonzero(may)[0]
                tokens[i] = allowed[int(value[i]) % len(allowed)] if len(allowed) else tokens[i]


class FakeDraws:
    """`kv` U64 [blocks, block_size] holds digests; `plain` says which slots have no settings that matter here; `mask` is for the next `draw`."""

    def __init__(self, slots: FakeSlots, kv: U64, vocab: int, *, eos: int, eos_every: int, script: Script | None) -> None:
        self._slots = slots
        self._kv = kv
        self._vocab = vocab
        self._eos, self._eos_every = eos, eos_every
        self._script = script
        self._salt = np.zeros(len(slots.length), np.uint64)
        self.plain = np.ones(len(slots.length), np.bool_)
        self.mask: Mask | None = None

    def place(self, state: SlotSampling) -> None:
        params = state.params
        self._slots.sampling[state.slot] = state
        salt = 0 if params.greedy else hash(((params.seed or 0) & (2**63 - 1), state.choice)) & (2**63 - 1) | 1
        self._salt[state.slot] = salt
        self.plain[state.slot] = (
            params.min_tokens == 0 and params.allowed_token_ids is None and params.logprobs is None and self._script is None
        )

    def draw(self, source: I64Array, into: I64Array, positions: I64Array, rows: I64Array | None = None, ahead: int = 0) -> I32Array:
        """The token at each of `positions`, from the KV of slot `source` before it, as slot `into` draws. For the mask: `rows` of the Sample (None: all), behind
        so many drafts."""
        # The last position's entry is read from the KV, as attention would: wrong KV, wrong token.
        last, size = positions - 1, self._kv.shape[1]
        block = self._slots.table[source, last // size]
        value = mix(self._kv[block, last % size] ^ self._salt[into])
        tokens = (value % np.uint64(self._vocab)).astype(np.int32)
        if self._eos_every:
            ends = (value >> np.uint64(40)) % np.uint64(self._eos_every) == 0
            tokens[ends] = self._eos
        if not self.plain[into].all():
            for i in np.nonzero(~self.plain[into])[0].tolist():
                tokens[i] = self._special(int(into[i]), int(positions[i]), int(value[i]), int(tokens[i]))
        if self.mask is not None:
            self.mask.apply(tokens, value, np.arange(len(into)) if rows is None else rows, ahead)
        return tokens

    def verify(self, source: I64Array, into: I64Array, positions: I64Array, last: I64Array) -> tuple[I32Array, I32Array]:
        """Draw for each row at `positions`, and at the next as long as what stands there is what was drawn, up to `last`; the tokens go into the
        histories. Tokens as CSR, and how many each row has."""
        rows = np.arange(len(into))
        counts = np.zeros(len(into), np.int32)
        tokens = np.zeros((len(into), 1 + int((last - positions).max(initial=0))), np.int32)
        for k in range(tokens.shape[1]):
            if k and self.mask is not None:
                rows = rows[[self.mask.drawn(row, k) for row in rows.tolist()]]
            at, slots = positions[rows] + k, into[rows]
            there = self._slots.history[slots, np.minimum(at, self._slots.history.shape[1] - 1)]
            tokens[rows, k] = drawn = self.draw(source[rows], slots, at, rows, k)
            counts[rows] += 1
            rows = rows[(drawn == there) & (at < last[rows])]
        for k in range(tokens.shape[1]):
            rows = np.nonzero(counts > k)[0]
            self._slots.append(into[rows], positions[rows] + k, tokens[rows, k])
        return tokens[np.arange(tokens.shape[1]) < counts[:, None]], counts

    def drafts(self, into: I64Array, count: int, bits: int, kinds: Sequence[DraftKind], reads: Sequence[int]) -> tuple[I32Array, U8Array]:
        """Up to `count` drafts behind each of these slots' histories, by the first drafter of those in `bits` that has any: them, and whose they are."""
        out = np.full((len(into), count), -1, np.int32)
        whose = np.zeros(len(into), np.uint8)
        for number, kind in enumerate(kinds):
            left = np.nonzero((out[:, 0] < 0) & ~(self._slots.unread[into] & (reads[number] > 0)))[0]
            if not bits >> number & 1 or kind == "none" or not len(left):
                continue
            slots = into[left]
            most = np.full(len(left), count, np.int64)
            if kind == "short":
                most = (self._slots.digest[slots, self._slots.length[slots] - 1] >> np.uint64(7)).astype(np.int64) % (count + 1)
            found = self._slots.draft(slots, most, functools.partial(self._guess, kind))
            out[left, : found.shape[1]] = found
            whose[left[found[:, :1].max(axis=1, initial=-1) >= 0]] = number
        return out.reshape(-1), whose

    def _guess(self, kind: DraftKind, digest: U64, slots: I64Array) -> I32Array:
        """The token behind a history of that digest. What a draw without settings brings: of three guesses two ("fair", "short"), all ("right"), none ("wrong")
        or of five one ("poor"). "echo" says the last token again."""
        if kind == "echo":
            last: I32Array = self._slots.history[slots, self._slots.length[slots] - 1]
            return last
        value = mix(digest ^ self._salt[slots])
        chance = (value >> np.uint64(20)) % np.uint64(15)
        wrong = (chance % np.uint64(5) > 0 if kind == "poor" else chance % np.uint64(3) == 0).astype(np.uint64)
        if kind in ("right", "wrong"):
            wrong[:] = kind == "wrong"
        token: I32Array = ((value % np.uint64(self._vocab) + wrong) % np.uint64(self._vocab)).astype(np.int32)
        return token

    def _special(self, slot: int, position: int, value: int, token: int) -> int:
        state = self._slots.sampling[slot]
        assert state is not None
        if self._script is not None:
            said = self._script(self._slots.history[slot, :position].tolist(), state.prompt_len)
            token = token if said is None else said
        allowed = state.params.allowed_token_ids
        if allowed is not None and token not in allowed:
            token = allowed[value % len(allowed)]
        if position - state.prompt_len < state.params.min_tokens:
            stops = set(state.stop_ids.tolist())
            while token in stops:
                token = (token + 1) % self._vocab
        return token
