"""Retained streams in text: whoever attaches gets every row, once and in order, whatever happened before; what nobody waits for ends, goes on or waits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.retained import PIECE, RowLog
from penstock.core.protocol.columns import i32, i64, u8
from penstock.core.protocol.config import Config
from penstock.core.protocol.messages import (
    Abort,
    Admit,
    Answer,
    Attach,
    Attached,
    Cancel,
    Detach,
    EngineDown,
    Finished,
    Park,
    PeerDown,
    Rejected,
    RowExtra,
    TextDelta,
    Tick,
    Unpark,
    seq_of,
)
from penstock.core.protocol.sampling import SamplingParams

Row = tuple[int, int, str, tuple[int, ...], int, str]
KEPT: dict[str, Any] = {"rid": "r", "retain_s": 60.0, "on_disconnect": "continue", "context": b"began"}


def listening(bench: Any) -> Any:
    """The same rows come to several readers here: they are read from what went out."""
    own = bench._take

    def take(message: Any) -> None:
        if not isinstance(message, (TextDelta, Finished, Rejected)):
            own(message)

    bench._take = take
    return bench


@pytest.fixture
def kept(bench: Any) -> Any:
    return listening(bench)


def rows(bench: Any, edge: int, since: int = 0) -> list[Row]:
    out: list[Row] = []
    for index, message in bench.out[since:]:
        if index == edge and isinstance(message, TextDelta):
            start = 0
            for row, text in enumerate(message.texts):
                count = int(message.counts[row])
                tokens = tuple(message.tokens[start : start + count].tolist())
                start += count
                place = int(message.keys[row]), int(message.choices[row])
                out.append((*place, text, tokens, int(message.output_tokens[row]), message.reasons[row]))
    return out


def of(bench: Any, edge: int, kind: type[Any], since: int = 0) -> list[Any]:
    return [message for index, message in bench.out[since:] if index == edge and isinstance(message, kind)]


def begin(bench: Any, length: int = 6, n: int = 1, **changes: Any) -> None:
    for choice in range(n):
        bench.scripts[seq_of(1, choice)] = [40 + (choice * 7 + i) % 200 for i in range(length + choice)]
    bench.submit(1, sampling=SamplingParams(n=n), **{**KEPT, **changes})


def attach(bench: Any, edge: int, keys: list[int] | None = None, tenant: str = "") -> int:
    """Returns where its messages begin."""
    at = len(bench.out)
    bench.send(Attach(rid="r", tenant=tenant, edge=edge, keys=keys or [1]))
    return at


def texts(found: list[Row]) -> str:
    return "".join(row[2] for row in found)


# ------------------------------------------------------------------ all rows, to whoever comes


@pytest.mark.parametrize("cut", [0, 1, 3, 6, 7])
def test_another_edge_gets_all_rows_and_then_the_rest(kept: Any, cut: int) -> None:
    begin(kept)
    for _ in range(cut):
        kept.step()
    kept.send(Detach(key=1, edge=0))
    before = len(kept.out)
    kept.step()
    assert rows(kept, 0, before) == []
    at = attach(kept, 3)
    kept.run()
    found = rows(kept, 3, at)
    assert [row[3] for row in found if row[3]] == [(token,) for token in kept.scripts[seq_of(1, 0)]]
    assert found[-1][5] == "length"
    assert [message.output_tokens for message in of(kept, 3, Finished)] == [6]
    again = attach(kept, 4)
    assert rows(kept, 4, again) == found
    assert of(kept, 4, Finished) == of(kept, 3, Finished)


plans = st.lists(st.sampled_from(["step", "step", "attach", "detach", "die", "pause", "resume", "lose", "tick"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(plan=plans, n=st.integers(1, 3), mode=st.sampled_from(["continue", "park"]), prompts=st.integers(1, 2))
def test_every_reader_gets_a_beginning_of_the_same_rows(make_bench: Any, plan: list[str], n: int, mode: str, prompts: int) -> None:
    bench = listening(make_bench(max_strikes=1000))
    keys = list(range(1, prompts + 1))
    for key in keys:
        for choice in range(n):
            bench.scripts[seq_of(key, choice)] = [40 + (key * 31 + choice * 7 + i) % 200 for i in range(4 + choice)]
        many: dict[str, Any] = {"group": 1 if prompts > 1 else 0, "context": b"x" if key == 1 else b""}
        bench.submit(key, sampling=SamplingParams(n=n), **{**KEPT, "on_disconnect": mode, **many})
    reader, edge, at = 0, 0, 0
    heard: list[list[Row]] = []
    for action in plan:
        match action:
            case "step":
                parked = any(isinstance(m, Park) for m in bench.engine) and _parked(bench)
                if not parked:
                    bench.step()
            case "attach":
                heard.append(rows(bench, reader, at))
                edge += 1
                reader, at = edge, attach(bench, edge, keys)
            case "detach":
                bench.send(Detach(key=keys[-1], edge=reader))
            case "lose":
                bench.send(PeerDown(role="edge", id=reader, epoch=1))
            case "die":
                bench.send(EngineDown(engine=0, epoch=bench.epoch, reason="killed"))
                bench.up()
            case "pause" | "resume":
                bench.query("control", {"rid": "r", "do": action})
            case "tick":
                bench.clock.advance(1)
                bench.send(Tick(now_ns=bench.clock.now_ns()))
    bench.query("control", {"rid": "r", "do": "resume"})
    heard.append(rows(bench, reader, at))
    at = attach(bench, 99, keys)
    bench.run()
    whole = rows(bench, 99, at)
    for key in keys:
        for choice in range(n):
            tokens = [token for row in whole if row[:2] == (key, choice) for token in row[3]]
            assert tokens == bench.scripts[seq_of(key, choice)]
    for some in heard:
        assert some == whole[: len(some)]
    assert sorted(message.key for message in of(bench, 99, Finished, at)) == keys


def _parked(bench: Any) -> bool:
    """Does the engine hold it back?"""
    held: set[int] = set()
    for message in bench.engine:
        if isinstance(message, Park):
            held.add(message.key)
        elif isinstance(message, (Unpark, Admit)):
            held.discard(message.key)
    return bool(held)


def test_who_listened_is_told_that_another_does(kept: Any) -> None:
    begin(kept)
    kept.step()
    attach(kept, 2)
    assert [(message.status, message.code) for message in of(kept, 0, Rejected)] == [(409, "stream_taken")]
    before = len(kept.out)
    kept.send(Detach(key=1, edge=0))  # its connection closes now: that is old news
    kept.run()
    assert rows(kept, 0, before) == []
    assert texts(rows(kept, 2))


# ------------------------------------------------------------------ without a reader


def test_cancel_ends_it_and_what_there_was_can_be_read(kept: Any) -> None:
    begin(kept, on_disconnect="cancel")
    kept.step()
    kept.send(Detach(key=1, edge=0))
    assert any(isinstance(message, Abort) for message in kept.engine)
    assert not kept.actor.ledger.requests
    found = rows(kept, 2, attach(kept, 2))
    assert (found[0][3], found[-1][5]) == ((40,), "abort")


def test_park_waits_and_goes_on(kept: Any) -> None:
    begin(kept, on_disconnect="park")
    kept.step()
    kept.send(PeerDown(role="edge", id=0, epoch=1))
    assert [type(message) for message in kept.engine][-1] is Park
    assert kept.engine[-1].why == "detached"
    attach(kept, 2)
    assert type(kept.engine[-1]) is Unpark
    kept.run()
    assert len([row for row in rows(kept, 2) if row[3]]) == 6


def test_reasons_to_wait_are_kept_apart(kept: Any) -> None:
    """An engine hears of the first and of the last."""
    begin(kept, on_disconnect="park")
    kept.step()
    kept.engine.clear()
    kept.send(Park(key=1))
    kept.query("control", {"rid": "r", "do": "pause"})
    kept.send(Detach(key=1, edge=0))  # the slow connection is gone
    attach(kept, 2)
    assert [type(message) for message in kept.engine] == [Park]
    kept.query("control", {"rid": "r", "do": "resume"})
    assert [type(message) for message in kept.engine] == [Park, Unpark]


@pytest.mark.parametrize("cause", ["disconnect", "slow_client"])
def test_one_that_ends_with_its_reader_says_how_it_left(kept: Any, cause: Any) -> None:
    begin(kept, on_disconnect="cancel")
    kept.step()
    kept.send(Park(key=1))
    kept.send(Detach(key=1, edge=0, cause=cause))
    assert kept.actor.metrics.value("cancellations", cause) == 1
    assert not kept.actor.ledger.requests
    assert rows(kept, 2, attach(kept, 2))[-1][5] == "abort"


def test_a_slow_reader_that_is_cut_off_leaves_a_stream_that_goes_on(kept: Any) -> None:
    begin(kept, on_disconnect="continue")
    kept.step()
    kept.send(Park(key=1))
    kept.send(Detach(key=1, edge=0, cause="slow_client"))
    assert type(kept.engine[-1]) is Unpark, "nobody is slow any more"
    kept.run()
    assert len([row for row in rows(kept, 2, attach(kept, 2)) if row[3]]) == 6
    assert kept.actor.metrics.value("cancellations", "slow_client") == 0


def test_what_outgrows_its_bound_waits_for_a_reader(make_bench: Any) -> None:
    bench = listening(make_bench(Config(retained_stream_bytes=600)))
    begin(bench, 30)
    bench.step()
    bench.send(Detach(key=1, edge=0))
    for _ in range(8):
        bench.step()
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert type(bench.engine[-1]) is Park
    at = attach(bench, 2)
    assert len(rows(bench, 2, at)) == 9
    assert type(bench.engine[-1]) is Unpark
    bench.run()
    assert len([row for row in rows(bench, 2, at) if row[3]]) == 30
    refused = bench.query("stream", {"rid": "r", "tenant": ""})
    assert (refused.status, json.loads(refused.body)["code"]) == (410, "stream_too_long")


def test_one_that_nobody_reads_waits_as_soon_as_it_is_full(make_bench: Any) -> None:
    """It outgrows its bound by what a step brings and no more, however long it is until somebody looks."""
    bench = listening(make_bench(Config(retained_stream_bytes=600)))
    begin(bench, 30)
    bench.step()
    bench.send(Detach(key=1, edge=0))
    (held,) = bench.actor._streams
    before = 0
    while type(bench.engine[-1]) is not Park:
        assert not held.full, "it was, and nobody was told to wait"
        before = held.bytes
        bench.step()
    assert before < 600 <= held.bytes <= before + 160
    assert bench.query("stream", {"rid": "r", "tenant": ""}).status == 200, "all of it is there"


def test_the_bound_of_all_holds_for_those_that_grow(make_bench: Any) -> None:
    """The longest that is read goes on without being kept, those without a reader wait."""
    bench = listening(make_bench(Config(retained_bytes=1000)))
    begin(bench, 30)
    bench.step()
    bench.send(Detach(key=1, edge=0))
    for _ in range(8):
        bench.step()
    bench.engine.clear()
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert [type(message) for message in bench.engine] == [Park]
    at = attach(bench, 2)
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert bench.query("stream", {"rid": "r", "tenant": ""}).status == 410
    bench.run()
    assert len([row for row in rows(bench, 2, at) if row[3]]) == 30


def test_one_that_grew_too_long_after_it_was_found_says_so(make_bench: Any) -> None:
    """An edge asks for a stream, and before it attaches the stream has outgrown its bound with the reader that it has."""
    bench = listening(make_bench(Config(retained_stream_bytes=600)))
    begin(bench, 30)
    bench.step()
    assert bench.query("stream", {"rid": "r", "tenant": ""}).status == 200
    for _ in range(8):
        bench.step()
    at = attach(bench, 2)
    (refused,) = of(bench, 2, Rejected, at)
    assert (refused.status, refused.code) == (410, "stream_too_long")
    bench.run()
    assert len([row for row in rows(bench, 0) if row[3]]) == 30, "whoever reads it reads on"


def test_an_answer_to_who_attaches_begins_with_its_mark(kept: Any) -> None:
    begin(kept)
    kept.step()
    for mark in (1, 2):
        at = len(kept.out)
        kept.send(Attach(rid="r", tenant="", edge=0, keys=[1], mark=mark))
        first = next(message for index, message in kept.out[at:] if index == 0)
        assert first == Attached(mark=mark)
    at = len(kept.out)
    kept.send(Attach(rid="other", tenant="", edge=0, keys=[9], mark=3))
    assert [type(message) for index, message in kept.out[at:] if index == 0] == [Attached, Rejected]


def test_its_time(make_bench: Any) -> None:
    """From its end or its last reader's leaving, whichever is later; while somebody may still come to a waiting one, it waits."""
    bench = listening(make_bench())
    begin(bench, on_disconnect="park")
    bench.step()

    def later(seconds: float) -> Answer:
        bench.clock.advance(seconds)
        bench.send(Tick(now_ns=bench.clock.now_ns()))
        answer: Answer = bench.query("stream", {"rid": "r", "tenant": ""})
        return answer

    assert later(1000).status == 200  # somebody listens
    bench.send(Detach(key=1, edge=0))
    assert later(59).status == 200
    assert later(2).status == 404
    assert not bench.actor.ledger.requests
    assert len(bench.actor._streams) == 0
    assert all(isinstance(reader, int) for reader in bench.actor._pool.receiver._batches)


