"""The engine on the fake device: both wirings, both depths, threads included, give the same answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from penstock.core.actors.kv import KvManager
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.processes.engine import Engine, runner_config
from penstock.core.protocol.columns import i32, i64
from penstock.core.protocol.config import build
from penstock.core.protocol.control import Drain, Drained, Message, PeerDown
from penstock.core.protocol.errors import CheckpointError, ConfigError, EngineFailure
from penstock.core.protocol.hashing import CacheKey, chain
from penstock.core.protocol.messages import ABORTED, LENGTH, STOP, Abort, Admit, Park, StepTokens, Unpark, seq_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.device_queue import InlineDeviceQueue
from penstock.plugins.policies.fcfs import FirstComeFirstServed

VOCAB = 211
ROOT = CacheKey(weights="w", layout="l").root()
BASE = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "block_size": 4}


def admit(key: int, prompt: list[int], *, max_tokens: int = 12, n: int = 1, eos: tuple[int, ...] = (), **params: Any) -> Admit:
    tokens = i32(prompt)
    return Admit(
        key=key,
        incarnation=1,
        prompt=tokens,
        hashes=chain(ROOT, tokens, 4),
        root_hash=ROOT,
        choices=i32(range(n)),
        sampling=SamplingParams(**{"n": n, "seed": key, **params}),
        max_tokens=max_tokens,
        eos=i32(eos),
        arrival_ns=key,
    )


class Collector:
    """Tokens and end reasons by sequence; `ended(n)` waits until so many sequences are over."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, int] = {}
        self.steps: list[StepTokens] = []
        self.other: list[Message] = []
        self._changed = trio.Event()

    def __call__(self, message: Message) -> None:
        if not isinstance(message, StepTokens):
            self.other.append(message)
        else:
            self.steps.append(message)
            columns = (message.seqs, message.offsets, message.tokens, message.reasons)
            for seq, offset, token, reason in zip(*(column.tolist() for column in columns), strict=True):
                if token >= 0:
                    assert offset == len(self.tokens.setdefault(seq, []))
                    self.tokens[seq].append(token)
                if reason:
                    assert seq not in self.reasons
                    self.reasons[seq] = reason
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():
                await self._changed.wait()

    async def ended(self, count: int) -> None:
        await self.until(lambda: len(self.reasons) >= count)


def run_engine(
    test: Callable[[Engine, Collector], Any],
    *,
    wiring: str = "cell",
    options: FakeOptions | None = None,
    device: FakeDevice | None = None,
    queue: Any = None,
    **config: Any,
) -> Collector:
    collector = Collector()
    device = device or FakeDevice(options or FakeOptions(vocab_size=VOCAB))

    async def main() -> None:
        engine = Engine(
            build({**BASE, "wiring": wiring, **config}), output=collector, device=device, policy=FirstComeFirstServed(), queue=queue
        )
        try:
            async with trio.open_nursery() as nursery:
                await engine.start(nursery)
                await test(engine, collector)
                if len(collector.reasons) == len(collector.tokens):  # nothing runs: nothing may be held
                    assert engine.host is not None
                    await trio.testing.wait_all_tasks_blocked()
                    kv = engine.host._actors["kv"]
                    assert isinstance(kv, KvManager)
                    assert kv.counts()[2] == 0
                    assert kv.check() == []
                nursery.cancel_scope.cancel()
        finally:
            engine.close()

    trio.run(main)
    return collector


