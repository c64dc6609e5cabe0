"""What the Python API gives back, in vLLM's shapes.

What it is: `RequestOutput` and its parts, and the log-probabilities of a message as vLLM has them: for each position a dictionary by token id, the chosen
token first; and whether a request whose choices have all ended failed.
What it does not know: engines, requests in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from penstock.core.protocol.errors import EngineFailure, InvalidRequest, PenstockError
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, NAME, REASONING, TokenLogprobs


class Logprob(msgspec.Struct, frozen=True):
    """One token at one position. `rank`: 1 is the most likely of the vocabulary. A part of a character decodes to U+FFFD."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""The chosen token (of a prompt: the token that is there), then the k most likely; the chosen one stands there once if it is among them."""


class ToolCall(msgspec.Struct, kw_only=True):
    """A call of a tool. `arguments`: JSON as a text, as the model wrote it; not valid if the answer was cut off."""

    id: str
    name: str
    arguments: str = ""


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One of the `n` answers. Where log-probabilities were asked for, `logprobs` has one entry a token, and `cumulative_logprob` is the sum over
    the tokens that were drawn."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    reasoning: str = ""
    """With split: what it says to itself."""
    tool_calls: list[ToolCall] = []
    """With split."""

    def take(self, text: str, channel: int, call_id: str) -> None:
        """A row's text. `call_id`: of one that begins a call."""
        if channel == CONTENT:
            self.text += text
        elif channel == REASONING:
            self.reasoning += text
        elif channel == NAME:
            self.tool_calls.append(ToolCall(id=call_id, name=text))
        elif channel == ARGUMENTS:
            self.tool_calls[-1].arguments += text

    def add_logprobs(self, positions: list[TokenLogprobs]) -> None:
        self.logprobs = (self.logprobs or []) + [by_token(position) for position in positions]
        self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(position.logprobs[0] for position in positions)


class RequestOutput(msgspec.Struct, kw_only=True):
    """One prompt's answers. `prompt_logprobs` has an entry for each token of the prompt; the first has none. Times in seconds, 0 if never reached."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    outputs: list[CompletionOutput] = []
    cached_tokens: int = 0
    finished: bool = False
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class BeamSearchSequence(msgspec.Struct, kw_only=True):
    """One hypothesis. `tokens` are the prompt's and its own, without the end token unless include_stop_str_in_output; `text` is theirs. `cum_logprob` is the
    sum over its own tokens, the end token included; `logprobs` has one entry for each of them."""

    tokens: list[int]
    text: str
    cum_logprob: float
    logprobs: list[PositionLogprobs]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class BeamSearchOutput(msgspec.Struct, kw_only=True):
    """One prompt's hypotheses, the best first."""

    sequences: list[BeamSearchSequence]


class StreamDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought for one choice of a streamed request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    channel: Literal["content", "reasoning", "name", "arguments", "done"] = "content"
    """What `text` is. With split: reasoning; the name of a function that is called, more of its arguments, or that they are complete and valid JSON."""
    call: int = -1
    """Which of the answer's calls, from 0; -1: none."""


CHANNELS: tuple[Literal["content", "reasoning", "name", "arguments", "done"], ...] = ("content", "reasoning", "name", "arguments", "done")
"""By their numbers in TextDelta.channels."""


def by_token(position: TokenLogprobs) -> PositionLogprobs:
    out: PositionLogprobs = {}
    for i, token in enumerate(position.ids):
        out.setdefault(token, Logprob(position.logprobs[i], position.ranks[i], position.texts[i]))
    return out


def prompt_positions(positions: list[TokenLogprobs | None]) -> list[PositionLogprobs | None]:
    return [None if position is None or not position.logprobs else by_token(position) for position in positions]


def verdict(output: RequestOutput, codes: Mapping[int, str | None]) -> PenstockError | None:
    """What a request ends with; `codes` are the error codes of choices that failed. A choice for which its own settings left no token to draw
    is the caller's mistake: it costs the other choices nothing."""
    failed = [choice for choice in output.outputs if choice.finish_reason == "error"]
    ours = next((choice for choice in failed if codes.get(choice.index) != InvalidRequest.default_code), None)
    if ours is not None:
        return EngineFailure(f"The request failed: {str(ours.stop_reason).rstrip('.')}.")
    return InvalidRequest(str(failed[0].stop_reason)) if failed and len(failed) == len(output.outputs) else None
