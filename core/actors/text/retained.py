"""Streams that outlive their connection.

What it is: `Kept`, one retained stream: every row that was sent (or would have been, had anybody listened), who listens now, and when it is forgotten; `Streams`, all of
them, by the id that the client sees. Whoever attaches gets all rows again, in the same order: an edge that encodes them again gets the same events, and leaves out
those that its client has. What is retained is bounded in bytes, and belongs to one tenant.
What it does not know: events, how a request runs or ends, when it is to be parked (actor.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from penstock.core.actors.text.deltas import EdgeBatch
from penstock.core.actors.text.ledger import Ledger, Request
from penstock.core.protocol.columns import EMPTY_I32, EMPTY_U8
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import StreamExists
from penstock.core.protocol.messages import Finished, Rejected, RowExtra, Submit, TextDelta
from penstock.core.runtime.actor import To

PIECE = 4096
"""Rows of a stream that go out again in one message."""
ROW_BYTES = 120
"""What a row costs beside its text: eight numbers in columns, and Python's own of two strings."""
ENTRY_BYTES = 300
"""What a position of log-probabilities costs, a candidate."""


class RowLog:
    """Rows as columns that grow. `bytes` is about what they take."""

    def __init__(self) -> None:
        self._keys = array("q")
        self._numbers = {name: array("i") for name in ("choices", "counts", "tokens", "prompt_tokens", "cached_tokens", "output_tokens")}
        self._texts: list[str] = []
        self._reasons: list[str] = []
        self._starts = array("q", [0])
        """Of each row's tokens."""
        self._extras: list[RowExtra] = []
        self._marked: list[tuple[int, int, int]] = []
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def take(self, delta: TextDelta) -> None:
        """Behind those that are there."""
        first = len(self._texts)
        self._keys.frombytes(delta.keys.tobytes())
        for name, column in self._numbers.items():
            column.frombytes(getattr(delta, name).tobytes())
        start = self._starts[-1]
        for count in delta.counts.tolist():
            start += count
            self._starts.append(start)
        self._texts += delta.texts
        self._reasons += delta.reasons
        self._extras += [msgspec.structs.replace(extra, row=first + extra.row) for extra in delta.extras]
        if len(delta.channels):
            marks = enumerate(zip(delta.channels.tolist(), delta.calls.tolist(), strict=True), first)
            self._marked += [(row, channel, call) for row, (channel, call) in marks if channel]
        self.bytes += ROW_BYTES * len(delta.texts) + sum(map(len, delta.texts)) + sum(map(_size, delta.extras))

    def deltas(self) -> Iterator[TextDelta]:
        """All rows, in their order."""
        for first in range(0, len(self), PIECE):
            yield self._delta(first, min(first + PIECE, len(self)))

    def _delta(self, first: int, last: int) -> TextDelta:
        columns: dict[str, Any] = {
            name: np.array(column[first:last], np.int32) for name, column in self._numbers.items() if name != "tokens"
        }
        tokens = self._numbers["tokens"][self._starts[first] : self._starts[last]]
        channels, calls = EMPTY_U8, EMPTY_I32
        marked = [mark for mark in self._marked if first <= mark[0] < last]
        if marked:
            channels, calls = np.zeros(last - first, np.uint8), np.full(last - first, -1, np.int32)
            for row, channel, call in marked:
                channels[row - first], calls[row - first] = channel, call
        return TextDelta(
            keys=np.array(self._keys[first:last], np.int64),
            texts=self._texts[first:last],
            tokens=np.array(tokens, np.int32) if tokens else EMPTY_I32,
            reasons=self._reasons[first:last],
            extras=[msgspec.structs.replace(extra, row=extra.row - first) for extra in self._extras if first <= extra.row < last],
            channels=channels,
            calls=calls,
            **columns,
        )


def _size(extra: RowExtra) -> int:
    entries = [*(extra.logprobs or ()), *(extra.prompt_logprobs or ())]
    return (
        ROW_BYTES
        + ENTRY_BYTES * sum(len(entry.ids) for entry in entries if entry is not None)
        + len(extra.prompt_text or "")
        + 8 * len(extra.prompt_offsets)
        + (0 if extra.prompt_token_ids is None else extra.prompt_token_ids.nbytes)
    )


class KeptBatch(EdgeBatch):
    """The rows of one retained stream in the step in hand."""

    __slots__ = ("_kept",)

    def __init__(self, kept: Kept) -> None:
        super().__init__(-1)
        self._kept = kept

    def out(self, ledger: Ledger) -> Iterator[To]:
        return self._kept.rows(self.take(ledger))


