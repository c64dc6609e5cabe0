"""What `penstock doctor stream` says of made-up evidence: each rule finds its mistake, and only that."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from penstock.plugins.commands.doctor import report, rules
from penstock.plugins.commands.doctor.arrivals import Event, Pattern, Timeline
from penstock.plugins.commands.doctor.evidence import Evidence, Idle, Refusal, Resumed, Stream
from penstock.plugins.commands.doctor.layers import layers_of, unbuffer

WELL = Pattern("steady", worst_s=0.002, overhead_s=0.02)
WHOLE = Pattern("whole", held=0.9, worst_s=2.0, overhead_s=0.02)


def timeline(**fields: Any) -> Timeline:
    events = [Event(i / 10, i / 10 + 0.02, 30 * i, 1, b"{}", "") for i in range(20)] + [Event(2.0, 2.02, 700, 1, b"[DONE]", "")]
    return Timeline(events=fields.pop("events", events), **{"stamps": 21, **fields})


def stream(**fields: Any) -> Stream:
    usual: dict[str, Any] = {
        "headers": {"x-request-id": "r", "x-penstock-trace-chunks": "HTTP/1.1", "server": "nginx/1.22.1"},
        "version": "1.1",
        "tls": "",
        "end": "whole",
        "timeline": timeline(),
        "pattern": WELL,
        "size": 700,
        "coding": "",
        "connect_s": 0.01,
        "request_id": "r",
    }
    if "headers" in fields:
        fields["headers"] = {name: value for name, value in (usual["headers"] | fields["headers"]).items() if value is not None}
    return Stream(**{**usual, **fields})


def evidence(given: Stream | None = None, **fields: Any) -> Evidence:
    given = given or stream()
    return Evidence(url="http://x", stream=given, layers=layers_of(given.headers), **fields)


OURS = Refusal(status=400, kind="application/json", ours=True)
PAGE = Refusal(status=502, kind="text/html", ours=False)
UP = Refusal(status=101, kind="", ours=False)
OTHER: dict[str, Any] = {"headers": {"x-penstock-trace-chunks": None}}

CASES: dict[str, tuple[Evidence, list[str]]] = {
    "all is well": (
        evidence(
            idle=Idle(waited_s=12, signs=1, cut_after_s=None),
            resumed=Resumed(after=2, status=200, first="3", told=""),
            error=OURS,
            socket=UP,
            page_socket=UP,
            direct=stream(),
        ),
        [],
    ),
    "whole": (evidence(stream(pattern=WHOLE)), ["whole"]),
    "blocks": (evidence(stream(pattern=Pattern("blocks", 0.9, 1.0, 8192))), ["blocks"]),
    "interval": (evidence(stream(pattern=Pattern("interval", 0.8, 0.2, 0, 0.2))), ["interval"]),
    "uneven": (evidence(stream(pattern=Pattern("uneven", 0.5, 1.0))), ["uneven"]),
    "held and compressed": (evidence(stream(pattern=WHOLE, coding="gzip")), ["whole", "compressed"]),
    "compressed alone": (evidence(stream(coding="gzip")), ["(compressed)"]),
    "late": (evidence(stream(pattern=Pattern("steady", overhead_s=0.25))), ["late"]),
    "far, and direct as far": (
        evidence(stream(pattern=Pattern("steady", overhead_s=0.25)), direct=stream(pattern=Pattern("steady", overhead_s=0.24))),
        [],
    ),
    "later than direct": (evidence(stream(pattern=Pattern("steady", overhead_s=0.1)), direct=stream()), ["late"]),
    "HTTP/1.0 here": (evidence(stream(version="1.0")), ["http-1.0"]),
    "HTTP/1.0 there": (evidence(stream(headers={"x-penstock-trace-chunks": "HTTP/1.0"})), ["http-1.0-upstream"]),
    "closed": (evidence(stream(end="cut", timeline=timeline(events=timeline().events[:9]))), ["cut"]),
    "reset": (evidence(stream(end="reset", timeline=timeline(events=timeline().events[:9]))), ["cut"]),
    "merged": (evidence(stream(timeline=timeline(events=[Event(0.0, 0.0, 9, 3, b"x", ""), *timeline().events]))), ["merged"]),
    "comments are gone": (evidence(stream(timeline=timeline(stamps=0))), ["heartbeats"]),
    "cut when idle": (evidence(idle=Idle(waited_s=9, signs=0, cut_after_s=5.0)), ["idle"]),
    "no sign of life": (evidence(idle=Idle(waited_s=9, signs=0, cut_after_s=None)), ["(no-heartbeat)"]),
    "no sign of life where all is held": (evidence(stream(pattern=WHOLE), idle=Idle(waited_s=9, signs=0, cut_after_s=None)), ["whole"]),
    "another id": (evidence(stream(headers={"x-request-id": "other"})), ["request-id"]),
    "no id": (evidence(stream(headers={"x-request-id": None})), ["request-id"]),
    "headers are taken out": (evidence(stream(**OTHER), direct=stream()), ["headers"]),
    "last-event-id is gone": (evidence(resumed=Resumed(after=2, status=200, first="1", told="")), ["last-event-id"]),
    "no resuming": (evidence(resumed=Resumed(after=2, status=404, first="", told="404 text/html")), ["resume"]),
    "no upgrade": (evidence(socket=Refusal(status=426, kind="application/json", ours=True, code="upgrade_required")), ["websocket"]),
    "a proxy's no": (evidence(socket=PAGE), ["websocket"]),
    "the server's no": (evidence(socket=Refusal(status=401, kind="application/json", ours=True)), ["(websocket)"]),
    "no here and no there": (evidence(socket=PAGE, direct_socket=OURS), []),
    "no for pages": (evidence(socket=UP, page_socket=Refusal(status=403, kind="application/json", ours=True, code="x")), ["(origin)"]),
    "an error page": (evidence(error=PAGE), ["error-page"]),
    "an error page for a right status": (evidence(error=Refusal(status=400, kind="text/html", ours=False)), ["error-page"]),
    "another server's errors": (evidence(stream(**OTHER), error=Refusal(status=422, kind="application/json", ours=False)), []),
    "a cache": (evidence(stream(headers={"age": "12"})), ["cache"]),
    "no hit": (evidence(stream(headers={"cf-cache-status": "DYNAMIC"})), []),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_found_and_no_other(name: str) -> None:
    given, wanted = CASES[name]
    found = rules.findings(given)
    assert [f"({one.id})" if one.note else one.id for one in found] == wanted
    for one in found:
        assert one.what.endswith((".", ")"))
        assert one.do, "it says what to do"


def test_each_rule_is_tried_and_each_finding_stands_in_a_row() -> None:
    ids = {one.id for given, _ in CASES.values() for one in rules.findings(given)}
    assert {rule.id for rule in rules.RULES} - {"held"} <= ids
    assert ids == {id for row in report.CHECKS.values() for id in row}


def test_who_says_that_it_stands_between() -> None:
    assert layers_of({"server": "cloudflare", "cf-ray": "8", "via": "1.1 varnish, 1.1 google"}) == [
        "Cloudflare",
        "Varnish",
        "Google front end",
    ]
    assert layers_of({"server": "nginx/1.22.1"}) == ["nginx/1.22.1"]
    assert layers_of({"server": "Homemade"}) == ["Homemade"]
    assert layers_of({"via": "1.1 proxy7"}) == ["via proxy7"]
    assert layers_of({"content-type": "text/event-stream"}) == []


def test_advice_is_for_who_stands_there() -> None:
    asked = unbuffer(["nginx/1.22.1"], said_no=True)
    assert "proxy_ignore_headers" in asked[0]
    assert "  proxy_buffering off;" in asked
    assert not any("proxy_ignore_headers" in line for line in unbuffer(["nginx"], said_no=False))
    assert unbuffer(["Homemade"], said_no=True)[0].startswith("Homemade: ")
    assert "--direct" in unbuffer([], said_no=True)[0]


def test_held_without_a_proxy_is_not_the_proxys() -> None:
    (one,) = rules.findings(evidence(stream(pattern=WHOLE), direct=stream(pattern=WHOLE)))
    assert "even without what lies between" in one.what


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_report_says_all_of_it(name: str, terminal: bool) -> None:
    given, _ = CASES[name]
    out = io.StringIO()
    found = rules.findings(given)
    report.show(Console(file=out, force_terminal=terminal, width=100, highlight=False), given, found, rules.unmeasured(given))
    said = out.getvalue()
    assert ("\x1b" in said) == terminal
    for one in found:
        assert one.id in said
        assert all(line.strip() in said for line in one.do), "whole lines, to be copied"
    assert {f["id"] for f in report.as_json(given, found, None)["findings"]} == {one.id for one in found}


def test_what_is_not_known_is_said() -> None:
    short = evidence(stream(pattern=Pattern("short")), skipped={"resuming": "why"})
    assert "--tokens" in (rules.unmeasured(short) or "")
    assert "--direct" in (rules.unmeasured(evidence(stream(pattern=Pattern("unknown")))) or "")
    looked = dict(report.rows(short, [], "too short"))
    assert looked["resuming"] == "not measured: why"
    assert looked["events arrive as they are sent"] == "not measured: too short"
