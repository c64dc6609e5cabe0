"""The patterns of a stream's arrival, from made-up times and bytes: what nobody held, and each way of holding."""

from __future__ import annotations

import gzip
import zlib
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.plugins.commands.doctor import arrivals
from penstock.plugins.commands.doctor.arrivals import PLAIN, TOLERANCE_S, decoded, events_of, pattern_alone, pattern_of, spark
from penstock.plugins.commands.doctor.wire import Read

gaps = st.lists(st.floats(0.02, 0.2), min_size=20, max_size=60)
clocks = st.floats(-1e4, 1e4)


def times(gaps: list[float]) -> list[float]:
    return list(accumulate(gaps))


@given(gaps, clocks, st.floats(0, 5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_what_comes_within_the_tolerance_is_steady_whatever_the_clocks_say(gaps, clock, way, random) -> None:  # type: ignore[no-untyped-def]
    sent = times(gaps)
    came = [clock + way + at + random.uniform(0, 0.9 * TOLERANCE_S) for at in sent]
    pattern = pattern_of(sent, came)
    assert pattern.kind == "steady"
    assert pattern.worst_s <= TOLERANCE_S
    assert pattern.overhead_s == pytest.approx(clock + way, abs=TOLERANCE_S)


@given(gaps, clocks)
@settings(deadline=None)
def test_what_comes_at_the_end_is_held_as_a_whole(gaps: list[float], clock: float) -> None:
    sent = times(gaps)
    came = [clock + sent[-1] + 0.0001 * i for i in range(len(sent))]
    assert pattern_of(sent, came).kind == "whole"


def stored(sent: list[float], sizes: list[int], block: int) -> tuple[list[float], list[int], list[tuple[float, int]]]:
    """What who stores `block` bytes before it sends them makes of these events: when each is whole, where it ends, and the reads."""
    ends = list(accumulate(sizes))
    total = ends[-1]
    full = [next(at for at, end in zip(sent, ends, strict=True) if end >= bound) for bound in range(block, total + 1, block)]
    reads = [(at + 0.0002 * i, block) for i, at in enumerate(full)]
    if total % block:
        reads.append((sent[-1] + 0.01, total % block))
    came = [
        next(at for at, upto in zip([r[0] for r in reads], accumulate(r[1] for r in reads), strict=True) if upto >= end) for end in ends
    ]
    return came, ends, reads


@given(st.sampled_from([1024, 4096, 8192, 16384]), st.integers(150, 420), st.integers(0, 40), st.floats(0.02, 0.06))
@settings(max_examples=60, deadline=None)
def test_blocks_are_measured(block: int, size: int, more: int, gap: float) -> None:
    count = 6 * block // size + 10
    sent = times([gap] * count)
    came, ends, reads = stored(sent, [size + (i * 7) % (more + 1) for i in range(count)], block)
    pattern = pattern_of(sent, came, ends, reads)
    if block // size * gap > 4 * TOLERANCE_S and block % size:  # else a block is full before anybody sees it, or full of whole events
        assert (pattern.kind, pattern.size) == ("blocks", block)


@given(st.floats(0.15, 1.0), st.floats(0.01, 0.03))
@settings(max_examples=60, deadline=None)
def test_a_flush_interval_is_measured(every: float, gap: float) -> None:
    sent = times([gap] * int(8 * every / gap))
    came = [(at // every + 1) * every for at in sent]
    ends = [300 * (i + 1) for i in range(len(sent))]
    pattern = pattern_of(sent, came, ends, [(at, 300) for at in came])
    assert pattern.kind == "interval"
    assert pattern.every_s == pytest.approx(every, rel=0.1)


def test_too_little_is_no_pattern() -> None:
    assert pattern_of([0, 1, 2], [0, 1, 2]).kind == "short"
    assert pattern_of([i / 1000 for i in range(50)], [0.05] * 50).kind == "short"
    assert pattern_alone([0, 1]).kind == "short"


def test_alone_only_what_came_apart_is_known() -> None:
    assert pattern_alone([i / 20 for i in range(20)]).kind == "steady"
    assert pattern_alone([1 + i / 1e5 for i in range(20)]).kind == "unknown"
    assert pattern_alone([float(i // 10) for i in range(40)]).kind == "unknown"


# ------------------------------------------------------------------ events

BODY = (
    b': sent 0.010000\n\ndata: {"a":1}\n\ndata: {"a":2}\n\n: keep-alive\n\n: sent 1.5\n\nid: 7\nevent: x\ndata: {"a":3}\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(1, 20), max_size=30), st.sampled_from([b"\n", b"\r\n"]))
@settings(deadline=None)
def test_events_are_the_same_however_they_are_cut(cuts: list[int], ending: bytes) -> None:
    body = BODY.replace(b"\n", ending)
    reads, at = [], 0
    for number, size in enumerate(cuts):
        reads.append(Read(float(number), body[at : at + size]))
        at += size
    reads.append(Read(99.0, body[at:]))
    found = events_of(reads)
    assert [event.data for event in found.events] == [b'{"a":1}', b'{"a":2}', b'{"a":3}', b"[DONE]"]
    assert [event.sent for event in found.events] == [0.01, 0.01, 1.5, 1.5]
    assert [event.id for event in found.events] == ["", "", "7", ""]
    assert (len(found.comments), found.stamps, found.merged, found.rest) == (1, 2, 0, 0)
    assert found.done
    assert found.timed
    upto = list(accumulate(len(read.data) for read in reads))
    for event in found.events:
        assert event.came == next(read.at for read, end in zip(reads, upto, strict=True) if end >= event.end)


def test_events_without_the_lines_between_them_are_merged() -> None:
    found = events_of([Read(0.0, b'data: {"a":1}\ndata: {"a":2}\n\ndata: {"a":3}\n\nda')])
    assert (found.merged, len(found.events), found.rest, found.timed) == (1, 2, 2, False)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_what_is_compressed_is_read_as_it_comes(pack) -> None:  # type: ignore[no-untyped-def]
    packed = pack(BODY)
    half = len(packed) // 2
    coding = "gzip" if pack is gzip.compress else "deflate"
    out = decoded([Read(1.0, packed[:half]), Read(2.0, packed[half:])], coding)
    assert out is not None
    assert b"".join(read.data for read in out) == BODY
    assert decoded([Read(0.0, b"xyz")], coding) is None
    assert decoded([Read(0.0, b"xyz")], "br") is None


@given(st.lists(st.floats(0, 10), max_size=50))
@settings(deadline=None)
def test_a_picture_has_a_mark_where_something_came(times: list[float]) -> None:
    line = spark(times, 0, 10, width=20, levels=PLAIN)
    assert len(line) == 20
    assert {i for i, mark in enumerate(line) if mark != " "} == {min(19, int(at / 10 * 20)) for at in times}
    assert len(arrivals.LEVELS) == len(PLAIN)
