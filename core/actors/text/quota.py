"""One tenant's limits, counted.

What it is: `Bucket`, a token bucket in whole numbers; `Account`, which lets a tenant's requests in or says why not, holds what they may yet use, and settles it once they are
over. Requests and tokens a minute fill up again steadily, as OpenAI's do: the bucket of a limit of 60 holds 60 and gets one a second. A request takes its prompt's
tokens and, for each answer, the max_tokens that its client asked for; at its end it gets back what it did not use, or owes what it used besides.
What it does not know: keys, which tenants there are (tenants.py), stages of a request, HTTP.
"""

from __future__ import annotations

import math
import time
from calendar import timegm
from collections import Counter
from typing import NamedTuple

import msgspec

from penstock.core.actors.text.resolve import MODELS
from penstock.core.protocol.control import EngineFacts, Spent
from penstock.core.protocol.errors import BudgetExceeded, ModelNotFound, RateLimited, RequestsExceeded, TokensExceeded
from penstock.core.protocol.standing import Standing, Window
from penstock.core.protocol.tenants import PICO, Price, Tenant

MINUTE = 60 * 10**9
CONCURRENCY_RETRY_S = 1.0
FREE = Price(input=0, output=0, cached=0)
"""Where nothing says what tokens cost."""


class Bucket:
    """What is in it is kept in units of which a minute's nanoseconds make one, so that what flows in is a whole number, too, and nothing is ever rounded. It may hold less than nothing: a debt."""

    __slots__ = ("_at_ns", "_level", "per_minute")

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * MINUTE
        self._at_ns = now_ns

    def fill(self, now_ns: int) -> None:
        if now_ns > self._at_ns:
            self._level = min(self.per_minute * MINUTE, self._level + (now_ns - self._at_ns) * self.per_minute)
            self._at_ns = now_ns

    def take(self, count: int) -> None:
        self._level -= count * MINUTE

    def give(self, count: int) -> None:
        """Below 0: what is owed."""
        self._level = min(self.per_minute * MINUTE, self._level + count * MINUTE)

    def wait_s(self, count: int) -> float:
        """Until so many can be taken; 0.0: now. Of more than it ever holds: never, so do not ask."""
        return max(0, -(-(count * MINUTE - self._level) // self.per_minute)) / 1e9

    def window(self) -> Window:
        return Window(limit=self.per_minute, remaining=max(0, self._level // MINUTE), reset_s=self.wait_s(self.per_minute))

    def resize(self, per_minute: int) -> None:
        """It is as full as before, or owes as many minutes."""
        self._level = self._level * per_minute // self.per_minute
        self.per_minute = per_minute


class Charge:
    """What one prompt of a request holds of its tenant's limits, from when it comes in to its end."""

    __slots__ = ("account", "counted", "drawn", "group", "price", "pusd", "tokens")

    def __init__(self, account: Account, group: int, price: Price) -> None:
        self.account = account
        self.group = group
        self.price = price
        self.counted = False
        """Did it take of the requests a minute?"""
        self.drawn = 0
        """Taken of the tokens a minute."""
        self.tokens = 0
        """Held of the budget."""
        self.pusd = 0
        """Held of the budget."""


class Moment(NamedTuple):
    now_ns: int
    wall_ns: int


class Account:
    """One tenant with limits. What was used stays with it whatever the tables say later."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = Tenant()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._running: Counter[int] = Counter()
        """Prompts by request."""
        self._period = ""
        self._spent_tokens = self._spent_pusd = 0
        self._held_tokens = self._held_pusd = 0
        self._budgeted = False
        """Has it ever had a budget?"""
        self._facts: tuple[EngineFacts, EngineFacts] | None = None

    def take(self, limits: Tenant, at: Moment, before: Spent | None = None) -> None:
        """These count from now on. `before`: what was spent before anybody counted here."""
        self.limits = limits
        if (limits.budget_tokens or limits.budget_pusd) and not self._budgeted:
            self._budgeted = True
            if before is not None:
                self._period, self._spent_tokens, self._spent_pusd = before.period, before.tokens, before.pusd
        self._facts = None
        self._requests = _bucket(self._requests, limits.requests_per_minute, at.now_ns)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, at.now_ns)

    # --- what does not change by use

    def check_model(self, model: str) -> None:
        """Raises ModelNotFound."""
        if self.limits.models and model not in self.limits.models:
            raise ModelNotFound(f"The model {model[:200]!r} does not exist here. Known: {', '.join(self.limits.models)}.", param="model")

    def facts(self, facts: EngineFacts) -> EngineFacts:
        """What its requests are measured by: the engine's, with a context that is no longer than the tenant's."""
        if not self.limits.context or self.limits.context >= facts.max_model_len:
            return facts
        if self._facts is None or self._facts[0] is not facts:
            self._facts = facts, msgspec.structs.replace(facts, max_model_len=self.limits.context)
        return self._facts[1]

    def priority(self, asked: int) -> int:
        """That of its class; a request may let others go first, and not put itself before them."""
        return self.limits.priority + max(0, asked) if self.limits.klass else asked

    def whose(self, facts: EngineFacts) -> str:
        """The context by which its requests are measured, for errors."""
        return MODELS if self.facts(facts) is facts else f"{self.name}'s"

    # --- the life of a prompt

    def check(self, group: int, *, first: bool, at: Moment) -> None:
        """May it come in, as far as that is known before it is tokens? `first`: it is the only prompt of its request, or the first. Raises RateLimited."""
        self._fill(at)
        try:
            self._check_budget(at)
            self._check_running(group)
            if first:
                self._check_requests()
        except RateLimited as error:
            error.standing = self.standing()
            raise

    def _check_running(self, group: int) -> None:
        limit, running = self.limits.concurrency, len(self._running)
        if limit and group not in self._running and running >= limit:
            what = f"{running} requests of {self.name} are running, and {limit} may at once (concurrency)"
            raise RateLimited(f"{what}. Send this one when another is over.", retry_after_s=CONCURRENCY_RETRY_S)

    def _check_requests(self) -> None:
        if self._requests is not None and (wait := self._requests.wait_s(1)):
            what = f"{self.name} has used its {self._requests.per_minute} requests a minute (requests_per_minute)"
            raise RequestsExceeded(f"{what}. Try again in {_seconds(wait)}.", retry_after_s=wait)

    def enter(self, group: int, price: Price, *, first: bool) -> Charge:
        """It is in; `check` has just let it."""
        charge = Charge(self, group, price)
        self._running[group] += 1
        if self._requests is not None and first:
            self._requests.take(1)
            charge.counted = True
        return charge

    def measure(self, charge: Charge, prompt: int, asked: int, at: Moment) -> None:
        """Its prompt has so many tokens, and its answers may have `asked` (0: nothing was said of that). Raises RateLimited."""
        self._fill(at)
        try:
            self._check_budget(at)
            self._draw(charge, prompt, asked)
        except RateLimited as error:
            self._uncount(charge)
            error.standing = self.standing()
            raise
        charge.tokens = prompt + asked
        charge.pusd = prompt * charge.price.input + asked * charge.price.output
        self._held_tokens += charge.tokens
        self._held_pusd += charge.pusd

    def _draw(self, charge: Charge, prompt: int, asked: int) -> None:
        """Of the tokens a minute. Raises TokensExceeded."""
        bucket = self._tokens
        if bucket is None:
            return
        if prompt > bucket.per_minute:
            raise TokensExceeded(
                f"The prompt has {prompt} tokens, but {self.name} may use {bucket.per_minute} a minute (tokens_per_minute). Send a shorter one.",
                retry_after_s=None,
            )
        need = min(prompt + asked, bucket.per_minute)  # what is asked for need not come: with a full bucket anything may be tried
        if wait := bucket.wait_s(need):
            what = f"{self.name} may use {bucket.per_minute} tokens a minute (tokens_per_minute), of which {bucket.window().remaining} are left"
            raise TokensExceeded(
                f"{what}; this request needs {need}: {prompt} of its prompt and {need - prompt} for its answer. Try again in {_seconds(wait)}.",
                retry_after_s=wait,
            )
        bucket.take(need)
        charge.drawn = need

    def _uncount(self, charge: Charge) -> None:
        """It was no request after all."""
        if charge.counted and self._requests is not None:
            charge.counted = False
            self._requests.give(1)

    def settle(self, charge: Charge, *, refused: bool, prompt: int, cached: int, output: int, at: Moment) -> bool:
        """It is over. `refused`: it never was let in, and costs nothing. True: something was spent of a budget."""
        self._fill(at)
        self._running[charge.group] -= 1
        if not self._running[charge.group]:
            del self._running[charge.group]
        self._held_tokens -= charge.tokens
        self._held_pusd -= charge.pusd
        used = 0 if refused else prompt + output
        if self._tokens is not None and charge.drawn:
            self._tokens.give(charge.drawn - used)
        if refused:
            self._uncount(charge)
            return False
        if not (self.limits.budget_tokens or self.limits.budget_pusd):
            return False
        self._roll(at)
        self._spent_tokens += used
        self._spent_pusd += (prompt - cached) * charge.price.input + cached * charge.price.cached + output * charge.price.output
        return True

    # --- where it stands

    def standing(self) -> Standing | None:
        """None: it has no limit of requests or tokens a minute."""
        if self._requests is None and self._tokens is None:
            return None
        return Standing(
            requests=None if self._requests is None else self._requests.window(),
            tokens=None if self._tokens is None else self._tokens.window(),
        )

    def spent(self) -> Spent:
        return Spent(tenant=self.name, period=self._period, tokens=self._spent_tokens, pusd=self._spent_pusd)

    @property
    def running(self) -> int:
        """Requests."""
        return len(self._running)

    def _fill(self, at: Moment) -> None:
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.fill(at.now_ns)

    def _roll(self, at: Moment) -> None:
        """A new period begins with nothing spent."""
        period = _period(self.limits.budget_period, at.wall_ns)
        if period != self._period:
            self._period, self._spent_tokens, self._spent_pusd = period, 0, 0

    def _check_budget(self, at: Moment) -> None:
        limits = self.limits
        if not (limits.budget_tokens or limits.budget_pusd):
            return
        self._roll(at)
        said = ""
        if limits.budget_tokens and self._spent_tokens + self._held_tokens >= limits.budget_tokens:
            said, own = f"{limits.budget_tokens} tokens (budget_tokens)", self._spent_tokens >= limits.budget_tokens
        elif limits.budget_pusd and self._spent_pusd + self._held_pusd >= limits.budget_pusd:
            said, own = f"{limits.budget_pusd / PICO:g} dollars (budget_usd)", self._spent_pusd >= limits.budget_pusd
        if not said:
            return
        if not own:  # what runs may turn out to need less
            text = f"What is left of {self.name}'s budget of {said} is held by its requests that are running. Try again once one is over."
            raise BudgetExceeded(text, retry_after_s=CONCURRENCY_RETRY_S)
        left = _period_left_s(limits.budget_period, at.wall_ns)
        then = "" if left is None else f" of this {limits.budget_period}"
        raise BudgetExceeded(f"{self.name} has spent its budget{then} of {said}.", retry_after_s=left)


def _bucket(old: Bucket | None, per_minute: int, now_ns: int) -> Bucket | None:
    if not per_minute:
        return None
    if old is None:
        return Bucket(per_minute, now_ns)
    if old.per_minute != per_minute:
        old.fill(now_ns)
        old.resize(per_minute)
    return old


def _seconds(wait: float) -> str:
    return f"{math.ceil(wait)} s"


def _period(kind: str, wall_ns: int) -> str:
    """Its name, in UTC."""
    return "" if kind == "total" else time.strftime("%Y-%m-%d" if kind == "day" else "%Y-%m", time.gmtime(wall_ns // 10**9))


def _period_left_s(kind: str, wall_ns: int) -> float | None:
    """Until the next one begins; None: there is none."""
    if kind == "total":
        return None
    now = time.gmtime(wall_ns // 10**9)
    today = now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec
    if kind == "day":
        return float(86_400 - today)
    year, month = (now.tm_year + 1, 1) if now.tm_mon == 12 else (now.tm_year, now.tm_mon + 1)
    days = (_day(year, month) - _day(now.tm_year, now.tm_mon)) - (now.tm_mday - 1)
    return float(days * 86_400 - today)


def _day(year: int, month: int) -> int:
    return timegm((year, month, 1, 0, 0, 0)) // 86_400
