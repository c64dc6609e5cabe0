"""What xgrammar expresses exactly, and how it is told.

What it is: `plain_schema`, `plain_regex`, `plain_lark` and `plain_ebnf`: the part of each language that means the same there as it says, in a form in which it does.
All else is an UnsupportedFeature that names the keyword or the part: the library takes much of it without a word and then ignores it. It is long because
each language is read here for itself.
What it does not know: backends (nothing of the library is imported here), which keywords there may be at all (see keywords.py).
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars.keywords import NOTES

OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}
"""Which keywords say something about values of a type."""
SAID = frozenset().union(*OF_TYPE.values())
MOST_DIGITS = 10**15
"""Bounds of integers are below this."""
MOST_COUNT = 16
"""minItems, maxLength and their like are at most this: the library prepares masks for each of so many places, which takes seconds for hundreds."""
MOST_PARTS = 100
"""Schemas within a schema, for the same reason."""
_TAME = re.compile(r'[^"\\/\x00-\x1f]*')
"""Names of properties that JSON can spell in one way only, once \\u is not said (see TameBounds)."""
_REF = re.compile(r"#(/(\$defs|definitions)/[A-Za-z0-9_.-]+)?")
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " \\t\\n\\r"}
"""What the shortest reading of each means: in ECMA 262 and Unicode they may say more."""
_CONTROL = {"n": "\\n", "r": "\\r", "t": "\\t"}
_LITERAL = frozenset("\\.+*?()|[]{}^$#&-~/\"@!%:=,;'`<> ")
"""What stands for itself behind a backslash."""
_REPEAT = re.compile(r"\{([0-9]{1,4})(,([0-9]{0,4}))?\}")


def _refuse(what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"xgrammar cannot obey {what} exactly.")


# ------------------------------------------------------------------ JSON schemas


def plain_schema(schema: Any) -> Any:
    """`schema` has passed `check_schema` and `spelled`. Raises UnsupportedFeature naming the keyword; InvalidRequest if nothing can satisfy it."""
    if json.dumps(schema).count("{") > MOST_PARTS:
        raise _refuse(f"a schema of more than {MOST_PARTS} parts")
    made = _schema(schema, "", schema)
    if isinstance(schema, dict):
        for place in ("$defs", "definitions"):
            if place in schema:
                made[place] = {name: _schema(one, f"/{place}/{name}", schema) for name, one in schema[place].items()}
    return made


def _at(keyword: str, at: str) -> UnsupportedFeature:
    return _refuse(f"the schema's keyword {keyword[:80]!r} at {(at or '/')[:200]}")


def _schema(schema: Any, at: str, root: Any) -> dict[str, Any]:
    if schema is True:
        return {}
    if schema is False:
        raise _refuse(f"the schema false at {at[:200]}")
    said = {keyword: value for keyword, value in schema.items() if keyword not in NOTES and keyword not in ("$defs", "definitions")}
    if not at and "$ref" in said and said["$ref"] == "#":
        raise InvalidRequest("Nothing can satisfy it.")
    if at and ("$defs" in schema or "definitions" in schema or "$id" in schema):
        raise _at("$id" if "$id" in schema else "$defs", at)
    if "$ref" in said:
        if len(said) > 1:
            raise _at("$ref", at)
        _check_ref(said["$ref"], at, root)
        return dict(said)
    if "enum" in said or "const" in said:
        return _values(said, schema, at, root)
    if "anyOf" in said:
        if len(said) > 1:
            raise _at("anyOf", at)
        return {"anyOf": [_schema(one, f"{at}/anyOf/{index}", root) for index, one in enumerate(said["anyOf"])]}
    for keyword in ("oneOf", "allOf"):
        if keyword in said:
            raise _at(keyword, at)
    if not said:
        return {}
    if "type" not in said:
        raise _at(next(iter(said)), at)
    types = [said["type"]] if isinstance(said["type"], str) else list(dict.fromkeys(said["type"]))
    if "number" in types and "integer" in types:
        types.remove("integer")
    ways = [_typed(one, said, at, root) for one in types]
    if not ways:
        raise _at("type", at)
    return ways[0] if len(ways) == 1 else {"anyOf": ways}


def _check_ref(ref: str, at: str, root: Any) -> None:
    if not isinstance(ref, str) or not _REF.fullmatch(ref):
        raise _at("$ref", at)
    seen = {ref}
    while ref != "#":  # one that leads to itself alone says nothing
        _, place, name = ref.split("/", 2)
        found = root.get(place, {}).get(name) if isinstance(root, dict) else None
        if found is None:
            raise InvalidRequest(f"The schema's $ref at {at[:200]} names what is not there.")
        if not isinstance(found, dict) or "$ref" not in found:
            return
        ref = found["$ref"]
        if not isinstance(ref, str) or not _REF.fullmatch(ref) or ref in seen:
            raise _at("$ref", at)
        seen.add(ref)


def _values(said: dict[str, Any], schema: dict[str, Any], at: str, root: Any) -> dict[str, Any]:
    """enum or const: the values that the rest of the schema allows too."""
    keyword = "enum" if "enum" in said else "const"
    if {"anyOf", "oneOf", "allOf"} & said.keys():
        raise _at(keyword, at)
    values = said["enum"] if "enum" in said else [said["const"]]
    if not isinstance(values, list):
        raise _at(keyword, at)
    check = jsonschema_rs.validator_for({"$schema": "https://json-schema.org/draft/2020-12/schema", **said}, offline=True)
    values = [value for value in values if check.is_valid(value)]
    if not values:
        raise _refuse(f"the schema at {(at or '/')[:200]}, which no value satisfies,")
    text = json.dumps(values, ensure_ascii=False)
    if any(isinstance(value, (dict, list)) and value for value in values):  # which can be spelt in many ways
        raise _at(keyword, at)
    if "\\u" in text or "\x7f" in text or not all(map(_spelt_as_it_is, values)):
        raise _at(keyword, at)
    return {"enum": values}


def _spelt_as_it_is(value: Any) -> bool:
    """Will the library's own JSON have the same number?"""
    return not isinstance(value, float) and (not isinstance(value, int) or abs(value) <= MOST_DIGITS)


