"""What is asked of a server to find out what stands before it.

What it is: `examine`, which streams an answer at a pace that shows what is held back, pauses another one, resumes a third behind an event, and asks something wrong and for a WebSocket: everything at the
address that clients use. `direct` is the server itself, if it can be reached without what lies between.
What it does not know: what the findings mean (rules.py), how they are shown.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from penstock.plugins.commands.doctor.arrivals import decoded, events_of, pattern_alone, pattern_of
from penstock.plugins.commands.doctor.evidence import Evidence, Idle, Refusal, Resumed, Stream
from penstock.plugins.commands.doctor.layers import layers_of
from penstock.plugins.commands.doctor.wire import Exchange, Target, Unmeasurable

TRACE = "x-penstock-trace-chunks"
FIRST_TOKENS = 48
PACE = 40
"""Events a second: the time between two is what a machine's own hiccups are not."""
LASTS_S = 2.5
MOST_TOKENS = 4096
HANDSHAKE_S = 5.0
_HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "cGVuc3RvY2stZG9jdG9yMQ==",
    "Sec-WebSocket-Protocol": "penstock.v1",
}


class Asked(NamedTuple):
    """`tokens` None: as many as last long enough."""

    model: str | None = None
    tokens: int | None = None
    idle_s: float = 12.0


def examine(target: Target, direct: Target | None, asked: Asked, note: Callable[[str], None]) -> Evidence:
    """Raises Unmeasurable. `note` is told what is done."""
    model, longest = _model(target, asked.model)
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Count from 1 to 1000."}], "stream": True}
    if model is not None:
        question["model"] = model
    note("asking for a short answer")
    many = asked.tokens or FIRST_TOKENS
    first = _stream(target, {**question, "max_tokens": many})
    if asked.tokens is None and first.arrived_as and _lasted(first) < LASTS_S / 8:  # over in a moment: its pace is that moment's
        first = _stream(target, {**question, "max_tokens": min(longest, 8 * many), "ignore_eos": True})
    fields = _paced(first, asked.tokens, longest)
    note("streaming a longer one")
    found = Evidence(url="", stream=_stream(target, {**question, **fields}))
    if found.stream.pattern.kind == "short" and asked.tokens is None:  # the server was faster than before
        fields = _paced(found.stream, None, longest, fields.get("stream_interval", 1))
        found.stream = _stream(target, {**question, **fields})
    found.layers = layers_of(found.stream.headers)
    if direct is not None:
        note("streaming one from the server itself")
        found.direct = _stream(direct, {**question, **fields})
    _compare(found)
    if not found.is_penstock:
        why = "the server does not say that it is Penstock"
        found.skipped |= dict.fromkeys(("idle connections", "resuming", "WebSocket"), why)
    else:
        _of_penstock(found, target, direct, asked, question, longest, note)
    with _or_skip(found, "the server's own errors"):
        found.error = _wrong(target, question)
    return found


@contextlib.contextmanager
def _or_skip(found: Evidence, what: str) -> Iterator[None]:
    """What was measured before stands, though this is not."""
    try:
        yield
    except Unmeasurable as error:
        found.skipped[what] = str(error)


def _of_penstock(
    found: Evidence,
    target: Target,
    direct: Target | None,
    asked: Asked,
    question: dict[str, Any],
    longest: int,
    note: Callable[[str], None],
) -> None:
    with _or_skip(found, "idle connections"):
        note(f"keeping a stream silent for {asked.idle_s:g} s")
        if asked.idle_s > 0:
            found.idle = _idle(target, {**question, "max_tokens": longest, "ignore_eos": True}, asked.idle_s)
        if found.idle is None:
            why = "--idle-s is 0" if asked.idle_s <= 0 else "a stream could not be paused (POST /v1/requests/ID/pause)"
            found.skipped["idle connections"] = why
    with _or_skip(found, "resuming"):
        note("resuming a stream")
        found.resumed = _resumed(target, question)
        if found.resumed is None:
            found.skipped["resuming"] = "the server keeps no streams, or takes no retain_s"
    with _or_skip(found, "WebSocket"):
        found.socket = _handshake(target)
        if found.socket.status == 101:
            found.page_socket = _handshake(target, Origin=f"http{'s' * target.tls}://{target.authority}")
        elif direct is not None:
            found.direct_socket = _handshake(direct)


