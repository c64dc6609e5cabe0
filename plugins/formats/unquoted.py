"""Arguments in tags of their own, for grammars: what tagged.py reads, the other way round.

What it is: `Tagging`, how a format spells one argument, and `arguments`, the layout of a function's arguments. A string stands as it is, up to its end mark; other
values are JSON. Where an argument may be either, a string is one that cannot be read as anything else. What of a schema bare text cannot say is refused by
name, never left out.
What it does not know: any model's marks, expressions (the grammar backend's).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from penstock.core.contract.layouts import Bare, Chain, Either, Mark, Obey, Part, Repeat, Text
from penstock.core.protocol.calling import Function
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.plugins.formats.named import NOTES, Arguments, named, unstrict
from penstock.plugins.formats.schemas import MAX_DEPTH, TEXT, Kinds, converted, kind_of, kinds_in, resolved

NAMES = r"""[^\s"'<>](?:[^"'<>\n\r]{0,254}[^\s"'<>])?"""
"""An argument's name, as read_key reads it."""
WRITER = "an argument in a tag"
TYPES: Kinds = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_LONG = 64
"""Characters of a name in an error."""
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern", "format"})
_OF_OTHERS = frozenset({
    "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "minProperties", "maxProperties",
    "items", "prefixItems", "properties", "required", "additionalProperties", "patternProperties",
})  # fmt: skip
_NOTES = NOTES | {"example", "deprecated", "readOnly", "writeOnly", "discriminator", "$defs", "definitions"}
Like = Literal["null", "boolean", "number", "nested", "quoted"]


class Tagging(NamedTuple):
    """`before(name)` stands before a value and `after` behind it, `end` being the mark that ends it; `without` are all texts that end a value."""

    before: Callable[[str], list[Part]]
    end: str
    after: list[Part]
    without: Sequence[str]
    line: bool = False
    """A value that is JSON may stand on a line of its own."""
    trimmed: bool = False
    """See Bare."""
    loose: bool = False
    """See TaggedSplitter."""
    says: Callable[[str, bool], list[Part]] | None = None
    """Instead of `before`, of a format that says beside the name whether the value is a string."""


def arguments(tagging: Tagging) -> Callable[[Function], Part]:
    """See Spelling.arguments."""

    def laid_out(function: Function) -> Part:
        if function.hint:
            return Chain(
                [Repeat(_unstrict(tagging, name, kinds_in(own, hint, 0), function), 1) for name, own, hint in unstrict(function, NAMES)]
            )
        found = named(function, NAMES, WRITER)
        parts: list[Part] = []
        for name, schema, required in found.arguments:
            if schema is False and not required:
                continue
            one = _Argument(tagging, function, found, name, schema).part()
            parts.append(one if required else Repeat(one, 1))
        return Chain(parts)

    return laid_out


def _unstrict(tagging: Tagging, name: str, of: Kinds, function: Function) -> Part:
    """Of the types that the schema names, and else any."""
    return _Argument(tagging, function, Arguments([], {}), name, {"type": sorted(of)} if of else {}).part()


