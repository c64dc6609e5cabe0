"""Sections of the tuning on real kernels: every candidate of a tiny shape is right or said to be wrong, and what is wrong in a known way is found out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from penstock.kernels import gpu
from penstock.kernels.tuning import attending, narrow, rowwise, stand, wide
from penstock.kernels.tuning.run import Job, tune
from penstock.kernels.tuning.search import Outcome, Tiles, key_of
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape
from penstock.kernels.tuning.sections import SECTIONS

TINY = Shape("tiny", 128, 64, 2, 1, 32, 256)
Loads = dict[str, Callable[[Room], Load]]
LOADS: dict[str, Callable[[], Loads]] = {
    "linear.skinny": lambda: wide._skinny(TINY, False, (3,)),
    "linear.invariant.small": lambda: wide._invariant(TINY, (3,)),
    "linear.invariant": lambda: wide._invariant(TINY, (66,)),
    "attention.split": lambda: attending._decode(TINY, ((2, 100),)),
    "attention.ragged.dense": lambda: attending._prefill(TINY, ((2, 20, 0),), dense=True),
    "attention.ragged": lambda: attending._prefill(TINY, ((1, 10, 70),)),
    "attention.ragged.fixed": lambda: (
        attending._decode(TINY, ((2, 100),), deterministic=True) | attending._prefill(TINY, ((1, 10, 70),), deterministic=True)
    ),
    "attention.split.fixed": lambda: attending._decode(TINY, ((2, 100),), deterministic=True, pinned=True),
    "attention.coded": lambda: attending._decode(TINY, ((2, 100),), attending.KIND),
    "rmsnorm": lambda: rowwise._each(TINY, rowwise._norms(TINY)["tiny, rows 16"].func, (5,)),  # type: ignore[attr-defined]
    "rope": lambda: {"tiny": rowwise._turns(TINY, False)["tiny, rows 16"]},
    "rope.normed": lambda: {"tiny": rowwise._turns(TINY._replace(normed=True), True)["tiny, rows 16"]},
    "gated": lambda: {"tiny": rowwise._gates(TINY)["tiny, rows 16"]},
    "argmax": lambda: {"tiny": rowwise._largest(TINY)["tiny, rows 1"]},
    "fragments.4.16": lambda: narrow._quantised(TINY, 4, (3,)),
    "fragments.8.32": lambda: narrow._quantised(TINY, 8, (17,)),
    "w8a8.low": lambda: narrow._eight(TINY, "w8a8.low", (17,), ("fp8", "int8")),
    "w8a8.blocks": lambda: narrow._eight(TINY, "w8a8.blocks", (17,), ("fp8",), blocks=True),
}
EVERY = ("gated", "rmsnorm", "argmax")
"""All candidates of these run under the interpreter, the first of the others (on a GPU all of all)."""


def small(name: str, card: Card) -> tuple[Section, Job]:
    section = SECTIONS[name]._replace(loads=lambda shape: LOADS[name]())
    return section, stand.job_of(section, [TINY], card)


@pytest.mark.parametrize("name", LOADS)
def test_candidates_are_checked(name: str, device: str) -> None:
    """A tile that does not fit this device is an error in words; all others are right."""
    section, job = small(name, stand.card_of(torch.device(device)))
    one = stand.DeviceStand(section, [TINY], Room(torch.device(device)), job.present)
    some = job.candidates if device == "cuda" or name in EVERY else job.candidates[:1]
    one.prepare([job.present, *some])
    assert one.check(job.present) is None
    for candidate in some:
        assert (one.check(candidate) or "OutOfResources").startswith(("OutOfResources", "tiny")), candidate
    one.close()


def standing(device: str, *checks: Check) -> stand.DeviceStand:
    section = SECTIONS["rmsnorm"]._replace(
        loads=lambda shape: {"load": lambda room: Load([check.call for check in checks], len(checks), checks)}
    )
    return stand.DeviceStand(section, [TINY], Room(torch.device(device)), {"rmsnorm": {"num_warps": 4}})


def test_what_is_wrong_is_found_out(device: str) -> None:
    truth = torch.randn(64, 64, device=device)
    out = torch.empty_like(truth)
    runs = [0]

    def asked() -> int:
        runs[0] += 1
        return gpu.tuned("rmsnorm")["num_warps"]

    def wrong_in_one() -> torch.Tensor:
        asked()
        out.copy_(truth)
        out[3, 5] += 1
        return out

    def not_all_written() -> torch.Tensor:
        out[1:].copy_(truth[1:])
        return out

    def first_time_only() -> torch.Tensor:
        return out.copy_(truth + (runs[0] == asked() * 0))

    def raises() -> torch.Tensor:
        raise ValueError("the workspace\nis too small")

    def right() -> torch.Tensor:
        return out.copy_(truth.bfloat16())

    said = {
        "its largest error is": Check(wrong_in_one, lambda: truth),
        "its results are not finite, or not all written": Check(not_all_written, lambda: truth),
        "two runs differ": Check(first_time_only, lambda: truth),
        "ValueError: the workspace is too small": Check(raises, lambda: truth),
        "its bits depend on the batch": Check(right, lambda: truth, exact=True),
    }
    for text, check in said.items():
        out.copy_(truth)
        runs[0] = 0
        one = standing(device, check)
        if text.startswith("its results"):
            one.check({"rmsnorm": {"num_warps": 4}})  # what is not written was right once
        assert text in (one.check({"rmsnorm": {"num_warps": 4}}) or "")
    assert standing(device, Check(right, lambda: truth)).check({"rmsnorm": {"num_warps": 4}}) is None


def test_what_only_another_tile_wrote_is_no_result(device: str) -> None:
    """A result that is a copy of some rows: what lies in the memory behind it is poisoned all the same."""
    truth = torch.ones(8, 8, device=device)

    def load(room: Room) -> Load:
        out = room.empty(8, 8, dtype=torch.float32)

        def call() -> torch.Tensor:
            first = 0 if gpu.tuned("rmsnorm")["num_warps"] == 4 else 1
            out[first:].copy_(truth[first:])
            return out[torch.tensor([0, 7])]

        return Load([call], 1, [Check(call, lambda: truth[:2])])

    section = SECTIONS["rmsnorm"]._replace(loads=lambda shape: {"load": load})
    one = stand.DeviceStand(section, [TINY], Room(torch.device(device)), {"rmsnorm": {"num_warps": 4}})
    assert one.check({"rmsnorm": {"num_warps": 4}}) is None
    assert "not all written" in (one.check({"rmsnorm": {"num_warps": 8}}) or "")


@pytest.mark.parametrize("pinned", [True, False])
def test_other_bits_are_seen_and_where_rows_are_shared_refused(device: str, pinned: bool) -> None:
    truth = torch.ones(8, 8, device=device)

    def call() -> torch.Tensor:
        return truth + gpu.tuned("rmsnorm")["num_warps"] * 2.0**-20

    one = standing(device, Check(call, lambda: truth, pinned=pinned))
    used: Tiles = {"rmsnorm": {"num_warps": 4}}
    other: Tiles = {"rmsnorm": {"num_warps": 8}}
    assert one.check(used) is None
    assert one.check(used) is None
    assert one.other_bits == set()
    assert ("its bits are not those" in (one.check(other) or "")) is pinned
    assert one.other_bits == {key_of(other)}


def test_deterministic_tiles_must_agree_with_those_of_other_row_counts(device: str) -> None:
    """Another depth of K's steps: under the interpreter those are other bits, and such a tile is refused."""
    if device == "cuda":
        pytest.skip("a matrix unit adds in one order whatever the depth")
    section, job = small("linear.invariant.small", Card())
    one = stand.DeviceStand(section, [TINY], Room(torch.device(device)), job.present)
    assert one.check(job.present) is None
    deeper: Tiles = {"linear.invariant.small": {**job.present["linear.invariant.small"], "BLOCK_K": 128}}
    assert "its bits are not those of the other tiles" in (one.check(deeper) or "")


