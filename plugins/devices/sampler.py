"""Sampling state of the slots on the device, and the draw of one step.

What it is: settings are columns on the device, indexed by slot, so that the work per step does not grow with Python and no value is looked at; the host keeps
only what decides which kernels to launch (is a row hot, does it count, does it have lists). Counts for penalties are a pool whose rows are only
taken by slots that ask. Settings that are lists go up as one set of columns a step (lists.py), for the rows that have them. Order of a row's changes: penalties,
bias, bans and minimum length, allowed tokens, bad words, the step's mask; then temperature and filters. Log-probabilities come from the raw logits.
What it does not know: the model, blocks, which request a slot serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.protocol.columns import EMPTY_U8, I32, Column, i32
from penstock.core.protocol.messages import LogprobColumns, SlotSampling
from penstock.kernels.sampling import torch as portable
from penstock.plugins.devices.lists import Entries, SlotLists
from penstock.plugins.devices.ops import Ahead, DeviceOps, Settings
from penstock.plugins.devices.rings import Landing, Upload

Tensor = torch.Tensor
PENALTY, LISTS, MINIMUM, LOGPROBS, HOT, BEAM = 1, 2, 4, 8, 16, 32
ADJUSTED = PENALTY | LISTS | MINIMUM
"""Bits of `flags`: needs counts; has bias, allowed tokens or bad words; has stop ids masked until min_tokens; wants log-probabilities; is not
greedy; is a beam, whose likeliest tokens are those of its masks. No bit set: the largest logit, and nothing else."""

WORD_SIZES = (4, 8)
"""Bad words up to so many tokens have kernels from the start."""
WORDS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence", "top_k", "choices")


@dataclass(frozen=True)
class Wanted:
    """Log-probabilities on their way to the host: indices of ids, values and ranks in the landing, and the host's half of the columns."""

    ids: int
    values: int
    ranks: int
    rows: I32
    positions: I32
    wants: I32
    width: int

    def columns(self, landing: Landing, named: I32 | None = None) -> LogprobColumns:
        """After the landing's event. `named`: what each row is called, -1 for one that is left out after all."""
        count = len(self.rows)
        counts = (self.wants + 1).astype(np.int32)
        kept = np.arange(self.width)[None] < counts[:, None]
        rows = self.rows if named is None else named[self.rows]
        left = rows >= 0
        kept &= left[:, None]
        return LogprobColumns(
            rows=rows[left],
            positions=self.positions[left],
            counts=counts[left],
            ranks=landing.more(self.ranks, np.int32)[left].copy(),
            ids=landing.more(self.ids, np.int32).reshape(count, self.width)[kept],
            values=landing.more(self.values, np.float32).reshape(count, self.width)[kept],
        )


