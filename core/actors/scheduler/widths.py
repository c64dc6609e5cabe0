"""How many drafts a step has: as many as bring the most tokens a second.

What it is: `Widths`, which learns how often the draft at each place is right and how long a step of so many rows and drafts takes, and chooses the number for the
next step, none included; and `Watch`, which turns a drafter off whose drafts are too often wrong, and tries it again after a while. Both are pure: numbers
in, numbers out, time from a Clock.
Trying what is not chosen is rare and cheap: a few steps, only of a width that might win, less often the longer nothing changes. No drafts at all are what
every width is compared with, so their time is never left to grow old. And what drafts may cost is bounded whatever was learned: a purse has an allowance of
the time that passes and what drafts gained, every step with drafts that takes longer than its tokens would have taken without is paid out of it, and once it
is empty there are none.
What it does not know: sequences, messages, which drafter made a draft, what drafts are. It is long because what is learned, what is expected of it and what is chosen are the same few
numbers, each of which says why it is what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.runtime.clock import Clock

FIRST_GUESS = 0.6
"""How often a draft is right, before anything is known."""
FIRST_WEIGHT = 8.0
"""As if so many had been seen. What was seen long ago, without drafts since, counts for no more either."""
LATELY, CHANGED = 12.0, 0.4
"""Rows after which half of what was right lately is forgotten; if the first drafts of these are right by so much more or less often than was learned, other texts have come, and what was learned counts for
as little as what was seen long ago."""
NEXT_WEIGHT = 4.0
"""A place of which little is known is as the one before: as if so many had been seen."""
MEMORY = 192.0
"""Rows after which half of what was seen before is forgotten: some seconds of one sequence."""
SLOPE = 0.05
"""By how much of itself a step is thought to grow a draft, where it was not measured: little, so that it is tried."""
BETTER = 1.03
"""A wider step must promise so much more than the one in use."""
ENTER, STAY = 1.05, 1.02
"""Some drafts must promise so much more than none, where there are none and where there are some: none are as ever, and cost nothing to be sure of."""
STALE = 0.85
"""What was measured long ago may take so much less by now."""
BURST = 5
"""Steps of a trial."""
FIRST_INTERVAL, LAST_INTERVAL = 64, 4096
"""Steps between trials: twice as many after each that changed nothing."""
FIRST_PAUSE_NS, LAST_PAUSE_NS = 2 * 10**9, 120 * 10**9
"""The same in time, for drafters that are off."""
FIRST_RETRY_NS = 5 * 10**8
"""The same while no drafts are best, up to LAST_PAUSE_NS: nothing is learned then without a trial, and what was measured first was perhaps not typical."""
BLIND = 16
"""Steps of a size in which the time without drafts is to be learned first, at most."""
HOLD = 7
"""Steps that a width stays once it has been the best for a while: what is expected changes slowly, and comparing costs as much as planning a step."""
MIXED = 100
"""Added to a size."""
ENOUGH = 3
"""Times after which one counts."""
NEVER = [0.0] * 4
"""What is known of the time of a width that was never used."""
REMEMBERED = 12.0
"""What is measured in a row counts as a mean of so many steps."""
OLD = 48
"""Steps after which a time is measured anew: what it was before counts as one."""
NONE_BURST = 6
"""Steps of a trial of no drafts."""
NONE_AGE = 12
"""Steps with drafts after which none are tried first; then after twice as many each time, up to what follows from how much drafts gain."""
NONE_AGES = (1.15, 64), (1.5, 256), (float("inf"), 1024)
ALLOWANCE = 0.005
"""Of the time, what drafts that do not pay may cost."""
REST, SETTLED = 24, 28
"""Steps that are not looked at once no drafts have been the best for SETTLED of those that were, or while the purse is empty: a drafter that does not draft costs
nothing then but a step now and again that is measured."""
REST_SETTLED, REST_SPENT = 96, 256
"""And so many at most: the longer nothing changed, and until the purse is full again."""
PURSE, MOST_PURSE = 4.0, 64.0
"""What they may cost at first, and the most that is kept of what they gained: in steps without drafts. Who has spent all has to wait for PURSE."""

GOOD, KEEP, OFF, IDLE = 2, 1, 0, -1
"""States of a drafter, as metrics have them. IDLE: of its drafts none was verified yet, or none since it is on trial, so that nothing can be said."""
GOOD_ABOVE, OFF_BELOW = 0.7, 0.4
JUDGED = 512.0
"""The same for a drafter's drafts."""
LEAST = 256
"""Drafts after which a drafter is judged; on trial a quarter."""
CLEARLY_BELOW, CLEARLY_LEAST = 0.15, 64
"""One that is hardly ever right is judged sooner."""


