"""Devices, as plugins of the engine: the CPU, and NVIDIA GPUs.

What it is: the registering hook. Nothing heavy is imported before the factory is called, and looking for a GPU opens none.
What it does not know: models, kernels.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from penstock.core.contract.devices import Device
from penstock.core.contract.hookspecs import DeviceSpec, hookimpl

DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")
"""Any of these exists where an NVIDIA driver is loaded."""


def _cpu() -> Device:
    from penstock.plugins.devices.cpu import CpuDevice

    return CpuDevice()


def _cuda() -> Device:
    from penstock.plugins.devices.cuda import CudaDevice

    return CudaDevice()


def cuda_available() -> bool:
    """A driver is loaded, torch was built for CUDA and triton is installed; found out without importing either or touching the GPU."""
    if not any(Path(name).exists() for name in DRIVER_FILES) or importlib.util.find_spec("triton") is None:
        return False
    torch = importlib.util.find_spec("torch")
    version = Path(torch.origin).with_name("version.py") if torch is not None and torch.origin else None
    try:
        text = version.read_text(encoding="utf-8") if version is not None else ""
    except OSError:
        return False
    return re.search(r"^cuda\b.*=\s*['\"]", text, re.MULTILINE) is not None


@hookimpl
def register_devices() -> list[DeviceSpec]:
    """The CPU is always available and gives way to every accelerator."""
    return [
        DeviceSpec(
            name="cpu", api_level=1, doc="The host's processor (bfloat16, float32).", available=lambda: True, factory=_cpu, priority=0
        ),
        DeviceSpec(
            name="cuda",
            api_level=1,
            doc="An NVIDIA GPU by Triton kernels and captured graphs (bfloat16, float16).",
            available=cuda_available,
            factory=_cuda,
            priority=10,
        ),
    ]
