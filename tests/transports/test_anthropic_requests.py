"""Anthropic's tools, tool results, thinking and output formats: what text is told, what is refused by name, and that each status on the page is so."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, hello_script
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge
from penstock.core.protocol.messages import Query, Rejected, Submit
from penstock.transports.anthropic import parse_count, parse_messages
from penstock.transports.anthropic_schema import NOT_YET
from penstock.transports.anthropic_statuses import NESTED
from penstock.transports.anthropic_thinking import UNSIGNED, sealed

PATH, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
CONFIG = Config()

USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "7 degrees"}
HI: dict[str, Any] = {"model": "brook", "max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    shared_edge.text.script = hello_script
    return shared_edge


def understood(**fields: Any) -> Any:
    generation, _ = parse_messages(json.dumps(HI | fields).encode(), CONFIG)
    return generation


def chat(*turns: tuple[str, Any], **fields: Any) -> list[Any]:
    """The messages that turns become."""
    messages = [{"role": role, "content": content} for role, content in turns]
    found: list[Any] = json.loads(understood(messages=messages, **fields).prompts[0]["messages"])
    return found


def refusal(*turns: tuple[str, Any], **fields: Any) -> str:
    given = {"messages": [{"role": role, "content": content} for role, content in turns]} if turns else {}
    with pytest.raises(InvalidRequest) as raised:
        understood(**given, **fields)
    assert raised.value.param is not None
    assert raised.value.param in raised.value.message
    return raised.value.message


# ------------------------------------------------------------------ conversations


def test_a_call_and_its_result() -> None:
    turns = chat(
        ("user", "Oslo?"), ("assistant", [{"type": "text", "text": "I look."}, USE]), ("user", [RESULT, {"type": "text", "text": "So?"}])
    )
    call = {"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    assert turns == [
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "name": "get_weather", "content": "7 degrees"},
        {"role": "user", "content": "So?"},
    ]


def test_calls_without_text_and_results_of_many_kinds() -> None:
    uses = [{**USE, "id": f"t{number}", "input": {"city": "Århus"}, "cache_control": {"type": "ephemeral"}} for number in range(4)]
    blocks = [{"type": "text", "text": "a", "cache_control": None}, {"type": "text", "text": "b"}]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": "t3", "content": blocks},
        {"type": "tool_result", "tool_use_id": "t0"},
        {"type": "tool_result", "tool_use_id": "t1", "content": "No such city", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "error: no"}], "is_error": True},
    ]
    turns = chat(("user", "x"), ("assistant", uses[:2]), ("assistant", uses[2:]), ("user", results[:1]), ("user", results[1:]))
    assert turns[1]["content"] is None
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["t0", "t1", "t2", "t3"]
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Århus"}'
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [(turn["tool_call_id"], turn["content"]) for turn in turns[2:]] == [
        ("t3", parts),
        ("t0", ""),
        ("t1", "Error: No such city"),
        ("t2", "error: no"),
    ]


def test_thinking_in_a_history() -> None:
    said = [
        {"type": "thinking", "thinking": "Hm.", "signature": UNSIGNED},
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        {"type": "thinking", "thinking": "", "signature": sealed("Well.")},
        {"type": "text", "text": "Yes."},
    ]
    assert chat(("user", "x"), ("assistant", said), ("user", "y"))[1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.\nWell.",
    }
    only = chat(("user", "x"), ("assistant", said[:1]), ("user", "y"))[1]
    assert only == {"role": "assistant", "content": None, "reasoning_content": "Hm."}


def test_system_turns() -> None:
    turns = chat(("user", "x"), ("assistant", "y"), ("system", [{"type": "text", "text": "Be brief."}]), ("user", "z"), system="Be kind.")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be kind."),
        ("user", "x"),
        ("assistant", "y"),
        ("system", "Be brief."),
        ("user", "z"),
    ]


ASKED = [("user", "x"), ("assistant", [USE])]
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("turns", "where"),
    [
        ([("user", "x"), ("assistant", "y"), ("user", [RESULT])], "messages[2].content[0].tool_use_id 'toolu_1' answers nothing"),
        ([*ASKED, ("user", [RESULT, RESULT])], "messages[2].content[1].tool_use_id 'toolu_1' has a tool_result already"),
        ([("user", "x"), ("assistant", [{**USE, "id": "a b"}]), ("user", "y")], "messages[1].content[0].id must be letters"),
        ([*ASKED, ("user", "y")], "messages[1].content[0]: this tool_use has no tool_result"),
        ([*ASKED, ("system", "y"), ("user", [RESULT])], "messages[1].content[0]: this tool_use has no tool_result"),
        (ASKED, "messages[1].content: the last turn has a tool_use"),
        ([("user", [RESULT])], "messages[0].content[0].tool_use_id 'toolu_1' answers nothing"),
        ([*ASKED, ("user", [RESULT, RESULT])], "messages[2].content[1].tool_use_id 'toolu_1'"),
        ([*ASKED, ("user", [RESULT]), ("assistant", "z"), ("user", [RESULT])], "messages[4].content[0].tool_use_id"),
        ([*ASKED, ("user", [{"type": "text", "text": "y"}, RESULT])], "messages[2].content[1]: a tool_result must stand before"),
        ([*ASKED, ("user", [{**RESULT, "content": [IMAGE]}])], "messages[2].content[0].content[0]: content of type 'image'"),
        ([*ASKED, ("user", [{**RESULT, "content": [USE]}])], "messages[2].content[0].content[0]: a block of type 'tool_use' has no place"),
        ([*ASKED, ("user", [{**RESULT, "content": ["y"]}])], "messages[2].content[0].content must"),
        ([*ASKED, ("user", [{**RESULT, "content": 7}])], "messages[2].content[0].content must"),
        ([*ASKED, ("user", [{**RESULT, "is_error": "no"}])], "messages[2].content[0].is_error must"),
        ([*ASKED, ("user", [{**RESULT, "weight": 1}])], "messages[2].content[0].weight is not a field"),
        ([*ASKED, ("user", [{**RESULT, "toolset_name": "t"}])], "messages[2].content[0].toolset_name is not supported"),
        ([*ASKED, ("user", [{**RESULT, "tool_use_id": ""}])], "messages[2].content[0].tool_use_id must"),
        ([("user", [USE])], "messages[0].content[0]: a block of type 'tool_use' has no place here"),
        ([("user", "x"), ("assistant", [RESULT]), ("user", "y")], "messages[1].content[0]: a block of type 'tool_result' has no place"),
        ([("user", "x"), ("assistant", [USE, USE]), ("user", "y")], "messages[1].content[1].id 'toolu_1' is another"),
        ([("user", "x"), ("assistant", [{**USE, "input": "{}"}]), ("user", "y")], "messages[1].content[0].input must be an object"),
        ([("user", "x"), ("assistant", [{**USE, "name": ""}]), ("user", "y")], "messages[1].content[0].name must"),
        ([("user", "x"), ("assistant", [{**USE, "id": None}]), ("user", "y")], "messages[1].content[0].id must"),
        ([("user", "x"), ("assistant", [{"type": "thinking", "thinking": 7}]), ("user", "y")], "messages[1].content[0].thinking must"),
        (
            [("user", "x"), ("assistant", [{"type": "thinking", "thinking": "", "signature": sealed("Hm.")[:-1]}]), ("user", "y")],
            "messages[1].content[0].signature was changed",
        ),
        (
            [("user", "x"), ("assistant", [{"type": "thinking", "thinking": "", "signature": 7}]), ("user", "y")],
            "messages[1].content[0].signature must",
        ),
        ([("user", [{"type": "thinking", "thinking": "x"}])], "messages[0].content[0]: a block of type 'thinking' has no place"),
        ([("user", "x"), ("assistant", [{"type": "thinking", "thinking": "x"}])], "messages[1].content: the assistant's final words"),
        ([("system", [IMAGE]), ("user", "x")], "messages[0].content[0]: content of type 'image'"),
    ],
)
def test_what_a_conversation_may_not_be(turns: Any, where: str) -> None:
    assert refusal(*turns).startswith(where)


BLOCKS = st.sampled_from(
    [
        {"type": "text", "text": "a"},
        {"type": "text", "text": ""},
        USE,
        {**USE, "id": "toolu_2"},
        RESULT,
        {**RESULT, "tool_use_id": "toolu_2"},
        {"type": "thinking", "thinking": "b", "signature": "c"},
    ]
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.lists(BLOCKS, max_size=4)), min_size=1, max_size=5))
def test_whatever_is_taken_has_each_call_answered_once_and_no_text_lost(turns: Any) -> None:
    try:
        messages = chat(*turns)
    except InvalidRequest:
        refusal(*turns)
        return
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
        else:
            assert not waiting
        waiting += [call["id"] for call in message.get("tool_calls", ())]
    assert not waiting
    said = "".join(block["text"] for _, blocks in turns for block in blocks if block["type"] == "text")
    shown = [message["content"] for message in messages if message["role"] != "tool"]
    texts = [one if isinstance(one, str) else "".join(part["text"] for part in one or ()) for one in shown]
    assert "".join(texts) == said


# ------------------------------------------------------------------ tools


def test_tools_and_choices() -> None:
    generation = understood(tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}, {"name": "now", "input_schema": {}}])
    assert json.loads(generation.prompts[0]["tools"]) == [
        {"type": "function", "function": FUNCTION},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
    ]
    assert (generation.split, generation.parallel_calls) == (True, True)
    assert not understood(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).parallel_calls
    assert understood(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": False}).parallel_calls
    assert "tools" not in understood(tools=[TOOL], tool_choice={"type": "none"}).prompts[0]


FORCED: list[tuple[dict[str, Any], Any]] = [
    ({"type": "any"}, "required"),
    ({"type": "tool", "name": "get_weather"}, {"type": "function", "function": {"name": "get_weather"}}),
]


def told(edge: Edge, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """What text was told, or the error."""
    before = len(edge.text.received)
    reply = edge.kept.post(path, json=body)
    if reply.status_code != 200:
        return reply.status_code, reply.json()["error"]["message"]
    (submit,) = [msgspec.structs.asdict(one) for one in edge.text.received[before:] if isinstance(one, Submit)]
    return 200, {name: submit[name] for name in ("messages", "tools", "grammar", "split", "parallel_calls", "template_kwargs", "explicit")}


@pytest.mark.parametrize(("choice", "chats"), FORCED, ids=["any", "tool"])
@pytest.mark.parametrize("alone", [True, False])
def test_forced_calls_are_the_chats(edge: Edge, choice: dict[str, Any], chats: Any, alone: bool) -> None:
    """Whatever the chat makes of them, this does: refused with the same words, or told to text alike."""
    mine = told(edge, PATH, {**HI, "tools": [TOOL], "tool_choice": {**choice, "disable_parallel_tool_use": alone}})
    function: dict[str, Any] = {"type": "function", "function": FUNCTION}
    more = {"parallel_tool_calls": False} if alone else {}
    theirs = told(edge, CHAT, {**HI, "tools": [function], "tool_choice": chats, **more})
    assert mine[0] == theirs[0]
    if mine[0] == 200:
        assert mine[1]["grammar"] is None or "function" not in mine[1]["grammar"].field
        assert {**mine[1], "grammar": None} == {**theirs[1], "grammar": None}
    else:
        assert mine == theirs
        assert mine[1].startswith("tool_choice")


@pytest.mark.parametrize("name", ["output_config.format", "output_format"])
def test_a_form_beside_tools_is_the_chats(edge: Edge, name: str) -> None:
    asks = {"output_format": FORM} if name == "output_format" else {"output_config": {"format": FORM}}
    mine = told(edge, PATH, {**HI, "tools": [TOOL], **asks})
    form = {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}}
    theirs = told(edge, CHAT, {**HI, "tools": [{"type": "function", "function": FUNCTION}], "response_format": form})
    assert mine[0] == theirs[0]
    if mine[0] == 400:
        assert mine[1].startswith(f"{name}.schema ")
    else:
        assert mine[1]["grammar"].field == f"{name}.schema"


def test_what_text_says_about_the_chats_fields_has_anthropics_names(edge: Edge) -> None:
    for param, message, expected in (
        ("tools[1].function.parameters", "tools[1].function.parameters: no.", "tools[1].input_schema: no."),
        ("tools[1].function.strict", "Not strict.", "tools[1].strict: Not strict."),
        ("response_format.json_schema.schema", "Too much.", "output_config.format.schema: Too much."),
        (None, "Full stop.", "Full stop."),
    ):
        edge.text.script = lambda submit, said=message, param=param: [
            Rejected(key=submit.key, status=400, type="x", code="invalid_value", message=said, param=param)
        ]
        try:
            assert told(edge, PATH, HI) == (400, expected)
        finally:
            edge.text.script = hello_script


def test_strict_is_the_chats(edge: Edge) -> None:
    mine = told(edge, PATH, {**HI, "tools": [{**TOOL, "strict": True}]})
    theirs = told(edge, CHAT, {**HI, "tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]})
    assert mine[0] == theirs[0]
    if mine[0] == 400:
        assert mine[1].startswith("tools[0].strict")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name must"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name 'get_weather' is another"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema must"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema must"),
        ({"tools": [{**TOOL, "description": 7}]}, "tools[0].description must"),
        ({"tools": [{**TOOL, "strict": "yes"}]}, "tools[0].strict must"),
        ({"tools": [{**TOOL, "cache_control": "yes"}]}, "tools[0].cache_control must"),
        ({"tools": [{**TOOL, "colour": "red"}]}, "tools[0].colour is not a field"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type 'web_search_20250305' is not supported"),
        ({"tools": [{**TOOL, "type": 7}]}, "tools[0].type 7 is not supported"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading is not supported"),
        ({"tools": [{**TOOL, "input_examples": [{"city": "Oslo"}]}]}, "tools[0].input_examples is not supported"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers is not supported"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type must"),
        ({"tools": [TOOL], "tool_choice": {}}, "tool_choice.type must"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name 'f' is none of the tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name must"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name is not a field"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
            "tool_choice.disable_parallel_tool_use is not",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use must"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice is only allowed when tools are given"),
    ],
)
def test_what_tools_may_not_be(fields: Any, where: str) -> None:
    assert refusal(**fields).startswith(where)


# ------------------------------------------------------------------ thinking and the answer's form


def test_thinking_is_the_templates_switch() -> None:
    for thinking, switch in (
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
        ({"type": "disabled"}, False),
    ):
        kwargs = json.loads(understood(thinking=thinking).prompts[0]["template_kwargs"])
        assert kwargs == {"enable_thinking": switch, "thinking": switch}
    assert understood().prompts[0]["template_kwargs"] == b""


@pytest.mark.parametrize(
    ("thinking", "where"),
    [
        ({"type": "enabled"}, "thinking.budget_tokens must be a number"),
        ({"type": "enabled", "budget_tokens": 1023}, "thinking.budget_tokens must be a number"),
        ({"type": "enabled", "budget_tokens": True}, "thinking.budget_tokens must be a number"),
        ({"type": "enabled", "budget_tokens": 2000}, "thinking.budget_tokens must be less than max_tokens, which is 2000"),
        ({"type": "enabled", "budget_tokens": 1024, "display": "all"}, "thinking.display must"),
        ({"type": "enabled", "budget_tokens": 1024, "effort": "low"}, "thinking.effort is not a field"),
        ({"type": "adaptive", "budget_tokens": 1024}, "thinking.budget_tokens is not a field"),
        ({"type": "disabled", "display": "omitted"}, "thinking.display is not a field"),
        ({"type": "between_tools"}, "thinking.type must"),
        ({}, "thinking.type must"),
    ],
)
def test_what_thinking_may_not_be(thinking: Any, where: str) -> None:
    assert refusal(thinking=thinking).startswith(where)


def test_thinking_and_the_assistants_words_exclude_each_other() -> None:
    turns = [("user", "x"), ("assistant", "y")]
    assert refusal(*turns, thinking={"type": "enabled", "budget_tokens": 1024}).startswith("messages[1].content: while thinking")
    assert chat(*turns, thinking={"type": "adaptive"})[1]["content"] == "y"


def test_the_answers_form() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields, name in (
        ({"output_config": {"format": form}}, "output_config.format.schema"),
        ({"output_format": form}, "output_format.schema"),
    ):
        grammar = understood(**fields).grammar
        assert (grammar.kind, json.loads(grammar.source), grammar.field) == ("json", SCHEMA, name)
    for effort, meant in (("low", "low"), ("max", "high"), ("xhigh", "high")):
        kwargs = json.loads(understood(output_config={"effort": effort}).prompts[0]["template_kwargs"])
        assert kwargs == {"reasoning_effort": meant}
    assert understood(output_config={"format": None, "effort": None}, output_format=None).grammar is None


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"output_config": {"effort": "huge"}}, "output_config.effort must"),
        ({"output_config": {"effort": ["low"]}}, "output_config.effort must"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget is not a field"),
        ({"output_config": {"type": "x"}}, "output_config.type is not a field"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format must"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema must"),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA, "strict": True}}, "output_format.strict is not a field"),
        (
            {"output_format": {"type": "json_schema", "schema": {}}, "output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "output_format and output_config.format",
        ),
    ],
)
def test_what_the_form_may_not_be(fields: Any, where: str) -> None:
    assert refusal(**fields).startswith(where)


def test_a_request_that_is_nested_too_deeply() -> None:
    body = json.dumps({**HI, "tools": [TOOL]}).encode()
    for depth in (200, 500, 900, 1100, 5000, 100_000):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        for start, end in (
            (b'"properties": {"city": {"type": "string"}}', b'"properties": ' + deep),
            (b'"messages": [', b'"messages": [' + use(deep)),
        ):
            with contextlib.suppress(InvalidRequest):
                parse_messages(body.replace(start, end), CONFIG)
                continue
            with pytest.raises(InvalidRequest, match="nested too deeply"):
                parse_messages(body.replace(start, end), CONFIG)


def use(deep: bytes) -> bytes:
    """Messages with a call of such arguments."""
    asks = b'{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": ' + deep + b"}]},"
    return b'{"role": "user", "content": "x"},' + asks + b'{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]},'


# ------------------------------------------------------------------ counting


def test_counting_asks_for_what_would_be_sent(edge: Edge) -> None:
    more = {"tools": [TOOL], "thinking": {"type": "adaptive"}, "system": "s", "output_config": {"effort": "low"}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
    before = len(edge.text.received)
    reply = edge.kept.post(COUNT, json={"model": "brook", "messages": messages, **more})
    assert reply.status_code == 200, reply.text
    (query,) = [one for one in edge.text.received[before:] if isinstance(one, Query) and one.what == "tokenize"]
    asked = json.loads(query.body)
    prompt = understood(messages=messages, **more).prompts[0]
    assert asked == {
        "messages": json.loads(prompt["messages"]),
        "tools": json.loads(prompt["tools"]),
        "chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "model_has": "messages",
    }
    with pytest.raises(InvalidRequest, match=r"budget_tokens must be a number"):
        parse_count(json.dumps({"model": "m", "messages": messages, "tools": [TOOL], "thinking": {"type": "enabled"}}).encode(), CONFIG)


# ------------------------------------------------------------------ statuses

THINKS = {"type": "thinking", "thinking": "b", "signature": "c"}
ANSWERED = [*ASKED, ("user", [RESULT])]


def turns(*given: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in given], "tools": [TOOL]}


def user(*blocks: Any) -> dict[str, Any]:
    return turns(("user", [{"type": "text", "text": "hi"}, *blocks]))


def assistant(*blocks: Any) -> dict[str, Any]:
    return turns(("user", "x"), ("assistant", [{"type": "text", "text": "hi"}, *blocks]), ("user", "y"))


def tool(**more: Any) -> dict[str, Any]:
    return {"tools": [TOOL | more]}


def choice(kind: str, **more: Any) -> dict[str, Any]:
    return {"tools": [TOOL], "tool_choice": {"type": kind, **more}}


def thinking(kind: str, **more: Any) -> dict[str, Any]:
    return {"thinking": {"type": kind, **({"budget_tokens": 1024} if kind == "enabled" else {}), **more}}


FORM = {"type": "json_schema", "schema": SCHEMA}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
EXAMPLES: dict[str, tuple[Any, Any, Any]] = {
    # name: (a request without it, one with it that is taken, one that is refused); None: there is none
    "text": (user(), user({"type": "text", "text": "ho"}), None),
    "text.cache_control": (user(), turns(("user", [{"type": "text", "text": "hi", **CACHED}])), None),
    "text.citations": (
        user(),
        turns(("user", [{"type": "text", "text": "hi", "citations": []}])),
        user({"type": "text", "text": "", "citations": [{}]}),
    ),
    "tool_use": (turns(("user", "x")), turns(*ANSWERED), None),
    "tool_use.caller": (
        turns(*ANSWERED),
        turns(ASKED[0], ("assistant", [{**USE, "caller": {"type": "direct"}}]), ANSWERED[2]),
        turns(ASKED[0], ("assistant", [{**USE, "caller": {"type": "code_execution_20250825"}}]), ANSWERED[2]),
    ),
    "tool_result": (turns(("user", "x")), turns(*ANSWERED), turns(*ASKED, ("user", [{**RESULT, "content": [IMAGE]}]))),
    "tool_result.is_error": (turns(*ANSWERED), turns(*ASKED, ("user", [{**RESULT, "is_error": True}])), None),
    "thinking": (assistant(), assistant(THINKS), None),
    "redacted_thinking": (assistant(), assistant({"type": "redacted_thinking", "data": "x"}), None),
    "tools[].name": (tool(), tool(name="other"), None),
    "tools[].description": (tool(), tool(description="other"), None),
    "tools[].input_schema": (tool(), tool(input_schema={"type": "object"}), None),
    "tools[].type": (tool(), tool(type="custom"), tool(type="bash_20250124")),
    "tools[].cache_control": (tool(), tool(**CACHED), None),
    "tools[].eager_input_streaming": (tool(), tool(eager_input_streaming=True), None),
    "tools[].input_examples": (tool(), tool(input_examples=[]), tool(input_examples=[{"city": "Oslo"}])),
    "tools[].defer_loading": (tool(), tool(defer_loading=False), tool(defer_loading=True)),
    "tools[].allowed_callers": (tool(), tool(allowed_callers=["direct"]), tool(allowed_callers=["code_execution_20250825"])),
    "tool_choice auto": (HI, choice("auto"), None),
    "tool_choice none": (tool(), choice("none"), None),
    "tool_choice.disable_parallel_tool_use": (tool(), choice("auto", disable_parallel_tool_use=True), None),
    "thinking enabled": (HI, thinking("enabled"), None),
    "thinking adaptive": (HI, thinking("adaptive"), None),
    "thinking disabled": (HI, thinking("disabled"), None),
    "thinking between_tools": (HI, None, thinking("between_tools")),
    "thinking.budget_tokens": (thinking("enabled"), thinking("enabled", budget_tokens=1999), thinking("enabled", budget_tokens=2000)),
    "output_config.format": (HI, {"output_config": {"format": FORM}}, None),
    "output_config.effort": (HI, {"output_config": {"effort": "low"}}, None),
    "output_format": (HI, {"output_format": FORM}, None),
}
ELSEWHERE = {"tool_choice any", "tool_choice tool", "tools[].strict", "thinking.display"}
"""Those that other tests here, or of the blocks, are about."""


@pytest.mark.parametrize("name", [name for name in NESTED if name not in ELSEWHERE])
def test_each_status_is_so(edge: Edge, name: str) -> None:
    status = NESTED[name]
    if name not in EXAMPLES:  # blocks that are refused whatever is in them
        assert status.word == "refused"
        for found in (user({"type": name}), assistant({"type": name})):
            code, said = told(edge, PATH, HI | found)
            assert (code, f"content of type '{name}' is not supported" in said) == (400, True)
        return
    without, taken, refused = EXAMPLES[name]
    if taken is not None:
        code, given = told(edge, PATH, HI | taken)
        assert code == 200
        same = told(edge, PATH, HI | without) == (code, given)
        assert same == (status.word != "works" and name != "tool_result"), (name, given)
    if refused is not None:
        code, said = told(edge, PATH, HI | refused)
        assert code == 400
        assert (name == "tool_result" and said.startswith("messages[2].content[0].content[0]")) or name.rpartition(".")[2].split()[
            0
        ] in said
    assert (refused is not None) or status.word in ("works", "no effect")


def test_no_status_is_left_over() -> None:
    assert EXAMPLES.keys() | ELSEWHERE <= NESTED.keys()
    assert all(status.why for status in NESTED.values() if status.word != "works")


@pytest.mark.parametrize("name", NOT_YET)
def test_each_field_that_is_not_there_is_refused_by_name(edge: Edge, name: str) -> None:
    code, said = told(edge, PATH, {**HI, name: {"x": 1}})
    assert (code, said.startswith(f"{name} is not supported here")) == (400, True)
    assert told(edge, PATH, {**HI, name: None}) == told(edge, PATH, HI)


def test_a_request_as_coding_agents_send_it(edge: Edge) -> None:
    """Much at once: cached system blocks, schemas with all their keywords, thinking, effort, hints, betas."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMA, "additionalProperties": False}
    reminder = {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"}
    body = {
        "model": "brook",
        "max_tokens": 2000,
        "stream": True,
        "system": [{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Rules.", **CACHED}],
        "messages": [
            {"role": "user", "content": [reminder, {"type": "text", "text": "Oslo?", **CACHED}]},
            {"role": "assistant", "content": [THINKS, {"type": "text", "text": "I look."}, USE, {**USE, "id": "toolu_2"}]},
            {"role": "user", "content": [RESULT, {**RESULT, "tool_use_id": "toolu_2", "is_error": True}, {**reminder, **CACHED}]},
        ],
        "tools": [{**TOOL, "input_schema": schema}, {"name": "now", "description": "", "input_schema": {"type": "object"}, **CACHED}],
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "adaptive", "display": "summarized"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14,context-management-2025-06-27"}
    before = len(edge.text.received)
    reply = edge.kept.post(f"{PATH}?beta=true", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.text.endswith('data: {"type":"message_stop"}\n\n')
    (submit,) = [one for one in edge.text.received[before:] if isinstance(one, Submit)]
    assert [message["role"] for message in json.loads(submit.messages)] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert [tool["function"]["name"] for tool in json.loads(submit.tools)] == ["get_weather", "now"]
    assert json.loads(submit.template_kwargs) == {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}


@pytest.mark.parametrize("parse", [parse_messages, parse_count])
def test_fields_are_counted_as_the_client_sent_them(parse: Any) -> None:
    tools = [{"name": f"tool_{i}", "input_schema": {}} for i in range(15_000)]
    body = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]} | ({"max_tokens": 5} if parse is parse_messages else {})
    parse(json.dumps(body | {"tools": tools}).encode(), CONFIG, None)  # five fields each as a chat
    with pytest.raises(RequestTooLarge) as caught:
        parse(
            json.dumps(body | {"tools": [*tools, *({"name": f"other_{i}", "input_schema": {}} for i in range(15_000))]}).encode(),
            CONFIG,
            None,
        )
    count = 60_000 + 5 + (parse is parse_messages)
    assert f" {count} fields; this server takes at most 32000." in caught.value.message
