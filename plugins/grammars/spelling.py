"""A JSON schema as the backend is to see it: the same, said so that it is obeyed exactly.

What it is: `spelled` replaces the formats of dates, times, hosts and addresses by patterns that know their rules (the backend's own allow 31 February, which the
final validation then finds), and counts like 2.0 by 2.
What it does not know: which keywords there may be (see keywords.py), backends.
"""

from __future__ import annotations

from typing import Any

from penstock.plugins.grammars.keywords import MANY, NAMED, ONE

_MONTHS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEAR = "[0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
DATE = f"([0-9]{{4}}-({_MONTHS})|({_LEAP_YEAR})-02-29)"
_HOURS = "([01][0-9]|2[0-3]):[0-5][0-9]"
_FRACTION = r"(\.[0-9]{1,9})?"
TIME = f"({_HOURS}:[0-5][0-9]{_FRACTION}([Zz]|[+-]{_HOURS})|23:59:60{_FRACTION}([Zz]|[+-]00:00))"
"""A leap second in UTC alone."""
_ANY, _LABEL_ANY = "[A-Za-z0-9]", "[A-Za-z0-9-]"
LABEL = f"{_ANY}({_ANY}|{_LABEL_ANY}{_ANY}|{_LABEL_ANY}{{2}}{_ANY}|{_LABEL_ANY}({_ANY}{_LABEL_ANY}|-{_ANY}){_LABEL_ANY}{{0,58}}{_ANY})?"
"""Of a host's name: at most 63 characters, and two hyphens in the third and fourth place are for encoded names."""
HOST = f"{LABEL}(\\.{LABEL})*"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
LOCAL = f"{_ATOM}(\\.?{_ATOM}){{0,31}}"
"""At most 64 characters, without quotes."""
PATTERNS = {
    "date": f"^{DATE}$",
    "time": f"^{TIME}$",
    "date-time": f"^{DATE}[Tt]{TIME}$",
    "hostname": f"^{HOST}$",
    "email": f"^{LOCAL}@{HOST}$",
}
LONGEST = {"hostname": 253, "email": 254}
COUNTS = frozenset(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])


def spelled(schema: Any) -> Any:
    """`schema` has passed `check_schema`. What was given is left as it is."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ONE:
            value = spelled(value)
        elif keyword in MANY:
            value = [spelled(one) for one in value]
        elif keyword in NAMED:
            value = {name: spelled(one) for name, one in value.items()}
        elif keyword in COUNTS and isinstance(value, float) and value.is_integer():
            value = int(value)
        made[keyword] = value
    pattern = PATTERNS.get(str(made.get("format")))
    if pattern is not None:
        longest = LONGEST.get(made.pop("format"))
        if longest is not None:
            made["maxLength"] = min(made.get("maxLength", longest), longest)
        if "pattern" in made:
            made["allOf"] = [*made.get("allOf", []), {"pattern": pattern}]
        else:
            made["pattern"] = pattern
    return made


def whole(source: str) -> str:
    """An expression is for the whole answer, with or without anchors at its ends."""
    if source.startswith("^") and "|" not in source:
        source = source[1:]
    if source.endswith("$") and not source.endswith("\\$") and "|" not in source:
        source = source[:-1]
    return source
