"""Several tokens a row and step: drafts that the device verifies, landing them, cutting at stops; and choices that are cloned.

The simulation compares every token with what the sequence says when it is computed alone, one token a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import trio

from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import EMPTY_I32, i32, u8
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import ABORTED, LENGTH, STOP, Admit, StepDone, StepTokens
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.policies.fcfs import FirstComeFirstServed

Make = Callable[..., Any]


def steps_of(sim: Any) -> list[StepDone]:
    """What the device says from now on."""
    said: list[StepDone] = []
    sample = sim.runner.sample

    def listen(work: Any) -> Callable[[], StepDone]:
        def wait() -> StepDone:
            said.append(done())
            return said[-1]

        done = sample(work)
        return wait

    sim.runner.sample = listen
    return said


@pytest.mark.parametrize(("depth", "loose"), [(1, False), (2, False), (2, True), (3, True)])
def test_right_drafts_save_steps_and_change_no_token(depth: int, loose: bool, make_sim: Make) -> None:
    sim = make_sim(lookahead=4, depth=depth, loose=loose)
    said = steps_of(sim)
    keys = [sim.admit([n, 2, 3], max_tokens=30) for n in range(3)]
    steps = sim.run()
    assert [sim.reason(key) for key in keys] == [LENGTH] * 3
    assert all(len(sim.output(key)) == 30 for key in keys)
    assert steps < (25 if not loose else 40), "who may come to the end with a step in flight waits for it"
    assert max(done.counts.max(initial=0) for done in said) > 2
    assert all(done.drafts.size == 4 * done.slots.size for done in said[1:]), "with the first it was not known yet how wide steps are"
    sim.check_idle()


@pytest.mark.parametrize("loose", [False, True])
def test_no_draft_reaches_beyond_a_limit(loose: bool, make_sim: Make) -> None:
    sim = make_sim(lookahead=5, max_model_len=12, num_blocks=3, loose=loose, depth=1 + loose)
    keys = [sim.admit([5] * size, max_tokens=20) for size in (3, 11)]
    sim.run()
    assert [len(sim.output(key)) for key in keys] == [9, 1]
    assert [int((f.starts + f.counts).max()) <= 12 for f in sim.forwards] == [True] * len(sim.forwards)


def test_who_is_near_a_limit_has_fewer_drafts_and_the_others_all(make_sim: Make) -> None:
    """Of four, one comes to max_model_len, one to its own max_tokens; nothing is written behind them, and their neighbours' steps are as wide as ever."""
    sim = make_sim(lookahead=4, drafts=("right",), max_model_len=40, num_blocks=64, max_num_batched_tokens=64)
    long = sim.admit([1] * 27, max_tokens=99)
    short = sim.admit([2, 3], max_tokens=7)
    others = [sim.admit([n, 5], max_tokens=30) for n in (3, 4)]
    sim.finish(2)
    narrow = 0
    while sim.flying:
        forward = sim.flying[0][0]
        counts = dict(zip(forward.slots.tolist(), forward.counts.tolist(), strict=True))
        live = [slot for slot in counts if slot >= 2]
        left = {slot: 32 - len(sim.output(key)) - 2 for slot, key in zip((2, 3), others, strict=True)}
        assert all(counts[slot] == min(5, left[slot]) for slot in live), "drafts for them, whoever ends"
        narrow += sum(counts[slot] < 5 for slot in counts if slot < 2)
        sim.finish()
    assert narrow >= 2, "both came to their limits with less"
    assert [len(sim.output(key)) for key in (long, short, *others)] == [13, 7, 30, 30]
    assert max(int((f.starts + f.counts).max()) for f in sim.forwards) <= 40
    sim.check_idle()


