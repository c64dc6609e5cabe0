"""Drafts in torch, on any device: what they mean, and what other implementations are compared with.

What it is: `ngrams` (prompt lookup: the longest end of a history, `shortest` to `longest` tokens, that stands in it before, the last such place if there
are several; what follows there is the draft, and goes on with itself where the history ends: a lookup in the manner of LZ77), `verify` (how many draws are what their
drafts say), the same along a tree (`verify_tree`), what it leaves to be moved (`tree_moves`) and `put_drafts`. Histories are rows [S, L] int32; a slot below 0 is padding: it reads anything and writes nowhere.
What it does not know: draws, models, who owns a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verify(tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """See plugins/devices/ops.py: DeviceOps.verify. Nothing here looks at a value on the host."""
    drawn, rows = tokens.shape[0], slots.shape[0]
    widths = bounds.diff()
    row = torch.repeat_interleave(torch.arange(rows, device=slots.device), widths, output_size=drawn)
    first = bounds[:-1].long()
    offset = torch.arange(drawn, device=slots.device) - first[row]
    at = (positions[row] + offset).clamp_max(history.shape[1] - 1)
    there = history[slots[row].clamp_min(0).long(), at]
    same = (tokens == there) & (offset < widths[row] - 1)
    never = drawn + 1
    stop = torch.full((rows,), never, dtype=torch.int64, device=slots.device)
    stop.scatter_reduce_(0, row, torch.where(same, never, offset), "amin")
    bad = (tokens[first + stop] < 0) & (stop > 0)
    counts = torch.where(bad, stop, stop + 1)
    kept = torch.where(offset < counts[row], tokens, -1)
    last = positions + counts - 1
    real = (slots >= 0) & (last < history.shape[1])
    here = slots.clamp_min(0).long(), last.clamp_max(history.shape[1] - 1).long()
    history[here] = torch.where(real, tokens[first + counts - 1].clamp_min(0), history[here])
    return counts.int(), kept.int()


def verify_tree(
    tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, parents: Tensor, deepest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See plugins/devices/ops.py: DeviceOps.verify_tree. Row by row, on the host's account."""
    counts, kept = torch.zeros_like(slots), torch.full_like(tokens, -1)
    sources = torch.full((slots.shape[0], deepest), -1, dtype=torch.int32, device=slots.device)
    over, drawn, ends = parents.tolist(), tokens.tolist(), bounds.tolist()
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        first, width = ends[row], ends[row + 1] - ends[row]
        there = history[slot, position - 1 : position - 1 + width].tolist() if slot >= 0 else []
        path: list[int] = []
        node = 0
        while drawn[first + node] >= 0 or not path:
            path.append(node)
            found = [c for c in range(node + 1, min(width, len(there))) if over[c] == node and there[c] == drawn[first + node]]
            if drawn[first + node] < 0 or not found or len(path) > deepest:
                break
            node = found[0]
        counts[row] = len(path)
        for i, node in enumerate(path):
            kept[first + node] = drawn[first + node]
            if i:
                sources[row, i - 1] = node
            if slot >= 0 and position + i < history.shape[1]:
                history[slot, position + i] = max(drawn[first + node], 0)
    return counts, kept, sources


def tree_moves(
    sources: Tensor, counts: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See plugins/devices/ops.py: DeviceOps.tree_moves. A row's root is at positions[r] - 1."""
    steps = torch.arange(1, 1 + sources.shape[1], dtype=torch.int32, device=sources.device).expand_as(sources)
    there = (sources > steps) & (slots >= 0)[:, None]
    rows = table[slots.clamp_min(0).long()]

    def places(behind: Tensor) -> Tensor:
        at = (positions - 1)[:, None] + behind.clamp_min(0)
        block = rows.gather(1, (at // block_size).clamp_max(rows.shape[1] - 1).long())
        return torch.where(there & (block >= 0), block * block_size + at % block_size, -1).int()

    last = torch.where(counts > 1, sources.gather(1, (counts - 2).clamp_min(0).long()[:, None])[:, 0], 0)
    return places(sources), places(steps), bounds[:-1] + last


def put_drafts(drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
    """See plugins/devices/ops.py: DeviceOps.put_drafts."""
    at = ends[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    fits = (drafts >= 0) & (drafts < vocab) & (at < history.shape[1])
    fits = fits.int().cumprod(1).bool()
    drafts.copy_(torch.where(fits, drafts, -1))
    row, k = torch.nonzero(fits & (slots >= 0)[:, None], as_tuple=True)
    history[slots[row].long(), at[row, k].long()] = drafts[row, k]


def ngrams(slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
    """out [R, K] int32: drafts behind the first ends[r] tokens of each slot's history; -1 where nothing is found."""
    out.fill_(-1)
    for row, (slot, end) in enumerate(zip(slots.tolist(), ends.tolist(), strict=True)):
        if slot < 0 or end < 2:
            continue
        known = history[slot, :end]
        index = torch.arange(end - 1, device=known.device)
        fits = torch.ones(end - 1, dtype=torch.bool, device=known.device)
        length = torch.zeros(end - 1, dtype=torch.int64, device=known.device)
        for back in range(min(longest, end - 1)):
            fits &= (index >= back) & (known[(index - back).clamp_min(0)] == known[end - 1 - back])
            length += fits
        best = int(length.max())
        if best < shortest:
            continue
        source = int(torch.nonzero(length == best)[-1]) + 1
        every = torch.arange(out.shape[1], device=known.device) % (end - source)
        out[row] = known[source + every]
