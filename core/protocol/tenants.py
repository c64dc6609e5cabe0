"""What tenants may use, as `[tenants.NAME]`, `[classes.NAME]` and `[prices."MODEL"]` of --tables say it.

What it is: `Tenant`, `SloClass` and `Price`, each with its fields' check, and `TenantTable`, which root sends to text: limits, prices, and which keys are good
for anything (by marks, which tell nothing of a key). Money is counted in whole picodollars, so that nothing is lost by rounding: a token of a model at 0.15 dollars a million
costs 150,000 of them.
What it does not know: files (tables.py), how limits are counted (core/actors/text/tenants.py), whose key a request has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import msgspec

from penstock.core.protocol.errors import ConfigError

TENANT_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrency",
    "context",
    "models",
    "class",
    "weight",
    "budget_tokens",
    "budget_usd",
    "budget_period",
)
CLASS_FIELDS = ("ttft_ms", "itl_ms", "priority")
PRICE_FIELDS = ("input", "output", "cached")

PICO = 10**12
"""Of a dollar."""
MOST = 10**12
"""Of any count."""
MOST_USD = 10**6
"""Of a budget; a million tokens may cost a tenth of that."""
PRIORITIES = 1 << 16
"""Priorities of classes lie between this and its negative."""

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = ("day", "month", "total")

Wrong = Callable[[str], ConfigError]
"""Makes the error that names the file."""


class SloClass(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What those of a class are to get. Milliseconds; 0: nothing is said."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    priority: int = 0
    """As of requests: lower goes first."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Picodollars a token: of the prompt, of the answer, and of the prompt where the cache had it."""

    input: int
    output: int
    cached: int


class Tenant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tenant may use; 0 (and no model): as much as there is."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0
    context: int = 0
    models: list[str] = []
    klass: str = ""
    priority: int = 0
    """Its class's."""
    weight: float = 1.0
    budget_tokens: int = 0
    budget_pusd: int = 0
    budget_period: Period = "month"


class TenantTable(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a Tenants message. `marks`: whose each key is, of those that are good for inference, by the key's mark."""

    tenants: dict[str, Tenant]
    marks: dict[str, str]
    prices: dict[str, Price] = {}
    classes: dict[str, SloClass] = {}


def mark_of(digest: str) -> str:
    """What stands for a key where its digest need not be known."""
    return hashlib.sha256(f"penstock mark {digest}".encode()).hexdigest()[:32]


# ------------------------------------------------------------------ reading

_COUNTS = ("requests_per_minute", "tokens_per_minute", "concurrency", "context", "budget_tokens")


def read_class(at: str, table: dict[str, Any], wrong: Wrong) -> SloClass:
    """Of `[classes.NAME]`, whose fields are known ones."""
    times = {name: float(_number(at, name, table[name], 3_600_000, wrong)) for name in ("ttft_ms", "itl_ms") if name in table}
    priority = table.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > PRIORITIES:
        raise wrong(
            f"{at}: priority must be a whole number from {-PRIORITIES} to {PRIORITIES}, lower ones going first, but is {_shown(priority)}."
        )
    return SloClass(priority=priority, **times)


def read_price(at: str, table: dict[str, Any], wrong: Wrong) -> Price:
    """Of `[prices."MODEL"]`: dollars a million tokens. `cached` is as `input` without a word."""
    for name in ("input", "output"):
        if name not in table:
            raise wrong(f"{at}: {name} is missing: dollars for a million tokens.")
    costs = {name: _number(at, name, value, MOST_USD // 10, wrong, zero=True) for name, value in table.items()}
    costs.setdefault("cached", costs["input"])
    for name, cost in costs.items():
        if cost * (PICO // 10**6) % 1:
            raise wrong(f"{at}: {name} must have at most six decimal places.")
    return Price(**{name: int(cost * (PICO // 10**6)) for name, cost in costs.items()})


def read_tenant(at: str, table: dict[str, Any], classes: dict[str, SloClass], wrong: Wrong) -> Tenant:
    """Of the limits in `[tenants.NAME]`."""
    out: dict[str, Any] = {}
    for name in _COUNTS:
        if name in table:
            value = table[name]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
                raise wrong(f"{at}: {name} must be a whole number from 1 to {MOST}, but is {_shown(value)}. Without a limit, leave it out.")
            out[name] = value
    if "models" in table:
        models = table["models"]
        if not isinstance(models, list) or not models or not all(isinstance(one, str) and one for one in models):
            raise wrong(f"{at}: models must be a list of at least one served name. For all models, leave it out.")
        out["models"] = models
    if "class" in table:
        name = table["class"]
        if not isinstance(name, str) or name not in classes:
            known = f"There are {', '.join(classes)}." if classes else "There is none."
            raise wrong(f"{at}: class must be the NAME of a table [classes.NAME], but is {_shown(name)}. {known}")
        out["klass"], out["priority"] = name, classes[name].priority
    if "weight" in table:
        out["weight"] = float(_number(at, "weight", table["weight"], 10**6, wrong))
    if "budget_usd" in table:
        dollars = _number(at, "budget_usd", table["budget_usd"], MOST_USD, wrong)
        if dollars * PICO % 1:
            raise wrong(f"{at}: budget_usd must have at most twelve decimal places.")
        out["budget_pusd"] = int(dollars * PICO)
    if "budget_period" in table:
        period = table["budget_period"]
        if period not in PERIODS:
            raise wrong(f"{at}: budget_period must be one of {', '.join(PERIODS)}, but is {_shown(period)}.")
        if "budget_tokens" not in out and "budget_pusd" not in out:
            raise wrong(f"{at}: budget_period says nothing without budget_tokens or budget_usd.")
        out["budget_period"] = period
    return Tenant(**out)


def _number(at: str, name: str, value: Any, most: int, wrong: Wrong, *, zero: bool = False) -> Decimal:
    """Above 0 (or not below it) and at most `most`; without exponents beyond reason."""
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        number = Decimal(value)
        if number.is_finite() and (0 if zero else Decimal("1e-12")) <= number <= most and len(number.as_tuple().digits) <= 28:
            return number
    least = "from 0" if zero else "above 0"
    raise wrong(f"{at}: {name} must be a number {least} and at most {most}, but is {_shown(value)}.")


def _shown(value: object) -> str:
    return re.sub(r"^Decimal\('(.*)'\)$", r"\1", f"{value!r:.100}")
