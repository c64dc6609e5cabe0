"""What OpenAI's clients get to see.

What it is: `ChatVoice` and `CompletionVoice`, the replies of /v1/chat/completions and /v1/completions, in one piece or as events, exactly as OpenAI's
clients expect them, with vLLM's extras.
What it does not know: requests' fields and their checks (openai.py), how rows arrive, what makes a payload an event.

Order of a stream: per choice a chunk with the role (chat), content chunks, one chunk with an empty delta and the finish_reason; then, if asked
for, a chunk with no choices and the usage; then [DONE]. A failed stream ends with an error event and without [DONE].
"""

from __future__ import annotations

import abc
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import ARGUMENTS, NAME, REASONING
from penstock.transports.echo import Shared, echo_pieces, is_small
from penstock.transports.frame import DONE as DONE
from penstock.transports.gateway import Batch
from penstock.transports.json_values import JsonValues, Value
from penstock.transports.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs_json, spoken
from penstock.transports.openai import Call
from penstock.transports.request import Header, JsonReply, error_body, error_fields, error_reply
from penstock.transports.voice import Choice, Head, Pieces, Prompt, Usage

SIZE_STEP = 64
"""Bytes. With stream_options.include_obfuscation the sizes of events differ by multiples of it: few tokens are longer."""

_json = msgspec.json.Encoder().encode


def _stopped(by: int | str | None) -> dict[str, Any]:
    """What ended a choice, as vLLM and as SGLang call it."""
    return {"stop_reason": by, "matched_stop": by}


def likeliness(choice: Choice) -> float:
    """The mean log-probability of its tokens; of one that failed, or that has none, less than of any other."""
    if choice.error is not None or not choice.logprobs:
        return -math.inf
    return sum(position.logprobs[0] for position in choice.logprobs) / len(choice.logprobs)


def usage_json(usage: Usage) -> dict[str, Any]:
    details = {} if usage.reasoning is None else {"completion_tokens_details": {"reasoning_tokens": usage.reasoning}}
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        **details,
    }


