"""What a program with OpenAI's official client does with what a server keeps, checked by itself: `python storage_client.py URL`, in an environment with openai."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import openai

ASK: dict[str, Any] = {
    "model": "brook",
    "messages": [{"role": "user", "content": "What is a penstock?"}],
    "max_tokens": 16,
    "temperature": 0.0,
}


def chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, store=True, metadata={"kind": "whole"})
    chunks = list(client.chat.completions.create(**ASK, store=True, metadata={"kind": "stream"}, stream=True))
    folded = client.chat.completions.retrieve(chunks[0].id)
    assert folded.choices[0].message.content == whole.choices[0].message.content
    assert folded.usage is not None
    assert whole.usage is not None
    assert folded.usage.completion_tokens == whole.usage.completion_tokens
    assert {one.id for one in client.chat.completions.list(limit=1)} >= {whole.id, folded.id}
    assert [one.id for one in client.chat.completions.list(metadata={"kind": "stream"})] == [folded.id]
    assert [m.content for m in client.chat.completions.messages.list(whole.id)] == [ASK["messages"][0]["content"]]
    client.chat.completions.update(whole.id, metadata={"kind": "changed"})
    assert [one.id for one in client.chat.completions.list(metadata={"kind": "changed"})] == [whole.id]
    for id in (whole.id, folded.id):
        assert client.chat.completions.delete(id).deleted
    try:
        client.chat.completions.retrieve(whole.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("it is still there")


def batch(client: openai.OpenAI) -> None:
    asks = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": ASK} for i in range(5)]
    asks.append({**asks[0], "custom_id": "wrong", "body": {**ASK, "temperature": -1}})
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, asks)).encode()), purpose="batch")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"})
    until = time.monotonic() + 60
    while (found := client.batches.retrieve(made.id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < until, found
        time.sleep(0.1)
    assert found.status == "completed", found
    assert found.request_counts is not None
    assert (found.request_counts.total, found.request_counts.completed, found.request_counts.failed) == (6, 5, 1)
    assert found.output_file_id
    assert found.error_file_id
    output = [json.loads(line) for line in client.files.content(found.output_file_id).text.splitlines()]
    assert sorted(one["custom_id"] for one in output) == [f"r{i}" for i in range(5)]
    online = client.chat.completions.create(**ASK).choices[0].message.content
    assert {one["response"]["body"]["choices"][0]["message"]["content"] for one in output} == {online}
    (error,) = [json.loads(line) for line in client.files.content(found.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
    assert made.id in [one.id for one in client.batches.list(limit=1)]
    for id in (file.id, found.output_file_id, found.error_file_id):
        assert client.files.delete(id).deleted


def cancelled(client: openai.OpenAI) -> None:
    long = {**ASK, "max_tokens": 300, "ignore_eos": True}
    asks = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": long} for i in range(500)]
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, asks)).encode()), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while client.batches.retrieve(made.id).status == "validating":
        time.sleep(0.05)
    assert client.batches.cancel(made.id).status == "cancelling"
    until = time.monotonic() + 30
    while client.batches.retrieve(made.id).status == "cancelling":
        assert time.monotonic() < until
        time.sleep(0.1)
    assert client.batches.retrieve(made.id).status == "cancelled"


async def asynchronous(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        file = await client.files.create(file=("x", b"{}"), purpose="batch")
        assert file.id in [one.id async for one in client.files.list(purpose="batch")]
        assert (await client.files.content(file.id)).content == b"{}"
        assert (await client.files.delete(file.id)).deleted


def main(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        steps: list[Callable[[], object]] = [partial(step, client) for step in (chats, batch, cancelled)]
        for step in [*steps, lambda: asyncio.run(asynchronous(url))]:
            step()
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
