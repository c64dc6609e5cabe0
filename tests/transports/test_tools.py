"""Rows of channels on the wire: reasoning, calls, whole and streamed, as OpenAI's client reads them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import openai
import pytest
from edge_kit import MODEL, Edge, delta, finished

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Message, Submit

TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
MESSAGES: Any = [{"role": "user", "content": "x"}]

ROWS = [
    (REASONING, -1, "Hm"),
    (REASONING, -1, "."),
    (CONTENT, -1, "I look."),
    (NAME, 0, "f"),
    (ARGUMENTS, 0, '{"a":'),
    (ARGUMENTS, 0, '"ä"}'),
    (DONE, 0, ""),
    (NAME, 1, "g"),
    (ARGUMENTS, 1, "{}"),
    (DONE, 1, ""),
]


def apart(*batches: int) -> Any:
    """ROWS in deltas of so many rows, and the end."""

    def script(submit: Submit) -> list[Message]:
        out: list[Message] = []
        at = 0
        for size in (*batches, len(ROWS) - sum(batches)):
            rows = ROWS[at : at + size]
            at += size
            made = [
                {"key": submit.key, "text": text, **({"extra": {"call_id": f"call_{call}"}} if channel == NAME else {})}
                for channel, call, text in rows
            ]
            message = delta(*made)
            out.append(
                type(message)(
                    **{name: getattr(message, name) for name in message.__struct_fields__ if name not in ("channels", "calls")},
                    channels=np.array([row[0] for row in rows], np.uint8),
                    calls=i32([row[1] for row in rows]),
                )
            )
        out.append(delta({"key": submit.key, "tokens": [], "reason": "tool_calls"}))
        end = finished(submit.key)
        out.append(
            type(end)(**{name: getattr(end, name) for name in end.__struct_fields__ if name != "reasoning_tokens"}, reasoning_tokens=2)
        )
        return out

    return script


@pytest.mark.parametrize("batches", [(), (1, 1, 1, 1, 1, 1, 1, 1, 1), (3, 4)])
def test_whole(edge: Edge, batches: tuple[int, ...]) -> None:
    edge.text.script = apart(*batches)
    with edge.client() as client:
        reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS)
    (choice,) = reply.choices
    message: Any = choice.message
    assert choice.finish_reason == "tool_calls"
    assert (message.content, message.reasoning_content, message.reasoning) == ("I look.", "Hm.", "Hm.")
    assert [(c.id, c.type, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("call_0", "function", "f", '{"a":"ä"}'),
        ("call_1", "function", "g", "{}"),
    ]
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 2
    (submit,) = edge.text.wait_for(Submit)
    assert json.loads(submit.tools) == TOOLS
    assert submit.split


@pytest.mark.parametrize("options", [{}, {"logprobs": True}, {"extra_body": {"return_token_ids": True}}])
def test_streamed_in_the_order_of_the_rows(edge: Edge, options: Any) -> None:
    """By the plain path and by the one of rows that carry more."""
    edge.text.script = apart(2, 3)

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
            stream: Any = await client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS, stream=True, **options)
            return [chunk async for chunk in stream]

    chunks = asyncio.run(run())
    seen = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    shown = [delta for delta in seen if delta and "role" not in delta and delta != {"content": ""}]
    assert shown == [
        {"reasoning_content": "Hm", "reasoning": "Hm"},
        {"reasoning_content": ".", "reasoning": "."},
        {"content": "I look."},
        {"tool_calls": [{"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"ä"}'}}]},
        {"tool_calls": [{"index": 1, "id": "call_1", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_the_mark_of_a_complete_call_is_read_by_openais_own_helper(edge: Edge) -> None:
    """It wants a function in every piece of a call."""
    edge.text.script = apart(2, 3)
    with edge.client() as client:
        stream = client.chat.completions.stream(
            model=MODEL,
            messages=MESSAGES,
            tools=TOOLS,
            stream_options={"include_usage": True},
            extra_body={"stream_options": {"tool_calls_done": True}},
        )
        with stream as events:
            for _ in events:
                pass
            (choice,) = events.get_final_completion().choices
    assert choice.message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [("f", '{"a":"ä"}'), ("g", "{}")]
