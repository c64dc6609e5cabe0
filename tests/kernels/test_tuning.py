"""The search for tiles, with made-up times: who wins, who may not, and what a limit, an interrupt and a dead device leave behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from penstock.kernels import tables
from penstock.kernels.tuning import search
from penstock.kernels.tuning.run import Job, tune
from penstock.kernels.tuning.search import Lost, Outcome, Tiles
from penstock.kernels.tuning.section import SHAPES, Card, Section, Shape
from penstock.kernels.tuning.sections import SECTIONS, chosen
from penstock.kernels.tuning.stand import job_of

Wave = Iterator[float]


def tile(number: int) -> Tiles:
    return {"rmsnorm": {"num_warps": number}}


USED = tile(0)


class Fake:
    """A stand whose candidate n takes `speeds[n]` a load: a number, numbers a load, or what a function of (load, times it ran) says. A measurement takes a second."""

    def __init__(self, speeds: dict[int, Any], *, loads: Sequence[str] = ("few", "many"), wrong: dict[int, str] | None = None) -> None:
        self.loads, self.speeds, self.wrong = list(loads), speeds, wrong or {}
        self.now = 0.0
        self.ran: list[int] = []
        self.prepared: list[int] = []
        self.other_bits: set[str] = set()
        self.closed = False
        self.on_check: Callable[[int], None] = lambda number: None
        self._times: dict[tuple[int, int], int] = {}

    def clock(self) -> float:
        return self.now

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        self.prepared += [one["rmsnorm"]["num_warps"] for one in candidates]

    def check(self, candidate: Tiles) -> str | None:
        number = candidate["rmsnorm"]["num_warps"]
        assert number in self.prepared
        self.on_check(number)
        return self.wrong.get(number)

    def time(self, candidate: Tiles, load: int) -> float:
        number = candidate["rmsnorm"]["num_warps"]
        assert number not in self.wrong, "what is wrong is never timed"
        self.now += 1
        self.ran.append(number)
        ran = self._times[number, load] = self._times.get((number, load), -1) + 1
        speed = self.speeds[number]
        return float(speed(load, ran) if callable(speed) else speed[load] if isinstance(speed, tuple) else speed)

    def close(self) -> None:
        self.closed = True


def found(stand: Fake, until: float = 1e9, candidates: Sequence[int] | None = None) -> Outcome:
    numbers = candidates if candidates is not None else [number for number in stand.speeds if number]
    return search.search(stand, USED, [tile(number) for number in numbers], clock=stand.clock, until=until)


def test_the_fastest_wins_and_says_by_how_much() -> None:
    outcome = found(Fake({0: 1.0, 1: 0.9, 2: 0.8, 3: 1.2}))
    assert outcome.tiles == tile(2)
    assert outcome.before == {"few": 1.0, "many": 1.0}
    assert outcome.after == {"few": 0.8, "many": 0.8}
    assert (outcome.tried, outcome.wrong, outcome.whole) == (3, [], True)


@pytest.mark.parametrize(("speed", "wins"), [(0.975, True), (0.985, False), (1.0, False)])
def test_a_small_gain_is_none(speed: float, wins: bool) -> None:
    outcome = found(Fake({0: 1.0, 1: speed}))
    assert (outcome.tiles == tile(1)) is wins
    assert outcome.after == ({"few": speed, "many": speed} if wins else outcome.before)


def test_a_wrong_tile_is_never_kept_however_fast() -> None:
    stand = Fake({0: 1.0, 1: 0.1, 2: 0.9}, wrong={1: "its largest error is 7 times what rounding explains"})
    outcome = found(stand)
    assert outcome.tiles == tile(2)
    assert outcome.wrong == [(tile(1), "its largest error is 7 times what rounding explains")]
    assert 1 not in stand.ran


def test_one_lucky_moment_is_no_gain() -> None:
    """Fast when it is looked at alone, and in two rounds; else like what is in use."""
    outcome = found(Fake({0: 1.0, 1: lambda load, ran: 0.5 if ran < 3 else 1.0}))
    assert outcome.tiles is None


def test_a_card_that_slows_down_slows_all() -> None:
    stand = Fake({})
    slower = lambda base: lambda load, ran: base * (1 + stand.now / 500)  # noqa: E731
    stand.speeds = {0: slower(1.0), 1: slower(0.95), 2: slower(1.0)}
    outcome = found(stand)
    assert outcome.tiles == tile(1)
    rounds = stand.ran[6:]  # behind the looks at each alone
    assert [rounds[at] for at in range(0, len(rounds), 6)][:4] == [0, 1, 2, 0], "nobody is always first"


def test_no_load_pays_for_the_others() -> None:
    assert found(Fake({0: (1.0, 1.0), 1: (0.5, 1.06)})).tiles is None
    assert found(Fake({0: (1.0, 1.0), 1: (0.5, 1.04)})).tiles == tile(1)


def test_tiles_in_use_that_do_not_run_are_replaced_by_the_best_that_does() -> None:
    outcome = found(Fake({0: 0.1, 1: 3.0, 2: 2.0}, wrong={0: "OutOfResources"}))
    assert outcome.tiles == tile(2)
    assert outcome.before == {}
    assert outcome.wrong == [(USED, "OutOfResources")]
    nothing = found(Fake({0: 0.1, 1: 3.0}, wrong={0: "OutOfResources", 1: "OutOfResources"}))
    assert nothing.tiles is None
    assert nothing.before == {}


def test_the_same_tile_is_not_its_own_rival() -> None:
    stand = Fake({0: 1.0})
    outcome = found(stand, candidates=[0])
    assert (outcome.tiles, outcome.tried, outcome.whole) == (None, 0, True)


def test_out_of_time_what_was_not_compared_enough_stays_out() -> None:
    speeds = {0: 1.0, **dict.fromkeys(range(1, 30), 0.5)}
    early = found(Fake(speeds), until=10)
    assert (early.tiles, early.whole) == (None, False)
    assert early.tried < 29
    late = found(Fake(speeds), until=4 * 2 + 29 * 2 + 5 * 8)
    assert late.tiles is not None
    assert not late.whole


def test_compiling_goes_by_chunks() -> None:
    stand = Fake({0: 1.0, **dict.fromkeys(range(1, 40), 2.0)})
    found(stand, until=12)
    assert len(stand.prepared) == 1 + search.CHUNK


def jobs(*names: str) -> list[Job]:
    return [Job(name, "", USED, [tile(1)], ["few", "many"]) for name in names]


class Runs:
    """A tuning of jobs over fakes; times are the fakes' own together."""

    def __init__(self, make: Callable[[Job], Fake]) -> None:
        self.kept: list[tuple[str, bool, bool]] = []
        self.told: list[str] = []
        self.stands: list[Fake] = []
        self._make = make

    def clock(self) -> float:
        return sum(stand.now for stand in self.stands)

    def stand_of(self, job: Job) -> Fake:
        self.stands.append(self._make(job))
        return self.stands[-1]

    def run(self, wanted: Sequence[Job], limit_s: float = 1e6) -> Any:
        return tune(
            wanted, self.stand_of, clock=self.clock, limit_s=limit_s, cores=4, tell=lambda done, job, tried, what: self.told.append(f"{job.name} {what}"),
            keep=lambda job, outcome, other: self.kept.append((job.name, outcome.tiles is not None, other)),
        )  # fmt: skip


