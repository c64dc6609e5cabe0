"""Drafters that run on the device, as parts of its runner.

What it is: the Protocol that the runner calls behind each draw, what it shows a drafter, and the simplest one: prompt lookup. A drafter only
guesses: whatever it puts behind a sequence's last token, the next step draws as it would have without, and keeps what is the same. So a wrong, empty or broken guess costs
time and changes no token.
What it does not know: how drafts are verified (runner.py), models, options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.core.protocol.columns import Column
from penstock.core.protocol.messages import Forward
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.devices.rings import Upload

Tensor = torch.Tensor


@dataclass(frozen=True)
class Proposal:
    """Rows [R] that get drafts."""

    rows: Column
    """Forward rows, on the host."""
    host_slots: Column
    slots: Tensor
    ends: Tensor
    """The length of each history up to its last token: the first draft goes to this position."""
    hidden: Tensor
    """[R, H] the model's normalised state at the position before that token: the last one that it has computed."""


@dataclass(frozen=True)
class Seen:
    """A step that has been drawn. Histories hold what was drawn already; of a decode row only the positions below a proposal's end are the sequence's."""

    work: Forward
    taps: Sequence[Tensor]
    """[T, H] each: the stream in front of the layers of `Drafter.taps`, of all tokens of the step."""
    whole: tuple[Tensor, Tensor] | None
    """(x, residual) [T, H] of all tokens, where no program ran; not to be overwritten."""
    history: Tensor
    table: Tensor
    block_size: int
    upload: Upload
    proposal: Proposal | None
    """None: nothing was drawn."""


class Drafter(Protocol):
    """Everything runs on the device's thread, in the lane's order, and nothing waits for the device."""

    max_lookahead: int
    taps: tuple[int, ...]
    """Layers of the model in front of which the stream is wanted (Model.step)."""
    page_bytes: int
    """What its own layers need of each KV page; 0: it has none."""
    kv_layout: str
    """Names these bytes, behind the model's own layout; "" for none."""
    weights_bytes: int
    state_bytes: int
    """What else it keeps on the device."""

    def bind(self, pages: Tensor) -> None:
        """pages [num_blocks, page_bytes] uint8, a page contiguous, in the same blocks as the model's: before the first step, and when the pool changes."""
        ...

    def place(self, slots: Column) -> None:
        """Sequences enter these slots: their blocks may hold what it computed for others with the same tokens."""
        ...

    def observe(self, seen: Seen) -> None:
        """A step that nothing is drafted behind. It should keep up with prompts; it may ignore decode rows, for less apt drafts later."""
        ...

    def propose(self, seen: Seen, out: Tensor) -> None:
        """out [R, K] int32, -1 throughout: drafts for the rows of seen.proposal, most of them if not all; one that is no token ends its row. K is at most
        max_lookahead. Prompts of the step are to be looked at as in `observe`."""
        ...


class NgramDrafter:
    """Prompt lookup: what followed when the history's last tokens stood there before. See kernels/drafting/reference.py."""

    taps = ()
    page_bytes = weights_bytes = state_bytes = 0
    kv_layout = ""

    def __init__(self, ops: DeviceOps, *, max_lookahead: int, shortest: int, longest: int) -> None:
        self.max_lookahead = max_lookahead
        self._ops = ops
        self._shortest, self._longest = shortest, longest

    def bind(self, pages: Tensor) -> None:
        """It has no layers."""

    def place(self, slots: Column) -> None:
        """It keeps nothing."""

    def observe(self, seen: Seen) -> None:
        """The history has everything."""

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        assert seen.proposal is not None
        self._ops.ngrams(seen.proposal.slots, seen.proposal.ends, seen.history, self._shortest, self._longest, out)
