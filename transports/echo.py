"""What a stream says of a prompt before the answer, in pieces.

What it is: `echo_pieces`, the text of a prompt and the log-probabilities of its tokens cut into events of some ten kilobytes each, made when they are asked
for; `Shared`, which makes them once for all choices that say them; `is_small`, for what is not worth a thread.
What it does not know: requests, choices' numbers, outboxes, where one piece after the other goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.messages import TokenLogprobs
from penstock.transports.logprobs import completion_logprobs

PIECE_LOGPROBS = 2048
"""Log-probabilities in a piece: about 60 kB of JSON, which take a thread a millisecond or two."""
PIECE_CHARS = 16 << 10
SMALL_BYTES = 32 << 10
"""What a stream says of its prompts for all choices together without further ado."""
_LOGPROB_BYTES = 40

_json = msgspec.json.Encoder().encode

Positions = Sequence[TokenLogprobs | None]


def is_small(text: str, logprobs: int, ids: int, choices: int) -> bool:
    """Is it little, said once a choice? `logprobs` and `ids`: how many are said with the text."""
    return (len(text) + _LOGPROB_BYTES * logprobs + 8 * ids) * choices <= SMALL_BYTES


def echo_pieces(text: str, positions: Positions | None, offsets: Sequence[int], *, as_ids: bool) -> Iterator[bytes]:
    """The members of a choice in each event, from `text` to the closing brace. At least one; their texts and the lists of their log-probabilities are, one
    after the other, those of the whole. `positions` None: no log-probabilities. `offsets`: where the positions' tokens begin in the text."""
    if positions is None:
        for at in range(0, len(text) or 1, PIECE_CHARS):
            yield _members(text[at : at + PIECE_CHARS], None)
        return
    begin = first = 0
    while True:
        last, told = first, 0
        while last < len(positions) and (told < PIECE_LOGPROBS or len(offsets) != len(positions)):
            told += _count(positions[last])
            last += 1
        end = offsets[last] if last < len(positions) else len(text)
        yield _members(text[begin:end], completion_logprobs(positions[first:last], as_ids, list(offsets[first:last])))
        if last >= len(positions):
            return
        begin, first = end, last


def _count(position: TokenLogprobs | None) -> int:
    return 1 if position is None else max(1, len(position.ids))


def _members(text: str, logprobs: dict[str, Any] | None) -> bytes:
    return _json({"text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None})[1:]


class Shared:
    """An iterable whose items are made once, by whoever comes to them first, and kept. Its iterators may be on several threads, one after the other."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._made: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        at = 0
        while True:
            if at == len(self._made):
                item = next(self._source, None)
                if item is None:
                    return
                self._made.append(item)
            yield self._made[at]
            at += 1