class Kept:
    """One retained stream: all prompts of one HTTP request. Times in ns on CLOCK_MONOTONIC."""

    def __init__(self, submit: Submit, most_bytes: int, filled: list[Kept]) -> None:
        """`filled` gets it when it is full and nobody reads it."""
        self.rid = submit.rid
        self.group = submit.group or submit.key
        self.tenant = submit.tenant
        self.model = submit.model
        self.on_disconnect = submit.on_disconnect
        self.retain_ns = round(submit.retain_s * 1e9)
        self.context = submit.context
        self.edge: int | None = submit.edge
        """Who listens; None: nobody."""
        self.requests: dict[int, Request] = {}
        """By key: those that have not ended."""
        self.keys: list[int] = []
        """Of all of them, in the order in which they came."""
        self.ends: list[Finished | Rejected] = []
        self.log: RowLog | None = RowLog()
        """None: it grew too long to be kept."""
        self.batch = KeptBatch(self)
        self.since_ns = 0
        """When its last reader left, or it ended: from then on it is kept so long."""
        self._most = most_bytes
        self._filled = filled

    @property
    def bytes(self) -> int:
        return len(self.context) + (0 if self.log is None else self.log.bytes)

    @property
    def full(self) -> bool:
        """Nothing more can be kept."""
        return self.bytes >= self._most

    @property
    def ended(self) -> bool:
        return not self.requests

    def rows(self, delta: TextDelta) -> Iterator[To]:
        """Keep them, and pass them on."""
        if self.log is not None:
            self.log.take(delta)
            if self.full:
                if self.edge is not None:
                    self.log = None  # it can be read once, as any other
                else:
                    self._filled.append(self)
        if self.edge is not None:
            yield To(delta, self.edge)

    def end(self, key: int, message: Finished | Rejected, now_ns: int) -> Iterator[To]:
        """One of its requests has ended."""
        self.requests.pop(key, None)
        self.ends.append(message)
        self.since_ns = now_ns
        if self.edge is not None:
            yield To(message, self.edge)

    def again(self) -> Iterator[To]:
        """Everything so far, to who listens now."""
        assert self.log is not None
        assert self.edge is not None
        for delta in self.log.deltas():
            yield To(delta, self.edge)
        for message in self.ends:
            yield To(message, self.edge)


class Streams:
    """All retained streams of a text process."""

    def __init__(self, config: Config) -> None:
        self._most = config.retained_stream_bytes
        self._most_bytes = config.retained_bytes
        self._streams: dict[tuple[str, str], Kept] = {}
        self._by_key: dict[int, Kept] = {}
        self.filled: list[Kept] = []
        """Those that have grown full lately while nobody read them: they are to wait."""

    def __iter__(self) -> Iterator[Kept]:
        return iter(list(self._streams.values()))

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for kept in self._streams.values())

    def open(self, request: Request) -> Kept:
        """The stream that a request belongs to. Raises StreamExists if another one has its id."""
        submit = request.submit
        kept = self._streams.get((submit.tenant, submit.rid))
        if kept is None:
            self.make_room()
            kept = self._streams[submit.tenant, submit.rid] = Kept(submit, self._most, self.filled)
        elif submit.context or submit.group != kept.group:
            # its first request brings a context, the others name that one: this is another stream's
            raise StreamExists(submit.rid)
        kept.requests[request.key] = request
        kept.keys.append(request.key)
        self._by_key[request.key] = kept
        return kept

    def make_room(self) -> bool:
        """Of those that have ended, forget the oldest while there is too much; of the others that are read, the longest loses what is kept of it. False: there still
        is too much."""
        while self.bytes > self._most_bytes:
            ended = [kept for kept in self._streams.values() if kept.ended]
            if ended:
                self.forget(min(ended, key=lambda kept: kept.since_ns))
                continue
            held = [kept for kept in self._streams.values() if kept.log is not None and kept.edge is not None]
            if not held:
                return False
            max(held, key=lambda kept: kept.bytes).log = None
        return True

    def find(self, rid: str, tenant: str) -> Kept | None:
        """That tenant's."""
        return self._streams.get((tenant, rid))

    def of_key(self, key: int) -> Kept | None:
        return self._by_key.get(key)

    def forget(self, kept: Kept) -> None:
        self._streams.pop((kept.tenant, kept.rid), None)
        for key in kept.keys:
            self._by_key.pop(key, None)

    def overdue(self, now_ns: int) -> list[Kept]:
        """Those whose time is over: they have ended, or nobody listens and they wait for somebody to."""
        return [
            kept
            for kept in self._streams.values()
            if now_ns - kept.since_ns > kept.retain_ns
            and (kept.ended or (kept.edge is None and all(request.parked for request in kept.requests.values())))
        ]
