"""What TGI's clients get to see.

What it is: `GenerateVoice`, the replies of /generate and /generate_stream, and TGI's error shape with its statuses.
What it does not know: requests' fields and their checks (tgi.py), how rows arrive, what makes a payload an event.

A stream has an event a token; the last one has the whole text and, if asked for, the details. Text belongs to the last token of its row that is not
special, so that the tokens' texts, without special ones, are the text. A failed stream ends with an error event.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import Cancelled, InvalidRequest, PenstockError
from penstock.core.protocol.messages import TokenLogprobs
from penstock.transports.gateway import Batch
from penstock.transports.generation import Generation
from penstock.transports.logprobs import LOWEST_LOGPROB
from penstock.transports.openai_voice import likeliness
from penstock.transports.request import Header, JsonReply, error_headers
from penstock.transports.voice import Choice, Head, Prompt, Usage

_json = msgspec.json.Encoder().encode


class Telling(Generation, kw_only=True):
    """One understood request. Its own fields say what the reply is to show; only the voice reads them."""

    details: bool
    prefill: bool
    before: str
    """What generated_text begins with: the prompt, with return_full_text."""
    listed: bool
    """The whole reply is a list of one."""
    top: int = 0
    """With details, or in a stream: so many of the likeliest tokens at each place."""


OVERLOADED = frozenset({"queue_full", "too_many_streams"})
GENERATION_FAILED = 424
INVALID = 422


def error_of(error: PenstockError) -> tuple[int, str]:
    """TGI's status and error_type."""
    if error.code in OVERLOADED:
        return 429, "overloaded"
    if error.code == Cancelled.default_code:
        return Cancelled.status, "cancelled"
    if error.status == 503:
        return 503, "unhealthy"
    if error.code == "engine_failure":
        return GENERATION_FAILED, "generation"
    if error.status == InvalidRequest.status:
        return INVALID, "validation"
    return error.status, "validation" if error.status < 500 else "internal"


def error_payload(error: PenstockError) -> bytes:
    """TGI's error shape, of replies and of events."""
    return _json({"error": error.message, "error_type": error_of(error)[1]})


def finish_reason(reason: str, stop_reason: int | str | None) -> str:
    if reason == "length":
        return "length"
    return "stop_sequence" if isinstance(stop_reason, str) else "eos_token"


def _token(id_: int, text: str, logprob: float | None, special: bool) -> dict[str, Any]:
    return {"id": id_, "text": text, "logprob": logprob, "special": special}


def _logprob(position: TokenLogprobs) -> float | None:
    return max(position.logprobs[0], LOWEST_LOGPROB) if position.logprobs else None


def _top(position: TokenLogprobs) -> list[dict[str, Any]]:
    """The likeliest tokens at a place."""
    return [
        _token(position.ids[i], position.texts[i], max(position.logprobs[i], LOWEST_LOGPROB), False) for i in range(1, len(position.ids))
    ]


def tokens_of(positions: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """An answer's tokens; the text of a character stands with the token that completes it. Special tokens have their own spelling."""
    out, pending = [], b""
    for position in positions:
        if position.silent:
            text = position.texts[0]
        else:
            data = pending + position.bytes_[0]
            text, used = utf_8_decode(data, "replace", False)
            pending = data[used:]
        out.append(_token(position.ids[0], text, _logprob(position), position.silent))
    return out


class GenerateVoice:
    """/generate and /generate_stream: one prompt, one choice."""

    plain = False
    """Every row says which token it is."""

    def __init__(self, asked: Telling) -> None:
        self._asked = asked
        self._pieces = [asked.before]
        self._count = 0
        self._tops: deque[list[dict[str, Any]]] = deque()
        """The likeliest at each place, of tokens that are still to be told."""
        self._last = _token(0, "", None, True)

    def begin(self, head: Head) -> str:
        return head.rid

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        (prompt,), asked = prompts, self._asked
        choice, *others = sorted(choices, key=likeliness, reverse=True)
        body: dict[str, Any] = {"generated_text": asked.before + "".join(choice.pieces)}
        if asked.details:
            prefill = prompt.echoed() if asked.prefill else []
            before = [{"id": p.ids[0], "text": p.texts[0], "logprob": _logprob(p)} for p in prefill if p is not None]
            details = self._details(choice, usage.output if not others else len(choice.logprobs), before)
            if others:
                details["best_of_sequences"] = [
                    {"generated_text": asked.before + "".join(one.pieces), **self._details(one, len(one.logprobs), before)}
                    for one in others
                ]
            body["details"] = details
        if timings is not None:
            body["metrics"] = timings
        return _json([body] if asked.listed else body)

    def _details(self, choice: Choice, count: int, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        """Of an answer of `count` tokens."""
        asked = self._asked
        more = {"top_tokens": [_top(position) for position in choice.logprobs]} if asked.top else {}
        return {
            "finish_reason": finish_reason(choice.reason, choice.stop_reason),
            "generated_tokens": count,
            "seed": asked.sampling.seed,
            "prefill": prefill,
            "tokens": tokens_of(choice.logprobs),
            **more,
        }

    def around(self, index: int) -> tuple[bytes, bytes]:
        raise AssertionError("a voice whose rows are not plain is never asked")

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterable[bytes]:
        return ()

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        self._pieces.append(text)
        tokens = self._row(text, row, batch)
        if batch.delta.reasons[row]:  # its last token goes out with the end
            self._last = tokens.pop() if tokens else self._last | {"text": text, "special": not text}
        elif tokens:
            self._last = tokens[-1]
        for token in tokens:
            yield self._event(token)

    def _row(self, text: str, row: int, batch: Batch) -> list[dict[str, Any]]:
        """The tokens of a row that share its text."""
        extra = batch.extra(row)
        positions = extra.logprobs if extra is not None else None
        if positions:
            tokens = [_token(p.ids[0], p.texts[0] if p.silent else "", _logprob(p), p.silent) for p in positions]
            if self._asked.top:
                self._tops.extend(map(_top, positions))
        else:
            tokens = [_token(id_, "", None, False) for id_ in batch.tokens(row)]
        if text and tokens:
            bearer = next((token for token in reversed(tokens) if not token["special"]), tokens[-1])
            bearer |= {"text": text, "special": False}
        return tokens

    def _event(self, token: dict[str, Any], text: str | None = None, details: dict[str, Any] | None = None) -> bytes:
        self._count += 1
        top = {"top_tokens": self._tops.popleft()} if self._tops else {}
        return _json({"index": self._count, "token": token, **top, "generated_text": text, "details": details})

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        details = None
        if self._asked.details:
            extra, usage = batch.extra(row), Usage.at(row, batch)
            details = {
                "finish_reason": finish_reason(reason, extra.stop_reason if extra else None),
                "generated_tokens": usage.output,
                "input_length": usage.prompt,
                "seed": self._asked.sampling.seed,
            }
        yield self._event(self._last, "".join(self._pieces), details)

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterable[bytes]:
        return ()

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return (error_payload(error),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return JsonReply(error_payload(error), error_of(error)[0], [*error_headers(error), *headers])
