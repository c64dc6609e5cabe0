"""What a program with Anthropic's official client does with a server, checked by itself: `python anthropic_client.py URL`, in an environment with anthropic.
`python anthropic_client.py URL thinking`: with one whose model thinks, that is, whose prompts end with <think>."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anthropic
import pydantic
from anthropic import beta_async_tool, beta_tool

GREEDY = {"temperature": 0.0}
"""This client's methods no longer have it; the API does."""
TURNS: list[Any] = [{"role": "user", "content": "What is a penstock?"}]
ASK: dict[str, Any] = {"model": "brook", "max_tokens": 24, "messages": TURNS, "extra_body": GREEDY}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the current weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Name of the city"}},
        "required": ["city"],
    },
}
OSLO: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
TWO: list[Any] = [{"role": "user", "content": "What is the weather in Paris and the time in Rome?"}]
CALL: dict[str, Any] = {"model": "brook", "max_tokens": 200, "tools": [WEATHER], "extra_body": GREEDY}
RAIN = json.dumps({"temperature": 7, "condition": "rainy"})
DOCUMENTATION = """Get the current weather in a city

Args:
    city: Name of the city
"""


class Person(pydantic.BaseModel):
    name: str
    age: int


def sync(client: anthropic.Anthropic) -> anthropic.types.Message:
    whole = client.messages.create(**ASK, system="Be brief.")
    assert whole.id.startswith("msg_")
    assert whole._request_id
    assert whole.role == "assistant"
    assert whole.content[0].type == "text"
    assert whole.content[0].text
    assert whole.stop_reason in ("end_turn", "max_tokens")
    usage = whole.usage
    count = client.messages.count_tokens(model="brook", messages=TURNS, system="Be brief.")
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert 0 < usage.output_tokens <= 24
    return whole


