"""Answers that text takes apart: rows of channels, ends, which requests, which formats."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from penstock.core.actors.text.formats import Formats
from penstock.core.contract.formats import Fragment
from penstock.core.contract.hookspecs import FormatSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, DONE, LENGTH, NAME, REASONING, STOP, Abort, Drain, Tick, seq_of, union_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.frames import FrameDecoder, encode
from penstock.plugins.formats import BUILT_IN
from penstock.plugins.formats.scanner import State, TableSplitter, read_text, table

SPECS = {spec.name: spec for spec in BUILT_IN}
TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}]).encode()
MESSAGES = json.dumps([{"role": "user", "content": "the water"}]).encode()
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def say(make_bench: Any, tokenizer: Any) -> Callable[..., Any]:
    """Submit a chat whose answer is `text`, run it, and give (bench, what was received)."""

    def run(
        text: str,
        *,
        tools: str | None = "hermes",
        reasoning: str | None = None,
        final: int = STOP,
        sampling: SamplingParams | None = None,
        tools_given: bytes = TOOLS,
        **changes: Any,
    ) -> Any:
        formats = Formats(SPECS[tools] if tools else None, SPECS[reasoning] if reasoning else None)
        bench = make_bench(formats=formats)
        ids = [int(token) for token in tokenizer.encode_batch([text], add_special_tokens=False)[0]]
        bench.scripts[seq_of(1, 0)] = [*ids, tokenizer.eos_ids[0]] if final == STOP else ids
        bench.final = final
        values = {"kind": "chat", "messages": MESSAGES, "tools": tools_given, "split": True, **changes}
        bench.submit(1, sampling=sampling or SamplingParams(), **values)
        if 1 not in bench.rejected:
            bench.run()
        return bench, bench.received.get((1, 0))

    return run


def joined(fragments: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    out: list[tuple[int, int, str]] = []
    for channel, call, text in fragments:
        if out and out[-1][:2] == (channel, call):
            out[-1] = (channel, call, out[-1][2] + text)
        elif text or channel == DONE:
            out.append((channel, call, text))
    return out


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_comes_in_rows_of_its_own(say: Any, stream: bool) -> None:
    bench, got = say("Let me see. " + CALL, stream=stream)
    assert joined(got.fragments) == [(CONTENT, -1, "Let me see."), (NAME, 0, "f"), (ARGUMENTS, 0, '{"a": 1}'), (DONE, 0, "")]
    assert got.reason == "tool_calls"
    (call_id,) = [extra.call_id for extra in got.extras if extra.call_id]
    assert call_id.startswith("call_")
    assert len(call_id) == 29
    assert got.tokens == bench.scripts[seq_of(1, 0)]
    assert bench.finished[1].reasoning_tokens == 0


def test_mistral_gets_ids_of_nine_letters_and_digits(say: Any) -> None:
    _, got = say('[TOOL_CALLS]f[ARGS]{"a": 1}', tools="mistral")
    (call_id,) = [extra.call_id for extra in got.extras if extra.call_id]
    assert len(call_id) == 9
    assert call_id.isalnum()


@pytest.mark.parametrize("changes", [{"tools_given": b""}, {"split": False}])
def test_without_tools_calls_are_text(say: Any, changes: dict[str, Any]) -> None:
    """However the server is set: what one request asks for is not done to another's answer."""
    _, got = say(CALL, **changes)
    assert (got.text, got.reason) == (CALL, "stop")
    assert {fragment[0] for fragment in got.fragments} == {CONTENT}


def test_tools_of_a_model_whose_format_is_unknown_are_refused(say: Any) -> None:
    bench, _ = say("x", tools=None)
    refused = bench.rejected[1]
    assert (refused.status, refused.code, refused.param) == (400, "unsupported_feature", "tools")
    assert not bench.actor.ledger.requests


def test_reasoning_and_a_call(say: Any) -> None:
    text = "<think>Stop here.</think>Yes. " + CALL
    bench, got = say(text, reasoning="qwen3")
    assert joined(got.fragments)[:3] == [(REASONING, -1, "Stop here."), (CONTENT, -1, "Yes."), (NAME, 0, "f")]
    assert 0 < bench.finished[1].reasoning_tokens < len(got.tokens)
    bench, got = say("<think>Stop " + CALL, reasoning="qwen3", final=LENGTH)
    assert joined(got.fragments) == [(REASONING, -1, "Stop " + CALL)]
    assert got.reason == "length"


