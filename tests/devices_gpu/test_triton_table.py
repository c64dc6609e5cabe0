"""The Triton table of operations behind the runner, under Triton's interpreter, against the reference table: the whole step, tiny."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CODE = """
import sys
import numpy as np, torch
from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.attention import register_attention_backends
from penstock.plugins.devices.cuda import load
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.devices.driver import Driver, Job, Options

torch.set_num_threads(1)
specs = {spec.name: spec for spec in register_attention_backends()}
triton = {"attention": specs["triton"]}
reference = {"attention": specs["torch"], "make_ops": lambda *_, **options: TorchOps()}


def run(parts, **over):
    config = RunnerConfig(
        model_path=sys.argv[1], dtype="auto", max_model_len=None, block_size=16, max_num_seqs=2, max_num_batched_tokens=16,
        kv_cache_memory_bytes=1 << 20, num_gpu_blocks_override=None, gpu_memory_utilization=0.9, load_format="auto", seed=0, threads=1,
        enforce_eager=False, attention_backend=None, max_logprobs=20, **{"deterministic": False, **over},
    )
    runner = load(config, lambda *_: None, HostLane(), {"float16": torch.float16}, depth=2, **parts)
    runner.capture_all(lambda phase: None)
    params = [
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, repetition_penalty=1.2, frequency_penalty=0.1),
        SamplingParams(temperature=0.8, seed=4, top_p=0.9, top_k=30, min_p=0.01),
        SamplingParams(temperature=0.0),
    ]
    jobs = [Job(prompt=np.arange(3 + k, 9 + 3 * k).astype(np.int32), params=p, max_tokens=4) for k, p in enumerate(params)]
    Driver(runner, Options(chunk=lambda rng: 5, scatter=True)).run(jobs)
    assert runner.counters.replays > 0
    return jobs


truth, coded, kv = run(reference), run(reference, kv_cache_dtype="fp8_e4m3"), {"kv_cache_dtype": "fp8_e4m3"}
ways = (
    (run(triton), truth, 0.02),
    (run(triton, deterministic=True), truth, 0.02),
    (run(triton, deterministic=True, **kv), coded, 0.05),
)
for found, truth, at in ways:
    most = None if at == 0.02 else 1  # where numbers differ, ranks may
    for mine, theirs in zip(found, truth):
        assert mine.tokens == theirs.tokens, (mine.tokens, theirs.tokens)
        for a, b in zip(mine.logprobs, theirs.logprobs):
            assert np.allclose(np.frombuffer(a, np.float32)[:most], np.frombuffer(b, np.float32)[:most], atol=at)
        for position, (ids, values) in mine.prompt_logprobs.items():
            assert ids[0] == theirs.prompt_logprobs[position][0][0]
            assert np.allclose(values[:1], theirs.prompt_logprobs[position][1][:1], atol=at)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_on_device.py runs the kernels themselves")
def test_the_whole_step_under_the_interpreter(make_folder: Callable[..., Any]) -> None:
    """In a process of its own: the interpreter must be chosen before triton is imported. float16, since its bfloat16 dot is known to be wrong."""
    folder: Path = make_folder("qwen3", torch.float16, num_hidden_layers=1, vocab_size=64)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
