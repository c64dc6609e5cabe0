"""Warm-up and the deterministic self-test of a runner.

What it is: steps that touch what a first request would pay for, and a proof on this very machine, before anybody is served, that a sequence's
log-probabilities and tokens are the same bits alone, in a ragged batch, in chunks, with drafts where there are any, on other blocks, on shared blocks and after recomputation.
What it does not know: how a runner computes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penstock.core.protocol.errors import EngineFailure
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.devices.driver import Drivable, Driver, Job, Options

OUTPUTS = 3
"""Tokens that a sequence of the self-test draws."""


def touch(runner: Drivable, progress: Callable[[str], None]) -> None:
    """A prefill chunk, then decode steps of one row and of a full batch, on blocks that nobody owns yet."""
    greedy = SamplingParams(temperature=0.0)
    length = max(1, min(runner.num_blocks * runner.block_size, runner.max_model_len, runner.max_num_batched_tokens, 512) - 4)
    prompt = (np.arange(length) % runner.facts.vocab_size).astype(np.int32)
    progress("warming up: prefill and decode")
    Driver(runner).run([Job(prompt=prompt, params=greedy, max_tokens=2)])
    rows = min(runner.max_num_seqs, runner.num_blocks, runner.max_num_batched_tokens)
    progress(f"warming up: {rows} rows")
    Driver(runner).run([Job(prompt=prompt[:1], params=greedy, max_tokens=2 if runner.max_model_len > 2 else 1) for _ in range(rows)])


def self_test(runner: Drivable, progress: Callable[[str], None], seam: int = 0) -> None:
    """Raises EngineFailure naming the first comparison that is not equal bit by bit. `seam`: a number of keys after which the runner's sums begin anew;
    if a sequence may be that long, one that reaches beyond it is compared too."""
    size, outputs = runner.block_size, OUTPUTS
    room = min(runner.max_model_len - outputs, runner.num_blocks * size // 4 - size)
    if room < 1:
        raise EngineFailure("--deterministic: the KV cache is too small for the self-test; raise --kv-cache-memory-bytes.")
    longest = min(room, runner.max_num_batched_tokens, 4 * size + 5)
    ways = {
        "batched": Options(),
        "on other blocks and in chunks": Options(scatter=True, chunk=lambda random: random.randint(1, 2 * size), seed=1),
        "one token at a time": Options(chunk=lambda random: 1, scatter=True, seed=2),
        "on shared blocks": Options(share=True, at_once=1),
        "preempted and recomputed": Options(preempt=0.3, seed=3),
    }
    _compare(runner, progress, [longest, longest, max(1, longest // 2 + 1), min(3, longest), 1], ways)
    if 0 < seam < room:
        ways = {
            "long and batched": Options(),
            "long and in chunks": Options(scatter=True, chunk=lambda random: random.randint(seam // 4, seam // 2), seed=4),
            "long, preempted and recomputed": Options(preempt=0.3, seed=5),
        }
        _compare(runner, progress, [min(room, seam + 2 * size + 3), 3], ways)


def _compare(runner: Drivable, progress: Callable[[str], None], lengths: list[int], ways: dict[str, Options]) -> None:
    """Each prompt alone, then all together in each way. The second begins like the first."""
    vocab = runner.facts.vocab_size
    rng = np.random.default_rng(20)
    prompts = [rng.integers(0, vocab, length).astype(np.int32) for length in lengths]
    half = min(lengths[0] // 2, lengths[1])
    prompts[1][:half] = prompts[0][:half]
    params = [
        SamplingParams(temperature=0.8 * (index % 2), top_p=0.95, seed=index, logprobs=min(20, vocab - 1)) for index in range(len(prompts))
    ]

    def run(options: Options, which: list[int]) -> dict[int, Job]:
        jobs = {index: Job(prompt=prompts[index], params=params[index], max_tokens=OUTPUTS) for index in which}
        Driver(runner, options).run(list(jobs.values()))
        return jobs

    progress("deterministic self-test: alone")
    everybody = list(range(len(prompts)))
    alone = {index: run(Options(), [index])[index] for index in everybody}
    if getattr(runner, "lookahead", 0):
        ways = {**ways, "with drafts": Options(told=lambda job: _drafts(job, alone), scatter=True, seed=6)}
    for name, options in ways.items():
        progress(f"deterministic self-test: {name}")
        together = run(options, everybody)
        for index in everybody:
            if (alone[index].tokens, alone[index].logprobs) != (together[index].tokens, together[index].logprobs):
                backend = getattr(runner, "attention", "")
                of = f" with the attention backend {backend!r}" if backend else ""
                raise EngineFailure(
                    f"--deterministic: the self-test failed on this machine{of}: a sequence run {name} differs from itself alone"
                    f" ({_difference(together[index], alone[index])}). Start without --deterministic, or with another --attention-backend."
                )


def _drafts(job: Job, alone: dict[int, Job]) -> list[int]:
    """What it says next when it is alone, the last of it wrong."""
    truth = next(one for one in alone.values() if one.prompt is job.prompt)
    tokens = truth.tokens[len(job.tokens) :]
    return [*tokens[:-1], (tokens[-1] + 1) % 2] if tokens else []


def _difference(one: Job, other: Job) -> str:
    if one.tokens != other.tokens:
        return f"tokens {one.tokens} and {other.tokens}"
    at = next((at for at, pair in enumerate(zip(one.logprobs, other.logprobs, strict=False)) if pair[0] != pair[1]), 0)
    first, second = (np.frombuffer(job.logprobs[at], np.float32) for job in (one, other))
    if first.shape != second.shape:
        return f"the tokens are equal, the log-probabilities of token {at + 1} are {first.size} and {second.size} numbers"
    worst = float(np.max(np.abs(first.astype(np.float64) - second)))
    return f"the tokens are equal, the log-probabilities are not: at token {at + 1} by up to {worst:.3g}"