def streams(client: anthropic.Anthropic, whole: anthropic.types.Message) -> None:
    with client.messages.stream(**ASK, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    kinds = [event.type for event in client.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def details(client: anthropic.Anthropic, whole: anthropic.types.Message) -> None:
    text = whole.content[0].text
    mark = text[len(text) // 2 :][:4]
    stopped = client.messages.create(**ASK, system="Be brief.", stop_sequences=[mark])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", mark)
    assert stopped.content[0].text == text[: text.index(mark)]
    blocks = [{"type": "text", "text": "What is a penstock?", "cache_control": {"type": "ephemeral"}}]
    turns = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "A penstock is"}]
    prefilled = client.messages.create(**{**ASK, "messages": turns}, metadata={"user_id": "u"}, service_tier="auto")
    assert prefilled.content[0].text
    assert client.messages.create(**{**ASK, "max_tokens": 1}).stop_reason == "max_tokens"


def refusal(kind: type[anthropic.APIStatusError], ask: Callable[[], object]) -> str:
    """The message of the error that must come, whose type must be that of its class."""
    try:
        ask()
    except kind as error:
        body: Any = error.body
        return f"{body['error']['type']}: {body['error']['message']}" if error.request_id else "no request-id"
    raise SystemExit(f"no {kind.__name__} came")


def models(client: anthropic.Anthropic) -> None:
    listed = list(client.models.list(limit=1))
    assert "brook" in [one.id for one in listed]
    one = client.models.retrieve("brook")
    assert one == next(other for other in listed if other.id == "brook")
    assert (one.type, one.display_name, one.lifecycle, one.created_at.year > 2000, one.max_tokens > 0) == (
        "model",
        "brook",
        "active",
        True,
        True,
    )
    assert refusal(anthropic.NotFoundError, partial(client.models.retrieve, "claude")).startswith("not_found_error: ")


def tools(client: anthropic.Anthropic) -> None:
    """Question, call, result, answer; and every way in which the client helps with it."""
    whole = client.messages.create(**CALL, messages=OSLO)
    (block,) = whole.content
    assert (whole.stop_reason, block.type, block.name, block.input) == ("tool_use", "tool_use", "get_weather", {"city": "Oslo"})
    with client.messages.stream(**CALL, messages=OSLO) as stream:
        pieces = [event for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert (final.content[0].input, final.stop_reason) == (block.input, "tool_use")
    assert json.loads("".join(event.partial_json for event in pieces)) == pieces[-1].snapshot == block.input
    assert final.usage.output_tokens == whole.usage.output_tokens
    turns = [
        *OSLO,
        final.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": final.content[0].id, "content": RAIN}]},
    ]
    answer = client.messages.create(**CALL, messages=turns)
    assert answer.stop_reason == "end_turn"
    assert "rainy" in answer.content[0].text
    count = client.messages.count_tokens(model="brook", messages=turns, tools=[WEATHER])
    assert count.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(model="brook", messages=OSLO).input_tokens < whole.usage.input_tokens + (
        whole.usage.cache_read_input_tokens or 0
    )
    two = client.messages.create(**CALL, messages=TWO)
    assert [one.type for one in two.content] == ["tool_use"] * 2
    assert len({one.id for one in two.content}) == 2
    alone = client.messages.create(**CALL, messages=TWO, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(alone.content) == 1
    none = client.messages.create(**CALL, messages=OSLO, tool_choice={"type": "none"})
    assert [one.type for one in none.content] == ["text"]
    for tokens in range(1, whole.usage.output_tokens):
        cut = client.messages.create(**{**CALL, "max_tokens": tokens}, messages=OSLO)
        assert cut.stop_reason == "max_tokens"
        assert cut.content
    forced(client)
    asked: list[str] = []

    def weather(city: str) -> str:
        asked.append(city)
        return RAIN

    runnable = beta_tool(weather, name="get_weather", description=DOCUMENTATION)
    last = client.beta.messages.tool_runner(**{**CALL, "tools": [runnable]}, messages=OSLO).until_done()
    assert last.content[0].text == answer.content[0].text
    for stream in client.beta.messages.tool_runner(**{**CALL, "tools": [runnable]}, messages=OSLO, stream=True):
        last = stream.get_final_message()
    assert last.content[0].text == answer.content[0].text
    assert asked == ["Oslo", "Oslo"]


def forced(client: anthropic.Anthropic) -> None:
    """What makes the model call: it does, or is refused by the field's name."""
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        ask = partial(client.messages.create, **CALL, messages=OSLO, tool_choice=choice)
        try:
            said = ask()
        except anthropic.BadRequestError:
            assert "tool_choice" in refusal(anthropic.BadRequestError, ask)
        else:
            assert (said.content[-1].type, said.content[-1].name, said.stop_reason) == ("tool_use", "get_weather", "tool_use")


def forms(client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {
        **ASK,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "Who is Ann, 30 years old? Answer with JSON."}],
    }
    whole = client.messages.parse(**ask, output_format=Person)
    assert isinstance(whole.parsed_output, Person)
    with client.messages.stream(**ask, output_format=Person) as stream:
        assert stream.get_final_message().parsed_output == whole.parsed_output
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    said = client.messages.create(**ask, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert set(json.loads(said.content[0].text)) == {"n"}


def thinks_not(client: anthropic.Anthropic, whole: anthropic.types.Message) -> None:
    """A model that does not think takes thinking all the same."""
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}):
        said = client.messages.create(**{**ASK, "max_tokens": 1100}, system="Be brief.", thinking=thinking)
        assert [block.type for block in said.content] == ["text"]
        assert said.content[0].text.startswith(whole.content[0].text)


def thinks(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASK)
    block = whole.content[0]
    assert (block.type, bool(block.thinking), bool(block.signature)) == ("thinking", True, True)
    assert whole.usage.output_tokens_details.thinking_tokens > 0
    with client.messages.stream(**ASK) as stream:
        pieces = [event.thinking for event in stream if event.type == "thinking"]
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].thinking == block.thinking
    assert final.content[0].signature == block.signature
    hidden = client.messages.create(**ASK, thinking={"type": "adaptive", "display": "omitted"})
    with client.messages.stream(**ASK, thinking={"type": "adaptive", "display": "omitted"}) as stream:
        assert stream.get_final_message().content[0] == hidden.content[0]
    assert hidden.content[0].thinking == ""
    counts = []
    for said in (whole, hidden):
        turns = [*TURNS, said.to_param(), {"role": "user", "content": "Go on."}]
        assert client.messages.create(**{**ASK, "messages": turns}).content[0].type == "thinking"
        counts.append(client.messages.count_tokens(model="brook", messages=turns).input_tokens)
    assert counts[0] == counts[1]


def errors(client: anthropic.Anthropic) -> None:
    bad, lost = anthropic.BadRequestError, anthropic.NotFoundError
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 24}}, "thinking.budget_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": image}, "messages[0].content[0]"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ]
    for more, name in wrong:
        for stream in (False, True):
            said = refusal(bad, partial(client.messages.create, **{**ASK, **more}, stream=stream))
            assert said.startswith(f"invalid_request_error: {name}"), said
    for ask in (
        partial(client.messages.create, **{**ASK, "model": "claude"}),
        partial(client.messages.count_tokens, model="claude", messages=TURNS),
    ):
        assert refusal(lost, ask).startswith("not_found_error: ")


