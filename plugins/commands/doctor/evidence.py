"""What `penstock doctor stream` found out about a way from here to a server.

What it is: `Evidence` and its parts, plain data; what of it could not be found out is None.
What it does not know: how it was found out (probes.py), what it means (rules.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.plugins.commands.doctor.arrivals import Pattern, Timeline


@dataclass(kw_only=True)
class Stream:
    """One streamed answer as it arrived."""

    headers: dict[str, str]
    version: str
    """Of HTTP, in the reply."""
    tls: str
    """The version of TLS; "": none."""
    end: str
    """As Exchange.end."""
    timeline: Timeline
    pattern: Pattern
    size: int
    """Bytes of the body, as they came."""
    coding: str
    """The content encoding."""
    connect_s: float
    """A round trip to whoever took the connection."""
    request_id: str
    """The x-request-id that was sent."""

    @property
    def arrived_as(self) -> str:
        """The version of HTTP in which the request reached the server, if that said so."""
        return self.headers.get("x-penstock-trace-chunks", "")

    @property
    def extra_s(self) -> float | None:
        """How much later than a round trip to the next hop the fastest event was."""
        overhead = self.pattern.overhead_s
        return None if overhead is None or not self.timeline.timed else max(0.0, overhead - self.connect_s)


@dataclass(kw_only=True)
class Idle:
    """A stream that was paused."""

    waited_s: float
    signs: int
    """Comments that came meanwhile."""
    cut_after_s: float | None
    """Seconds of silence after which the connection was ended."""


@dataclass(kw_only=True)
class Resumed:
    """A stream that was kept, and asked for again behind an event."""

    after: int
    status: int
    first: str
    """The number of the first event that came; "": none had one."""
    told: str
    """What else came than a stream, in short."""


@dataclass(kw_only=True)
class Refusal:
    """The answer to something."""

    status: int
    kind: str
    """The content type."""
    ours: bool
    """Is it what the server says, in its own shape?"""
    code: str = ""


@dataclass(kw_only=True)
class Evidence:
    url: str
    stream: Stream
    layers: list[str] = field(default_factory=list)
    """Who says in the reply's headers that it stands between, nearest first."""
    direct: Stream | None = None
    """The same without what stands between."""
    idle: Idle | None = None
    resumed: Resumed | None = None
    error: Refusal | None = None
    """To a request with a wrong field."""
    socket: Refusal | None = None
    """To a WebSocket's handshake; 101: it is one."""
    page_socket: Refusal | None = None
    """The same as a page of that address would ask, with its Origin."""
    direct_socket: Refusal | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not looked at, and why."""

    @property
    def is_penstock(self) -> bool:
        return bool(self.stream.arrived_as or (self.direct is not None and self.direct.arrived_as))
