"""What a runner and a drafter of `where="device"` give each other.

What it is: the Protocol. A drafter is a part of the runner: it may see the model's hidden states behind each forward, and proposes tokens behind each draw.
Nothing that it proposes can change an answer, so it need not be right, only cheap.
What it does not know: how drafts are verified, who asks for them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from penstock.plugins.models.api import Columns, Stream

Tensor = torch.Tensor


class Drafter(Protocol):
    """`DrafterSpec.factory(config=DraftConfig, ...)` gives one. Everything runs on the device's thread; nothing waits for the device."""

    name: str
    """As its spec's."""
    max_lookahead: int
    """The most drafts that it makes behind a token."""
    taps: tuple[int, ...]
    """Layers in front of which it wants to see the model's stream (Model.step); (): none."""
    layers: int
    """Its own layers of keys and values, which ride in the pages of the model's; 0: none."""
    nbytes: int
    """Held in memory for it."""

    def observe(self, ops: Any, caches: Any, columns: Columns, stream: Stream) -> None:
        """Behind the model's step, before the draw: every token of the step, prompts included."""
        ...

    def propose(self, lens: Tensor, hidden: Tensor, out: Tensor) -> None:
        """Behind the draw: `out` [S, K] int32 gets the next K tokens of each sequence, -1 from where on it has none. `lens` [S] int32 are their lengths, the
        token just drawn included; `hidden` [S, H] the last hidden state that was kept of each."""
        ...