def test_there_are_blocks_for_the_drafts_behind_a_step(make_sim: Make) -> None:
    """Drafters with layers compute there. Asked for is what a sequence may need at all, and once a block at most, as without drafts."""
    sim = make_sim(lookahead=3, drafts=("wrong",), block_size=8, num_blocks=64)
    key = sim.admit([5] * 3, max_tokens=20)
    while sim.finish():
        board = sim.scheduler._board
        if sim.flying and sim.flying[0][1].drafts:
            forward = sim.flying[0][0]
            end = int(forward.starts[0] + forward.counts[0])
            assert board.slots.capacity[0] >= min(end + 3, 23), "the limit is 23"
    reserved = [int(question.reserve_lens[0]) for question in sim.asked if question.reserve_lens.size]
    assert max(reserved) <= 23
    assert len(reserved) <= 3
    assert len(sim.output(key)) == 20


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_nobody_is_preempted_for_room_for_drafts(kind: str, make_sim: Make) -> None:
    """Memory that just suffices: 4 sequences of 6 blocks each."""
    sim = make_sim(lookahead=4, drafts=(kind,), num_blocks=24, block_size=4, max_model_len=24)
    keys = [sim.admit([n, 2, 3], max_tokens=21) for n in range(4)]
    sim.run()
    assert [len(sim.output(key)) for key in keys] == [21] * 4
    assert sim.scheduler._board.preemptions == 0
    sim.check_idle()


def test_a_row_ends_at_its_first_stop_and_the_rest_is_dropped(make_sim: Make) -> None:
    free = make_sim()
    free.admit([9, 9], max_tokens=25, logprobs=1)
    free.run()
    said = [token for sent in free.sent for token in sent.tokens.tolist()]
    for stop in sorted(set(said)):
        sim = make_sim(lookahead=6)
        key = sim.admit([9, 9], max_tokens=25, eos=[stop], logprobs=1)
        other = sim.admit([9, 9], max_tokens=25, eos=[stop], min_tokens=4)
        sim.run()
        assert sim.output(key) == said[: said.index(stop) + 1]
        assert (sim.reason(key), len(sim.output(other)) > 4) == (STOP, True)
        sim.check_idle()


def test_log_probabilities_follow_their_tokens(make_sim: Make) -> None:
    sim = make_sim(lookahead=3)
    asked, silent = sim.admit([1, 2], max_tokens=20, logprobs=2), sim.admit([2, 1], max_tokens=20)
    sim.run()
    found: list[tuple[int, int, int]] = []
    for sent in sim.sent:
        if sent.logprobs is not None:
            heads = sent.logprobs.ids[sent.logprobs.counts.cumsum() - sent.logprobs.counts]
            for row, position, token in zip(sent.logprobs.rows.tolist(), sent.logprobs.positions.tolist(), heads.tolist(), strict=True):
                assert sent.tokens[row] == token
                found.append((int(sent.seqs[row]), position - 2, token))
    assert found == [(asked << 7, offset, token) for offset, token in enumerate(sim.output(asked))]
    assert len(sim.output(silent)) == 20


def test_a_bad_row_fails_alone(make_sim: Make) -> None:
    sim = make_sim(lookahead=3)
    keys = [sim.admit([n, 2], max_tokens=12) for n in range(3)]
    sim.finish(2)
    sim.bad = lambda sample: [1]
    sim.finish()
    sim.bad = None
    sim.run()
    assert sorted(sim.reason(key) for key in keys) == [LENGTH, LENGTH, 4]
    sim.check_idle()


def test_steps_overlap_while_no_drafts_are_made_and_not_while_they_are(make_sim: Make) -> None:
    width = 0
    sim = make_sim(lookahead=2, depth=2, choose=lambda rows: width)
    sim.admit([1, 2, 3], max_tokens=40)
    sim.admit([3, 2, 1], max_tokens=40)
    sim.finish(3)
    assert len(sim.flying) == 2
    assert all((f[0].lookahead, f[1].lookahead, f[1].drafts) == (0, 0, 0) for f in sim.flying)
    width = 2
    sim.finish()
    assert [(f[0].lookahead, f[1].drafts) for f in sim.flying] == [(0, 0), (0, 2)], "the drafts are made behind, and wait for nobody"
    sim.finish(2)
    assert [(f[0].lookahead, f[1].drafts) for f in sim.flying] == [(2, 2)]
    width = 0
    sim.finish()
    assert [(f[0].lookahead, f[1].drafts) for f in sim.flying] == [(0, 0), (0, 0)], "what stands is dropped"
    sim.run()
    sim.check_idle()


