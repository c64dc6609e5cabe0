"""What a client says an answer must obey, as Grammars.

What it is: `given`, from vLLM's names (json, regex, choice, grammar, json_object, structural_tag), for HTTP and Python alike; `tagged`, structural tags: free
text in which certain beginnings are followed by what obeys a schema (vLLM's structures and triggers; xgrammar's `format`, where it is simple).
What it does not know: HTTP, output formats, backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from penstock.core.contract.layouts import Chain, Obey, Part, Tag, Tags, Text, encode
from penstock.core.protocol.calling import ANY
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar
from penstock.core.protocol.sampling import SamplingParams, StructuredOutputsParams

_GRAMMARS = [name for name in StructuredOutputsParams.__struct_fields__ if name != "disable_any_whitespace"]
_CONTENTS = {"json_schema": ("json", "json_schema"), "regex": ("regex", "pattern"), "grammar": ("grammar", "grammar")}
"""Of a format: the grammar's kind, and the field that holds it."""


def given(prefix: str, asked: StructuredOutputsParams) -> Iterator[Grammar]:
    """One for each that is asked for; their fields are called `prefix` and their names. Raises InvalidRequest for one that is empty: an answer without bounds
    would be none to it."""
    schema, choice = asked.json, asked.choice
    compact = bool(asked.disable_any_whitespace)
    for name in ("json", "regex", "grammar", "structural_tag"):
        if getattr(asked, name) == "":
            raise InvalidRequest(f"{prefix}{name} must not be empty.", param=f"{prefix}{name}")
    if schema is not None:
        yield Grammar(kind="json", source=schema if isinstance(schema, str) else json_text(schema), field=f"{prefix}json", compact=compact)
    if asked.regex:
        yield Grammar(kind="regex", source=asked.regex, field=f"{prefix}regex")
    if choice is not None:
        if not choice:
            raise InvalidRequest(f"{prefix}choice must not be empty.", param=f"{prefix}choice")
        yield Grammar(kind="choice", source=json_text(choice), field=f"{prefix}choice")
    if asked.grammar:
        yield Grammar(kind="grammar", source=asked.grammar, field=f"{prefix}grammar")
    if asked.json_object:
        yield Grammar(kind="json", source=ANY, field=f"{prefix}json_object", compact=compact)
    if asked.structural_tag is not None:
        yield tagged(asked.structural_tag, f"{prefix}structural_tag")


def some(field: str, asked: StructuredOutputsParams) -> list[Grammar]:
    """As `given`, of the object `field`, which must ask for something. Raises InvalidRequest."""
    found = list(given(f"{field}.", asked))
    if not found:
        raise InvalidRequest(f"{field} must hold one of {', '.join(_GRAMMARS)}.", param=field)
    return found


def only(grammars: Iterable[Grammar]) -> Grammar | None:
    """The one, or None. Raises InvalidRequest for two, naming the second."""
    found: Grammar | None = None
    for grammar in grammars:
        if found is not None:
            raise InvalidRequest(f"{grammar.field} and {found.field} cannot both be given.", param=grammar.field)
        found = grammar
    return found


def obeyed(params: SamplingParams) -> tuple[SamplingParams, Grammar | None]:
    """Settings of the Python API as engines know them, and what answers obey. Raises InvalidRequest or UnsupportedFeature naming the field."""
    found = only(
        grammar
        for name in ("structured_outputs", "guided_decoding")
        if (asked := getattr(params, name)) is not None
        for grammar in some(name, asked)
    )
    return msgspec.structs.replace(params, structured_outputs=None, guided_decoding=None), found