class Widths:
    """`widths` are what steps may have (0 besides), `budget` the most tokens of a step."""

    def __init__(self, widths: Sequence[int], budget: int, clock: Clock) -> None:
        self._ladder = sorted({0, *widths})
        self._budget = budget
        self._clock = clock
        most = self._ladder[-1]
        self._most = most
        self._reached: list[float] = []
        """Of each place (from 1): rows whose drafts before it were right."""
        self._right: list[float] = []
        """Of these, those whose draft there was, too."""
        self._times: dict[int, dict[int, list[float]]] = {}
        """Rows (a power of two, see _size) -> width -> [ns, how many were measured, as how many they count, step of the last]."""
        self._asked: dict[int, int] = {}
        self.mixed = False
        """Whether the next step has prompts beside its decodes, which take time whatever the width: such steps are a kind of their own."""
        self._current = 0
        self._hold, self._held, self._unchanged = 0, (0, 0), 0
        """So many steps more it stays, for steps of that size."""
        self._trial, self._trial_left = 0, 0
        self._settled = False
        """No drafts were the best for a while, once."""
        self._interval, self._since = FIRST_INTERVAL, 0
        self._pause_ns, self._retry_ns = FIRST_RETRY_NS, 0
        self._steps = 0
        self._none_tried, self._none_age = 0, NONE_AGE
        """Step of the last trial of no drafts, and how many steps later the next one is due at the latest."""
        self._oldest = True
        """Whether the last trial from no drafts was of what was measured longest ago: else of what promised most. They take turns."""
        self._purse, self._spent = PURSE, False
        self.able = True
        """Whether drafts can be made for those in the next step: of sequences that a drafter had to see from their beginning it may know nothing (attendance.py)."""
        self.behind = 0
        """Steps that are planned before the first one of a trial has landed: no drafts stand for them yet."""
        self._made = 1.0
        """Tokens of a row in the step that was verified last."""
        self._lately = 0.0, 0.0
        """Of the last rows: how many there were, and how many of their first drafts were right."""
        self.rest = 0
        """Behind a choice of none: so many steps more have none, which nobody needs to ask for or to time. Afterwards `rested` says how many there were."""
        self.forget()

    # ------------------------------------------------------------------ what is learned

    def timed(self, rows: int, width: int, ns: int, mixed: bool = False, steady: bool = True, whole: bool = False) -> None:
        """From the end of the step before to the end of this one it took so long, drafting and waiting for the host included. `mixed`: prompts were computed
        beside. `steady`: the one before was like it; else it is paid for, but says nothing of its width. `whole`: it took so long for the
        drafts' sake (a drafter had to read what it had missed), and all of it is paid for; else what takes much too long is a hiccup."""
        made, self._made = self._made, 1.0
        times = self._times.setdefault(_size(rows, mixed), {})
        known, none = times.get(width), times.get(0)
        usual = known if known is not None and known[1] >= ENOUGH else none
        taken = float(ns) if usual is None or usual[1] < ENOUGH else min(float(ns), 3 * usual[0])
        if not mixed and none is not None and none[1] >= ENOUGH:
            self._pay(width, (ns if whole else taken) / none[0], made)
        if not steady:
            return
        if known is None:
            times[width] = NEVER.copy()  # the first of its kind may have compiled something
            return
        if known[1] < ENOUGH:  # of few the lowest: there is nothing to tell a hiccup by
            taken = float(ns) if known[1] == 0 else min(float(ns), known[0])
            known[0], known[2] = taken, 0.0
        if self._steps - known[3] > OLD:
            known[2] = min(known[2], 1.0)
        known[2] = min(known[2] + 1, REMEMBERED)
        known[0] += (taken - known[0]) / known[2]
        known[1] += 1
        known[3] = self._steps

    def rested(self, steps: int) -> None:
        """So many steps without drafts passed that were not timed."""
        self._steps += steps
        self._pay(0, float(steps), float(steps))

    def _pay(self, width: int, took: float, made: float) -> None:
        """`took` is in steps without drafts, which bring one token each."""
        loss, limit = (took - made, MOST_PURSE) if width else (0.0, max(PURSE, self._purse))
        self._purse = min(self._purse + ALLOWANCE * took - loss, limit)
        if self._spent:
            self._spent = self._purse < PURSE
        elif self._purse <= 0:
            self._spent = self._settled = True
            self._trial_left = self._hold = 0

    def verified(self, width: int, accepted: Sequence[int], made: float | None = None) -> None:
        """Of `accepted[0]` rows of a step of that width, `accepted[j]` had their first j drafts right. Rows without drafts count: that there are none is a part
        of how often they are right. `made`: tokens of a row, where these were not all rows of the step."""
        fade = 0.5 ** (accepted[0] / MEMORY)
        self._made = sum(accepted) / max(accepted[0], 1) if made is None else made
        for place in range(1, width + 1):
            self._reached[place] = self._reached[place] * fade + accepted[place - 1]
            self._right[place] = self._right[place] * fade + accepted[place]
        if accepted[0]:
            fade = 0.5 ** (accepted[0] / LATELY)
            self._lately = self._lately[0] * fade + accepted[0], self._lately[1] * fade + accepted[1]
            rate = self._lately[1] / self._lately[0]
            if self._lately[0] >= LATELY and abs(rate - self._right[1] / self._reached[1]) > CHANGED:
                self._fade()

    def forget(self) -> None:
        """Other drafters from now on: what was learned of their drafts no longer holds."""
        self._reached = [FIRST_WEIGHT if place == 1 else 0.0 for place in range(self._most + 1)]
        self._right = [FIRST_GUESS * reached for reached in self._reached]
        self._lately = 0.0, 0.0
        self._retry_ns = 0

    # ------------------------------------------------------------------ what is expected

    def tokens(self, width: int) -> float:
        """A row's, in a step of that width."""
        rate, chance, total = 0.0, 1.0, 1.0
        for place in range(1, width + 1):
            weight = NEXT_WEIGHT if place > 1 else 0.0
            rate = (self._right[place] + weight * rate) / (self._reached[place] + weight)
            chance *= rate
            total += chance
        return total

    def time(self, rows: int, width: int) -> float:
        """Of a step, in ns; only comparable with others of the same rows where none of them was measured."""
        size = _size(rows, self.mixed)
        known = self._known(size)
        if not known and self._times:
            known = next((found for other in sorted(self._times, key=lambda s: abs(s - size)) if (found := self._known(other))), {})
        if not known:
            return 1.0 + SLOPE * width
        if width in known:
            return known[width]
        below = max((k for k in known if k < width), default=None)
        above = min((k for k in known if k > width), default=None)
        if below is None:
            assert above is not None
            return known[above] / (1 + SLOPE * (above - width))
        if above is None:
            return known[below] * (1 + SLOPE * (width - below))
        return known[below] + (known[above] - known[below]) * (width - below) / (above - below)

    def _known(self, size: int) -> dict[int, float]:
        return {width: ns for width, (ns, count, _, _) in self._times.get(size, {}).items() if count >= ENOUGH}

    def speed(self, rows: int, width: int) -> float:
        return self.tokens(width) / self.time(rows, width)

    # ------------------------------------------------------------------ the choice

    @property
    def idle(self) -> bool:
        """No drafts are best, and have been for a while; or there is nothing to spend."""
        return self._spent or (self._current == 0 and self._unchanged >= SETTLED)

    @property
    def none(self) -> bool:
        """No drafts are best now, and once were for a while: sooner than `idle`, for those to whom it is no loss to be told late of the contrary."""
        return self._spent or (self._current == 0 and self._settled)

    @property
    def pays(self) -> bool:
        """Some drafts are best."""
        return self._current > 0

    @property
    def due(self) -> bool:
        """It is time to try some again."""
        return not self._spent and self._current == 0 and not self._trial_left and self._clock.now_ns() >= self._retry_ns

    def most(self, rows: int) -> int:
        """The widest that a step of so many rows has room for."""
        return next(width for width in reversed(self._ladder) if rows * (1 + width) <= self._budget or width == 0)

    def choose(self, rows: int) -> int:
        """The width of the next step, of so many rows."""
        self.rest = 0
        most = self.most(rows)
        if most == 0:
            return 0
        self._steps += 1
        if self._spent:
            self._current, self.rest = 0, min(REST_SPENT, max(REST, int((PURSE - self._purse) / ALLOWANCE)))
            return 0
        if not self.able:
            self._trial_left = self._hold = 0
            self._unchanged += 0 if self._current else 1
            self.rest = 0 if self._current else min(REST_SETTLED, REST * max(1, self._unchanged // SETTLED))
            return 0
        if self._trial_left:
            self._trial_left -= 1
            self._hold = 0
            return min(self._trial, most)
        size = _size(rows, self.mixed)
        if self._hold and self._held == (size, most):
            self._hold -= 1
            self._since += 1
            return min(self._current, most)
        known = self._known(size)
        if self._asked.get(size, 0) < BLIND and 0 not in known:
            self._asked[size] = self._asked.get(size, 0) + 1
            return 0
        able = self._able(most, known)
        current = min(self._current, able[-1])
        speeds = {width: self.speed(rows, width) for width in able}
        best = self._best(speeds, current)
        if best != current:
            self._interval, self._since, self._unchanged = FIRST_INTERVAL, 0, 0
            if best == 0:
                self._retry_ns = self._clock.now_ns() + self._pause_ns
            elif current == 0:
                self._none_tried, self._none_age = self._steps, NONE_AGE
            current = best
        self._current = current
        self._since += 1
        if current:
            if self._none_due(size, speeds[current] / speeds[0]):
                self._none_tried, self._none_age = self._steps, 2 * self._none_age
                measured = self._times.get(size, {}).get(0)
                if measured is not None:  # or an engine's cold first steps were remembered for hundreds
                    measured[2] = min(measured[2], 1.0)
                return self._start(0, NONE_BURST)
            if self._since >= self._interval:
                self._pause_ns = FIRST_RETRY_NS
                return self._try(size, speeds, current)
        elif self._clock.now_ns() >= self._retry_ns:
            self._retry_ns = self._clock.now_ns() + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LAST_PAUSE_NS)
            self._fade()
            self._oldest = not self._oldest
            return self._start(self._longest_ago(size, able[1:]) if self._oldest else max(able[1:], key=lambda width: speeds[width]))
        self._unchanged += 1
        if current == 0 and self._unchanged >= SETTLED:
            self._settled = True
            self.rest = self._resting(known.get(0, 0.0))
        else:
            self._hold, self._held = min(HOLD, self._unchanged // HOLD), (size, most)
        return current

    def _resting(self, none_ns: float) -> int:
        """Steps that nobody looks at: longer the longer nothing changed, but about till the next trial."""
        left = (self._retry_ns - self._clock.now_ns()) / none_ns if none_ns else 0.0
        return max(REST, min(REST * (self._unchanged // SETTLED), REST_SETTLED, int(left)))

    def _able(self, most: int, known: dict[int, float]) -> list[int]:
        """What may be chosen: of what was not measured, no more than the next or twice as many as what was, so that the first tries are cheap."""
        widest = max(known, default=0)
        following = next((width for width in self._ladder if width > widest), widest)
        return [width for width in self._ladder if width <= min(most, max(2 * widest, following))]

    def _best(self, speeds: dict[int, float], current: int) -> int:
        """Of these, with what is in use and none at all preferred."""
        best = max(speeds, key=lambda width: speeds[width])
        if best > current and speeds[best] <= BETTER * speeds[current]:
            best = current
        return best if best == 0 or speeds[best] > (STAY if current else ENTER) * speeds[0] else 0

    def _none_due(self, size: int, gain: float) -> bool:
        """Whether it is time to see what steps take without drafts."""
        measured = self._times.get(size, {}).get(0)
        age = self._steps - max(self._none_tried, 0 if measured is None else int(measured[3]))
        return age >= min(self._none_age, next(steps for below, steps in NONE_AGES if gain < below))

    def _fade(self) -> None:
        """Let what is seen next count."""
        for place, reached in enumerate(self._reached):
            if reached > FIRST_WEIGHT:
                self._right[place] *= FIRST_WEIGHT / reached
                self._reached[place] = FIRST_WEIGHT

    def _try(self, size: int, speeds: dict[int, float], current: int) -> int:
        """One of the widths that might be better than the one in use; if there is none, one that nobody has looked at for long."""
        self._since, self._interval = 0, min(2 * self._interval, LAST_INTERVAL)
        others = [width for width in speeds if width not in (0, current)]
        able = [width for width in others if speeds[width] > STALE * speeds[current]] or others
        return self._start(self._longest_ago(size, able)) if able else current

    def _longest_ago(self, size: int, widths: list[int]) -> int:
        """That of them which was measured longest ago."""
        measured = self._times.get(size, {})
        return min(widths, key=lambda width: measured.get(width, NEVER)[3])

    def _start(self, width: int, steps: int = BURST) -> int:
        self._trial, self._trial_left = width, steps - 1 + (self.behind if width else 0)
        return width


def _size(rows: int, mixed: bool) -> int:
    """Steps of these numbers of rows are alike; those with prompts are another kind."""
    return max(rows - 1, 0).bit_length() + (MIXED if mixed else 0)


class Watch:
    """One drafter: is it worth asking?"""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.state = IDLE
        self.reason = ""
        """Why it is off, or was."""
        self._clock = clock
        self._seen = self._right = 0.0
        self._least = LEAST
        self._pause_ns, self._retry_ns = FIRST_PAUSE_NS, 0

    @property
    def rate(self) -> float:
        """Of the drafts whose predecessors were right, how many were."""
        return self._right / self._seen if self._seen else 0.0

    def saw(self, verified: int, right: int) -> bool:
        """So many drafts were verified, those before them being right, and so many of them were right. True if it is off from now on."""
        fade = 0.5 ** (verified / JUDGED)
        self._seen, self._right = self._seen * fade + verified, self._right * fade + right
        if self.state == IDLE and verified:
            self.state = KEEP
        if self.state == OFF or (self._seen < self._least and not (self._seen >= CLEARLY_LEAST and self.rate < CLEARLY_BELOW)):
            return False
        self._least = LEAST
        if self.rate < OFF_BELOW:
            self.state = OFF
            self.reason = (
                f"{_below(self.rate, OFF_BELOW)} of the last {round(self._seen)} drafts were right, less than {OFF_BELOW:.0%};"
                f" the next try is in {self._pause_ns / 1e9:.0f} s"
            )
            self._retry_ns = self._clock.now_ns() + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LAST_PAUSE_NS)
            return True
        self.state = GOOD if self.rate > GOOD_ABOVE else KEEP
        self._pause_ns = FIRST_PAUSE_NS
        return False

    def fail(self, why: str) -> None:
        """It is off for good."""
        self.state, self.reason, self._retry_ns = OFF, why, 1 << 62

    def due(self) -> bool:
        """It was off for long enough: it is on again, on trial."""
        if self.state != OFF or self._clock.now_ns() < self._retry_ns:
            return False
        self.state = IDLE
        self._seen = self._right = 0.0
        self._least = LEAST // 4
        return True


def _below(rate: float, limit: float) -> str:
    """A rate below a limit in as few digits as show that it is."""
    return next((text for digits in range(4) if float((text := f"{rate:.{digits}%}")[:-1]) < 100 * limit), f"just under {limit:.0%}")
