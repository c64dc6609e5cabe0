"""What a request says an answer must obey.

What it is: from the spellings of OpenAI (response_format) and vLLM (structured_outputs, guided_*) to one Grammar, or none. Structural tags stand in
core/actors/text/structured.py, as Python has them too.
What it does not know: whether a grammar is well-formed or supported (text finds out), HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.core.actors.text.structured import given, json_text, only, some, tagged
from penstock.core.protocol.calling import ANY
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar
from penstock.core.protocol.sampling import StructuredOutputsParams
from penstock.transports import refused
from penstock.transports.openai_schema import GenerationRequest, ResponseFormat, StructuredOutputs, fields_of

_OUTPUTS = frozenset(StructuredOutputs.__struct_fields__)


def grammar_of(request: GenerationRequest, raw: dict[str, msgspec.Raw]) -> Grammar | None:
    """Raises InvalidRequest or UnsupportedFeature naming the field; for two that are given, the second."""
    return only(_all(request, raw))


def _all(request: GenerationRequest, raw: dict[str, msgspec.Raw]) -> Iterator[Grammar]:
    if request.response_format is not None:
        yield from _format(request.response_format, raw["response_format"])
    if request.structured_outputs is not None:
        yield from outputs_of(request.structured_outputs, raw["structured_outputs"])
    guided = StructuredOutputsParams(
        json=request.guided_json, regex=request.guided_regex, choice=request.guided_choice, grammar=request.guided_grammar
    )
    yield from given("guided_", guided)


def _format(asked: ResponseFormat, raw: msgspec.Raw) -> Iterator[Grammar]:
    kind, schema = asked.type, asked.json_schema
    if kind == "json_object":
        refused.check_format(raw, "json_object", frozenset())
        yield Grammar(kind="json", source=ANY, field="response_format")
    elif kind == "json_schema":
        refused.check_format(raw, "json_schema", frozenset({"json_schema"}))
        field = "response_format.json_schema.schema"
        if schema is None or schema.schema_ is None:
            raise InvalidRequest(f"response_format of type json_schema needs {field}.", param=field)
        yield Grammar(kind="json", source=json_text(schema.schema_), field=field)
    elif kind == "structural_tag":
        refused.check_format(raw, "structural_tag", frozenset({"structures", "triggers", "format"}))
        yield tagged(msgspec.json.decode(raw), "response_format")
    else:
        refused.check_format(raw, "text", frozenset())


def outputs_of(outputs: StructuredOutputs, raw: msgspec.Raw) -> Iterator[Grammar]:
    """The field structured_outputs. Raises as `grammar_of`."""
    for name, value in fields_of(raw, "structured_outputs").items():
        if name not in _OUTPUTS and bytes(value).strip() not in (b"null", b"false"):
            field = f"structured_outputs.{name[:80]}"
            raise UnsupportedFeature(f"{field} is not supported here. Leave it out.", param=field)
    yield from some("structured_outputs", StructuredOutputsParams(**{name: getattr(outputs, name) for name in _OUTPUTS}))