# ------------------------------------------------------------------ whose it is


def test_an_id_is_one_stream_and_belongs_to_one_tenant(kept: Any) -> None:
    begin(kept, tenant="a")
    kept.submit(2, **KEPT, tenant="a")
    (refused,) = of(kept, 0, Rejected)
    assert (refused.key, refused.status, refused.code, refused.param) == (2, 409, "stream_exists", "x-request-id")
    kept.submit(3, rid="r", tenant="a")  # a retry that forgot to ask for it
    assert [(one.key, one.code) for one in of(kept, 0, Rejected)][1:] == [(3, "stream_exists")]
    kept.submit(4, rid="r", tenant="other")
    assert len(of(kept, 0, Rejected)) == 2
    assert kept.query("stream", {"rid": "r", "tenant": "b"}).status == 404
    found = json.loads(kept.query("stream", {"rid": "r", "tenant": "a"}).body)
    assert (found["keys"], found["ended"]) == ([1], False)
    at = attach(kept, 5, tenant="b")
    assert [message.status for message in of(kept, 5, Rejected, at)] == [404]
    assert kept.query("control", {"rid": "r", "tenant": "b", "do": "pause"}).status == 404


def test_no_prompt_of_a_retry_joins_the_stream_that_it_repeats(kept: Any) -> None:
    begin(kept)
    kept.submit(2, **{**KEPT, "group": 2})
    kept.submit(3, **{**KEPT, "group": 2, "context": b""})
    assert [(one.key, one.code) for one in of(kept, 0, Rejected)] == [(2, "stream_exists"), (3, "stream_exists")]
    for key in (2, 3):
        kept.send(Detach(key=key, edge=0))
    kept.run()
    assert texts(rows(kept, 0)) != ""
    assert [message.key for message in of(kept, 0, Finished)] == [1]
    assert json.loads(kept.query("stream", {"rid": "r", "tenant": ""}).body)["keys"] == [1]


