"""What text needs of an output format: a splitter of an answer's text into channels.

What it is: the channels, `Fragment`, the Protocol `Splitter`, and `Opening`, which a splitter begins from; `Spelling` and `Thinking`, the same formats
the other way round: how calls and reasoning are written, so that a grammar can ask for them.
What it does not know: tokens, requests, which formats there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from penstock.core.contract.layouts import Part
from penstock.core.protocol.calling import Function
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
    """The request's, as JSON: a call is one of these functions (any other is content), and arguments have their types where the model does not write
    them. Empty: not known."""


class Splitter(Protocol):
    """One answer's. What comes out, joined by channel and call, must not depend on how the text was cut into pieces, and no text may be lost but the
    format's own marks and white space beside them: whatever turns out to be no call, one of a function that is not among the tools too, is CONTENT. It must not raise, and costs time in
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


class Spelling(msgspec.Struct, frozen=True, kw_only=True):
    """How calls are written: `begin`, a call, `separator`, a call, ..., `end`. A call is `before`, the function's name, `between`, its arguments as a JSON object,
    `after`. Texts as the splitter reads them; what of them is one of FormatSpec.marks is drawn as that token where it is a special one."""

    begin: str = ""
    before: str
    between: str
    after: str
    separator: str = ""
    end: str = ""
    most: int | None = None
    """Calls that an answer can have. None: as many as there may be (MOST_CALLS of core/actors/text/answers.py)."""
    hides: list[str]
    """Marks that content cannot have: there the splitter would read something else."""
    first: str = ""
    """For calls that begin with no mark: characters that content does not begin with, as it would be read as a call."""
    told: Callable[[Any], str] | None = None
    """For the same: `told(schema)` says why an answer of JSON that obeys this schema could be read as a call; "": it could not. None: any could."""
    arguments: Callable[[Function], Part] | None = None
    """How a function's arguments are laid out where they are not a JSON object. Raises UnsupportedFeature naming the function's field for a schema that cannot be
    written so. None: an object that obeys the function's schema."""
    names: str = r"[\w.:/-]{1,256}"
    """An expression for the functions' names that can be written so."""


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """How reasoning is written: `begin`, anything, `end`."""

    begin: str
    end: str
    state: Callable[[Opening], Literal["open", "may", "over"]]
    """Where an answer begins: within reasoning, where there may be some, or after it."""
    again: bool = False
    """There may be more of it after its end."""
    hides: list[str] = msgspec.field(default_factory=list)
    """Marks besides `end` that it cannot have: there the splitter would read something else."""
    answer: str = ""
    """What stands before content that is no reasoning."""
