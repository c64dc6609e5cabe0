"""Who drafts: the choice among plugins' drafters, and what one on the host looks like.

What it is: `drafter_for`, and the Protocol of drafters of `where="host"` (those on the device are in plugins/drafters/api.py, since they speak of tensors).
What it does not know: any drafter, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from penstock.core.contract.hookspecs import DrafterSpec
from penstock.core.protocol.columns import I32
from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError


class HostDrafter(Protocol):
    """Called on the engine's own thread between steps: it must be quick. Methods that it may have besides:

    - `work()`: one that may have more to do than a step should wait for does a bounded piece of it. Called once before the questions of each step (behind `begin`, `extend` and `end`).
    - `extend_many(seqs: I64, counts: I32, tokens: I32)` instead of `extend`, and `propose_many(seqs: I64, most: I32) -> (counts: I32, tokens: I32)` instead of `propose`: of all rows of a
      step at once, the tokens of each behind those of the one before. A loop over 256 rows is time that the device may have to wait."""

    max_lookahead: int
    """The most drafts that it makes behind a token."""

    def begin(self, seq: int, tokens: I32, tenant: str) -> None:
        """A sequence starts with these tokens (its prompt, and what was drawn before a restart); what it says may help others of its tenant alone."""
        ...

    def extend(self, seq: int, tokens: I32) -> None:
        """It goes on with these."""
        ...

    def propose(self, seq: int, most: int) -> I32:
        """What may come next: at most so many tokens, none where it has no idea."""
        ...

    def end(self, seq: int) -> None:
        """It is over."""
        ...


def drafter_for(method: str, specs: Mapping[str, DrafterSpec]) -> DrafterSpec:
    """Who serves a "method": the highest priority, of equal ones the last. Raises ConfigError naming those known."""
    able = [spec for spec in specs.values() if method in spec.methods]
    if able:
        return max(reversed(able), key=lambda spec: spec.priority)
    known = sorted({word for spec in specs.values() for word in spec.methods})
    raise ConfigError(
        f"--speculative-config: no plugin drafts by the 'method' {method!r}.{nearest(method, known)} Known: {', '.join(known) or 'none'}.",
        param="speculative_config",
    )