def test_each_section_is_kept_as_soon_as_it_is_known() -> None:
    def make(job: Job) -> Fake:
        stand = Fake({0: 1.0, 1: 0.5 if job.name != "b" else 2.0})
        stand.other_bits = {search.key_of(tile(1))} if job.name == "c" else set()
        return stand

    runs = Runs(make)
    assert runs.run(jobs("a", "b", "c")) == ([], None)
    assert runs.kept == [("a", True, False), ("b", False, False), ("c", True, True)]
    assert all(stand.closed for stand in runs.stands)
    assert runs.told[0] == "a making room"


def test_an_interrupt_leaves_what_is_known() -> None:
    def make(job: Job) -> Fake:
        stand = Fake({0: 1.0, 1: 0.5})

        def interrupt(number: int) -> None:
            if job.name == "b" and number == 1:
                raise KeyboardInterrupt

        stand.on_check = interrupt
        return stand

    runs = Runs(make)
    with pytest.raises(KeyboardInterrupt):
        runs.run(jobs("a", "b", "c"))
    assert runs.kept == [("a", True, False)]
    assert all(stand.closed for stand in runs.stands)


def test_a_device_that_gives_up_ends_it() -> None:
    def make(job: Job) -> Fake:
        stand = Fake({0: 1.0, 1: 0.5})

        def give_up(number: int) -> None:
            if job.name == "b" and number == 1:
                raise Lost("tile 1: illegal memory access")

        stand.on_check = give_up
        return stand

    runs = Runs(make)
    assert runs.run(jobs("a", "b", "c")) == (["b", "c"], "tile 1: illegal memory access")
    assert runs.kept == [("a", True, False)]