def _typed(kind: str, said: dict[str, Any], at: str, root: Any) -> dict[str, Any]:
    """The schema for values of this type."""
    told = {keyword: value for keyword, value in said.items() if keyword in OF_TYPE[kind]}
    made: dict[str, Any] = {"type": kind}
    if kind == "object":
        return made | _object(told, at, root)
    if kind == "array":
        if "prefixItems" in told:
            raise _at("prefixItems", at)
        if "items" in told:
            made["items"] = _schema(told["items"], f"{at}/items", root)
        return made | _counts(told, "minItems", "maxItems", at)
    if kind == "string":
        return made | _string(told, at)
    if kind == "number" and told:
        raise _at(next(iter(told)), at)
    if kind == "integer":
        return made | _integer(told, at)
    return made


def _object(told: dict[str, Any], at: str, root: Any) -> dict[str, Any]:
    for keyword in ("patternProperties", "minProperties", "maxProperties"):
        if keyword in told:
            raise _at(keyword, at)
    made: dict[str, Any] = {}
    properties = told.get("properties", {})
    for name in properties:
        if not name or not _TAME.fullmatch(name):
            raise _at("properties", at)
    required = told.get("required", [])
    if not isinstance(required, list) or not set(required) <= properties.keys():
        raise _at("required", at)
    if properties:
        made["properties"] = {name: _schema(one, f"{at}/properties/{name}", root) for name, one in properties.items()}
    if required:
        made["required"] = list(dict.fromkeys(required))
    more = told.get("additionalProperties", True)
    if more is False and not properties:
        raise _at("additionalProperties", at)
    made["additionalProperties"] = more if isinstance(more, bool) else _schema(more, f"{at}/additionalProperties", root)
    return made