class SlotSampler:
    """`history` [slots, max_len + 1] int32 is the runner's, on the device."""

    def __init__(
        self,
        ops: DeviceOps,
        slots: int,
        vocab: int,
        history: Tensor,
        upload: Upload,
        columns: Upload,
        masks: Upload,
        to_device: Callable[[Column], Tensor],
        *,
        deterministic: bool = False,
        direct: bool = False,
        slack: int = 0,
    ) -> None:
        """`upload` is for what places and penalties bring, `columns` for lists, `masks` for a step's masks: one copy of each a step. `deterministic`: a reduction over the vocabulary is done row by row, since torch cuts it differently for other numbers of rows.
        `direct`: the history is in the host's memory, and complete whenever `sample` is called. `slack`: loose positions are at most so much too high."""
        device = history.device
        self._ops = ops
        self._vocab = vocab
        self._history = history
        self._here = history.numpy() if direct else None
        self._upload = upload
        self._columns = columns
        self._masks = masks
        self._to_device = to_device
        self._alone = deterministic
        self._slack = slack
        self._words = torch.zeros(len(WORDS), slots, dtype=torch.int32, device=device)
        self._seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        floats = {name: self._words[index].view(torch.float32) for index, name in enumerate(WORDS[:6])}
        self.settings = Settings(seeds=self._seeds, top_k=self._words[6], choices=self._words[7], **floats)
        self._counts = torch.zeros(0, vocab, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab, dtype=torch.bool, device=device)
        self._pool_row: I32 = np.full(slots, -1, np.int32)
        self._free_rows: list[int] = []
        self._flags: I32 = np.zeros(slots, np.int32)
        self._logprobs: I32 = np.full(slots, -1, np.int32)
        self.prompt_len: I32 = np.zeros(slots, np.int32)
        self._lists: dict[int, SlotLists] = {}
        self._unsettled: Tensor | None = None
        """Which row of the counts each row of the last `sample` has, where those are not counted yet."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in (self._words, self._seeds, self._counts, self._in_prompt))

    def place(self, places: Sequence[SlotSampling]) -> None:
        """Sequences enter slots; what was there before is forgotten. One copy for all of them."""
        count = len(places)
        floats = np.empty((6, count), np.float32)
        integers = np.empty((2, count), np.int32)
        seeds = np.empty(count, np.int64)
        slots = i32([place.slot for place in places])
        for at, place in enumerate(places):
            slot, params = place.slot, place.params
            floats[:, at] = (
                0.0 if params.greedy else params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
            integers[:, at] = min(max(0, params.top_k), self._vocab), place.choice
            seeds[at] = params.seed or 0
            flags = 0
            if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
                flags |= PENALTY
            self._lists.pop(slot, None)
            masks_stops = params.min_tokens > 0 and len(place.stop_ids) > 0
            if params.logit_bias or params.allowed_token_ids is not None or params.bad_words_token_ids:
                flags |= LISTS
            if masks_stops:
                flags |= MINIMUM
            if flags & (LISTS | MINIMUM):
                self._lists[slot] = SlotLists(place, self._vocab, looked_up=self._here is not None)
            if not params.greedy:
                flags |= HOT
            if params.logprobs is not None:
                flags |= LOGPROBS if params.beam is None else LOGPROBS | BEAM
            self._flags[slot] = flags
            if self._pool_row[slot] >= 0:
                self._free_rows.append(int(self._pool_row[slot]))
                self._pool_row[slot] = -1
            self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
            self.prompt_len[slot] = place.prompt_len
        sent = self._upload.send(seeds.view(np.int32), floats.view(np.int32).ravel(), integers.ravel(), slots)
        where = sent[3].long()
        self._seeds.index_copy_(0, where, sent[0].view(torch.int64))
        words = torch.cat([sent[1].view(6, count), sent[2].view(2, count)])
        self._words.index_copy_(1, where, words)

    def plain(self, slots: Column) -> bool:
        """Nobody among these slots needs more than a draw by temperature and filters: a graph can do it."""
        return not (self._flags[slots] & ~HOT).any()

    def hot(self, slots: Column) -> bool:
        """Somebody is not greedy."""
        return bool((self._flags[slots] & HOT).any())

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, hot: bool) -> Tensor:
        """Tokens [R] int32 of plain rows, -1 for a bad one."""
        return self._ops.draw(logits, self.settings, slots, positions) if hot else self._ops.greedy(logits)

    def sample(
        self,
        logits: Tensor,
        slots: Column,
        positions: Column,
        at: Tensor,
        where: Tensor,
        landing: Landing,
        mask: tuple[Column, Column] | None = None,
        ahead: Column | None = None,
        loose: Column = EMPTY_U8,
    ) -> tuple[Tensor, Wanted | None]:
        """logits [R, V] float32 (overwritten); `at` and `where` are slots and positions on the device; `mask` is Sample's mask and mask_rows -> (tokens [R],
        log-probabilities). `ahead`: so many tokens before each position are drafts; such rows come behind one of the same slot without. Nothing is
        counted then before `settle`. `loose`: rows of which `positions` are only the last that they can be."""
        flags = self._flags[slots]
        self._unsettled = None
        if mask is None and not flags.any():
            return self._ops.greedy(logits), None
        rows: I32 = np.flatnonzero(flags & LOGPROBS).astype(np.int32)
        raw = None
        if rows.size:
            raw = logits.clone() if rows.size == len(slots) else logits.index_select(0, self._to_device(rows))
        counted = None
        if (flags & ADJUSTED).any():
            counted = self._adjust(logits, slots, positions, at, where, flags, ahead, loose)
        if mask is not None:
            words, mask_rows = self._masks.send(*mask)
            self._ops.mask(logits, words.view(-1, -(-self._vocab // 32)), mask_rows)
        shown = raw
        if raw is not None and mask is not None and (searching := np.flatnonzero(flags[rows] & BEAM)).size:
            masked = logits.index_select(0, self._to_device(rows[searching]))
            shown = raw.index_copy(0, self._to_device(searching.astype(np.int32)).long(), masked)
        tokens = self.draw(logits, at, where, bool((flags & HOT).any()))
        self._unsettled = counted
        if counted is not None and ahead is None:
            self.settle(tokens)
        if raw is None or shown is None:
            return tokens, None
        chosen = tokens if rows.size == len(slots) else tokens.index_select(0, self._to_device(rows))
        return tokens, self.wanted(raw, chosen, rows, positions[rows].astype(np.int32), self._logprobs[slots[rows]], landing, shown)

    def settle(self, tokens: Tensor) -> None:
        """Count what the last `sample` drew: tokens [R], -1 for those that are not the sequence's after all."""
        counted, self._unsettled = self._unsettled, None
        if counted is not None:
            self._ops.count(self._counts, counted, tokens)

    def wanted(
        self, raw: Tensor, chosen: Tensor, rows: I32, positions: I32, wants: I32, landing: Landing, shown: Tensor | None = None
    ) -> Wanted:
        """Log-probabilities of raw logits [r, V] at `chosen` [r] and of the most likely tokens (in `shown`, without it in `raw`), put on their way."""
        if shown is raw:
            shown = None
        wants = np.minimum(wants, self._vocab).astype(np.int32)
        most, named = int(wants.max()), chosen.clamp_min(0).long()
        if self._alone and len(rows) > 1:
            every = [
                portable.logprobs(raw[i : i + 1], named[i : i + 1], most, None if shown is None else shown[i : i + 1])
                for i in range(len(rows))
            ]
            ids, values, ranks = (torch.cat(parts) for parts in zip(*every, strict=True))
        else:
            ids, values, ranks = portable.logprobs(raw, named, most, shown)
        return Wanted(landing.also(ids.int()), landing.also(values), landing.also(ranks.int()), rows, positions, wants, ids.shape[1])

    def adjust_nobody(self, none: Tensor) -> None:
        """Launch what penalties and lists need on a padding row: `none` is an int32 column of one -1."""
        logits = torch.zeros(1, self._vocab, device=none.device)
        counts, in_prompt = logits.int(), logits.bool()
        self._ops.start_counts(counts, in_prompt, none, none, self._history, none, none)
        self._ops.penalise(logits, none, none, counts, in_prompt, self.settings)
        self._ops.count(counts, none, none)
        self._ops.add_bias(logits, none, none, none.view(torch.float32))
        self._ops.mask(logits, none.expand(1, -(-self._vocab // 32)).contiguous(), none)
        for longest in WORD_SIZES:
            self._ops.ban_words(logits, self._history, none, none, none, none, none, none, longest)

    def _take_rows(self, slots: Column) -> None:
        """A row of the counts for each of these slots; the pool doubles when it is used up."""
        missing = len(slots) - len(self._free_rows)
        if missing > 0:
            had = self._counts.shape[0]
            more = torch.zeros(max(4, had, missing), self._vocab, dtype=torch.int32, device=self._counts.device)
            self._counts = torch.cat([self._counts, more])
            self._in_prompt = torch.cat([self._in_prompt, more.bool()])
            self._free_rows.extend(range(self._counts.shape[0] - 1, had - 1, -1))
        for slot in slots.tolist():
            self._pool_row[slot] = self._free_rows.pop()

    def _adjust(
        self, logits: Tensor, slots: Column, positions: Column, at: Tensor, where: Tensor, flags: I32, ahead: Column | None, loose: Column
    ) -> Tensor | None:
        """Penalties, bias and masks, in place, on the rows that have them. Returns which row of the counts counts, by row, if any does."""
        counted = None
        if (flags & PENALTY).any():
            new = ((flags & PENALTY) != 0) & (self._pool_row[slots] < 0)
            fresh = np.flatnonzero(new if ahead is None else new & (ahead == 0))
            if fresh.size:
                named, ends = slots[fresh], positions[fresh]
                self._take_rows(named)
                sent = self._upload.send(self._pool_row[named], named, np.minimum(self.prompt_len[named], ends), ends)
                self._ops.start_counts(self._counts, self._in_prompt, sent[0], sent[1], self._history, sent[2], sent[3])
            counted = self._to_device(np.where(flags & PENALTY, self._pool_row[slots], -1).astype(np.int32))
            depths = None
            if ahead is not None and (deepest := int(ahead.max())) > 0:
                depths = Ahead(self._to_device(ahead), where, self._history, deepest)
            self._ops.penalise(logits, counted, at, self._counts, self._in_prompt, self.settings, depths)
        listed = np.flatnonzero(flags & (LISTS | MINIMUM))
        if listed.size:
            self._apply(logits, listed, slots, positions, at, where, ahead, loose)
        return counted

    def _apply(
        self,
        logits: Tensor,
        rows: Column,
        slots: Column,
        positions: Column,
        at: Tensor,
        where: Tensor,
        ahead: Column | None,
        loose: Column,
    ) -> None:
        """Lists of these rows, in one copy up and at most three launches; where rows are loose, a few more."""
        lists = [self._lists[int(slots[row])] for row in rows]
        histories = None if self._here is None else [self._here[slot] for slot in slots[rows].tolist()]
        slack = self._slack * loose[rows].astype(np.int32) if len(loose) else np.zeros(len(rows), np.int32)
        entries = Entries(rows.tolist(), lists, positions[rows].tolist(), histories, slack.tolist())
        sure = rows if ahead is None else rows[ahead[rows] == 0]
        least = positions[sure] - (slack if ahead is None else slack[ahead[rows] == 0])
        for slot, position in zip(slots[sure].tolist(), least.tolist(), strict=True):
            if not self._lists[slot].holds_back(position):
                self._flags[slot] &= ~MINIMUM
        columns = [entries.rows, entries.ids, entries.values.view(np.int32)]
        columns += [entries.word_rows, entries.words, entries.starts, entries.sizes]
        columns += entries.masks(len(slots)) if entries.masked else ()
        columns += entries.held
        sent = self._columns.send(*columns)
        if len(entries.rows):
            self._ops.add_bias(logits, sent[0], sent[1], sent[2].view(torch.float32))
        if entries.held:  # whether enough tokens are there yet is known on the device
            held, stops, ends = sent[-3:]
            values = torch.where(where[held.long()] < ends, -torch.inf, 0.0)
            self._ops.add_bias(logits, held, stops, values.float())
        if entries.masked:
            self._ops.mask(logits, sent[7].view(len(entries.masked), -1), sent[8])
        if entries.longest:
            self._ops.ban_words(logits, self._history, sent[3], at, where, sent[4], sent[5], sent[6], entries.longest)
