"""Measures the cuda device: `python -m penstock.plugins.commands.bench.cuda_bench OUT_FOLDER [section ...]`.

What it is: correctness on a small model against transformers, then engine figures on dummy weights of true shapes, each beside its roofline,
whose ceilings (copy bandwidth, a large bfloat16 matmul) are measured in the same run. Each section runs in a process of its own with a time limit,
so that one that fails costs only itself (BENCH_BUDGET_S bounds the whole run); results go to engine.json after each, and a compact table is printed last.
Device idle is the sum of gaps between consecutive steps' device work over the whole span, from events. Timings are medians where they repeat.
What it does not know: HTTP (penstock bench measures that), the kernels one by one (kernels/gpu_bench.py). It is long because each section is a short script.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BROOK = Path(__file__).resolve().parents[2] / "demo_model" / "brook"
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": [7, 1],
}
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TOGETHER = ("correct", "suite", "warm_8b", "warm_1b")
"""Sections without timings run side by side: most of their time goes into compiling kernels, one core each."""
LIMITS_S = {
    "correct": 110,
    "suite": 130,
    "warm_8b": 110,
    "warm_1b": 110,
    "ceilings": 30,
    "decode_8b": 60,
    "serve_8b": 70,
    "decode_1b": 50,
    "start_8b": 40,
    "memory": 30,
    "deterministic": 40,
    "profile_8b": 30,
    "prefix_8b": 40,
    "naive_8b": 60,
}
"""Sections in order, and their longest time."""


# ------------------------------------------------------------------ helpers


def folder_of(shape: dict[str, Any], root: Path, name: str) -> str:
    """A model folder of that shape with the demo model's tokenizer and no weights."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_bytes((BROOK / file).read_bytes())
    return str(folder)


def settings(path: str, **over: Any) -> Any:
    from penstock.core.contract.devices import RunnerConfig

    known: dict[str, Any] = {
        "model_path": path,
        "dtype": "auto",
        "max_model_len": None,
        "block_size": 16,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": None,
        "num_gpu_blocks_override": None,
        "gpu_memory_utilization": 0.9,
        "load_format": "auto",
        "deterministic": False,
        "enforce_eager": False,
        "attention_backend": None,
        "seed": 0,
        "threads": None,
        "max_logprobs": 20,
    }
    return RunnerConfig(**{**known, **over})


def load(path: str, **over: Any) -> tuple[Any, float, list[str]]:
    """(runner after warm-up, seconds that load and warm-up took, what was said)."""
    from penstock.plugins.devices.cuda import CudaDevice

    said: list[str] = []
    started = time.perf_counter()

    def tell(phase: str) -> None:
        said.append(f"{time.perf_counter() - started:.2f}s {phase}")

    runner = CudaDevice().load(settings(path, **over), lambda phase, fraction: tell(phase) if fraction in (0.0, 1.0) else None)
    runner.warm_up(tell)
    return runner, time.perf_counter() - started, said


