"""The executor: checks each step's Forward and sends it to the device queue.

What it is: the actor between the scheduler's plan and the device. It refuses a plan that breaks the contract of `Forward` before it can
reach a device: another epoch, a step that is not the next one, columns of unequal length.
What it does not know: devices, threads, when a step is done (StepDone goes from the device queue to the scheduler).
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.core.protocol.columns import EMPTY_I32, EMPTY_U8
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import DeviceWork, Forward


class Executor:
    name = "executor"
    takes: frozenset[type[Message]] = frozenset({Forward})
    gives: frozenset[type[Message]] = frozenset({DeviceWork})

    def __init__(self, *, engine: int, epoch: int) -> None:
        self._engine = engine
        self._epoch = epoch
        self._step = 0

    def handle(self, message: Message) -> Iterator[Message]:
        assert isinstance(message, Forward)
        if (message.engine, message.epoch) != (self._engine, self._epoch):
            raise ProtocolError(f"Forward of engine {message.engine} epoch {message.epoch} came to {self._engine} epoch {self._epoch}.")
        if message.step != self._step + 1:
            raise ProtocolError(f"Forward of step {message.step} came after step {self._step}.")
        rows = len(message.slots)
        if len(message.starts) != rows or len(message.counts) != rows or not 0 <= message.num_decode <= rows:
            raise ProtocolError(f"Forward of step {message.step}: row columns differ in length.")
        if len(message.copy_src) != len(message.copy_dst) or len(message.place_slots) != len(message.place_counts):
            raise ProtocolError(f"Forward of step {message.step}: copy or place columns differ in length.")
        if not len(message.block_slots) == len(message.block_index) == len(message.block_ids):
            raise ProtocolError(f"Forward of step {message.step}: block columns differ in length.")
        if message.write_slots is not EMPTY_I32 or message.clone_src is not EMPTY_I32 or message.embed_slots is not EMPTY_I32:
            self._check_optional(message)
        if message.block_groups is not EMPTY_U8 or message.copy_groups is not EMPTY_U8 or message.place_adapters is not EMPTY_I32:
            self._check_companions(message)
        self._step = message.step
        yield DeviceWork(forward=message)

    def _check_optional(self, message: Forward) -> None:
        if not len(message.write_slots) == len(message.write_positions) == len(message.write_tokens):
            raise ProtocolError(f"Forward of step {message.step}: write columns differ in length.")
        if not len(message.clone_src) == len(message.clone_dst) == len(message.clone_lens):
            raise ProtocolError(f"Forward of step {message.step}: clone columns differ in length.")
        if not len(message.embed_slots) == len(message.embed_starts) == len(message.embed_counts) == len(message.embed_rows):
            raise ProtocolError(f"Forward of step {message.step}: embed columns differ in length.")

    def _check_companions(self, message: Forward) -> None:
        for name, column, beside in (
            ("block_groups", message.block_groups, message.block_ids),
            ("copy_groups", message.copy_groups, message.copy_src),
            ("place_adapters", message.place_adapters, message.place_slots),
        ):
            if len(column) not in (0, len(beside)):
                raise ProtocolError(f"Forward of step {message.step}: {name} is not as long as what it is for.")