def _post(target: Target, path: str, body: Any, **headers: str) -> Exchange:
    return Exchange(target, "POST", path, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode())


def _model(target: Target, wanted: str | None) -> tuple[str | None, int]:
    """The model to ask, and how many tokens it may be asked for."""
    reply = Exchange(target, "GET", f"{target.base}/v1/models").all()
    try:
        models = json.loads(reply.body)["data"]
        one = next((one for one in models if one["id"] == wanted), models[0])
        return wanted or str(one["id"]), max(FIRST_TOKENS, min(MOST_TOKENS, int(one.get("max_model_len") or MOST_TOKENS)) - 64)
    except (ValueError, LookupError, TypeError, AttributeError):
        return wanted, 1024


def _stream(target: Target, body: dict[str, Any]) -> Stream:
    """One streamed answer. Raises Unmeasurable where there is none."""
    rid = f"doctor-{secrets.token_hex(8)}"
    headers = {TRACE: "1", "x-request-id": rid, "accept": "text/event-stream", "accept-encoding": "gzip, deflate"}
    exchange = Exchange(target, "POST", target.chat, headers, json.dumps(body).encode()).all()
    if exchange.status != 200 or exchange.end in ("late", "nonsense"):
        raise Unmeasurable(_why_not(target, exchange))
    coding = exchange.header("content-encoding").strip().lower()
    reads = decoded(exchange.reads, coding)
    if reads is None:
        raise Unmeasurable(f"The stream is encoded as {coding!r}, and as such cannot be read here.")
    timeline = events_of(reads)
    if not timeline.events:
        kind = exchange.header("content-type") or "nothing"
        raise Unmeasurable(f"{target.chat} answered 200, but with no event ({kind}). Is it an OpenAI server's address?")
    came = [event.came for event in timeline.events]
    if timeline.timed:
        ends = [event.end for event in timeline.events]
        pattern = pattern_of([event.sent or 0.0 for event in timeline.events], came, ends, [(one.at, len(one.data)) for one in reads])
    else:
        pattern = pattern_alone(came)
    return Stream(
        headers=dict(reversed(exchange.headers)),
        version=exchange.version,
        tls=exchange.tls,
        end=exchange.end,
        timeline=timeline,
        pattern=pattern,
        size=sum(len(read.data) for read in exchange.reads),
        coding="" if coding == "identity" else coding,
        connect_s=exchange.connect_s,
        request_id=rid,
    )


def _why_not(target: Target, exchange: Exchange) -> str:
    if exchange.end == "late":
        return f"Nothing came from {target.host} for {target.timeout_s:g} s (--timeout-s): not even the head of an answer, or not its end."
    if not exchange.status:
        return f"{target.host} took the request and closed the connection without an answer in HTTP/1.1."
    try:
        error = json.loads(exchange.body)["error"]
        said = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        said = exchange.body[:200].decode("utf-8", "replace").strip()
    advice = {401: " Give a key with --api-key.", 403: " Give a key with --api-key.", 404: " Is the address right, and --model?"}
    return f"{target.chat} answered {exchange.status}: {said}{advice.get(exchange.status, '')}"


def _lasted(stream: Stream) -> float:
    first, last = stream.timeline.events[0], stream.timeline.events[-1]
    return last.came - first.came if first.sent is None or last.sent is None else last.sent - first.sent


