"""What sequences are in a draft model's own vocabulary: its tokens, its pages, and how far it has computed them.

What it is: `Contexts`. Another vocabulary makes another number of tokens of a text, so that neither positions nor pages can be the model's: each slot has a history, a row
of blocks and a pool of its own, all of one size for good. Only so much of a text is known as there is room for: when a row is full its later half stays
and is computed anew. What a sequence enters with is translated on the host; what is drawn afterwards where it lies.
`HostContexts` knows all numbers, and computes what is new. `DeviceContexts` knows bounds alone, since tokens are drawn and translated on the device: shapes are fixed, each row
translates the tokens that may have come and computes its last few places anew; where more may have come, since nobody asked for a while, it catches up first. Lengths come
back behind the steps, to say which row is about to be full.
What it does not know: the draft model, how drafts are made and verified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from penstock.core.protocol.columns import I32, Column, i32
from penstock.core.protocol.messages import Forward
from penstock.plugins.devices.lane import Event
from penstock.plugins.devices.rings import Download, Landing, Upload
from penstock.plugins.drafters.alignment import Alignment
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.drafters.chain import UPLOADS, Chain
from penstock.plugins.models.api import Columns

Tensor = torch.Tensor
Compute = Callable[[Columns], None]
AT_ONCE = 16
"""Tokens that the first step of a chain computes for a row on the host; what is more goes before, without logits."""


class Contexts:
    """Of `length` places each. `most`: the most drafts behind a token. `compute` runs the draft model over columns."""

    def __init__(self, parts: Parts, alignment: Alignment, chain: Chain, compute: Compute, length: int, most: int) -> None:
        device = parts.lane.device
        self._alignment, self._chain, self._compute = alignment, chain, compute
        self._length, self._most = length, most
        self._kept = length // 2
        blocks = -(-length // parts.block_size)
        self.table = torch.arange(parts.slots * blocks, dtype=torch.int32, device=device).view(parts.slots, blocks)
        self.history = torch.zeros(parts.slots + 1, length + 1, dtype=torch.int32, device=device)
        """With a row and a place more, for what is nobody's."""
        self._entered: I32 = np.zeros(parts.slots, np.int32)
        """The model's tokens that each sequence entered its slot with,"""
        self._read: I32 = np.zeros(parts.slots, np.int32)
        """the draft model's that they became,"""
        self._have: I32 = np.zeros(parts.slots, np.int32)
        """and how many of these are computed."""
        self._skipped: set[int] = set()
        """Slots that sequences enter of which nothing is to be known."""

    most_rows: int
    """That get drafts at once."""

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.history.nbytes

    def own(self, seen: Seen, proposal: Proposal | None = None) -> Seen:
        """The step as the draft model sees it."""
        return Seen(seen.work, (), None, None, self.history, self.table, proposal)

    def begin(self, work: Forward) -> None:
        """A step begins: sequences may enter slots."""
        at = 0
        slots, found = work.place_slots.tolist(), []
        for slot, count in zip(slots, work.place_counts.tolist(), strict=True):
            if slot in self._skipped:
                at += count
                continue
            tokens = self._alignment.context(i32(work.place_tokens[at : at + count]), 3 * self._length // 4, self._kept)
            at += count
            self._entered[slot], self._read[slot], self._have[slot] = count, tokens.size, 0
            found.append(tokens)
        entered = [slot for slot in slots if slot not in self._skipped]
        self._skipped.clear()
        if entered:
            self._enter(entered, found)

    def skip(self, slots: Column) -> None:
        """Sequences enter these slots of which nothing is to be known."""
        self._skipped.update(slots.tolist())

    def _enter(self, slots: list[int], contexts: list[I32]) -> None:
        raise NotImplementedError

    def follow(self, seen: Seen, proposal: Proposal) -> Tensor:
        """Drafts are to be made behind these rows: get ready -> where a chain of them begins."""
        raise NotImplementedError

    def last(self, seen: Seen, slots: Tensor, ends: Tensor) -> tuple[Columns, Tensor]:
        """What the first step of the chain computes, and which token rows are the last ones before `ends`."""
        raise NotImplementedError

    def positions(self, slots: Tensor, ends: Tensor) -> Tensor:
        """In the model's histories, for places of drafts."""
        raise NotImplementedError

    def drafted(self, proposal: Proposal, made: Column) -> None:
        """A chain of so many steps was computed."""
        raise NotImplementedError

    def read(self, seen: Seen) -> None:
        """Compute of the prompts in this step as much as the model has."""
        work = seen.work
        rows = np.arange(work.num_decode, len(work.slots))
        if seen.read is not None:
            rows = rows[seen.read[rows]]
        slots, ends = work.slots[rows], (work.starts + work.counts)[rows]
        entered, read = self._entered[slots], self._read[slots]
        goals = np.where(ends >= entered, read, read.astype(np.int64) * ends // np.maximum(entered, 1)).astype(np.int32)
        self._reach(seen, slots, goals)

    def _reach(self, seen: Seen, slots: Column, goals: Column) -> None:
        """Compute these slots' places up to the goals."""
        most = self._chain.max_tokens
        while True:
            left = np.flatnonzero(self._have[slots] < goals)
            if not left.size:
                return
            counts = np.minimum((goals - self._have[slots])[left], most)
            fits = max(1, int(np.searchsorted(np.cumsum(counts), most, side="right")))
            chosen, counts = slots[left[:fits]], i32(counts[:fits])
            self._compute(self._chain.ragged(self.own(seen), chosen, self._have[chosen], counts))
            self._have[chosen] += counts


class HostContexts(Contexts):
    """On a direct lane."""

    def __init__(self, parts: Parts, *rest: Any) -> None:
        super().__init__(parts, *rest)
        self.most_rows = parts.slots
        self._known: I32 = np.zeros(parts.slots, np.int32)
        """The model's tokens that are translated,"""
        self._ends: I32 = np.zeros(parts.slots, np.int32)
        """into so many,"""
        self._shift: I32 = np.zeros(parts.slots, np.int32)
        """and the first less the second, when drafts were made last."""

    def _enter(self, slots: list[int], contexts: list[I32]) -> None:
        history = self.history.numpy()
        for slot, tokens in zip(slots, contexts, strict=True):
            history[slot, : tokens.size] = tokens
            self._known[slot], self._ends[slot] = self._entered[slot], tokens.size

    def follow(self, seen: Seen, proposal: Proposal) -> Tensor:
        """Translate what came, and compute it but for the last places."""
        slots, ends = proposal.host_slots, proposal.ends.numpy()
        theirs = seen.history.numpy()
        for slot, end in zip(slots.tolist(), ends.tolist(), strict=True):
            if self._known[slot] < end:
                self._append(slot, self._alignment.translated(theirs[slot, self._known[slot] : end]))
                self._known[slot] = end
        mine = self._ends[slots]
        self._shift[slots] = ends - mine
        self._have[slots] = np.minimum(self._have[slots], mine - 1)
        far = self._have[slots] < mine - AT_ONCE
        if far.any():
            self._reach(seen, slots[far], i32(mine[far] - 1))
        return torch.from_numpy(mine)

    def _append(self, slot: int, tokens: I32) -> None:
        history = self.history.numpy()[slot]
        end = int(self._ends[slot])
        if end + tokens.size + self._most > self._length:
            lead = self._alignment.lead.size
            tokens = np.concatenate([history[lead:end], tokens])[-(self._kept - lead) :]
            self._have[slot] = end = lead
        # What was drafted and drawn is there, and computed.
        same = history[end : end + tokens.size] == tokens
        right = tokens.size if same.all() else int(same.argmin())
        self._have[slot] = min(int(self._have[slot]), end + right)
        history[end : end + tokens.size] = tokens
        self._ends[slot] = end + tokens.size

    def last(self, seen: Seen, slots: Tensor, ends: Tensor) -> tuple[Columns, Tensor]:
        """Columns of what is not computed."""
        at, firsts = slots.numpy(), self._have[slots.numpy()]
        counts = i32(ends.numpy() - firsts)
        columns = self._chain.ragged(self.own(seen), at, firsts, counts)
        return columns, torch.from_numpy(i32(np.cumsum(counts) - 1))

    def positions(self, slots: Tensor, ends: Tensor) -> Tensor:
        return torch.from_numpy(ends.numpy() + self._shift[slots.numpy()])

    def drafted(self, proposal: Proposal, made: Column) -> None:
        slots = proposal.host_slots
        self._have[slots] = np.where(made > 0, self._ends[slots] + made - 1, self._have[slots])


class DeviceContexts(Contexts):
    """On any other."""

    def __init__(self, parts: Parts, alignment: Alignment, chain: Chain, compute: Compute, length: int, most: int) -> None:
        super().__init__(parts, alignment, chain, compute, length, most)
        device, lane = parts.lane.device, parts.lane
        self._ops, self._size = parts.ops, parts.block_size
        room = self._alignment.room()
        self._width = room + 1
        """Places that a row computes anew: the last draft, if it was right, and what was drawn behind it."""
        pieces, counts = self._alignment.table(room)
        self._pieces, self._counts = torch.from_numpy(pieces).to(device), torch.from_numpy(counts).to(device)
        self._room = torch.arange(room, device=device)
        self._known, self._ends, self._shift = torch.zeros(3, parts.slots + 1, dtype=torch.int32, device=device).unbind()
        """The model's tokens that are translated; into so many; and the first less the second."""
        self._theirs = torch.zeros(parts.max_rows, dtype=torch.int32, device=device)
        """The ends of the model's histories: what a captured step begins with."""
        self._steps = torch.arange(parts.max_rows + 1, dtype=torch.int32, device=device) * self._width
        self.most_rows = max(1, min(parts.max_rows, parts.max_tokens // (2 * self._width)))  # a graph may have twice as many
        self._flat = 2 * parts.max_rows
        """So many tokens may be rows of their own, whose keys attention splits; more are rows of several tokens."""
        self._behind = torch.arange(-self._width, 0, dtype=torch.int32, device=device)
        self._lead = torch.from_numpy(self._alignment.lead.copy()).to(device)
        self._slack = self._most + 1
        """So much earlier than said a row may begin, if its step was planned before the one ahead had landed."""
        self._gap = max(8, 4 * self._slack)
        """The model's tokens that a row translates in a step."""
        self._upload = Upload(lane, UPLOADS, 4 * parts.slots)
        self._down = Download(lane, 2, parts.slots)
        self._told: tuple[Event, Landing, I32, I32] | None = None
        # Bounds of what the device knows.
        self._low: I32 = np.zeros(parts.slots, np.int32)
        """At least so many of the model's tokens are translated."""
        self._begun: I32 = np.zeros(parts.slots, np.int32)
        """Steps since drafts were made; 1: of what came only the last token is none of them."""
        self._incarnation: I32 = np.zeros(parts.slots, np.int32)
        self._told_length: I32 = np.zeros(parts.slots, np.int32)
        """So long they were when that was heard last."""
        self._margin = min(length // 4, max(length // 8, 2 * room * (self._most + 1)))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(one.nbytes for one in (self._pieces, self._counts, self._known, self._ends, self._shift, self._theirs))

    def begin(self, work: Forward) -> None:
        super().begin(work)
        self._begun[work.slots] += 1

    def _enter(self, slots: list[int], contexts: list[I32]) -> None:
        counts = [tokens.size for tokens in contexts]
        rows, columns = np.repeat(slots, counts), np.concatenate([np.arange(count) for count in counts])
        sent = self._upload.send(i32(slots), self._entered[slots], i32(counts), i32(rows), i32(columns), i32(np.concatenate(contexts)))
        at, entered, ends, row, column, tokens = sent
        self.history[row.long(), column.long()] = tokens
        self._known[at.long()], self._ends[at.long()] = entered, ends
        self._low[slots], self._begun[slots], self._told_length[slots] = self._entered[slots], 2, counts
        self._incarnation[slots] += 1

    def follow(self, seen: Seen, proposal: Proposal) -> Tensor:
        """Catch up with rows of which more may have come than a step translates and computes."""
        slots = proposal.host_slots
        self._reach(seen, slots, self._read[slots])  # of a shared prefix the model may have computed all but the last token
        most = (seen.work.starts + seen.work.counts)[proposal.rows] + 1
        came = np.maximum(most - self._low[slots], 1)
        news = np.where(self._begun[slots] == 1, 1, came)
        self._hear()
        long = self._told_length[slots]
        # Whatever a row had no room for was lost to it: it begins anew, as it does where more may have come than there is room for.
        most_long = long + (came + 2 * self._most + 2) * len(self._room)
        anew = (long >= self._length) | ((came > self._gap) & (most_long > self._length))
        full = ~anew & (long >= self._length - self._margin)
        late = np.flatnonzero((news > 1) | (came > self._gap) | full | anew)
        if late.size:
            at, ends = (column.clone() for column in self._upload.send(i32(slots[late]), i32(late)))  # the next ones will take their place
            ends = proposal.ends[ends.long()]
            if anew.any():
                self._renew(seen.history, slots, np.flatnonzero(anew), proposal.ends)
            rest = came[late][~anew[late]]
            if rest.size:
                self._translate(seen.history, at, ends, _rounded(int(rest.max())))
            if full.any():
                self._halve(self._upload.send(i32(slots[full]))[0].long())
            self._told_length[slots[full | anew]] = self._kept
            again = full.any() or anew.any()
            self._again(seen, at, self._length if again else min(self._length, int(news[late].max()) * len(self._room) + 1))
        low = np.maximum(self._low[slots] + 1, seen.work.starts[proposal.rows] + 2 - self._slack)
        self._low[slots] = np.where(proposal.rows < seen.work.num_decode, low, most)
        self._begun[slots] = 0 if proposal.sure else 1
        self._theirs[: len(slots)].copy_(proposal.ends)
        return torch.ones_like(proposal.ends)

    def _again(self, seen: Seen, slots: Tensor, span: int) -> None:
        """Compute the last `span` places of these rows."""
        own, rows = self.own(seen), len(slots)
        first = (self._ends[slots.long()] - span).clamp_min(0)
        step = max(1, self._chain.max_tokens // rows)
        for at in range(0, span, step):
            count = min(step, span - at)
            bounds = self._upload.send(i32(np.arange(rows + 1) * count))[0]
            starts = (first + at).clamp_max(self._length - count)
            self._compute(self._ops.ragged_inputs(slots, starts, bounds, own.history, own.table, self._size, rows * count, -1))

    def _renew(self, theirs: Tensor, slots: Column, rows: Column, ends: Tensor) -> None:
        """These rows know the last tokens alone."""
        at, chosen = (column.long() for column in self._upload.send(i32(slots[rows]), i32(rows)))
        count = max(1, self._kept // 2)
        self._known[at] = (ends[chosen] - count).clamp_min(0)
        self._ends[at] = len(self._lead)
        self.history[at, : len(self._lead)] = self._lead
        self._translate(theirs, at.int(), ends[chosen], count)

    def _halve(self, at: Tensor) -> None:
        lead = len(self._lead)
        ends = self._ends[at][:, None]
        places = (ends - self._kept + torch.arange(self._kept, device=ends.device)).clamp_min(0)
        kept = self.history[at[:, None], places.long()]
        kept[:, :lead] = self._lead
        self.history[at, : self._kept] = kept
        self._ends[at] = self._kept

    def _translate(self, theirs: Tensor, slots: Tensor, ends: Tensor, most: int) -> Tensor:
        """At most so many tokens more of each row -> where their contexts end."""
        at = slots.long()
        known, mine = self._known[at], self._ends[at]
        places = known[:, None] + torch.arange(most, dtype=torch.int32, device=slots.device)
        real = (places < ends[:, None]) & (slots >= 0)[:, None]
        tokens = theirs[at.clamp_min(0)[:, None], places.clamp(0, theirs.shape[1] - 1).long()].clamp_min(0).long()
        counts = torch.where(real, self._counts[tokens], 0)
        behind = counts.cumsum(1, dtype=torch.int32)
        columns = (mine[:, None] + behind - counts)[:, :, None] + self._room
        columns = torch.where((self._room < counts[:, :, None]) & (columns < self._length), columns, self._length)
        self.history[at[:, None, None].expand_as(columns), columns.long()] = self._pieces[tokens]
        known = torch.maximum(known, torch.minimum(known + most, ends))
        mine = (mine + behind[:, -1]).clamp_max(self._length)
        self._known[at], self._ends[at], self._shift[at] = known, mine, known - mine
        return mine

    def last(self, seen: Seen, slots: Tensor, ends: Tensor) -> tuple[Columns, Tensor]:
        """Translate what came; columns of the last places of each row. `slots` become -1 where a row is full, `ends` the contexts' ends."""
        rows = len(slots)
        ends.copy_(self._translate(seen.history, slots, self._theirs[:rows], self._gap))
        slots.masked_fill_((ends < 1) | (ends >= self._length), -1)
        if rows * self._width <= self._flat:
            starts = ends[:, None] + self._behind
            each = torch.where(starts < 0, -1, slots[:, None]).view(-1)
            columns = self._ops.decode_inputs(each, starts.clamp_min(0).view(-1), self.history, self.table, self._size)
            return columns, self._steps[1 : rows + 1] - 1
        starts = (ends - self._width).clamp_min(0)
        bounds = self._steps[: rows + 1]
        columns = self._ops.ragged_inputs(slots, starts, bounds, self.history, self.table, self._size, rows * self._width, -1)
        return columns, (bounds[:-1] + ends - 1 - starts).clamp_min(0)

    def positions(self, slots: Tensor, ends: Tensor) -> Tensor:
        return ends + self._shift[slots.long()]

    def drafted(self, proposal: Proposal, made: Column) -> None:
        """The lengths may come back."""
        if self._told is None:
            landing = self._down.take()
            landing.bring(self._ends[proposal.slots.long()])
            slots = proposal.host_slots.copy()
            self._told = landing.close(), landing, slots, self._incarnation[slots]

    def _hear(self) -> None:
        """How long rows were when that was asked."""
        if self._told is None or not self._told[0].query():
            return
        _, landing, slots, incarnations = self._told
        self._told = None
        same = self._incarnation[slots] == incarnations
        self._told_length[slots[same]] = landing.tokens()[same]


def _rounded(count: int) -> int:
    """Few shapes."""
    return 1 << max(0, count - 1).bit_length()
