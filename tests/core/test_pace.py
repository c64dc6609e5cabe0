"""Prompts beside decodes at a pace: the real scheduler and KV manager in virtual time, on a device whose steps take what an 8B model's do on a GPU. What is asserted are
counted times: everything is seeded, and nothing sleeps."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.actors.kv import KvManager
from penstock.core.actors.scheduler import waiting as room
from penstock.core.actors.scheduler.board import SchedulerSettings
from penstock.core.actors.scheduler.pace import ENOUGH, LEAST, PURSE, TURN, Needs, Pace, StepTimes
from penstock.core.actors.scheduler.scheduler import Scheduler
from penstock.core.contract.fake_device import FakeDevice
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import I32, i32
from penstock.core.protocol.config import build
from penstock.core.protocol.messages import Admit, Forward, Message, Plan, Sample, StepDone, StepTokens, seq_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.actor import Ask
from penstock.core.runtime.clock import FakeClock
from penstock.plugins.policies.fcfs import FirstComeFirstServed

FREE: dict[str, Any] = {}
PACED: dict[str, Any] = {"itl_target_ns": 0, "prefill_knee": 256}
KV_NS, PAIR_NS = 40.0, 0.9


def linear(tokens: int, positions: int, pairs: int) -> float:
    return 5.5e6 + 27e3 * tokens + KV_NS * positions + PAIR_NS * pairs


def kneed(tokens: int, positions: int, pairs: int) -> float:
    """The first tokens cost nothing: the weights are read anyway."""
    return 0.4e6 + max(6e6, 1.6e6 + 27e3 * tokens) + KV_NS * positions + PAIR_NS * pairs


class Load:
    """One engine in virtual time, which draws nothing but ones. `gaps` and `firsts` in ms."""

    def __init__(self, cost: Any = linear, **changes: Any) -> None:
        base: dict[str, Any] = {"engine": 0, "epoch": 1, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 8192}
        self.settings = SchedulerSettings(**{**base, "block_size": 16, "num_blocks": 40_000, "depth": 2, **changes})
        self.clock = FakeClock()
        self.begun = self.clock.now_ns()
        self.scheduler = Scheduler(self.settings, FirstComeFirstServed(), self.clock)
        self.kv = KvManager(self.settings.num_blocks, self.settings.block_size, enable_prefix_caching=True)
        self.cost = cost
        self.noise = np.random.default_rng(0)
        self.fifo: deque[Message] = deque()
        self.flying: deque[tuple[Sample, int, int]] = deque()
        self.forward: Forward | None = None
        self.beside: list[int] = []
        """Prompt tokens of each step that decoded while somebody's prompt was computed."""
        self.last: dict[int, int] = {}
        self.arrived: dict[int, int] = {}
        self.gaps: list[float] = []
        self.moments: list[float] = []
        """When each of the gaps ended, in s."""
        self.firsts: list[float] = []
        self.ended = self.tokens = self.keys = self.preempted = 0

    def post(self, message: Message) -> None:
        self.fifo.append(message)
        while self.fifo:
            handling: Any = self.scheduler.handle(self.fifo.popleft())
            if not hasattr(handling, "send"):
                for out in handling:
                    self._route(out)
                continue
            reply: Any = None
            while True:
                try:
                    out = handling.send(reply)
                except StopIteration:
                    break
                reply = None
                if isinstance(out, Ask):
                    (reply,) = self.kv.handle(out.question)
                else:
                    self._route(out)

    def _route(self, out: Message) -> None:
        if isinstance(out, Plan):
            self.fifo.append(out)
        elif isinstance(out, Forward):
            self.forward = out
        elif isinstance(out, Sample):
            assert self.forward is not None
            counts, starts = self.forward.counts.astype(np.int64), self.forward.starts.astype(np.int64)
            one = counts == 1
            prompts = int(counts[~one].sum())
            pairs = int((counts * (starts + counts // 2))[~one].sum())
            took = self.cost(int(counts.sum()), int(starts[one].sum()), pairs) * (1 + 0.02 * self.noise.standard_normal())
            begun = max(self.clock.now_ns(), self.flying[-1][2] if self.flying else 0)
            self.flying.append((out, begun, begun + round(took)))
            if one.any() and prompts:
                self.beside.append(prompts)
        else:
            assert isinstance(out, StepTokens)
            now = self.clock.now_ns()
            for seq, token, reason in zip(out.seqs.tolist(), out.tokens.tolist(), out.reasons.tolist(), strict=True):
                if token >= 0:
                    self.tokens += 1
                    before = self.last.get(seq)
                    (self.firsts if before is None else self.gaps).append((now - (before or self.arrived[seq])) / 1e6)
                    if before is not None:
                        self.moments.append((now - self.begun) / 1e9)
                    self.last[seq] = now
                self.ended += reason != 0
            self.preempted += out.preempted_seqs.size

    def admit(self, prompt: I32, answer: int, priority: int = 0, **sampling: Any) -> None:
        self.keys += 1
        self.arrived[seq_of(self.keys, 0)] = now = self.clock.now_ns()
        params = SamplingParams(temperature=0, **sampling)
        self.post(
            Admit(
                key=self.keys, incarnation=1, prompt=prompt, hashes=b"", root_hash=b"0" * 16, choices=i32([0]), sampling=params,
                max_tokens=answer, eos=i32([]), arrival_ns=now, priority=priority,
            )
        )  # fmt: skip

    def finish(self) -> None:
        sample, begun, ends = self.flying.popleft()
        self._until(ends)
        ones = np.ones(sample.slots.size, np.int32)
        self.post(StepDone(engine=0, epoch=1, step=sample.step, slots=sample.slots, tokens=ones, started_ns=begun, finished_ns=ends))

    def _until(self, moment: int) -> None:
        self.clock.advance(max(0, moment - self.clock.now_ns()) / 1e9)

    def run(self, arrivals: list[tuple[float, int, int]]) -> Load:
        """(seconds, prompt tokens, answer), in order."""
        rng = np.random.default_rng(7)
        pending = deque(arrivals)
        while pending or self.flying:
            while pending and (not self.flying or self.begun + pending[0][0] * 1e9 <= self.flying[0][2]):
                at, prompt, answer = pending.popleft()
                self._until(self.begun + round(at * 1e9))
                self.admit(rng.integers(2, 1000, prompt).astype(np.int32), answer)
            if self.flying:
                self.finish()
        assert self.ended == self.keys
        assert not self.scheduler.leftovers()
        return self

    def closed(self, clients: int, requests: int, prompt: int, answer: int) -> Load:
        rng, left = np.random.default_rng(7), requests
        while left or self.flying:
            while left and self.keys - self.ended < clients:
                left -= 1
                self.admit(rng.integers(2, 1000, prompt).astype(np.int32), answer)
            self.finish()
        return self

    def restart(self) -> None:
        """What was measured so far does not count."""
        self.begun, self.tokens = self.clock.now_ns(), 0
        for seen in (self.gaps, self.moments, self.firsts, self.last):
            seen.clear()

    @property
    def speed(self) -> float:
        return self.tokens / (max(self.last.values()) - self.begun)

    def gap(self, share: float, span: tuple[float, float] = (0.0, math.inf)) -> float:
        moments = np.array(self.moments)
        return float(np.quantile(np.array(self.gaps)[(moments >= span[0]) & (moments <= span[1])], share))


def drawn(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return max(4, min(most, round(median * math.exp(sigma * rng.gauss(0, 1)))))


def poisson(rate: float, seconds: float, seed: int) -> list[tuple[float, int, int]]:
    """Lengths as conversations have them."""
    rng = random.Random(seed)
    found: list[tuple[float, int, int]] = []
    now = rng.expovariate(rate)
    while now < seconds:
        found.append((now, drawn(rng, 120, 1.0, 1024), drawn(rng, 160, 0.8, 512)))
        now += rng.expovariate(rate)
    return found


# ------------------------------------------------------------------ loads


@pytest.mark.parametrize("cost", [linear, kneed])
@pytest.mark.parametrize(("rate", "seed"), [(38.0, 1), (30.0, 2)])
def test_arrivals_at_random_leave_the_gaps_between_tokens_even(cost: Any, rate: float, seed: int) -> None:
    load, steady = poisson(rate, 20, seed), (4.0, 20.0)
    free = Load(cost, max_num_seqs=512).run(load)
    paced = Load(cost, max_num_seqs=512, **PACED).run(load)
    assert paced.gap(0.95, steady) <= 1.3 * paced.gap(0.5, steady)
    assert free.gap(0.95, steady) > 1.5 * free.gap(0.5, steady), "without a pace they are not"
    assert paced.speed > 0.99 * free.speed
    assert np.median(paced.firsts) < 1.55 * np.median(free.firsts)
    assert np.quantile(paced.firsts, 0.95) < 2.7 * np.quantile(free.firsts, 0.95)


def test_first_tokens_wait_for_no_more_than_their_own_prompt() -> None:
    """At 38 requests/s, where they waited nearly three times as long while prompts were computed in order."""
    load = poisson(38.0, 20, 1)
    free, paced = Load(max_num_seqs=512).run(load), Load(max_num_seqs=512, **PACED).run(load)
    assert np.median(paced.firsts) < 1.4 * np.median(free.firsts)
    free, paced = Load(kneed, max_num_seqs=512).run(load), Load(kneed, max_num_seqs=512, **PACED).run(load)
    assert np.median(paced.firsts) < 1.02 * np.median(free.firsts), "where prompts cost nothing up to a knee it is none at all"


@pytest.mark.parametrize("budget", [2048, 8192])
@pytest.mark.parametrize("cost", [linear, kneed])
@pytest.mark.parametrize("warm", [False, True])
def test_a_closed_loop_loses_no_throughput(cost: Any, budget: int, warm: bool) -> None:
    """Also where step times are known when the crowd comes."""
    free, paced = Load(cost, max_num_batched_tokens=budget), Load(cost, max_num_batched_tokens=budget, **PACED)
    for load in (free, paced):
        load.closed(8, 40 if warm else 0, 700, 40)
        load.restart()
        load.closed(64, 256, 1024, 256)
    assert paced.speed > 0.99 * free.speed
    assert paced.gap(0.95) < 1.02 * free.gap(0.95)


def test_a_burst_loses_no_throughput() -> None:
    rng = random.Random(3)
    load = [(0.0, drawn(rng, 120, 1.0, 1024), drawn(rng, 160, 0.8, 512)) for _ in range(1000)]
    free, paced = Load(max_num_seqs=256).run(load), Load(max_num_seqs=256, **PACED).run(load)
    assert paced.speed > 0.99 * free.speed
    assert paced.gap(0.95) < free.gap(0.95)


@pytest.mark.parametrize("answer", [32, 256])
def test_long_prompts_at_once_neither_starve_nor_are_starved(answer: int) -> None:
    load = [(0.0, 200, 300)] * 32 + [(1.0, 7000, answer)] * 4
    free, paced = Load(**FREE).run(load), Load(**PACED).run(load)
    assert paced.speed > 0.99 * free.speed
    assert max(paced.firsts) < 1.3 * max(free.firsts)
    whole = linear(2048, 32 * 8192, 2048 * 8192) / 1e6
    assert max(paced.gaps) < 1.1 * whole, "no gap is longer than a step of the whole budget"


def test_a_stated_target_holds_and_prompts_still_make_progress() -> None:
    load = poisson(30, 16, 5)
    paced = Load(max_num_seqs=512, itl_target_ns=14_000_000, prefill_knee=256).run(load)
    assert paced.gap(0.95) <= 14.0
    hard = Load(max_num_seqs=64, itl_target_ns=1_000_000, prefill_knee=256).run([(0.0, 50, 200)] * 16 + [(0.5, 50, 20), (1.0, 3000, 20)])
    assert min(hard.beside[-40:]) >= LEAST or hard.beside[-1] < LEAST, "out of reach, but each step takes some"
    assert len(hard.firsts) == 18


def test_a_prompt_that_comes_alone_is_computed_at_once() -> None:
    load = [(0.0, 100, 400)] * 8 + [(0.6 * n + 0.5, 900, 8) for n in range(5)]
    paced = Load(**PACED).run(load)
    assert paced.beside.count(900) >= 3, "nobody but a few rows waited longer, and seldom"


def busy(**changes: Any) -> Load:
    """Sixteen that decode, step times that are known, and no long step left."""
    load = Load(**{"max_num_seqs": 32, "itl_target_ns": 12_000_000, "prefill_knee": 256, **changes})
    load.run([(0.05 * n, 300, 40) for n in range(ENOUGH + 4)])
    for _ in range(16):
        load.admit(np.arange(2, 50, dtype=np.int32), 4000)
    for _ in range(8):
        load.finish()
    pace = load.scheduler._board.pace
    assert pace is not None
    assert pace.times.known
    pace._purse = -float(PURSE)
    load.restart()
    return load


def first_token(load: Load, key: int, steps: int = 400) -> int:
    """Steps until it has one."""
    seq = seq_of(key, 0)
    return next(step for step in range(steps) if load.finish() is None and seq in load.last)


def test_short_prompts_do_not_wait_for_a_long_one_nor_for_the_next() -> None:
    load = busy()
    for size in (6000, 5000, 90):
        load.admit(np.arange(2, size + 2, dtype=np.int32), 4)
    long, short = load.keys - 2, load.keys
    assert first_token(load, short) <= 3
    assert seq_of(long, 0) not in load.last
    assert first_token(load, long) > 20, "the other one is still being computed by then"


def test_a_long_prompt_comes_to_its_end_among_short_ones() -> None:
    """However many there are: now and then it goes first. And those of less priority do not go before it at all."""
    load = busy()
    load.admit(np.arange(2, 1502, dtype=np.int32), 4)
    long = load.keys
    for step in range(80):
        for size in (95, 96, 97):  # two take nearly all that there is room for
            load.admit(np.arange(step + 2, step + 2 + size, dtype=np.int32), 1)
        load.finish()
        if seq_of(long, 0) in load.last:
            break
    assert seq_of(long, 0) in load.last
    patient = busy()
    for priority, size in ((0, 4000), (0, 3000), (5, 90)):
        patient.admit(np.arange(2, size + 2, dtype=np.int32), 4, priority=priority)
    assert first_token(patient, patient.keys) > 20


def test_the_strictest_of_those_that_run_sets_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has a goal of their own yet; where one will be said, it is obeyed as long as its request runs."""
    monkeypatch.setattr(room, "itl_goal_ns", lambda admit: {3: 9_000_000, 5: 30_000_000}.get(admit.priority, 0))
    load = busy(itl_target_ns=0)
    board = load.scheduler._board

    def limit() -> float:
        load.admit(np.arange(2, 902, dtype=np.int32), 1)
        load.finish()
        assert board.pace is not None
        return board.pace.limit_ns

    assert limit() not in (9e6, 30e6)
    load.admit(np.arange(2, 40, dtype=np.int32), 60, priority=5)
    load.admit(np.arange(2, 40, dtype=np.int32), 20, priority=3)
    for _ in range(6):
        load.finish()
    assert limit() == 9e6
    for _ in range(24):
        load.finish()
    assert limit() == 30e6
    for _ in range(60):
        load.finish()
    assert limit() not in (9e6, 30e6)


def test_preempted_sequences_and_prompt_logprobs_keep_the_pace() -> None:
    load = Load(num_blocks=260, max_num_seqs=32, **PACED)
    load.run([(0.02 * n, 150, 200) for n in range(40)])
    assert load.preempted
    told = Load(prompt_logprobs_weight=3.0, **PACED)
    for _ in range(8):
        told.admit(np.arange(2, 402, dtype=np.int32), 60, prompt_logprobs=2)
    while told.flying:
        told.finish()
    assert told.ended == 8


# ------------------------------------------------------------------ parts


def learned(cost: Any, knee: int = 256, steps: int = 400) -> StepTimes:
    times, rng = StepTimes(knee), random.Random(1)
    for _ in range(steps):
        rows, prompt = rng.randrange(8, 64), rng.randrange(32, 2000)
        read = rows * rng.randrange(100, 2000)
        times.learn(rows, read, 0, False, round(cost(rows, read, 0)))
        pairs = prompt * rng.randrange(0, 4000)
        times.learn(rows + prompt, read, pairs, True, round(cost(rows + prompt, read, pairs)))
    return times


def test_step_times_are_learned() -> None:
    times = learned(linear)
    for tokens, positions, pairs in ((32, 20_000, 0), (160, 50_000, 100_000), (1500, 9_000, 3_000_000)):
        assert times.time(tokens, positions, pairs) == pytest.approx(linear(tokens, positions, pairs), rel=0.03)
    room = times.room(40, 40_000, 0, 1.3 * times.time(40, 40_000))
    assert times.time(40 + round(room), 40_000) == pytest.approx(1.3 * times.time(40, 40_000), rel=0.02)


def test_a_hiccup_says_little_and_no_rate_is_negative() -> None:
    times = learned(linear)
    before = times.time(64, 50_000)
    times.learn(64, 50_000, 0, False, 3_000_000_000)
    for _ in range(16):
        times.learn(64, 50_000, 0, False, round(linear(64, 50_000, 0)))
    assert times.time(64, 50_000) < 1.1 * before
    falling = learned(lambda tokens, positions, pairs: 9e6 - 1e3 * tokens, knee=0)
    assert min(falling._rates) >= 0


def ready(target_ns: float = 0, steps: int = 400) -> Pace:
    """A pace that has seen decodes of 4 rows, alone and with prompts, and has no long step left."""
    pace = Pace(target_ns, 256)
    for _ in range(ENOUGH + 8):
        pace.times.learn(4, 400, 0, False, round(linear(4, 400, 0)))
        pace.times.learn(104, 400, 5000, True, round(linear(104, 400, 5000)))
    for _ in range(steps):
        pace.rested(round(linear(4, 400, 0)))
    pace._purse = 0.0
    return pace


def waits(*ahead: int, begun: tuple[int, ...] = ()) -> Needs:
    return Needs(list(begun), list(ahead), sum(ahead) + sum(begun), 0)


def test_nothing_is_bounded_before_times_are_known() -> None:
    assert Pace(0, 256).choose(4, 400, waits(5000), 2048) == (2048, 0, 0)
    assert LEAST <= ready().choose(4, 400, waits(5000), 2048).tokens < 2048


def test_long_steps_are_kept_for_what_has_piled_up() -> None:
    pace = ready()
    room = pace.choose(4, 400, waits(100), 2048).small
    for left, waiting, at_once in ((0, 2000, False), (1, 4 * room, False), (1, 12 * room, True), (PURSE, room + 1, True)):
        pace._purse = float(left)
        assert (pace.choose(4, 400, waits(waiting), 2048).tokens == 2048) == at_once
    pace._purse = 1.0
    for _ in range(3):
        pace.choose(4, 400, waits(100), 2048)
        pace.beside(60_000_000, pace.limit_ns)
    assert -2 < pace._purse < -1.8


def test_what_is_kept_for_short_prompts() -> None:
    pace = ready()
    room = pace.choose(4, 400, waits(10), 2048).small
    assert 60 < room < 100, "what 1.28 times 5.6 ms leave"
    assert pace.choose(4, 400, waits(20, begun=(900,)), 2048).kept == 20
    share = pace.choose(4, 400, waits(40, 1000, 40, 40), 2048)
    assert share.kept == 80 <= share.tokens, "as many as fit whole, in order"
    turns = [pace.choose(4, 400, waits(room, *[room] * 9, begun=(90,)), 2048).kept for _ in range(2 * TURN)]
    assert pace._rate > room, "much waits, so that there is something for everybody"
    assert all(turns)
    stated = ready(7_400_000)
    assert [stated.choose(4, 400, waits(room - 1, begun=(9000,)), 2048).kept > 0 for _ in range(2 * TURN)].count(False) == 2


def test_the_median_follows_slowly() -> None:
    pace = ready()
    usual = pace._usual
    assert usual == pytest.approx(linear(4, 400, 0), rel=0.01)
    for ns in (60_000_000, 1_000) * 50:
        pace.rested(ns)
    assert pace._usual == pytest.approx(usual, rel=0.001)
    for _ in range(800):
        pace.rested(20_000_000)
    assert 1.3 * usual < pace._usual < 1.7 * usual


@pytest.mark.parametrize(
    ("options", "knee", "target"),
    [
        ({}, 256, 0),
        ({}, 0, None),
        ({"mixed_prefill_tokens": 64}, 256, None),
        ({"mixed_prefill_tokens": 0}, 256, None),
        ({"enable_chunked_prefill": False, "max_model_len": 64}, 256, None),
        ({"itl_target_ms": 0.0}, 256, None),
        ({"itl_target_ms": 12.5}, 0, 12_500_000),
        ({"itl_target_ms": 12.5, "mixed_prefill_tokens": 64}, 256, 12_500_000),
    ],
)
def test_who_has_a_target(options: dict[str, Any], knee: int, target: int | None) -> None:
    device = FakeDevice()
    device.capabilities = msgspec.structs.replace(device.capabilities, mixed_prefill_tokens=knee)
    engine = Engine(build(options), output=lambda _: None, device=device, policy=FirstComeFirstServed())
    assert engine._itl_target_ns(device.capabilities) == target


def test_what_was_chosen_is_told() -> None:
    paced = Load(**PACED).run([(0.0, 100, 400)] * 8 + [(0.05 * n + 0.5, 900, 8) for n in range(60)])
    told = paced.scheduler._board.stats(0).pace
    assert told is not None
    assert told.limit_ns > 0
    assert LEAST <= told.prompt_tokens <= 2048
    assert Load(**FREE).scheduler._board.stats(0).pace is None
