"""Turns between those whose jobs may take long: no owner keeps another waiting for more than the job that runs, and what is quick waits for its like alone."""

from __future__ import annotations

import pytest

from penstock.core.actors.text.turns import QUICK_S, REMEMBERED, TAU_S, Turns
from penstock.core.runtime.clock import FakeClock

SLOW_S = 5.0


class Line:
    """Turns whose jobs are (owner, name, number) and take as long as a test says."""

    def __init__(self, places: int = 2) -> None:
        self.clock = FakeClock()
        self.turns: Turns[tuple[str, str, int]] = Turns(places, self.clock)
        self.running: list[tuple[str, str, int]] = []
        self._number = 0

    def put(self, owner: str, name: str, count: int = 1) -> None:
        for _ in range(count):
            self._number += 1
            self.turns.put((owner, name, self._number), owner, name)

    def begin(self) -> list[str]:
        """Whatever may begin does; the names of what began."""
        begun = []
        while (job := self.turns.next()) is not None:
            self.running.append(job)
            begun.append(job[1])
        return begun

    def end(self, name: str) -> None:
        [job] = [job for job in self.running if job[1] == name]
        self.running.remove(job)
        self.turns.done(job)

    def known(self, owner: str, *names: str) -> None:
        """Names that were quick."""
        for name in names:
            self.put(owner, name)
            assert self.begin() == [name]
            self.end(name)


def test_a_name_that_was_quick_waits_for_no_strange_one() -> None:
    line = Line()
    line.known("good", "hot")
    for number in range(50):
        line.put("bad", f"slow{number}")
    assert line.begin() == ["slow0"], "the other place is for what is known to be quick"
    for _ in range(10):
        line.put("good", "hot")
        assert line.begin() == ["hot"]
        line.end("hot")
        line.clock.advance(0.1)


def test_nobody_waits_for_more_than_the_job_that_runs() -> None:
    line = Line()
    for number in range(50):
        line.put("bad", f"slow{number}")
    assert line.begin() == ["slow0"]
    line.clock.advance(1)
    line.put("good", "new")
    assert line.begin() == []
    line.clock.advance(SLOW_S - 1)
    line.end("slow0")
    assert line.begin() == ["new"], "before 49 that came earlier"
    line.end("new")
    assert line.begin() == ["slow1"]


def test_owners_have_equal_time_not_equal_turns() -> None:
    line = Line()
    line.put("slow", "s", 100)
    line.put("less", "l", 100)
    time = {"s": 0.0, "l": 0.0}
    for _ in range(60):
        [name] = line.begin()
        seconds = {"s": 4.0, "l": 1.0}[name]
        line.clock.advance(seconds)
        time[name] += seconds
        line.end(name)
    assert abs(time["s"] - time["l"]) <= 8.0


def test_those_who_took_nothing_take_turns() -> None:
    line = Line(places=1)
    line.put("many", "m", 10)
    line.put("few", "f", 2)
    begun = []
    for _ in range(5):
        begun += line.begin()
        line.end(begun[-1])
    assert begun == ["m", "f", "m", "f", "m"]


def test_what_was_long_ago_is_forgotten() -> None:
    line = Line()
    line.put("was slow", "a")
    line.begin()
    line.clock.advance(SLOW_S)
    line.end("a")
    line.clock.advance(20 * TAU_S)
    line.put("was slow", "b")
    line.put("another", "c")
    assert line.begin() == ["b"], "who waited longest, as nobody took anything lately"


def test_a_name_that_is_slow_once_is_strange_again() -> None:
    line = Line()
    line.known("bad", "trap", "other")
    line.put("bad", "trap")
    assert line.begin() == ["trap"]
    line.clock.advance(QUICK_S + 0.1)
    line.end("trap")
    line.put("bad", "trap", 2)
    assert line.begin() == ["trap"]
    line.put("good", "other")
    assert line.begin() == ["other"]


def test_who_was_slow_has_no_place_among_the_quick() -> None:
    """A template can be quick with one conversation and slow with another: an owner holds the others up by it once."""
    line = Line()
    line.known("good", "hot")
    for number in range(3):
        line.known("bad", f"trap{number}")
        line.put("bad", f"trap{number}")
        line.put("bad", "slow")
        begun = line.begin()
        assert begun == (["slow", "trap0"] if number == 0 else [f"trap{number}"])
        line.put("good", "hot")
        assert line.begin() == ([] if number == 0 else ["hot"])
        if number:
            line.end("hot")
        line.clock.advance(SLOW_S)
        for name in begun:
            line.end(name)
        line.begin()
        for _, name, _ in list(line.running):
            line.end(name)
    line.clock.advance(5 * TAU_S)
    line.known("bad", "trap")
    line.put("bad", "slow")
    line.put("bad", "trap")
    assert line.begin() == ["slow", "trap"], "it is forgotten in time"


def test_an_owner_that_is_many_people_is_not_punished_for_one() -> None:
    """All that comes by one proxy without keys, say."""
    line = Line()
    line.known("proxy", "hot")
    for number in range(3):
        line.put("proxy", f"slow{number}")
    assert line.begin() == ["slow0"]
    for number in range(3):
        line.put("proxy", "hot")
        assert line.begin() == ["hot"], "though others of that owner are slow"
        line.end("hot")
        line.clock.advance(SLOW_S)
        line.end(f"slow{number}")
        line.begin()


def test_of_a_mistrusted_owner_what_was_quick_comes_first() -> None:
    line = Line()
    line.known("proxy", "hot", "trap")
    line.put("proxy", "trap")
    line.put("proxy", "slow0")
    assert line.begin() == ["slow0", "trap"]
    line.put("proxy", "slow1")
    line.put("proxy", "hot")
    line.clock.advance(SLOW_S)
    line.end("trap")
    assert line.begin() == []
    line.end("slow0")
    assert line.begin() == ["hot"]
    line.end("hot")
    assert line.begin() == ["slow1"]


def test_strange_names_are_not_kept_waiting_by_quick_ones() -> None:
    line = Line()
    line.known("good", "hot")
    line.put("good", "hot", 100)
    line.put("new", "first")
    assert line.begin() == ["first", "hot"]
    line.end("first")
    assert line.begin() == ["hot"], "without a strange one both places are theirs"


def test_one_place_is_everybodys() -> None:
    line = Line(places=1)
    line.known("good", "hot")
    line.put("bad", "slow", 2)
    line.put("good", "hot")
    begun = []
    for _ in range(3):
        [name] = line.begin()
        line.clock.advance(SLOW_S if name == "slow" else 0.01)
        begun.append(name)
        line.end(name)
    assert begun == ["slow", "hot", "slow"]


@pytest.mark.parametrize("what", ["names", "owners"])
def test_nothing_is_remembered_without_end(what: str) -> None:
    line = Line()
    for number in range(2 * REMEMBERED):
        line.known(f"o{number}" if what == "owners" else "o", f"n{number}")
    assert len(line.turns._quick) == REMEMBERED
    line.clock.advance(20 * TAU_S)
    line.known("o", "n")
    assert len(line.turns._took) <= 1
    assert not line.turns._slow
    assert not line.turns._lines