def test_an_answer_that_is_cut_off_in_a_call(say: Any) -> None:
    _, got = say(CALL[:-20], final=LENGTH)
    assert joined(got.fragments) == [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a": 1}'[: len(joined(got.fragments)[1][2])])]
    assert got.reason == "length"
    assert not any(extra.unfinished for extra in got.extras)


def test_without_parallel_calls_the_answer_ends_with_the_first(say: Any) -> None:
    bench, got = say(CALL + "\n" + CALL + " and more", parallel_calls=False)
    assert joined(got.fragments) == [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a": 1}'), (DONE, 0, "")]
    assert got.reason == "tool_calls"
    assert any(isinstance(message, Abort) for message in bench.engine)
    assert not bench.actor.ledger.requests


def test_a_stop_string_within_a_call_leaves_it_incomplete(say: Any) -> None:
    _, got = say(CALL, sampling=SamplingParams(stop=["1"]))
    assert joined(got.fragments) == [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a": ')]
    assert (got.reason, got.stop_reason) == ("length", "1")
    assert got.extras[-1].unfinished, "for whom length means that tokens ran out"


def test_a_stop_string_that_closes_a_call_leaves_it_complete(say: Any) -> None:
    _, got = say(CALL, sampling=SamplingParams(stop=["</tool_call>"]))
    assert joined(got.fragments) == [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a": 1}'), (DONE, 0, "")]
    assert (got.reason, got.stop_reason, got.extras[-1].unfinished) == ("tool_calls", "</tool_call>", False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("text", "calls"),
    [(CALL[:-20], 1), (CALL[:-15] + "</tool_call>", 1), (CALL[:-15] + "</tool_call>" + CALL, 2)],
    ids=["its own end", "broken", "one of two"],
)
def test_arguments_that_are_no_json_come_with_length_alone(say: Any, text: str, calls: int, stream: bool) -> None:
    """Whatever ended the answer: a client must not take the call for a finished one."""
    _, got = say(text, stream=stream)
    names = [fragment for fragment in joined(got.fragments) if fragment[0] == NAME]
    done = [fragment for fragment in joined(got.fragments) if fragment[0] == DONE]
    assert (len(names), len(done), got.reason) == (calls, calls - 1, "length")
    assert got.extras[-1].unfinished


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "qwen3_coder", "pythonic"])
def test_a_function_that_is_not_among_the_tools_stays_content(say: Any, name: str, stream: bool) -> None:
    text = {
        "hermes": '<tool_call>\n{"name": "get_paris", "arguments": {"a": 1}}\n</tool_call>',
        "llama3_json": '{"name": "get_paris", "parameters": {"a": 1}}',
        "mistral": '[TOOL_CALLS]get_paris[ARGS]{"a": 1}',
        "qwen3_coder": "<tool_call>\n<function=get_paris>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "pythonic": "[get_paris(a=1)]",
    }[name]
    _, got = say(text, tools=name, stream=stream)
    assert joined(got.fragments) == [(CONTENT, -1, text)]
    assert got.reason == "stop"


def test_plain_answers_have_no_columns_of_channels(say: Any) -> None:
    bench, got = say("the water runs", tools="hermes", split=False)
    deltas = [message for _, message in bench.out if type(message).__name__ == "TextDelta"]
    assert deltas
    assert all(len(delta.channels) == len(delta.calls) == 0 for delta in deltas)
    assert got.text == "the water runs"


def test_special_tokens_that_are_marks_are_seen_and_others_are_not(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """<|im_start|> is special, and here a mark; <|bos|> is special and none."""
    marks = table(
        content=State(read_text, {"<|im_start|>": "thought"}), thought=State(read_text, {"<|im_start|>": "content"}, channel=REASONING)
    )
    monkeypatch.setitem(
        SPECS,
        "marked",
        FormatSpec(
            name="marked",
            api_level=1,
            role="reasoning",
            marks=["<|im_start|>"],
            matches=lambda template: False,
            factory=lambda opening: TableSplitter(marks, "content"),
        ),
    )
    _, got = say("one<|bos|><|im_start|>two<|bos|><|im_start|>three", reasoning="marked")
    assert joined(got.fragments) == [(CONTENT, -1, "one"), (REASONING, -1, "two"), (CONTENT, -1, "three")]


# ------------------------------------------------------------------ which format


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("<tool_call>", "hermes", None),
        ("<tool_call> </think>", "hermes", "qwen3"),
        ("<tool_call><function=", "qwen3_coder", None),
        ("<tool_call><function=</think>", "qwen3_coder", "qwen3"),
        ("<tool_call><arg_key></think>", "glm45", "qwen3"),
        ("<seed:tool_call><function=<seed:think>", "seed_oss", "seed_oss_reasoning"),
        ("<minimax:tool_call><invoke name=<think></think>", "minimax_m2", "qwen3"),
        ("<minimax:tool_call><tool_calls>", "minimax_m2", None),
        ("<｜tool_call_begin｜></think>", "step3", "qwen3"),
        ("<｜DSML｜function_calls></think>", "deepseek_v32", "qwen3"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", "kimi_k2_reasoning"),
        ("<|tool_call|>", "granite", None),
        ("Here is my thought process: Here is my response:<|tool_call|>", "granite", "granite_reasoning"),
        ("<tool_calls>", "jamba", None),
        ("<tool_calls><think></think><answer>", "jamba", "hunyuan_reasoning"),
        ("<tool_call></think><response>", "hermes", "ernie45_reasoning"),
        ("<|tool|><|/tool|>", "phi4_mini_json", None),
        ("<|plugin|>", "internlm", None),
        ("<|START_ACTION|><|START_THINKING|>", "cohere_command", "cohere_command"),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral_reasoning"),
        ("◁think▷", None, "kimi_reasoning"),
        ("[TOOL_CALLS]", "mistral", None),
        ("<｜Assistant｜></think><｜tool▁call▁begin｜>```json", "deepseek_v3", "deepseek_r1"),
        ("<｜tool▁call▁begin｜>", "deepseek_v31", None),
        ("<|python_tag|>", "llama3_json", None),
        ("<|python_start|>", "pythonic", None),
        ("<|channel|><|message|>", "openai", "openai"),
        ("", None, None),
    ],
)
def test_formats_are_found_from_the_template(template: str, tools: str | None, reasoning: str | None) -> None:
    found = Formats.choose(SPECS, template, Config())
    assert (found.tools and found.tools.name, found.reasoning and found.reasoning.name) == (tools, reasoning)


def test_formats_by_name_alias_and_none() -> None:
    def chosen(**options: str) -> tuple[str | None, str | None]:
        found = Formats.choose(SPECS, "<tool_call></think>", Config(**options))  # type: ignore[arg-type]
        return found.tools and found.tools.name, found.reasoning and found.reasoning.name

    assert chosen(tool_call_parser="mistral") == ("mistral", "qwen3")
    assert chosen(tool_call_parser="deepseekv3", reasoning_parser="deepseek-r1") == ("deepseek_v3", "deepseek_r1")
    assert chosen(tool_call_parser="none", reasoning_parser="none") == (None, None)
    assert chosen(tool_call_parser="gpt-oss", reasoning_parser="harmony") == ("openai", "openai")
    for option in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} hermis: no such format"):
            chosen(**{option: "hermis"})


@pytest.mark.parametrize(
    ("option", "names"),
    [
        (
            "tool_call_parser",
            "deepseek_v3 deepseek_v31 deepseek_v32 ernie45 glm45 glm47 granite hermes hunyuan_a13b internlm jamba kimi_k2 llama3_json llama4_json"
            " llama4_pythonic minimax minimax_m2 mistral openai phi4_mini_json pythonic qwen3_coder qwen3_xml seed_oss step3 step3p5 xlam",
        ),
        (
            "reasoning_parser",
            "cohere_command3 cohere_command4 deepseek_r1 deepseek_v3 ernie45 glm45 glm47 granite holo2 hunyuan_a13b kimi_k2 mimo minimax_m2"
            " mistral nemotron_v3 olmo3 openai_gptoss qwen3 seed_oss step3 step3p5",
        ),
    ],
)
def test_formats_go_by_the_names_that_people_know(option: str, names: str) -> None:
    for name in names.split():
        found = Formats.choose(SPECS, "", Config(**{option: name}))  # type: ignore[arg-type]
        assert (found.tools or found.reasoning) is not None, name


def test_no_two_formats_have_one_name() -> None:
    for role in ("tools", "reasoning"):
        names = [name for spec in BUILT_IN if spec.role in (role, "both") for name in (spec.name, *spec.aliases)]
        assert len(names) == len(set(names))


def test_arguments_have_the_types_of_the_requests_own_tools(say: Any) -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    for kind, arguments in (("integer", '{"a": 1}'), ("string", '{"a": "1"}')):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": kind}}}}}]
        _, got = say(text, tools="qwen3_coder", tools_given=json.dumps(tools).encode())
        assert joined(got.fragments) == [(NAME, 0, "f"), (ARGUMENTS, 0, arguments), (DONE, 0, "")]
        assert got.reason == "tool_calls"


@pytest.mark.parametrize("reasoning", [None, "kimi_k2_reasoning"])
def test_kimi_gets_ids_that_count(say: Any, reasoning: str | None) -> None:
    one = "<|tool_call_begin|>functions.{}:7<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    text = "<think>Hm." if reasoning else ""
    text += "<|tool_calls_section_begin|>" + one.format("f") + one.format("g") + "<|tool_calls_section_end|>"
    tools = json.dumps([{"type": "function", "function": {"name": name}} for name in ("f", "g")]).encode()
    _, got = say(text, tools="kimi_k2", reasoning=reasoning, tools_given=tools)
    assert [extra.call_id for extra in got.extras if extra.call_id] == ["functions.f:0", "functions.g:1"]
    assert [fragment for fragment in joined(got.fragments) if fragment[0] == REASONING] == ([(REASONING, -1, "Hm.")] if reasoning else [])


class _Broken:
    """Fails on "!"."""

    channel = CONTENT

    def feed(self, text: str) -> list[Fragment]:
        if "!" in text:
            raise KeyError("no such state")
        return [Fragment(CONTENT, -1, text)]

    def flush(self, cut: bool) -> list[Fragment]:
        return []


@pytest.mark.parametrize("changes", [{}, {"parallel_calls": False}])
@pytest.mark.parametrize("text", ["! the water", "the water !"])
def test_a_format_that_fails_fails_its_answer_alone(say: Any, monkeypatch: pytest.MonkeyPatch, text: str, changes: dict[str, Any]) -> None:
    broken = FormatSpec(name="broken", api_level=1, role="tools", matches=lambda template: False, factory=lambda opening: _Broken())
    monkeypatch.setitem(SPECS, "broken", broken)
    bench, got = say(text, tools="broken", **changes)
    assert got.reason == "error"
    assert got.extras[-1].error == "The tokenizer or output format failed on this answer: KeyError: 'no such state'"
    assert not bench.actor.ledger.requests
    bench.scripts[seq_of(2, 0)] = [bench.tokenizer.eos_ids[0]]
    bench.submit(2)
    bench.run()
    assert bench.received[2, 0].reason == "stop"


# ------------------------------------------------------------------ a stranger's format


def strange(monkeypatch: pytest.MonkeyPatch, *answers: Any, flush: Any = ()) -> FormatSpec:
    """A plugin's format as the plugin host gives it: `feed` gives the answers one after the other, then content."""

    class Odd:
        channel = CONTENT

        def __init__(self, opening: Any) -> None:
            self.left = list(answers)

        def feed(self, text: str) -> Any:
            return self.left.pop(0) if self.left else [Fragment(CONTENT, -1, text)]

        def flush(self, cut: bool) -> Any:
            return list(flush) if isinstance(flush, tuple) else flush

    module = types.ModuleType("strange")
    spec = FormatSpec(name="odd", api_level=1, role="tools", matches=lambda template: False, factory=Odd)
    module.register_output_formats = hookimpl(_named("register_output_formats", lambda: [spec]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strange", module)
    return PluginHost("text", extra=["strange"]).load().output_formats()["odd"]


def _named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function


ONE = Fragment(CONTENT, -1, "x")
WRONG_FRAGMENTS: dict[str, tuple[Any, str]] = {
    "bytes": ([Fragment(CONTENT, -1, b"x")], "its text must be a str"),
    "no text": ([Fragment(CONTENT, -1, None)], "its text must be a str"),
    "half a pair": ([Fragment(CONTENT, -1, "\ud83d")], "half a surrogate pair"),
    "no channel": ([Fragment(77, -1, "x")], "no such channel"),
    "a channel as text": ([Fragment("content", -1, "x")], "must be int"),
    "a call of content": ([Fragment(CONTENT, 0, "x")], "belong to no call"),
    "arguments of nothing": ([Fragment(ARGUMENTS, 0, "{}")], "call 0 has no NAME yet"),
    "done of nothing": ([Fragment(DONE, 0, "")], "call 0 has no NAME yet"),
    "a second call first": ([Fragment(NAME, 1, "f")], "a NAME must begin call 0"),
    "a call twice": ([Fragment(NAME, 0, "f"), Fragment(NAME, 0, "f")], "a NAME must begin call 1"),
    "a name that is none": ([Fragment(NAME, 0, "")], "must be a function's"),
    "after the end": ([Fragment(NAME, 0, "f"), Fragment(DONE, 0, ""), Fragment(ARGUMENTS, 0, "x")], "call 0 has had its DONE"),
    "a text": ("x", "no list of Fragments"),
    "nothing": (None, "no list of Fragments"),
    "texts": (["x"], "this is no Fragment"),
}


@pytest.mark.parametrize("where", ["first", "later", "flush"])
@pytest.mark.parametrize("wrong", WRONG_FRAGMENTS)
def test_what_a_strangers_format_gives_is_checked_and_ends_its_answer_alone(
    say: Any, monkeypatch: pytest.MonkeyPatch, wrong: str, where: str
) -> None:
    answer, said = WRONG_FRAGMENTS[wrong]
    given = {"first": [answer], "later": [[ONE], [ONE], answer], "flush": []}[where]
    spec = strange(monkeypatch, *given, flush=(tuple(answer) if isinstance(answer, list) else answer) if where == "flush" else ())
    monkeypatch.setitem(SPECS, "odd", spec)
    bench, got = say("the water runs down the hill", tools="odd", stream=True)
    assert got.reason == "error"
    call = "flush" if where == "flush" else "feed"
    assert f"The output format 'odd' (plugin 'strange' of package 'strange') is broken: {call}() gave " in got.extras[-1].error
    assert said in got.extras[-1].error
    assert not bench.actor.ledger.requests
    bench.scripts[seq_of(2, 0)] = [bench.tokenizer.eos_ids[0]]
    bench.submit(2)
    bench.run()
    assert bench.received[2, 0].reason == "stop"


def test_a_strangers_format_that_is_well_is_not_felt(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = [Fragment(NAME, 0, "f"), Fragment(ARGUMENTS, 0, "{"), Fragment(ARGUMENTS, 0, "}"), Fragment(DONE, 0, "")]
    monkeypatch.setitem(SPECS, "odd", strange(monkeypatch, [ONE], [], call, [Fragment(REASONING, -1, "\u00e4")]))
    _, got = say("the water runs down", tools="odd", stream=True)
    assert joined(got.fragments)[:5] == [(CONTENT, -1, "x"), (NAME, 0, "f"), (ARGUMENTS, 0, "{}"), (DONE, 0, ""), (REASONING, -1, "\u00e4")]
    assert got.reason == "tool_calls"


def test_an_answer_that_is_ended_from_here_ends_though_its_format_fails(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stops: what the format held back is lost, the end is not."""
    bench = make_bench(formats=Formats(strange(monkeypatch, flush=None)))
    bench.scripts[seq_of(1, 0)] = list(range(40, 60))
    bench.submit(1, kind="chat", messages=MESSAGES, tools=TOOLS, split=True, stream=True)
    bench.step()
    bench.send(Drain(deadline_s=5.0))
    bench.send(Tick(now_ns=bench.clock.now_ns() + 6_000_000_000))
    assert bench.received[1, 0].reason == "abort"
    assert not bench.actor.ledger.requests


@pytest.mark.parametrize("text", [b"x", "\ud83d", None])
@pytest.mark.parametrize("at_end", [True, False])
def test_a_row_that_cannot_be_sent_ends_its_answer_and_not_the_edges_link(
    say: Any, monkeypatch: pytest.MonkeyPatch, text: Any, at_end: bool
) -> None:
    """Whoever made it: here a format that nobody checked."""

    class Odd(_Broken):
        def feed(self, piece: str) -> list[Fragment]:
            return [Fragment(CONTENT, -1, piece if at_end else text)]

        def flush(self, cut: bool) -> list[Fragment]:
            return [Fragment(CONTENT, -1, text)] if at_end else []

    spec = FormatSpec(name="odd", api_level=1, role="tools", matches=lambda template: False, factory=lambda opening: Odd())
    monkeypatch.setitem(SPECS, "odd", spec)
    bench, got = say("the water runs", tools="odd", stream=True)
    assert got.reason == "error"
    assert "half a surrogate pair" in got.extras[-1].error
    assert not bench.actor.ledger.requests
    for message in [message for _, message in bench.out if type(message).__name__ == "TextDelta"]:
        FrameDecoder(union_of("text>edge")).feed(encode(message))


def test_a_format_that_cannot_begin_refuses_its_request(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FormatSpec(name="odd", api_level=1, role="tools", matches=lambda template: False, factory=lambda opening: 1 / 0)  # type: ignore[arg-type,return-value]
    monkeypatch.setitem(SPECS, "odd", spec)
    bench, _ = say("the water runs", tools="odd")
    assert "ZeroDivisionError" in bench.rejected[1].message
