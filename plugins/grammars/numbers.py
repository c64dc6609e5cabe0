"""Numbers of a schema as a backend can draw them exactly.

What it is: `bounded` says bounds so that the backend, which keeps them as doubles and works with 64-bit integers, draws nothing outside: a bound that is neither
moves inward by what is nothing beside the range, and is refused where that would leave out much of it. `drawable` finds numbers of const and enum that
have no exact double.
What it does not know: schemas' other keywords.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature

MOST = 2**63 - 1024
"""The largest double that is a signed integer of 64 bits."""
MOST_LEFT_OUT = Fraction(1, 2**20)
"""Of a range."""
FINER = 9
"""Decimal places by which what is left out at an open end is smaller than the range, or than 1."""
MOST_FRACTION = 2**53
"""Where there may be fractions: doubles up to here are what they look like."""
OPEN_FROM = 10**18
"""Without the other bound, the backend's numbers overflow from here on."""
MOST_MULTIPLE = 10**15
"""Of multipleOf, where no bound says more."""
SMALLEST = 1e-20
"""Of const and enum, besides 0: numbers are drawn without exponents."""
LARGEST_STEP = 5000
"""Digits of multipleOf without its point: the backend keeps remainders, for each length of a number, and gives up at 50,000."""
CHEAP_STEPS = (10**4,)
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def _exact(value: int | float) -> Fraction:
    """What is meant by it: of a fraction the digits that it is written with."""
    return Fraction(value) if isinstance(value, int) or value.is_integer() else Fraction(Decimal(repr(value)))


def _double(value: Fraction, *, up: bool) -> float:
    """The nearest double that is not below (`up`), or not above."""
    made = float(value)
    if up and _exact(made) < value:
        return math.nextafter(made, math.inf)
    if not up and _exact(made) > value:
        return math.nextafter(made, -math.inf)
    return made


def _said(value: float) -> int | float:
    return int(value) if value.is_integer() else value


class NoNumber(InvalidRequest):
    """The bounds leave no number."""


class _End:
    """One end of a range, or none of it; `sign` is 1 for the lower one."""

    def __init__(self, schema: dict[str, Any], closed: str, open_: str, sign: int) -> None:
        found = [(_exact(schema[name]), name == open_, name) for name in (closed, open_) if name in schema]
        found = sorted(found, key=lambda one: (sign * one[0], one[1]))
        self.value: Fraction | None = None
        self.open, self.keyword = False, closed
        if found:
            self.value, self.open, self.keyword = found[-1]


def bounded(schema: dict[str, Any], at: str) -> dict[str, int | float]:
    """What `minimum`, `maximum` and their exclusive forms become. Raises UnsupportedFeature naming the keyword and its place, NoNumber for no range."""
    types = schema.get("type")
    if types is not None and not {"integer", "number"} & set([types] if isinstance(types, str) else types):
        return {}  # they are of numbers alone
    if not any(name in schema for name in (*BOUNDS, "multipleOf")):
        return {}
    low, high = _End(schema, "minimum", "exclusiveMinimum", 1), _End(schema, "maximum", "exclusiveMaximum", -1)
    if low.value is not None and high.value is not None and (low.value, low.open or high.open) > (high.value, False):
        raise NoNumber(f"Nothing can satisfy it: {low.keyword} and {high.keyword} at {at or '/'} leave no number.")
    whole = (types == "integer" or types == ["integer"]) or ("integer" in (types or []) and "number" not in (types or []))
    if whole and low.value is not None and high.value is not None and _whole(low, True) > _whole(high, False):
        raise NoNumber(f"Nothing can satisfy it: {low.keyword} and {high.keyword} at {at or '/'} leave no integer.")
    left = _moved(low, high, whole, True, at)
    right = _moved(high, low, whole, False, at)
    if left is not None and right is None and left >= OPEN_FROM:
        right = MOST
    if right is not None and left is None and right <= -OPEN_FROM:
        left = -MOST
    if "multipleOf" in schema:  # digits after digits would not have to come to an end
        if left is None:
            left = -MOST if right is not None and right <= -MOST_MULTIPLE else -MOST_MULTIPLE
        if right is None:
            right = MOST if left >= MOST_MULTIPLE else MOST_MULTIPLE
    if left is not None and right is not None and left > right:
        raise _cannot(low.keyword if low.value is not None else high.keyword, at)
    made: dict[str, int | float] = {}
    if left is not None:
        made["minimum"] = _finer(low, left, right, 1, at) if low.open else left
    if right is not None:
        made["maximum"] = _finer(high, right, left, -1, at) if high.open else right
    return made


