"""The sampler: checks each step's Sample and sends it to the device queue, behind its Forward.

What it is: the actor that owns when a step may draw. (With grammars it will hold a Sample back until its masks are there, while the Forward
runs; the device queue keeps the order.) The drawing itself, penalties and Philox noise live in the device's runner.
What it does not know: logits, devices, token values (they come back with StepDone).
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.core.protocol.columns import EMPTY_I32
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import DeviceWork, Sample


class Sampler:
    name = "sampler"
    takes: frozenset[type[Message]] = frozenset({Sample})
    gives: frozenset[type[Message]] = frozenset({DeviceWork})

    def __init__(self, *, engine: int, epoch: int) -> None:
        self._engine = engine
        self._epoch = epoch
        self._step = 0

    def handle(self, message: Message) -> Iterator[Message]:
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
        yield DeviceWork(sample=message)
