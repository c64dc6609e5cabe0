"""Devices, as plugins of the engine: the CPU.

What it is: the registering hook. Nothing heavy is imported before the factory is called.
What it does not know: models, kernels.
"""

from __future__ import annotations

from penstock.core.device_api import Device
from penstock.core.hookspecs import DeviceSpec, hookimpl


def _cpu() -> Device:
    from penstock.plugins.devices.cpu import CpuDevice

    return CpuDevice()


@hookimpl
def register_devices() -> list[DeviceSpec]:
    """The CPU is always available and gives way to every accelerator."""
    return [
        DeviceSpec(
            name="cpu", api_level=1, doc="The host's processor (bfloat16, float32).", available=lambda: True, factory=_cpu, priority=0
        )
    ]
