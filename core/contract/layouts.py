"""How an answer is laid out, for grammars: what stands where, and what each part obeys.

What it is: the parts that a grammar of the kind "layout" is made of; its source is one `Part` as JSON (`encode`, `decode`), and `leaves` are the grammars
in it. Text puts a layout together from the model's output format and what the request asks; a grammar backend makes one grammar of it.
What it does not know: formats, requests, backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from penstock.core.protocol.errors import InvalidRequest

JSON = frozenset({"json", "compact_json"})
"""Kinds of grammars whose source is a JSON schema."""


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Exactly this text."""

    text: str


class Mark(msgspec.Struct, frozen=True, tag="mark"):
    """A mark of the output format: the special token that is spelt so if the vocabulary has one, else its text."""

    text: str


class Free(msgspec.Struct, frozen=True, tag="free"):
    """Any text that holds none of the marks `without` (neither as token nor spelt out), perhaps none."""

    without: list[str]
    then: str = ""
    """The mark, one of `without`, that ends it and belongs to it; "": it goes as far as it goes."""
    never_first: str = ""
    """Characters that it may not begin with, white space before them or not."""


class White(msgspec.Struct, frozen=True, tag="white"):
    """White space, or none."""


class Obey(msgspec.Struct, frozen=True, tag="obey"):
    """Text that obeys a grammar of another kind. `field` is what the client calls it, for errors."""

    kind: Literal["json", "compact_json", "regex", "choice", "grammar"]
    source: str
    field: str = ""


class Bare(msgspec.Struct, frozen=True, tag="bare"):
    """A string that obeys a schema, as it is: without quotes, nothing escaped. It goes up to `then` (a mark, or a text), which belongs to it."""

    schema: str
    """Of strings alone, as JSON: minLength, maxLength, pattern, format, enum, const, and allOf and anyOf of such schemas."""
    then: str
    without: list[str]
    """Texts that it may not hold: there a reader would take it to have ended."""
    words: list[str] = msgspec.field(default_factory=list)
    """Texts that may stand instead, whatever the schema says."""
    unlike: list[Literal["null", "boolean", "number", "nested", "quoted"]] = msgspec.field(default_factory=list)
    """What it may not look like (it begins so, or is so, white space aside), as it would be read as that."""
    trimmed: bool = False
    """A line's end on either side is none of it, and may be there."""
    field: str = ""
    """What the client calls the schema, for errors."""


class Chain(msgspec.Struct, frozen=True, tag="chain"):
    """One after the other."""

    parts: list[Part]


class Either(msgspec.Struct, frozen=True, tag="either"):
    """One of them."""

    parts: list[Part]


class Repeat(msgspec.Struct, frozen=True, tag="repeat"):
    """The part, any number of times, or at most `most`; perhaps not at all."""

    part: Part
    most: int | None = None


class Tag(msgspec.Struct, frozen=True):
    begin: str
    content: Obey
    end: str


class Tags(msgspec.Struct, frozen=True, tag="tags"):
    """Free text in which each of the `triggers` begins one of the `tags`, whose `begin` begins with it. Everything in it is plain text, no token."""

    triggers: list[str]
    tags: list[Tag]


Part = Text | Mark | Free | White | Obey | Bare | Chain | Either | Repeat | Tags
_decoder: msgspec.json.Decoder[Part] = msgspec.json.Decoder(Part)


def encode(part: Part) -> str:
    return msgspec.json.encode(part).decode()


def decode(source: str) -> Part:
    """Raises InvalidRequest."""
    try:
        return _decoder.decode(source)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"It is no layout: {error}."[:300]) from None


def leaves(part: Part) -> Iterator[Obey]:
    """The grammars in it."""
    if isinstance(part, Obey):
        yield part
    elif isinstance(part, Bare):
        yield Obey("json", part.schema, part.field)
    elif isinstance(part, (Chain, Either)):
        for one in part.parts:
            yield from leaves(one)
    elif isinstance(part, Repeat):
        yield from leaves(part.part)
    elif isinstance(part, Tags):
        for tag in part.tags:
            yield tag.content
