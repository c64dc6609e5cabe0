"""What clients of OpenAI's Responses API get to see.

What it is: `ResponsesVoice`, which folds the rows of an answer into output items and says each as an event; the reply in one piece is what the events add up to,
because it is made of the same items.
What it does not know: requests' fields and their checks (responses.py), how rows arrive, what makes a payload an event (frame.py), where replies are kept.

Order of a stream: response.created, response.in_progress; of each item response.output_item.added, its parts and deltas, response.output_item.done; at last
response.completed, response.incomplete or response.failed. `sequence_number` counts the events from 0.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import Cancelled, InvalidRequest, PenstockError, SlowClient, StreamTaken
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, DONE, NAME, REASONING
from penstock.transports.frame import Sse, TypedSse
from penstock.transports.gateway import Batch
from penstock.transports.logprobs import chat_logprobs
from penstock.transports.request import Header, JsonReply, error_reply
from penstock.transports.responses_items import Item, item_id, seal
from penstock.transports.voice import Choice, Head, Prompt, Usage

SIZE_STEP = 64
"""Bytes. With stream_options.include_obfuscation the sizes of deltas differ by multiples of it."""

FINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})
"""Statuses that do not change any more."""

_json = msgspec.json.Encoder().encode


class EventSse(TypedSse):
    """Events with names, as clients of this API read them; they know no ping."""

    keep_alive = Sse.keep_alive


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What a reply is to show, beside the answer."""

    id: str
    echo: dict[str, Any]
    """Fields of the request that stand in the reply."""
    logprobs: bool = False
    sealed: bool = False
    """Reasoning has encrypted_content."""
    obfuscate: bool = False


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.output,
    }


def error_json(error: PenstockError) -> dict[str, Any]:
    """As `response.error` has it, with the codes that its clients know."""
    if isinstance(error, InvalidRequest) or (400 <= error.status < 500 and error.status != 429):
        code = "invalid_prompt"
    else:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
    return {"code": code, "message": error.message}


