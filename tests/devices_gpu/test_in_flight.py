"""Two steps in flight: values that only the device knows, rings, events that come late, and a launching thread that never waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.llm import LLM
from penstock.core.processes.local import LocalServer
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import EngineFailure
from penstock.core.protocol.messages import Forward, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.driver import Driver, Job
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.devices.rings import Download, Upload
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.models.api import AttnCall, Columns

Make = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0)
BROOK = Path(__file__).parents[2] / "plugins" / "demo_model" / "brook"


class LateEvent:
    """An event of the test's own: once `late` is set, nothing is over before `release`."""

    late = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waited = 0

    def record(self) -> None:
        if LateEvent.late:
            self.gate.clear()

    def query(self) -> bool:
        return self.gate.is_set()

    def synchronize(self) -> None:
        self.waited += 1
        assert self.gate.wait(20)

    def elapsed_time(self, end: Any) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateEvent, "late", True)


def late_lane() -> tuple[HostLane, list[LateEvent]]:
    made: list[LateEvent] = []

    def make() -> LateEvent:
        made.append(LateEvent())
        return made[-1]

    return HostLane(make), made


def release(events: list[LateEvent]) -> None:
    for event in events:
        event.gate.set()


def start(runner: Any, prompts: list[list[int]], params: list[SamplingParams]) -> None:
    """Step 1: every prompt in a slot of its own, on blocks of its own."""
    slots = i32(range(len(prompts)))
    counts = i32([len(prompt) for prompt in prompts])
    per = 3
    runner.forward(
        Forward(
            engine=1,
            epoch=1,
            step=1,
            slots=slots,
            starts=i32([0] * len(prompts)),
            counts=counts,
            num_decode=0,
            place_slots=slots,
            place_counts=counts,
            place_tokens=i32([token for prompt in prompts for token in prompt]),
            block_slots=np.repeat(slots, per),
            block_index=np.tile(i32(range(per)), len(prompts)),
            block_ids=i32(range(per * len(prompts))),
        )
    )


def sample(runner: Any, step: int, positions: list[int], places: list[SlotSampling] | None = None, **columns: Any) -> Any:
    rows = i32(range(len(positions)))
    return runner.sample(
        Sample(engine=1, epoch=1, step=step, rows=rows, slots=rows, positions=i32(positions), places=places or [], **columns)
    )


