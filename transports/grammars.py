"""What a request says an answer must obey.

What it is: from the spellings of OpenAI (response_format) and vLLM (structured_outputs, guided_*) to one Grammar, or none.
What it does not know: whether a grammar is well-formed or supported (text finds out), HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar
from penstock.transports import refused
from penstock.transports.openai_schema import GenerationRequest, StructuredOutputs, fields_of

ANY_OBJECT = '{"type":"object"}'
_OUTPUTS = frozenset(StructuredOutputs.__struct_fields__)


def grammar_of(request: GenerationRequest, raw: dict[str, msgspec.Raw]) -> Grammar | None:
    """Raises InvalidRequest or UnsupportedFeature naming the field; for two that are given, the second."""
    found: Grammar | None = None
    for grammar in _all(request, raw):
        if found is not None:
            raise InvalidRequest(f"{grammar.field} and {found.field} cannot both be given.", param=grammar.field)
        found = grammar
    return found


def _all(request: GenerationRequest, raw: dict[str, msgspec.Raw]) -> Iterator[Grammar]:
    if request.response_format is not None:
        yield from _format(request, raw["response_format"])
    if request.structured_outputs is not None:
        yield from _outputs(request.structured_outputs, raw["structured_outputs"])
    yield from _given("guided_", request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar)


def _format(request: GenerationRequest, raw: msgspec.Raw) -> Iterator[Grammar]:
    assert request.response_format is not None
    kind, schema = request.response_format.type, request.response_format.json_schema
    if kind == "json_object":
        refused.check_format(raw, "json_object", frozenset())
        yield Grammar(kind="json", source=ANY_OBJECT, field="response_format")
    elif kind == "json_schema":
        refused.check_format(raw, "json_schema", frozenset({"json_schema"}))
        field = "response_format.json_schema.schema"
        if schema is None or schema.schema_ is None:
            raise InvalidRequest(f"response_format of type json_schema needs {field}.", param=field)
        yield Grammar(kind="json", source=_text(schema.schema_), field=field)
    else:
        refused.check_format(raw, "text", frozenset())


def _outputs(outputs: StructuredOutputs, raw: msgspec.Raw) -> Iterator[Grammar]:
    for name, value in fields_of(raw, "structured_outputs").items():
        if name not in _OUTPUTS and bytes(value).strip() not in (b"null", b"false"):
            field = f"structured_outputs.{name[:80]}"
            raise UnsupportedFeature(f"{field} is not supported here. Leave it out.", param=field)
    yield from _given("structured_outputs.", outputs.json, outputs.regex, outputs.choice, outputs.grammar)
    if outputs.json_object:
        yield Grammar(kind="json", source=ANY_OBJECT, field="structured_outputs.json_object")


def _given(prefix: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None) -> Iterator[Grammar]:
    if schema is not None and schema != "":
        yield Grammar(kind="json", source=schema if isinstance(schema, str) else _text(schema), field=f"{prefix}json")
    if regex:
        yield Grammar(kind="regex", source=regex, field=f"{prefix}regex")
    if choice is not None:
        if not choice:
            raise InvalidRequest(f"{prefix}choice must not be empty.", param=f"{prefix}choice")
        yield Grammar(kind="choice", source=_text(choice), field=f"{prefix}choice")
    if grammar:
        yield Grammar(kind="grammar", source=grammar, field=f"{prefix}grammar")


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
