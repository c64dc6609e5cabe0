"""Streams that say more at once (stream_interval).

What it is: `Merging`, a Sink before a reply's own, which keeps the rows of a choice back until they are so many tokens and passes them as one row. What it passes depends on the rows
alone, so that a stream that is resumed has the same events.
What it does not know: what a reply makes of rows, APIs, who asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import DONE, NAME, Finished, RowExtra, TokenLogprobs
from penstock.transports.door import Batch, Sink

_ALONE = (NAME, DONE)
"""Channels whose rows say something by being there."""
_AT_ONCE = ("error", "abort")


class _MergedBatch(Batch):
    """What one row, made of several, does not say in its text: it is as far as the last of them, and has the tokens and log-probabilities of all."""

    __slots__ = ("_extra", "_last", "_tokens")

    def __init__(self, last: Batch, tokens: list[int], extra: RowExtra | None) -> None:
        self._last = last
        self.delta = last.delta
        self.channels = last.channels
        self._tokens = tokens
        self._extra = extra

    def column(self, name: str) -> list[int]:
        return self._last.column(name)

    def extra(self, row: int) -> RowExtra | None:
        return self._extra

    def tokens(self, row: int) -> list[int]:
        return self._tokens


@dataclass(slots=True, eq=False)
class _Kept:
    """Rows of one choice and one channel; the last is `row` of `batch`."""

    texts: list[str]
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    row: int
    batch: Batch

    def pass_on(self, sink: Sink, choice: int, reason: str = "") -> None:
        extra = self.batch.extra(self.row)
        if self.logprobs:
            extra = (
                RowExtra(row=self.row, logprobs=self.logprobs) if extra is None else msgspec.structs.replace(extra, logprobs=self.logprobs)
            )
        sink.row(choice, "".join(self.texts), reason, self.row, _MergedBatch(self.batch, self.tokens, extra))


class Merging:
    """Passes the first token of a choice to `sink` at once, then rows of `interval` tokens or more, and what is left with the end. Channels, calls and choices stay apart. `tells_end`:
    what waits is passed before a failure, too; not in a stream that can be resumed, where it comes with the row that it belongs to."""

    __slots__ = ("_interval", "_kept", "_passed", "_sink", "_tells_end")

    def __init__(self, sink: Sink, interval: int, choices: int, *, tells_end: bool) -> None:
        self._sink = sink
        self._interval = interval
        self._kept: list[_Kept | None] = [None] * choices
        self._passed = [0] * choices
        """How many tokens a choice had when something of it was last passed."""
        self._tells_end = tells_end

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        kept = self._kept[choice]
        count = batch.column("output_tokens")[row]
        extra = batch.extra(row)
        channel = batch.channel(row)
        if kept is not None and channel != kept.batch.channel(kept.row):
            self._flush(choice, kept)
            kept = None
        if not self._passed[choice] or channel[0] in _ALONE or reason in _AT_ONCE or _is_rare(extra):
            if kept is not None:
                self._flush(choice, kept)
            self._passed[choice] = count
            self._sink.row(choice, text, reason, row, batch)
            return
        if kept is None:
            kept = self._kept[choice] = _Kept([], [], [], row, batch)
        kept.texts.append(text)
        kept.tokens += batch.tokens(row)
        if extra is not None and extra.logprobs:
            kept.logprobs += extra.logprobs
        kept.row, kept.batch = row, batch
        if reason or count - self._passed[choice] >= self._interval:
            self._flush(choice, kept, reason)

    def _flush(self, choice: int, kept: _Kept, reason: str = "") -> None:
        self._kept[choice] = None
        self._passed[choice] = kept.batch.column("output_tokens")[kept.row]
        kept.pass_on(self._sink, choice, reason)

    def finished(self, message: Finished) -> None:
        self._sink.finished(message)

    def failed(self, error: PenstockError) -> None:
        if self._tells_end:
            for choice, kept in enumerate(self._kept):
                if kept is not None:
                    self._flush(choice, kept)
        self._sink.failed(error)

    def said(self, error: Exception) -> str:
        said = getattr(self._sink, "said", None)
        return str(error) if said is None else str(said(error))


def _is_rare(extra: RowExtra | None) -> bool:
    """Does it say something that is of one row alone, beside why that ended?"""
    return extra is not None and (extra.prompt_token_ids is not None or extra.prompt_logprobs is not None or extra.prompt_text is not None)
