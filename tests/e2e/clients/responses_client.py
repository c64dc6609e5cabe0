"""What a program with OpenAI's official client does with the Responses API, checked by itself: `python responses_client.py URL`, in an environment with openai."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import openai
from pydantic import BaseModel

ASK: dict[str, Any] = {"model": "brook", "input": "What is a penstock?", "max_output_tokens": 24, "temperature": 0.0}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Name of the city"}},
        "required": ["city"],
    },
}
OSLO = "What is the weather in Oslo?"
LONG: dict[str, Any] = {"model": "brook", "input": "Tell me a long story.", "extra_body": {"ignore_eos": True}, "max_output_tokens": 400}


def sync(client: openai.OpenAI) -> Any:
    whole = client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    assert whole.id.startswith("resp_")
    assert whole.output_text
    assert whole.status in ("completed", "incomplete")
    assert (whole.status == "incomplete") is (whole.incomplete_details is not None)
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens <= 24
    count = client.responses.input_tokens.count(model="brook", input=ASK["input"], instructions="Be brief.")
    assert count.input_tokens == whole.usage.input_tokens
    return whole


def streams(client: openai.OpenAI, whole: Any) -> None:
    with client.responses.stream(**ASK, instructions="Be brief.") as stream:
        text = ""
        numbers = []
        last: Any = None
        for event in stream:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
                assert event.snapshot == text
            last = event
    assert numbers == list(range(len(numbers)))
    assert text == last.response.output_text == whole.output_text
    assert last.type == f"response.{whole.status}"
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    raw = list(client.responses.create(**{**ASK, "max_output_tokens": 300}, stream=True))
    assert [event.type for event in raw[:2]] == ["response.created", "response.in_progress"]


def logprobs(client: openai.OpenAI) -> None:
    found = client.responses.create(**ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    message = found.output[-1]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode("utf-8", "replace").startswith(part.text[:4])


class Place(BaseModel):
    city: str
    rainy: bool


def parses(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="brook", input="Say where it rains.", text_format=Place)
    assert isinstance(parsed.output_parsed, Place)
    assert json.loads(parsed.output_text).keys() == {"city", "rainy"}


def tools(client: openai.OpenAI) -> None:
    """An agent's loop, by previous_response_id and by sending everything back."""
    ask: dict[str, Any] = {"model": "brook", "tools": [WEATHER], "temperature": 0.0, "max_output_tokens": 64}
    called = client.responses.create(**ask, input=OSLO)
    (call,) = [item for item in called.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Oslo"}, "completed")
    with client.responses.stream(**ask, input=OSLO) as stream:
        arguments = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        (again,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert arguments == again.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "rain"}'}
    kept = client.responses.create(**ask, input=[result], previous_response_id=called.id)
    sent = client.responses.create(**ask, input=[{"role": "user", "content": OSLO}, *called.output, result], store=False)
    assert kept.output_text == sent.output_text
    assert kept.usage is not None
    assert sent.usage is not None
    assert kept.usage.input_tokens == sent.usage.input_tokens


def kept(client: openai.OpenAI, whole: Any) -> None:
    assert client.responses.retrieve(whole.id) == whole
    assert whole.metadata == {"a": "b"}
    more = client.responses.create(**{**ASK, "input": "And why?"}, previous_response_id=whole.id)
    assert more.usage is not None
    assert more.usage.input_tokens > whole.usage.input_tokens
    items = list(client.responses.input_items.list(more.id, order="asc", limit=1))
    assert [item.content[0].text for item in items] == ["And why?"]  # type: ignore[union-attr]
    client.responses.delete(whole.id)
    assert "no response" in refusal(openai.NotFoundError, partial(client.responses.retrieve, whole.id))
    assert "previous_response_id" in refusal(openai.BadRequestError, partial(client.responses.create, **ASK, previous_response_id=whole.id))


def background(client: openai.OpenAI) -> None:
    queued = client.responses.create(**LONG, background=True)
    assert queued.status in ("queued", "in_progress")
    found = queued
    deadline = time.monotonic() + 60
    while found.status in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.05)
        found = client.responses.retrieve(queued.id)
    assert found.status == "incomplete"
    assert found.output_text
    seen: list[Any] = []
    for event in client.responses.create(**LONG, background=True, stream=True):  # left early
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    name = seen[0].response.id
    seen += client.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == seen[-1].response.output_text
    assert client.responses.retrieve(name) == seen[-1].response
    running = client.responses.create(**{**LONG, "max_output_tokens": 900}, background=True)
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"


def refusal(kind: type[openai.APIStatusError], ask: Callable[[], object]) -> str:
    """The field and message of the error that must come."""
    try:
        ask()
    except kind as error:
        return f"{error.param}: {error.message}"
    raise SystemExit(f"no {kind.__name__} came")


def errors(client: openai.OpenAI) -> None:
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": image}, "input[0].content[0].type"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True, "store": False}, "background"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
    ]
    for more, name in wrong:
        for stream in (False, True):
            said = refusal(openai.BadRequestError, partial(client.responses.create, **{**ASK, **more}, stream=stream))
            assert said.startswith(name + ": "), said
    assert refusal(openai.NotFoundError, partial(client.responses.create, **{**ASK, "model": "gpt"})).startswith("model: ")


async def asynchronous(url: str, whole: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        ask = {**ASK, "instructions": "Be brief."}
        first, second = await asyncio.gather(client.responses.create(**ask), client.responses.create(**ask))
        assert first.output_text == second.output_text == whole.output_text
        async with client.responses.stream(**ask) as stream:
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        assert text == whole.output_text
        parsed = await client.responses.parse(model="brook", input="Say where it rains.", text_format=Place)
        assert isinstance(parsed.output_parsed, Place)
        async with await client.responses.create(**LONG, stream=True) as raw:  # left early
            async for one in raw:
                if one.type == "response.output_text.delta":
                    break


def main(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = sync(client)
        streams(client, whole)
        logprobs(client)
        parses(client)
        tools(client)
        errors(client)
        background(client)
        asyncio.run(asynchronous(url, whole))
        kept(client, whole)
    print(f"openai {openai.__version__}: all is well")


if __name__ == "__main__":
    main(sys.argv[1])
