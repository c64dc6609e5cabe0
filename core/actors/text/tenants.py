"""Tenants as text knows them.

What it is: which keys are good, and the account of each tenant with limits, as the tables of the latest generation have them. All edges' requests come here, so
that limits are counted in one place, however many edges there are. A request whose edge knows later tables than this waits for them.
What it does not know: how one tenant's use is counted (quota.py), keys themselves, files, who reads the tables.
"""

from __future__ import annotations

import msgspec

from penstock.core.actors.text.quota import FREE, Account, Charge, Moment
from penstock.core.protocol.control import Spending, Tables
from penstock.core.protocol.errors import Unauthorized
from penstock.core.protocol.messages import Submit
from penstock.core.protocol.tenants import Price, SloClass, Tenant, TenantTable
from penstock.core.runtime.clock import Clock

REVOKED = "The API key of this request was revoked. Send it again with one that is valid."
UNLIMITED = Tenant()


class Tenants:
    """Before the first `take` there is nobody. `names`: the served model's."""

    def __init__(self, clock: Clock, names: list[str]) -> None:
        self.generation = 0
        self._clock = clock
        self._names = names
        self._marks: dict[str, str] = {}
        self._limited: dict[str, Account] = {}
        """Those with limits now."""
        self._accounts: dict[str, Account] = {}
        """All that ever had some."""
        self._prices: dict[str, Price] = {}
        self.classes: dict[str, SloClass] = {}
        """By name."""
        self._spending: set[str] = set()
        self._early: list[Submit] = []

    def take(self, message: Tables) -> list[Submit]:
        """Use these tables from now on. Returns the requests that waited for them."""
        if message.generation <= self.generation:
            return []
        before = {row.tenant: row for row in message.spent}
        self.generation = message.generation
        table = msgspec.msgpack.decode(message.body, type=TenantTable)
        self._marks, self._prices, self.classes = table.marks, table.prices, table.classes
        at, limited = self._now(), {}
        for name, limits in table.tenants.items():
            if limits != UNLIMITED:
                account = self._accounts.get(name)
                if account is None:
                    account = self._accounts[name] = Account(name)
                account.take(limits, at, before.get(name))
                limited[name] = account
        self._limited = limited
        early, self._early = self._early, []
        return early

    def waits(self, submit: Submit) -> bool:
        """Is its key of tables that are not here yet? Then it comes back from the `take` that brings them."""
        if submit.tables <= self.generation:
            return False
        self._early.append(submit)
        return True

    def leave(self, *, key: int = 0, edge: int | None = None) -> None:
        """Whoever sent it, or all that this edge sent, does not wait for these tables any more."""
        self._early = [one for one in self._early if one.key != key and one.edge != edge]

    def good(self, mark: str) -> bool:
        """Is that key still one? "" is none of the tables."""
        return not mark or mark in self._marks

    def account(self, submit: Submit) -> Account | None:
        """Whose limits hold for it; None: nobody's. Raises Unauthorized."""
        if not self.good(submit.key_mark):
            raise Unauthorized(REVOKED)
        return self._limited.get(self._marks[submit.key_mark] if submit.key_mark else submit.tenant)

    # --- the life of a prompt

    def check(self, account: Account, submit: Submit) -> None:
        """May it come in? Raises RateLimited."""
        account.check(_group(submit), first=_first(submit), at=self._now())

    def enter(self, account: Account, submit: Submit) -> Charge:
        return account.enter(_group(submit), self._price(submit.model), first=_first(submit))

    def measure(self, charge: Charge, prompt: int, asked: int) -> None:
        """Raises RateLimited."""
        charge.account.measure(charge, prompt, asked, self._now())

    def settle(self, charge: Charge, *, refused: bool, prompt: int = 0, cached: int = 0, output: int = 0) -> None:
        """It is over."""
        account = charge.account
        if account.settle(charge, refused=refused, prompt=prompt, cached=cached, output=output, at=self._now()):
            self._spending.add(account.name)

    def spending(self) -> Spending | None:
        """What root does not know yet of what was spent."""
        if not self._spending:
            return None
        rows = [self._accounts[name].spent() for name in sorted(self._spending)]
        self._spending.clear()
        return Spending(rows=rows)

    def _price(self, model: str) -> Price:
        return next((self._prices[name] for name in (model, *self._names) if name in self._prices), FREE)

    def _now(self) -> Moment:
        return Moment(self._clock.now_ns(), self._clock.wall_ns())


def _group(submit: Submit) -> int:
    return submit.group or submit.key


def _first(submit: Submit) -> bool:
    return submit.group in (0, submit.key)
