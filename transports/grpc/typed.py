"""Completions without JSON.

What it is: `body_of`, which makes a GenerateRequest the body that /v1/completions takes, and `ReplyFrame`, whose messages are GenerateReplies, made of that endpoint's events.
What it does not know: calls, what fields mean: the endpoint does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import InvalidRequest
from penstock.transports.grpc.calls import EventFrame, framed
from penstock.transports.grpc.penstock_v1_pb2 import GenerateReply, GenerateRequest, Usage

PATH = "/v1/completions"


def body_of(asked: GenerateRequest) -> bytes:
    """Raises InvalidRequest where there is no prompt."""
    kind = asked.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("Give text or token_ids.", param="prompt")
    body: dict[str, Any] = {"prompt": asked.text if kind == "text" else list(asked.token_ids.ids)}
    if asked.model:
        body["model"] = asked.model
    for field, value in asked.sampling.ListFields():
        body[field.name] = list(value) if field.is_repeated else value
    return msgspec.json.encode(body | {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}})


class _Error(msgspec.Struct):
    message: str = ""


class _Choice(msgspec.Struct):
    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    finish_reason: str | None = None
    error: _Error | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_chunk = msgspec.json.Decoder(_Chunk).decode


def replies(payload: bytes) -> Iterator[GenerateReply]:
    """What an event of /v1/completions says of answers; nothing, if that is nothing."""
    chunk = _chunk(payload)
    for choice in chunk.choices:
        if choice.text or choice.token_ids or choice.finish_reason:
            yield GenerateReply(
                index=choice.index,
                text=choice.text,
                token_ids=choice.token_ids,
                finish_reason=choice.finish_reason or "",
                error=choice.error.message if choice.error is not None else "",
            )
    if chunk.usage is not None:
        cached = chunk.usage.prompt_tokens_details
        said = {"prompt_tokens": chunk.usage.prompt_tokens, "completion_tokens": chunk.usage.completion_tokens}
        yield GenerateReply(usage=Usage(**said, cached_tokens=cached.cached_tokens if cached is not None else 0))


class ReplyFrame(EventFrame):
    def numbered(self, number: int, message: bytes) -> bytes:
        return b"".join(framed(reply.SerializeToString()) for reply in replies(message)) if message else b""


REPLIES = ReplyFrame()