def test_steps_overlap_while_drafts_are_made_where_the_device_knows_how_far_they_come(make_sim: Make) -> None:
    sim = make_sim(lookahead=2, depth=2, loose=True, max_model_len=200, num_blocks=200, drafts=("right",))
    keys = [sim.admit([1, 2, 3], max_tokens=60), sim.admit([3, 2, 1], max_tokens=60)]
    sim.finish(4)
    for _ in range(6):
        assert [(f[0].lookahead, f[1].drafts, f[0].counts.tolist()) for f in sim.flying] == [(2, 2, [3, 3])] * 2
        assert sim.flying[1][0].loose.tolist() == [1, 1]
        slots = sim.scheduler._board.slots
        assert (slots.length[:2] - slots.known[:2]).tolist() == [6, 6], "as if every draft were right"
        sim.finish()
    sim.run()
    assert [len(sim.output(key)) for key in keys] == [60, 60]
    sim.check_idle()


def test_drafts_that_were_not_there_do_not_count_as_wrong(make_sim: Make) -> None:
    """A step in flight is taken to make drafts as the one before did; a drafter that has some now and then is judged by those."""
    sim = make_sim(lookahead=4, depth=2, loose=True, max_model_len=250, num_blocks=600, drafts=("short",))
    for n in range(4):
        sim.admit([n, 2, 3], max_tokens=200, temperature=1.0, seed=n)
    sim.run()
    exact = make_sim(lookahead=4, depth=2, max_model_len=250, num_blocks=600, drafts=("short",))
    for n in range(4):
        exact.admit([n, 2, 3], max_tokens=200, temperature=1.0, seed=n)
    exact.run()
    rates = [one.scheduler._board.drafting.watches[0].rate for one in (sim, exact)]
    assert abs(rates[0] - rates[1]) < 0.1


@pytest.mark.parametrize(
    ("counts", "tokens"),
    [([], [1]), ([2], [1]), ([0], []), ([1, 1], [1, 2]), ([9], list(range(9)))],
)
def test_counts_that_cannot_be_are_refused(counts: list[int], tokens: list[int], make_sim: Make) -> None:
    sim = make_sim(lookahead=2)
    sim.admit([1, 2], max_tokens=9)
    sim.finish(2)
    _, sample, *_ = sim.flying[0]
    assert sample.lookahead == 2
    with pytest.raises(ProtocolError, match="cannot be right"):
        sim.post(StepDone(engine=0, epoch=1, step=sample.step, slots=sample.slots, tokens=i32(tokens), counts=i32(counts)))


@pytest.mark.parametrize(("drafts", "drafters", "asked"), [([1], [], 2), ([1, 2, 3], [], 2), ([1, 2], [0, 0], 2), ([1, 2], [], 0)])
def test_drafts_that_cannot_be_are_refused(drafts: list[int], drafters: list[int], asked: int, make_sim: Make) -> None:
    sim = make_sim(lookahead=2, choose=lambda rows: asked)
    sim.admit([1, 2], max_tokens=4)
    sim.finish()
    _, sample, *_ = sim.flying[0]
    done = StepDone(engine=0, epoch=1, step=2, slots=sample.slots, tokens=i32([1]), drafts=i32(drafts), drafters=u8(drafters))
    with pytest.raises(ProtocolError, match="drafts"):
        sim.post(done)


def test_counts_that_nobody_asked_for_are_refused(make_sim: Make) -> None:
    sim = make_sim()
    sim.admit([1, 2], max_tokens=4)
    _, sample, *_ = sim.flying[0]
    with pytest.raises(ProtocolError, match="sampled 1 rows"):
        sim.post(StepDone(engine=0, epoch=1, step=1, slots=sample.slots, tokens=i32([1]), counts=i32([1])))


