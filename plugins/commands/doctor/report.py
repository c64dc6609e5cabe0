"""How `penstock doctor stream` shows what it found.

What it is: a picture of when the server sent and when it arrived, a table of what was looked at, and what to do; or all of it as JSON. On a terminal with colours, elsewhere plain lines that a script can cut.
What it does not know: how findings come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.plugins.commands.doctor.arrivals import LEVELS, PLAIN, spark
from penstock.plugins.commands.doctor.evidence import Evidence, Stream

if TYPE_CHECKING:
    from rich.console import Console

    from penstock.plugins.commands.doctor.rules import Finding

CHECKS = {
    "events arrive as they are sent": ("whole", "blocks", "interval", "uneven", "late"),
    "the stream is whole and unchanged": ("cut", "merged", "compressed", "cache"),
    "HTTP/1.1 all the way": ("http-1.0", "http-1.0-upstream"),
    "idle connections": ("idle", "heartbeats", "no-heartbeat"),
    "request ids and headers": ("request-id", "headers"),
    "resuming": ("resume", "last-event-id"),
    "WebSocket": ("websocket", "origin"),
    "the server's own errors": ("error-page",),
}
"""What was looked at, and which findings speak of it."""


def picture(stream: Stream, *, plain: bool) -> list[str]:
    """When events left and when they came, on one line of time each; only the second where the server does not say."""
    levels = PLAIN if plain else LEVELS
    events = stream.timeline.events
    came = [event.came for event in events]
    if not stream.timeline.timed:
        return [f"arrived  {spark(came, came[0], came[-1], levels=levels)}  {came[-1] - came[0]:.2f} s"]
    shift = stream.pattern.overhead_s or 0.0
    sent = [(event.sent or 0.0) + shift for event in events]
    begin, end = sent[0], max(came[-1], sent[-1])
    width = f"  {end - begin:.2f} s"
    return [f"sent     {spark(sent, begin, end, levels=levels)}{width}", f"arrived  {spark(came, begin, end, levels=levels)}"]


def way(evidence: Evidence) -> str:
    stream = evidence.stream
    end = f"the server ({stream.arrived_as})" if stream.arrived_as else "the server"
    return " > ".join([f"HTTP/{stream.version}" + (f", {stream.tls} ends here" if stream.tls else ""), *evidence.layers, end])


def summary(evidence: Evidence) -> str:
    stream = evidence.stream
    pattern = stream.pattern
    told = f"{len(stream.timeline.events)} events, {stream.size} bytes"
    if stream.timeline.timed and pattern.kind != "short":
        told += f"; at most {pattern.worst_s * 1e3:.0f} ms later than the fastest"
    if stream.extra_s is not None and pattern.healthy:
        told += f", which took {stream.extra_s * 1e3:.0f} ms more than a round trip to the next hop ({stream.connect_s * 1e3:.0f} ms)"
    return told


def rows(evidence: Evidence, found: list[Finding], unknown: str | None) -> list[tuple[str, str]]:
    """What was looked at, and how it is: ok, finding, note, or why it is not known."""
    by_id = {finding.id: finding for finding in found}
    out = []
    for name, ids in CHECKS.items():
        spoken = [by_id[id] for id in ids if id in by_id]
        if spoken:
            state = "note" if all(one.note for one in spoken) else "finding"
        elif name in evidence.skipped:
            state = f"not measured: {evidence.skipped[name]}"
        elif name.startswith("events") and unknown:
            state = f"not measured: {unknown}"
        else:
            state = "ok"
        out.append((name, state))
    return out


def show(console: Console, evidence: Evidence, found: list[Finding], unknown: str | None) -> None:
    encoding = (getattr(console.file, "encoding", None) or "ascii").lower()
    plain = not encoding.startswith("utf")

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    say(f"way      {way(evidence)}")
    for line in picture(evidence.stream, plain=plain):
        say(line)
    say(f"         {summary(evidence)}", "dim")
    looked = rows(evidence, found, unknown)
    if console.is_terminal:
        _table(console, looked)
    else:
        for name, state in looked:
            say(f"{name:<35}{state}")
    for finding in found:
        say("")
        say(f"{'note' if finding.note else 'finding'} {finding.id}: {finding.what}", "yellow" if finding.note else "bold red")
        for line in finding.do:
            say(f"  {line}")


def _table(console: Console, looked: list[tuple[str, str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "finding": "red", "note": "yellow"}
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, state in looked:
        table.add_row(name, Text(state, style=colours.get(state, "dim")))
    console.print(table)


def as_json(evidence: Evidence, found: list[Finding], unknown: str | None) -> dict[str, Any]:
    def one(stream: Stream) -> dict[str, Any]:
        pattern = stream.pattern
        return {
            "http": stream.version,
            "tls": stream.tls or None,
            "content_encoding": stream.coding or None,
            "pattern": pattern.kind,
            "held_share": round(pattern.held, 4),
            "worst_s": round(pattern.worst_s, 6),
            "block_bytes": pattern.size or None,
            "every_s": pattern.every_s or None,
            "extra_s": stream.extra_s,
            "connect_s": stream.connect_s,
            "bytes": stream.size,
            "sent_s": [event.sent for event in stream.timeline.events] if stream.timeline.timed else None,
            "arrived_s": [round(event.came, 6) for event in stream.timeline.events],
        }

    return {
        "url": evidence.url,
        "layers": evidence.layers,
        "server": "penstock" if evidence.is_penstock else None,
        "server_saw": evidence.stream.arrived_as or None,
        "stream": one(evidence.stream),
        "direct": one(evidence.direct) if evidence.direct is not None else None,
        "checks": dict(rows(evidence, found, unknown)),
        "findings": [{"id": f.id, "note": f.note, "what": f.what, "do": list(f.do)} for f in found],
    }
