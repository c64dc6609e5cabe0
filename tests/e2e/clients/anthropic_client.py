"""What a program with Anthropic's official client does with a server, checked by itself: `python anthropic_client.py URL`, in an environment with anthropic."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import anthropic

GREEDY = {"temperature": 0.0}
"""This client's methods no longer have it; the API does."""
TURNS: list[Any] = [{"role": "user", "content": "What is a penstock?"}]
ASK: dict[str, Any] = {"model": "brook", "max_tokens": 24, "messages": TURNS, "extra_body": GREEDY}


def sync(client: anthropic.Anthropic) -> anthropic.types.Message:
    whole = client.messages.create(**ASK, system="Be brief.")
    assert whole.id.startswith("msg_")
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
        return f"{body['error']['type']}: {body['error']['message']}"
    raise SystemExit(f"no {kind.__name__} came")


def errors(client: anthropic.Anthropic) -> None:
    bad, lost = anthropic.BadRequestError, anthropic.NotFoundError
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": tools}, "tools"),
        ({"thinking": thinking}, "thinking"),
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
        async with client.messages.stream(**{**ASK, "max_tokens": 512}) as stream:  # left early
            async for _ in stream.text_stream:
                break


def main(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        whole = sync(client)
        streams(client, whole)
        details(client, whole)
        errors(client)
    asyncio.run(asynchronous(url, whole))
    print(f"anthropic {anthropic.__version__}: all is well")


if __name__ == "__main__":
    main(sys.argv[1])