def test_choices_are_cloned_from_the_first(make_sim: Make) -> None:
    def placed(**settings: Any) -> tuple[int, int, list[list[int]]]:
        sim = make_sim(**settings)
        key = sim.admit([1, 2, 3, 4, 5, 6], max_tokens=10, n=4, temperature=1.0, seed=3)
        sim.run()
        sim.check_idle()
        forwards = sim.forwards
        return sum(f.place_tokens.size for f in forwards), sum(f.clone_dst.size for f in forwards), [sim.output(key, c) for c in range(4)]

    again, none, right = placed()
    once, three, same = placed(clones=True)
    assert (again, none, once, three) == (24, 0, 6, 3)
    assert same == right
    assert len({tuple(output) for output in right}) == 4


@pytest.mark.parametrize("depth", [1, 2])
def test_while_no_drafts_are_best_for_long_nobody_is_asked_how_many(depth: int, make_sim: Make) -> None:
    """A rest ends with its steps, or when somebody wants drafts whatever they cost; how long it was is told."""
    sim = make_sim(lookahead=3, depth=depth)
    said = steps_of(sim)
    drafting = sim.scheduler._board.drafting
    widths: Any = drafting._widths
    asked, timed, rested = [], [], []

    def choose(rows: int) -> int:
        asked.append(rows)
        widths.rest = 9
        return 0

    widths.choose, widths.rested = choose, rested.append
    widths.timed = lambda rows, width, ns, mixed=False, steady=True, whole=False: timed.append((width, steady))
    key = sim.admit([1, 2, 3], max_tokens=60)
    steps = sim.run()
    assert steps == 60
    assert len(asked) <= 7
    assert set(rested) == {9}
    assert len(timed) <= 7
    assert all(one == (0, True) for one in timed)
    assert not any(done.drafts.size for done in said)
    assert drafting.stats() == drafting._stats()
    assert drafting.stats().width == 0
    forced = sim.admit([4, 5, 6], max_tokens=30, spec_decode=True)
    sim.run()
    assert max(done.counts.max(initial=0) for done in said) > 1, "a rest was no reason to refuse"
    assert drafting.stats().accepted > 0
    assert [len(sim.output(one)) for one in (key, forced)] == [60, 30]
    sim.check_idle()


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_the_engine_uses_what_the_device_declares(wiring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Widths, "choose", Widths.most)

    def answers(**options: Any) -> tuple[dict[int, list[int]], int]:
        tokens: dict[int, list[int]] = {}
        steps: list[StepTokens] = []

        async def main() -> None:
            over = trio.Event()

            def output(message: Any) -> None:
                steps.append(message)
                for seq, offset, token, reason in zip(
                    *(column.tolist() for column in (message.seqs, message.offsets, message.tokens, message.reasons)), strict=True
                ):
                    assert offset == len(tokens.setdefault(seq, []))
                    tokens[seq].append(token)
                    if reason and sum(len(t) for t in tokens.values()) == 3 * 3 * 40:
                        over.set()

            device = FakeDevice(FakeOptions(depth=2, **options))
            engine = Engine(build({"wiring": wiring, "block_size": 4}), output=output, device=device, policy=FirstComeFirstServed())
            async with trio.open_nursery() as nursery:
                await engine.start(nursery)
                engine.post(
                    *(
                        Admit(
                            key=key,
                            incarnation=1,
                            prompt=i32([key, 2, 3]),
                            hashes=b"",
                            root_hash=b"0" * 16,
                            choices=i32(range(3)),
                            sampling=SamplingParams(n=3, seed=key),
                            max_tokens=40,
                            eos=EMPTY_I32,
                        )
                        for key in range(1, 4)
                    )
                )
                with trio.fail_after(20):
                    await over.wait()
                nursery.cancel_scope.cancel()
            engine.close()

        trio.run(main)
        return tokens, len(steps)

    plain, many = answers()
    ahead, few = answers(lookahead=4, clones=True)
    assert ahead == plain
    assert few < many * 0.75