class _Argument:
    def __init__(self, tagging: Tagging, function: Function, all_: Arguments, name: str, schema: Any) -> None:
        self._tagging = tagging
        self._function = function
        self._all = all_
        self._name = name
        self._schema = schema
        self._kinds = kinds_in(schema, {"properties": {}, **all_.definitions}, 0)
        """As the reader finds them."""

    def _refused(self, what: str) -> UnsupportedFeature:
        return UnsupportedFeature(
            f"{self._function.field}: {what[:200]} of the property {self._name[:_LONG]!r} cannot be obeyed by {WRITER}, as this model writes it.",
            param=self._function.field,
        )

    def part(self) -> Part:
        found, tagging = self._kinds, self._tagging
        if tagging.says is not None:  # the reader believes what the model says, whatever the schema does
            strings = self.strings(self._schema) if "string" in found or not found else None
            ways: list[Part] = [] if strings is None else [Chain([*tagging.says(self._name, True), self._bare(strings)])]
            if found != TEXT:
                ways.append(Chain([*tagging.says(self._name, False), *self._json((found or TYPES) - TEXT)]))
            return self._one_of(ways)
        before = tagging.before(self._name)
        if found and "string" not in found:
            return Chain([*before, *self._json(found)])
        if found == TEXT or (not found and not tagging.loose):
            strings = self.strings(self._schema)
            return Chain([*before, self._one_of([] if strings is None else [self._bare(strings)])])
        return Chain([*before, self._either(found or TYPES, quoted=not found)])

    def _one_of(self, ways: list[Part]) -> Part:
        if not ways:
            raise self._refused("the schema")
        return ways[0] if len(ways) == 1 else Either(ways)

    def _json(self, types: Kinds) -> list[Part]:
        """Of these types alone."""
        tagging = self._tagging
        space: list[Part] = [Repeat(Text("\n"), 1)] if tagging.line else []
        return [*space, Obey("json", self._all.whole(self._of(types)), self._function.field), *space, Mark(tagging.end), *tagging.after]

    def _bare(self, strings: dict[str, Any], words: Iterable[str] = (), unlike: Iterable[Like] = ()) -> Part:
        tagging = self._tagging
        bare = Bare(
            schema=json.dumps({"type": "string", **strings}),
            then=tagging.end,
            without=list(tagging.without),
            words=list(words),
            unlike=list(unlike),
            trimmed=tagging.trimmed,
            field=self._function.field,
        )
        return Chain([bare, *tagging.after])

    # --- strings

    def strings(self, schema: Any, unlike: Sequence[Like] = (), depth: int = 0) -> dict[str, Any] | None:
        """What the schema asks of a string, for Bare; None: it is to be none."""
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            return None
        if depth > MAX_DEPTH:
            raise self._refused("the keyword '$ref', nested so deep,")
        made: dict[str, Any] = {}
        parts: list[Any] = []
        for keyword, value in schema.items():
            if keyword == "$ref":
                parts.append(self.strings(resolved(str(value), self._all.definitions), unlike, depth + 1))
            elif keyword in ("enum", "const"):
                values = [one for one in (value if keyword == "enum" else [value]) if isinstance(one, str)]
                for one in values:
                    self._writable(one, keyword, unlike)
                parts.append({"enum": values} if values else None)
            elif keyword in _OF_STRINGS:
                made[keyword] = value
            elif keyword == "allOf":
                parts += [self.strings(one, unlike, depth + 1) for one in value]
            elif keyword in ("anyOf", "oneOf"):
                each = [one for one in (self.strings(one, unlike, depth + 1) for one in value) if one is not None]
                if keyword == "oneOf" and len(each) > 1 and not _apart(each):
                    raise self._refused("the keyword 'oneOf' with several ways to be a string")
                parts.append({"anyOf": each} if each else None)
            elif keyword == "type" and "string" not in (value if isinstance(value, list) else [value]):
                return None
            elif keyword not in _OF_OTHERS and keyword not in _NOTES:
                raise self._refused(f"the keyword {keyword[:_LONG]!r}")
        if None in parts:
            return None
        parts = [one for one in parts if one]
        return {**made, "allOf": parts} if parts else made

    def _writable(self, text: str, keyword: str, unlike: Sequence[Like] = ()) -> None:
        tagging = self._tagging
        lost = tagging.trimmed and (text.startswith("\n") or text.endswith("\n"))
        if lost or any(end in text for end in tagging.without) or any(_like(text.strip(), what) for what in unlike):
            raise self._refused(f"the value {text[:_LONG]!r} of the keyword {keyword!r}")

    # --- values that may be strings or something else

    def _either(self, found: Kinds, *, quoted: bool) -> Part:
        """`quoted`: text in quotes would be read as JSON, too."""
        values = self._finite()
        if values is not None:
            return self._one_of([self._bare({"enum": [self._spelt(value) for value in values]})] if values else [])
        words = [
            word
            for word, value in (("null", None), ("true", True), ("false", False))
            if kind_of(value) in found and self._takes(self._schema, value)
        ]
        unlike: list[Like] = ["null"] if "null" in found else []
        unlike += ["boolean"] if "boolean" in found else []
        unlike += ["number"] if found & {"number", "integer"} else []
        unlike += ["nested"] if found & {"object", "array"} else []
        unlike += ["quoted"] if quoted else []
        strings = self.strings(self._schema, unlike)
        others = found & {"number", "integer", "object", "array"}
        ways: list[Part] = []
        if strings is not None:
            ways.append(self._bare(strings, words, unlike))
        elif words:
            ways.append(self._bare({"enum": words}))
        if others:
            ways.append(Chain(self._json(others)))
        return self._one_of(ways)

    def _finite(self) -> list[Any] | None:
        """Its values, where a list says which they are."""
        schema = self._schema
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = resolved(str(schema["$ref"]), self._all.definitions)
        if not isinstance(schema, dict) or not {"enum", "const"} & schema.keys():
            return None
        odd = next((keyword for keyword in schema if keyword not in {"enum", "const", "type", *_NOTES}), None)
        if odd is not None:
            raise self._refused(f"the keyword {odd[:_LONG]!r} beside enum or const")
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return [value for value in values if self._takes(schema, value)]

    def _spelt(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self._writable(text, "enum")
        read = json.loads(converted(text, self._kinds, self._tagging.loose))
        if read != value or kind_of(read) != kind_of(value):
            raise self._refused(f"the value {text[:_LONG]!r} of the keyword 'enum'")
        return text

    def _takes(self, schema: Any, value: Any, depth: int = 0) -> bool:
        """Does it allow this one, which is no number, list or object whose size it might bound? Of an unknown keyword: no."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return False
        for keyword, of in schema.items():
            if keyword == "type":
                names = {*(of if isinstance(of, list) else [of])}
                right = kind_of(value) in names or (kind_of(value) == "integer" and "number" in names)
            elif keyword in ("enum", "const"):
                right = any(one == value and kind_of(one) == kind_of(value) for one in (of if keyword == "enum" else [of]))
            elif keyword == "$ref":
                right = self._takes(resolved(str(of), self._all.definitions), value, depth + 1)
            elif keyword in ("allOf", "anyOf", "oneOf"):
                each = [self._takes(one, value, depth + 1) for one in of]
                right = all(each) if keyword == "allOf" else any(each) if keyword == "anyOf" else sum(each) == 1
            else:
                right = keyword in _OF_STRINGS or keyword in _OF_OTHERS or keyword in _NOTES
            if not right:
                return False
        return True

    def _of(self, types: Kinds) -> Any:
        """The schema, for values of these types alone."""
        own = self._schema if isinstance(self._schema, dict) else {}
        given = own.get("type")
        names = {*(given if isinstance(given, list) else [given])} if given is not None else set(types)
        if "number" in names & types:
            names.discard("integer")
        return {**own, "type": sorted(names & types)}


def _like(text: str, what: Like) -> bool:
    """As Bare.unlike."""
    first = text[:1]
    match what:
        case "null":
            return text.lower() in ("null", "none")
        case "boolean":
            return text.lower() in ("true", "false")
        case "number":
            return first.isdecimal() or first in tuple("-+.")
        case "nested":
            return first in tuple("[{(#\\")
    return first == '"'


def _apart(each: list[dict[str, Any]]) -> bool:
    """Are these lists of values without one in common?"""
    lists = [
        one["allOf"][0]["enum"] for one in each if one.keys() == {"allOf"} and len(one["allOf"]) == 1 and one["allOf"][0].keys() == {"enum"}
    ]
    values = [value for one in lists for value in one]
    return len(lists) == len(each) and len(values) == len(set(values))