class _Item:
    """An output item in the making."""

    __slots__ = ("data", "delta", "index", "logprobs", "part", "pieces")

    def __init__(self, index: int, data: Item, part: Item | None, delta: bytes) -> None:
        self.index = index
        self.data = data
        self.part = part
        """Its only part; a call has none."""
        self.pieces: list[str] = []
        self.logprobs: list[Any] = []
        self.delta = delta
        """What stands in its deltas between the sequence number and the text."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def snapshot(self) -> Item:
        """As it is so far, apart from what comes."""
        out = dict(self.data)
        if self.part is None:
            out["arguments"] = self.text
        else:
            part = {**self.part, "text": self.text}
            if "logprobs" in part:
                part["logprobs"] = self.logprobs
            out["content"] = [part]
        return out


class ResponsesVoice:
    """/v1/responses: one prompt, one choice. Whoever has the reply in one piece tells it the rows, too, and asks for `finish`."""

    plain = False

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._core = shown.id.removeprefix("resp_")
        self._sequence = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._calls: dict[int, _Item] = {}
        self._reason = ""
        self._unfinished = False
        """It ended within a call, though tokens had not run out."""
        self._created = False
        self._told: Usage | None = None
        """Of the answer so far."""
        self._thought = 0
        self.status = "in_progress"
        self.final: dict[str, Any] | None = None
        """The response, once nothing of it changes any more."""

    def begin(self, head: Head) -> str:
        self._at = head.created
        self._model = head.model
        return self._shown.id

    # --- the response

    def response(self, status: str, **more: Any) -> dict[str, Any]:
        """As it is so far. Without items of its own until it is over."""
        items = [item.snapshot() for item in self._items] if status in FINAL else []
        return {
            "id": self._shown.id,
            "object": "response",
            "created_at": self._at,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": items,
            "usage": None,
            **self._shown.echo,
            **more,
        }

    def finish(self, usage: Usage, timings: dict[str, Any] | None) -> dict[str, Any]:
        """Every row was told."""
        if self.final is None:
            more = {} if timings is None else {"metrics": timings}
            cut = self._reason == "length"
            self.status = "incomplete" if cut else "completed"
            details = {"reason": "stop" if self._unfinished else "max_output_tokens"} if cut else None
            self.final = self.response(self.status, incomplete_details=details, usage=usage_json(usage), **more)
        return self.final

    def fail(self, error: PenstockError) -> dict[str, Any]:
        """It ends here, with what it has."""
        if self.final is None:
            for item in self._items:
                if item.data.get("status") == "in_progress":
                    item.data["status"] = "incomplete"
            cancelled = isinstance(error, Cancelled) or error.code == Cancelled.default_code
            self.status = "cancelled" if cancelled else "failed"
            usage = None if self._told is None else usage_json(self._told._replace(reasoning=self._thought))
            self.final = self.response(self.status, error=None if cancelled else error_json(error), usage=usage)
        return self.final

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        return _json(self.finish(usage, timings))

    # --- as events

    def _event(self, kind: bytes, **fields: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return b'{"type":"%s","sequence_number":%d,%s' % (kind, number, _json(fields)[1:])

    def _delta(self, item: _Item, kind: bytes, text: str, after: bytes = b"") -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        said = _json(text)
        if self._shown.obfuscate:
            padding = -len(said) % SIZE_STEP
            after += b',"obfuscation":"%s"' % secrets.token_urlsafe(padding)[:padding].encode()
        return b'{"type":"%s","sequence_number":%d%s%s%s}' % (kind, number, item.delta, said, after)

    def accepted(self, status: str) -> bytes:
        """The first event."""
        self._created = True
        return self._event(b"response.created", response=self.response(status))

    def queued(self) -> bytes:
        return self._event(b"response.queued", response=self.response("queued"))

    def around(self, index: int) -> None:
        """No row is plain: each has its number."""

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes]:
        if not self._created:
            yield self.accepted("in_progress")
        yield self._event(b"response.in_progress", response=self.response("in_progress"))

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        channel, call = batch.channel(row)
        before, self._told = self._told, Usage.at(row, batch)
        if channel == REASONING:
            self._thought += self._told.output - (before.output if before is not None else 0)
        if channel == CONTENT:
            yield from self._content(text, row, batch)
        elif channel == REASONING:
            if text:
                yield from self._begin("reasoning")
                yield from self._more(b"response.reasoning_text.delta", text)
        elif channel == NAME:
            extra = batch.extra(row)
            yield from self._begin("function_call", call_id=extra.call_id if extra else "", name=text)
            assert self._open is not None
            self._calls[call] = self._open
        elif channel == ARGUMENTS:
            item = self._calls[call]
            item.pieces.append(text)
            yield self._delta(item, b"response.function_call_arguments.delta", text)
        elif channel == DONE and self._open is not None and self._open is self._calls.get(call):
            yield from self._end("completed")

    def _content(self, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        extra = batch.extra(row) if self._shown.logprobs else None
        logprobs = chat_logprobs(extra.logprobs, False)["content"] if extra is not None and extra.logprobs else []
        is_open = self._open is not None and self._open.data["type"] == "message"
        if text or (is_open and logprobs):
            if not is_open:
                yield from self._begin("message")
            yield from self._more(b"response.output_text.delta", text, logprobs)

    def _more(self, kind: bytes, text: str, logprobs: list[Any] | None = None) -> Iterator[bytes]:
        item = self._open
        assert item is not None
        item.pieces.append(text)
        if not logprobs:
            yield self._delta(item, kind, text, b"" if logprobs is None else b',"logprobs":[]')
        else:
            item.logprobs += logprobs
            yield self._delta(item, kind, text, b',"logprobs":' + _json(logprobs))

    def _begin(self, kind: str, **fields: str) -> Iterator[bytes]:
        """An item of that kind is open afterwards. Of calls a new one."""
        if self._open is not None:
            if self._open.data["type"] == kind != "function_call":
                return
            yield from self._end("incomplete" if self._open.part is None else "completed")  # a call that is complete was ended already
        index = len(self._items)
        name = item_id(kind, self._core, index)
        data: Item = {"id": name, "type": kind, "status": "in_progress"}
        part: Item | None = None
        if kind == "message":
            data |= {"role": "assistant", "content": []}
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        elif kind == "reasoning":
            data |= {"summary": [], "content": [], **({"encrypted_content": None} if self._shown.sealed else {})}
            part = {"type": "reasoning_text", "text": ""}
        else:
            data |= {**fields, "arguments": ""}
        content = b"" if part is None else b'"content_index":0,'
        delta = b',"item_id":"%s","output_index":%d,%s"delta":' % (name.encode(), index, content)
        self._open = _Item(index, data, part, delta)
        self._items.append(self._open)
        yield self._event(b"response.output_item.added", output_index=index, item=dict(data))
        if part is not None:
            yield self._event(b"response.content_part.added", item_id=name, output_index=index, content_index=0, part=part)

    def _end(self, status: str) -> Iterator[bytes]:
        """The open item is over."""
        item, self._open = self._open, None
        if item is None:
            return
        kind, text = item.data["type"], item.text
        item.data["status"] = status
        if item.data.get("encrypted_content", "") is None:
            item.data["encrypted_content"] = seal(text)
        at = {"item_id": item.data["id"], "output_index": item.index}
        done = item.snapshot()
        if kind == "function_call":
            yield self._event(b"response.function_call_arguments.done", **at, name=item.data["name"], arguments=text)
        else:
            at["content_index"] = 0
            if kind == "message":
                yield self._event(b"response.output_text.done", **at, text=text, logprobs=item.logprobs)
            else:
                yield self._event(b"response.reasoning_text.done", **at, text=text)
            yield self._event(b"response.content_part.done", **at, part=done["content"][0])
        yield self._event(b"response.output_item.done", output_index=item.index, item=done)

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        self._reason = reason
        extra = batch.extra(row)
        self._unfinished = reason == "length" and bool(extra and extra.unfinished)
        if not self._items and error is None:  # it said nothing: clients look for a message all the same
            yield from self._begin("message")
        whole = self._unfinished and self._open is not None and self._open.part is not None  # what follows a broken call is not cut off
        yield from self._end("incomplete" if error is not None or (reason == "length" and not whole) else "completed")

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterator[bytes]:
        final = self.finish(usage, timings)
        yield self._event(b"response.%s" % self.status.encode(), response=final)

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        if not self._created or isinstance(error, SlowClient | StreamTaken):  # the connection's end, not the response's
            fields = {"code": error.code, "message": error.message, "param": error.param}
            return (self._event(b"error", **fields),)
        return (self._event(b"response.failed", response=self.fail(error)),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return error_reply(error, headers)
