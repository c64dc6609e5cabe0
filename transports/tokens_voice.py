"""What clients of tokens in, tokens out get to see.

What it is: `Tokens`, a Generation with what its reply is to show, and `TokensVoice`, the replies of /inference/v1/generate in vLLM's shapes, in one piece or
as events: ids and log-probabilities by id, no text anywhere.
What it does not know: requests' fields and their checks (tokens.py), how rows arrive, what makes a payload an event.

Order of a stream: chunks with the tokens that came; of each choice one without tokens and with the finish_reason; then, if asked for, one with no choices and
the usage; then [DONE]. A failed stream ends with an error event and without [DONE].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import TokenLogprobs
from penstock.transports.gateway import Batch
from penstock.transports.generation import Generation
from penstock.transports.logprobs import prompt_logprobs_json, token_logprobs
from penstock.transports.openai_voice import DONE, usage_json
from penstock.transports.request import Header, JsonReply, error_body, error_fields, error_reply
from penstock.transports.tokens_schema import SAMPLING, WITHIN, TokensSampling
from penstock.transports.voice import Choice, Head, Prompt, Usage

_json = msgspec.json.Encoder().encode
_FIRST = re.compile(r"[a-z_]+")


class Tokens(Generation, kw_only=True):
    """One understood request."""

    include_usage: bool
    continuous_usage: bool


def placed(error: PenstockError) -> PenstockError:
    """The same error, with the client's name of a field of sampling_params, which text and the checks of settings call by its bare name. (One that stands beside
    sampling_params is called what it is.)"""
    found = _FIRST.match(error.param or "")
    if found is None or found[0] not in TokensSampling.__struct_fields__ or error.message.endswith(WITHIN):
        return error
    name = re.compile(rf"(?<![\w.-]){found[0]}\b")
    error.param = f"{SAMPLING}.{error.param}"
    error.message = name.sub(f"{SAMPLING}.{found[0]}", error.message)
    return error


class TokensVoice:
    """/inference/v1/generate: one prompt, n choices."""

    plain = False

    def __init__(self, asked: Tokens) -> None:
        self._asked = asked
        self._with_logprobs = asked.sampling.logprobs is not None

    def begin(self, head: Head) -> str:
        """The request's own id is the reply's, as in vLLM."""
        self._id = head.rid[:-1]
        self._model = {"model": head.model, "system_fingerprint": head.fingerprint}
        return self._id

    # --- in one piece

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        (prompt,) = prompts
        body: dict[str, Any] = {
            "request_id": self._id,
            **self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage_json(usage),
        }
        if self._asked.sampling.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_json(prompt.logprobs)
        if timings is not None:
            body["metrics"] = timings
        return _json(body)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        out = self._piece(index, choice.tokens, choice.logprobs) | {"finish_reason": choice.reason, "stop_reason": choice.stop_reason}
        if choice.error is not None:
            out["error"] = error_fields(placed(choice.error))
        return out

    def _piece(self, index: int, tokens: list[int], positions: list[TokenLogprobs]) -> dict[str, Any]:
        logprobs = token_logprobs(positions) if self._with_logprobs else None
        return {"index": index, "token_ids": tokens, "logprobs": logprobs, "finish_reason": None}

    # --- as events

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None, **more: Any) -> bytes:
        said: dict[str, Any] = {"request_id": self._id, "choices": choices, **more}
        return _json(said if usage is None else {**said, "usage": usage_json(usage)})

    def _usage(self, row: int, batch: Batch) -> Usage | None:
        return Usage.at(row, batch) if self._asked.continuous_usage else None

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        return None

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterable[bytes]:
        return ()

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        tokens, extra = batch.tokens(row), batch.extra(row)
        positions = extra.logprobs if extra is not None else None
        if tokens or positions:
            yield self._event([self._piece(index, tokens, positions or [])], self._usage(row, batch))

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        extra = batch.extra(row)
        choice = self._piece(index, [], []) | {
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": extra.stop_reason if extra else None,
        }
        if error is not None:
            choice["error"] = error_fields(placed(error))
        yield self._event([choice], self._usage(row, batch))

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterator[bytes]:
        if self._asked.include_usage or timings is not None:
            told = usage if self._asked.include_usage else None
            yield self._event([], told, **({} if timings is None else {"metrics": timings}))
        yield DONE

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return (error_body(placed(error)),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return error_reply(placed(error), headers)