def test_an_administrators_own_request_goes_before_those_of_others(kept: Any) -> None:
    kept.scripts[seq_of(2, 0)] = [50] * 6
    begin(kept, tenant="a")
    kept.submit(2, **KEPT, tenant="b")
    for tenant, keys in (("a", [1]), ("b", [2])):
        assert json.loads(kept.query("stream", {"rid": "r", "tenant": tenant}).body)["keys"] == keys
    assert kept.query("stream", {"rid": "r", "tenant": "c"}).status == 404
    kept.step()
    assert kept.query("control", {"rid": "r", "tenant": None, "own": "b", "do": "cancel"}).status == 200
    assert [message.key for message in of(kept, 0, Finished)] == [2]
    assert kept.query("control", {"rid": "r", "tenant": None, "own": "c", "do": "cancel"}).status == 200
    assert [message.key for message in of(kept, 0, Finished)] == [2, 1]


def test_one_that_is_ended_on_purpose_says_so(kept: Any) -> None:
    begin(kept)
    kept.step()
    kept.send(Cancel(key=1, cause="client"))
    assert rows(kept, 2, attach(kept, 2))[-1][5] == "abort"


def test_one_that_is_refused_once_it_is_read_says_so_again(kept: Any) -> None:
    kept.hold_encodes = True
    begin(kept, prompt="0 " * 4090)
    kept.send(Detach(key=1, edge=0))
    kept.release()
    at = attach(kept, 2)
    assert [message.code for message in of(kept, 2, Rejected, at)] == ["context_length_exceeded"]
    assert rows(kept, 2, at) == []


