"""What a whole answer looks like whose content obeys a grammar, or whose calls are asked for.

What it is: `laid_out` puts the layout of an answer together: reasoning as the model's format writes it, then content, calls, or either. `Said` keeps what an
answer said in each channel, and what of it is to be verified.
What it does not know: which formats the model has (formats.py), grammar backends, who verifies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from penstock.core.contract.formats import ARGUMENTS, CONTENT, NAME, Fragment, Opening, Spelling, Thinking
from penstock.core.contract.layouts import Chain, Either, Free, Mark, Obey, Part, Repeat, Text, White, decode
from penstock.core.protocol.calling import Calling, Function
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.messages import Check, Grammar

MOST_CALLS = 64
"""Of an answer that a grammar governs: it ends some time."""


def laid_out(
    opening: Opening,
    *,
    marks: Sequence[str] = (),
    thinking: Thinking | None = None,
    spelling: Spelling | None = None,
    calling: Calling | None = None,
    parallel: bool = True,
    answer: Grammar | None = None,
) -> Part:
    """An answer from its first token on. `marks` are the formats'; `calling` needs `spelling`."""
    split = _Pieces(marks)
    state = thinking.state(opening) if thinking is not None else "over"
    before = split(thinking.answer) if thinking is not None and state != "over" else []
    ways: list[list[Part]] = []
    if calling is None or not calling.must:
        if answer is not None:
            ways.append([*before, *([] if state == "over" else [White()]), _answer(answer)])
        else:
            assert spelling is not None
            ways.append([*before, Free(_hidden(spelling, thinking, state), never_first=spelling.first)])
    if calling is not None:
        assert spelling is not None
        calls = _calls(spelling, calling, split, parallel, whole=answer is not None and not calling.must and one_object(spelling))
        mark = calls[0].text if isinstance(calls[0], Mark) else _begun(spelling)
        if calling.must or answer is not None or before or not mark:
            ways.append([*([] if state == "over" or before else [White()]), *calls])
        else:  # after content, perhaps of no characters
            ways.append([Free(_hidden(spelling, thinking, state), then=mark, never_first=spelling.first), *_after(calls, len(mark))])
    body: list[Part] = ways[0] if len(ways) == 1 else [Either([_chain(way) for way in ways])]
    if thinking is None or state == "over":
        return _chain(body)
    begin, end = split(thinking.begin), split(thinking.end)
    reasons: list[Part] = [Free(list(dict.fromkeys([_first(end), *thinking.hides])), then=_first(end)), *end[1:]]
    if state == "open":
        return _chain([*reasons, *body])
    if thinking.again:
        return _chain([Repeat(_chain([*begin, *reasons])), *body])
    return Either([_chain([*begin, *reasons, *body]), _chain(body)])


def _hidden(spelling: Spelling, thinking: Thinking | None, state: str) -> list[str]:
    """Marks that content does not have. Where there may be reasoning, what begins that."""
    return [*spelling.hides, *([thinking.begin] if thinking is not None and state == "may" and not thinking.again else [])]


def _begun(spelling: Spelling) -> str:
    """What content does not have, as calls begin with it; "": nothing."""
    begin = spelling.begin + spelling.before
    return next((mark for mark in spelling.hides if begin.startswith(mark)), "")


def _after(parts: list[Part], size: int) -> list[Part]:
    """Without the first `size` characters, which are texts and marks."""
    first, *rest = parts
    assert isinstance(first, (Text, Mark))
    if len(first.text) <= size:
        return _after(rest, size - len(first.text)) if size > len(first.text) else rest
    return [Text(first.text[size:]), *rest]


def _answer(grammar: Grammar) -> Part:
    form = grammar.form
    return decode(grammar.source) if form == "layout" else Obey(form, grammar.source, grammar.field)


