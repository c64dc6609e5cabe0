"""Formats of texts as patterns.

What it is: for each format a pattern that allows nothing but what its standard does, and of that what parsers in use (pydantic's, Python's) take too: no year 0,
no leap second, durations that fit, hosts' names that can be looked up, addresses of http and https.
Sources: RFC 3339 (dates, times, durations), 1123 (hosts), 5321 (mail), 3986 (URIs), 4291 (IPv6), 9562 (UUIDs).
What it does not know: schemas.
"""

from __future__ import annotations

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_MONTHS = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
DATE = f"(?:{_YEAR}-(?:{_MONTHS})|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
_HOURS = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{_HOURS}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_HOURS})"
_N = "[0-9]{1,4}"
_CLOCK = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
DURATION = f"P(?:(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)(?:{_CLOCK})?|{_CLOCK}|{_N}W)"
"""At most four digits a number: what is longer does not fit into the types that hold durations."""
_ANY, _LABEL_ANY = "[A-Za-z0-9]", "[A-Za-z0-9-]"
_TAIL = f"(?:{_ANY}|{_LABEL_ANY}{_ANY}|{_LABEL_ANY}{{2}}{_ANY}|{_LABEL_ANY}(?:{_ANY}{_LABEL_ANY}|-{_ANY}){_LABEL_ANY}{{0,58}}{_ANY})?"
LABEL = _ANY + _TAIL
"""Of a host's name: at most 63 characters, and two hyphens in the third and fourth place are for encoded names."""
HOST = rf"{LABEL}(?:\.{LABEL})*"
_NAMED = rf"(?:{LABEL}\.)*[A-Za-z]{_TAIL}"
"""A host whose last label is no number: it might be taken for an address otherwise."""
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
LOCAL = rf"{_ATOM}(?:\.?{_ATOM}){{0,31}}"
"""At most 64 characters, without quotes."""
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_H = "[0-9a-fA-F]{1,4}"


def _ipv6() -> str:
    ways = [f"(?:{_H}:){{7}}{_H}"]
    for before in range(8):  # how many groups stand before '::', which is at least one group itself
        head = "" if not before else _H if before == 1 else f"(?:{_H}:){{{before - 1}}}{_H}"
        after = 7 - before
        tail = "" if not after else f"(?:{_H})?" if after == 1 else f"(?:{_H}(?::{_H}){{0,{after - 1}}})?"
        ways.append(f"{head}::{tail}")
    return f"(?:{'|'.join(ways)})"


_CODED = "%[0-9A-Fa-f]{2}"
_CHAR = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{_CODED})"
_MORE = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|{_CODED})"
_PORT = "(?:[1-5]?[0-9]{1,4})"
URI = rf"https?://(?:{_NAMED}|{IPV4})(?::{_PORT})?(?:/{_CHAR}*)*(?:\?{_MORE}*)?(?:#{_MORE}*)?"
PATTERNS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[Tt]{TIME}",
    "duration": DURATION,
    "hostname": HOST,
    "email": rf"{LOCAL}@(?:{LABEL}\.)+[A-Za-z]{{1,24}}",
    "ipv4": IPV4,
    "ipv6": _ipv6(),
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "uri": URI,
}
LONGEST = {"hostname": 253, "email": 254, "uri": 2048}
