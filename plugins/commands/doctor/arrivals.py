"""How the events of a stream arrived, and what pattern that is.

What it is: `events_of`, which takes an event stream apart with the time at which each event was whole, `Timeline`, what a stream's times are, and `pattern_of`, which compares when the server sent with
when it arrived. Pure: times and bytes in, names out.
What it does not know: sockets, proxies, what to do about it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from penstock.plugins.commands.doctor.wire import Read

TOLERANCE_S = 0.05
"""What arrives within so much of its time was held by nobody: a busy machine is as late, and nobody sees it."""
HELD_SHARE = 0.2
"""Of the events must have been held before anybody is blamed."""
FEWEST = 8
"""Events of which something can be said."""
SHORTEST_S = 4 * TOLERANCE_S
_SIZES = tuple(1024 << power for power in range(8))
_NEAR = 0.12
_SENT = re.compile(rb":\s*sent (\d+(?:\.\d+)?)\s*")


class Event(NamedTuple):
    """One event with data. `sent`: seconds after the request reached the server, by its own clock; `came`: after it was asked, by ours, when its last byte was there;
    `end`: where it ends in the body; `lines`: how many data lines it has; `id`: its number, "" without."""

    sent: float | None
    came: float
    end: int
    lines: int
    data: bytes
    id: str


@dataclass
class Timeline:
    """An event stream taken apart."""

    events: list[Event] = field(default_factory=list)
    comments: list[float] = field(default_factory=list)
    """When comments came that are none of the server's stamps: signs of life."""
    stamps: int = 0
    rest: int = 0
    """Bytes behind the last whole event."""

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1].data == b"[DONE]"

    @property
    def merged(self) -> int:
        """Events that hold what were several."""
        return sum(event.lines > 1 for event in self.events)

    @property
    def timed(self) -> bool:
        return bool(self.events) and all(event.sent is not None for event in self.events)


def decoded(reads: Iterable[Read], coding: str) -> list[Read] | None:
    """The reads of a body that was compressed on the way; None: it cannot be read."""
    if coding in ("", "identity"):
        return list(reads)
    if coding not in ("gzip", "x-gzip", "deflate"):
        return None
    engine = zlib.decompressobj(47)
    out = []
    try:
        for read in reads:
            if data := engine.decompress(read.data):
                out.append(Read(read.at, data))
    except zlib.error:
        return None
    return out


def events_of(reads: Iterable[Read]) -> Timeline:
    """The events of an event stream (the HTML standard's) that came in these reads."""
    found = Timeline()
    sent: float | None = None
    buffer = b""
    taken = 0
    for read in reads:
        buffer += read.data
        at = 0
        while (match := _BLANK.search(buffer, at)) is not None:
            block, at = buffer[at : match.start()], match.end()
            stamp = sent
            data, id = [], ""
            for line in re.split(rb"\r\n|\n|\r", block):
                if line.startswith(b":"):
                    told = _SENT.fullmatch(line)
                    if told is None:
                        found.comments.append(read.at)
                    else:
                        found.stamps += 1
                        sent = stamp = float(told.group(1))
                elif line.startswith(b"data:"):
                    data.append(line[5:].removeprefix(b" "))
                elif line.startswith(b"id:"):
                    id = line[3:].strip().decode("latin-1")
            if data:
                found.events.append(Event(stamp, read.at, taken + at, len(data), b"\n".join(data), id))
        buffer, taken = buffer[at:], taken + at
    found.rest = len(buffer)
    return found


_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r")


@dataclass(frozen=True)
class Pattern:
    """`kind`: steady; whole (nothing before the end); blocks (of `size` bytes); interval (every `every_s` seconds); uneven (held, by no rule that is known);
    short (too little to say); unknown (the server's times are not known). `overhead_s`: what the event that came through fastest took for the way there and back, None where
    the server's clock is not known."""

    kind: str
    held: float = 0.0
    """The share of events that were held."""
    worst_s: float = 0.0
    size: int = 0
    every_s: float = 0.0
    overhead_s: float | None = None

    @property
    def healthy(self) -> bool:
        return self.kind == "steady"

    @property
    def holds(self) -> bool:
        return self.kind in ("whole", "blocks", "interval", "uneven")


