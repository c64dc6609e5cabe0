"""How many drafts a step has: a made-up device whose steps take what a formula says, and drafts that are right as often as one says."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from penstock.core.actors.scheduler.widths import BURST, CLEARLY_LEAST, GOOD, IDLE, KEEP, LEAST, OFF, REST_SPENT, Watch, Widths
from penstock.core.runtime.clock import FakeClock

Rate = Callable[[int], float]
MS = 1_000_000


class World:
    """`rate(place)`: how often a draft at that place (from 1) is right, those before it being right; `cost(rows, width)`: what a step takes, in ms."""

    def __init__(
        self,
        rate: Rate,
        cost: Callable[[int, int], float],
        most: int = 8,
        budget: int = 1 << 20,
        cold: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        """`cold(step)`: so many times as long as usual it takes."""
        self.rate, self.cost, self.cold = rate, cost, cold
        self.clock = FakeClock()
        self.widths = Widths(range(1, most + 1), budget, self.clock)
        self.random = random.Random(7)
        self.before = -1
        self.rest, self.rested, self.asked = 0, 0, 0
        self.used: list[int] = []
        self.tokens, self.spent = 0, 0.0
        self.warm: list[float] = []
        """What each step would have taken after a while."""
        self.made: list[int] = []

    def run(self, steps: int, rows: int) -> float:
        """Tokens a ms of these steps."""
        tokens, spent = self.tokens, self.spent
        for _ in range(steps):
            looked = not self.rest
            if looked:
                if self.rested:
                    self.widths.rested(self.rested)
                self.asked += 1
                width = self.widths.choose(rows)
                self.rest, self.rested = self.widths.rest, 0
            else:
                width = 0
                self.rest, self.rested = self.rest - 1, self.rested + 1
            verified = min(width, max(self.before, 0))
            right = [self._right(verified) for _ in range(rows)]
            warm = self.cost(rows, width) * self.random.uniform(0.97, 1.03)
            took = warm * self.cold(len(self.used))
            self.used.append(width)
            self.clock.advance(took / 1000)
            if width:
                self.widths.verified(width, [sum(r >= j for r in right) for j in range(width + 1)])
            if looked:
                self.widths.timed(rows, width, round(took * MS), steady=width == self.before)
            self.before = width
            self.tokens += rows + sum(right)
            self.spent += took
            self.warm.append(warm)
            self.made.append(rows + sum(right))
        return (self.tokens - tokens) / (self.spent - spent)

    def excess(self, rows: int) -> float:
        """By how many steps without drafts these tokens took longer than without drafts."""
        return sum(self.warm) / self.cost(rows, 0) - sum(self.made) / rows

    def of_late(self, steps: int, rows: int) -> float:
        return sum(self.made[-steps:]) / sum(self.warm[-steps:])

    def _right(self, verified: int) -> int:
        return next((place for place in range(verified) if self.random.random() >= self.rate(place + 1)), verified)

    def usual(self) -> int:
        """The width of most of the last steps."""
        return Counter(self.used[-200:]).most_common(1)[0][0]

    def fixed(self, width: int, rows: int) -> float:
        """What the same would bring at best, always so wide."""
        chance, tokens = 1.0, 1.0
        for place in range(1, width + 1):
            chance *= self.rate(place)
            tokens += chance
        return rows * tokens / self.cost(rows, width)


def memory_bound(rows: int, width: int) -> float:
    """Weights are read once, whatever the number of tokens."""
    return 10.0 + 0.02 * rows * (1 + width) + 0.3 * width


def compute_bound(rows: int, width: int) -> float:
    return 2.0 + 0.5 * rows * (1 + width)


RATES: dict[str, Rate] = {
    "good": lambda place: 0.85,
    "falling": lambda place: 0.9 - 0.12 * place,
    "half": lambda place: 0.5,
    "poor": lambda place: 0.15,
    "none": lambda place: 0.0,
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
@pytest.mark.parametrize("rows", [1, 6, 64])
def test_it_finds_the_best_and_is_never_slower_than_none(rate: str, cost: Callable[[int, int], float], rows: int) -> None:
    world = World(RATES[rate], cost)
    first = world.run(400, rows)
    later = world.run(1500, rows)
    best = max(world.fixed(width, rows) for width in range(9))
    assert later > 0.95 * best
    assert first > 0.9 * world.fixed(0, rows)
    assert later > 0.98 * world.fixed(0, rows)


COLD: dict[str, Callable[[int], float]] = {
    "never": lambda step: 1.0,
    "at first": lambda step: 1.8 if step < 40 else 1.0,
    "for long": lambda step: max(1.0, 1.6 - step / 500),
    "at times": lambda step: 1.5 if step // 150 % 2 else 1.0,
}


def small(rows: int, width: int) -> float:
    """A small model on a CPU: a draft takes a good part of a step, and steps with drafts wait for the host besides."""
    return rows * (0.38 + 0.2 * width) + (0.25 if width else 0.0)


def beside(rows: int, width: int) -> float:
    """Drafts take next to nothing but a wait."""
    return 1.0 + 0.06 * bool(width) + 0.001 * rows * width


@pytest.mark.parametrize("cold", COLD)
@pytest.mark.parametrize("rate", ["none", "poor", "half"])
@pytest.mark.parametrize("cost", [small, compute_bound])
@pytest.mark.parametrize("rows", [1, 4])
def test_drafts_that_do_not_pay_cost_next_to_nothing_from_the_first_step_on(
    cold: str, rate: str, cost: Callable[[int, int], float], rows: int
) -> None:
    """Also when an engine's first steps take longer than later ones, so that what is learned first misleads. A step counts as so many times what one without
    drafts takes then."""
    world = World(RATES[rate], cost, cold=COLD[cold])
    for steps in (500, 1500, 4000):
        world.run(steps, rows)
        assert world.excess(rows) < 0.02 * len(world.used)


@pytest.mark.parametrize("cold", COLD)
@pytest.mark.parametrize("rate", ["good", "falling", "half"])
@pytest.mark.parametrize("cost", [memory_bound, beside])
def test_drafts_that_pay_are_found_after_cold_steps(cold: str, rate: str, cost: Callable[[int, int], float]) -> None:
    world = World(RATES[rate], cost, cold=COLD[cold])
    world.run(500, 2)
    world.run(3000, 2)
    best = max(world.fixed(width, 2) for width in range(9))
    assert world.of_late(3000, 2) > 0.95 * best


def test_what_drafts_cost_is_bounded_even_when_what_is_known_misleads() -> None:
    """Drafts are right while nobody would try them for less, and wrong from then on; again and again."""
    world = World(lambda place: 0.9 if len(world.used) % 400 < 60 else 0.0, small)
    world.run(6000, 1)
    assert world.excess(1) < 0.02 * len(world.used)


def test_the_time_without_drafts_is_measured_again_and_again_but_rarely_where_drafts_gain_much() -> None:
    for cost, most in ((memory_bound, 0.025), (small, 1.0)):
        world = World(RATES["good"], cost)
        world.run(1000, 2)
        world.run(4000, 2)
        without = [step for step, width in enumerate(world.used) if width == 0 and step >= 1000]
        assert 10 < len(without) <= most * 4000


def test_where_drafts_bring_nothing_they_are_tried_ever_more_rarely() -> None:
    world = World(RATES["none"], memory_bound)
    world.run(3000, 4)
    tried = [step for step, width in enumerate(world.used) if width]
    assert tried, "it has to find out"
    starts = [step for step in tried if not world.used[step - 1]]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps[-1] > 2 * gaps[0]
    assert len([step for step in tried if step >= 1000]) < 0.02 * 2000


def test_it_notices_that_drafts_became_good_and_bad_again() -> None:
    rate = 0.01
    world = World(lambda place: rate, memory_bound)
    world.run(1000, 2)
    assert world.usual() == 0
    rate = 0.9
    world.run(6000, 2)
    assert world.usual() >= 4
    rate = 0.01
    world.run(1500, 2)
    assert world.usual() <= 1


def looked_at(world: World, steps: int, rows: int = 1) -> int:
    """Of so many steps, those whose width was asked for."""
    before = world.asked
    world.run(steps, rows)
    return world.asked - before


def test_what_was_learned_of_other_texts_is_forgotten_soon() -> None:
    """Drafts that were right for long and are no longer cost little, though seldom right; chance alone forgets nothing."""
    world = World(RATES["good"], compute_bound)
    for _ in range(40):
        world.widths.verified(4, [20, 18, 16, 14, 12])
    assert world.widths.tokens(4) > 3.9
    for _ in range(30):
        world.widths.verified(4, [1, 0, 0, 0, 0])
    assert world.widths.tokens(4) < 2, "by half-lives alone it would be above 3.6"
    half = World(RATES["half"], memory_bound)
    half.run(3000, 1)
    assert sum(half.widths._reached[1:]) > 100


def test_while_no_drafts_are_best_steps_are_looked_at_ever_more_rarely() -> None:
    world = World(RATES["none"], small)
    world.run(4000, 1)
    assert world.usual() == 0
    assert looked_at(world, 4000) < 4000 / 40


def test_who_has_spent_all_is_not_asked_before_there_is_something_to_spend() -> None:
    clock = FakeClock()
    widths = Widths([4], 1 << 20, clock)
    widths.choose(1)
    for ns in (MS, MS, MS, MS, MS):
        widths.timed(1, 0, ns)
    while widths.choose(1) or not widths.rest:
        widths.timed(1, 4, 4 * MS)
        widths.verified(4, [1, 0, 0, 0, 0])
    assert widths.rest == REST_SPENT
    asked = 0
    while not widths.choose(1) and widths.rest:
        widths.rested(widths.rest)
        asked += 1
    assert 2 <= asked <= 8


def test_other_numbers_of_rows_have_times_of_their_own() -> None:
    world = World(RATES["half"], lambda rows, width: 10.0 if rows < 32 else compute_bound(rows, width))
    world.run(600, 4)
    assert world.usual() >= 3
    world.run(600, 64)
    assert world.usual() == 0
    world.run(40, 4)
    assert world.used[-1] >= 3, "what was learned is still known"


def test_steps_with_prompts_are_of_another_kind() -> None:
    """Beside prompts a draft takes time of its own, alone it takes next to none."""
    world = World(RATES["half"], memory_bound)
    world.run(400, 8)
    alone = world.usual()
    assert alone >= 2
    used = []
    before = -1
    for _ in range(400):
        world.widths.mixed = True
        used.append(world.widths.choose(8))
        if used[-1] == before:
            world.widths.timed(8, before, round(compute_bound(8, before) * MS), mixed=True)
        before = used[-1]
        world.clock.advance(0.01)
    assert Counter(used[-200:]).most_common(1)[0][0] == 0
    world.widths.mixed = False
    world.run(10, 8)
    assert Counter(world.used[-9:]).most_common(1)[0][0] >= 2, "what was learned of steps without is still known"


def test_a_step_has_room_for_its_drafts() -> None:
    widths = Widths([1, 2, 4], 20, FakeClock())
    assert [widths.most(rows) for rows in (1, 4, 5, 6, 7, 10, 11, 20)] == [4, 4, 2, 2, 1, 1, 0, 0]
    world = World(RATES["good"], memory_bound, budget=20)
    world.run(300, 4)
    assert max(world.used) <= 4


def test_only_widths_that_are_prepared_are_chosen() -> None:
    world = World(RATES["good"], memory_bound)
    world.widths = Widths([2, 5], 1 << 20, world.clock)
    world.run(500, 3)
    assert set(world.used) <= {0, 2, 5}
    assert world.usual() == 5


def test_a_hiccup_is_not_taken_for_what_a_width_costs() -> None:
    world = World(RATES["good"], memory_bound)
    world.run(500, 2)
    used = world.usual()
    assert used > 2
    world.widths.timed(2, used, 2000 * MS)
    world.run(300, 2)
    assert world.usual() > 2


def test_hiccups_among_the_first_steps_of_a_width_do_not_condemn_it() -> None:
    world = World(RATES["good"], memory_bound, cold=lambda step: 30.0 if step < 40 and step % 4 == 0 else 1.0)
    world.run(500, 2)
    world.run(2000, 2)
    assert world.of_late(2000, 2) > 0.95 * max(world.fixed(width, 2) for width in range(9))


def test_a_trial_is_short() -> None:
    world = World(RATES["none"], memory_bound)
    world.run(3000, 4)
    runs = "".join("." if width == 0 else "x" for width in world.used[100:]).split(".")
    assert max(map(len, runs)) <= BURST + 1


# ------------------------------------------------------------------ drafters


def test_a_drafter_that_is_mostly_wrong_is_turned_off_with_the_reason() -> None:
    clock = FakeClock()
    watch = Watch("ngram", clock)
    assert watch.state == IDLE
    assert not watch.saw(0, 0)
    assert watch.state == IDLE, "of no draft nothing is known"
    assert not watch.saw(LEAST - 1, 50), "too few to say"
    assert watch.state == KEEP
    assert watch.saw(50, 0)
    assert watch.state == OFF
    assert "16% of the last" in watch.reason
    assert "next try is in 2 s" in watch.reason
    assert not watch.saw(100, 100), "drafts that were under way"
    assert not watch.due()
    clock.advance(2.1)
    assert watch.due()
    assert watch.state == IDLE
    assert not watch.saw(1, 1)
    assert watch.state == KEEP
    assert watch.saw(LEAST // 4, 10), "on trial it is judged sooner"
    clock.advance(2.1)
    assert not watch.due(), "the second time it waits longer"
    clock.advance(2.1)
    assert watch.due()
    assert not watch.saw(LEAST // 4, LEAST // 4)
    assert watch.state == GOOD


def test_one_that_is_hardly_ever_right_is_turned_off_sooner() -> None:
    watch = Watch("ngram", FakeClock())
    assert not watch.saw(CLEARLY_LEAST - 1, 0)
    assert watch.saw(2, 0)
    assert "0% of the last 65" in watch.reason
    other = Watch("ngram", FakeClock())
    assert not other.saw(CLEARLY_LEAST, 12)
    assert not other.saw(CLEARLY_LEAST, 12), "19 %: bad, but not clearly"


@pytest.mark.parametrize(
    ("right", "said"),
    [(3000, "30% of"), (3960, "39.6% of"), (3996, "39.96% of"), (39999, "39.999% of"), (399999999, "just under 40% of")],
)
def test_the_share_that_is_said_is_below_the_limit(right: int, said: str) -> None:
    watch = Watch("ngram", FakeClock())
    assert watch.saw(10 ** (4 if right < 10000 else 5 if right < 100000 else 9), right)
    assert watch.reason.startswith(said)
    assert "less than 40%;" in watch.reason


@pytest.mark.parametrize(("rate", "state"), [(0.75, GOOD), (0.69, KEEP), (0.41, KEEP), (0.39, OFF)])
def test_bands(rate: float, state: int) -> None:
    watch = Watch("m", FakeClock())
    for _ in range(20):
        watch.saw(1000, round(1000 * rate))
    assert watch.state == state
    assert watch.rate == pytest.approx(rate, abs=0.001)