def fill(runner: Any, rows: int, context: int) -> None:
    """Give slots 0..rows-1 that many tokens and blocks; the cache's content is whatever is there (finite: it is written once)."""
    from penstock.core.protocol.columns import i32
    from penstock.core.protocol.messages import Forward, Sample, SlotSampling
    from penstock.core.protocol.sampling import SamplingParams

    for cache in runner._caches:
        if cache.codes is None:
            cache.k.normal_(0, 0.5)
            cache.v.normal_(0, 0.5)
        else:
            cache.k.random_(0, 100)  # finite in every kind
            cache.v.random_(0, 100)
            cache.codes.scales.fill_(2.0**-8)
    per = -(-(context + 600) // runner.block_size)
    slots = i32(range(rows))
    rng = np.random.default_rng(0)
    greedy = SamplingParams(temperature=0.0)
    runner.forward(
        Forward(
            engine=0,
            epoch=0,
            step=1,
            slots=i32([]),
            starts=i32([]),
            counts=i32([]),
            num_decode=0,
            place_slots=slots,
            place_counts=i32([context] * rows),
            place_tokens=rng.integers(0, runner.facts.vocab_size, context * rows).astype(np.int32),
            block_slots=np.repeat(slots, per),
            block_index=np.tile(i32(range(per)), rows),
            block_ids=rng.permutation(runner.num_blocks)[: per * rows].astype(np.int32),
        )
    )
    places = [SlotSampling(slot=slot, choice=0, prompt_len=context, params=greedy) for slot in range(rows)]
    runner.sample(Sample(engine=0, epoch=0, step=1, rows=i32([]), slots=i32([]), positions=i32([]), places=places))()


def decode(runner: Any, rows: int, context: int, steps: int, *, sync_errors: bool = False) -> dict[str, float]:
    """Decode steps two in flight, driven from this thread alone: ms a step on the host's clock and of the device, and its idle share."""
    import torch

    from penstock.core.protocol.columns import i32
    from penstock.core.protocol.messages import Forward, Sample
    from penstock.plugins.devices.runner import Counters

    slots, ones, order = i32(range(rows)), i32([1] * rows), i32(range(rows))
    waiting: list[Callable[[], Any]] = []
    launch_s = 0.0

    def one(step: int) -> None:
        nonlocal launch_s
        begun = time.perf_counter()
        starts = i32([context - 1 + step] * rows)
        runner.forward(Forward(engine=0, epoch=0, step=step, slots=slots, starts=starts, counts=ones, num_decode=rows))
        waiting.append(runner.sample(Sample(engine=0, epoch=0, step=step, rows=order, slots=slots, positions=starts + 1)))
        launch_s += time.perf_counter() - begun

    for step in range(10):
        one(step)
        waiting.pop(0)()
    runner.counters, runner._last_end, runner.timed = Counters(), None, True
    launch_s = 0.0
    runner._lane.synchronize()
    if sync_errors:
        torch.cuda.set_sync_debug_mode("error")
    started = time.perf_counter()
    try:
        for step in range(10, 10 + steps):
            one(step)
            if len(waiting) == 2:
                waiting.pop(0)()
        while waiting:
            waiting.pop(0)()
    finally:
        if sync_errors:
            torch.cuda.set_sync_debug_mode("default")
    wall = time.perf_counter() - started
    counters, runner.timed = runner.counters, False
    span = max(1, counters.busy_ns + counters.idle_ns)
    return {
        "ms_a_step": round(wall / steps * 1e3, 4),
        "device_ms_a_step": round(counters.busy_ns / steps / 1e6, 4),
        "device_idle": round(counters.idle_ns / span, 4),
        "launch_ms": round(launch_s / steps * 1e3, 4),
        "replays": counters.replays,
        "steps": steps,
    }


# ------------------------------------------------------------------ sections


def ceilings(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Copy bandwidth (read and written bytes), read bandwidth of one matrix-vector product's size, and a bf16 matmul."""
    import torch

    def median_ms(work: Callable[[], Any], times: int) -> float:
        for _ in range(3):
            work()
        found = []
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return float(statistics.median(found))

    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    # An elementwise kernel copies faster than the copy engine does.
    copy = max(
        2 * source.nbytes / median_ms(work, 10) / 1e9 for work in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    )
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / median_ms(lambda: a @ b, 10) / 1e9
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_s": round(copy, 3),
        "matmul_tflop_s": round(rate, 1),
    }


def correct(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Brook in bfloat16 against transformers in float32 on the GPU: greedy tokens must be within a bfloat16 error of the best logit at every
    position, log-probabilities close; graphs against eager; and the engine's own tokens at depth 2."""
    import torch
    import transformers

    from penstock.core.protocol.sampling import SamplingParams
    from penstock.plugins.devices.driver import Driver, Job, Options

    torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(1)
    prompts = [rng.integers(16, 4096, int(n)).astype(np.int32) for n in (1, 5, 17, 64, 200, 301, 33, 90)]
    asks = SamplingParams(temperature=0.0, logprobs=5, prompt_logprobs=0)

    def run(options: Options, **over: Any) -> list[Job]:
        runner, _, _ = load(str(BROOK), max_num_seqs=8, max_num_batched_tokens=256, kv_cache_memory_bytes=1 << 28, **over)
        jobs = [Job(prompt=p, params=asks, max_tokens=24) for p in prompts]
        Driver(runner, options).run(jobs)
        # and once more without log-probabilities: the graphs' own draw
        plain = [Job(prompt=p, params=SamplingParams(temperature=0.0), max_tokens=24) for p in prompts]
        Driver(runner, options).run(plain)
        for job, other in zip(jobs, plain, strict=True):
            job.logprobs.append(np.float32(job.tokens == other.tokens).tobytes())
        if not over.get("enforce_eager"):
            assert runner.counters.replays > 0
        runner.close()
        return jobs

    runs = {
        "graphs": run(Options()),
        "eager": run(Options(), enforce_eager=True),
        "chunks": run(Options(chunk=lambda random: random.randint(1, 70), scatter=True, seed=2)),
        "shared": run(Options(share=True, at_once=3, preempt=0.1, seed=3)),
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(str(BROOK), dtype=torch.float32).cuda().eval()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(str(BROOK), dtype=torch.bfloat16).cuda().eval()
    worst_gap = worst_logprob = worst_prompt = worst_theirs = 0.0
    agree = total = plain_same = 0
    for jobs in runs.values():
        for job in jobs:
            ids = torch.tensor([[*job.prompt.tolist(), *job.tokens]], device="cuda")
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[0].double(), -1)
                theirs = torch.log_softmax(rounded(ids).logits[0].double(), -1)
            plain_same += int(np.frombuffer(job.logprobs.pop(), np.float32)[0])
            for at, token in enumerate(job.tokens):
                row = scores[len(job.prompt) + at - 1]
                worst_gap = max(worst_gap, float(row.max() - row[token]))
                agree += int(row.argmax()) == token
                total += 1
                worst_logprob = max(worst_logprob, abs(float(row[token]) - float(np.frombuffer(job.logprobs[at], np.float32)[0])))
            for position, (found, values) in job.prompt_logprobs.items():
                truth = float(scores[position - 1, found[0]])
                worst_prompt = max(worst_prompt, abs(truth - values[0]))
                worst_theirs = max(worst_theirs, abs(truth - float(theirs[position - 1, found[0]])))
    return {
        "tokens": total,
        "argmax_agrees": agree,
        "worst_gap_to_best": round(worst_gap, 4),
        "worst_logprob_error": round(worst_logprob, 4),
        "worst_prompt_logprob_error": round(worst_prompt, 4),
        "worst_prompt_logprob_error_of_transformers_in_bfloat16": round(worst_theirs, 4),
        "plain_draws_equal": f"{plain_same} of {sum(map(len, runs.values()))}",
        "runs_equal_to_graphs": {
            n: sum(a.tokens == b.tokens for a, b in zip(jobs, runs["graphs"], strict=True)) for n, jobs in runs.items()
        },
        "passed": worst_gap < 0.15 and worst_logprob < 0.25 and worst_prompt < 1.25 * worst_theirs + 0.05,
    }


def suite(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The repository's tests that are marked `gpu`."""
    tests = BROOK.parents[2] / "tests" / "devices_gpu"
    side_by_side = ["-n", "5"] if importlib.util.find_spec("xdist") is not None else []
    return _pytest(*side_by_side, "-k", "not accounted", str(tests))


def memory(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The test that wants the GPU for itself."""
    return _pytest("-k", "accounted", str(BROOK.parents[2] / "tests" / "devices_gpu"))


def _pytest(*arguments: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--tb=short",
        "--durations=9",
        "-q",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-6000:]}


def warm_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Compile what the 8B shape needs, with two layers of it."""
    return _warm(LLAMA_8B, root)


def warm_1b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Compile what the 1B shape needs, with two layers of it."""
    return _warm(LLAMA_1B, root)


def _warm(shape: dict[str, Any], root: Path) -> dict[str, Any]:
    path = folder_of({**shape, "num_hidden_layers": 2}, root, "shape")
    out: dict[str, Any] = {}
    for name, rows, flag in (("cold", 256, False), ("again", 64, False), ("deterministic", 64, True)):
        size = {"max_num_seqs": rows, "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 30, "deterministic": flag}
        if flag and shape is not LLAMA_8B:
            continue
        runner, seconds, said = load(path, load_format="dummy", **size)
        out[name] = {"ready_s": round(seconds, 2), "said": said}
        fill(runner, 3, 300)
        decode(runner, 3, 300, 3)
        runner.close()
    return out


def weight_bytes(runner: Any) -> int:
    """Bytes that a decode step must read: everything but the embedding table, unless that is the output layer too."""
    model = runner._model
    tied = model.plain.head.weight is model.plain.embedding
    return int(model.weights_bytes - (0 if tied else model.plain.embedding.nbytes))


def decode_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Llama-3.1-8B: one row (weight bandwidth) and 64 rows at 1k context."""
    path = folder_of(LLAMA_8B, root, "llama-8b")
    runner, seconds, said = load(path, load_format="dummy", max_num_seqs=64, max_model_len=8192)
    out: dict[str, Any] = {"load_and_warm_up_s": round(seconds, 2), "said": said, "memory_mib": _mib(runner.memory)}
    copy = known.get("ceilings", {}).get("copy_tb_s", 4.3)
    fill(runner, 1, 1024)
    one = decode(runner, 1, 1024, 150, sync_errors=True)
    one["roofline_ms"] = round(weight_bytes(runner) / copy / 1e9, 4)
    one["share_of_roofline"] = round(one["roofline_ms"] / one["ms_a_step"], 3)
    out["batch_1"] = one
    fill(runner, 64, 1024)
    many = decode(runner, 64, 1024, 80)
    block = runner._pool[0].nbytes
    many["roofline_ms"] = round((weight_bytes(runner) + 64 * (1024 + 50) / 16 * block) / copy / 1e9, 4)
    many["share_of_roofline"] = round(many["roofline_ms"] / many["ms_a_step"], 3)
    out["batch_64"] = many
    return out


def decode_1b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Llama-3.2-1B, 64 rows at 256 tokens: bound by the host, if anything is."""
    import torch

    path = folder_of(LLAMA_1B, root, "llama-1b")
    runner, seconds, _ = load(path, load_format="dummy", max_num_seqs=64, max_model_len=8192)
    out: dict[str, Any] = {"load_and_warm_up_s": round(seconds, 2)}
    copy = known.get("ceilings", {}).get("copy_tb_s", 4.3)
    fill(runner, 64, 256)
    many = decode(runner, 64, 256, 300, sync_errors=True)
    block = runner._pool[0].nbytes
    many["roofline_ms"] = round((weight_bytes(runner) + 64 * (256 + 160) / 16 * block) / copy / 1e9, 4)
    many["share_of_roofline"] = round(many["roofline_ms"] / many["ms_a_step"], 3)
    out["batch_64_direct"] = many
    runner.close()
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    out["batch_64_engine"] = _serve(path, requests=64, output_len=256, input_len=256, max_num_seqs=64)
    return out


def serve_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """1,000 requests of ShareGPT-like lengths, all at once, through the in-process engine."""
    return _serve(folder_of(LLAMA_8B, root, "llama-8b"), requests=1000, max_num_seqs=512)


def prefix_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """64 requests that share 2,048 tokens and have 64 of their own, one token of output: prefill with the prefix cache against without."""
    path = folder_of(LLAMA_8B, root, "llama-8b")
    size = {"requests": 64, "max_num_seqs": 64, "input_len": 64, "output_len": 1, "prefix_len": 2048}
    out: dict[str, Any] = {
        name: _serve(path, **size, enable_prefix_caching=flag, kv_cache_memory_bytes=24 << 30)
        for name, flag in (("cached", True), ("uncached", False))
    }
    out["prefill_time_saved"] = round(1 - out["cached"]["device_busy_s"] / out["uncached"]["device_busy_s"], 3)
    out["wall_time_saved"] = round(1 - out["cached"]["wall_s"] / out["uncached"]["wall_s"], 3)
    return out


def naive_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """What the tuned figure is compared with: this engine one request at a time without graphs, and transformers.generate in static batches
    of 32 (prompts cut and padded to one length, everybody runs to the longest output)."""
    import torch
    import transformers

    path = folder_of(LLAMA_8B, root, "llama-8b")
    size = {"requests": 3, "max_num_seqs": 1, "input_len": 128, "output_len": 64}
    out: dict[str, Any] = {"one_at_a_time": _serve(path, **size, enforce_eager=True, kv_cache_memory_bytes=4 << 30)}
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA_8B.items() if k not in ("architectures", "model_type", "torch_dtype")})
    config.eos_token_id = None
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(16, 4096, (32, 128), device="cuda")
    model.generate(ids, max_new_tokens=4, do_sample=False)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    torch.cuda.synchronize()
    out["transformers_batch_32_tokens_s"] = round(32 * 64 / (time.perf_counter() - begun), 1)
    return out


def profile_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Where a batch-1 decode step's time goes, kernel by kernel."""
    import torch

    runner, _, _ = load(folder_of(LLAMA_8B, root, "llama-8b"), load_format="dummy", max_num_seqs=64, max_model_len=8192)
    out: dict[str, Any] = {}
    for rows in (1, 64):
        fill(runner, rows, 1024)
        decode(runner, rows, 1024, 5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            decode(runner, rows, 1024, 10)
        found = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
        steps = 20  # ten of them warm up inside `decode`
        out[f"batch_{rows}"] = [
            f"{event.key[:60]}: {event.count / steps:.1f} a step, {event.self_device_time_total / max(1, event.count):.1f} us each"
            for event in found
        ]
    return out


def _serve(
    path: str,
    *,
    requests: int,
    max_num_seqs: int,
    input_len: int | None = None,
    output_len: int | None = None,
    prefix_len: int = 0,
    **over: Any,
) -> dict[str, Any]:
    from penstock.core.llm import LLM
    from penstock.core.protocol.sampling import SamplingParams
    from penstock.plugins.commands.bench.workload import make
    from penstock.plugins.devices import cuda
    from penstock.plugins.devices.runner import Counters

    sys.setswitchinterval(0.0005)  # as an engine's process does
    runners: list[Any] = []
    original = cuda.CudaDevice.load

    def kept(self: Any, config: Any, progress: Any) -> Any:
        runners.append(original(self, config, progress))
        return runners[-1]

    cuda.CudaDevice.load = kept  # type: ignore[method-assign]
    load_of = make(count=requests, vocab=4096, seed=1, input_len=input_len, output_len=output_len, prefix_len=prefix_len, max_len=4096)
    params = [SamplingParams(temperature=0.0, max_tokens=r.output, ignore_eos=True) for r in load_of.requests]
    begun = time.perf_counter()
    options: dict[str, Any] = {"model": path, "device": "cuda", "load_format": "dummy", "max_num_seqs": max_num_seqs, "max_model_len": 4096}
    options |= {"max_num_batched_tokens": 8192, "enable_prefix_caching": False, **over}
    with LLM(**options) as llm:
        ready = time.perf_counter() - begun
        warm = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        llm.generate(prompt_token_ids=[[17, 18, 19]] * 4, sampling_params=warm)
        runner = runners[0]
        runner.counters, runner._last_end, runner.timed = Counters(), None, True
        started = time.perf_counter()
        answers = llm.generate(prompt_token_ids=[r.prompt for r in load_of.requests], sampling_params=params)
        wall = time.perf_counter() - started
        counters = runner.counters
    tokens = sum(len(choice.token_ids) for answer in answers for choice in answer.outputs)
    span = max(1, counters.busy_ns + counters.idle_ns)
    return {
        "requests": requests,
        "input_tokens": load_of.input_tokens,
        "output_tokens": tokens,
        "wall_s": round(wall, 2),
        "output_tokens_s": round(tokens / wall, 1),
        "total_tokens_s": round((tokens + load_of.input_tokens) / wall, 1),
        "steps": counters.steps,
        "replays": counters.replays,
        "rows_a_step": round(tokens / max(1, counters.steps), 1),
        "device_idle": round(counters.idle_ns / span, 4),
        "device_busy_s": round(counters.busy_ns / 1e9, 2),
        "ready_s": round(ready, 2),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "ring_waits": runner._lane.waits,
        "all_answered": all(len(c.token_ids) == p.max_tokens for a, p in zip(answers, params, strict=True) for c in a.outputs),
    }


def start_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """A fresh process with warm kernel caches: from its first line to its first token, 8B dummy weights."""
    path = folder_of(LLAMA_8B, root, "llama-8b")
    code = (
        "import time; t = time.perf_counter()\n"
        "from penstock.core.llm import LLM; from penstock.core.protocol.sampling import SamplingParams; i = time.perf_counter()\n"
        "said = []\n"
        f"llm = LLM({path!r}, device='cuda', load_format='dummy', max_model_len=4096, max_num_seqs=256,\n"
        "          on_phase=lambda p, f: said.append((round(time.perf_counter() - t, 2), p)) if f in (0.0, 1.0) else None)\n"
        "r = time.perf_counter()\n"
        "llm.generate(prompt_token_ids=[[17, 18, 19]], sampling_params=SamplingParams(temperature=0.0, max_tokens=1))\n"
        "n = time.perf_counter()\n"
        "print('RESULT', __import__('json').dumps({'imports_s': i - t, 'ready_s': r - t, 'first_token_s': n - t, 'said': said}))\n"
        "llm.close()\n"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(done.stderr[-1500:])
    return {**json.loads(line[7:]), "process_s": round(time.perf_counter() - begun, 2)}


def deterministic(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """--deterministic: the self-test on this device, and what it costs in decode (8B shape with 8 layers)."""
    path = folder_of({**LLAMA_8B, "num_hidden_layers": 8, "max_position_embeddings": 32_768}, root, "llama-8b-8")
    out: dict[str, Any] = {}
    for name, flag in (("plain", False), ("deterministic", True)):
        runner, seconds, _ = load(
            path, load_format="dummy", max_num_seqs=64, max_model_len=20_000, deterministic=flag, kv_cache_memory_bytes=8 << 30
        )
        out[f"{name}_ready_s"] = round(seconds, 2)
        for rows, context in ((1, 512), (64, 512), (1, 16_384)):
            fill(runner, rows, context)
            out[f"{name}_batch_{rows}_at_{context}_ms"] = decode(runner, rows, context, 60)["ms_a_step"]
        runner.close()
    out["self_test"] = "passed"
    return out


def _mib(memory: Any) -> dict[str, int]:
    return {name: getattr(memory, name) >> 20 for name in ("weights", "workspace", "graphs", "kv", "slack", "total")}


# ------------------------------------------------------------------ running


def run_section(name: str, out: Path, scratch: Path, sections: dict[str, Any] | None = None) -> None:
    """In a process of its own: writes its result to SCRATCH/NAME.json. `sections`: name -> function, by default this module's."""
    known = json.loads((out / "engine.json").read_text())
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        try:
            found: dict[str, Any] = (sections or globals())[name](Path(root), known)
        except Exception as error:  # a section that fails is a finding
            found = {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-2500:]}
    found["section_s"] = round(time.perf_counter() - begun, 1)
    (scratch / f"{name}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def run_together(
    names: list[str], out: Path, scratch: Path, left: float, module: str = "cuda_bench", limits: dict[str, int] = LIMITS_S
) -> None:
    """Start them, wait for each within its limit, merge their results into engine.json. `module` holds the sections."""
    begun = time.perf_counter()
    me = [sys.executable, "-m", f"penstock.plugins.commands.bench.{module}", str(out), "--one"]
    running = {}
    for name in names:
        with (scratch / f"{name}.log").open("wb") as log:
            running[name] = subprocess.Popen([*me, name, str(scratch)], stdout=log, stderr=log, start_new_session=True)
    for name, process in running.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, min(limits.get(name, 60), left) - (time.perf_counter() - begun)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # our own child and what it started
            process.wait()
        file = scratch / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if not found:
            found = {"stopped": f"status {process.returncode} after {time.perf_counter() - begun:.0f} s"}
        if {"stopped", "error"} & set(found):
            found["log"] = (scratch / f"{name}.log").read_bytes()[-2500:].decode(errors="replace")
        known = json.loads((out / "engine.json").read_text())
        known[name] = found
        (out / "engine.json").write_text(json.dumps(known, indent=1))
        failed = "FAILED" if {"stopped", "error"} & set(found) or found.get("rc") else ""
        print(f"{name}: {time.perf_counter() - begun:.1f} s {failed}", flush=True)


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    if len(arguments) > 2 and arguments[1] == "--one":
        run_section(arguments[2], out, Path(arguments[3]))
        return
    budget = float(os.environ.get("BENCH_BUDGET_S", "600"))
    first = time.perf_counter()
    wanted = arguments[1:] or list(LIMITS_S)
    (out / "engine.json").write_text(json.dumps({"date": time.strftime("%Y-%m-%d")}))
    together = [name for name in TOGETHER if name in wanted]
    groups = ([together] if together else []) + [[name] for name in wanted if name not in together]
    with tempfile.TemporaryDirectory() as scratch:
        for group in groups:
            left = budget - (time.perf_counter() - first)
            if left < 8:
                print(f"{', '.join(group)}: left out, the time is used up", flush=True)
                continue
            run_together(group, out, Path(scratch), left)
    known = json.loads((out / "engine.json").read_text())
    for name in wanted:
        shown = {key: value for key, value in known.get(name, {}).items() if key != "said"}
        print(name, json.dumps(shown)[:1500])


if __name__ == "__main__":
    main(sys.argv[1:])
