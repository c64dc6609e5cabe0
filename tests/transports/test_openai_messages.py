"""What chats may say of calls, results and tools, and what of their fields is looked into."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.transports.openai import parse_chat, parse_completion

USER = {"role": "user", "content": "x"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(config: Config | None = None, **fields: Any) -> Any:
    return parse_chat(msgspec.json.encode({"model": "brook", "messages": [USER], **fields}), config or Config())


def blamed(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value.param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, RESULT], "messages[1].role"),
        ([RESULT], "messages[0].role"),
        ([USER, {"role": "assistant", "content": "7"}, RESULT], "messages[2].role"),
        ([USER, {"role": "assistant", "content": "7", "tool_calls": []}, RESULT], "messages[2].role"),
        ([USER, CALLED, RESULT | {"tool_call_id": "call_2"}], "messages[2].tool_call_id"),
        ([USER, CALLED, {"role": "tool", "content": "7"}], "messages[2].tool_call_id"),
        ([USER, CALLED, RESULT | {"tool_call_id": ""}], "messages[2].tool_call_id"),
    ],
)
def test_a_result_without_its_call_is_refused(messages: list[Any], param: str) -> None:
    assert blamed(messages=messages) == param


@pytest.mark.parametrize(
    "messages",
    [
        [USER, CALLED, RESULT, USER],
        [USER, CALLED, RESULT, {"role": "assistant", "content": "7"}, RESULT],
        [USER, CALLED, USER],
        [USER, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "7"}],
        [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}, {"role": "function", "name": "f", "content": "7"}],
        [USER, {"role": "assistant", "content": "7", "tool_calls": []}, USER],
    ],
)
def test_histories_of_other_servers_are_taken(messages: list[Any]) -> None:
    """Calls that were cut off, that nobody answered, that have no id."""
    parse(messages=messages)


@pytest.mark.parametrize("name", ["", "get weather", "get.weather", "wetter_für", "a" * 65, "a\n", "f;"])
def test_names_that_cannot_be_called_are_refused(name: str) -> None:
    assert blamed(tools=[TOOL, {"type": "function", "function": {"name": name}}]) == "tools[1].function.name"


def test_two_functions_of_a_name_are_refused() -> None:
    assert blamed(tools=[TOOL, TOOL]) == "tools[1].function.name"
    parse(tools=[TOOL, {"type": "function", "function": {"name": "a-Z_9" + "a" * 59}}])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "zzz"}, "reasoning_effort"),
        ({"service_tier": "zzz"}, "service_tier"),
        ({"service_tier": 1}, "service_tier"),
        ({"prediction": {"type": "zz"}}, "prediction"),
        ({"prediction": {"type": "zz", "content": "x"}}, "prediction"),
        ({"prediction": "x"}, "prediction"),
        ({"metadata": {"a": 3}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"safety_identifier": 3}, "safety_identifier"),
        ({"prompt_cache_key": []}, "prompt_cache_key"),
        ({"prompt_cache_options": "explicit"}, "prompt_cache_options"),
    ],
)
def test_hints_of_another_form_are_named(fields: dict[str, Any], param: str) -> None:
    assert blamed(**fields) == param
    if param != "reasoning_effort":
        with pytest.raises(InvalidRequest) as caught:
            parse_completion(msgspec.json.encode({"model": "brook", "prompt": "x", **fields}), Config())
        assert caught.value.param == param


def test_hints_are_taken() -> None:
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", None):
        parse(reasoning_effort=effort)
    fields = {"service_tier": "flex", "prediction": {"type": "content", "content": "x"}, "metadata": {"a": "3"}}
    assert parse(**fields).ignored == []
    assert parse(**dict.fromkeys(fields)).ignored == []


NESTED: dict[str, Any] = {
    "messages": [
        USER | {"mood": "good"},
        {"role": "user", "content": [{"type": "text", "text": "x", "colour": 1, "cache_control": {"type": "ephemeral"}}]},
        {**CALLED, "tool_calls": [CALL | {"foo": 1, "index": 0, "function": {**CALL["function"], "bar": 2}}]},  # type: ignore[dict-item]
    ],
    "tools": [TOOL | {"foo": 1}, {"type": "function", "function": {"name": "g", "bar": 2, "parameters": {"type": "object", "any": 1}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "any": 1}, "foo": 1}},
}
NAMES = [
    "messages[1].content[0].colour",
    "messages[2].tool_calls[0].foo",
    "messages[2].tool_calls[0].function.bar",
    "tools[0].foo",
    "tools[1].function.bar",
    "response_format.json_schema.foo",
]


def test_unknown_fields_within_objects_are_named() -> None:
    """Those of messages go to the template, those of schemas to whoever obeys them."""
    assert sorted(parse(**NESTED).ignored) == sorted(NAMES)
    with pytest.raises(InvalidRequest) as caught:
        parse(Config(strict_fields=True), **NESTED)
    assert caught.value.param in NAMES
    parse(Config(strict_fields=True), messages=[USER | {"mood": "good"}], tools=[TOOL])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "g", "Strict": True}}]}, "tools[0].function.Strict"),
        ({"tools": [TOOL, {"Type": "web", "function": {"name": "g"}}]}, "tools[1].Type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "Text": "y"}]}]}, "messages[0].content[0].Text"),
        ({"messages": [{**CALLED, "tool_calls": [CALL | {"ID": "x"}]}]}, "messages[0].tool_calls[0].ID"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "Schema": {"type": "null"}}}}, "response_format.json_schema.Schema"),
    ],
)  # fmt: skip
def test_known_fields_within_objects_in_another_spelling_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert "Its name here is" in caught.value.message


def test_spellings_that_ask_for_nothing_are_taken_and_those_of_hints_named() -> None:
    assert parse(tools=[{"type": "function", "Type": None, "function": {"name": "g", "Strict": None}}]).ignored == []
    assert parse(tools=[TOOL | {"cacheControl": {}}]).ignored == ["tools[0].cacheControl"]


def test_tools_of_other_types_are_unsupported() -> None:
    for tool in ({"type": "custom", "custom": {"name": "f"}}, {"type": "web_search"}, {"type": "custom", "function": {"name": "f"}}):
        with pytest.raises(UnsupportedFeature) as caught:
            parse(tools=[TOOL, tool])
        assert caught.value.param == "tools[1].type"
    assert blamed(tools=[TOOL, {"type": "function"}]) is not None