def _cannot(keyword: str, at: str) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"The schema's keyword {keyword!r} at {at or '/'} has a value that cannot be obeyed exactly: where there are bounds, integers are drawn up to {MOST}, other "
        f"numbers up to {MOST_FRACTION}, and a bound must be a number that a double holds."
    )


def _whole(end: _End, up: bool) -> int:
    """The first integer within."""
    assert end.value is not None
    value = math.ceil(end.value) if up else math.floor(end.value)
    return value + (1 if up else -1) if end.open and value == end.value else value


def _moved(end: _End, other: _End, whole: bool, up: bool, at: str) -> int | float | None:
    """The bound as the backend may have it, moved inward where it must be."""
    if end.value is None:
        return None
    value = end.value
    if whole:  # integers alone: a closed end
        value = Fraction(_whole(end, up))
        end.open = False
    most = MOST if whole else MOST_FRACTION
    limit = Fraction(-most if up else most)
    beyond = value < limit if up else value > limit
    if (value > most) if up else (value < -most):
        raise _cannot(end.keyword, at)
    if beyond:
        end.open = False
        return _said(float(limit))
    made = _double(value, up=up)
    left_out = abs(_exact(made) - value)
    if left_out:
        end.open = False
        if other.value is not None and left_out > abs(other.value - value) * MOST_LEFT_OUT:
            raise _cannot(end.keyword, at)
    return _said(made)


def _finer(end: _End, value: float, other: float | None, sign: int, at: str) -> float:
    """A closed end in the place of an open one, close to it: the backend may take an open one itself, and its digits need not come to an end."""
    from_ = _exact(value)
    gap = abs(_exact(MOST_FRACTION * sign if other is None else other) - from_)
    if not gap:
        raise _cannot(end.keyword, at)
    step = Fraction(1, 10 ** (math.ceil(-math.log10(min(gap, Fraction(1)))) + FINER))
    made = _double(from_ + sign * step, up=sign > 0)
    if not 0 < sign * (_exact(made) - from_) < gap:
        raise _cannot(end.keyword, at)
    return made


def drawable(value: Any) -> Iterator[int | float]:
    """The numbers in a value of JSON that cannot be drawn exactly."""
    if isinstance(value, dict):
        for one in value.values():
            yield from drawable(one)
    elif isinstance(value, list):
        for one in value:
            yield from drawable(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        size = abs(value)
        whole = int(float(value)) == value if isinstance(value, int) and size <= MOST else size <= MOST_FRACTION
        if not math.isfinite(value) or not whole or 0 < size < SMALLEST:
            yield value


def check_step(step: int | float, at: str) -> None:
    """Raises UnsupportedFeature for a multipleOf that the backend cannot count."""
    if step <= 0:
        raise InvalidRequest(f"The schema is wrong at {at}/multipleOf: it must be more than 0.")
    _, digits, exponent = Decimal(repr(step)).normalize().as_tuple()
    count = int("".join(map(str, digits))) * (10 ** max(0, int(exponent)) if int(exponent) < 10 else LARGEST_STEP)
    if (count > LARGEST_STEP and count not in CHEAP_STEPS) or not _counts(float(step)):
        raise UnsupportedFeature(
            f"The schema's keyword 'multipleOf' at {at or '/'} with the value {step!r} is not supported: without its point it may be at most {LARGEST_STEP}."
        )


def _counts(step: float) -> bool:
    """As the backend finds decimal places: does it find those that there are?"""
    places = 0
    value = step
    while value % 1:
        value *= 10
        places += 1
    return bool(Fraction(value) / 10**places == _exact(step))