def even(rows: list[int], vocab: int) -> dict[str, Any]:
    """Columns of a step in which these of its rows (0: yes, -1: no) may draw even tokens alone."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[:vocab:2] = 1
    return {"mask": np.packbits(bits, bitorder="little").view(np.int32), "mask_rows": i32(rows)}


def decode(runner: Any, step: int, starts: list[int]) -> None:
    rows = i32(range(len(starts)))
    runner.forward(
        Forward(engine=1, epoch=1, step=step, slots=rows, starts=i32(starts), counts=i32([1] * len(starts)), num_decode=len(starts))
    )


def once(function: Any) -> Any:
    """Of what may be called a single time."""
    calls: list[int] = []

    def called(*args: Any) -> Any:
        assert not calls
        calls.append(1)
        return function(*args)

    return called


def test_draws_under_masks_are_captured_once_masks_are_used(folder: Path, host_runner: Make) -> None:
    """In mid-service after a few uses, and by `improve` at once; a mask differs from step to step, and so do the rows that have one."""
    prompts, params = [[1, 2, 3], [4, 5, 6]], [GREEDY, SamplingParams(temperature=1.0, seed=8)]

    def tokens(runner: Any, improve_at: int) -> list[list[int]]:
        start(runner, prompts, params)
        places = [SlotSampling(slot=i, choice=i, prompt_len=3, params=one) for i, one in enumerate(params)]
        drawn = [sample(runner, 1, [3, 3], places)().tokens.tolist()]
        for step in range(2, 14):
            if step == improve_at:
                runner.improve()
            decode(runner, step, [step + 1, step + 1])
            masks = even([0, -1] if step % 2 else [-1, 0], runner.facts.vocab_size) if step != 5 else {}
            drawn.append(sample(runner, step, [step + 2, step + 2], **masks)().tokens.tolist())
        return drawn

    eager = host_runner(folder, enforce_eager=True)
    truth = tokens(eager, 0)
    for improve_at in (0, 4):
        runner = host_runner(folder)
        runner.capture_all(lambda phase: None)
        had, runner.graph_reserve = runner.counters.captures, 1 << 40
        assert tokens(runner, improve_at) == truth
        assert runner.counters.captures == had + 1
    assert eager.counters.captures == 0


@pytest.mark.parametrize(("eager", "masked"), [(False, False), (True, False), (False, True)])
def test_the_next_step_needs_no_host(eager: bool, masked: bool, folder: Path, host_runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are launched two deep, and no result is looked at before all are launched twice over. With masks too, which do what a list of allowed tokens
    does."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    params = [GREEDY, SamplingParams(temperature=1.1, seed=5), SamplingParams(temperature=0.7, top_p=0.8, seed=6)]
    vocab = host_runner(folder).facts.vocab_size
    listed = [
        msgspec.structs.replace(s, allowed_token_ids=list(range(0, vocab, 2)) if masked and i < 2 else None) for i, s in enumerate(params)
    ]
    truth = [Job(prompt=i32(p), params=s, max_tokens=9, choice=i) for i, (p, s) in enumerate(zip(prompts, listed, strict=True))]
    Driver(host_runner(folder)).run(truth)
    columns = even([0, 0, -1], vocab) if masked else {}
    lane, events = late_lane()
    LateEvent.late = False
    runner = host_runner(folder, lane=lane, enforce_eager=eager)
    runner.capture_all(lambda phase: None)
    if masked:
        runner.capture_masked(4, True)
        monkeypatch.setattr(runner.sampler, "sample", once(runner.sampler.sample))  # the first draw follows the prompts, and is eager
    LateEvent.late = True
    launching = threading.get_ident()
    start(runner, prompts, params)
    places = [SlotSampling(slot=i, choice=i, prompt_len=len(p), params=s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    waiting = [sample(runner, 1, [len(p) for p in prompts], places, **columns)]
    found: list[Any] = []
    for step in range(2, 10):
        starts = [len(p) + step - 2 for p in prompts]
        decode(runner, step, starts)
        waiting.append(sample(runner, step, [at + 1 for at in starts], **columns))
        assert sum(event.waited for event in events) == step - 2  # by the lines below, and nobody else
        waits_before = lane.waits
        # The oldest of two steps comes back; the other is still under way.
        release(events)
        found.append(waiting.pop(0)())
        assert lane.waits == waits_before == 0
        assert threading.get_ident() == launching
    release(events)
    found += [wait() for wait in waiting]
    assert [done.step for done in found] == list(range(1, 10))
    assert [[int(done.tokens[row]) for done in found] for row in range(3)] == [job.tokens for job in truth]
    assert (runner.counters.replays > 0) is not eager


def test_results_wait_for_their_event(folder: Path, host_runner: Make) -> None:
    lane, events = late_lane()
    runner = host_runner(folder, lane=lane)
    start(runner, [[1, 2, 3]], [GREEDY])
    wait = sample(runner, 1, [3], [SlotSampling(slot=0, choice=0, prompt_len=3, params=GREEDY)])
    done: list[Any] = []
    waiter = threading.Thread(target=lambda: done.append(wait()))
    waiter.start()
    while not any(event.waited for event in events):
        time.sleep(0.001)
    assert not done
    release(events)
    waiter.join(20)
    assert done[0].step == 1


def test_a_ring_entry_is_not_written_before_the_device_has_read_it() -> None:
    lane, events = late_lane()
    ring = Upload(lane, 2, 8)
    ring.send(i32([1, 2]))
    ring.send(i32([3]))
    assert [event.waited for event in events] == [0, 0]
    threading.Timer(0.05, lambda: release(events)).start()
    sent = ring.send(i32([5, 6, 7]), i32([8]))
    assert (lane.waits, events[0].waited) == (1, 1)
    assert [part.tolist() for part in sent] == [[5, 6, 7], [8]]
    assert all(part.data_ptr() % 16 == ring.staging.data_ptr() % 16 for part in sent)


def test_uploads_grow_unless_a_graph_reads_them() -> None:
    ring = Upload(HostLane(), 3, 4)
    assert ring.send(i32(range(40)))[0].tolist() == list(range(40))
    fixed = Upload(HostLane(), 3, 8, fixed=True)
    fixed.send_rows(4, -1, i32([7, 8]), i32([1, 2]))
    assert fixed.staging[:6].tolist() == [7, 8, -1, -1, 1, 2]
    with pytest.raises(ValueError, match="fixed upload"):
        fixed.send_rows(5, -1, i32([1]), i32([2]))


def test_results_outlive_their_entry() -> None:
    ring = Download(HostLane(), 2, 4)
    kept = []
    for value in range(5):
        landing = ring.take()
        landing.bring(torch.tensor([value, -1], dtype=torch.int32))
        index = landing.also(torch.tensor([value + 0.5]))
        landing.close().synchronize()
        kept.append((landing.tokens(), landing.more(index, np.float32)))
    assert [(tokens.tolist(), float(more[0])) for tokens, more in kept] == [([v, -1], v + 0.5) for v in range(5)]


class Quiet(TorchDispatchMode):
    """Refuses operations that make a host wait for its device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.FORBIDDEN or masks:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def loud() -> Iterator[None]:
    """Inside an operation of the table: the reference may look at values, a real table does not."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


class Shielded:
    """The reference, hidden from `Quiet`."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not callable(found) or name.startswith("_"):
            return found

        def shielded(*args: Any, **kwargs: Any) -> Any:
            with loud():
                return found(*args, **kwargs)

        return shielded