def workload(seed: int) -> list[Admit]:
    """Shared prefixes, several choices, different lengths, stops, seeds and greedy ones."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    out = []
    for key in range(1, 25):
        own = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        prompt = shared[: rng.choice([0, 8, 24])] + own
        params: dict[str, Any] = {"temperature": rng.choice([0.0, 1.0])}
        if rng.random() < 0.3:
            params["logprobs"] = 2
        out.append(admit(key, prompt, max_tokens=rng.randrange(1, 30), n=rng.choice([1, 1, 3]), eos=(5, 6, 7), **params))
    return out


async def _all(engine: Engine, collector: Collector, requests: list[Admit]) -> None:
    engine.post(*requests)
    await collector.ended(sum(len(request.choices) for request in requests))


def expected(requests: list[Admit]) -> dict[int, list[int]]:
    """The same requests, one at a time: what each answer must be."""
    out: dict[int, list[int]] = {}
    for request in requests:
        got = run_engine(lambda e, c, request=request: _all(e, c, [request]), queue=InlineDeviceQueue, max_num_seqs=4)
        out |= got.tokens
    return out


@pytest.fixture(scope="module")
def reference() -> tuple[list[Admit], dict[int, list[int]]]:
    requests = workload(1)
    return requests, expected(requests)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_both_wirings_and_all_depths_answer_as_if_alone(
    wiring: str, depth: int, reference: tuple[list[Admit], dict[int, list[int]]]
) -> None:
    requests, tokens = reference
    got = run_engine(lambda e, c: _all(e, c, requests), wiring=wiring, options=FakeOptions(vocab_size=VOCAB, depth=depth))
    assert got.tokens == tokens
    assert set(got.reasons.values()) <= {STOP, LENGTH}
    assert got.steps[-1].stats.running == 0


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_preemption_changes_nothing(wiring: str, reference: tuple[list[Admit], dict[int, list[int]]]) -> None:
    requests, tokens = reference
    got = run_engine(
        lambda e, c: _all(e, c, requests),
        wiring=wiring,
        options=FakeOptions(vocab_size=VOCAB, depth=2),
        num_gpu_blocks_override=44,
        admission_forecast=False,
    )
    assert got.tokens == tokens
    assert got.steps[-1].stats.preemptions > 0


def test_the_wirings_produce_the_same_steps_when_time_stands_still() -> None:
    """With one device thread less (inline), even the steps themselves are equal: the tasks wiring is the same machine."""
    requests = workload(2)

    def shape(collector: Collector) -> list[tuple[list[int], list[int]]]:
        return [(step.seqs.tolist(), step.tokens.tolist()) for step in collector.steps]

    runs = [run_engine(lambda e, c: _all(e, c, requests), wiring=wiring, queue=InlineDeviceQueue) for wiring in ("cell", "tasks")]
    assert shape(runs[0]) == shape(runs[1])


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_abort_park_and_a_lost_text_process(wiring: str) -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        engine.post(*(admit(key, [1, 2, key], max_tokens=4000) for key in (1, 2, 3, 4)))
        await collector.until(lambda: all(len(collector.tokens.get(seq_of(key, 0), [])) > 3 for key in (1, 2, 3, 4)))
        engine.post(Abort(seqs=i64([seq_of(2, 0), seq_of(99, 0)])))
        await collector.ended(1)
        assert collector.reasons == {seq_of(2, 0): ABORTED}
        engine.post(Park(key=1))
        have = len(collector.tokens[seq_of(3, 0)])
        await collector.until(lambda: len(collector.tokens[seq_of(3, 0)]) > have + 5)
        parked = len(collector.tokens[seq_of(1, 0)])
        have = len(collector.tokens[seq_of(3, 0)])
        await collector.until(lambda: len(collector.tokens[seq_of(3, 0)]) > have + 5)
        assert len(collector.tokens[seq_of(1, 0)]) == parked
        engine.post(Unpark(key=1))
        await collector.until(lambda: len(collector.tokens[seq_of(1, 0)]) > parked)
        engine.post(PeerDown(role="text", id=0, epoch=1))
        await collector.ended(4)
        engine.post(admit(9, [1, 2, 3], max_tokens=2))
        await collector.ended(5)

    run_engine(test, wiring=wiring, admission_forecast=False)


def test_drain_refuses_and_reports_when_nothing_is_left() -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        engine.post(admit(1, [1, 2, 3], max_tokens=20))
        engine.post(Drain(deadline_s=5.0))
        await collector.until(lambda: bool(collector.other))
        assert [type(m) for m in collector.other] == [Drained]
        assert collector.reasons == {seq_of(1, 0): LENGTH}

    run_engine(test)


def test_drain_of_an_idle_engine_is_answered_at_once() -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        engine.post(Drain())
        await collector.until(lambda: bool(collector.other))

    run_engine(test)


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_a_lost_device_ends_the_engine_with_its_reason(wiring: str) -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        engine.post(admit(1, [1, 2, 3], max_tokens=50))
        await trio.sleep(20)

    with pytest.raises(BaseExceptionGroup) as caught:
        run_engine(test, wiring=wiring, options=FakeOptions(vocab_size=VOCAB, fail_at_step=3))
    (error,) = caught.value.exceptions
    assert isinstance(error, EngineFailure)
    assert "step 3" in str(error)
    assert "injected device fault" in str(error)


def test_facts_tell_what_the_runner_is() -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        facts = engine.facts
        assert facts is not None
        assert (facts.architecture, facts.vocab_size, facts.block_size, facts.num_blocks) == ("FakeForCausalLM", VOCAB, 4, 77)
        assert facts.model == "name"
        assert facts.kv_bytes == 77 * 4 * 8
        assert engine.progress == (0, 0)
        engine.post(admit(1, [1, 2, 3], max_tokens=3))
        assert engine.progress[1] > 0
        await collector.ended(1)
        assert engine.progress[0] >= 3
        assert engine.progress[1] == 0

    run_engine(test, num_gpu_blocks_override=77, served_model_name=["name"])


def test_loading_errors_come_out_of_start() -> None:
    async def test(engine: Engine, collector: Collector) -> None:
        raise AssertionError("never started")

    with pytest.raises(BaseExceptionGroup) as caught:
        run_engine(test, options=FakeOptions(fail_load="weights are missing"))
    assert isinstance(caught.value.exceptions[0], CheckpointError)


def test_configuration_reaches_the_runner() -> None:
    config = runner_config(build({"dtype": "half", "hf_overrides": '{"a": 1}', "threads": 3}))
    assert (config.dtype, config.hf_overrides, config.threads) == ("float16", {"a": 1}, 3)
    with pytest.raises(ConfigError, match="not valid JSON"):
        runner_config(build({"hf_overrides": "{"}))
    with pytest.raises(ConfigError, match="JSON object"):
        runner_config(build({"hf_overrides": "[]"}))
