"""What a runner and a drafter of `where="device"` give each other.

What it is: the Protocol that the runner calls behind each draw, what it shows a drafter, and what it makes one of. A drafter only guesses: whatever it puts behind a
sequence's last token, the next step draws as it would have without, and keeps what is the same. So a wrong, empty or broken guess costs time and changes no
token.
What it does not know: how drafts are verified (plugins/devices/runner.py), who asks for them, any drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from penstock.core.contract.devices import READS_NOTHING, ModelFacts
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import Column
from penstock.core.protocol.messages import Forward
from penstock.plugins.drafters.trees import Tree
from penstock.plugins.models.api import Columns, Model
from penstock.plugins.models.builder import Builder

Tensor = torch.Tensor


@dataclass(frozen=True)
class Parts:
    """What a drafter is made of. `DrafterSpec.factory(config=DraftConfig, parts=Parts)` gives one."""

    facts: ModelFacts
    """The model's, as `model.facts`."""
    model: Model
    """The model that is drafted for: its embedding and head may be used."""
    ops: Any
    """The device's operations: DeviceOps of plugins/devices/ops.py."""
    lane: Any
    """The device's stream: Lane of plugins/devices/lane.py."""
    dtype: torch.dtype
    block_size: int
    max_rows: int
    """Of a step that drafts, padding included."""
    max_tokens: int
    """Of any step."""
    graphs: bool
    """Steps are captured (Lane.capture), and so may the drafter's be."""
    max_len: int
    """The longest sequence."""
    slots: int
    folder: str
    """The model's own."""
    load: Callable[[str, str | None], Model]
    """load(folder, quantization): another model of a family that is served, on the same device, with an attention of its own."""
    tokenizer: Callable[[str], Tokenizer]
    """tokenizer(folder or file): that of a model, if it is of a kind that comes with Penstock. Raises CheckpointError."""
    builder: Callable[[str], Builder]
    """A folder's tensors, to make layers of."""
    attention: Callable[[ModelFacts], Any]
    """The model's kind of attention, for layers of another shape."""


@dataclass(frozen=True)
class Proposal:
    """Rows [R] that get drafts."""

    rows: Column
    """Forward rows, on the host."""
    host_slots: Column
    slots: Tensor
    begins: Tensor
    """The position of the first token that each has drawn in this step."""
    ends: Tensor
    """The length of each history, the token just drawn included: the first draft goes to this position."""
    hidden: Tensor
    """[R, H] the model's normalised state at the position before that token: the last one that it has computed and kept."""
    guess: Callable[[Tensor, Tensor, Tensor], Tensor]
    """guess(logits [R, V] float32, slots, positions) -> tokens [R] int32, drawn with the settings of the slots and the very noise that the model's own draw at these
    positions will have (arXiv 2408.07978): where both think alike they draw alike. -1: nothing can be drawn. The logits are overwritten."""
    hot: bool
    """Not all of these slots are greedy."""
    sure: bool
    """Nobody else's drafts come before these."""


@dataclass(frozen=True)
class Seen:
    """A step that has been drawn. Histories hold what was drawn already; of a decode row only the positions below a proposal's end are the sequence's."""

    work: Forward
    taps: Sequence[Tensor]
    """[T, H] each: the stream in front of the layers of `Drafter.taps`, of all tokens of the step."""
    states: Tensor | None
    """[T, H] the model's normalised last states of all tokens, for drafters with `states`."""
    columns: Columns | None
    """The model's own of this step, for drafters with taps or `states`. None: these were not kept, since no drafts had been asked for (where the model runs as a
    program that has no taps); there will be some in the next step."""
    history: Tensor
    table: Tensor
    proposal: Proposal | None
    """None: nothing was drawn, or nothing is to be drafted."""
    read: Column | None = None
    """Which rows of the step are of sequences that drafters read (Forward.place_unread), bool; None: all."""
    joined: Tensor | None = None
    """[T, K * H]: all of the drafter's taps side by side, in place of `taps`. Only for one that `follows`."""


def tree_among(drafters: Sequence[Any]) -> Tree | None:
    """The tree that their drafts are; None: they are chains. (Only one that is alone makes a tree.)"""
    return next((tree for drafter in drafters if (tree := getattr(drafter, "tree", None)) is not None), None)


class Drafter(Protocol):
    """Everything runs on the device's thread, in the lane's order, and nothing waits for the device. With `follows = True` it sees, where the lane is direct, every step that it
    is not asked for drafts behind, not those with prompts alone. Steps in which no row is of a sequence that is read (Seen.read) it does not see at all, nor their `begin` unless blocks are given or
    sequences placed there; proposals are for rows that are read.

    It may have `reads: int`, what it needs of a sequence (Runner.reads); READS_ALL where it is absent. Then it may have `skip(slots: Column)`, told in place of `place` of sequences that it is not to look at,
    and with READS_TOKENS it has `attend(slots: Column)`: it is to look at these after all.

    It may have `tree: Tree | None`: not None says that draft k of a row is node k + 1 of that tree; it is asked for all of them or for none. Without, drafts are a chain."""

    name: str
    """The word of its method."""
    max_lookahead: int
    """The most drafts that it makes behind a token."""
    taps: tuple[int, ...]
    """Layers of the model in front of which the stream is wanted (Model.step), the number of layers for what the last one gives; (): none."""
    states: bool
    """The normalised last states of all tokens are wanted."""
    page_bytes: int
    """What its own layers need of each KV page; 0: it has none."""
    kv_layout: str
    """Names these bytes, behind the model's own layout; "" for none."""
    nbytes: int
    """Of its weights."""
    state_bytes: int
    """What else it keeps on the device."""

    def bind(self, pages: Tensor) -> None:
        """pages [num_blocks, page_bytes] uint8, a page contiguous, in the same blocks as the model's: before the first step, and when the pool changes. A block that
        others fill, share, copy or move carries these bytes along."""
        ...

    def place(self, slots: Column) -> None:
        """Sequences enter these slots: their blocks may hold what it computed for others with the same tokens."""
        ...

    def begin(self, work: Forward) -> None:
        """A step begins. Of decode rows the start is the position of the last token that is known; of loose ones the last that it can be (Forward.loose), which
        is told by seen.proposal.begins."""
        ...

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """Prepare proposals for so many rows, and for less, of up to `width` drafts: compile, capture. seen.proposal is of `rows` rows of padding. Only where
        there are graphs."""
        ...

    def observe(self, seen: Seen) -> None:
        """A step with prompts (rows behind num_decode) that nothing is drafted behind: it should keep up with them. Or any such step: see `follows`."""
        ...

    def propose(self, seen: Seen, out: Tensor) -> None:
        """out [R, K] int32, -1 throughout: drafts for the rows of seen.proposal, for most of them if not for all; one that is no token ends its row. K is at most
        max_lookahead. Prompts of the step are to be looked at as in `observe`. It may write drafts behind the ends of the histories."""
        ...


class NoLayers:
    """What a drafter without weights, pages and state has in common."""

    taps: tuple[int, ...] = ()
    states = False
    page_bytes = nbytes = state_bytes = 0
    kv_layout = ""
    reads = READS_NOTHING

    def bind(self, pages: Tensor) -> None:
        """There are no layers."""

    def place(self, slots: Column) -> None:
        """Nothing is kept."""

    def begin(self, work: Forward) -> None:
        """Nothing is kept."""

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """Nothing is captured."""

    def observe(self, seen: Seen) -> None:
        """The history has everything."""
