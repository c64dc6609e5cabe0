"""The sampler: checks each step's Sample and sends it to the device queue, behind its Forward.

What it is: the actor that owns when a step may draw: a Sample whose mask is still to come is held back, and those behind it, while the Forward
runs; the device queue keeps the order. The drawing itself, penalties and Philox noise live in the device's runner.
What it does not know: logits, devices, token values (they come back with StepDone), what a mask is for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

from penstock.core.protocol.columns import EMPTY_I32
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import DeviceWork, MaskReady, Sample


class Sampler:
    """`masks`: there is somebody who makes masks."""

    name = "sampler"
    takes: frozenset[type[Message]] = frozenset({Sample})
    gives: frozenset[type[Message]] = frozenset({DeviceWork})

    def __init__(self, *, engine: int, epoch: int, masks: bool = False) -> None:
        if masks:
            self.takes = self.takes | {MaskReady}
        self._engine = engine
        self._epoch = epoch
        self._step = 0
        self._held: deque[Sample] = deque()
        """The first waits for its mask."""

    def handle(self, message: Message) -> Iterator[Message]:
        if isinstance(message, MaskReady):
            yield from self._masked(message)
            return
        assert isinstance(message, Sample)
        if (message.engine, message.epoch) != (self._engine, self._epoch):
            raise ProtocolError(f"Sample of engine {message.engine} epoch {message.epoch} came to {self._engine} epoch {self._epoch}.")
        if message.step != self._step + 1:
            raise ProtocolError(f"Sample of step {message.step} came after step {self._step}.")
        if not len(message.rows) == len(message.slots) == len(message.positions):
            raise ProtocolError(f"Sample of step {message.step}: row columns differ in length.")
        if len(message.prompt_rows) != len(message.prompt_topk):
            raise ProtocolError(f"Sample of step {message.step}: prompt columns differ in length.")
        if message.mask_rows is not EMPTY_I32 and len(message.mask_rows) != len(message.rows):
            raise ProtocolError(f"Sample of step {message.step}: mask_rows is not as long as rows.")
        if message.pool_rows is not EMPTY_I32 and len(message.pool_rows) != len(message.pool_kinds):
            raise ProtocolError(f"Sample of step {message.step}: pool columns differ in length.")
        self._step = message.step
        if message.masked or self._held:
            self._held.append(message)
        else:
            yield DeviceWork(sample=message)

    def _masked(self, message: MaskReady) -> Iterator[Message]:
        """Masks come in order: they are for the Sample that is first in line."""
        held = self._held
        if not held or held[0].step != message.step:
            raise ProtocolError(f"A mask of step {message.step} came, for which no Sample waits.")
        sample = held.popleft()
        if message.counts.size:
            width = 1 + sample.lookahead
            mask_rows = np.full(len(sample.rows) * width, -1, np.int32)
            at = 0
            for row, count in zip(message.rows.tolist(), message.counts.tolist(), strict=True):
                mask_rows[row * width : (row + 1) * width] = -2
                mask_rows[row * width : row * width + count] = np.arange(at, at + count, dtype=np.int32)
                at += count
        else:
            mask_rows = np.full(len(sample.rows), -1, np.int32)
            mask_rows[message.rows] = np.arange(len(message.rows), dtype=np.int32)
        yield DeviceWork(sample=msgspec.structs.replace(sample, mask=message.mask, mask_rows=mask_rows, masked=False))
        while held and not held[0].masked:
            yield DeviceWork(sample=held.popleft())
