"""When the host launched each step, when the device worked on it, and when its result came, on one clock.

What it is: `trace`, a load through the in-process engine with a `Recorder` around its runner, and the choice of a few consecutive steps to show.
docs/timeline.py draws them. What it does not know: files, pictures, what the steps compute.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

SHOWN_STEPS = 8


def trace(
    path: str, *, rows: int, requests: int = 96, input_len: int = 600, output_len: int = 160
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(findings over all steps, the shown ones). Outputs differ in length, so that prompts of those who wait join running decodes."""
    import torch

    from penstock.core.llm import LLM
    from penstock.core.protocol.sampling import SamplingParams
    from penstock.plugins.commands.bench.workload import make
    from penstock.plugins.devices import cuda

    sys.setswitchinterval(0.0005)  # as an engine's process does
    recorders: list[Recorder] = []
    original = cuda.CudaDevice.load

    def kept(self: Any, config: Any, progress: Any) -> Any:
        runner = original(self, config, progress)
        recorders.append(Recorder(runner))
        return runner

    cuda.CudaDevice.load = kept  # type: ignore[method-assign]
    load = make(count=requests, vocab=4096, seed=1, input_len=input_len, output_len=output_len, max_len=4096)
    # The first `rows` differ by up to half in length; whoever comes later fills their places one by one.
    lengths = [output_len // 2 + (index * 37) % output_len // 2 + output_len // 4 for index in range(requests)]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    options: dict[str, Any] = {"model": path, "device": "cuda", "load_format": "dummy", "max_num_seqs": rows, "max_model_len": 4096}
    try:
        with LLM(**options, max_num_batched_tokens=2048, enable_prefix_caching=False) as llm:
            warm = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
            llm.generate(prompt_token_ids=[[17, 18, 19]] * 4, sampling_params=warm)
            recorder = recorders[-1]
            recorder.align()
            llm.generate(prompt_token_ids=[r.prompt for r in load.requests], sampling_params=params)
            recorder.on = False
    finally:
        cuda.CudaDevice.load = original  # type: ignore[method-assign]
    steps = recorder.finished()
    decode = window(steps, lambda step: step["decode_rows"] == step["rows"] == rows)
    mixed = window(steps, lambda step: True, wants=lambda step: 0 < step["decode_rows"] < step["rows"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "host"
    pairs = list(itertools.pairwise(steps))
    gaps = [max(0, b["device"][0] - a["device"][1]) for a, b in pairs]
    busy = sum(step["device"][1] - step["device"][0] for step in steps)
    found = {
        "steps": len(steps),
        "device_idle": round(sum(gaps) / max(1, sum(gaps) + busy), 4),
        "launched_under_the_step_before": round(sum(b["launch"][0] < a["device"][1] for a, b in pairs) / max(1, len(pairs)), 4),
        "launch_us_median": _median(steps, "launch"),
        "device_us_median": _median(steps, "device"),
        "result_after_device_us_median": round(sorted(s["result"][1] - s["device"][1] for s in steps)[len(steps) // 2] / 1e3, 1),
        "clock_uncertainty_us": recorder.uncertainty_us,
        "decode_steps_shown": len(decode),
        "mixed_steps_shown": len(mixed),
    }
    head = {"date": time.strftime("%Y-%m-%d"), "device": device, "what": "Llama-3.1-8B shape, 64 rows, two steps in flight", "unit": "ns"}
    head["what"] = head["what"].replace("64", str(rows))
    return found, {**head, "clock_uncertainty_us": recorder.uncertainty_us, "decode": since(decode), "mixed": since(mixed)}


class Recorder:
    """Puts itself before a runner's two calls and writes down when they ran, when the device worked (from the runner's own events) and when the
    result came, all in ns of the host's monotonic clock."""

    def __init__(self, runner: Any) -> None:
        self.on = False
        self.uncertainty_us = 0.0
        self._steps: dict[int, dict[str, Any]] = {}
        self._runner = runner
        self._forward, self._sample = runner.forward, runner.sample
        self._reference: Any = None
        self._at_ns = 0.0
        runner.forward, runner.sample = self.forward, self.sample

    def align(self, tries: int = 50) -> None:
        """Tie the device's clock to the host's: of several events recorded on an idle device, the one whose time is known best."""
        best = math.inf
        for _ in range(tries):
            event = self._runner._lane.event()
            before = time.monotonic_ns()
            event.record()
            event.synchronize()
            after = time.monotonic_ns()
            if after - before < best:
                best, self._reference, self._at_ns = after - before, event, (before + after) / 2
        self.uncertainty_us = round(best / 2e3, 1)
        self.on = True

    def forward(self, work: Any) -> None:
        begun = time.monotonic_ns()
        self._forward(work)
        if self.on:
            rows, tokens = len(work.slots), int(work.counts.sum())
            self._steps[work.step] = {
                "step": work.step,
                "rows": rows,
                "decode_rows": work.num_decode,
                "tokens": tokens,
                "launch": [begun, 0],
            }

    def sample(self, work: Any) -> Callable[[], Any]:
        runner = self._runner
        begin, end = runner._bounds[runner.counters.steps % len(runner._bounds)]
        wait = self._sample(work)
        step = self._steps.get(work.step)
        if step is None:
            return wait  # type: ignore[no-any-return]
        step["launch"][1] = time.monotonic_ns()

        def timed() -> Any:
            waiting = time.monotonic_ns()
            done = wait()
            step["result"] = [waiting, time.monotonic_ns()]
            step["device"] = [round(self._at_ns + self._reference.elapsed_time(event) * 1e6) for event in (begin, end)]
            return done

        return timed

    def finished(self) -> list[dict[str, Any]]:
        """Steps whose result came, in order."""
        return [step for _, step in sorted(self._steps.items()) if "device" in step and step["rows"]]


def window(
    steps: list[dict[str, Any]], fits: Callable[[dict[str, Any]], bool], wants: Callable[[dict[str, Any]], bool] | None = None
) -> list[dict[str, Any]]:
    """SHOWN_STEPS consecutive steps that all fit, from the middle of the run; with `wants`, such a step third. Empty if there are none."""
    middle = len(steps) // 2
    for at in sorted(range(len(steps) - SHOWN_STEPS + 1), key=lambda at: abs(at - middle)):
        part = steps[at : at + SHOWN_STEPS]
        consecutive = part[-1]["step"] - part[0]["step"] == SHOWN_STEPS - 1
        wanted = wants is None or (wants(part[2]) and not wants(part[0]) and not wants(part[1]))
        if consecutive and wanted and all(map(fits, part)):
            return part
    return []


def since(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with times since the first launch."""
    if not steps:
        return []
    zero = steps[0]["launch"][0]
    return [{n: [t - zero for t in v] if isinstance(v, list) else v for n, v in step.items()} for step in steps]


def _median(steps: list[dict[str, Any]], name: str) -> float:
    values = sorted(step[name][1] - step[name][0] for step in steps)
    return float(round(values[len(values) // 2] / 1e3, 1))
