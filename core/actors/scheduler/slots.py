"""Running sequences as columns, one row per device slot.

What it is: `Slots`, the struct of arrays that the scheduler plans over, and `Rows`, what a step needs of the sequences that sample in it,
gathered once and reused as long as the same sequences run.
What it does not know: why a sequence enters or leaves, messages, blocks' ids.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from penstock.core.actors.scheduler.waiting import Sequence
from penstock.core.protocol.columns import EMPTY_I32, I32, I64, U8, Column

FREE, PREFILL, DECODE, LEAVING, ENDED = 0, 1, 2, 3, 4
"""Phases of a slot. LEAVING: preempted, waits for its last step in flight (whose token counts). ENDED: the same, but tokens are dropped."""

MANY = 1 << 30
SOME = 16
"""From so many slots on a slice is faster than their numbers."""

Index = npt.NDArray[np.intp]
I8 = npt.NDArray[np.int8]
Commit = tuple[int, int, I32]
"""seq, computed length, tokens of the new blocks whose hashes KV does not have."""


class Rows:
    """The columns of sequences that sample together. `starts` are the positions that they compute next, as far as that is known the last that it can be;
    `left` is how many tokens they can all get before one may reach its limit. `stops` is (ids, rows), padded with -1."""

    __slots__ = (
        *("ahead", "at", "base", "counts", "incarnations", "index", "left", "mins", "most", "ones", "prompts", "seqs", "slots", "starts"),
        *("stops", "tokens", "_table"),
    )

    slots: I32
    index: Index
    """The slots again, in numpy's index type: three times faster to index with."""
    at: Index | slice
    """The same to write with, and to read what is not kept: a slice where many lie side by side, three times faster again."""
    base: I64
    """Where each slot's history begins in `Slots.flat`."""
    starts: I32
    counts: I32
    """Tokens that each computes in a step: one, and drafts with a lookahead. Never written to, and so are the next two."""
    ahead: I32
    """Only the drafts, where any has some."""
    ones: I32
    most: int
    """The most drafts that any has."""
    tokens: int
    """All that they compute."""
    seqs: I64
    incarnations: I32
    prompts: I32
    mins: I32
    stops: I32
    left: int
    _table: I64 | None

    def table(self) -> I64:
        """For each what its tokens need, in a line of four numbers, so that they can be repeated in one go: one that is free; the seq; as pairs of I32 one that is free
        and the incarnation, the first stop and the second."""
        if self._table is None:
            self._table = np.full((self.slots.size, 4), -1, np.int64)
            pairs = self._table.view(np.int32)
            self._table[:, 1], pairs[:, 5] = self.seqs, self.incarnations
            for number, stops in enumerate(self.stops[:2]):
                pairs[:, 6 + number] = stops
        return self._table

    def widen(self, ahead: I32) -> None:
        """With so many drafts a row."""
        self.ahead = ahead
        self.counts = ahead + self.ones
        self.most = int(ahead.max(initial=0))
        self.tokens = int(self.counts.sum())

    def select(self, kept: Column) -> Rows:
        """Only the rows `kept` (which may name one several times); `left` and `tokens` stay bounds."""
        rows = Rows()
        for name in ("slots", "index", "base", "starts", "counts", "ahead", "ones", "seqs", "incarnations", "prompts", "mins"):
            setattr(rows, name, getattr(self, name)[kept])
        rows.at, rows._table = rows.index, None
        rows.stops = self.stops[:, kept]
        rows.left, rows.most = self.left, self.most
        rows.tokens = self.tokens
        return rows

    def narrow(self) -> None:
        """Without drafts: one token a row."""
        self.counts = self.ahead = self.ones
        self.tokens, self.most = self.slots.size, 0


