"""Tools on the demo model, through every process, with the official client: calls, streams, and an agent's whole loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
OSLO: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
TWO: Any = [{"role": "user", "content": "What is the weather in Paris and the time in Rome?"}]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_call_in_one_piece(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER])
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="brook", messages=TWO, tools=[WEATHER], n=2)
    chunks = list(client.chat.completions.create(model="brook", messages=TWO, tools=[WEATHER], n=2, stream=True))
    for index, choice in enumerate(whole.choices):
        folded: dict[int, list[str]] = {}
        reasons = []
        for chunk in chunks:
            for part in chunk.choices:
                if part.index != index:
                    continue
                assert not part.delta.content
                reasons += [part.finish_reason] if part.finish_reason else []
                assert not (part.finish_reason and part.delta.tool_calls)
                for call in part.delta.tool_calls or []:
                    assert call.function is not None
                    if call.index not in folded:
                        assert call.id
                        assert call.type == "function"
                        assert call.function.name
                        folded[call.index] = [call.function.name, ""]
                    else:
                        assert call.id is call.function.name is None
                    folded[call.index][1] += call.function.arguments or ""
        assert reasons == ["tool_calls"]
        calls: Any = choice.message.tool_calls
        assert len(calls) == 2
        assert [folded[i] for i in sorted(folded)] == [[call.function.name, call.function.arguments] for call in calls]


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="brook", messages=OSLO, tools=[WEATHER], stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_loop(client: openai.OpenAI, stream: bool) -> None:
    """Question, call, the tool's result, answer; the second turn has the first's message as it came."""
    messages: list[Any] = list(OSLO)
    if stream:
        with client.chat.completions.stream(model="brook", messages=messages, tools=[WEATHER]) as said:
            said.until_done()
            message: Any = said.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(model="brook", messages=messages, tools=[WEATHER]).choices[0].message
    messages.append(message.model_dump(exclude={"parsed"}))
    for call in message.tool_calls:
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 7, "condition": "rainy"})})
    last = client.chat.completions.create(model="brook", messages=messages, tools=[WEATHER]).choices[0]
    assert last.finish_reason == "stop"
    assert not last.message.tool_calls
    assert last.message.content is not None
    assert "rainy" in last.message.content
    assert "7" in last.message.content


def test_done_comes_before_the_end(client: openai.OpenAI) -> None:
    options: Any = {"tool_calls_done": True}
    chunks = list(client.chat.completions.create(model="brook", messages=TWO, tools=[WEATHER], stream=True, stream_options=options))
    parts = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [(part.index, getattr(part, "done", None)) for part in parts if getattr(part, "done", None)] == [(0, True), (1, True)]
    first = next(i for i, part in enumerate(parts) if getattr(part, "done", None))
    assert json.loads("".join(part.function.arguments or "" for part in parts[:first] if part.function)) == {"city": "Paris"}
    assert any(part.index == 1 for part in parts[first + 1 :])  # it came while the answer went on


def test_one_call_at_a_time_and_none(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(model="brook", messages=TWO, tools=[WEATHER], parallel_tool_calls=False).choices[0]
    assert one.finish_reason == "tool_calls"
    assert len(one.message.tool_calls or []) == 1
    none = client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER], tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    assert none.message.content
    chat = client.chat.completions.create(model="brook", messages=[{"role": "user", "content": "Hello!"}], tools=[WEATHER]).choices[0]
    assert (chat.finish_reason, chat.message.tool_calls) == ("stop", None)
    assert chat.message.content


def test_an_answer_cut_off_in_a_call(client: openai.OpenAI) -> None:
    full = client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER])
    assert full.usage is not None
    for tokens in range(1, full.usage.completion_tokens):
        cut = client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER], max_tokens=tokens).choices[0]
        assert cut.finish_reason == "length"
        assert cut.message.content or cut.message.tool_calls  # nothing is lost


@pytest.mark.slow
def test_without_a_format_tools_are_refused(starter: Any) -> None:
    server = starter("--tool-call-parser", "none")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER])
        assert (raised.value.code, raised.value.param) == ("unsupported_feature", "tools")
        said = client.chat.completions.create(model="brook", messages=OSLO, tools=[WEATHER], tool_choice="none").choices[0]
        assert said.finish_reason == "stop"
