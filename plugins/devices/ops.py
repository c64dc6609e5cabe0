"""The operations that a device's runner is made of, chosen once at start.

What it is: `DeviceOps`, which adds to what a model composes (plugins/models/api.py: Ops) the state of the slots and the draw. `torch_ops.py` has it in
plain torch for any device, `triton_ops.py` for a GPU, `host_ops.py` for the CPU.
What it does not know: who owns a slot, graphs, steps, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from penstock.plugins.models.api import Columns, Model, Ops, Program

Tensor = torch.Tensor


@dataclass(frozen=True)
class Settings:
    """Sampling settings, one column a field, indexed by slot: seeds int64, top_k and choices int32, the others float32 [S]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True)
class Ahead:
    """Of row r, the last depths[r] [R] tokens before positions[r] [R] in its slot's `history`; no depth is above `deepest`."""

    depths: Tensor
    positions: Tensor
    history: Tensor
    deepest: int


class DeviceOps(Ops, Protocol):
    """T tokens, R rows (sequences) of the step, S slots, W blocks a table row. All index tensors are int32; a slot, row or place below 0 is padding: it
    reads zeros and writes nowhere. `history` [S, longest] is the tokens of each slot, `table` [S, W] its blocks (-1: none). Nothing here
    synchronises, except where `capturable` is False.
    """

    capturable: bool
    """May be captured in a graph."""
    workspace_bytes: int
    """What it has allocated for itself."""

    def compile_only(self) -> AbstractContextManager[None]:
        """Inside, operations prepare what their first call would (compile, on as many threads as there are cores) and need not compute anything."""
        ...

    def fuse(self, model: Model, caches: Sequence[Any]) -> Program | None:
        """The model and its caches as one call a step, with the same values bit for bit; None: it is composed."""
        ...

    # --- state of the slots

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """One token a row: that at `starts`, which sees everything up to itself."""
        ...

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """q_start[r + 1] - q_start[r] tokens of row r, from `starts` on; `tokens` in all, those from q_start[R] on padding."""
        ...

    def place(self, history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """A slot's history becomes tokens[offset : offset + count], its table row -1."""
        ...

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """table[slot, index] = id."""
        ...

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """history[slot, position] = max(token, 0)."""
        ...

    def find_ends(self, slots: Tensor, places: Tensor, lens: Tensor) -> None:
        """In place: a place below 0 counts from the end of its slot's history of lens[slot] tokens: -1 is the last token's, -2 the first one behind it, and so
        on."""
        ...

    # --- sampling

    def greedy(self, logits: Tensor) -> Tensor:
        """[R] int32: the first maximum, -1 for a bad row."""
        ...

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """[R] int32, -1 for a bad row; rows of temperature 0 are greedy. `logits` may be overwritten."""
        ...

    def penalise(
        self,
        logits: Tensor,
        counted: Tensor,
        slots: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        settings: Settings,
        ahead: Ahead | None = None,
    ) -> None:
        """In place, on the rows whose `counted` [R] names a row of counts int32 and in_prompt bool [C, V]; settings by `slots` [R]. `ahead`: tokens of
        the output that `counts` does not have yet."""
        ...

    def add_bias(self, logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
        """logits[rows[e], ids[e]] += values[e] float32 (-inf bans), in place; no (row, id) twice."""
        ...

    def mask(self, logits: Tensor, mask: Tensor, mask_rows: Tensor) -> None:
        """In place: row r keeps the tokens whose bit is 1 in mask[mask_rows[r]] int32 [Q, ceil(V / 32)] (bit t % 32 of word t // 32), the others become
        -inf; below 0: all are kept."""
        ...

    def ban_words(
        self,
        logits: Tensor,
        history: Tensor,
        rows: Tensor,
        slots: Tensor,
        positions: Tensor,
        words: Tensor,
        starts: Tensor,
        sizes: Tensor,
        longest: int,
    ) -> None:
        """In place: where slot slots[rows[e]]'s history before position positions[rows[e]] ends with all but the last token of words[starts[e] :
        starts[e] + sizes[e]], that last token becomes -inf in row rows[e]. `longest` is at least the largest size."""
        ...

    def start_counts(
        self, counts: Tensor, in_prompt: Tensor, counted: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor
    ) -> None:
        """Count slots' histories into rows `counted`: [0, split) is prompt, [split, end) output."""
        ...

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """counts[counted[r], tokens[r]] += 1 for the rows that are counted and have a token; several rows may be counted in one place."""
        ...

    # --- drafts

    def verify(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, widest: int
    ) -> tuple[Tensor, Tensor]:
        """Row r drew tokens[bounds[r] : bounds[r + 1]] [D] (at least one) for its slot from positions[r] on, each but the last beside the draft that stands there
        -> (how many of them are the sequence's: those that are as their drafts are, up to the first, and one more; for each of the D its token, -1 if it
        is not the sequence's). The last one is written to the history. A bad draw (-1) is taken as a row's first alone: otherwise the row ends before it. `widest`: no
        row has more draws."""
        ...

    def verify_tree(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, parents: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for rows whose draws are those of a tree's nodes, the root first: draw c belongs to the token at positions[r] - 1 + c in the history, whose parent is node
        parents[c] [N] (before it; the root's is -1). From the root on, as long as a child is what was drawn -> (how many draws that makes; for each of the D its token, -1 if it is
        not the sequence's; sources [R, deepest]: the nodes that were reached behind the root, one after the other, then -1). What was drawn is written to the history, in order.
        Of children with the same token the first counts."""
        ...

    def tree_moves(
        self, sources: Tensor, counts: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that `verify_tree` walked -> (places [R, deepest] of the nodes that were reached; where their entries belong, both -1 where nothing has to move; for each row the
        draw, of all D, that its way ends with)."""
        ...

    def put_drafts(self, drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
        """history[slots[r], ends[r] + k] = drafts[r, k] [R, K] int32, as far as they are tokens below `vocab` and the history is long enough; what comes behind becomes -1
        in `drafts`."""
        ...

    def ngrams(self, slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
        """Prompt lookup: see kernels/drafting/reference.py. out [R, K] int32."""
        ...
