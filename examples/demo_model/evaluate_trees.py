"""Measure how many tokens a pass of Brook yields with chains and with trees of drafts, as the engine's own runner makes them on a CPU.

    python examples/demo_model/evaluate_trees.py plugins/demo_model/brook plugins/demo_model/brook-medusa --drafts 3 8 --tree "[(0,), (1,), (0, 0)]"

    python examples/demo_model/evaluate_trees.py plugins/demo_model/brook plugins/demo_model/brook-eagle3 --grow 4 8 16

Which nodes pay? `--grow` lets a wide tree count which of its nodes are reached, and prints the trees of the most reached ones: a step's gain is the sum of what its nodes are
reached, whichever others there are, so that these are the best for their size. They are chosen on other prompts than those that are measured. Held-out prompts by task, those of evaluate_heads.py; greedy answers, float32. Every answer is compared with the one without speculation.
This script knows nothing about servers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import brook_chat as chat
import numpy as np
import torch
from evaluate_heads import TASKS, prompts_of
from tokenizers import Tokenizer

from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.model_files import read_object
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import MOST_NODES, DraftConfig, SpeculationConfig, method_of, tree_of
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.driver import Driver, Job, Options

GREEDY = SamplingParams(temperature=0.0)


def runner_of(folder: Path, asked: DraftConfig | None) -> Any:
    """A loaded runner."""
    config = RunnerConfig(
        model_path=str(folder), dtype="float32", max_model_len=None, block_size=16, max_num_seqs=8, max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 28, num_gpu_blocks_override=None, gpu_memory_utilization=0.9, load_format="auto", deterministic=False,
        enforce_eager=False, attention_backend=None, seed=0, threads=torch.get_num_threads(), max_logprobs=20,
        speculation=None if asked is None else SpeculationConfig(methods=[asked]),
    )  # fmt: skip
    return CpuDevice().load(config, lambda phase, fraction: None)


def answers(runner: Any, prompts: list[list[int]], end: int, most: int) -> list[list[int]]:
    """Greedy ones, the end included."""
    jobs = [Job(prompt=np.array(prompt, np.int32), params=GREEDY, max_tokens=most) for prompt in prompts]
    Driver(runner).run(jobs)
    return [job.tokens[: job.tokens.index(end) + 1] if end in job.tokens else job.tokens for job in jobs]


def tokens_per_pass(runner: Any, prompts: list[list[int]], said: list[list[int]]) -> tuple[int, int]:
    """(tokens behind the first of each answer, passes for them). Raises ValueError if an answer is another one."""
    drafts, found = runner.lookahead, [0, 0]
    sample = runner.sample
    # A limit close by would leave a row less drafts: it is far away, and a job ends when it has said its answer.
    jobs = [Job(prompt=np.array(p, np.int32), params=GREEDY, max_tokens=len(tokens) + 100) for p, tokens in zip(prompts, said, strict=True)]

    def counted(work: Any) -> Any:
        done = sample(work)()
        counts = done.counts if len(done.counts) else np.ones(len(work.slots), np.int32)
        for slot, count in zip(work.slots.tolist(), counts.tolist(), strict=True):
            at, job = next((at, job) for at, job in enumerate(jobs) if job.slot == slot)
            before, whole = len(job.tokens), len(said[at])
            if before:
                found[0] += min(count, whole - before)
                found[1] += 1
            if before + count >= whole:
                job.max_tokens = before + count
        return lambda: done

    runner.sample = counted
    Driver(runner, Options(lookahead=lambda rng: drafts)).run(jobs)
    runner.sample = sample
    if [job.tokens[: len(tokens)] for job, tokens in zip(jobs, said, strict=True)] != said:
        raise ValueError("an answer differs from that without speculation")
    return found[0], found[1]


def wide(depth: int) -> list[tuple[int, ...]]:
    """Up to 63 paths that a drafter may make anything of: few choices behind unlikely ones."""
    bound, found = 1, []
    while True:
        level: list[tuple[int, ...]] = [()]
        more = []
        for _ in range(depth):
            level = [(*path, rank) for path in level for rank in range(16) if np.prod([r + 1 for r in (*path, rank)]) <= bound]
            more += level
        if len(more) > MOST_NODES:
            return found
        bound, found = bound + 1, more


def grown(runner: Any, prompts: dict[str, list[list[int]]], said: dict[str, list[list[int]]], sizes: list[int]) -> list[str]:
    """The trees of so many nodes that were reached most often, as text."""
    reached = np.zeros(1 + runner.lookahead, np.int64)
    walk = runner._tree.walk

    def counted(*given: Any) -> Any:
        walked = walk(*given)
        reached[:] += np.bincount(walked.sources[walked.sources >= 0].numpy(), minlength=len(reached))
        return walked

    runner._tree.walk = counted
    for task, every in prompts.items():
        tokens_per_pass(runner, every, said[task])
    paths = wide(int(runner._tree.tree.deepest))
    paths = sorted(paths, key=lambda path: (len(path), path))
    order = sorted(
        range(len(paths)), key=lambda at: (-reached[at + 1], len(paths[at]), paths[at])
    )  # a parent is reached as often as its child at least
    return [str(sorted((paths[at] for at in order[:size]), key=lambda path: (len(path), path))).replace(" ", "") for size in sizes]


def main() -> None:
    """Measure chains and trees of one drafter."""
    parser = argparse.ArgumentParser(description="Measure tokens a pass with chains and trees of drafts.")
    parser.add_argument("target", type=Path, help="Brook's folder")
    parser.add_argument("drafter", type=Path, help="folder of Medusa heads or of an EAGLE-3 or MTP head")
    parser.add_argument("--cases", type=int, default=12, help="prompts of each task")
    parser.add_argument("--drafts", type=int, nargs="*", default=[], help="lengths of chains")
    parser.add_argument("--tree", nargs="*", default=[], help="trees, each as speculative_token_tree has it")
    parser.add_argument("--grow", type=int, nargs="*", default=[], help="sizes of trees that are to be found")
    parser.add_argument("--depth", type=int, default=3, help="of these")
    parser.add_argument("--most", type=int, default=160, help="tokens of an answer")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    end = tokenizer.token_to_id(chat.END)
    prompts = {task: prompts_of(task, tokenizer, options.cases) for task in TASKS}
    plain = runner_of(options.target, None)
    said = {task: answers(plain, every, end, options.most) for task, every in prompts.items()}
    method = method_of(read_object(options.drafter / "config.json"))
    if options.grow:
        others = {task: prompts_of(task, tokenizer, options.cases, seed=2025) for task in TASKS}
        theirs = {task: answers(plain, every, end, options.most) for task, every in others.items()}
        whole = wide(options.depth)
        asked = DraftConfig(method=method, model=str(options.drafter), num_speculative_tokens=len(whole), speculative_token_tree=str(whole))
        options.tree += grown(runner_of(options.target, asked), others, theirs, options.grow)
    ways: list[tuple[str, int, str | None]] = [(f"chain of {count}", count, None) for count in options.drafts]
    ways += [(f"tree of {len(tree_of(tree))}, {tree}", len(tree_of(tree)), tree) for tree in options.tree]
    for name, count, tree in ways:
        asked = DraftConfig(method=method, model=str(options.drafter), num_speculative_tokens=count, speculative_token_tree=tree)
        runner = runner_of(options.target, asked)
        found = {task: tokens_per_pass(runner, prompts[task], said[task]) for task in TASKS}
        tokens, passes = (sum(part) for part in zip(*found.values(), strict=True))
        by_task = ", ".join(f"{task} {a / max(b, 1):.2f}" for task, (a, b) in found.items())
        print(f"{options.drafter.name}, {name}: {tokens / passes:.3f} tokens a pass ({passes} passes; {by_task})", flush=True)


if __name__ == "__main__":
    main()