def test_what_a_step_in_flight_names_does_not_change(make_sim: Make) -> None:
    """The referee of the simulation compares bytes; here it must have something to compare."""
    sim = make_sim(lookahead=2)
    sim.admit([1, 2, 3], max_tokens=9)
    sim.finish(2)
    forward, sample, *_ = sim.flying[0]
    assert (forward.lookahead, sample.lookahead) == (2, 2)
    assert forward.counts.tolist() == [3]
    assert msgspec.structs.asdict(forward)["num_decode"] == 1


# ------------------------------------------------------------------ drafters on the host


class Knows:
    """Says what the sequence will say, or nothing where `quiet`."""

    max_lookahead = 8

    def __init__(self, quiet: bool = False, fails: int = 0) -> None:
        self.sim: Any = None
        self.quiet, self.fails = quiet, fails
        self.asked = 0
        self.tenants: set[str] = set()
        self._said: dict[int, int] = {}

    def begin(self, seq: int, tokens: Any, tenant: str) -> None:
        self.tenants.add(tenant)
        self._said[seq] = tokens.size - self.sim.ledgers[seq].admit.prompt.size

    def extend(self, seq: int, tokens: Any) -> None:
        self._said[seq] += tokens.size

    def propose(self, seq: int, most: int) -> Any:
        self.asked += 1
        if self.asked == self.fails:
            raise RuntimeError("no idea")
        said = self._said[seq]
        return i32([] if self.quiet else self.sim.expected(seq)[said : said + most])

    def end(self, seq: int) -> None:
        del self._said[seq]


def hosted(make_sim: Make, *hosts: Knows, drafters: tuple[str, ...], flags: tuple[bool, ...], **more: Any) -> Any:
    sim = make_sim(lookahead=4, drafters=drafters, hosted=flags, hosts=hosts, **more)
    for one in hosts:
        one.sim = sim
    return sim


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_of_the_host_are_written_and_verified(depth: int, make_sim: Make) -> None:
    knows = Knows()
    sim = hosted(make_sim, knows, drafters=("suffix",), flags=(True,), drafts=(), depth=depth)
    keys = [sim.admit([n, 2, 3], max_tokens=25) for n in range(3)]
    steps = sim.run()
    assert [len(sim.output(key)) for key in keys] == [25] * 3
    assert steps <= 8, "five tokens a step"
    assert sum(f.write_tokens.size for f in sim.forwards) > 3 * 15
    assert all(sample.drafts == 0 for sample in sim.samples), "the device has nobody who drafts"
    assert sim.scheduler._board.drafting.watches[0].rate == 1.0
    assert [len(tenant) for tenant in knows.tenants] == [32]
    assert not knows._said
    sim.check_idle()


def test_the_first_that_has_any_drafts_for_a_sequence(make_sim: Make) -> None:
    def run(first: Knows, flags: tuple[bool, bool], kind: str) -> tuple[int, list[int]]:
        sim = hosted(make_sim, first, drafters=("a", "b"), flags=flags, drafts=(kind,))
        sim.admit([1, 2, 3], max_tokens=25)
        sim.run()
        written = sum(f.write_tokens.size for f in sim.forwards)
        return written, [round(watch.rate, 1) for watch in sim.scheduler._board.drafting.watches]

    written, rates = run(Knows(), (True, False), "wrong")
    assert (written > 15, rates[0]) == (True, 1.0)
    written, rates = run(Knows(quiet=True), (True, False), "right")
    assert (written, rates) == (0, [0.0, 1.0])
    written, rates = run(Knows(), (False, True), "right")
    assert rates[0] == 1.0
    assert written <= 4, "the device's came first, once it had some"
    written, rates = run(Knows(), (False, True), "none")
    assert (written > 15, rates) == (True, [0.0, 1.0])