def batches(client: anthropic.Anthropic, whole: anthropic.types.Message) -> None:
    good = {"model": "brook", "max_tokens": 24, "messages": TURNS, "system": "Be brief.", **GREEDY}
    wrong = {**good, "max_tokens": 0}
    made = client.messages.batches.create(requests=[{"custom_id": "good", "params": good}, {"custom_id": "wrong", "params": wrong}])
    assert (made.type, made.processing_status, made.request_counts.processing) == ("message_batch", "in_progress", 2)
    batch = ended(client, made.id)
    assert (batch.request_counts.succeeded, batch.request_counts.errored, batch.request_counts.processing) == (1, 1, 0)
    assert batch.ended_at is not None
    assert batch.created_at <= batch.ended_at < batch.expires_at
    found = {one.custom_id: one.result for one in client.messages.batches.results(made.id)}
    assert found["good"].type == "succeeded"
    assert found["good"].message.content[0].text == whole.content[0].text
    assert (found["wrong"].type, found["wrong"].error.error.type) == ("errored", "invalid_request_error")
    assert "max_tokens" in found["wrong"].error.error.message
    long = {**good, "max_tokens": 3000, "stop_sequences": ["no such text"]}
    other = client.beta.messages.batches.create(requests=[{"custom_id": str(i), "params": long} for i in range(40)])
    assert client.beta.messages.batches.cancel(other.id).cancel_initiated_at is not None
    cancelled = ended(client, other.id)
    assert cancelled.request_counts.canceled + cancelled.request_counts.succeeded == 40
    assert {one.result.type for one in client.beta.messages.batches.results(other.id)} <= {"canceled", "succeeded"}
    assert [one.id for one in client.messages.batches.list(limit=1)][:2] == [other.id, made.id]
    assert [one.id for one in client.messages.batches.list(before_id=made.id, limit=1)] == [other.id]
    for id in (made.id, other.id):
        assert client.messages.batches.delete(id).type == "message_batch_deleted"
    refusal(anthropic.NotFoundError, partial(client.messages.batches.retrieve, made.id))
    refusal(anthropic.BadRequestError, partial(client.messages.batches.create, requests=[]))


def ended(client: anthropic.Anthropic, id: str) -> anthropic.types.messages.MessageBatch:
    until = time.monotonic() + 60
    while (batch := client.messages.batches.retrieve(id)).processing_status != "ended":
        assert time.monotonic() < until, batch
        time.sleep(0.1)
    return batch


async def asynchronous(url: str, whole: anthropic.types.Message) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        again, count = await asyncio.gather(
            client.messages.create(**ASK, system="Be brief."), client.messages.count_tokens(model="brook", messages=TURNS)
        )
        assert again.content[0].text == whole.content[0].text
        assert count.input_tokens > 0
        async with client.messages.stream(**ASK, system="Be brief.") as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == final.content[0].text == whole.content[0].text
        called = await client.messages.create(**CALL, messages=OSLO)
        assert (called.stop_reason, called.content[0].input) == ("tool_use", {"city": "Oslo"})
        async with client.messages.stream(**CALL, messages=OSLO) as stream:
            assert (await stream.get_final_message()).content[0].input == {"city": "Oslo"}

        async def weather(city: str) -> str:
            return RAIN

        runnable = beta_async_tool(weather, name="get_weather", description=DOCUMENTATION)
        last = await client.beta.messages.tool_runner(**{**CALL, "tools": [runnable]}, messages=OSLO).until_done()
        assert "rainy" in last.content[0].text
        async with client.messages.stream(**{**ASK, "max_tokens": 512}) as stream:  # left early
            async for _ in stream.text_stream:
                break


def main(url: str, thinking: bool) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        if thinking:
            thinks(client)
        else:
            whole = sync(client)
            streams(client, whole)
            details(client, whole)
            models(client)
            tools(client)
            forms(client)
            thinks_not(client, whole)
            errors(client)
            batches(client, whole)
            asyncio.run(asynchronous(url, whole))
    print(f"anthropic {anthropic.__version__}: all is well")


if __name__ == "__main__":
    main(sys.argv[1], "thinking" in sys.argv[2:])
