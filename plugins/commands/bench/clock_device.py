"""A device whose tokens tell the time, for `penstock bench streams`.

What it is: `ClockDevice`, the fake device, but that each token it draws is the moment at which its step left the device: `ticks`, the monotonic clock in TICK_NS modulo how many tokens there are whose text stands for itself. Who
reads a stream on the same machine knows from each event how long it was on its way. As the module of an entry point of `penstock.engine` it registers the device "clock".
What it does not know: streams, what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from penstock.core.contract.devices import RunnerConfig
from penstock.core.contract.fake_device import FakeDevice, FakeOptions, FakeRunner
from penstock.core.contract.hookspecs import DeviceSpec, hookimpl
from penstock.core.protocol.messages import Sample, StepDone

TICK_NS = 50_000


def words(tokenizer_file: Path) -> dict[str, int]:
    """Texts that are one token each, plain in JSON too, in the order of their ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found: dict[str, int] = {}
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        if text and text.isascii() and text.isprintable() and not set('"\\') & set(text):
            found.setdefault(text, token)
    return found


def ticks(count: int) -> int:
    """Now, modulo `count` ticks."""
    return time.monotonic_ns() // TICK_NS % count


class ClockRunner(FakeRunner):
    def __init__(self, device: FakeDevice, options: FakeOptions, config: RunnerConfig) -> None:
        super().__init__(device, options, config)
        self._words = np.array(list(words(Path(config.model_path) / "tokenizer.json").values()), np.int32)

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        wait = super().sample(work)

        def told() -> StepDone:
            done = wait()
            return msgspec.structs.replace(done, tokens=np.full_like(done.tokens, self._words[ticks(len(self._words))]))

        return told


class ClockDevice(FakeDevice):
    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> FakeRunner:
        super().load(config, progress)
        self.runner = ClockRunner(self, self.options, config)
        return self.runner


@hookimpl
def register_devices() -> list[DeviceSpec]:
    return [
        DeviceSpec(
            name="clock",
            api_level=1,
            doc="Tokens that tell the time, for `penstock bench streams`.",
            available=lambda: True,
            factory=ClockDevice,
            priority=-100,
        )
    ]
