"""Beam search against transformers: scheduler, KV manager and the CPU's runner together must find the hypotheses, and their scores, that `generate` finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import trio

from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.messages import STOP, Admit, StepTokens, Vocabulary
from penstock.core.protocol.sampling import Beam, SamplingParams
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.policies.fcfs import FirstComeFirstServed

Found = list[tuple[list[int], float, bool]]
"""Of each hypothesis its tokens, their log-probabilities' sum, and whether a token ended it."""
VOCAB = 131


def ask(key: int, prompt: list[int], beam: Beam, *, n: int, most: int, eos: list[int], minimum: int = 0) -> Admit:
    sampling = SamplingParams(n=n, seed=0, logprobs=0, min_tokens=minimum, beam=beam)
    return Admit(
        key=key, incarnation=0, prompt=i32(prompt), hashes=b"", root_hash=b"0" * 16, choices=i32(range(n)), sampling=sampling,
        max_tokens=most, eos=i32(eos),
    )  # fmt: skip


def search(folder: Any, asked: list[Admit], vocabulary: Vocabulary | None = None, **options: Any) -> list[Found]:
    """What the engine finds for each of these, all at once. `vocabulary`: for grammars."""
    found: dict[int, tuple[list[int], list[float], list[bool]]] = {}
    left = {admit.key << 7 | choice for admit in asked for choice in range(admit.choices.size)}

    async def main() -> None:
        done = trio.Event()

        def output(message: Any) -> None:
            if not isinstance(message, StepTokens) or not message.seqs.size:
                return
            assert message.logprobs is not None
            firsts = np.cumsum(message.logprobs.counts) - message.logprobs.counts
            values = dict(zip(message.logprobs.rows.tolist(), message.logprobs.values[firsts].tolist(), strict=True))
            assert message.logprobs.ids[firsts].tolist() == message.tokens.tolist()
            for row, (seq, token, reason) in enumerate(
                zip(message.seqs.tolist(), message.tokens.tolist(), message.reasons.tolist(), strict=True)
            ):
                tokens, logprobs, stopped = found.setdefault(seq, ([], [], []))
                tokens.append(token)
                logprobs.append(values[row])
                if reason:
                    stopped.append(reason == STOP)
                    left.discard(seq)
            if not left:
                done.set()

        config = build({"model": str(folder), "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 23, "threads": 1, **options})
        plugins = None if vocabulary is None else PluginHost("engine").load()
        engine = Engine(config, output=output, device=CpuDevice(), policy=FirstComeFirstServed(), plugins=plugins)
        async with trio.open_nursery() as nursery:
            await engine.start(nursery)
            engine.post(*([] if vocabulary is None else [vocabulary]), *asked)
            with trio.fail_after(100):
                await done.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
    out: list[Found] = []
    for admit in asked:
        mine = [found[admit.key << 7 | choice] for choice in range(admit.choices.size)]
        out.append([(tokens, sum(logprobs), stopped[0]) for tokens, logprobs, stopped in mine])
    return out


def reference(model: Any, admit: Admit) -> tuple[list[list[int]], list[float]]:
    """transformers' hypotheses, without padding, and their scores."""
    sampling, prompt = admit.sampling, admit.prompt.tolist()
    beam = sampling.beam
    assert beam is not None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beam.width,
        num_return_sequences=sampling.n,
        length_penalty=beam.length_penalty,
        early_stopping=beam.early_stopping,
        do_sample=False,
        max_new_tokens=admit.max_tokens,
        min_new_tokens=sampling.min_tokens or None,
        eos_token_id=admit.eos.tolist() or None,
        pad_token_id=VOCAB - 1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ends = set(admit.eos.tolist())
    said: list[list[int]] = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        said.append(row[: end + 1])
    return said, out.sequences_scores.tolist()


def compare(model: Any, admit: Admit, found: Found) -> None:
    said, scores = reference(model, admit)
    beam = admit.sampling.beam
    assert beam is not None
    assert [tokens for tokens, _, _ in found] == said
    mine = [total / len(tokens) ** beam.length_penalty for tokens, total, _ in found]
    np.testing.assert_allclose(mine, scores, rtol=1e-4, atol=1e-4)


@pytest.fixture
def sharp(checkpoint: Callable[..., Any]) -> tuple[Any, Any]:
    """A model that is sure enough of its tokens for two implementations to agree on their order."""
    return checkpoint("LlamaForCausalLM", initializer_range=0.35)


def frequent(model: Any, prompt: list[int], most: int) -> list[int]:
    """Tokens that beams come across."""
    said, _ = reference(model, ask(1, prompt, Beam(width=8), n=8, most=most, eos=[]))
    return [said[0][3], said[5][7]]


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_hypotheses_and_scores_are_those_of_transformers(sharp: tuple[Any, Any], penalty: float) -> None:
    folder, model = sharp
    rng = np.random.default_rng(int(penalty * 10) + 100)
    asked: list[Admit] = []
    for size in (1, 15, 16, 17, 33):
        prompt = rng.integers(0, VOCAB - 1, size).tolist()
        ends = frequent(model, prompt, 14)
        for eos, minimum in (([], 0), (ends[:1], 0), (ends, 0), (ends, 6)):
            at = len(asked)
            early: Any = (True, False, "never")[at % 3]
            width = (2, 4, 8)[at // 2 % 3]
            beam = Beam(width=width, length_penalty=penalty, early_stopping=early)
            asked.append(ask(at + 1, prompt, beam, n=(width, 1, 2)[at // 3 % 3], most=14, eos=eos, minimum=minimum))
    found = search(folder, asked)
    stopped = 0
    for admit, one in zip(asked, found, strict=True):
        compare(model, admit, one)
        stopped += sum(stop for _, _, stop in one)
    assert 0 < stopped < sum(map(len, found)), "with and without an end token"