def _calls(spelling: Spelling, calling: Calling, split: _Pieces, parallel: bool, whole: bool) -> list[Part]:
    """`whole`: each as one object of JSON, beside which an answer may be another: two texts that begin alike would be one to a backend."""
    arguments = spelling.arguments or (lambda function: Obey("json", function.schema, function.field))
    call: list[Part]
    if whole:
        call = [Either([Obey("json", object_of(spelling, function), function.field) for function in calling.functions])]
    else:
        call = [
            *split(spelling.before),
            Either([_chain([Text(function.name), *split(spelling.between), arguments(function)]) for function in calling.functions]),
            *split(spelling.after),
        ]
    most = 1 if calling.named or not parallel else min(spelling.most or MOST_CALLS, MOST_CALLS)
    more: list[Part] = [] if most == 1 else [Repeat(_chain([*split(spelling.separator), *call]), most - 1)]
    return [*split(spelling.begin), *call, *more, *split(spelling.end)]


def one_object(spelling: Spelling) -> bool:
    """Is a call a bare object of JSON?"""
    return spelling.first == "{" and spelling.arguments is None and not spelling.begin


def object_of(spelling: Spelling, function: Function) -> str:
    """The schema of a call of it, of a format that writes one as a bare object. Raises UnsupportedFeature for a schema that refers to its own root."""
    if re.search(r'"\$ref": *"#(?!/(\$defs|definitions)/)', function.schema):
        raise UnsupportedFeature(
            f"{function.field} holds a $ref outside of $defs, which cannot be obeyed where an answer may obey a schema, too.",
            param=function.field,
        )
    schema = json.loads(function.schema)
    members = json.loads(f"{spelling.before}{function.name}{spelling.between}null{spelling.after}")
    defined = {name: schema.pop(name) for name in ("$defs", "definitions") if name in schema}
    properties = {name: schema if value is None else {"const": value} for name, value in members.items()}
    return json.dumps({"type": "object", "properties": properties, "required": list(members), "additionalProperties": False, **defined})


def _chain(parts: list[Part]) -> Part:
    return parts[0] if len(parts) == 1 else Chain(parts)


def _first(parts: list[Part]) -> str:
    first = parts[0]
    assert isinstance(first, Mark)
    return first.text


class _Pieces:
    """A format's text as texts and marks."""

    def __init__(self, marks: Iterable[str]) -> None:
        found = sorted(set(marks), key=len, reverse=True)
        self._marks = frozenset(found)
        self._pattern = re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None

    def __call__(self, text: str) -> list[Part]:
        pieces = self._pattern.split(text) if self._pattern is not None else [text]
        return [Mark(piece) if piece in self._marks else Text(piece) for piece in pieces if piece]


class Said:
    """What an answer said: its content, and calls (name, arguments)."""

    __slots__ = ("calls", "content")

    def __init__(self) -> None:
        self.content: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []

    def take(self, fragments: list[Fragment]) -> None:
        for channel, _, text in fragments:
            if channel == CONTENT:
                self.content.append(text)
            elif channel == NAME:
                self.calls.append((text, []))
            elif channel == ARGUMENTS:
                self.calls[-1][1].append(text)

    def wrong(self, calling: Calling | None, answer: Grammar | None, parallel: bool) -> str:
        """What of its shape is not as asked for; "": nothing."""
        if calling is None:
            return "It calls a function, but there is none." if self.calls else ""
        if calling.must and not self.calls:
            return "It calls no function."
        if calling.must and "".join(self.content).strip():
            return "It says more than its calls."
        if answer is not None and self.calls and "".join(self.content).strip():
            return "It says more than its calls."
        if len(self.calls) > 1 and (calling.named or not parallel):
            return "It has more than one call."
        known = {function.name for function in calling.functions}
        strange = next((name for name, _ in self.calls if name not in known), None)
        return "" if strange is None else f"It calls the function {strange[:80]!r}, which may not be called."

    def checks(self, calling: Calling | None, answer: Grammar | None) -> list[Check]:
        """What is to be verified, of an answer whose shape is right."""
        schemas = {function.name: function for function in calling.functions} if calling is not None else {}
        found = [
            Check(grammar=Grammar(kind="json", source=schemas[name].schema, field=schemas[name].field), text="".join(arguments))
            for name, arguments in self.calls
        ]
        if answer is not None and not self.calls and not (calling is not None and calling.must):
            found.append(Check(grammar=answer, text="".join(self.content)))
        return found
