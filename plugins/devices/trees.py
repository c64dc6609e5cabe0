"""Steps with trees of drafts: what a runner does besides.

What it is: `TreeSteps`, which says what node each token of a step is, walks a row's tree behind the draw, brings what was reached into one line (keys and values to their own places), and
shows drafters such a step as if it had been a chain: their own layers compute what was reached anew, as they do behind a chain.
What it does not know: graphs, sampling, who drafts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch

from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import EngineFailure
from penstock.core.protocol.messages import Forward, Sample
from penstock.plugins.devices.lane import Lane
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.devices.rings import Upload
from penstock.plugins.drafters.trees import Laid, Tree
from penstock.plugins.models.api import Columns

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensor = torch.Tensor


class Walked(NamedTuple):
    """What became of a step's trees."""

    counts: Tensor
    """[R] tokens that were drawn along the way."""
    kept: Tensor
    """[D] of each node its draw, -1 if the way does not lead there."""
    sources: Tensor
    """[R, deepest] the nodes behind the root, then -1."""


class Line(NamedTuple):
    """A step as drafters see it."""

    work: Forward
    columns: Columns
    taps: list[Tensor]
    states: Tensor | None


class TreeSteps:
    """One runner's."""

    def __init__(self, tree: Tree, ops: DeviceOps, lane: Lane, block_size: int, entries: int) -> None:
        self.tree = tree
        self._ops = ops
        self._lane = lane
        self._size = block_size
        self._laid = Laid(tree, lane.device)
        self._parents = torch.from_numpy(tree.parents).to(lane.device)
        self._upload = Upload(lane, entries, 0)

    def nodes(self, work: Forward) -> I32:
        """Of each token of the step; prompts are in no tree."""
        found = np.zeros(int(work.counts.sum()), np.int32)
        counts = work.counts[: work.num_decode]
        decoded = int(counts.sum())
        found[:decoded] = np.arange(decoded) - np.repeat(np.cumsum(counts) - counts, counts)
        return found

    def columns(self, columns: Columns, nodes: Tensor) -> Columns:
        """See Laid."""
        return self._laid.columns(columns, nodes)

    def depths(self, nodes: I32) -> I32:
        """Positions behind the root's."""
        found: I32 = self.tree.depths[nodes]
        return found

    def check(self, work: Sample, before: Forward) -> None:
        """Raises EngineFailure for draws that begin inside a tree."""
        wide = before.counts[work.rows] > 1
        wide &= work.rows < before.num_decode
        if bool((wide & (work.positions != before.starts[work.rows] + 1)).any()):
            raise EngineFailure("A Sample draws from the middle of a tree of drafts.")

    def walk(self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor) -> Walked:
        """See DeviceOps.verify_tree."""
        return Walked(*self._ops.verify_tree(tokens, slots, positions, bounds, history, self._parents, self.tree.deepest))

    def straighten(
        self, walked: Walked, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, attention: Any, pool: Tensor
    ) -> Tensor:
        """Keys and values of the nodes that were reached go to the places of their positions. Gives for each row the draw, of all D, that its way ends with."""
        source, target, last = self._ops.tree_moves(walked.sources, walked.counts, slots, positions, bounds, table, self._size)
        attention.move(pool, source, target)
        return last

    def line(
        self,
        work: Forward,
        drawn: I32,
        sources: Tensor,
        flat: bool,
        taps: Sequence[Tensor],
        states: Tensor | None,
        history: Tensor,
        table: Tensor,
    ) -> Line:
        """The step as a chain: of each row as many tokens as the tree is deep, the first of them those that were reached. `work` as it came, of which the rows `drawn` were sampled;
        `flat`: a decode row's tokens were rows of their own."""
        rows, decode = len(work.slots), work.num_decode
        counts = work.counts.copy()
        counts[:decode] = np.minimum(counts[:decode], 1 + self.tree.deepest)
        total, bounds = int(counts.sum()), np.zeros(rows + 1, np.int32)
        np.cumsum(counts, out=bounds[1:])
        row = np.repeat(np.arange(rows, dtype=np.int32), counts)
        step = (np.arange(total, dtype=np.int32) - bounds[row]).astype(np.int32)
        base = (np.cumsum(work.counts) - work.counts)[row].astype(np.int32)
        sampled = np.full(rows, -1, np.int32)
        sampled[drawn] = np.arange(len(drawn), dtype=np.int32)
        whose = np.where((row < decode) & (step > 0), sampled[row], -1).astype(np.int32)
        wide = int(counts[:decode].sum()) if flat else 0
        parts: list[I32] = [base, step, whose]
        if flat:
            slots = np.concatenate([np.repeat(work.slots[:decode], counts[:decode]), work.slots[decode:]])
            starts = np.concatenate([np.repeat(work.starts[:decode], counts[:decode]) + step[:wide], work.starts[decode:]])
            q_start = np.concatenate([np.arange(wide), bounds[decode:]]).astype(np.int32)
            parts += [slots.astype(np.int32), starts.astype(np.int32), q_start]
        else:
            parts += [work.slots, work.starts, bounds]
        sent = self._upload.send(*parts)
        reached = sources[sent[2].clamp_min(0).long(), (sent[1] - 1).clamp(0, self.tree.deepest - 1).long()] if len(sources) else sent[2]
        index = sent[0] + torch.where((sent[2] >= 0) & (reached >= 0), reached, sent[1])
        state = history, table, self._size
        if flat and rows == decode:
            columns = self._ops.decode_inputs(sent[3], sent[4], *state)
        else:
            columns = self._ops.ragged_inputs(sent[3], sent[4], sent[5], *state, total, wide if flat else 0 if self._lane.direct else -1)
        take = self._ops.take_rows
        index = index.int()
        seen = [take(tap, index) for tap in taps]
        return Line(msgspec.structs.replace(work, counts=counts), columns, seen, None if states is None else take(states, index))

    def touch(self, history: Tensor, table: Tensor, attention: Any, pool: Tensor) -> None:
        """Launch what a step with trees needs, on padding."""
        none = torch.full((1,), -1, dtype=torch.int32, device=history.device)
        bounds = torch.arange(2, dtype=torch.int32, device=none.device)
        self.straighten(self.walk(none, none, -none, bounds, history), none, -none, bounds, table, attention, pool)