def _counts(told: dict[str, Any], least: str, most: str, at: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for keyword in (least, most):
        if keyword in told:
            value = told[keyword]
            if not isinstance(value, int) or not 0 <= value <= MOST_COUNT:
                raise _at(keyword, at)
            made[keyword] = value
    if made.get(least, 0) > made.get(most, MOST_COUNT):
        raise _at(least, at)
    return made


def _string(told: dict[str, Any], at: str) -> dict[str, Any]:
    for keyword in ("format", "pattern"):
        if keyword in told:  # the library's patterns let through what does not match: ^a(\\.[0-9]{1,9})?Z$ takes a1Z
            raise _at(keyword, at)
    return _counts(told, "minLength", "maxLength", at)


def _integer(told: dict[str, Any], at: str) -> dict[str, Any]:
    if "multipleOf" in told:
        raise _at("multipleOf", at)
    lows: list[int] = []
    highs: list[int] = []
    for keyword, into, step in (
        ("minimum", lows, 0),
        ("exclusiveMinimum", lows, 1),
        ("maximum", highs, 0),
        ("exclusiveMaximum", highs, -1),
    ):
        if keyword in told:
            value = told[keyword]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or abs(value) > MOST_DIGITS:
                raise _at(keyword, at)
            into.append(value + step)
    made = {}
    if lows:
        made["minimum"] = max(lows)
    if highs:
        made["maximum"] = min(highs)
    if lows and highs and made["minimum"] > made["maximum"]:
        raise _at("minimum", at)
    return made


# ------------------------------------------------------------------ expressions


class _Regex:
    """A regular expression read and said again in the words that mean the same everywhere."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0

    def read(self) -> str:
        made = self._either()
        if self._at < len(self._source):
            raise self._no()
        return made

    def _no(self) -> UnsupportedFeature:
        return _refuse(f"the expression at character {self._at} ({self._source[self._at : self._at + 8]!r})")

    def _next(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._next()
        self._at += 1
        return char

    def _either(self) -> str:
        ways = [self._chain()]
        while self._next() == "|":
            self._at += 1
            ways.append(self._chain())
        return "|".join(ways)

    def _chain(self) -> str:
        made = []
        while self._next() not in ("", "|", ")"):
            made.append(self._atom() + self._times())
        return "".join(made) or "()"

    def _times(self) -> str:
        made = ""
        if self._next() in ("*", "+", "?"):
            made = self._take()
        elif self._next() == "{":
            found = _REPEAT.match(self._source, self._at)
            if found is None or (found[3] and int(found[1]) > int(found[3])):
                raise self._no()
            self._at = found.end()
            made = found[0]
        if made and self._next() in ("*", "+", "?", "{"):
            raise self._no()
        return made

    def _atom(self) -> str:
        char = self._next()
        if char == "(":
            self._at += 1
            if self._source.startswith("?:", self._at):
                self._at += 2
            elif self._next() == "?":
                raise self._no()
            inner = self._either()
            if self._take() != ")":
                self._at -= 1
                raise self._no()
            return f"({inner})"
        if char == "[":
            return self._set()
        if char == ".":
            self._at += 1
            return "[^\\n]"
        if char == "\\":
            return self._escape(within=False)
        if char in "^$*+?{})]":
            raise self._no()
        return self._plain(self._take())

    def _plain(self, char: str) -> str:
        if char < " " or "\ud800" <= char <= "\udfff":
            self._at -= 1
            raise self._no()
        return f"\\{char}" if char in "\\.+*?()|[]{}^$-/" else char

    def _escape(self, *, within: bool) -> str:
        self._at += 1
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char] if within else f"[{_CLASSES[char]}]"
        if char in _CONTROL:
            return _CONTROL[char]
        if char and char in _LITERAL:
            return self._plain(char)
        self._at -= 2
        raise self._no()

    def _set(self) -> str:
        self._at += 1
        no = self._next() == "^"
        if no:
            self._at += 1
        made: list[str] = []
        while (char := self._next()) != "]" or not made:
            if char in ("", "[", "]", "&", "^") or (char in "-~" and made and self._source[self._at + 1 : self._at + 2] != "]"):
                raise self._no()
            first = self._member()
            if self._next() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._member()
                if len(first.lstrip("\\") or first) != 1 or len(last.lstrip("\\") or last) != 1 or first[-1] > last[-1]:
                    raise self._no()
                first = f"{first}-{last}"
            made.append(first)
        self._at += 1
        return f"[{'^' if no else ''}{''.join(made)}]"

    def _member(self) -> str:
        if self._next() == "\\":
            return self._escape(within=True)
        return self._plain(self._take())


def plain_regex(source: str) -> str:
    """For the whole of an answer, as GBNF. Raises UnsupportedFeature."""
    return f"root ::= {_Ebnf(_Regex(source).read()).read()}"


# ------------------------------------------------------------------ grammars

_TEXT = r'"(?:[^"\\\n]|\\.)*"'
_EBNF = re.compile(
    rf"(?P<text>{_TEXT})|(?P<set>\[(?:[^\]\\\n]|\\.)*\])|(?P<note>\#[^\n]*)|(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|(?P<is>::=)"
    r"|(?P<times>\{[0-9]{1,4}(?:,[0-9]{0,4})?\})|(?P<sign>[()|*+?])|(?P<space>\s+)"
)
_ESCAPE = re.compile(r'\\(?:[nrt"\\\[\]^-]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})')
_LARK = re.compile(
    rf"(?P<text>{_TEXT}(?!i))|(?P<regex>/(?:[^/\\\n]|\\.)+/(?![a-z]))|(?P<note>//[^\n]*)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<is>:)"
    r"|(?P<sign>[()|*+?])|(?P<line>\n\s*)|(?P<space>[ \t\r]+)"
)


def plain_ebnf(source: str) -> str:
    """GBNF of names, texts, sets, groups and repetitions. Raises UnsupportedFeature."""
    at, before = 0, ""
    names: set[str] = set()
    while at < len(source):
        found = _EBNF.match(source, at)
        if found is None:
            raise _refuse(f"the grammar at character {at} ({source[at : at + 12]!r})")
        kind = found.lastgroup
        if kind in ("text", "set"):
            for escape in re.finditer(r"\\(.)", found[0], re.DOTALL):
                if not _ESCAPE.match(found[0], escape.start()):
                    raise _refuse(f"the grammar's escape {escape[0]!r}")
        if kind == "set" and found[0] in ("[]", "[^]"):
            raise _refuse(f"the grammar's {found[0]}")
        if kind == "name":
            names.add(found[0])
        if found[0] == "(" and before == "name" and source[at - 1 : at].strip():
            raise _refuse(f"the grammar at character {at}: a call")
        if kind not in ("note", "space"):
            before = str(kind)
        at = found.end()
    if "root" not in names:
        raise _refuse("a grammar without a rule root")
    return source


def plain_lark(source: str) -> str:
    """Rules and terminals in upper case, of texts, expressions and repetitions: as GBNF. Raises UnsupportedFeature. As nothing is ignored between them,
    terminals are rules like others."""
    at = 0
    rules: list[str] = []
    tokens: list[tuple[str, str]] = []
    while at < len(source):
        found = _LARK.match(source, at)
        if found is None:
            raise _refuse(f"the grammar at character {at} ({source[at : at + 12]!r})")
        kind = str(found.lastgroup)
        if kind not in ("note", "space"):
            tokens.append((kind, found[0]))
        at = found.end()
    named: set[str] = set()
    for index, (kind, text) in enumerate(tokens):
        if kind == "is":
            if index == 0 or tokens[index - 1][0] != "name" or (index > 1 and tokens[index - 2][0] != "line"):
                raise _refuse("the grammar's ':'")
            named.add(tokens[index - 1][1])
            rules.append(f"\n{rules.pop()} ::= ")
        elif kind == "name":
            rules.append(f" r_{text} ")
        elif kind == "regex":
            rules.append(f" {_Ebnf(_Regex(text[1:-1]).read()).read()} ")
        elif kind == "text":
            rules.append(f" {literal(json.loads(text))} ")
        elif kind == "sign":
            rules.append(text)
        elif kind == "line" and index + 2 < len(tokens) and tokens[index + 2][0] != "is" and tokens[index + 1][1] != "|":
            raise _refuse("the grammar's line that is no rule")
    used = {text for kind, text in tokens if kind == "name"}
    if "start" not in named or used - named:
        raise _refuse("a grammar without a rule start, or with rules from elsewhere")
    return "root ::= r_start" + "".join(rules)


class _Ebnf:
    """An expression that `_Regex` wrote, as a part of GBNF."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0

    def read(self) -> str:
        made: list[str] = []
        source = self._source
        while self._at < len(source):
            char = source[self._at]
            self._at += 1
            if char == "[":
                end = self._at
                while source[end] != "]":
                    end += 2 if source[end] == "\\" else 1
                made.append(f" [{_set_text(source[self._at : end])}]")
                self._at = end + 1
            elif char == "{":
                end = source.index("}", self._at)
                made.append(source[self._at - 1 : end + 1])
                self._at = end + 1
            elif char == "\\":
                made.append(f" {literal(_unescaped(source[self._at]))}")
                self._at += 1
            elif char == "(" and source.startswith(")", self._at):
                made.append(' ""')
                self._at += 1
            elif char in "()|*+?":
                made.append(char)
            else:
                made.append(f" {literal(char)}")
        return f"({''.join(made)} )"


def _unescaped(char: str) -> str:
    return {"n": "\n", "r": "\r", "t": "\t"}.get(char, char)


def _set_text(text: str) -> str:
    """A set's inside with each sign spelt so that GBNF reads it as it is."""
    made = []
    at = 0
    if text.startswith("^"):
        made.append("^")
        at = 1
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
            made.append(_code(_unescaped(text[at])))
        elif char == "-" and 0 < at < len(text) - 1:
            made.append("-")
        else:
            made.append(_code(char))
        at += 1
    return "".join(made)


def _code(char: str) -> str:
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def literal(text: str) -> str:
    """As a text of GBNF."""
    if "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise _refuse("a text with such a character")
    return '"' + "".join(map(_code, text)) + '"'


def choices(texts: list[str]) -> str:
    """One of them, as GBNF."""
    return "root ::= " + " | ".join(map(literal, texts))