# ------------------------------------------------------------------ stop


def test_stop_ends_with_what_there_is(kept: Any) -> None:
    begin(kept)
    kept.step()
    kept.step()
    assert kept.query("control", {"rid": "r", "do": "stop"}).status == 200
    found = rows(kept, 0)
    assert (len([row for row in found if row[3]]), found[-1][5]) == (2, "stop")
    extras = [extra for _, message in kept.out if isinstance(message, TextDelta) for extra in message.extras]
    assert extras[-1].stop_reason == "client"
    assert any(isinstance(message, Abort) for message in kept.engine)


# ------------------------------------------------------------------ the log


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5), st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1),
        max_size=8,
    )
)
def test_the_log_gives_back_what_it_took(steps: list[list[tuple[int, str, int, int, bool]]]) -> None:
    log = RowLog()
    expected: list[Any] = []
    total = 0
    for step in steps:
        counts = [count for _, _, count, _, _ in step]
        tokens = list(range(total, total + sum(counts)))
        total += sum(counts)
        marked = any(channel for *_, channel, _ in step)
        delta = TextDelta(
            keys=i64([key for key, *_ in step]),
            choices=i32([key % 2 for key, *_ in step]),
            texts=[text for _, text, *_ in step],
            counts=i32(counts),
            tokens=i32(tokens),
            prompt_tokens=i32([3] * len(step)),
            cached_tokens=i32([1] * len(step)),
            output_tokens=i32(counts),
            reasons=["stop" if extra else "" for *_, extra in step],
            extras=[RowExtra(row=row, stop_reason=row) for row, (*_, extra) in enumerate(step) if extra],
            channels=u8([channel for *_, channel, _ in step]) if marked else u8([]),
            calls=i32([channel - 1 for *_, channel, _ in step]) if marked else i32([]),
        )
        log.take(delta)
        expected += unfolded(delta)
    assert [row for delta in log.deltas() for row in unfolded(delta)] == expected


def unfolded(delta: TextDelta) -> list[Any]:
    extras = {extra.row: extra.stop_reason for extra in delta.extras}
    out, start = [], 0
    for row, text in enumerate(delta.texts):
        count = int(delta.counts[row])
        channel = (int(delta.channels[row]), int(delta.calls[row])) if len(delta.channels) else (0, -1)
        channel = channel if channel[0] else (0, -1)
        tokens = delta.tokens[start : start + count].tolist()
        start += count
        out.append((int(delta.keys[row]), int(delta.choices[row]), text, tokens, delta.reasons[row], extras.get(row), channel))
    return out


def test_a_long_log_comes_in_pieces() -> None:
    log = RowLog()
    rows_ = PIECE + 5
    zeros = i32([0] * rows_)
    columns: dict[str, Any] = dict.fromkeys(("choices", "counts", "prompt_tokens", "cached_tokens", "output_tokens"), zeros)
    log.take(TextDelta(keys=i64([1] * rows_), texts=[str(i) for i in range(rows_)], tokens=i32([]), reasons=[""] * rows_, **columns))
    pieces = list(log.deltas())
    assert [len(piece.texts) for piece in pieces] == [PIECE, 5]
    assert pieces[1].texts[0] == str(PIECE)
