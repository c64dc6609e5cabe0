"""Anthropic's tools, thinking and output formats as fields of the chat that text knows.

What it is: `options_of`: `tools` and `tool_choice` become OpenAI's, `thinking` what chat templates call it, `output_config` a response_format and a
reasoning_effort; and `blamed`, what the chat's errors about these fields say with Anthropic's names.
What it does not know: conversations (anthropic_turns.py), what the chat can do of it (openai.py says no), chat templates.
"""

from __future__ import annotations

import re
from typing import Any

from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.transports.anthropic_schema import CountTokensRequest, text_of, values_of

FORMAT, OLD_FORMAT = "output_config.format", "output_format"

LEAST_BUDGET = 1024
"""Tokens: of thinking.budget_tokens."""

SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the switch for thinking: Qwen's, GLM's and SmolLM's the one, DeepSeek's, Granite's and Kimi's the other. A template does not see
a name that it does not use."""

EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""output_config.effort as reasoning_effort, of which models know three."""

_KINDS = ("auto", "any", "tool", "none")
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "defer_loading": (None, False),
    "allowed_callers": (None, [], ["direct"]),
    "input_examples": (None, []),
}
"""Fields of a tool that ask for what does not exist here, with the values that do not."""


def options_of(request: CountTokensRequest, max_tokens: int | None, continued: str) -> dict[str, Any]:
    """Fields of a chat. `continued` as in anthropic_turns.Chat. Raises InvalidRequest or UnsupportedFeature naming the field."""
    return {
        **_tools(request.tools or [], request.tool_choice),
        **_thinking(request.thinking, max_tokens, continued),
        **_output(request.output_config, request.output_format),
    }


# ------------------------------------------------------------------ tools


def _tools(tools: list[dict[str, Any]], choice: dict[str, Any] | None) -> dict[str, Any]:
    names: set[str] = set()
    out: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        out.append({"type": "function", "function": _function(tool, f"tools[{index}]")})
        name = out[-1]["function"]["name"]
        if name in names:
            raise InvalidRequest(f"tools[{index}].name {name[:80]!r} is another tool's.", param=f"tools[{index}].name")
        names.add(name)
    return {**({"tools": out} if out else {}), **(_choice(choice, names) if choice is not None else {})}


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        said = kind[:80] if isinstance(kind, str) else kind
        raise UnsupportedFeature(
            f"{where}.type {said!r:.80} is not supported here: this server has no tools of its own. Give the tool a name, a description and an input_schema.",
            param=f"{where}.type",
        )
    known = ("name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming", *_ASKS_NOTHING)
    values_of(tool, where, *known, kind="a tool")
    for name, neutral in _ASKS_NOTHING.items():
        if not any(tool.get(name) == one and type(tool.get(name)) is type(one) for one in neutral):
            raise UnsupportedFeature(f"{where}.{name} is not supported here. Leave it out.", param=f"{where}.{name}")
    function: dict[str, Any] = {"name": text_of(tool, where, "name")}
    if tool.get("description") is not None:
        function["description"] = text_of(tool, where, "description", empty=True)
    schema = tool.get("input_schema")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidRequest(f"{where}.input_schema must be a JSON schema of type object.", param=f"{where}.input_schema")
    function["parameters"] = schema if "type" in schema else {"type": "object", **schema}
    for name in ("strict", "eager_input_streaming"):
        if not isinstance(tool.get(name), bool | None):
            raise InvalidRequest(f"{where}.{name} must be true or false.", param=f"{where}.{name}")
    return {**function, "strict": True} if tool.get("strict") else function


def _choice(choice: dict[str, Any], names: set[str]) -> dict[str, Any]:
    kind = choice.get("type")
    if kind not in _KINDS:
        raise InvalidRequest("tool_choice.type must be 'auto', 'any', 'tool' or 'none'.", param="tool_choice.type")
    known = {"tool": ("name", "disable_parallel_tool_use"), "none": ()}.get(kind, ("disable_parallel_tool_use",))
    values_of(choice, "tool_choice", *known, kind=f"a tool_choice of type {kind!r}")
    alone = choice.get("disable_parallel_tool_use")
    if not isinstance(alone, bool | None):
        raise InvalidRequest("tool_choice.disable_parallel_tool_use must be true or false.", param="tool_choice.disable_parallel_tool_use")
    more = {"parallel_tool_calls": False} if alone else {}
    if kind != "tool":
        return {"tool_choice": "required" if kind == "any" else kind, **more}
    name = text_of(choice, "tool_choice", "name")
    if name not in names:
        raise InvalidRequest(f"tool_choice.name {name[:80]!r} is none of the tools.", param="tool_choice.name")
    return {"tool_choice": {"type": "function", "function": {"name": name}}, **more}


