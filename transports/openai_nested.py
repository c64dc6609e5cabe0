"""Unknown fields within the objects of a request of OpenAI's API.

What it is: `unknown_within`, their paths (`tools[0].function.bar`), so that a typing error does not go unseen there either; known ones in another spelling (`Strict`)
are refused, as they would change the answer. Messages themselves may hold anything: that goes to the chat template.
What it does not know: unknown fields of the request itself (openai_schema.py), what becomes of the names.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.transports import refused
from penstock.transports.openai_schema import ChatMessage, ContentPart, FunctionCall, FunctionSpec, JsonSchema, ResponseFormat, Structure
from penstock.transports.openai_schema import Tool as AnyTool
from penstock.transports.openai_schema import ToolCall as AnyCall

MOST = 256
"""Names that are told."""


class _Part(ContentPart, frozen=True, kw_only=True, forbid_unknown_fields=True):
    annotations: Any = None
    logprobs: Any = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class _Called(FunctionCall, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Call(AnyCall, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: _Called
    index: Any = None


class _Message(ChatMessage, frozen=True, kw_only=True):
    content: str | list[_Part] | msgspec.UnsetType | None = msgspec.UNSET  # type: ignore[assignment]
    tool_calls: list[_Call] | None = None  # type: ignore[assignment]
    function_call: _Called | None = None


class _Spec(FunctionSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Tool(AnyTool, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: _Spec
    cache_control: Any = None


class _Schema(JsonSchema, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Structure(Structure, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Format(ResponseFormat, frozen=True, kw_only=True):
    json_schema: _Schema | None = None
    structures: list[_Structure] | None = None  # type: ignore[assignment]


KINDS: dict[str, Any] = {
    "messages": list[_Message] | None,
    "tools": list[_Tool] | None,
    "response_format": _Format | None,
}
"""The fields that are looked into. What clients send back as it came to them, and hints without effect, are known."""
_OF: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    _Part: ContentPart,
    _Called: FunctionCall,
    _Call: AnyCall,
    _Spec: FunctionSpec,
    _Tool: AnyTool,
    _Schema: JsonSchema,
    _Structure: Structure,
}
"""What of them has an effect."""
_tables = {kind: refused.Table({}, of.__struct_encode_fields__) for kind, of in _OF.items()}
_readers = {name: msgspec.json.Decoder(kind) for name, kind in KINDS.items()}


def unknown_within(raw: Mapping[str, msgspec.Raw]) -> list[str]:
    """Of a request's raw fields, which were understood. Raises UnsupportedFeature."""
    out: list[str] = []
    for name, reader in _readers.items():
        if name not in raw:
            continue
        try:
            reader.decode(raw[name])
        except msgspec.ValidationError:
            _walk(msgspec.json.decode(raw[name]), KINDS[name], name, out)
    return out[:MOST]


def _walk(value: Any, kind: Any, where: str, out: list[str]) -> None:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
    for one in kinds:
        if isinstance(value, list) and typing.get_origin(one) is list:
            for number, item in enumerate(value):
                _walk(item, typing.get_args(one)[0], f"{where}[{number}]", out)
        elif isinstance(value, dict) and isinstance(one, type) and issubclass(one, msgspec.Struct):
            hints = typing.get_type_hints(one)
            fields = dict(zip(one.__struct_encode_fields__, one.__struct_fields__, strict=True))
            for name, inner in value.items():
                if name in fields:
                    _walk(inner, hints[fields[name]], f"{where}.{name}", out)
                elif one.__struct_config__.forbid_unknown_fields:
                    known = refused.check_value(_tables[one], name, inner, f"{where}.")
                    if not known and len(out) < MOST:
                        out.append(f"{where}.{name}"[:200])