class _OpenAIVoice(abc.ABC):
    """What both APIs share."""

    prefix: str
    """Of ids."""
    whole_object: str
    chunk_object: str

    def __init__(self, call: Call) -> None:
        self.call = call
        self.plain = not (call.want_ids or call.continuous_usage or call.obfuscate or call.values or call.top_logprobs is not None)
        self._values = [JsonValues() for _ in range(call.choices)] if call.values else []
        self._least = len(_json([self._chunk(0, "", None)]))
        self._tail = b',"usage":null}' if call.include_usage else b"}"

    def begin(self, head: Head) -> str:
        reply_id = self.prefix + head.rid
        self._facts = {"created": head.created, "model": head.model}
        self._fingerprint = head.fingerprint
        self._id = reply_id
        chunk = {"id": reply_id, "object": self.chunk_object, **self._facts, "system_fingerprint": head.fingerprint}
        self._head = _json(chunk)[:-1]
        return reply_id

    # --- in one piece

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        body: dict[str, Any] = {
            "id": self._id,
            "object": self.whole_object,
            **self._facts,
            "choices": [self._ended_choice(index, prompt, choice) for index, (prompt, choice) in enumerate(self._shown(prompts, choices))],
            "usage": usage_json(usage),
            "system_fingerprint": self._fingerprint,
            **self._of_reply(prompts),
        }
        if timings is not None:
            body["metrics"] = timings
        return _json(body)

    def _shown(self, prompts: Sequence[Prompt], choices: Sequence[Choice]) -> Iterator[tuple[Prompt, Choice]]:
        """The choices of the reply in order, each with its prompt."""
        n = self.call.sampling.n
        for number, prompt in enumerate(prompts):
            mine = choices[number * n : (number + 1) * n]
            if self.call.shown is not None:
                mine = sorted(mine, key=likeliness, reverse=True)[: self.call.shown]
            for choice in mine:
                yield prompt, choice

    def _ended_choice(self, index: int, prompt: Prompt, choice: Choice) -> dict[str, Any]:
        out = self._answer(index, prompt, choice)
        out |= _stopped(choice.stop_reason)
        if choice.error is not None:
            out["error"] = error_fields(choice.error)
        if self.call.want_ids:
            out["token_ids"] = choice.tokens
        return out

    @abc.abstractmethod
    def _answer(self, index: int, prompt: Prompt, choice: Choice) -> dict[str, Any]:
        """A choice up to its finish_reason, and what comes with that."""

    @abc.abstractmethod
    def _of_reply(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What stands beside the choices."""

    # --- as events

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None, **more: Any) -> bytes:
        return self._said(_json(choices), usage, **more)

    def _said(self, said: bytes, usage: Usage | None, **more: Any) -> bytes:
        """An event with these choices, as JSON."""
        body = self._head + b',"choices":' + said
        if self.call.obfuscate and said != b"[]":
            padding = (self._least - len(said)) % SIZE_STEP
            body += b',"obfuscation":"%s"' % secrets.token_urlsafe(padding)[:padding].encode()
        for name, value in more.items():
            body += b',"%s":%s' % (name.encode(), _json(value))
        return body + (b',"usage":%s}' % _json(usage_json(usage)) if usage is not None else self._tail)

    def _usage(self, row: int, batch: Batch) -> Usage | None:
        return Usage.at(row, batch) if self.call.continuous_usage else None

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        call = self.call
        logprobs: dict[str, Any] | None = None
        if call.top_logprobs is not None:
            extra = batch.extra(row)
            if extra is not None and extra.logprobs and (positions := spoken(extra.logprobs)):
                logprobs = self._logprobs(index, positions)
        tokens = batch.tokens(row) if call.want_ids else None
        delta = self._delta(text, row, batch) if batch.channels is not None and batch.channels[row] else None
        if text or logprobs or tokens or delta:
            choice = self._chunk(index, text, logprobs)
            if delta is not None:
                choice["delta"] = delta
            if tokens is not None:
                choice["token_ids"] = tokens
            yield self._event([choice], self._usage(row, batch))
            if self._values and delta is None:
                for value in self._values[index].feed(text):
                    yield self._event([self._complete(index, value)], self._usage(row, batch))

    def _complete(self, index: int, value: Value) -> dict[str, Any]:
        """That a value of a choice's answer is."""
        told: dict[str, Any] = {"path": value.path}
        if value.item is not None:
            told["index"] = value.item
        if value.text is None:
            told["too_large"] = True
        else:
            told["value"] = msgspec.Raw(value.text.encode())
        return {**self._silence(index), "logprobs": None, "finish_reason": None, "json_value": told}

    @abc.abstractmethod
    def _logprobs(self, index: int, positions: list[Any]) -> dict[str, Any]:
        """Of the next tokens of a choice."""

    def _delta(self, text: str, row: int, batch: Batch) -> dict[str, Any]:
        """What a row of a channel other than content adds to a message; {}: nothing."""
        channel, call = batch.channel(row)
        if channel == REASONING:
            return {"reasoning_content": text, "reasoning": text}
        if channel == NAME:
            extra = batch.extra(row)
            function = {"name": text, "arguments": ""}
            return {"tool_calls": [{"index": call, "id": extra.call_id if extra else "", "type": "function", "function": function}]}
        if channel == ARGUMENTS:
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}
        # clients that put calls together want pieces of a function in each
        return {"tool_calls": [{"index": call, "function": {"arguments": ""}, "done": True}]} if self.call.calls_done else {}

    @abc.abstractmethod
    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A choice that goes on."""

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        """The one chunk with a finish_reason; it carries no content."""
        extra = batch.extra(row)
        choice = self._silence(index)
        choice |= {"logprobs": None, "finish_reason": reason, **_stopped(extra.stop_reason if extra else None)}
        if error is not None:
            choice["error"] = error_fields(error)
        yield self._event([choice], self._usage(row, batch))

    @abc.abstractmethod
    def _silence(self, index: int) -> dict[str, Any]:
        """A choice that says nothing more."""

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterator[bytes]:
        if self.call.include_usage or timings is not None:
            told = usage if self.call.include_usage else None
            yield self._event([], told, **({} if timings is None else {"metrics": timings}))
        yield DONE

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return (error_body(error),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return error_reply(error, headers)


def _message(choice: Choice) -> dict[str, Any]:
    content = "".join(choice.pieces)
    out: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning:
        out["reasoning_content"] = out["reasoning"] = "".join(choice.reasoning)
    if choice.calls:
        functions = [{"name": call.name, "arguments": "".join(call.arguments)} for call in choice.calls]
        out["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function} for call, function in zip(choice.calls, functions, strict=True)
        ]
    if not content and (choice.calls or choice.reasoning):
        out["content"] = None
    return out


class ChatVoice(_OpenAIVoice):
    """/v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _answer(self, index: int, prompt: Prompt, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": _message(choice),
            "logprobs": None if self.call.top_logprobs is None else chat_logprobs(choice.logprobs, self.call.tokens_as_ids),
            "finish_reason": choice.reason,
        }

    def _of_reply(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        (prompt,) = prompts
        out: dict[str, Any] = {}
        if self.call.prompt_logprobs:
            out["prompt_logprobs"] = _shown(prompt)
        if self.call.want_ids:
            out["prompt_token_ids"] = prompt.ids
        return out

    def around(self, index: int) -> tuple[bytes, bytes]:
        return (
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % index,
            b'},"logprobs":null,"finish_reason":null}]' + self._tail,
        )

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes | Pieces]:
        """The role, and the prompt's ids if asked for."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        usage = self._usage(row, batch)
        before = usage and usage._replace(output=0)
        if self.call.want_ids and index == 0:
            made = (self._event([choice], before, prompt_token_ids=ids) for ids in (prompt.ids,))
            if is_small("", 0, len(prompt.ids or ()), 1):
                yield from made
            else:
                yield Pieces(made)
        else:
            yield self._event([choice], before)

    def _logprobs(self, index: int, positions: list[Any]) -> dict[str, Any]:
        return chat_logprobs(positions, self.call.tokens_as_ids)

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def _silence(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}}


def _shown(prompt: Prompt) -> msgspec.Raw:
    """Its prompt_logprobs, made once for all choices."""
    if not prompt.made:
        prompt.made = _json(prompt_logprobs_json(prompt.logprobs))
    return msgspec.Raw(prompt.made)


class CompletionVoice(_OpenAIVoice):
    """/v1/completions."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._offsets = [TextOffsets() for _ in range(call.choices)] if call.top_logprobs is not None else []

    def _answer(self, index: int, prompt: Prompt, choice: Choice) -> dict[str, Any]:
        call = self.call
        text = "".join(choice.pieces)
        before = prompt.text if call.echo else ""
        logprobs = None
        if call.top_logprobs is not None:
            answer = spoken(choice.logprobs)
            positions = [*(prompt.echoed() if call.echo else ()), *answer]
            offsets = [*(prompt.offsets if call.echo else ()), *TextOffsets(len(before)).of(answer)]
            logprobs = completion_logprobs(positions, call.tokens_as_ids, offsets)
        out = {"index": index, "text": before + text, "logprobs": logprobs, "finish_reason": choice.reason}
        if call.prompt_logprobs:
            out["prompt_logprobs"] = _shown(prompt)
        if call.want_ids:
            out["prompt_token_ids"] = prompt.ids
        return out

    def _of_reply(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {}

    def around(self, index: int) -> tuple[bytes, bytes]:
        return (
            self._head + b',"choices":[{"index":%d,"text":' % index,
            b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + self._tail,
        )

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes | Pieces]:
        """The prompt's ids and the prompt, if asked for."""
        call = self.call
        if not (call.want_ids or call.echo):
            return
        usage = self._usage(row, batch)
        tops = call.top_logprobs if call.echo else None
        if tops is not None:
            self._offsets[index] = TextOffsets(len(prompt.text))
        if call.echo and prompt.echo is None:
            made = echo_pieces(prompt.text, None if tops is None else prompt.echoed(), prompt.offsets, as_ids=call.tokens_as_ids)
            prompt.echo = made if call.sampling.n == 1 else Shared(made)
        said = self._before(index, prompt, usage and usage._replace(output=0))
        logprobs = 0 if tops is None else len(prompt.logprobs) * (tops + 1)
        if is_small(prompt.text, logprobs, len(prompt.ids or ()) if call.want_ids else 0, call.choices):
            yield from said
        else:
            yield Pieces(said)

    def _before(self, index: int, prompt: Prompt, usage: Usage | None) -> Iterator[bytes]:
        """Events of a choice before its answer."""
        if self.call.want_ids:
            yield self._event([{**self._chunk(index, "", None), "prompt_token_ids": prompt.ids, "token_ids": []}], usage)
        for members in prompt.echo or ():
            yield self._said(b'[{"index":%d,%b]' % (index, members), usage)

    def _logprobs(self, index: int, positions: list[Any]) -> dict[str, Any]:
        return completion_logprobs(positions, self.call.tokens_as_ids, self._offsets[index].of(positions))

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def _silence(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": ""}
