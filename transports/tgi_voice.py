"""What TGI's clients get to see.

What it is: `GenerateVoice`, the replies of /generate and /generate_stream, and TGI's error shape with its statuses.
What it does not know: requests' fields and their checks (tgi.py), how rows arrive, what makes a payload an event.

A stream has an event a token; the last one has the whole text and, if asked for, the details. Text belongs to the last token of its row that is not
special, so that the tokens' texts, without special ones, are the text. A failed stream ends with an error event.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import Cancelled, InvalidRequest, PenstockError
from penstock.core.protocol.messages import TokenLogprobs
from penstock.transports.gateway import Batch
from penstock.transports.generation import Generation
from penstock.transports.logprobs import LOWEST_LOGPROB
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
        self._last = _token(0, "", None, True)

    def begin(self, head: Head) -> str:
        return head.rid

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        (prompt,), (choice,), asked = prompts, choices, self._asked
        details = None
        if asked.details:
            prefill = prompt.echoed() if asked.prefill else []
            details = {
                "finish_reason": finish_reason(choice.reason, choice.stop_reason),
                "generated_tokens": usage.output,
                "seed": asked.sampling.seed,
                "prefill": [{"id": p.ids[0], "text": p.texts[0], "logprob": _logprob(p)} for p in prefill if p is not None],
                "tokens": tokens_of(choice.logprobs),
            }
        body = {"generated_text": asked.before + "".join(choice.pieces), "details": details}
        if timings is not None:
            body["metrics"] = timings
        return _json([body] if asked.listed else body)

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
        else:
            tokens = [_token(id_, "", None, False) for id_ in batch.tokens(row)]
        if text and tokens:
            bearer = next((token for token in reversed(tokens) if not token["special"]), tokens[-1])
            bearer |= {"text": text, "special": False}
        return tokens

    def _event(self, token: dict[str, Any], text: str | None = None, details: dict[str, Any] | None = None) -> bytes:
        self._count += 1
        return _json({"index": self._count, "token": token, "generated_text": text, "details": details})

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
