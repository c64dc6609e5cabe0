"""What is wrong with a way to a server, and what to do next.

What it is: `RULES`, each a mistake that it knows and a check of the Evidence for it; `findings`, what they find. Pure.
What it does not know: how the evidence came about, how findings are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from penstock.plugins.commands.doctor.evidence import Evidence
from penstock.plugins.commands.doctor.layers import CACHES, unbuffer

LATE_S = 0.1
"""A way that is so much longer than a round trip to its next hop is worth a word."""
LATER_S = 0.05
"""The same against the server itself."""


class Finding(NamedTuple):
    """`what` is a sentence, `do` lines of advice. A `note` is nothing wrong by itself."""

    id: str
    what: str
    do: Sequence[str]
    note: bool = False


class Rule(NamedTuple):
    """`check` says what is wrong, or None."""

    id: str
    mistake: str
    check: Callable[[Evidence], Finding | None]


def who(evidence: Evidence) -> str:
    return " or ".join(evidence.layers) if evidence.layers else "Something between"


def says_no(evidence: Evidence) -> bool:
    """Does the server ask not to be buffered? Penstock does; of another, its own reply shows it."""
    return evidence.is_penstock or (evidence.direct is not None and evidence.direct.headers.get("x-accel-buffering", "").lower() == "no")


def _held(evidence: Evidence) -> Finding | None:
    stream, direct = evidence.stream, evidence.direct
    pattern = stream.pattern
    if not pattern.holds:
        return None
    at = f"{pattern.held:.0%} of the events came late, the latest by {pattern.worst_s:.2f} s"
    culprit = who(evidence)
    what = {
        "whole": f"{culprit} holds the whole answer back until its end ({at}).",
        "blocks": f"{culprit} passes the stream on in blocks of {_size(pattern.size)} ({at}).",
        "interval": f"{culprit} passes the stream on every {pattern.every_s:.2f} s ({at}).",
        "uneven": f"{culprit} holds events back ({at}).",
    }[pattern.kind]
    if direct is not None and direct.pattern.holds and direct.pattern.worst_s > pattern.worst_s / 2:
        return Finding(
            pattern.kind,
            f"The stream is held back even without what lies between: {what}",
            ["Look at the host's own network, or what --direct goes through."],
        )
    do = unbuffer(evidence.layers, said_no=says_no(evidence))
    if stream.coding:
        do = [f"It is compressed on the way ({stream.coding}), which needs blocks: switch that off for text/event-stream first.", *do]
    if pattern.kind == "interval":
        do.append("A timer: look for a flush interval, and for TCP_NODELAY where a layer's own program writes to a socket.")
    return Finding(pattern.kind, what, do)


def _size(size: int) -> str:
    return f"{size >> 10} KiB" if size and size % 1024 == 0 else f"about {size} bytes"


def _late(evidence: Evidence) -> Finding | None:
    extra, direct = evidence.stream.extra_s, evidence.direct
    if extra is None or evidence.stream.pattern.holds:
        return None
    if direct is not None and direct.extra_s is not None:
        if extra - direct.extra_s <= LATER_S:
            return None
        told = f"Every event takes {(extra - direct.extra_s) * 1e3:.0f} ms longer than from the server itself."
    elif extra <= LATE_S:
        return None
    else:
        told = (
            f"Every event takes {extra * 1e3:.0f} ms longer than a round trip to the next hop ({evidence.stream.connect_s * 1e3:.0f} ms)."
        )
    return Finding(
        "late",
        told,
        [
            "This is the distance behind the next hop, or a delay in it: small writes that wait for an acknowledgement (Nagle; set TCP_NODELAY), a flush interval,",
            "a filter that looks into bodies. --direct tells which.",
        ],
    )


def _compressed(evidence: Evidence) -> Finding | None:
    stream = evidence.stream
    if not stream.coding:
        return None
    do = ["nginx: gzip off; in this location, or no text/event-stream in gzip_types. Others: no compression for text/event-stream."]
    if stream.pattern.holds:
        return Finding(
            "compressed", f"The stream is compressed on the way ({stream.coding}); a compressor holds events until it has enough.", do
        )
    return Finding(
        "compressed",
        f"The stream is compressed on the way ({stream.coding}), flushed with each event: it works, and gains little.",
        do,
        note=True,
    )


def _http_1_0_here(evidence: Evidence) -> Finding | None:
    if evidence.stream.version != "1.0":
        return None
    return Finding(
        "http-1.0",
        f"{who(evidence)} answers in HTTP/1.0, in which the end of a stream cannot be told from a broken connection.",
        ["Let it speak HTTP/1.1 to its clients, with chunked bodies."],
    )


def _http_1_0_there(evidence: Evidence) -> Finding | None:
    if evidence.stream.arrived_as != "HTTP/1.0":
        return None
    return Finding(
        "http-1.0-upstream",
        f"{who(evidence)} asks the server in HTTP/1.0: there are no WebSockets, each request needs a connection, and the end of a stream is not told.",
        ["nginx: proxy_http_version 1.1;", '  proxy_set_header Connection "";'],
    )


def _cut(evidence: Evidence) -> Finding | None:
    stream = evidence.stream
    if stream.timeline.done and stream.end == "whole":
        return None
    how = {"cut": "its connection was closed", "reset": "its connection was reset"}.get(stream.end, "it ended without its last event")
    seen = len(stream.timeline.events)
    return Finding(
        "cut",
        f"The stream did not come to its end: {how} after {seen} events.",
        [
            "Look for limits of time or size of a response (send timeouts, maximum body sizes) in what lies between, and at the server's own log."
        ],
    )


def _merged(evidence: Evidence) -> Finding | None:
    timeline = evidence.stream.timeline
    if not timeline.merged:
        return None
    return Finding(
        "merged",
        f"{timeline.merged} events came merged with their neighbours: the empty lines between events are gone, and no client can read that.",
        [f"{who(evidence)} changes the body: switch off what rewrites text (line endings, minifying, sub_filter, body transforms)."],
    )


def _comments(evidence: Evidence) -> Finding | None:
    stream = evidence.stream
    if not stream.arrived_as or stream.timeline.stamps:
        return None
    return Finding(
        "heartbeats",
        "Comments of the stream are swallowed on the way, and the signs of life of a silent one are comments: it will be taken for dead.",
        [f"{who(evidence)} takes event streams apart: let it pass text/event-stream as it is."],
    )


def _idle(evidence: Evidence) -> Finding | None:
    idle = evidence.idle
    if idle is None or idle.cut_after_s is None:
        return None
    return Finding(
        "idle",
        f"{who(evidence)} cuts a connection on which nothing came for {idle.cut_after_s:.1f} s.",
        [
            f"Give the server --keep-alive-s {max(0.5, idle.cut_after_s / 2):.2g} or less (a silent stream then shows a sign of life that often), or the layer more time:",
            "nginx: proxy_read_timeout 1h;   HAProxy: timeout tunnel 1h, timeout server 1h   AWS load balancer: idle_timeout.timeout_seconds   Envoy: stream_idle_timeout",
        ],
    )


def _signs(evidence: Evidence) -> Finding | None:
    idle = evidence.idle
    if idle is None or idle.cut_after_s is not None or idle.signs or evidence.stream.pattern.holds:
        return None
    return Finding(
        "no-heartbeat",
        f"A silent stream showed no sign of life in {idle.waited_s:g} s.",
        ["Its --keep-alive-s is longer than that (the default is 10), or somebody swallows comments: measure with a longer --idle-s."],
        note=True,
    )


def _request_id(evidence: Evidence) -> Finding | None:
    stream = evidence.stream
    told = stream.headers.get("x-request-id")
    if not evidence.is_penstock or told == stream.request_id:
        return None
    how = "was taken out of the reply" if told is None else "of the request did not reach the server, which made another"
    return Finding(
        "request-id",
        f"The header x-request-id {how}: streams cannot be found again, cancelled or resumed by the client's own id.",
        ["nginx: no proxy_set_header X-Request-Id, and no proxy_hide_header for it."],
    )


def _trace(evidence: Evidence) -> Finding | None:
    direct = evidence.direct
    if direct is None or not direct.arrived_as or evidence.stream.arrived_as:
        return None
    return Finding(
        "headers",
        "Headers of the request (or of the reply) are taken out on the way: x-penstock-trace-chunks did not come through, though the server knows it.",
        ["Let x-penstock-*, x-request-id and last-event-id pass in both directions."],
    )


def _resume(evidence: Evidence) -> Finding | None:
    resumed = evidence.resumed
    if resumed is None or resumed.first == str(resumed.after + 1):
        return None
    if resumed.first:
        return Finding(
            "last-event-id",
            f"A stream that is resumed begins at event {resumed.first} instead of {resumed.after + 1}: the header last-event-id does not reach the server.",
            ["Let last-event-id pass, or resume with ?after=N."],
        )
    return Finding(
        "resume",
        f"A stream that is kept cannot be resumed here: GET /v1/streams/ID gives {resumed.told}.",
        ["Pass GET /v1/streams/ on to the same server, without a cache, and x-request-id with every request."],
    )


def _socket(evidence: Evidence) -> Finding | None:
    socket, direct = evidence.socket, evidence.direct_socket
    if socket is None or socket.status == 101 or (direct is not None and direct.status != 101):
        return None
    if socket.status == 426:
        what = "The WebSocket's handshake reaches the server without its Upgrade header (426)."
    elif socket.ours and socket.status in (401, 403, 404):
        return Finding(
            "websocket",
            f"The server itself refuses the WebSocket ({socket.status} {socket.code}).",
            ["See --allowed-origins, --api-key and --transports."],
            note=True,
        )
    else:
        what = f"The WebSocket's handshake is refused on the way ({socket.status or 'no answer'})."
    return Finding(
        "websocket",
        f"{what} {who(evidence)} passes no upgrades on.",
        [
            "nginx, for /v1/stream: proxy_http_version 1.1;",
            "  proxy_set_header Upgrade $http_upgrade;",
            "  proxy_set_header Connection upgrade;",
            "  proxy_set_header Host $http_host;",
        ],
    )


def _pages(evidence: Evidence) -> Finding | None:
    socket = evidence.page_socket
    if socket is None or socket.status == 101:
        return None
    return Finding(
        "origin",
        f"A page at this address may not open a WebSocket ({socket.status} {socket.code}); programs may.".replace(" )", ")"),
        [
            "The server compares the page's Origin with Host, which has to come through: nginx: proxy_set_header Host $http_host; Or name the page in --allowed-origins",
            "(needed for any name but localhost while the server takes no keys).",
        ],
        note=True,
    )


def _error_page(evidence: Evidence) -> Finding | None:
    error = evidence.error
    if error is None or (400 <= error.status < 500 and (error.ours or (not evidence.is_penstock and "json" in error.kind))):
        return None
    return Finding(
        "error-page",
        f"A wrong request gets {error.status or 'no answer'} ({error.kind or 'no content type'}) instead of the server's own words: clients cannot tell what is wrong.",
        [
            f"{who(evidence)} answers in the server's place. nginx: proxy_intercept_errors off;   Cloudflare: no custom error page for 4xx of this host."
        ],
    )


def _cached(evidence: Evidence) -> Finding | None:
    found = [f"{name}: {evidence.stream.headers[name]}" for name in CACHES if name in evidence.stream.headers]
    hit = any("hit" in one.lower() or one.startswith("age") for one in found)
    if not hit:
        return None
    return Finding(
        "cache", f"A cache answers ({', '.join(found)}): another client's stream may be given to yours.", ["Bypass the cache for /v1/."]
    )


RULES = (
    Rule("held", "Something buffers event streams.", _held),
    Rule("late", "Each event is delayed.", _late),
    Rule("compressed", "Event streams are compressed.", _compressed),
    Rule("http-1.0", "HTTP/1.0 to the client.", _http_1_0_here),
    Rule("http-1.0-upstream", "HTTP/1.0 to the server.", _http_1_0_there),
    Rule("cut", "Streams do not come to their end.", _cut),
    Rule("merged", "Bodies are rewritten.", _merged),
    Rule("heartbeats", "Comments are swallowed.", _comments),
    Rule("idle", "Silent connections are cut.", _idle),
    Rule("no-heartbeat", "Silent streams show no sign of life.", _signs),
    Rule("request-id", "Request ids are replaced.", _request_id),
    Rule("headers", "Headers are taken out.", _trace),
    Rule("resume", "Streams cannot be resumed.", _resume),
    Rule("websocket", "WebSockets are refused.", _socket),
    Rule("origin", "The page's own host is not passed on.", _pages),
    Rule("error-page", "Errors are replaced.", _error_page),
    Rule("cache", "Streams are cached.", _cached),
)


def findings(evidence: Evidence) -> list[Finding]:
    """In the order of RULES."""
    return [found for rule in RULES if (found := rule.check(evidence)) is not None]


def unmeasured(evidence: Evidence) -> str | None:
    """Why nothing can be said about when events arrive; None: something can."""
    kind = evidence.stream.pattern.kind
    if kind == "short":
        events = evidence.stream.timeline.events
        return f"The answer was too short to tell ({len(events)} events): ask for more with --tokens."
    if kind == "unknown":
        return "The events came in lumps, and the server does not say when it sent them: name the server itself with --direct, to compare."
    return None
