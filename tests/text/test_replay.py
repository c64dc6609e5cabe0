"""The ledger over engines' deaths: received tokens never change and arrive exactly once, whatever dies when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.actor import REPLAY_TIMEOUT_S
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import Config
from penstock.core.protocol.messages import RUNNING, Admit, Cancel, EngineDown, EngineUp, PeerDown, TextReady, Tick, seq_of
from penstock.core.protocol.sampling import SamplingParams

actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("step"), st.integers(0, 7)),
        st.tuples(st.just("die"), st.booleans()),
        st.tuples(st.just("late"), st.integers(0, 7)),
        st.tuples(st.just("cancel"), st.integers(1, 6)),
        st.tuples(st.just("hold"), st.booleans()),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(plan=actions, window=st.integers(1, 3))
def test_received_tokens_never_change_and_arrive_once(make_bench: Any, plan: list[tuple[Any, ...]], window: int) -> None:
    """Bench itself asserts that every Admit repeats exactly what was received, and that nothing follows an end."""
    bench = make_bench(up=False, max_strikes=1000)
    bench.up(max_num_seqs=window)
    vocabulary = bench.tokenizer.vocab_size
    submitted: dict[int, int] = {}
    cancelled: set[int] = set()

    def late(seed: int) -> None:
        """Frames of the epoch before, and repetitions of the present one."""
        for seq in list(bench.scripts):
            bench.rows([(seq, 0, seed, 5, RUNNING)], epoch=bench.epoch - 1)
            if seq in bench.admitted:
                incarnation, offset = bench.admitted[seq]
                if offset:
                    bench.rows([(seq, incarnation, offset - 1, 5, RUNNING)])
                bench.rows([(seq, incarnation + 1, offset, 5, RUNNING)])

    for action in plan:
        match action:
            case ("submit", n, stream):
                key = len(submitted) + 1
                submitted[key] = n
                for choice in range(n):
                    seq = seq_of(key, choice)
                    bench.scripts[seq] = [(seq * 31 + i * 17) % vocabulary for i in range(3 + key % 5 + choice)]
                bench.submit(key, sampling=SamplingParams(n=n, stop=["never"] if key % 2 else []), stream=stream)
            case ("step", mask):
                bench.step(lambda seq, mask=mask: (seq & 7) != mask)  # type: ignore[misc]
            case ("die", told):
                if told:
                    bench.send(EngineDown(engine=0, epoch=bench.epoch, reason="killed"))
                    bench.admitted.clear()
                    bench.step()
                bench.up(max_num_seqs=window)
            case ("late", seed):
                late(seed)
            case ("cancel", key):
                if key in submitted:
                    cancelled.add(key)
                bench.send(Cancel(key=key))
            case ("hold", hold):
                bench.hold_encodes = hold
                bench.release()
    bench.hold_encodes = False
    bench.release()
    bench.run()
    for key, n in submitted.items():
        if key in bench.rejected or key in cancelled:
            continue
        assert key in bench.finished
        for choice in range(n):
            got = bench.received[key, choice]
            script = bench.scripts[seq_of(key, choice)]
            assert got.tokens == script
            assert got.text == bench.tokenizer.decode(script, skip_special_tokens=True)
            assert got.reason == "length"
    actor = bench.actor
    assert actor.ledger.requests == {}
    assert actor.ledger.choices == {}
    assert actor.ledger.free_slots == actor.ledger.slots
    assert (actor.admission.requests, actor.admission.tokens) == (0, 0)
    for lane in actor._lanes.values():
        assert not lane.replaying
        assert lane._admitted == 0


@pytest.mark.parametrize("strikes", [False, True])
def test_who_is_cancelled_in_a_replay_makes_room_for_the_next(make_bench: Any, strikes: bool) -> None:
    """Nothing else runs: no step would come that could tell the others to go on."""
    bench = make_bench(up=False, max_strikes=1000)
    bench.up(max_num_seqs=1)
    for key in (1, 2, 3):
        bench.scripts[seq_of(key, 0)] = [20 + key, 30 + key]
        bench.submit(key, sampling=SamplingParams())
    if not strikes:  # a token each: no suspects, but replays of which one at a time may run
        bench.step()
    bench.up(max_num_seqs=1)
    assert [m.key for m in bench.engine if isinstance(m, Admit) and m.replay] == [1]
    bench.send(Cancel(key=1))
    bench.run()
    assert [bench.received[key, 0].tokens for key in (2, 3)] == [[22, 32], [23, 33]]
    assert bench.actor.ledger.requests == {}


def test_a_replay_carries_what_was_received_and_only_what_still_runs(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(n=3))
    seqs = [seq_of(1, choice) for choice in range(3)]
    for seq, length in zip(seqs, (2, 5, 5), strict=True):
        bench.scripts[seq] = [10 + i for i in range(length)]
    first = bench.engine[-1]
    bench.step()
    bench.step()
    bench.step(lambda seq: seq == seqs[2])
    bench.send(EngineDown(engine=0, epoch=1, reason="killed"))
    assert 1 not in bench.finished
    bench.up()
    again = bench.engine[-1]
    assert isinstance(again, Admit)
    assert again.replay
    assert again.incarnation == first.incarnation + 1
    assert again.choices.tolist() == [1, 2]
    assert again.output_counts.tolist() == [2, 3]
    assert again.outputs.tolist() == [10, 11, 10, 11, 12]
    assert again.sampling == first.sampling
    assert again.sampling.seed is not None
    assert (again.hashes, again.max_tokens, again.arrival_ns) == (first.hashes, first.max_tokens, first.arrival_ns)
    bench.run()
    assert [bench.received[1, c].tokens for c in range(3)] == [bench.scripts[s] for s in seqs]
    assert bench.actor.metrics.value("tokens", "replayed") == 5


def test_replays_are_paced_and_come_before_newcomers(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(max_num_seqs=2)
    for key in range(1, 6):
        bench.submit(key)
        bench.scripts[seq_of(key, 0)] = [7, 8, 9]
    bench.step()
    bench.up(max_num_seqs=2)
    admits = [m.key for m in bench.engine[5:]]
    assert admits == [1, 2]
    bench.submit(6)
    bench.scripts[seq_of(6, 0)] = [7]
    assert [m.key for m in bench.engine[5:]] == [1, 2]
    bench.step()
    assert [m.key for m in bench.engine[5:]] == [1, 2, 3, 4]
    bench.step()
    assert [m.key for m in bench.engine[5:]] == [1, 2, 3, 4, 5, 6]
    bench.run()
    assert set(bench.finished) == {1, 2, 3, 4, 5, 6}


def test_replays_are_exempt_from_admission(make_bench: Any) -> None:
    from penstock.core.protocol.config import Config

    bench = make_bench(Config(max_num_queued_reqs=2))
    for key in (1, 2):
        bench.submit(key)
        bench.scripts[seq_of(key, 0)] = [7, 8]
    bench.submit(3)
    assert 3 in bench.rejected
    bench.up()
    bench.run()
    assert set(bench.finished) == {1, 2}


def test_another_engine_gets_its_own_hashes(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([4] * 64))
    before = bench.engine[-1]
    bench.scripts[seq_of(1, 0)] = [4]
    bench.up(block_size=32, fingerprint="fp_2")
    after = bench.engine[-1]
    assert after.root_hash != before.root_hash
    assert len(after.hashes) == 2 * 16


def test_a_broken_engine_link_is_an_engine_that_is_down(bench: Any) -> None:
    from penstock.core.protocol.messages import PeerUp

    bench.send(PeerUp(role="edge", id=0, epoch=1))
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = [4, 5]
    out = bench.send(PeerDown(role="engine", id=0, epoch=1))
    [word] = out
    assert isinstance(word, TextReady)
    assert (word.ready, word.waits, word.reason, word.epoch) == (False, True, "the engine is being restarted", 1)
    assert bench.send(EngineDown(engine=0, epoch=1)) == []
    bench.up()
    bench.run()
    assert bench.received[1, 0].tokens == [4, 5]


def test_who_comes_while_an_engine_restarts_waits_for_the_next(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_reqs=3))
    bench.submit(1)
    bench.send(EngineDown(engine=0, epoch=1))
    for key in (2, 3):
        bench.submit(key)
        bench.scripts[seq_of(key, 0)] = [key, key]
    bench.scripts[seq_of(1, 0)] = [9]
    assert not bench.rejected
    assert bench.actor.ledger.requests.keys() == {1, 2, 3}
    bench.submit(4, model="other")
    assert bench.rejected[4].status == 404, "what is wrong is said at once"
    bench.up()
    bench.run()
    assert [bench.received[key, 0].tokens for key in (1, 2, 3)] == [[9], [2, 2], [3, 3]]


def test_the_wait_for_an_engine_is_bounded_by_the_queue_and_by_time(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_reqs=2))
    bench.send(EngineDown(engine=0, epoch=1))
    for key in (1, 2, 3):
        bench.submit(key)
    assert (bench.rejected[3].status, bench.rejected[3].code) == (429, "queue_full")
    bench.clock.advance(REPLAY_TIMEOUT_S + 1)
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert {key: got.reason for (key, _), got in bench.received.items()} == {1: "error", 2: "error"}
    assert {got.extras[0].error_code for got in bench.received.values()} == {"engine_unavailable"}
    assert not bench.actor.ledger.requests
    assert (bench.actor.admission.requests, bench.actor.admission.tokens) == (0, 0)


def test_news_of_old_engines_is_no_news(bench: Any) -> None:
    bench.up()
    facts = bench.actor._pool.facts
    assert bench.send(EngineDown(engine=0, epoch=1)) == []
    assert bench.send(EngineUp(engine=0, epoch=1, facts=facts)) == []
    assert bench.send(EngineUp(engine=0, epoch=2, facts=facts)) == []
    assert bench.actor.metrics.value("engine_losses", "0") == 1


def test_streams_do_not_wait_for_an_engine_for_ever(bench: Any) -> None:
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = [4, 5, 6]
    bench.step()
    bench.send(EngineDown(engine=0, epoch=1))
    bench.send(Tick(now_ns=bench.clock.now_ns() + 299_000_000_000))
    assert 1 not in bench.finished
    bench.send(Tick(now_ns=bench.clock.now_ns() + 301_000_000_000))
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error_code) == ("error", "engine_unavailable")
    assert got.tokens == [4]


@pytest.mark.parametrize("stream", [True, False])
def test_stop_strings_held_back_over_a_death(bench: Any, stream: bool) -> None:
    ids = bench.tokenizer.encode_batch(["go S"], add_special_tokens=False)[0].tolist()
    rest = bench.tokenizer.encode_batch(["TOP!"], add_special_tokens=False)[0].tolist()
    bench.submit(1, stream=stream, sampling=SamplingParams(stop=["STOP"]))
    bench.scripts[seq_of(1, 0)] = ids + rest
    for _ in ids:
        bench.step()
    bench.up()
    bench.run()
    assert (bench.received[1, 0].text, bench.received[1, 0].reason) == ("go ", "stop")


def lose(bench: Any) -> None:
    bench.send(EngineDown(engine=0, epoch=bench.epoch, reason="killed"))
    bench.up()


def test_a_request_that_kills_engines_is_failed_and_takes_nobody_with_it(make_bench: Any) -> None:
    """Six run when the engine dies; the third is the killer. Those that had tokens go on at once, the others are tried one at a time."""
    bench = make_bench()
    killer = seq_of(3, 0)
    for key in range(1, 7):
        bench.scripts[seq_of(key, 0)] = [10 + key] * 4
        bench.submit(key)
        if key == 2:
            bench.step()
    lose(bench)
    assert {seq >> 7 for seq in bench.admitted} == {1, 2, 3}, "those that had got somewhere, and one suspect"
    lose(bench)  # it died again under the suspect
    assert bench.received[(3, 0)].reason == "error"
    assert bench.received[(3, 0)].extras[-1].error_code == "engine_failure"
    assert "not tried again" in bench.received[(3, 0)].extras[-1].error
    assert killer not in bench.admitted
    bench.run()
    for key in (1, 2, 4, 5, 6):
        assert bench.received[(key, 0)].tokens == [10 + key] * 4
        assert bench.received[(key, 0)].reason == "length"


def test_progress_between_deaths_wipes_the_slate(make_bench: Any) -> None:
    bench = make_bench()
    bench.scripts[seq_of(1, 0)] = list(range(20, 32))
    bench.submit(1)
    for _ in range(6):
        bench.step()
        lose(bench)
    bench.run()
    assert bench.received[(1, 0)].tokens == list(range(20, 32))


def test_a_suspect_that_is_cancelled_makes_room_for_the_next(make_bench: Any) -> None:
    bench = make_bench()
    for key in (1, 2):
        bench.scripts[seq_of(key, 0)] = [5, 6]
        bench.submit(key)
    lose(bench)
    assert list(bench.admitted) == [seq_of(1, 0)]
    bench.send(Cancel(key=1))
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    bench.run()
    assert bench.received[(2, 0)].tokens == [5, 6]