# ------------------------------------------------------------------ thinking


def _thinking(thinking: dict[str, Any] | None, max_tokens: int | None, continued: str) -> dict[str, Any]:
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise InvalidRequest("thinking.type must be 'enabled', 'disabled' or 'adaptive'.", param="thinking.type")
    known = {"enabled": ("budget_tokens", "display"), "adaptive": ("display",)}.get(kind, ())
    values_of(thinking, "thinking", *known, kind=f"thinking of type {kind!r}")
    if thinking.get("display") not in (None, "summarized", "omitted"):
        raise InvalidRequest("thinking.display must be 'summarized' or 'omitted'.", param="thinking.display")
    if kind == "enabled":
        _check_budget(thinking.get("budget_tokens"), max_tokens)
        if continued:
            raise InvalidRequest(f"{continued}: while thinking is enabled, the assistant's words cannot be given.", param=continued)
    return {"chat_template_kwargs": dict.fromkeys(SWITCHES, kind != "disabled")}


def _check_budget(budget: Any, max_tokens: int | None) -> None:
    """It is a target there, too, and no bound: models here end their thinking themselves."""
    param = "thinking.budget_tokens"
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < LEAST_BUDGET:
        raise InvalidRequest(f"{param} must be a number from {LEAST_BUDGET}.", param=param)
    if max_tokens is not None and budget >= max_tokens:
        raise InvalidRequest(f"{param} must be less than max_tokens, which is {max_tokens}.", param=param)


def names_a_tool(request: CountTokensRequest) -> bool:
    """Of a request that was understood."""
    return request.tool_choice is not None and request.tool_choice.get("type") == "tool"


def omits_thinking(request: CountTokensRequest) -> bool:
    """Of a request that was understood."""
    return request.thinking is not None and request.thinking.get("display") == "omitted"


# ------------------------------------------------------------------ the answer's form


def _output(config: dict[str, Any] | None, old: dict[str, Any] | None) -> dict[str, Any]:
    config = config or {}
    values_of(config, "output_config", "effort", "format", kind="output_config", typed=False)
    out: dict[str, Any] = {}
    effort = config.get("effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise InvalidRequest(f"output_config.effort must be one of {', '.join(EFFORTS)}.", param="output_config.effort")
        out["reasoning_effort"] = EFFORTS[effort]
    given = [(where, one) for where, one in ((FORMAT, config.get("format")), (OLD_FORMAT, old)) if one is not None]
    if len(given) > 1:
        raise InvalidRequest("output_format and output_config.format cannot both be given.", param="output_format")
    for where, one in given:
        if not isinstance(one, dict) or one.get("type") != "json_schema":
            raise InvalidRequest(f"{where} must be an object of type 'json_schema'.", param=where)
        values_of(one, where, "schema", kind="a format")
        if not isinstance(one.get("schema"), dict):
            raise InvalidRequest(f"{where}.schema must be a JSON schema.", param=f"{where}.schema")
        out["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": one["schema"]}}
    return out


# ------------------------------------------------------------------ errors

_PLAIN = [
    (re.compile(r"(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"response_format\.json_schema\.schema"), "{format}.schema"),
]
"""Names that no client of Anthropic's sends."""
_NAMES = [
    *_PLAIN,
    (re.compile(r"response_format(\.json_schema)?"), "{format}"),
    (re.compile(r"parallel_tool_calls"), "tool_choice.disable_parallel_tool_use"),
    (re.compile(r"chat_template_kwargs"), "thinking"),
    (re.compile(r"reasoning_effort"), "output_config.effort"),
    (re.compile(r"^stop$"), "stop_sequences"),
]


_LEAVE_OUT = ", leave it out to use what is left"
"""What text says of a max_tokens that does not fit: here it is required."""


def renamed(text: str, form: str = "") -> str:
    """A text with the chat's names of fields, as Anthropic has them. `form` is what the request calls the answer's form; without it only what cannot be a
    field that the client itself has sent (and that is unknown here) is renamed."""
    for pattern, own in _NAMES if form else _PLAIN:
        text = pattern.sub(own.replace("{format}", form or FORMAT), text)
    return text


def form_of(request: CountTokensRequest) -> str:
    """What it calls the answer's form."""
    return OLD_FORMAT if request.output_format is not None else FORMAT


def blamed(error: PenstockError, form: str = "") -> str:
    """What an error of the chat, or of text, says, with Anthropic's name of the field: Anthropic's errors have no other place for it."""
    message = renamed(error.message, form).replace(_LEAVE_OUT, "")
    param = None if error.param is None else renamed(error.param, form)
    return message if param is None or param in message else f"{param}: {message}"