def json_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def tagged(given: Any, field: str) -> Grammar:
    """`given`: a structural tag as JSON has it, or as a text of JSON; `field` is what the client calls it. Raises InvalidRequest or UnsupportedFeature naming the
    place."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise InvalidRequest(f"{field} is not valid JSON: {error}.", param=field) from None
    if not isinstance(given, dict):
        raise InvalidRequest(f"{field} must be an object.", param=field)
    given = {name: value for name, value in given.items() if value is not None}
    if "format" in given:
        _only(given, {"type", "format"}, field)
        part = _format(given["format"], f"{field}.format")
        if isinstance(part, Obey):
            kind = "json" if part.kind == "compact_json" else part.kind
            return Grammar(kind=kind, source=part.source, field=part.field, compact=kind != part.kind)
        return Grammar(kind="layout", source=encode(part), field=field)
    _only(given, {"type", "structures", "triggers"}, field)
    tags = [_structure(one, f"{field}.structures[{i}]") for i, one in enumerate(_list(given, "structures", field))]
    return Grammar(kind="layout", source=encode(_tags(given, tags, field)), field=field)


def _structure(given: Any, field: str) -> Tag:
    given = _object(given, field)
    _only(given, {"begin", "schema", "end"}, field)
    schema = given.get("schema")
    content = Obey("json", json_text({} if schema is None else schema), f"{field}.schema")
    return Tag(_text(given, "begin", field), content, _text(given, "end", field))


def _format(given: Any, field: str) -> Part:
    given = _object(given, field)
    kind = given.get("type")
    if kind == "triggered_tags":
        _only(given, {"type", "triggers", "tags"}, field)
        tags = [_tag(one, f"{field}.tags[{i}]") for i, one in enumerate(_list(given, "tags", field))]
        return _tags(given, tags, field)
    if kind == "tag":
        tag = _tag(given, field)
        return Chain([Text(tag.begin), tag.content, Text(tag.end)])
    return _content(given, field)


def _tag(given: Any, field: str) -> Tag:
    given = _object(given, field)
    _only(given, {"type", "begin", "content", "end"}, field)
    if given.get("type", "tag") != "tag":
        raise InvalidRequest(f"{field}.type must be 'tag'.", param=f"{field}.type")
    return Tag(
        _text(given, "begin", field),
        _content(_object(given.get("content"), f"{field}.content"), f"{field}.content"),
        _text(given, "end", field),
    )


def _content(given: dict[str, Any], field: str) -> Obey:
    kind = given.get("type")
    if kind not in _CONTENTS:
        known = ", ".join(["triggered_tags", "tag", *_CONTENTS])
        raise UnsupportedFeature(
            f"{field} of the type {str(kind)[:80]!r} is not supported. Its types here are {known}.", param=f"{field}.type"
        )
    grammar, name = _CONTENTS[kind]
    _only(given, {"type", name}, field)
    value = given.get(name)
    if grammar == "json" and isinstance(value, (dict, bool)):
        return Obey("json", json_text(value), f"{field}.{name}")
    if grammar != "json" and isinstance(value, str) and value:
        return Obey(grammar, value, f"{field}.{name}")  # type: ignore[arg-type]
    raise InvalidRequest(f"{field}.{name} must be a {'schema' if grammar == 'json' else 'text'}.", param=f"{field}.{name}")


def _tags(given: dict[str, Any], tags: list[Tag], field: str) -> Tags:
    triggers = _list(given, "triggers", field)
    for i, trigger in enumerate(triggers):
        if not isinstance(trigger, str) or not trigger:
            raise InvalidRequest(f"{field}.triggers[{i}] must be a text that is not empty.", param=f"{field}.triggers[{i}]")
    for i, tag in enumerate(tags):
        if not tag.begin.startswith(tuple(triggers)):
            name = f"{field}.{'tags' if 'tags' in given else 'structures'}[{i}].begin"
            raise InvalidRequest(f"{name} begins with none of the triggers.", param=name)
    # Of two triggers that begin alike the shorter one comes first, always
    return Tags([one for one in triggers if not any(one != other and one.startswith(other) for other in triggers)], tags)


def _only(given: dict[str, Any], known: set[str], field: str) -> None:
    for name, value in given.items():
        if name not in known and value not in (None, False, [], {}):
            raise UnsupportedFeature(f"{field}.{name[:80]} is not supported. Leave it out.", param=f"{field}.{name[:80]}")


def _object(given: Any, field: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{field} must be an object.", param=field)
    return given


def _list(given: dict[str, Any], name: str, field: str) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{field}.{name} must be a list that is not empty.", param=f"{field}.{name}")
    return value


def _text(given: dict[str, Any], name: str, field: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or (name == "begin" and not value):
        raise InvalidRequest(f"{field}.{name} must be a text.", param=f"{field}.{name}")
    return value