class ShieldedOps(Shielded, TorchOps): ...


class ShieldedAttention(Shielded, TorchAttention): ...


def test_no_launch_looks_at_a_value(folder: Path, host_runner: Make) -> None:
    """What surrounds the table of operations is asynchronous: every kind of row, eager, by graph, with lists, penalties and log-probabilities."""
    runner = host_runner(folder, ops=ShieldedOps(), attention=ShieldedAttention)
    runner.capture_all(lambda phase: None)
    plain = [GREEDY, SamplingParams(temperature=1.0, seed=1)]
    odd = SamplingParams(
        temperature=0.8,
        seed=2,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        logit_bias={3: 2.0},
        allowed_token_ids=list(range(60)),
        bad_words_token_ids=[[5], [1, 2, 3]],
        min_tokens=3,
        logprobs=3,
        prompt_logprobs=2,
    )
    for params in (plain, [*plain, odd]):
        prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]][: len(params)]
        places = [SlotSampling(slot=i, choice=0, prompt_len=len(prompts[i]), params=p, stop_ids=i32([7])) for i, p in enumerate(params)]
        with Quiet():
            start(runner, prompts, params)
            rows = i32(range(len(params)))
            asks = i32([2]) if len(params) == 3 else i32([])
            waits = [
                runner.sample(
                    Sample(
                        engine=1, epoch=1, step=1, rows=rows, slots=rows, positions=i32([len(p) for p in prompts]), places=places,
                        prompt_rows=asks, prompt_topk=asks,
                    )
                )
            ]  # fmt: skip
            for step in (2, 3, 4):
                starts = [len(p) + step - 2 for p in prompts]
                decode(runner, step, starts)
                masks = even([0, -1, 0][: len(params)], runner.facts.vocab_size) if step == 3 else {}
                waits.append(sample(runner, step, [at + 1 for at in starts], **masks))
        assert all(len(wait().tokens) == len(params) for wait in waits[-3:])


class NoteAttention(TorchAttention):
    """Writes down which places a step writes to, and which slots it reads."""

    seen: ClassVar[list[Columns]] = []

    def attend(self, q: Any, qkv: Any, cache: Any, columns: Columns, call: AttnCall) -> Any:
        self.seen.append(columns)
        return super().attend(q, qkv, cache, columns, call)


def test_padding_rows_write_nowhere(folder: Path, host_runner: Make) -> None:
    runner = host_runner(folder, attention=NoteAttention)
    runner.history.fill_(90)
    runner._pool.fill_(7)
    runner.capture_all(lambda phase: None)
    assert (runner.history == 90).all()
    assert (runner._pool == 7).all()
    start(runner, [[1, 2, 3], [4, 5], [6]], [GREEDY] * 3)
    sample(runner, 1, [3, 2, 1], [SlotSampling(slot=i, choice=0, prompt_len=3 - i, params=GREEDY) for i in range(3)])()
    NoteAttention.seen.clear()
    decode(runner, 2, [3, 2, 1])
    sample(runner, 2, [4, 3, 2])()
    columns = NoteAttention.seen[0]
    assert columns.slots.tolist() == [0, 1, 2, -1]  # a bucket of 4
    assert columns.places.tolist() == [3, 3 * 16 + 2, 6 * 16 + 1, -1]
    assert columns.kv_len.tolist() == [4, 3, 2, 0]
    assert (runner.history[3:] == 90).all()
    assert (runner._pool[9:] == 7).all()


