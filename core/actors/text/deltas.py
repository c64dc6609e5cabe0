"""The rows of one step for one edge, and log-probabilities in a reader's form.

What it is: `EdgeBatch` collects rows as short lists and turns them into one TextDelta; `LogprobReader` unfolds the sparse columns of
StepTokens for the few rows that ask.
What it does not know: which rows are right to send, the ledger's entries beyond their slot columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from penstock.core.actors.text.detokenizer import TokenTable
from penstock.core.actors.text.ledger import Ledger
from penstock.core.protocol.columns import EMPTY_I32, EMPTY_U8, i32
from penstock.core.protocol.errors import sendable
from penstock.core.protocol.messages import LogprobColumns, RowExtra, TextDelta, TokenLogprobs
from penstock.core.runtime.actor import To


class EdgeBatch:
    """One edge's rows of the step in hand. The lists are parallel, but `tokens`, which is CSR by `counts`."""

    __slots__ = ("counts", "edge", "extras", "marked", "reasons", "slots", "texts", "tokens", "totals")

    def __init__(self, edge: int) -> None:
        self.edge = edge
        self._clear()

    def _clear(self) -> None:
        self.slots: list[int] = []
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.counts: list[int] = []
        self.totals: list[int] = []
        self.reasons: list[str] = []
        self.extras: list[RowExtra] = []
        self.marked: list[tuple[int, int, int]] = []
        """(row, channel, call) of those that are not plain content."""

    def out(self, ledger: Ledger) -> Iterable[To]:
        """What they become for whoever listens."""
        return (To(self.take(ledger), self.edge),)

    def unsendable(self) -> list[int]:
        """Rows whose texts cannot be sent: a plugin gave them, and the link would end over them for everybody. Next to nothing where there are none."""
        try:
            joined = "".join(self.texts)
            if not joined.isascii():
                joined.encode()
        except (TypeError, UnicodeEncodeError):
            return [row for row, text in enumerate(self.texts) if not isinstance(text, str) or sendable(text) != text]
        return []

    def fail(self, slot: int, why: str) -> None:
        """The last row of this slot, which ends it, ends it as an error."""
        row = max(at for at, one in enumerate(self.slots) if one == slot)
        self.reasons[row] = "error"
        self.extras = [extra for extra in self.extras if extra.row != row]
        self.extras.append(RowExtra(row=row, error=why, error_code="internal_error"))

    def take(self, ledger: Ledger) -> TextDelta:
        """The rows as one message; the batch is empty again."""
        slots = np.array(self.slots, dtype=np.intp)
        channels, calls = EMPTY_U8, EMPTY_I32
        if self.marked:
            channels, calls = np.zeros(len(slots), np.uint8), np.full(len(slots), -1, np.int32)
            for row, channel, call in self.marked:
                channels[row], calls[row] = channel, call
        delta = TextDelta(
            keys=ledger.keys[slots],
            choices=ledger.indices[slots],
            texts=self.texts,
            counts=i32(self.counts),
            tokens=i32(self.tokens) if self.tokens else EMPTY_I32,
            prompt_tokens=ledger.prompts[slots],
            cached_tokens=ledger.cached[slots],
            output_tokens=i32(self.totals),
            reasons=self.reasons,
            extras=self.extras,
            channels=channels,
            calls=calls,
        )
        self._clear()
        return delta


class LogprobReader:
    """Rows of a LogprobColumns as TokenLogprobs. `table` must know special tokens' texts too."""

    def __init__(self, columns: LogprobColumns, table: TokenTable) -> None:
        self._ids = columns.ids.tolist()
        self._values = columns.values.tolist()
        self._ranks = columns.ranks.tolist()
        self._counts = columns.counts.tolist()
        self._starts = np.concatenate([[0], np.cumsum(columns.counts)]).tolist()
        self._table = table
        self.rows: list[int] = columns.rows.tolist()
        self.positions: list[int] = columns.positions.tolist()
        self._of_row: dict[int, int] | None = None

    def of_row(self, row: int, *, spelled: bool) -> TokenLogprobs | None:
        """The (last) entry for step row `row`; see `entry`."""
        if self._of_row is None:
            self._of_row = {row: index for index, row in enumerate(self.rows)}
        index = self._of_row.get(row)
        return None if index is None else self.entry(index, spelled=spelled)

    def entry(self, index: int, *, spelled: bool) -> TokenLogprobs:
        """`spelled`: with the tokens' texts and bytes."""
        start, stop = self._starts[index], self._starts[index + 1]
        ids = self._ids[start:stop]
        data = self._table.data
        pieces = [data[token] if 0 <= token < len(data) else b"" for token in ids] if spelled else []
        return TokenLogprobs(
            ids=ids,
            logprobs=self._values[start:stop],
            ranks=[self._ranks[index], *range(1, len(ids))],
            texts=[piece.decode("utf-8", "replace") for piece in pieces],
            bytes_=pieces,
        )
