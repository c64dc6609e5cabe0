"""What text needs of an output format: a splitter of an answer's text into channels.

What it is: the channels, `Fragment`, the Protocol `Splitter`, and `Opening`, which a splitter begins from.
What it does not know: tokens, requests, which formats there are.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from penstock.core.protocol.messages import ARGUMENTS as ARGUMENTS
from penstock.core.protocol.messages import CONTENT as CONTENT
from penstock.core.protocol.messages import DONE as DONE
from penstock.core.protocol.messages import NAME as NAME
from penstock.core.protocol.messages import REASONING as REASONING


class Fragment(NamedTuple):
    """A piece of an answer. Pieces of one channel (and call) that follow one another are to be joined."""

    channel: int
    """CONTENT, REASONING, NAME (a call begins: its function's whole name), ARGUMENTS (more of them, as JSON text), DONE (they are complete, and
    valid JSON; no text)."""
    call: int
    """Which of the answer's calls, from 0; -1 for CONTENT and REASONING."""
    text: str


class Opening(NamedTuple):
    """Where an answer begins."""

    prompt: str
    """The rendered prompt: a template may begin the answer's reasoning itself."""
    continues: bool
    """It ends within a message that the answer goes on with."""
    tools: bytes = b""
    """The request's, as JSON: for arguments whose types the model does not write."""


class Splitter(Protocol):
    """One answer's. What comes out, joined by channel and call, must not depend on how the text was cut into pieces, and no text may be lost but the
    format's own marks and white space beside them: whatever turns out to be no call is CONTENT. It must not raise, and costs time in
    proportion to the text. Where the model's template reads ids of its own kind, it has `call_id(call, name)` besides, which gives a call's."""

    @property
    def channel(self) -> int:
        """Where the next text goes, as far as is known: REASONING while the model thinks, else CONTENT."""
        ...

    def feed(self, text: str) -> list[Fragment]:
        """What this text makes certain."""
        ...

    def flush(self, cut: bool) -> list[Fragment]:
        """The answer is over: what was held back. `cut`: it did not end by itself (max_tokens, an error), so a call that is not complete stays so."""
        ...
