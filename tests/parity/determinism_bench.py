"""The large determinism comparison and the cost of `--deterministic`, as a script.

    python tests/parity/determinism_bench.py FOLDER [FOLDER ...] [--prompts 64] [--tokens 64] [--dtypes bfloat16,float32] [--json OUT]

For each checkpoint folder and dtype: `--prompts` random prompts (1 to 200 tokens, half of them with a common prefix; every second one
greedy, the others drawn with a seed), `--tokens` tokens each, run alone and in each of the ways of `WAYS`; tokens and the log-probabilities of every
drawn token are compared as bytes. On the native kernels the deterministic mode and the default are one path, so its cost is the self-test at
start, which is timed too. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels import native
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.driver import Driver, Job, Options

WAYS = {
    "batched": Options(),
    "ragged and chunked": Options(chunk=lambda rng: rng.randint(1, 130), scatter=True, at_once=17, seed=1),
    "shared blocks": Options(share=True, at_once=8),
    "preempted": Options(preempt=0.2, scatter=True, seed=3),
}


def jobs(count: int, tokens: int, vocab: int) -> list[Job]:
    rng = np.random.default_rng(8)
    common = rng.integers(0, vocab, 100).astype(np.int32)
    out = []
    for index in range(count):
        prompt = rng.integers(0, vocab, int(rng.integers(1, 200))).astype(np.int32)
        if index % 4 > 1:
            prompt = np.concatenate([common, prompt[:90]])
        hot = SamplingParams(temperature=0.8, top_p=0.95, seed=index, logprobs=0)
        greedy = SamplingParams(temperature=0.0, logprobs=0)
        out.append(Job(prompt=prompt, params=hot if index % 2 else greedy, max_tokens=tokens))
    return out


def load(folder: str, dtype: str, deterministic: bool) -> Any:
    config = RunnerConfig(
        model_path=folder, dtype=dtype, max_model_len=1024, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048,
        kv_cache_memory_bytes=None, num_gpu_blocks_override=None, gpu_memory_utilization=0.9, load_format="auto", deterministic=deterministic,
        enforce_eager=False, attention_backend=None, seed=0, threads=None, max_logprobs=20,
    )  # fmt: skip
    return CpuDevice().load(config, lambda phase, fraction: None)


def compare(folder: str, dtype: str, count: int, tokens: int) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": folder, "dtype": dtype, "kernels": native.describe(), "threads": torch.get_num_threads()}
    for deterministic in (False, True):
        runner = load(folder, dtype, deterministic)
        started = time.perf_counter()
        runner.warm_up(lambda line: None)
        row["warm_up_s" if not deterministic else "warm_up_with_self_test_s"] = round(time.perf_counter() - started, 3)
    vocab = runner.facts.vocab_size
    alone = jobs(count, tokens, vocab)
    started = time.perf_counter()
    for job in alone:
        Driver(runner).run([job])
    row["alone_s"] = round(time.perf_counter() - started, 2)
    row["different"] = {}
    for name, options in WAYS.items():
        again = jobs(count, tokens, vocab)
        started = time.perf_counter()
        Driver(runner, options).run(again)
        row[f"{name}_s"] = round(time.perf_counter() - started, 2)
        different = sum((a.tokens, a.logprobs) != (b.tokens, b.logprobs) for a, b in zip(alone, again, strict=True))
        row["different"][name] = different
        print(f"{folder} {dtype}: {name}: {count - different} of {count} sequences equal bit by bit", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--json")
    given = parser.parse_args()
    rows = [compare(folder, dtype, given.prompts, given.tokens) for folder in given.folders for dtype in given.dtypes.split(",")]
    for row in rows:
        print(json.dumps(row))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out:
            json.dump(rows, out, indent=1)
    return int(any(sum(row["different"].values()) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
