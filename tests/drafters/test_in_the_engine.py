"""A drafter on the host in the whole engine: the same tokens in fewer steps, whatever the wiring."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import EMPTY_I32, i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.messages import Admit, StepTokens
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.policies.fcfs import FirstComeFirstServed


def say(history: list[int], prompt: int) -> int | None:
    """Some go round in circles."""
    return 40 + (len(history) - prompt) % 6 if history[0] % 2 else None


async def answers(config: dict[str, Any]) -> tuple[dict[int, list[int]], int, list[StepTokens], Engine]:
    tokens: dict[int, list[int]] = {}
    steps: list[StepTokens] = []
    over = trio.Event()

    def output(message: Any) -> None:
        steps.append(message)
        for seq, token in zip(message.seqs.tolist(), message.tokens.tolist(), strict=True):
            tokens.setdefault(seq, []).append(token)
        if sum(len(said) for said in tokens.values()) == 4 * 50:
            over.set()

    device = FakeDevice(FakeOptions(depth=2, lookahead=4 if config else 0), script=say)
    plugins = PluginHost("engine").load()
    settings = build({"block_size": 4, "wiring": config.pop("wiring", "cell"), **config})
    engine = Engine(settings, output=output, device=device, policy=FirstComeFirstServed(), plugins=plugins)
    try:
        async with trio.open_nursery() as nursery:
            facts = await engine.start(nursery)
            assert (facts.drafters, facts.lookahead) == ((["suffix"], 4) if config else ([], 0))
            for key in range(1, 5):
                engine.post(
                    Admit(
                        key=key, incarnation=1, prompt=i32([key, 2, 3]), hashes=b"", root_hash=b"0" * 16, choices=i32([0]),
                        sampling=SamplingParams(seed=key), max_tokens=50, eos=EMPTY_I32,
                    )
                )  # fmt: skip
            with trio.fail_after(20):
                await over.wait()
            nursery.cancel_scope.cancel()
    finally:
        engine.close()
    return tokens, len(steps), steps, engine


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_the_same_tokens_in_fewer_steps(wiring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Widths, "choose", Widths.most)
    plain, _, _, _ = trio.run(answers, {})
    drafted, _, steps, _ = trio.run(answers, {"wiring": wiring, "speculative_config": {"method": "suffix", "num_speculative_tokens": 4}})
    assert drafted == plain
    stats = steps[-1].stats.speculation
    assert stats is not None
    assert stats.accepted > 50, "of two that go round in circles"
    told = {seq for sent in steps for seq in sent.drafted_seqs.tolist()}
    assert {1 << 7, 3 << 7} <= told


def test_a_method_that_nobody_knows_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(answers, {"speculative_config": {"method": "sufix"}})
    assert caught.group_contains(ConfigError, match="the 'method' 'sufix'. Did you mean 'suffix'")
