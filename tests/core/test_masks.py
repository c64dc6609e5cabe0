"""Answers that obey a grammar, in the engine: masks come in order, whatever the depth, the wiring and the memory."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # for grammar_kit.py: pytest's importlib mode does not

from penstock.core.actors.masks import Masks
from penstock.core.actors.sampler import Sampler
from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import EMPTY_I32, i32, i64
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import PluginFault, ProtocolError, described
from penstock.core.protocol.messages import (
    FAILED,
    LENGTH,
    STOP,
    Abort,
    Admit,
    DeviceWork,
    Drawn,
    GrammarClose,
    GrammarFailed,
    GrammarOpen,
    MaskReady,
    MaskRequest,
    Sample,
    StepTokens,
    Vocabulary,
    seq_of,
)
from penstock.core.protocol.sampling import Beam, SamplingParams
from penstock.core.protocol.wording import FEWER_ANSWERS, GRAMMAR_FAILED
from penstock.plugins.policies.fcfs import FirstComeFirstServed

VOCAB = 211
END = 7
WORDS = Vocabulary(data=b"x" * VOCAB, counts=i32([1] * VOCAB))


@pytest.fixture(params=["Ranges", "RangesTogether"])
def ranges(request: pytest.FixtureRequest) -> Any:
    """A backend that is asked for one sequence at a time, and one that takes them together."""
    import grammar_kit

    return getattr(grammar_kit, request.param)


def opened(seq: int, source: bytes, outputs: tuple[int, ...] = (), min_tokens: int = 0) -> GrammarOpen:
    return GrammarOpen(
        seqs=i64([seq]),
        incarnation=1,
        grammar=source,
        ends=i32([END, VOCAB + 5]),
        min_tokens=min_tokens,
        outputs=i32(outputs),
        output_counts=i32([len(outputs)]),
    )


def asked(step: int, *seqs: int) -> MaskRequest:
    return MaskRequest(step=step, rows=i32(range(len(seqs))), seqs=i64(seqs), incarnations=i32([1] * len(seqs)))


def drawn(step: int, **tokens: int) -> Drawn:
    seqs = [int(name[1:]) for name in tokens]
    return Drawn(step=step, seqs=i64(seqs), incarnations=i32([1] * len(seqs)), tokens=i32(list(tokens.values())))


def bits(ready: MaskReady) -> list[list[int]]:
    rows = np.unpackbits(ready.mask.view(np.uint8), bitorder="little").reshape(len(ready.rows), -1)
    return [np.flatnonzero(row).tolist() for row in rows]


def test_a_mask_waits_for_the_tokens_of_earlier_steps(ranges: Any) -> None:
    masks = Masks(ranges, vocab=VOCAB)
    for message in (WORDS, opened(5, b"[10,12,2]"), opened(6, b"[20,21,1]", outputs=(20,))):
        assert list(masks.handle(message)) == []
    (first,) = masks.handle(asked(1, 5, 6))
    assert isinstance(first, MaskReady)
    assert bits(first) == [[10, 11], [END]]
    assert list(masks.handle(asked(2, 5))) == []
    (second,) = masks.handle(drawn(1, s5=11, s6=END))
    assert isinstance(second, MaskReady)
    assert (second.step, bits(second)) == (2, [[10, 11]])
    assert list(masks.handle(drawn(2, s5=-1))) == []  # nothing was drawn
    list(masks.handle(GrammarClose(seqs=i64([5, 6]), incarnations=i32([1, 1]))))
    assert len(masks) == 0


def test_who_is_over_or_broken_gets_nothing_and_nobody_else_feels_it(ranges: Any) -> None:
    masks = Masks(ranges, vocab=VOCAB)
    list(masks.handle(WORDS))
    for seq, source in ((1, b"no json"), (2, b"[13,14,3]"), (3, b"[3,4,1]"), (4, b"[3,4,1]")):
        list(masks.handle(opened(seq, source)))
    *why, ready = masks.handle(asked(1, 1, 2, 3, 4, 99))
    assert isinstance(ready, MaskReady)
    assert bits(ready) == [[], [], [3], [3], []]
    assert [(one.seq, one.broken) for one in why if isinstance(one, GrammarFailed)] == [(1, True), (2, True)]
    list(masks.handle(drawn(1, s3=9, s4=3)))  # 9 is not of the grammar
    why, ready = masks.handle(asked(2, 3, 4))
    assert isinstance(why, GrammarFailed)
    assert "consume() said no to token 9" in why.error
    assert isinstance(ready, MaskReady)
    assert bits(ready) == [[], [END]]


def test_a_backend_that_raises_for_all_of_a_step_fails_them() -> None:
    import grammar_kit

    class Broken(grammar_kit.RangesTogether):  # type: ignore[misc, name-defined]
        def masks(self, matchers: Any, out: Any) -> Any:
            raise RuntimeError("no")

    masks = Masks(Broken, vocab=VOCAB)
    for message in (WORDS, opened(1, b"[3,4,1]"), opened(2, b"[3,4,1]")):
        list(masks.handle(message))
    *why, ready = masks.handle(asked(1, 1, 2))
    assert isinstance(ready, MaskReady)
    assert bits(ready) == [[], []]
    assert [isinstance(one, GrammarFailed) and one.broken for one in why] == [True, True]


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "consume raises": ({"consume": lambda self, token: 1 / 0}, "consume() failed with ZeroDivisionError"),
    "consume says nothing": ({"consume": lambda self, token: None}, "consume() gave None, which is neither True nor False"),
    "mask raises": ({"mask": lambda self, out: 1 / 0}, "mask() failed with ZeroDivisionError"),
    "may_end raises": ({"may_end": lambda self: 1 / 0}, "ZeroDivisionError"),
    "may_end says a text": ({"may_end": lambda self: "no"}, "may_end() gave 'no', which is neither True nor False"),
    "no matcher": ({"made": None}, "matcher() gave None, which has no consume and no mask and no may_end"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_backend_that_fails_is_blamed_itself(ranges: Any, odd: str) -> None:
    import grammar_kit

    changes, said = ODD[odd]
    place = type("Odd", (grammar_kit.Place,), changes)

    class Backend(ranges):  # type: ignore[misc]
        def matcher(self, compiled: bytes) -> Any:
            return None if "made" in changes else place(3, 4, 2)

    masks = Masks(
        Backend, vocab=VOCAB, blame=lambda call, error: PluginFault(f"The backend 'odd': {call}() failed with {described(error)}")
    )  # type: ignore[arg-type]
    out: list[Any] = []
    for message in (WORDS, opened(1, b""), opened(2, b""), asked(1, 1, 2), drawn(1, s1=3, s2=3), asked(2, 1, 2)):
        out += masks.handle(message)
    failed = [one for one in out if isinstance(one, GrammarFailed)]
    assert [(one.seq, one.broken) for one in failed] == [(1, True), (2, True)]
    assert all("The backend 'odd'" in one.error and said in one.error.replace("masks()", "mask()") for one in failed)
    assert bits(out[-1]) == [[], []]


def test_a_grammar_that_is_too_much_is_told_before_its_mask_of_zeros(ranges: Any) -> None:
    masks = Masks(ranges, vocab=VOCAB)
    for message in (WORDS, opened(1, b"[17,18,3]"), opened(2, b"[3,4,1]")):
        list(masks.handle(message))
    why, ready = masks.handle(asked(1, 1, 2))
    assert isinstance(why, GrammarFailed)
    assert isinstance(ready, MaskReady)
    assert ((why.seq, why.incarnation, why.error), bits(ready)) == ((1, 1, "It is seventeen."), [[], [3]])
    list(masks.handle(drawn(1, s1=-1, s2=3)))
    (ready,) = masks.handle(asked(2, 2))  # told once
    assert isinstance(ready, MaskReady)


def test_a_vocabulary_that_the_backend_cannot_use_fails_sequences_only() -> None:
    def no(tokens: list[bytes], special: list[int]) -> Any:
        raise RuntimeError("no")

    masks = Masks(no, vocab=VOCAB)
    list(masks.handle(WORDS))
    list(masks.handle(opened(1, b"[3,4,1]")))
    why, ready = masks.handle(asked(1, 1))
    assert isinstance(ready, MaskReady)
    assert bits(ready) == [[]]
    assert isinstance(why, GrammarFailed)
    assert why.broken
    assert "factory() failed with RuntimeError: no" in why.error


def test_the_end_waits_for_min_tokens_unless_nothing_else_is_left(ranges: Any) -> None:
    masks = Masks(ranges, vocab=VOCAB)
    list(masks.handle(WORDS))
    list(masks.handle(opened(1, b"[3,4,1]", min_tokens=5, outputs=(3,))))
    (ready,) = masks.handle(asked(1, 1))
    assert isinstance(ready, MaskReady)
    assert bits(ready) == [[END]]


def sample(step: int, **more: Any) -> Sample:
    return Sample(engine=0, epoch=1, step=step, rows=i32([0, 1]), slots=i32([0, 1]), positions=i32([4, 4]), **more)


def test_the_sampler_holds_a_step_until_its_mask_and_those_behind_it() -> None:
    sampler = Sampler(engine=0, epoch=1, masks=True)
    assert [type(m) for m in sampler.handle(sample(1))] == [DeviceWork]
    assert list(sampler.handle(sample(2, masked=True))) == []
    assert list(sampler.handle(sample(3))) == []
    assert list(sampler.handle(sample(4, masked=True))) == []
    with pytest.raises(ProtocolError):
        list(sampler.handle(MaskReady(step=4, rows=EMPTY_I32, mask=EMPTY_I32)))
    out = list(sampler.handle(MaskReady(step=2, rows=i32([1]), mask=i32([7] * 7))))
    steps = [m.sample for m in out if isinstance(m, DeviceWork) and m.sample is not None]
    assert [(s.step, s.masked, s.mask_rows.tolist()) for s in steps] == [(2, False, [-1, 0]), (3, False, [])]


def test_masks_behind_drafts_are_the_rows_own() -> None:
    sampler = Sampler(engine=0, epoch=1, masks=True)
    list(sampler.handle(sample(1, masked=True, lookahead=2)))
    (out,) = sampler.handle(MaskReady(step=1, rows=i32([1]), mask=i32([7] * 2 * 7), counts=i32([2])))
    assert isinstance(out, DeviceWork)
    assert out.sample is not None
    assert out.sample.mask_rows.tolist() == [-1, -1, -1, 0, 1, -2]


# ------------------------------------------------------------------ the whole engine


def admit(key: int, grammar: bytes = b"", *, n: int = 1, max_tokens: int = 30, **more: Any) -> Admit:
    outputs = more.pop("outputs", None)
    return Admit(
        key=key,
        incarnation=more.pop("incarnation", 1),
        prompt=i32([key % VOCAB, *range(20, 20 + key % 9)]),
        hashes=b"",
        root_hash=b"r" * 16,
        choices=i32(range(n)),
        sampling=SamplingParams(n=n, seed=key, **more),
        max_tokens=max_tokens,
        eos=i32([END]),
        arrival_ns=key,
        grammar=grammar,
        outputs=EMPTY_I32 if outputs is None else i32(outputs),
        output_counts=EMPTY_I32 if outputs is None else i32([len(outputs)]),
    )


def run(
    admits: list[Admit],
    *,
    host: bool = True,
    abort: int = 0,
    options: dict[str, Any] | None = None,
    steps: list[int] | None = None,
    **config: Any,
) -> dict[int, Any]:
    """seq -> (tokens, reason); -1 -> errors, -2 -> how often a sequence was preempted. `steps` gets how many there were."""
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, int] = {}
    errors: list[str] = []
    left: list[Any] = []
    wanted = sum(len(a.choices) for a in admits)

    def output(message: Any) -> None:
        if isinstance(message, StepTokens):
            errors.extend(message.errors)
            for seq, token, reason in zip(message.seqs.tolist(), message.tokens.tolist(), message.reasons.tolist(), strict=True):
                if token >= 0:
                    tokens.setdefault(seq, []).append(token)
                if reason:
                    reasons[seq] = reason

    async def main() -> None:
        plugins = PluginHost("engine", extra=["grammar_kit"] if host else []).load()
        built = build({"max_num_seqs": 6, "max_num_batched_tokens": 24, "block_size": 4, "admission_forecast": False, **config})
        device = FakeDevice(FakeOptions(**{"vocab_size": VOCAB, "depth": 2, **(options or {})}))
        engine = Engine(built, output=output, device=device, policy=FirstComeFirstServed(), plugins=plugins)
        try:
            async with trio.open_nursery() as nursery:
                facts = await engine.start(nursery)
                assert facts.grammars == ("ranges" if host else "llguidance")
                engine.post(WORDS, *admits)
                if abort:
                    engine.post(Abort(seqs=i64([seq_of(abort, 0)])))
                with trio.fail_after(20):
                    while len(reasons) < wanted:
                        await trio.sleep(0.001)
                assert engine._scheduler is not None
                left.append(engine._scheduler.leftovers())
                left.append(engine._scheduler._board.preemptions)
                if steps is not None:
                    steps.append(engine._scheduler.done_step)
                nursery.cancel_scope.cancel()
        finally:
            engine.close()

    trio.run(main)
    assert not {"obeying", "live"} & left[0].keys()
    return {seq: (tokens.get(seq, []), reason) for seq, reason in reasons.items()} | {-1: errors, -2: left[1]}


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_answer_obeys_and_others_are_as_ever(wiring: str, depth: int) -> None:
    admits = [admit(key, b"[%d,%d,%d]" % (key + 30, key + 33, key % 7 + 1), n=key % 3 + 1) for key in range(1, 12)]
    plain = [admit(key, temperature=1.0) for key in range(40, 46)]
    alone = run(plain, host=False, wiring=wiring, options={"depth": depth})
    found = run([*admits, *plain], wiring=wiring, options={"depth": depth})
    assert found.pop(-1) == []
    for a in admits:
        for choice in range(len(a.choices)):
            tokens, reason = found[seq_of(a.key, choice)]
            assert reason == STOP
            assert len(tokens) == a.key % 7 + 2
            assert tokens[-1] == END
            assert all(a.key + 30 <= token < a.key + 33 for token in tokens[:-1])
    assert all(found[seq_of(key, 0)] == alone[seq_of(key, 0)] for key in range(40, 46))


def test_who_obeys_has_no_drafts_and_those_beside_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is for one token: a step with drafts brings each row that obeys one."""
    monkeypatch.setattr(Widths, "choose", Widths.most)
    admits = [admit(key, b"[%d,%d,%d]" % (key + 30, key + 33, key % 7 + 1), n=key % 3 + 1) for key in range(1, 9)]
    admits += [admit(30, b"[41,45,6]", n=2, beam=Beam(width=3), temperature=0.0, max_tokens=12)]
    plain = [admit(key, temperature=1.0, max_tokens=60) for key in range(40, 46)]
    wide = run([*admits, *plain], options={"lookahead": 3, "drafts": ("right",)}, max_num_batched_tokens=40)
    assert wide == run([*admits, *plain], max_num_batched_tokens=40)