def test_a_drafter_that_fails_is_not_asked_again_and_nobody_notices(make_sim: Make, caplog: pytest.LogCaptureFixture) -> None:
    knows = Knows(fails=3)
    sim = hosted(make_sim, knows, drafters=("mine",), flags=(True,), drafts=())
    key = sim.admit([1, 2, 3], max_tokens=25)
    sim.run()
    assert len(sim.output(key)) == 25
    assert knows.asked == 3
    assert "drafter host-0 is not asked any more: it failed with RuntimeError: no idea" in caplog.text
    stats = sim.scheduler._board.stats(0).speculation
    assert (stats.states, stats.reasons) == ([0], ["it failed with RuntimeError: no idea"])
    sim.clock.advance(1000.0)
    sim.admit([1, 2, 3], max_tokens=9)
    sim.run()
    assert sim.scheduler._board.stats(0).speculation.states == [0], "for good"
    sim.check_idle()


def _is_asked_no_more(make_sim: Make, says: Knows) -> None:
    """After its first answer; the request has all of its tokens all the same."""
    sim = hosted(make_sim, says, drafters=("mine",), flags=(True,), drafts=())
    key = sim.admit([1, 2, 3], max_tokens=12)
    sim.run()
    assert len(sim.output(key)) == 12
    assert says.asked == 1
    assert sim.scheduler._board.stats(0).speculation.states == [0], "for good"


@pytest.mark.parametrize("said", [np.array([1 << 40]), np.array([-1]), np.array([1.0]), np.array([True]), np.array([[1]]), np.array("one")])
def test_what_is_no_token_id_is_no_draft(said: Any, make_sim: Make) -> None:
    class Says(Knows):
        def propose(self, seq: int, most: int) -> Any:
            super().propose(seq, most)
            return said

    says = Says()
    _is_asked_no_more(make_sim, says)


class KnowsMany(Knows):
    """The same of all rows at once; `said` instead, if given."""

    said: Any = None

    def extend(self, seq: int, tokens: Any) -> None:
        raise AssertionError("one by one")

    def extend_many(self, seqs: Any, counts: Any, tokens: Any) -> None:
        assert tokens.size == counts.sum()
        for seq, count in zip(seqs.tolist(), counts.tolist(), strict=True):
            Knows.extend(self, seq, tokens[:count])

    def propose_many(self, seqs: Any, most: Any) -> Any:
        found = [Knows.propose(self, seq, wanted) for seq, wanted in zip(seqs.tolist(), most.tolist(), strict=True)]
        return self.said or (i32([one.size for one in found]), np.concatenate(found))


def test_a_drafter_may_be_asked_about_all_rows_at_once(make_sim: Make) -> None:
    """With another one behind it, that is asked one by one of the rows that the first has none for."""

    class Odd(KnowsMany):
        def propose_many(self, seqs: Any, most: Any) -> Any:
            return super().propose_many(seqs, np.where(seqs >> 7 & 1, most, 0))

    odd, knows = Odd(), Knows()
    sim = hosted(make_sim, odd, knows, drafters=("a", "b"), flags=(True, True), drafts=())
    keys = [sim.admit([n, 2, 3], max_tokens=25) for n in range(4)]
    steps = sim.run()
    assert [len(sim.output(key)) for key in keys] == [25] * 4
    assert steps <= 8, "five tokens a step"
    assert [watch.rate for watch in sim.scheduler._board.drafting.watches] == [1.0, 1.0]
    assert odd.asked > 0
    assert knows.asked > 0
    assert not odd._said
    sim.check_idle()


@pytest.mark.parametrize(
    "said",
    [
        (np.array([1]), np.array([1 << 40])),
        (np.array([2]), np.array([1])),
        (np.array([-1]), np.array([], int)),
        (np.array([9]), np.arange(9)),
        (np.array([1, 0]), np.array([1])),
        (np.array([1.0]), np.array([1])),
        "one",
    ],
    ids=repr,
)
def test_what_is_no_column_of_drafts_is_none(said: Any, make_sim: Make) -> None:
    says = KnowsMany()
    says.said = said
    _is_asked_no_more(make_sim, says)


