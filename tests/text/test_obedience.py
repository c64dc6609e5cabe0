"""Answers that must obey a grammar, in text: refusals, what the engine is told, and ends that wait until the answer is verified."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from penstock.core.actors.text.formats import Formats
from penstock.core.contract.layouts import Chain, Free, Obey, White, decode
from penstock.core.protocol.calling import calling_of, offered_of
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import (
    ARGUMENTS,
    CONTENT,
    FAILED,
    LENGTH,
    REASONING,
    RUNNING,
    STOP,
    Abort,
    Admit,
    Cancel,
    EngineDown,
    Grammar,
    GrammarChecked,
    Vocabulary,
    seq_of,
)
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.wording import GRAMMAR_FAILED, NOTHING_ALLOWED
from penstock.plugins.formats import BUILT_IN

WORD = Grammar(kind="regex", source="[a-z]+", field="guided_regex")


@pytest.fixture
def bench(make_bench: Any) -> Any:
    made = make_bench(up=False, grammars="some")
    made.up(grammars="some")
    return made


def compiled(bench: Any, **more: Any) -> list[Any]:
    check = bench.checks.pop(0)
    assert not check.verify
    sent: list[Any] = bench.send(GrammarChecked(job=check.job, **({"compiled": b"made"} | more)))
    return sent


def answer(bench: Any, key: int, text: str = "water", choice: int = 0, incarnation: int = 0, *, end: bool = True) -> list[int]:
    """The engine sends these tokens, and the model's end token."""
    (ids,) = bench.tokenizer.encode_batch([text], add_special_tokens=False)
    tokens = [*ids.tolist(), *([bench.tokenizer.eos_ids[0]] if end else [])]
    seq = seq_of(key, choice)
    bench.scripts[seq] = tokens
    bench.admitted.pop(seq, None)
    for offset, token in enumerate(tokens):
        bench.rows([(seq, incarnation, offset, token, STOP if end and offset == len(tokens) - 1 else RUNNING)])
    return ids.tolist()


def test_what_cannot_be_is_refused_before_anything_is_compiled(make_bench: Any) -> None:
    for text, engine in (("", "some"), ("some", ""), ("some", "other")):
        bench = make_bench(up=False, grammars=text)
        bench.up(grammars=engine)
        bench.submit(1, grammar=WORD)
        assert (bench.rejected[1].code, bench.rejected[1].param) == ("unsupported_feature", "guided_regex")
    bench = make_bench(up=False, grammars="some")
    bench.up(grammars="some")
    bench.submit(2, grammar=WORD, sampling=SamplingParams(ignore_eos=True))
    assert bench.rejected[2].param == "ignore_eos"
    bench.submit(3, grammar=Grammar(kind="regex", source="a" * (1 << 18) + "a", field="f"))
    assert (bench.rejected[3].status, bench.rejected[3].param) == (400, "f")
    assert not bench.checks
    assert not bench.actor.ledger.requests


def test_the_engine_learns_the_vocabulary_once_and_gets_the_compiled_grammar(bench: Any) -> None:
    bench.submit(1, grammar=WORD, sampling=SamplingParams(min_tokens=3, n=2))
    sent = compiled(bench)
    assert [type(m) for m in sent if isinstance(m, Vocabulary | Admit)] == [Vocabulary, Admit]
    (vocabulary,) = [m for m in sent if isinstance(m, Vocabulary)]
    assert int(vocabulary.counts.sum()) == len(vocabulary.data)
    assert set(vocabulary.special.tolist()) == set(bench.tokenizer.special_ids)
    (admit,) = [m for m in sent if isinstance(m, Admit)]
    assert (admit.grammar, admit.grammar_min_tokens, admit.sampling.min_tokens) == (b"made", 3, 0)
    bench.submit(2, grammar=WORD)
    assert [type(m) for m in compiled(bench) if isinstance(m, Vocabulary | Admit)] == [Admit]


