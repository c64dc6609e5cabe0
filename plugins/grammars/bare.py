"""Strings without quotes, as terminals of llguidance.

What it is: `terminal` makes of a layout's `Bare` one terminal: what its schema asks of a string, met with what a reader would take for something else.
Patterns are those of ECMA-262, as JSON schema has them: `ported` says the same to the backend, whose \\d knows every script's digits, or refuses.
What it does not know: formats, what stands around such a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from penstock.core.contract.layouts import Bare
from penstock.core.protocol.errors import PenstockError, UnsupportedFeature
from penstock.plugins.grammars import texts

ANYTHING = "(?s:.)*"
_SPACE = r"[\s\x1c-\x1f]*"
"""What Python strips."""
_UNLIKE = {
    "null": f"{_SPACE}(?i:null|none){_SPACE}",
    "boolean": f"{_SPACE}(?i:true|false){_SPACE}",
    "number": f"{_SPACE}[\\-+.\\p{{Nd}}]{ANYTHING}",
    "nested": f"{_SPACE}[\\[{{(\\#\\\\]{ANYTHING}",  # a list or an object, of JSON or of Python, there perhaps after a remark
    "quoted": f'{_SPACE}\\"{ANYTHING}',
}
_ASKS = frozenset(["minLength", "maxLength", "pattern", "format", "enum", "const", "allOf", "anyOf"])
_META = frozenset('\\.+*?()|[]{}^$#&-~/"')
_SIGNS = re.compile("[/&~]")
_ENDS = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": "\\t\\n\\x0b\\x0c\\r "}
_PATTERN = re.compile(r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|\[\^?|\]|\(\?(?!:)|[()^$|/&~]", re.DOTALL)


def escaped(text: str) -> str:
    """An expression for exactly this text."""
    return "".join(_ENDS.get(char) or ("\\" + char if char in _META else char) for char in text)


def terminal(part: Bare) -> str:
    """Raises UnsupportedFeature naming the keyword that bare text cannot obey."""
    try:
        body = _string(json.loads(part.schema))
    except PenstockError as error:
        raise UnsupportedFeature(error.message, param=part.field or None) from None
    tame = finite(json.loads(part.schema))
    trimmed = part.trimmed and body is not None and not tame
    body = _met(f"/{ANYTHING}/" if body is None else body, (_UNLIKE[kind] for kind in part.unlike))
    if trimmed:
        body = _met(body, [f"\\n{ANYTHING}", f"{ANYTHING}\\n"])
    body = " | ".join([body, *(f"/({escaped(word)})/" for word in part.words)])
    if part.trimmed and (trimmed or tame or part.words):
        body = f"/\\n?/ ({body}) /\\n?/"
    if tame:
        return body
    ends = "|".join(map(escaped, part.without))
    return _met(body, [f"{ANYTHING}({ends}){ANYTHING}"] if ends else [])


def finite(schema: Any) -> bool:
    """Is it of listed values (of which whoever lists them says that they can be written so), or of a format, none of which has a tag or a line's end in it? To
    exclude such again costs the backend much."""
    if not isinstance(schema, dict):
        return False
    if not schema.keys().isdisjoint(("enum", "const", "format")):
        return True
    return any(map(finite, schema.get("allOf", ()))) or ("anyOf" in schema and all(map(finite, schema["anyOf"])))


def endless(schema: Any) -> bool:
    """May a string that obeys go on with any character?"""
    if not isinstance(schema, dict):
        return True
    if not schema.keys().isdisjoint(("enum", "const", "format", "maxLength")) or str(schema.get("pattern", "")).endswith("$"):
        return False
    return all(map(endless, [*schema.get("allOf", ()), *schema.get("anyOf", ())]))


def _met(body: str, not_these: Iterable[str]) -> str:
    return " & ".join([f"({body})", *(f"~/{one}/" for one in not_these)])


def _string(schema: Any) -> str | None:
    """None: any."""
    found: list[str] = []
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        if keyword not in _ASKS:
            continue
        if keyword in ("enum", "const"):
            values = value if keyword == "enum" else [value]
            found.append(" | ".join(f"/({escaped(one)})/" for one in values if isinstance(one, str)))
        elif keyword == "pattern":
            found.append(f"/{_searched(value)}/")
        elif keyword == "format":
            if value not in texts.PATTERNS:
                raise UnsupportedFeature(f"The schema's format {str(value)[:80]!r} cannot be obeyed by text without quotes.")
            found.append(f"/{_terminals(texts.PATTERNS[value])}/")
            if value in texts.LONGEST:
                found.append(f"/(?s:.){{0,{texts.LONGEST[value]}}}/")
        elif keyword in ("allOf", "anyOf"):
            each = [_string(one) for one in value]
            if keyword == "allOf":
                found += [one for one in each if one is not None]
            elif None not in each:
                found.append(" | ".join(f"({one})" for one in each))
    least, most = (schema.get(word) for word in ("minLength", "maxLength")) if isinstance(schema, dict) else (None, None)
    if least or most is not None:
        found.append(f"/(?s:.){{{int(least or 0)},{'' if most is None else int(most)}}}/")
    return " & ".join(f"({one})" for one in found) if found else None


def _terminals(pattern: str) -> str:
    """A pattern of texts.py within a terminal, where some more signs are no letters."""
    return _SIGNS.sub(r"\\\g<0>", pattern)


def _searched(pattern: str) -> str:
    """A pattern may match anywhere, but for its anchors."""
    body, choices, opened = ported(pattern)
    begins, ends = body.startswith("^"), body.endswith("$") and opened
    if (begins or ends) and choices:  # an anchor of one choice alone
        raise UnsupportedFeature(
            f"The schema's pattern {pattern[:80]!r} cannot be obeyed by text without quotes: put ^ and $ around a group."
        )
    body = body[1:] if begins else body
    body = body[:-1] if ends else body
    return f"{'' if begins else ANYTHING}({body}){'' if ends else ANYTHING}"


def ported(pattern: str) -> tuple[str, bool, bool]:
    """(the same for the backend, has it choices that no group holds, is its last character no escaped one). Raises UnsupportedFeature."""
    depth, choices, within, negated, last = 0, False, False, False, ""

    def one(found: re.Match[str]) -> str:
        nonlocal depth, choices, within, negated, last
        text = last = found[0]
        if text[0] == "\\":
            return _escape(text, within, negated, refuse)
        if within:
            within = text != "]"
            return text if text in "]^$|" else "\\" + text
        if text[0] == "[":
            within, negated = True, text == "[^"
        elif text == "(?":
            raise refuse()
        elif text in "()":
            depth += 1 if text == "(" else -1
        elif text == "|":
            choices = choices or not depth
        elif (text == "^" and found.start() > 0) or (text == "$" and found.end() < len(pattern)):
            raise refuse()
        return "\\" + text if text in "/&~" else text

    def refuse() -> UnsupportedFeature:
        return UnsupportedFeature(f"The schema's pattern {pattern[:80]!r} cannot be obeyed by text without quotes.")

    body = _PATTERN.sub(one, pattern).replace("\n", "\\n").replace("\r", "\\r")
    return body, choices, last == "$"


def _escape(text: str, within: bool, negated: bool, refuse: Any) -> str:
    kind = text[1]
    if kind in "ux" and len(text) > 2:
        return f"\\x{{{text[2:]}}}"
    if kind in "dws":
        if within and negated and kind == "s":
            return "\\s\\x{FEFF}"
        return _CLASSES[kind] if within else f"[{_CLASSES[kind]}]"
    if kind in "DWS" and not within:
        return {"D": "[^0-9]", "W": "[^A-Za-z0-9_]", "S": "[^\\s\\x{FEFF}]"}[kind]
    if kind in "nrtfv":
        return {"v": "\\x0b", "f": "\\x0c"}.get(kind, text)
    if kind.isalnum():  # \\b, \\1, \\p{...}: others mean others by them
        raise refuse()
    return text if kind in _META or kind == "^" else re.escape(kind).replace("\\ ", " ")