@pytest.mark.parametrize("late", [False, True])
def test_what_does_not_fit_into_the_memory_is_left_out(late: bool) -> None:
    def full(load: int, ran: int) -> float:
        raise MemoryError

    def make(job: Job) -> Fake:
        if job.name == "a" and not late:
            raise MemoryError
        return Fake({0: 1.0, 1: full if job.name == "a" else 0.5})

    runs = Runs(make)
    ended = runs.run(jobs("a", "b"))
    assert ended.skipped == ["a (its loads do not fit into the memory)"]
    assert runs.kept == [("b", True, False)]
    assert all(stand.closed for stand in runs.stands)


def test_a_limit_is_shared_out() -> None:
    """A section that takes longer than its share leaves the others theirs."""
    runs = Runs(lambda job: Fake({0: 1.0, **dict.fromkeys(range(1, 200), 0.5)}))
    wanted = [Job(name, "", USED, [tile(number) for number in range(1, 200)], ["few", "many"]) for name in "abcd"]
    ended = runs.run(wanted, limit_s=400)
    assert [name for name, _, _ in runs.kept] == ["a", "b", "c", "d"]
    assert ended == ([], None)
    assert runs.clock() < 400 + 4 * 10
    assert Runs(lambda job: Fake({0: 1.0})).run(jobs("a", "b"), limit_s=0) == (["a", "b"], None)


CARDS = [Card(), Card(24, False, False), Card(132, True, False)]


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.name)
def test_candidates_are_tiles_that_a_table_may_hold(section: Section) -> None:
    for card in CARDS:
        job = job_of(section, list(SHAPES.values()), card)
        assert len(job.candidates) >= 3
        for candidate in job.candidates:
            assert set(candidate) == {section.name}
            assert tables.wrong_tile(section.name, candidate[section.name]) is None
        assert job.seconds(16) < job.seconds(2) or not job.loads


def test_sections_have_loads_for_shapes_that_use_them() -> None:
    wide = Shape("wide heads", 2048, 8192, 8, 4, 256, 1000, normed=True)
    for shape, without in (
        (SHAPES["8b"], {"attention.split.wide", "attention.ragged.wide", "rope.normed"}),
        (wide, {"attention.split", "attention.ragged", "attention.ragged.dense", "attention.ragged.fixed", "rope"}),
    ):
        empty = {name for name, section in SECTIONS.items() if not section.loads(shape)}
        assert without <= empty
    assert not job_of(SECTIONS["w8a8.few"], [SHAPES["8b"]], Card(24, False, False)).loads
    assert set(tables.shipped()["default"]) >= set(SECTIONS)


def test_words_choose_sections() -> None:
    usual = [section.name for section in chosen([], narrow_too=False)]
    assert "linear.skinny" in usual
    assert not any(name.startswith(("w8a8", "fragments", "attention.coded")) for name in usual)
    assert (
        [section.name for section in chosen([], narrow_too=True)]
        == list(SECTIONS)
        == [section.name for section in chosen(["all"], narrow_too=False)]
    )
    assert [section.name for section in chosen(["linear.skinny", "rmsnorm"], narrow_too=False)] == [
        "linear.skinny",
        "linear.skinny.wide",
        "rmsnorm",
    ]
    assert list(itertools.islice((section.name for section in chosen(["w8a8"], narrow_too=False)), 2)) == ["w8a8.few", "w8a8.few.wide"]
    with pytest.raises(KeyError, match=r"linear\.fat"):
        chosen(["linear.fat"], narrow_too=False)
