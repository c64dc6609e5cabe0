"""An engine in its own Python, stepped without a server: `PYTHON stepped.py openvino FOLDER THREADS LONGEST`.

What it is: a worker of `penstock bench compare` that reads a round a line on its input and writes the arrival times of all tokens, a line a round; nothing of Penstock is imported
here, since the Python that runs it belongs to the other engine. What it does not know: what rounds are compared with.

A line in: {"requests": [{"prompt": [ids], "output": n, "at": s}]}. A line out: {"tokens": [[s, ...] a request], "wall": s} or {"error": text}. The first line out says
{"version": text, "note": text}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

CACHE_GB = 2
STEP_TOKENS = 512
"""Of a step's batch, prompts in chunks."""


class OpenVINO:
    """OpenVINO GenAI's continuous batching, over an exported folder."""

    def __init__(self, folder: str, threads: int, longest: int) -> None:
        import numpy as np  # type: ignore[import-not-found,unused-ignore]
        import openvino  # type: ignore[import-not-found,unused-ignore]
        import openvino_genai as genai  # type: ignore[import-not-found,unused-ignore]

        scheduler: Any = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = STEP_TOKENS
        properties = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._tensor: Any = lambda ids: openvino.Tensor(np.asarray([ids], dtype=np.int64))
        self._config = genai.GenerationConfig
        self._count = 0
        self.version = importlib.metadata.version("openvino-genai")
        self.note = ""

    def add(self, prompt: list[int], output: int) -> Any:
        self._count += 1
        return self._pipeline.add_request(
            self._count, self._tensor(prompt), self._config(max_new_tokens=output, ignore_eos=True, do_sample=False)
        )

    def step(self) -> bool:
        """Did anything run?"""
        if not self._pipeline.has_non_finished_requests():
            return False
        self._pipeline.step()
        return True

    def read(self, handle: Any) -> int:
        """How many tokens are new."""
        return sum(len(one.generated_ids) for one in handle.read().values()) if handle.can_read() else 0


ENGINES = {"openvino": OpenVINO}


def answered(engine: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """A round: each request joins at its time, and tokens are read after each step."""
    start = time.perf_counter()
    arrivals: list[list[float]] = [[] for _ in requests]
    handles: dict[int, Any] = {}
    waiting = sorted(range(len(requests)), key=lambda index: requests[index]["at"])
    while waiting or handles:
        while waiting and requests[waiting[0]]["at"] <= time.perf_counter() - start:
            index = waiting.pop(0)
            handles[index] = engine.add(requests[index]["prompt"], requests[index]["output"])
        ran = engine.step()
        now = time.perf_counter() - start
        for index, handle in list(handles.items()):
            arrivals[index] += [now] * engine.read(handle)
            if len(arrivals[index]) >= requests[index]["output"]:
                del handles[index]
        if not ran and handles:
            raise RuntimeError(f"the engine stopped with {len(handles)} answers unfinished")
        if not ran and waiting:
            time.sleep(max(0.0, requests[waiting[0]]["at"] - (time.perf_counter() - start)))
    return {"tokens": arrivals, "wall": time.perf_counter() - start}


def lines() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main(kind: str, folder: str, threads: str, longest: str) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # no file beside this one is a module of the engine's
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to the log
    engine = ENGINES[kind](folder, int(threads), int(longest))
    print(json.dumps({"version": engine.version, "note": engine.note}), file=told, flush=True)
    for line in lines():
        try:
            answer = answered(engine, line["requests"])
        except Exception as error:  # told, and the engine made anew: what it had not finished would run beside the next round
            answer = {"error": f"{type(error).__name__}: {error}"}
            del engine
            engine = ENGINES[kind](folder, int(threads), int(longest))
        print(json.dumps(answer), file=told, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
    os._exit(0)  # engines may keep threads that would hold the process
