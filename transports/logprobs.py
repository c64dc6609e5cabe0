"""Log-probabilities in the three shapes that clients know.

What it is: TokenLogprobs of core/protocol/messages.py as chat's (with texts, or ids alone), completions' and vLLM's prompt JSON.
What it does not know: requests, streams.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Any

from penstock.core.protocol.messages import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""JSON has no -inf."""


def _name(position: TokenLogprobs, i: int, as_ids: bool) -> str:
    return f"token_id:{position.ids[i]}" if as_ids else position.texts[i]


def spoken(positions: Sequence[TokenLogprobs | None]) -> list[Any]:
    """Those of tokens that are part of the text."""
    return [position for position in positions if position is None or not position.silent]


def chat_logprobs(positions: list[TokenLogprobs], as_ids: bool) -> dict[str, Any]:
    """Chat's shape: {"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}. Its tokens joined are the text."""
    content = []
    for p in spoken(positions):
        entries = [
            {"token": _name(p, i, as_ids), "logprob": max(p.logprobs[i], LOWEST_LOGPROB), "bytes": list(p.bytes_[i])}
            for i in range(len(p.ids))
        ]
        content.append({**entries[0], "top_logprobs": entries[1:]})
    return {"content": content, "refusal": None}


def token_logprobs(positions: list[TokenLogprobs]) -> dict[str, Any]:
    """Chat's shape of tokens that have an id and no text: `token` is `token_id:ID`, and there are no bytes."""
    content = []
    for p in positions:
        entries = [
            {"token": f"token_id:{token}", "logprob": max(logprob, LOWEST_LOGPROB), "bytes": None}
            for token, logprob in zip(p.ids, p.logprobs, strict=True)
        ]
        content.append({**entries[0], "top_logprobs": entries[1:]})
    return {"content": content}


class TextOffsets:
    """Where each token of an answer begins in its text, in characters from `start`: a token inside a character begins where that does."""

    __slots__ = ("_at", "_pending")

    def __init__(self, start: int = 0) -> None:
        self._at = start
        self._pending = b""

    def of(self, positions: list[TokenLogprobs]) -> list[int]:
        """The offsets of the next tokens."""
        offsets = []
        for position in positions:
            offsets.append(self._at)
            if position.silent:
                continue
            data = self._pending + position.bytes_[0]
            text, used = utf_8_decode(data, "replace", False)
            self._at += len(text)
            self._pending = data[used:]
        return offsets


def completion_logprobs(positions: Sequence[TokenLogprobs | None], as_ids: bool, offsets: list[int]) -> dict[str, Any]:
    """Completions' shape: parallel lists. A position without log-probabilities (the first of a prompt) has null ones."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for p in positions:
        tokens.append(_name(p, 0, as_ids) if p is not None and p.ids else "")
        if p is None or not p.logprobs:
            values.append(None)
            tops.append(None)
            continue
        values.append(max(p.logprobs[0], LOWEST_LOGPROB))
        top = {_name(p, i, as_ids): max(p.logprobs[i], LOWEST_LOGPROB) for i in range(1, len(p.ids))}
        top.setdefault(tokens[-1], values[-1] or 0.0)
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs_json(positions: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token null or {token id: {logprob, rank, decoded_token}}, of which the last is null where tokens have no texts."""
    return [
        None
        if p is None or not p.logprobs
        else {
            str(p.ids[i]): {
                "logprob": max(p.logprobs[i], LOWEST_LOGPROB),
                "rank": p.ranks[i] if i < len(p.ranks) else None,
                "decoded_token": p.texts[i] if p.texts else None,
            }
            for i in range(len(p.ids))
        }
        for p in positions
    ]
