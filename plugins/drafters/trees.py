"""Trees of drafts: their shape, as drafters make them and runners verify them.

What it is: `Tree`. Node 0 is the root, the last token that is known; the others are drafts, parents before their children, level by level. Node c of a row stands at place
`start + c` of the history and of the cache, but its position (for the rotary step, the draw's counter and the sampler) is `start + depth`. What it sees is a mask over the 64 entries up to its own
(Columns.ancestors). All of it is the same for every row and step, so that it is made once and looked up on the device.
What it does not know: tokens, who guesses them, how attention reads a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.protocol.columns import I32, I64
from penstock.core.protocol.speculation import tree_of
from penstock.plugins.models.api import Columns

Tensor = torch.Tensor


@dataclass(frozen=True)
class Tree:
    """Arrays have an entry a node."""

    parents: I32
    """The root's is -1."""
    depths: I32
    ranks: I32
    """Among the tokens that may come behind its parent: 0 is the likeliest."""
    ancestors: I64
    """As Columns.ancestors."""

    @staticmethod
    def of(text: str | None) -> Tree | None:
        """From `speculative_token_tree`."""
        if text is None:
            return None
        paths: list[tuple[int, ...]] = [(), *tree_of(text)]
        return Tree.made([-1, *(paths.index(path[:-1]) for path in paths[1:])], [path[-1] if path else 0 for path in paths])

    @staticmethod
    def made(parents: list[int], ranks: list[int]) -> Tree:
        """Of nodes, parents first; those with -1 see everything before node 0."""
        depths = np.zeros(len(parents), np.int32)
        seen: list[int] = []
        every = (1 << 64) - 1
        for node, parent in enumerate(parents):
            if parent >= 0:
                depths[node] = depths[parent] + 1
            # From a node one place further on everything lies one bit higher; what lies before node 0 is seen.
            above = seen[parent] << (node - parent) if parent >= 0 else (every << (node + 1))
            seen.append((above | 1) & every)
        return Tree(np.array(parents, np.int32), depths, np.array(ranks, np.int32), np.array(seen, np.uint64).view(np.int64))

    @property
    def deepest(self) -> int:
        return int(self.depths.max())

    @property
    def nodes(self) -> int:
        """The root included."""
        return len(self.parents)


class Laid:
    """A tree's nodes as rows of a step on a device."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.ancestors = torch.from_numpy(tree.ancestors).to(device)
        steps = np.arange(tree.nodes, dtype=np.int32)
        self.behind = torch.from_numpy(steps - tree.depths).to(device)
        """How far a node's position lies before its place."""

    def columns(self, columns: Columns, nodes: Tensor) -> Columns:
        """Columns made by place, of tokens that are these `nodes` [T]; one that is in no tree is node 0."""
        at = nodes.long()
        positions = (columns.positions - self.behind[at]).clamp_min(0)
        return columns._replace(positions=positions, ancestors=self.ancestors[at])