def test_a_grammar_that_cannot_be_compiled_is_a_400(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    compiled(bench, compiled=b"", error="It is wrong.", error_param="guided_regex", error_code="unsupported_feature")
    refused = bench.rejected[1]
    assert (refused.status, refused.code, refused.param, refused.message) == (400, "unsupported_feature", "guided_regex", "It is wrong.")
    assert not bench.actor.ledger.requests
    assert bench.actor.admission.requests == 0


def test_a_request_that_was_cancelled_while_it_was_compiled_is_gone(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    bench.send(Cancel(key=1))
    compiled(bench)
    assert not bench.engine
    assert not bench.actor.ledger.requests


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_is_told_once_the_answer_is_verified(bench: Any, stream: bool) -> None:
    bench.submit(1, grammar=WORD, stream=stream)
    compiled(bench)
    ids = answer(bench, 1)
    assert 1 not in bench.finished
    (check,) = bench.checks
    assert (check.verify, check.ids.tolist(), check.stop) == (True, ids, "")
    bench.send(GrammarChecked(job=check.job))
    got = bench.received[1, 0]
    assert (got.text, got.reason, 1 in bench.finished) == ("water", "stop", True)
    assert len(bench.actor.ledger.choices) == 0
    assert bench.actor.ledger.free_slots == bench.actor.ledger.slots


def test_an_answer_that_does_not_obey_ends_as_an_error(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    compiled(bench)
    answer(bench, 1)
    bench.send(GrammarChecked(job=bench.checks.pop().job, error="No."))
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error, got.extras[-1].error_code) == ("error", "No.", "invalid_value")
    assert 1 in bench.finished


def test_one_choice_that_does_not_obey_ends_alone(bench: Any) -> None:
    bench.submit(1, grammar=WORD, sampling=SamplingParams(n=2))
    compiled(bench)
    answer(bench, 1)
    answer(bench, 1, choice=1)
    first, second = bench.checks
    bench.send(GrammarChecked(job=first.job, error="No."))
    bench.send(GrammarChecked(job=second.job))
    bad, good = bench.received[1, 0], bench.received[1, 1]
    assert (bad.reason, bad.extras[-1].error_code, bad.extras[-1].error_param) == ("error", "invalid_value", "guided_regex")
    assert (good.reason, good.text, 1 in bench.finished) == ("stop", "water", True)


def test_an_answer_that_could_not_be_looked_at_is_no_fault_of_the_clients(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    compiled(bench)
    answer(bench, 1)
    bench.send(GrammarChecked(job=bench.checks.pop().job, error="It takes too long.", error_status=500))
    assert bench.received[1, 0].extras[-1].error_code == "engine_failure"


def test_a_schema_and_the_beginning_of_the_answer_cannot_both_be_given(bench: Any) -> None:
    schema = Grammar(kind="json", source="{}", field="output_config.format.schema")
    messages = b'[{"role":"user","content":"a"},{"role":"assistant","content":"{"}]'
    bench.submit(1, kind="chat", messages=messages, prompt=None, grammar=schema, continue_final_message=True)
    refused = bench.rejected[1]
    assert (refused.status, refused.code, refused.param) == (400, "invalid_value", "output_config.format.schema")
    assert "continue_final_message" in refused.message


def test_a_stop_string_ends_a_part_and_that_is_the_clients_own(bench: Any) -> None:
    bench.submit(1, grammar=WORD, sampling=SamplingParams(stop=["te"]))
    compiled(bench)
    answer(bench, 1, end=False)
    (check,) = bench.checks
    assert (check.verify, check.stop, check.stop_stays) == (True, "te", False)
    bench.send(GrammarChecked(job=check.job, error="It ended too early."))
    got = bench.received[1, 0]
    assert (got.text, got.reason, got.extras[-1].error_code, got.extras[-1].error_param) == ("wa", "error", "invalid_value", "stop")


def test_a_stop_string_that_stays_is_part_of_what_is_judged(bench: Any) -> None:
    for key, stop in ((1, ["er"]), (2, [])):
        bench.submit(key, grammar=WORD, sampling=SamplingParams(stop=stop, include_stop_str_in_output=True))
        compiled(bench)
        answer(bench, key, end=not stop)
        check = bench.checks.pop()
        assert (check.stop, check.stop_stays) == ("er" if stop else "", bool(stop))
        bench.send(GrammarChecked(job=check.job))
        assert (bench.received[key, 0].text, bench.received[key, 0].reason) == ("water", "stop")


@pytest.mark.parametrize(
    ("settings", "said", "code", "param"),
    [
        ({"allowed_token_ids": [70, 71]}, NOTHING_ALLOWED, "invalid_value", "allowed_token_ids"),
        ({"stop_token_ids": [70], "logit_bias": {71: -100.0}}, NOTHING_ALLOWED, "invalid_value", "logit_bias"),
        ({}, GRAMMAR_FAILED + "It is too large.", "invalid_value", "guided_regex"),
        ({"allowed_token_ids": [70, 71]}, GRAMMAR_FAILED + "It is too large.", "invalid_value", "guided_regex"),
        ({}, NOTHING_ALLOWED, "engine_failure", None),
        ({"allowed_token_ids": [70, 71]}, "The device is gone.", "engine_failure", None),
    ],
)
def test_whose_fault_it_is_that_nothing_can_be_drawn(bench: Any, settings: dict[str, Any], said: str, code: str, param: str | None) -> None:
    bench.submit(1, grammar=WORD, sampling=SamplingParams(**settings))
    compiled(bench)
    bench.rows([(seq_of(1, 0), 0, 0, -1, FAILED)], errors=[said])
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error_code, got.extras[-1].error_param) == ("error", code, param)
    assert "guided_regex" in got.extras[-1].error or code == "engine_failure"
    assert "It is too large." in got.extras[-1].error or not said.startswith(GRAMMAR_FAILED)


def test_length_and_errors_need_no_verifying(bench: Any) -> None:
    bench.submit(1, grammar=WORD, sampling=SamplingParams(max_tokens=3))
    compiled(bench)
    bench.scripts[seq_of(1, 0)] = [70, 71, 72]
    bench.run()
    assert (bench.received[1, 0].reason, bench.checks) == ("length", [])


def test_choices_end_one_by_one_over_an_engines_death(bench: Any) -> None:
    """One answer is being verified when the engine dies: only the other one is replayed."""
    bench.submit(1, grammar=WORD, sampling=SamplingParams(n=2))
    compiled(bench)
    answer(bench, 1, choice=0)
    (check,) = bench.checks
    bench.scripts[seq_of(1, 1)] = [70, 71, 72]
    bench.send(EngineDown(engine=0, epoch=1, reason="gone"))
    bench.up(grammars="some")
    (admit,) = [m for m in bench.engine if isinstance(m, Admit)][1:]
    assert (admit.choices.tolist(), admit.grammar) == ([1], b"made")
    assert sum(isinstance(m, Vocabulary) for _, m in bench.out) == 2  # the new life knows nothing
    bench.send(GrammarChecked(job=check.job))
    assert (bench.received[1, 0].reason, 1 in bench.finished) == ("stop", False)
    bench.run()
    assert 1 in bench.finished


def test_a_death_while_the_last_answer_is_verified_changes_nothing(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    compiled(bench)
    answer(bench, 1)
    bench.send(EngineDown(engine=0, epoch=1, reason="gone"))
    bench.up(grammars="some")
    assert sum(isinstance(m, Admit) for m in bench.engine) == 1
    bench.send(GrammarChecked(job=bench.checks.pop().job))
    assert (bench.received[1, 0].reason, 1 in bench.finished) == ("stop", True)
    assert bench.submit(2)  # the lane counts on
    bench.scripts[seq_of(2, 0)] = i32([70, 71]).tolist()
    bench.run()
    assert 2 in bench.finished


def test_who_leaves_while_the_answer_is_verified_leaves_nothing_behind(bench: Any) -> None:
    bench.submit(1, grammar=WORD)
    compiled(bench)
    answer(bench, 1)
    bench.send(Cancel(key=1))
    bench.send(GrammarChecked(job=bench.checks.pop().job, error="No."))
    assert not bench.actor.ledger.requests
    assert bench.actor.ledger.free_slots == bench.actor.ledger.slots


# ------------------------------------------------------------------ answers that are taken apart

SPECS = {spec.name: spec for spec in BUILT_IN}
SPECS["unspelt"] = msgspec.structs.replace(SPECS["hermes"], name="unspelt", spelling=None)
MESSAGES = json.dumps([{"role": "user", "content": "the water"}]).encode()
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": NUMBER, "strict": True}} for name in ("f", "g")
]
OBJECT = Grammar(kind="json", source='{"type":"object"}', field="response_format")


def spelt(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture
def ask(make_bench: Any) -> Any:
    """A bench whose request 1 is admitted: its answers may be said."""

    def begin(
        choice: Any = None, *, grammar: Grammar | None = None, tools: str | None = "hermes", reasoning: str | None = "qwen3", **more: Any
    ) -> Any:
        bench = make_bench(
            up=False, grammars="some", formats=Formats(SPECS[tools] if tools else None, SPECS[reasoning] if reasoning else None)
        )
        bench.up(grammars="some")
        calling = calling_of(offered_of(TOOLS), choice, grammar.field if grammar else "") if tools else None
        given = {"tools": json.dumps(TOOLS).encode()} if tools else {}
        bench.submit(1, kind="chat", messages=MESSAGES, split=True, grammar=grammar, calling=calling, **given, **more)
        if 1 not in bench.rejected:
            compiled(bench)
        return bench

    return begin


def parts(bench: Any) -> list[tuple[str, str, str]]:
    (check,) = bench.checks
    assert check.verify
    return [(part.grammar.kind, part.grammar.field, part.text) for part in check.parts]


def settle(bench: Any, error: str = "") -> Any:
    bench.send(GrammarChecked(job=bench.checks.pop(0).job, error=error))
    return bench.received[1, 0]


CHECKED = ("json", "tools[0].function.parameters", '{"a": 1}')


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("choice", "reason"), [("required", "tool_calls"), (None, "tool_calls"), ({"type": "function", "function": {"name": "f"}}, "stop")]
)
def test_calls_are_verified_before_the_end_is_told(ask: Any, choice: Any, reason: str, stream: bool) -> None:
    bench = ask(choice, stream=stream)
    tokens = answer(bench, 1, "<think>Hm</think>" + spelt("f", '{"a": 1}'))
    assert (1 in bench.finished, bench.received[1, 0].reason) == (False, "")
    assert parts(bench) == [CHECKED]
    got = settle(bench)
    assert (got.reason, 1 in bench.finished) == (reason, True)
    assert got.tokens == [*tokens, bench.tokenizer.eos_ids[0]]
    said = "".join(text for channel, _, text in got.fragments if channel == ARGUMENTS)
    assert (said, bench.finished[1].reasoning_tokens > 0) == ('{"a": 1}', True)
    assert bench.actor.ledger.free_slots == bench.actor.ledger.slots


def test_a_call_that_does_not_obey_ends_as_an_error(ask: Any) -> None:
    bench = ask("required")
    answer(bench, 1, spelt("f", '{"a": "x"}'))
    got = settle(bench, "No.")
    assert (got.reason, got.extras[-1].error, got.extras[-1].error_code) == ("error", "No.", "invalid_value")


@pytest.mark.parametrize(
    ("choice", "text", "wrong"),
    [
        ("required", "hello", "It calls no function."),
        ("required", "hello " + spelt("f", "{}"), "It says more than its calls."),
        ("required", spelt("h", "{}"), "It calls no function."),
        ({"type": "function", "function": {"name": "f"}}, spelt("g", "{}"), "It calls the function 'g', which may not be called."),
        ({"type": "function", "function": {"name": "f"}}, spelt("f", "{}") + spelt("f", "{}"), "It has more than one call."),
    ],
)
def test_an_answer_of_another_shape_ends_as_an_error(ask: Any, choice: Any, text: str, wrong: str) -> None:
    """An engine that does not mask, say."""
    bench = ask(choice)
    answer(bench, 1, text)
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error, bench.checks) == ("error", f"The answer does not obey tool_choice. {wrong}", [])
    assert 1 in bench.finished


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_an_answer_that_is_cut_off_before_its_call_begins_says_nothing(ask: Any, choice: Any, stream: bool) -> None:
    """Content is not allowed: the beginning of a call's markup is none, either."""
    text = spelt("f", '{"a": 1}')
    for size in range(1, len(text)):
        bench = ask(choice, stream=stream)
        (ids,) = bench.tokenizer.encode_batch(["<think>Hm</think>" + text[:size]], add_special_tokens=False)
        bench.admitted.pop(seq_of(1, 0), None)
        for offset, token in enumerate(ids.tolist()):
            bench.rows([(seq_of(1, 0), 0, offset, token, LENGTH if offset == len(ids) - 1 else RUNNING)])
        got = bench.received[1, 0]
        assert (got.reason, [part for channel, _, part in got.fragments if channel == CONTENT and part]) == ("length", [])


def test_content_alone_needs_no_verifying_where_only_calls_must_obey(ask: Any) -> None:
    bench = ask()
    answer(bench, 1, "hello")
    assert (bench.received[1, 0].reason, bench.received[1, 0].text, bench.checks) == ("stop", "hello", [])


@pytest.mark.parametrize(
    ("text", "checked"),
    [
        ('<think>{"no": </think>\n\n{"a": 2}', ("json", "response_format", '{"a": 2}')),
        (spelt("f", '{"a": 1}'), CHECKED),
    ],
)
def test_with_tools_and_a_grammar_an_answer_is_calls_or_obeys(ask: Any, text: str, checked: tuple[str, str, str]) -> None:
    bench = ask(grammar=OBJECT)
    answer(bench, 1, text)
    assert parts(bench) == [checked]
    assert settle(bench).reason == ("tool_calls" if checked == CHECKED else "stop")


def test_the_grammar_is_the_answer_channels(ask: Any) -> None:
    bench = ask(grammar=WORD, tools=None)
    answer(bench, 1, "<think>ABC</think>\nwater")
    assert parts(bench) == [("regex", "guided_regex", "water")]
    got = settle(bench)
    reasoning = "".join(text for channel, _, text in got.fragments if channel == REASONING)
    content = "".join(text for channel, _, text in got.fragments if channel == CONTENT)
    assert (reasoning, content, got.reason) == ("ABC", "water", "stop")


def test_what_an_engine_is_told_depends_on_the_prompts_end(make_bench: Any) -> None:
    bench = make_bench(up=False, grammars="some", formats=Formats(None, SPECS["deepseek_r1"]))
    bench.up(grammars="some")
    bench.submit(1, kind="chat", messages=MESSAGES, split=True, grammar=WORD)
    (check,) = bench.checks
    assert (check.grammar.kind, check.grammar.field) == ("layout", "guided_regex")
    assert decode(check.grammar.source) == Chain([Free(["</think>"], then="</think>"), White(), Obey("regex", "[a-z]+", "guided_regex")])


def test_one_call_at_most_ends_with_it(ask: Any) -> None:
    bench = ask("required", parallel_calls=False)
    text = spelt("f", '{"a": 1}')
    answer(bench, 1, text + spelt("g", "{}"), end=False)
    assert parts(bench) == [CHECKED]
    assert any(isinstance(message, Abort) for message in bench.engine)
    assert settle(bench).reason == "tool_calls"


def test_a_stop_string_within_a_call_is_the_clients_own(ask: Any) -> None:
    bench = ask("required", sampling=SamplingParams(stop=["1"]))
    answer(bench, 1, spelt("f", '{"a": 1}'), end=False)
    assert parts(bench) == [("json", "tools[0].function.parameters", '{"a": ')]
    got = settle(bench, "It is not valid JSON.")
    assert (got.reason, got.extras[-1].error_code) == ("error", "invalid_value")


def test_a_call_that_max_tokens_cuts_is_a_part(ask: Any) -> None:
    bench = ask("required", sampling=SamplingParams(max_tokens=9))
    (ids,) = bench.tokenizer.encode_batch([spelt("f", '{"a": 1}')], add_special_tokens=False)
    bench.scripts[seq_of(1, 0)] = ids.tolist()[:9]
    bench.run()
    assert (bench.received[1, 0].reason, bench.checks) == ("length", [])


def test_two_choices_of_calls_over_an_engines_death(ask: Any) -> None:
    """What a choice said stays with text; the engine walks its tokens again."""
    bench = ask("required", sampling=SamplingParams(n=2))
    answer(bench, 1, spelt("f", '{"a": 1}'))
    (ids,) = bench.tokenizer.encode_batch([spelt("g", '{"a": 2}')], add_special_tokens=False)
    tokens = [*ids.tolist(), bench.tokenizer.eos_ids[0]]
    bench.scripts[seq_of(1, 1)] = tokens
    for offset, token in enumerate(tokens[:20]):
        bench.rows([(seq_of(1, 1), 0, offset, token, RUNNING)])
    bench.admitted[seq_of(1, 1)] = (0, 20)
    bench.send(EngineDown(engine=0, epoch=1, reason="gone"))
    bench.up(grammars="some")
    (admit,) = [m for m in bench.engine if isinstance(m, Admit)][1:]
    assert (admit.choices.tolist(), admit.outputs.tolist(), admit.grammar) == ([1], tokens[:20], b"made")
    bench.final = STOP
    bench.run()
    first, second = bench.checks
    assert [part.text for check in (first, second) for part in check.parts] == ['{"a": 1}', '{"a": 2}']
    for check in (second, first):
        bench.send(GrammarChecked(job=check.job))
    assert [bench.received[1, choice].reason for choice in (0, 1)] == ["tool_calls", "tool_calls"]
    assert 1 in bench.finished


def test_who_leaves_while_calls_are_verified_leaves_nothing_behind(ask: Any) -> None:
    bench = ask("required")
    answer(bench, 1, spelt("f", '{"a": 1}'))
    bench.send(Cancel(key=1))
    bench.send(GrammarChecked(job=bench.checks.pop().job))
    assert not bench.actor.ledger.requests
    assert bench.actor.ledger.free_slots == bench.actor.ledger.slots


@pytest.mark.parametrize(("choice", "param"), [("required", "tool_choice"), (None, "tools[0].function.strict")])
def test_calls_that_cannot_be_spelt_are_refused(ask: Any, choice: Any, param: str) -> None:
    bench = ask(choice, tools="unspelt")
    refused = bench.rejected[1]
    assert (refused.status, refused.code, refused.param) == (400, "unsupported_feature", param)
    assert "'unspelt'" in refused.message
    assert not bench.checks


def test_ignore_eos_and_calls_are_refused(ask: Any) -> None:
    assert ask("required", sampling=SamplingParams(ignore_eos=True)).rejected[1].param == "ignore_eos"