class Slots:
    """`count` slots for sequences of at most `longest` tokens, in blocks of `block` tokens. Columns are I32 over slots unless said."""

    def __init__(self, count: int, longest: int, block: int) -> None:
        def column() -> I32:
            return np.zeros(count, np.int32)

        self.count = count
        self.block = block
        self.phase: U8 = np.zeros(count, np.uint8)
        self.seq: I64 = np.zeros(count, np.int64)
        self.incarnation = column()
        self.prompt = column()
        self.computed = column()
        """Positions whose Forward was given to the device: with drafts in flight at most so many, corrected when they land."""
        self.length = column()
        """Tokens, those being drawn included; so, too."""
        self.known = column()
        """Tokens whose values are known here: history[slot, :known]."""
        self.limit = column()
        self.capacity = column()
        """Tokens for which blocks are held."""
        self.hashed = column()
        """Blocks committed to the prefix cache."""
        self.given = column()
        """Blocks whose hashes KV got with the look-up."""
        self.last_step: I64 = np.zeros(count, np.int64)
        self.min_tokens = column()
        self.parked = np.zeros(count, bool)
        self.solo = np.zeros(count, bool)
        """Not planned while a step in flight names it: how far that step brings it is known only when it has landed."""
        self.grammar = np.zeros(count, bool)
        """Draws under a mask."""
        self.wish: I8 = np.zeros(count, np.int8)
        """Drafts: 1 whatever they cost, -1 never."""
        self.itl_ns: I64 = np.zeros(count, np.int64)
        """What a step that it decodes in should take at most; 0: it has no goal of its own."""
        self.any_itl = False
        self.wide = False
        """Whether any row of the step being planned computes drafts along."""
        self._ahead = column()
        """How many, if so: but for the rows of `_widened`, of which only they know."""
        self._widened: Rows | None = None
        self.drafted = column()
        """Drafts that stand behind the last token; while a step is in flight that makes them anew, as many as there were before. All 0 unless
        `any_drafted`."""
        self.any_drafted = False
        self.beyond = 0
        """Of the step being planned: tokens behind it for which blocks are wanted, too, so that drafters have somewhere to compute."""
        self.drafter: U8 = np.zeros(count, np.uint8)
        """Whose they are."""
        self.shown = column()
        """Tokens that drafters on the host know of; 0: nothing of the sequence."""
        self.drafts_seen = column()
        """Of the sequence, so far: drafts that were verified."""
        self.drafts_right = column()
        """Of these, the right ones."""
        self.unread = np.zeros(count, bool)
        """Drafters that read sequences do not look at it: see attendance.py."""
        self.num_unread = 0
        """How many of them."""
        self.poisoned = np.zeros(count, bool)
        """Its logits were not numbers: its KV must not be shared."""
        self.stops: I32 = np.full((1, count), -1, np.int32)
        self.stop_count = column()
        self.history: I32 = np.zeros((count, longest), np.int32)
        self.flat: I32 = self.history.reshape(-1)
        self.holder: list[Sequence | None] = [None] * count
        self.free = list(range(count))
        self._base: I64 = np.arange(count, dtype=np.int64) * longest
        self._same: dict[int, I32] = {}
        self._round: tuple[I32, I32] | None = None
        """Where the size of a block is a power of two: what is added, and the bits that are kept."""
        if block & (block - 1) == 0:
            self._round = np.full(count, block - 1, np.int32), np.full(count, -block, np.int32)

    def same(self, value: int, size: int) -> I32:
        """So many times the same number, in a column that nobody writes to: cheaper to compute with than the number."""
        column = self._same.get(value)
        if column is None:
            column = self._same[value] = np.full(self.count, value, np.int32)
            column.flags.writeable = False
        return column[:size]

    def enter(self, sequence: Sequence, tokens: I32, computed: int, phase: int) -> int:
        """The lowest free slot, now with this sequence and its history."""
        slot = heapq.heappop(self.free)
        request = sequence.request
        sequence.slot = slot
        self.holder[slot] = sequence
        self.phase[slot] = phase
        self.seq[slot] = sequence.seq
        self.incarnation[slot] = request.incarnation
        self.prompt[slot] = request.prompt_len
        self.history[slot, : tokens.size] = tokens
        self.known[slot] = self.length[slot] = tokens.size
        self.computed[slot] = computed
        self.limit[slot] = request.limit
        self.min_tokens[slot] = request.params.min_tokens
        self.parked[slot] = request.parked
        self.solo[slot] = request.group is not None
        self.grammar[slot] = request.grammar
        self.wish[slot] = request.wish
        self.itl_ns[slot] = request.itl_ns
        self.any_itl = self.any_itl or request.itl_ns > 0
        self.shown[slot] = self.drafted[slot] = 0
        if self.wide:
            self._aheads()[slot] = 0
        self.drafts_seen[slot], self.drafts_right[slot] = sequence.drafts
        stops = request.stop_ids
        if len(stops) > self.stops.shape[0]:
            more = np.full((len(stops) - self.stops.shape[0], self.count), -1, np.int32)
            self.stops = np.concatenate([self.stops, more])
        self.stop_count[slot] = len(stops)
        self.stops[:, slot] = -1
        self.stops[: len(stops), slot] = stops
        return slot

    def leave(self, slot: int) -> None:
        sequence = self.holder[slot]
        if sequence is not None:
            sequence.slot = -1
        self.holder[slot] = None
        self.phase[slot] = FREE
        if self.num_unread:
            self.num_unread -= int(self.unread[slot])
            self.unread[slot] = False
        for column in (self.computed, self.length, self.known, self.limit, self.capacity, self.hashed, self.given):
            column[slot] = 0
        self.parked[slot] = self.poisoned[slot] = self.solo[slot] = self.grammar[slot] = False
        heapq.heappush(self.free, slot)

    def outputs(self, slot: int) -> I32:
        """A copy of the tokens received so far."""
        return self.history[slot, self.prompt[slot] : self.known[slot]].copy()

    def whole(self, tokens: int) -> int:
        """The capacity of the blocks that hold so many tokens."""
        return -(-tokens // self.block) * self.block

    def hold(self, index: Index, tokens: I32) -> None:
        """They have blocks for so many tokens."""
        if self._round is not None:
            add, keep = self._round
            self.capacity[index] = (tokens + add[: tokens.size]) & keep[: tokens.size]
        else:
            self.capacity[index] = -(-tokens // self.block) * self.block

    def gather(self, slots: I32, ascending: bool = False) -> Rows:
        rows = Rows()
        rows.slots = slots
        rows.index = rows.at = index = slots.astype(np.intp)
        if ascending and index.size >= SOME and (first := index.item(0)) + index.size == (behind := index.item(-1) + 1):
            rows.at = slice(first, behind)
        rows.base = self._base[index]
        rows.starts = self.computed[index]
        rows.seqs = self.seq[index]
        rows.incarnations = self.incarnation[index]
        rows.prompts = self.prompt[index]
        rows.mins = self.min_tokens[index]
        rows.stops = self.stops[: int(self.stop_count[index].max(initial=0)), index]
        rows._table = None
        rows.left = self.left(index)
        rows.ones = self.same(1, slots.size)
        rows.narrow()
        if self.wide:
            rows.widen(self._aheads()[index])
        return rows

    def left(self, index: Index) -> int:
        """See Rows."""
        return int((self.limit[index] - self.length[index]).min(initial=MANY))

    def goal(self, index: Index) -> int:
        """The strictest that these have of their own, in ns; 0: none has."""
        if not self.any_itl:
            return 0
        goals = self.itl_ns[index]
        goals = goals[goals > 0]
        return int(goals.min()) if goals.size else 0

    def narrow(self, rows: Rows | None) -> None:
        """These rows have no drafts in the step being planned, and nobody else has a row."""
        if self.wide:
            if rows is not None:
                rows.narrow()
            self.wide, self._widened = False, None

    def widen(self, rows: Rows, ahead: I32) -> None:
        """In the step being planned they have so many drafts each."""
        rows.widen(ahead)
        self.wide, self._widened = rows.most > 0, rows

    def widen_alike(self, rows: Rows, each: int) -> None:
        """The same, if all have as many."""
        size = rows.slots.size
        if self._widened is rows and rows.most == each and rows.tokens == size * (1 + each):
            return  # as in the step before
        rows.ahead, rows.counts = self.same(each, size), self.same(1 + each, size)
        rows.tokens, rows.most = size * (1 + each), each
        self.wide, self._widened = True, rows

    def _aheads(self) -> I32:
        """Drafts of each slot in the step being planned, which is wide."""
        if self._widened is not None:
            self._ahead[:] = 0
            self._ahead[self._widened.index] = self._widened.ahead
            self._widened = None
        return self._ahead

    def reach(self, index: Index) -> I32:
        """Where the next step of decoding slots ends: tokens for which it needs blocks; with room for drafts behind it, as far as a sequence may go."""
        reach: I32 = self.computed[index] + np.int32(1)
        if self.wide:
            reach += self._aheads()[index]
        return self._with_room(reach, index, self.beyond) if self.beyond else reach

    def _with_room(self, reach: I32, index: Index, beyond: int) -> I32:
        found: I32 = np.maximum(reach, np.minimum(reach + np.int32(beyond), self.limit[index]))
        return found

    def short(self, rows: Rows, early: int = 0) -> tuple[Index, I32]:
        """Those whose next position has no block yet, and where the next step of each ends, as `reach` says; or with so many tokens more."""
        if not (self.wide or self.beyond or early):
            at = (self.capacity[rows.at] <= rows.starts).nonzero()[0]
            return (rows.index[at], rows.starts[at] + rows.ones[: at.size]) if at.size else (at, EMPTY_I32)
        index = rows.index
        beyond = self.beyond + early
        each = 1 + rows.most + beyond
        if rows.left >= each and rows.tokens == index.size * (1 + rows.most):  # nobody comes to a limit, and all are alike
            reach = rows.starts + self.same(each, index.size)
        else:
            reach = rows.starts + rows.counts
            if beyond:
                reach = self._with_room(reach, index, beyond)
        at = (self.capacity[rows.at] < reach).nonzero()[0]
        return index[at], reach[at]

    def incomplete(self) -> list[int]:
        """Slots with full blocks that were not committed, as far as can be said without looking closer."""
        found: list[int] = np.flatnonzero(self.computed // self.block > self.hashed).tolist()
        return found

    def complete(self, slot: int) -> Commit | None:
        """Its blocks that are computed (or given to the device), of known tokens and not committed yet: marks them."""
        valid = min(self.computed.item(slot), self.known.item(slot))
        full, hashed = valid // self.block, self.hashed.item(slot)
        if full <= hashed or self.capacity.item(slot) == 0 or self.poisoned.item(slot):
            return None
        first = max(hashed, self.given.item(slot))
        self.hashed[slot] = full
        return self.seq.item(slot), valid, self.history[slot, first * self.block : full * self.block].copy()