def pattern_of(sent: Sequence[float], came: Sequence[float], ends: Sequence[int] = (), reads: Sequence[tuple[float, int]] = ()) -> Pattern:
    """`sent` and `came`: each event's times, on two clocks that need not agree; `ends`: where each ends in the body; `reads`: when how many bytes of the body came."""
    count = min(len(sent), len(came))
    if count < FEWEST or sent[count - 1] - sent[0] < SHORTEST_S:
        return Pattern("short")
    delays = [came[i] - sent[i] for i in range(count)]
    fastest = min(delays)
    late = [delay - fastest for delay in delays]
    held = sum(one > TOLERANCE_S for one in late) / count
    span = sent[count - 1] - sent[0]
    seen = Pattern("steady", held=held, worst_s=max(late), overhead_s=fastest)
    if held < HELD_SHARE:
        return seen
    if came[0] - fastest >= sent[count - 1] - TOLERANCE_S and came[count - 1] - came[0] < span / 2:
        return replace(seen, kind="whole")
    gap = burst_gap(sent[:count])
    bursts = bursts_of(reads, gap)
    if len(bursts) >= 2 and (size := _block_size(bursts, ends)):
        return replace(seen, kind="blocks", size=size)
    times = [group[0] for group in _grouped(list(came[:count]), gap)]
    gaps = [b - a for a, b in pairwise(times)]
    if len(gaps) >= 3 and (every := median(gaps)) > 0 and median([abs(one - every) for one in gaps]) < every / 4:
        return replace(seen, kind="interval", every_s=every)
    return replace(seen, kind="uneven")


def pattern_alone(came: Sequence[float]) -> Pattern:
    """The same where nobody says when anything was sent: only that events came one by one can be seen, not why they did not."""
    if len(came) < FEWEST:
        return Pattern("short")
    groups = _grouped(list(came), 0.004)
    return Pattern("steady" if came[-1] - came[0] >= SHORTEST_S and len(groups) >= len(came) / 2 else "unknown")


def burst_gap(sent: Sequence[float]) -> float:
    """A pause longer than this ends a burst: well below the server's own pace."""
    return max(0.004, 0.3 * median([b - a for a, b in pairwise(sent)]))


def _grouped(times: list[float], gap: float) -> list[list[float]]:
    groups: list[list[float]] = []
    for at in times:
        if groups and at - groups[-1][-1] <= gap:
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups


def bursts_of(reads: Sequence[tuple[float, int]], gap: float) -> list[int]:
    """Bytes of the body at the end of each burst, from its beginning."""
    ends: list[int] = []
    last = 0.0
    total = 0
    for at, size in reads:
        total += size
        if ends and at - last <= gap:
            ends[-1] = total
        else:
            ends.append(total)
        last = at
    return ends


def _block_size(bursts: list[int], ends: Sequence[int]) -> int:
    """What who stores so many bytes before passing them on would make: events are cut where a block is full. 0: it is not that."""
    whole = set(ends)
    inner = bursts[:-1]
    if sum(end not in whole for end in inner) * 2 < len(inner):
        return 0
    sizes = [b - a for a, b in pairwise([0, *inner])]
    usual = sorted(sizes)[len(sizes) // 4]  # several blocks that came at once look like a larger one
    return next((size for size in _SIZES if abs(usual - size) <= _NEAR * size), usual)


LEVELS = " ▁▂▃▄▅▆▇█"
PLAIN = " .:-=+*#@"


def spark(times: Sequence[float], begin: float, end: float, width: int = 60, levels: str = LEVELS) -> str:
    """How many of these times fall into each part of the span, as a line."""
    counts = [0] * width
    for at in times:
        counts[min(width - 1, max(0, int((at - begin) / max(end - begin, 1e-9) * width)))] += 1
    most = max(counts) or 1
    return "".join(levels[-(-count * (len(levels) - 1) // most)] for count in counts)