def _paced(first: Stream, tokens: int | None, longest: int, interval: int = 1) -> dict[str, Any]:
    """What to ask for so that the answer lasts long enough, in events that are far enough apart to be told from each other. `first` had events of `interval` tokens."""
    if tokens is not None:
        return {"max_tokens": tokens}
    rate = interval * len(first.timeline.events) / max(_lasted(first), 1e-3)  # what came at once says that it is fast
    many = max(FIRST_TOKENS, min(longest, int(rate * LASTS_S)))
    if not first.arrived_as:
        return {"max_tokens": many}
    return {"max_tokens": many, "ignore_eos": True, "stream_interval": max(1, min(1024, int(min(rate, many / LASTS_S) / PACE)))}


def _compare(found: Evidence) -> None:
    """Where the server does not say when it sent what, the way without a proxy is what the other is held against."""
    stream, direct = found.stream, found.direct
    if stream.timeline.timed or direct is None:
        return
    sent, came = [event.came for event in direct.timeline.events], [event.came for event in stream.timeline.events]
    stream.pattern = pattern_of(sent, came, [event.end for event in stream.timeline.events])


def _idle(target: Target, body: dict[str, Any], seconds: float) -> Idle | None:
    """A stream that is paused as soon as it runs; None: it could not be."""
    rid = f"doctor-{secrets.token_hex(8)}"
    exchange = _post(target, target.chat, body, x_request_id=rid)
    try:
        deadline = time.monotonic() + 5
        while Exchange(target, "POST", f"{target.base}/v1/requests/{rid}/pause", body=b"").all().status != 200:
            exchange.step(0.02)
            rid = exchange.header("x-request-id") or rid  # if ours did not come through
            if time.monotonic() > deadline or exchange.end:
                return None
        while exchange.step(0.2):  # what was under way
            pass
        begun, before = exchange.elapsed, len(events_of(exchange.reads).comments)
        while (left := begun + seconds - exchange.elapsed) > 0 and not exchange.end:
            exchange.step(left)
        last = exchange.reads[-1].at if exchange.reads else 0.0
        return Idle(
            waited_s=seconds,
            signs=len(events_of(exchange.reads).comments) - before,
            cut_after_s=exchange.elapsed - last if exchange.end else None,
        )
    finally:
        exchange.close()
        Exchange(target, "DELETE", f"{target.base}/v1/requests/{rid}").all()


def _resumed(target: Target, question: dict[str, Any]) -> Resumed | None:
    rid = f"doctor-{secrets.token_hex(8)}"
    first = _post(target, target.chat, {**question, "max_tokens": 16, "retain_s": 20}, x_request_id=rid).all()
    numbers = [event.id for event in events_of(first.reads).events if event.id]
    if first.status != 200 or len(numbers) < 3:
        return None
    path = f"{target.base}/v1/streams/{first.header('x-request-id') or rid}"
    again = Exchange(target, "GET", path, {"last-event-id": numbers[1], "accept": "text/event-stream"}).all()
    events = events_of(again.reads).events
    told = "" if events else f"{again.status} {again.header('content-type')}".strip()
    return Resumed(after=int(numbers[1]), status=again.status, first=events[0].id if events else "", told=told)


def _refusal(exchange: Exchange) -> Refusal:
    try:
        error = json.loads(exchange.body)["error"]
        ours, code = isinstance(error["message"], str), str(error.get("code") or error.get("param") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        ours, code = False, ""
    return Refusal(status=exchange.status, kind=exchange.header("content-type"), ours=ours, code=code)


def _wrong(target: Target, question: dict[str, Any]) -> Refusal:
    """The answer to a field that no server takes."""
    return _refusal(_post(target, target.chat, {**question, "max_tokens": -1}).all())


def _handshake(target: Target, **headers: str) -> Refusal:
    target = target._replace(timeout_s=min(target.timeout_s, HANDSHAKE_S))
    exchange = Exchange(target, "GET", f"{target.base}/v1/stream", {**_HANDSHAKE, **headers})
    while not exchange.status and exchange.step():
        pass
    if exchange.status != 101:
        exchange.all()
    exchange.close()
    return _refusal(exchange)
