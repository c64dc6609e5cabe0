"""Run by test_compile_ahead.py in a process of its own: loads a checkpoint with the Triton table of operations on host memory, for an H200 that is
not there, so that every kernel which serving needs is compiled and none can run; then has one ordinary step launched. Prints as JSON what was compiled, and
for each launch its kernel and whether the thread that launches made its launcher.

`compile_for_hopper.py CHECKPOINT [deterministic] [QUANTIZATION] [kv:KV_CACHE_DTYPE]`
"""

from __future__ import annotations

import collections
import json
import sys
import threading
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from penstock.core.contract.devices import RunnerConfig
from penstock.kernels import gpu
from penstock.plugins.attention import register_attention_backends
from penstock.plugins.devices.cuda import load
from penstock.plugins.devices.lane import HostLane


class AbsentH200(DriverBase):  # type: ignore[misc]
    """What the compiler asks a driver for."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    launchers = 0
    launched: ClassVar[list[tuple[str, bool]]] = []

    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            AbsentH200.launchers += 1
            self.name = source.name
            self.mine = threading.current_thread() is threading.main_thread()

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            assert function == 7
            AbsentH200.launched.append((self.name, self.mine))

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

        @staticmethod
        def load_binary(name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            return 1, 7, 32, 0, 1024

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return None


def main(folder: str, words: list[str]) -> None:
    triton.runtime.driver.set_active(AbsentH200())
    gpu.device_key = lambda: "nvidia-h200"  # type: ignore[assignment]
    gpu.chained = lambda: {"PDL": True, "launch_pdl": True}  # type: ignore[assignment]
    compiled: collections.Counter[str] = collections.Counter()
    triton.knobs.runtime.jit_post_compile_hook = lambda **hook: compiled.update([f"{hook['fn'].module}:{hook['fn'].name}"])
    from penstock.kernels.w8a8 import triton as w8a8
    from penstock.plugins.devices.triton_ops import TritonOps

    w8a8.always = lambda: True
    w8a8.processors = lambda: 132

    TritonOps.compile_only = lambda self: gpu.compile_only(strict=True)  # type: ignore[method-assign]
    spec = next(spec for spec in register_attention_backends() if spec.name == "triton")
    config = RunnerConfig(
        model_path=folder,
        dtype="bfloat16",
        max_model_len=None,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=256 if "fp8" in words else 64,
        kv_cache_memory_bytes=1 << 22,
        num_gpu_blocks_override=None,
        gpu_memory_utilization=0.9,
        load_format="auto",
        deterministic="deterministic" in words,
        quantization=next((word for word in words if word != "deterministic" and ":" not in word), None),
        enforce_eager=False,
        attention_backend=None,
        seed=0,
        threads=1,
        max_logprobs=20,
        kv_cache_dtype=next((word.removeprefix("kv:") for word in words if word.startswith("kv:")), "auto"),
    )
    runner = load(config, lambda phase, fraction: None, HostLane(), {"bfloat16": torch.bfloat16}, depth=2, attention=spec)
    untouched = not bool(runner.history.any()) and bool((runner.table == -1).all()) and not gpu.compiling()
    before, built = sum(compiled.values()), AbsentH200.launchers
    runner._step_on_padding(3, 3)
    late = sum(compiled.values()) - before
    print(json.dumps({"compiled": compiled, "untouched": untouched, "built": built, "launched": AbsentH200.launched, "late": late}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
