"""Which calls of tools an answer may, or must, have.

What it is: `Calling`, which says it where a request says more than that there are tools, and `calling_of`, which makes it of OpenAI's fields (tools,
tool_choice), for HTTP and Python alike.
What it does not know: how a model writes calls, grammars' languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature

ANY = '{"type":"object"}'
NONE = '{"type":"object","properties":{},"additionalProperties":false}'
"""What arguments obey where a function says nothing: it takes any, or has no parameters."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """One that may be called. `schema` (JSON) is what its arguments obey, `field` what the client calls that. `hint`: of arguments that need not obey it, the
    function's own schema all the same, for formats that spell arguments by their names."""

    name: str
    schema: str
    field: str
    hint: str = ""


class Calling(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of an answer are of these `functions` and no others, with arguments that obey their schemas. `field` is what asks for it, for errors."""

    functions: list[Function]
    must: bool = False
    """At least one call, and no content."""
    named: bool = False
    """The request named the one function: then OpenAI's finish_reason is "stop"."""
    field: str = "tool_choice"


class Offered(NamedTuple):
    """A function of a request's tools."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool


class _Function(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, frozen=True):
    function: _Function


def offered_of(tools: Any) -> list[Offered]:
    """Of tools as Python gives them. Raises InvalidRequest."""
    try:
        found = msgspec.convert(tools, list[_Tool])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"tools cannot be read: {error}."[:300], param="tools") from None
    return [Offered(tool.function.name, tool.function.parameters, bool(tool.function.strict)) for tool in found]


class _Name(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: _Name
    type: str = "function"


class _Allowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: str
    tools: list[_Named]


class _AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    allowed_tools: _Allowed


def calling_of(offered: Sequence[Offered], choice: Any, answer: str = "") -> Calling | None:
    """None: no calls, or whatever the model makes of them. `choice` is tool_choice as JSON has it; `answer` the field of a grammar that an answer without
    calls obeys. Raises InvalidRequest naming the field."""
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise InvalidRequest("tool_choice must be 'none', 'auto', 'required' or an object.", param="tool_choice")
    if choice is not None and not isinstance(choice, (str, dict)):
        raise InvalidRequest("tool_choice must be a word or an object.", param="tool_choice")
    if choice not in (None, "none") and not offered:
        raise InvalidRequest("tool_choice is only allowed when tools are given.", param="tool_choice")
    if not offered or choice == "none":
        return None
    must, named, wanted = choice == "required", False, None
    if isinstance(choice, dict):
        must, named, wanted = _wanted(choice, [function.name for function in offered])
    strict = next((i for i, function in enumerate(offered) if function.strict), None)
    if choice in (None, "auto") and strict is None and not answer:
        return None
    seen: set[str] = set()
    functions: list[Function] = []
    for i, function in enumerate(offered):
        if function.name in seen:
            raise InvalidRequest(
                f"tools[{i}].function.name: there are two functions {function.name[:80]!r}.", param=f"tools[{i}].function.name"
            )
        seen.add(function.name)
        if wanted is None or function.name in wanted:
            field = f"tools[{i}].function.parameters"
            if must or function.strict:
                functions.append(Function(name=function.name, schema=_schema(function, field), field=field))
            else:
                hint = msgspec.json.encode(function.parameters or {}).decode()
                functions.append(Function(name=function.name, schema=ANY, field=field, hint=hint))
    asks = "tool_choice" if choice not in (None, "auto") else answer if strict is None else f"tools[{strict}].function.strict"
    return Calling(functions=functions, must=must, named=named, field=asks)


def _wanted(choice: dict[str, Any], known: list[str]) -> tuple[bool, bool, set[str]]:
    """Of an object: (must there be a call, is it of the named function, the functions' names)."""
    kind = choice.get("type")
    try:
        if kind == "function":
            names, must, named = [msgspec.convert(choice, _Named).function.name], True, True
        elif kind == "allowed_tools":
            allowed = msgspec.convert(choice, _AllowedTools).allowed_tools
            if allowed.mode not in ("auto", "required"):
                raise InvalidRequest(
                    f"tool_choice.allowed_tools.mode must be 'auto' or 'required', but is {allowed.mode[:80]!r}.",
                    param="tool_choice.allowed_tools.mode",
                )
            if not allowed.tools:
                raise InvalidRequest("tool_choice.allowed_tools.tools must not be empty.", param="tool_choice.allowed_tools.tools")
            names, must, named = [tool.function.name for tool in allowed.tools], allowed.mode == "required", False
        else:
            raise UnsupportedFeature(
                f"tool_choice of the type {str(kind)[:80]!r} is not supported. Its types here are function and allowed_tools.",
                param="tool_choice",
            )
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"tool_choice cannot be read: {error}."[:300], param="tool_choice") from None
    for name in names:
        if name not in known:
            raise InvalidRequest(f"tool_choice names the function {name[:80]!r}, which is not among tools.", param="tool_choice")
    return must, named, set(names)


def _schema(function: Offered, field: str) -> str:
    """What its arguments obey: an object, always."""
    if function.parameters is None:
        return NONE
    kind = function.parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(f"{field} must be the schema of an object, but its type is {str(kind)[:80]!r}.", param=field)
    schema = {**function.parameters, "type": "object"}
    if "$ref" in schema and "/draft-0" in str(schema.get("$schema")):  # there what stands beside it says nothing
        kept: dict[str, Any] = {name: schema[name] for name in ("$schema", "$defs", "definitions", "type") if name in schema}
        schema = {**kept, "allOf": [{"$ref": schema["$ref"]}]}
    return msgspec.json.encode(schema).decode()
