"""A device plugin for the chaos tests: the fake device, but a prompt that begins with POISON kills the engine process on the spot.

What it is: what a miscompiled kernel or a driver's fault does to a real engine, for one request and every time it is tried.
What it does not know: the tests; they put its folder on PYTHONPATH and name it among the extra plugins.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from penstock.core.contract.devices import RunnerConfig
from penstock.core.contract.fake_device import FakeDevice, FakeOptions, FakeRunner
from penstock.core.contract.hookspecs import DeviceSpec, hookimpl
from penstock.core.protocol.messages import Forward

POISON = [666, 666, 666]


class PoisonRunner(FakeRunner):
    def forward(self, work: Forward) -> None:
        at = 0
        for count in work.place_counts.tolist():
            if work.place_tokens[at : at + len(POISON)].tolist() == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            at += count
        super().forward(work)


class PoisonDevice(FakeDevice):
    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> FakeRunner:
        super().load(config, progress)
        self.runner = PoisonRunner(self, self.options, config)
        return self.runner


def poison_device() -> PoisonDevice:
    return PoisonDevice(FakeOptions())


@hookimpl
def register_devices() -> list[DeviceSpec]:
    return [DeviceSpec(name="poison", api_level=1, doc="Dies of a prompt.", available=lambda: True, factory=poison_device, priority=-100)]
