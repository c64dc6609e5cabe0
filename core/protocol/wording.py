"""What a value should have been, in words that need no Python.

What it is: msgspec's type errors, and Python types, in the words of an error message for users; names without their spelling (`squash`).
What it does not know: which field it is about.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "list": "a list",
    "object": "an object",
    "dict": "an object",
    "null": "null",
}
LONGEST_NAME = 64
"""No field has a longer name."""
_NO_LETTER = re.compile(r"[^a-z0-9]")
_EXPECTED = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")


def squash(name: str) -> str:
    """The same for max_tokens, maxTokens, Max-Tokens and MAXTOKENS."""
    return _NO_LETTER.sub("", name.lower())


def type_words(kind: Any) -> str:
    """`int | None` -> "a whole number"; `list[str]` -> "a list of texts"; `Literal["a", "b"]` -> "one of 'a', 'b'"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_words(one) for one in arguments if one is not type(None))
    if origin is list:
        return f"a list of {'texts' if arguments[0] is str else 'values'}"
    return _WORDS.get(getattr(kind, "__name__", ""), str(kind))


def plain(what: str) -> str:
    """msgspec's "Expected `int | null`, got `str`" as "must be a whole number, but is a text"; what is no such sentence stays."""
    found = _EXPECTED.fullmatch(what)
    if found is None:
        return what
    wanted = [_WORDS.get(word, word) for word in found.group(1).split(" | ")]
    if len(wanted) > 1 and wanted[-1] == "null":
        wanted.pop()
    got = _WORDS.get(found.group(2), found.group(2))
    return f"must be {' or '.join(wanted)}, but is {got}"


NOTHING_ALLOWED = "There is no token that the request's grammar and its other settings both allow here."
"""Why an engine ends a sequence that has a grammar; text looks for whose fault it is."""
GRAMMAR_FAILED = "The request's grammar could not be followed further. "
"""How that begins where the grammar itself is to blame: the client's own."""
FEWER_ANSWERS = "Answers that obey the grammar and that the search found: "
"""The engine's words about a beam search with fewer answers than are asked for; their number follows."""