def test_a_drafter_may_work_in_pieces_between_steps(make_sim: Make) -> None:
    class Works(Knows):
        worked = 0

        def work(self) -> None:
            self.worked += 1
            assert self.asked >= self.worked - 1, "before the questions of each step"

    works = Works()
    sim = hosted(make_sim, works, drafters=("mine",), flags=(True,), drafts=())
    sim.admit([1, 2, 3], max_tokens=25)
    sim.run()
    assert works.worked == works.asked + 1, "and once when all is over"


def test_what_a_request_wants_counts_before_what_pays(make_sim: Make) -> None:
    """Width 0 is chosen: one wants drafts whatever they cost, one as far as they pay, one never."""
    sim = make_sim(lookahead=3, choose=lambda rows: 0, drafts=("right",))
    always, _, never = (sim.admit([n, 2, 3], max_tokens=24, spec_decode=wish) for n, wish in enumerate((True, None, False)))
    steps = 0
    while sim.reason(always) is None:
        steps += sim.finish()
    assert steps <= 8
    assert sim.reason(never) is None
    assert {tuple(f.counts.tolist()) for f in sim.forwards[2:5]} == {(4, 1, 1)}
    sim.run()
    assert len(sim.output(never)) == 24
    told = {
        int(seq): (int(d), int(a)) for sent in sim.sent for seq, d, a in zip(sent.drafted_seqs, sent.drafted, sent.accepted, strict=True)
    }
    assert set(told) == {always << 7}
    drafted, accepted = told[always << 7]
    assert drafted == accepted > 15
    wide = make_sim(lookahead=3, drafts=("right",))
    keys = [wide.admit([n, 2, 3], max_tokens=24, spec_decode=False) for n in range(2)]
    wide.run()
    assert all(len(wide.output(key)) == 24 for key in keys)
    assert not any(sample.drafts or sample.lookahead for sample in wide.samples), "where nobody wants drafts none are made"


def test_a_drafter_below_the_band_is_turned_off_and_tried_again(make_sim: Make, caplog: pytest.LogCaptureFixture) -> None:
    sim = make_sim(
        lookahead=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=250, num_blocks=600, drafts=("wrong",), drafters=("bad",)
    )
    for n in range(8):
        sim.admit([n, 2, 3], max_tokens=240)
    sim.finish(60)
    assert "drafter bad is off: 0% of the last" in caplog.text
    board = sim.scheduler._board
    stats = board.stats(0).speculation
    assert (stats.states, stats.reasons[0][:14]) == ([0], "0% of the last")
    assert (stats.width, stats.chosen) == (0, 0)
    assert (sim.samples[-1].drafts, sim.samples[-1].lookahead) == (0, 0)
    sim.clock.advance(3.0)
    sim.finish(3)
    assert sim.samples[-1].drafts == 4, "on trial"
    assert board.stats(0).speculation.reasons == []
    sim.run()
    sim.check_idle()


def test_an_engine_whose_drafts_do_not_pay_sends_what_one_without_drafters_sends(make_sim: Make) -> None:
    """Message by message and byte by byte; and it reads no columns of drafts in between."""

    def sent(**more: Any) -> list[bytes]:
        sim = make_sim(depth=2, **more)
        for n in range(6):
            sim.admit([n] * (n + 1), max_tokens=20, temperature=n % 2, seed=n, n=1 + n % 2)
        sim.run()
        return [type(one).__name__.encode() + msgspec.msgpack.encode(_plain(one)) for one in sim.routed]

    assert sent(lookahead=4, choose=lambda rows: 0) == sent()