def test_steps_on_blocks_of_others_are_refused(folder: Path, host_runner: Make) -> None:
    runner = host_runner(folder)
    start(runner, [[1, 2, 3]], [GREEDY])
    sample(runner, 1, [3], [SlotSampling(slot=0, choice=0, prompt_len=3, params=GREEDY)])()
    with pytest.raises(EngineFailure, match="blocks were never given"):
        decode(runner, 2, [48])
    with pytest.raises(EngineFailure, match="without its Forward"):
        sample(runner, 2, [4])


def test_graphs_are_captured_later_when_asked_for_often(folder: Path, host_runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.plugins.devices import runner as runner_module

    monkeypatch.setattr(runner_module, "LAZY_USES", 3)
    runner = host_runner(folder)
    runner.graph_reserve = 1
    runner.capture_all(lambda phase: None, limit_s=-1.0)
    assert runner.counters.captures == 0
    job = Job(prompt=i32([1, 2, 3]), params=GREEDY, max_tokens=8)
    truth = Job(prompt=i32([1, 2, 3]), params=GREEDY, max_tokens=8)
    Driver(runner).run([job])
    Driver(host_runner(folder, enforce_eager=True)).run([truth])
    assert job.tokens == truth.tokens
    assert (runner.counters.captures, runner.counters.replays) == (1, 5)


def test_a_runner_with_nothing_to_do_captures_what_was_asked_for_then_the_rest(
    folder: Path, host_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.plugins.devices import runner as runner_module

    monkeypatch.setattr(runner_module, "LAZY_USES", 100)
    monkeypatch.setattr(runner_module, "MIXED_ROWS", (2, 4))
    monkeypatch.setattr(runner_module, "MIXED_TOKENS", (3, 8, 20))
    runner = host_runner(folder)
    assert not runner.improve(), "no memory is reserved"
    runner.graph_reserve = 100
    runner.capture_all(lambda phase: None, limit_s=-1.0)

    def once() -> list[Job]:
        jobs = [Job(prompt=i32([1 + seed, 2, 3]), params=GREEDY, max_tokens=8) for seed in range(3)]
        Driver(runner).run(jobs)
        return jobs

    before = once()
    assert runner.counters.replays == 0
    used = dict(runner._uses)
    assert runner.improve()
    most = max(used, key=used.__getitem__)
    assert [*runner._forwards, *runner._mixed] == [most]
    for _ in range(len(used) - 1):
        assert runner.improve()
    assert {*runner._forwards, *runner._mixed} == set(used)
    runner._graph_bytes = 75
    assert not runner.improve(), "the last quarter of the reservation is for sizes that somebody asks for"
    runner._uses[2, 20] = 1
    assert runner.improve()
    assert (2, 20) in runner._mixed
    runner._graph_bytes = 0
    while runner.improve():
        pass
    assert set(runner._forwards) == set(runner._buckets)
    assert set(runner._mixed) == {(rows, tokens) for rows in runner._mixed_rows for tokens in runner._mixed_tokens}
    captures = runner.counters.captures
    after = once()
    assert [job.tokens for job in after] == [job.tokens for job in before]
    assert runner.counters.replays > 0
    assert runner.counters.captures == captures


def test_the_engine_keeps_two_steps_in_flight(host_device: Any) -> None:
    """The whole server with this runner at depth 2 against the CPU at its own: many requests, few slots, random lengths."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(16, 400, int(rng.integers(1, 40))).tolist() for _ in range(7)]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=3 + i, ignore_eos=True, n=1 + (i == 3)) for i in range(7)
    ]
    options = {
        "model": str(BROOK),
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
    }
    options |= {"kv_cache_memory_bytes": 8 << 20, "threads": 1}
    with LLM(**options) as llm:
        truth = [[choice.token_ids for choice in out.outputs] for out in llm.generate(prompt_token_ids=prompts, sampling_params=params)]
    device = host_device()
    original = LocalServer.__init__

    def with_device(self: LocalServer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "device": device})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalServer, "__init__", with_device)
        with LLM(config=build(options)) as llm:
            mine = [[choice.token_ids for choice in out.outputs] for out in llm.generate(prompt_token_ids=prompts, sampling_params=params)]
    assert mine == truth
    assert device.runner.counters.replays > 0