def fork_by(fork: Any, patch: pytest.MonkeyPatch) -> Any:
    """From here on places can be copied, by a class of their own: what a protocol once took for one that forks it goes on taking for one."""
    import grammar_kit

    forked: Any = type("Forked", (grammar_kit.Place,), {"fork": fork})
    patch.setattr(grammar_kit.Ranges, "matcher", lambda self, compiled: forked(*json.loads(compiled)))
    return forked


@pytest.mark.parametrize("backend", ["copied", "torn", "walked again"])
@pytest.mark.parametrize("kind", ["echo", "short", "wrong"])
def test_drafts_under_a_grammar(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that takes masks behind drafts. What may follow a draft is asked of a copy of the matcher: one that cannot be copied costs steps, no answers."""
    import copy

    def torn(self: Any) -> Any:
        raise RuntimeError("torn")

    monkeypatch.setattr(Widths, "choose", Widths.most)
    if backend != "walked again":
        fork_by(copy.copy if backend == "copied" else torn, monkeypatch)
    admits = [admit(key, b"[%d,%d,%d]" % (key + 30, key + 31 + key % 2, key % 7 + 9), n=key % 2 + 1) for key in range(1, 6)]
    admits += [admit(31, b"[50,51,90]", max_tokens=26)]
    alone = [admit(41, temperature=1.0, max_tokens=20)]
    beam = admit(30, b"[41,45,6]", n=2, beam=Beam(width=3), temperature=0.0, max_tokens=12)
    few, many = [], []
    right = run([*admits, *alone, beam], steps=many)
    options = {"lookahead": 3, "drafts": (kind,), "masks_ahead": True}
    for loose in (False, True):  # with two steps in flight the second's masks are asked for when the first has landed
        assert run([*admits, *alone, beam], options=options | {"loose": loose}, steps=few) == right
    if (kind, backend) == ("echo", "copied"):
        assert few[0] < 0.75 * many[0]
        assert few[1] < many[0]
    tight = run([*admits, *alone], options=options | {"num_blocks": 20})
    assert {seq: tight[seq] for seq in tight if seq >= 0} == {seq: right[seq] for seq in tight if seq >= 0}


@given(
    kinds=st.lists(st.sampled_from(["echo", "fair", "short", "wrong", "none"]), min_size=1, max_size=2),
    lookahead=st.integers(1, 4),
    ahead=st.booleans(),
    depth=st.integers(1, 3),
    loose=st.booleans(),
    blocks=st.sampled_from([14, 40, 200]),
    widths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    wishes=st.lists(st.sampled_from([None, True, False]), min_size=6, max_size=6),
    ranges=st.lists(st.tuples(st.integers(30, 60), st.integers(1, 3), st.integers(1, 12)), min_size=4, max_size=4),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_grammars_and_drafts_in_any_order_of_widths(
    kinds: list[str],
    lookahead: int,
    ahead: bool,
    depth: int,
    loose: bool,
    blocks: int,
    widths: list[int],
    wishes: list[bool | None],
    ranges: list[tuple[int, int, int]],
) -> None:
    """Whatever is drafted, wished and short of memory: the tokens are those without drafts."""
    import copy

    admits = [admit(key, b"[%d,%d,%d]" % (low, low + size, length), n=1 + key % 2) for key, (low, size, length) in enumerate(ranges, 1)]
    admits += [admit(key, temperature=1.0, max_tokens=20) for key in (40, 41)]
    right = run(admits, options={"depth": depth, "num_blocks": blocks})
    wishing = [msgspec.structs.replace(one, spec_decode=wish) for one, wish in zip(admits, wishes, strict=True)]
    turns = itertools.cycle(widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Widths, "choose", lambda self, rows: min(next(turns), self.most(rows)))
        fork_by(copy.copy, patch)
        options = {"depth": depth, "num_blocks": blocks, "lookahead": lookahead, "drafts": tuple(kinds), "masks_ahead": ahead}
        options["loose"] = loose
        found = run(wishing, options=options)
    assert {seq: one for seq, one in found.items() if seq != -2} == {seq: one for seq, one in right.items() if seq != -2}


def test_masks_behind_drafts_end_where_it_is_not_known_what_follows(ranges: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    forked = fork_by(copy.copy, monkeypatch)
    masks = Masks(ranges, vocab=VOCAB)
    for message in (WORDS, opened(1, b"[10,12,3]"), opened(2, b"[20,22,9]"), opened(3, b"[30,31,1]"), opened(4, b"[40,42,9]")):
        list(masks.handle(message))
    drafts = {"draft_counts": i32([2, 2, 2, 0]), "drafts": i32([10, 11, 20, 99, 30, END])}
    (ready,) = masks.handle(MaskRequest(step=1, rows=i32(range(4)), seqs=i64([1, 2, 3, 4]), incarnations=i32([1] * 4), **drafts))
    assert isinstance(ready, MaskReady)
    assert ready.counts.tolist() == [3, 2, 2, 1]
    found = np.unpackbits(ready.mask.view(np.uint8), bitorder="little").reshape(8, -1)
    assert [np.flatnonzero(row).tolist() for row in found] == [[10, 11]] * 3 + [[20, 21]] * 2 + [[30], [END]] + [[40, 41]]
    tokens = {"tokens": i32([10, 11, 10, 20, 30, END, 5, -1]), "counts": i32([3, 1, 3, 1])}
    list(masks.handle(Drawn(step=1, seqs=i64([1, 2, 3, 4]), incarnations=i32([1] * 4), **tokens)))
    del forked.fork
    drafts = {"draft_counts": i32([1, 1]), "drafts": i32([END, 20])}
    (ready,) = masks.handle(MaskRequest(step=2, rows=i32([0, 1]), seqs=i64([1, 2]), incarnations=i32([1, 1]), **drafts))
    assert isinstance(ready, MaskReady)
    assert ready.counts.tolist() == [1, 1], "the one ends there, the other cannot be copied"


def test_limits_preemption_and_aborts() -> None:
    admits = [admit(key, b"[50,90,%d]" % (20 + key), max_tokens=26) for key in range(1, 9)]
    plenty = run(admits)
    tight = run(admits, options={"num_blocks": 18}, abort=4)
    assert (plenty[-2], tight[-2] > 0) == (0, True)
    for a in admits:
        tokens, reason = plenty[seq_of(a.key, 0)]
        assert reason == (STOP if a.key < 6 else LENGTH)
        assert all(50 <= token < 90 or token == END for token in tokens)
        if a.key != 4:
            assert tight[seq_of(a.key, 0)] == (tokens, reason)  # preempted or not


def test_a_replay_goes_on_where_it_was() -> None:
    (whole, _) = run([admit(3, b"[50,90,9]")])[seq_of(3, 0)]
    rest, reason = run([admit(3, b"[50,90,9]", outputs=whole[:4], incarnation=2)])[seq_of(3, 0)]
    assert (whole[:4] + rest, reason) == (whole, STOP)


def test_a_grammar_that_fails_costs_its_own_sequence_alone() -> None:
    found = run([admit(1, b"[13,90,3]"), admit(2, b"[50,90,3]"), admit(3, b"garbage"), admit(4, temperature=0.0)])
    assert [found[seq_of(key, 0)][1] for key in (1, 3)] == [FAILED, FAILED]
    assert found[seq_of(2, 0)][1] == STOP
    assert sorted(text.split("failed with ")[1][:12] for text in found[-1]) == ["JSONDecodeEr", "RuntimeError"]
    assert all("The grammar backend 'ranges' (plugin 'grammar_kit' of package 'grammar_kit') is broken" in text for text in found[-1])
    assert len(found[seq_of(4, 0)][0]) == 30 or found[seq_of(4, 0)][1] == STOP


def test_a_grammar_that_is_too_much_is_blamed_by_name() -> None:
    found = run([admit(1, b"[17,90,3]", n=2), admit(2, b"[50,90,3]")])
    assert [found[seq_of(1, choice)][1] for choice in (0, 1)] == [FAILED, FAILED]
    assert found[seq_of(2, 0)][1] == STOP
    assert found[-1] == [f"{GRAMMAR_FAILED}It is seventeen."] * 2


# ------------------------------------------------------------------ beams


@pytest.fixture(params=["walked again", "copied"])
def branching(request: pytest.FixtureRequest) -> Any:
    """A backend whose places must walk their tokens again, and one whose places can be copied."""
    import copy

    import grammar_kit

    class Copied(grammar_kit.Place):  # type: ignore[misc, name-defined]
        fork = copy.copy

    class Copies(grammar_kit.Ranges):  # type: ignore[misc, name-defined]
        def matcher(self, compiled: bytes) -> Any:
            return Copied(*json.loads(compiled))

    return Copies if request.param == "copied" else grammar_kit.Ranges


def beams(source: bytes, *seqs: int) -> GrammarOpen:
    return GrammarOpen(
        seqs=i64(seqs), incarnation=1, grammar=source, ends=i32([END]), min_tokens=2, output_counts=i32([0] * len(seqs)), beams=True
    )


def test_beams_go_on_from_where_others_were(branching: Any) -> None:
    """Of a step all places are as they were before it; what becomes of one is nothing to the other."""
    masks = Masks(branching, vocab=VOCAB)
    for message in (WORDS, beams(b"[10,12,2]", 1, 2, 3), opened(9, b"[10,12,1]", outputs=(10,))):
        list(masks.handle(message))
    list(masks.handle(asked(1, 1, 2, 3, 9)))
    rows: dict[str, Any] = {"seqs": i64([1, 2, 3, 9]), "incarnations": i32([1] * 4)}
    list(masks.handle(Drawn(step=1, tokens=i32([10, 11, -1, END]), sources=i64([1, 2, 3, 9]), **rows)))
    (ready,) = masks.handle(asked(2, 1, 2, 3))
    assert bits(ready) == [[10, 11]] * 3
    rows = {"seqs": i64([1, 2, 3]), "incarnations": i32([1] * 3)}
    list(masks.handle(Drawn(step=2, tokens=i32([11, 10, 10]), sources=i64([3, 1, 1]), **rows)))
    (ready,) = masks.handle(asked(3, 1, 2, 3))
    assert bits(ready) == [[10, 11], [END], [END]], "the first goes on from where the third was: nothing had been drawn for it"
    list(masks.handle(beams(b"[10,12,2]", 1, 2, 3)))  # the search begins anew
    list(masks.handle(Drawn(step=3, tokens=i32([-1] * 3), **rows)))
    (ready,) = masks.handle(asked(4, 2))
    assert bits(ready) == [[10, 11]]


def test_a_place_that_cannot_be_copied_costs_its_beam_alone() -> None:
    import grammar_kit

    class Torn(grammar_kit.Place):  # type: ignore[misc, name-defined]
        def fork(self) -> Any:
            raise RuntimeError("torn")

    class Tears(grammar_kit.Ranges):  # type: ignore[misc, name-defined]
        def matcher(self, compiled: bytes) -> Any:
            return Torn(*json.loads(compiled))

    masks = Masks(Tears, vocab=VOCAB)
    for message in (WORDS, beams(b"[10,12,2]", 1, 2)):
        list(masks.handle(message))
    list(masks.handle(asked(1, 1, 2)))
    list(masks.handle(Drawn(step=1, seqs=i64([1, 2]), incarnations=i32([1, 1]), tokens=i32([10, 11]), sources=i64([1, 1]))))
    *failed, ready = masks.handle(asked(2, 1, 2))
    assert len(failed) == 1
    assert bits(ready) == [[10, 11], []]


def searched(found: dict[int, Any], key: int, n: int) -> list[Any]:
    return [found[seq_of(key, choice)] for choice in range(n)]


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_a_searchs_answers_obey_and_come_best_first(wiring: str) -> None:
    """Beside others with and without grammars; with so little memory that searches begin anew, they find the same."""
    admits = [
        admit(key, b"[%d,%d,%d]" % (key + 30, key + 34, key % 5 + 6), n=2 + key % 2, beam=Beam(width=4), temperature=0.0, max_tokens=12)
        for key in range(11, 15)
    ]
    others = [admit(key, b"[50,90,25]") for key in range(1, 3)] + [admit(20, temperature=1.0)]
    plenty = run([*admits, *others], wiring=wiring)
    alone = {}
    for one in [*admits, *others]:
        alone |= run([one], wiring=wiring)
    tight = run([*admits, *others], wiring=wiring, options={"num_blocks": 22})
    assert tight.pop(-2) > 0
    for found in (plenty, alone):
        assert found.pop(-2) == 0
    assert plenty == alone == tight
    for one in admits:
        answers = searched(plenty, one.key, len(one.choices))
        assert len({tuple(tokens) for tokens, _ in answers}) == len(answers)
        for tokens, reason in answers:
            assert (reason, len(tokens), tokens[-1]) == (STOP, one.key % 5 + 7, END)
            assert all(one.key + 30 <= token < one.key + 34 for token in tokens[:-1])


def test_a_search_with_fewer_answers_than_beams() -> None:
    """Only so many answers are of the grammar: the best are found all the same, and those that there are not are an error that says how many there are."""
    found = run([admit(1, b"[50,53,1]", n=5, beam=Beam(width=5), temperature=0.0)])
    assert sorted(tokens for tokens, reason in searched(found, 1, 3)) == [[token, END] for token in (50, 51, 52)]
    assert [reason for _, reason in searched(found, 1, 5)] == [STOP] * 3 + [FAILED] * 2
    assert found[-1] == [f"{FEWER_ANSWERS}3"] * 2


def test_a_search_whose_grammar_is_too_much_or_allows_nothing() -> None:
    found = run([admit(1, b"[17,90,3]", n=2, beam=Beam(width=3), temperature=0.0), admit(2, b"[50,90,3]")])
    assert [reason for _, reason in searched(found, 1, 2)] == [FAILED] * 2
    assert found[-1] == [f"{GRAMMAR_FAILED}It is seventeen."] * 2
    assert found[seq_of(2, 0)][1] == STOP
    found = run([admit(1, b"[50,50,3]", n=1, beam=Beam(width=3), temperature=0.0)])
    assert (found[seq_of(1, 0)], found[-1]) == (([], FAILED), [f"{FEWER_ANSWERS}0"])


def test_a_search_that_is_cut_off_and_one_that_is_cancelled() -> None:
    found = run([admit(1, b"[50,53,20]", n=3, beam=Beam(width=3), temperature=0.0, max_tokens=6)])
    for tokens, reason in searched(found, 1, 3):
        assert (len(tokens), reason) == (6, LENGTH)
        assert set(tokens) <= {50, 51, 52}
    found = run([admit(1, b"[50,53,20]", n=2, beam=Beam(width=3), temperature=0.0), admit(2, b"[50,90,3]")], abort=1)
    assert found[seq_of(2, 0)][1] == STOP