def _plain(message: Any) -> dict[str, Any]:
    found = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in msgspec.structs.asdict(message).items()}
    return {name: value for name, value in found.items() if name not in ("stats", "logprobs", "prompt_logprobs", "places", "sampling")}


# ------------------------------------------------------------------ leaving in mid-width


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["right", "fair", "wrong"])
def test_an_abort_while_a_wide_step_is_in_flight(depth: int, kind: str, make_sim: Make) -> None:
    """What the step brings for it is dropped, drafts and all; its neighbours and whoever comes into its slot say what they would have said."""
    sim = make_sim(lookahead=4, depth=depth, drafts=(kind,), max_num_seqs=3)
    gone, *others = (sim.admit([n, 2, 3], max_tokens=30) for n in range(3))
    late = sim.admit([7, 7], max_tokens=20)
    sim.finish(4)
    assert sim.flying[0][1].lookahead == 4
    assert 0 in sim.flying[0][0].slots
    said = sim.output(gone)
    sim.abort(gone << 7)
    assert (sim.reason(gone), sim.output(gone)) == (ABORTED, said)
    (answer,) = [sent for sent in sim.sent if ABORTED in sent.reasons.tolist()]
    seen, right = int(answer.drafted[0]), int(answer.accepted[0])
    assert answer.drafted_seqs.tolist() == [gone << 7]
    assert 0 <= right <= seen <= 12
    assert (right == seen, right == 0) == (kind == "right", kind == "wrong") or kind == "fair"
    assert sim.scheduler._board.slots.phase[0] != 0, "the step names the slot until it lands"
    sim.run()
    assert [sim.reason(key) for key in (*others, late)] == [LENGTH] * 3
    assert sim.output(gone) == said
    sim.check_idle()


@pytest.mark.parametrize("kind", ["right", "fair", "wrong"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_preemption_while_drafts_stand(depth: int, kind: str, make_sim: Make) -> None:
    """Memory runs out among wide steps: who is preempted goes on from the tokens that counted, and no draft that stood behind them is taken for one."""
    sim = make_sim(lookahead=4, depth=depth, drafts=(kind,), max_num_seqs=4, num_blocks=14, block_size=4, max_model_len=40)
    keys = [sim.admit([n, 2, 3], max_tokens=24) for n in range(4)]
    wide = 0
    while sim.finish():
        preempted = [seq for sent in sim.sent for seq in sent.preempted_seqs.tolist()]
        wide += bool(preempted) and any(sample.lookahead for _, sample, *_ in sim.flying)
    assert preempted, "the cache was to be too small"
    assert wide, "steps are wide afterwards, too"
    assert [sim.output(key) for key in keys] == [sim.expected(key << 7) for key in keys]
    told = {int(seq): int(count) for sent in sim.sent for seq, count in zip(sent.drafted_seqs, sent.drafted, strict=True)}
    board = sim.scheduler._board
    assert set(preempted) <= set(told)
    assert sum(told.values()) == board.stats(0).speculation.drafted, "those of before the preemption are not forgotten"
    assert board.preemptions == len(preempted)
    sim.check_idle()


def test_an_abort_of_who_was_preempted_tells_of_its_drafts(make_sim: Make) -> None:
    sim = make_sim(lookahead=4, drafts=("right",), max_num_seqs=4, num_blocks=14, block_size=4, max_model_len=40)
    for n in range(4):
        sim.admit([n, 2, 3], max_tokens=24)
    board = sim.scheduler._board
    while not board.preemptions:
        assert sim.finish()
    (waiting,) = [sequence for sequence in board.live.values() if sequence.slot < 0]
    seen = waiting.drafts
    assert seen[0] >= seen[1] > 0
    sim.abort(waiting.seq)
    (answer,) = [sent for sent in sim.sent if ABORTED in sent.reasons.tolist()]
    assert (answer.drafted_seqs.tolist(), answer.drafted.tolist(), answer.accepted.tolist()) == ([waiting.seq], [seen[0]], [seen[1]])
    sim.run()
    sim.check_idle()