def test_a_stand_takes_the_winners_of_other_tables(device: str) -> None:
    seen: list[Any] = []

    def call() -> torch.Tensor:
        seen.append((gpu.tuned("gated"), gpu.tuned("rmsnorm")))
        return torch.ones(4, device=device)

    section = SECTIONS["rmsnorm"]._replace(
        loads=lambda shape: {"load": lambda room: Load([call], 1, [Check(call, lambda: torch.ones(4, device=device))])}
    )
    used: Tiles = {"rmsnorm": {"num_warps": 4}}
    one = stand.DeviceStand(section, [TINY], Room(torch.device(device)), used, {"gated": {"BLOCK": 64}, "rmsnorm": {"num_warps": 1}})
    assert one.check({"rmsnorm": {"num_warps": 2}}) is None
    assert seen[-1] == ({"BLOCK": 64}, {"num_warps": 2})
    assert gpu.tuned("gated") != {"BLOCK": 64}


def test_a_time_is_that_of_the_distinct_calls_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up clock: a replay takes a millisecond a call, the first thrice as long; four calls are two, twice."""
    now = [0.0]
    captured: list[int] = []
    replays: list[int] = []
    recording = [False]

    class Graph:
        def __init__(self) -> None:
            self.calls = 0

        def capture_begin(self, pool: object) -> None:
            recording[0], self.calls = True, -len(captured)

        def capture_end(self) -> None:
            recording[0], self.calls = False, self.calls + len(captured)

        def replay(self) -> None:
            replays.append(self.calls)
            now[0] += self.calls * (3.0 if len(replays) == 1 else 1.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            """Nothing to wait for."""

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    made: dict[str, Any] = {"CUDAGraph": Graph, "Event": Event, "Stream": object, "stream": contextlib.nullcontext}
    for name, value in {**made, "graph_pool_handle": lambda: None, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def call() -> torch.Tensor:
        if recording[0]:
            captured.append(gpu.tuned("rmsnorm")["num_warps"])
        return torch.ones(1)

    section = SECTIONS["rmsnorm"]._replace(loads=lambda shape: {"load": lambda room: Load([call] * 4, 2, [])})
    one = stand.DeviceStand(section, [TINY], Room(torch.device("cpu")), {"rmsnorm": {"num_warps": 4}})
    assert one.time({"rmsnorm": {"num_warps": 8}}, 0) == pytest.approx(0.002)
    assert captured == [8, 8, 8, 8], "the candidate's tile is in what is replayed"
    assert replays == [4] * (1 + 3), "one to warm up, three of four milliseconds"
    one.time({"rmsnorm": {"num_warps": 8}}, 0)
    assert len(captured) == 4, "captured once"
    one.time({"rmsnorm": {"num_warps": 2}}, 0)
    assert captured[4:] == [2, 2, 2, 2]


@pytest.mark.gpu
def test_a_whole_tuning_on_a_card() -> None:
    device = torch.device("cuda")
    shape = Shape("small", 1024, 2048, 16, 4, 64, 4096)
    sections = {name: SECTIONS[name] for name in ("linear.skinny", "gated")}
    kept: dict[str, Outcome] = {}
    ended = tune(
        [stand.job_of(section, [shape], stand.card_of(device)) for section in sections.values()],
        lambda job: stand.DeviceStand(sections[job.name], [shape], stand.room_of(device), job.present),
        clock=time.monotonic, limit_s=40, cores=8, tell=lambda *_: None, keep=lambda job, outcome, other: kept.update({job.name: outcome}),
    )  # fmt: skip
    assert ended.lost is None
    for outcome in kept.values():
        assert outcome.tried > 0
        assert all(seconds > 0 for seconds in outcome.before.values())
        assert set(outcome.after) == set(outcome.before)
