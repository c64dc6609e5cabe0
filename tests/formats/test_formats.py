"""Every format: what it makes of what models write, and that it does not matter how the text was cut."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.formats import Formats
from penstock.core.contract.formats import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Fragment, Opening, Splitter
from penstock.plugins.formats import BUILT_IN

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not

from corpus import CASES, TYPED, Calls, Case, schema

FORMATS = {spec.name: spec for spec in BUILT_IN}
Folded = tuple[str, str, Calls]


def fold(fragments: list[Fragment]) -> Folded:
    """What a client that joins the pieces has in the end; checks their order."""
    content = reasoning = ""
    calls: Calls = []
    for channel, call, text in fragments:
        if channel in (CONTENT, REASONING):
            assert call == -1
            assert text
            content += text if channel == CONTENT else ""
            reasoning += text if channel == REASONING else ""
        elif channel == NAME:
            assert call == len(calls)
            assert text
            calls.append((text, "", False))
        else:
            assert call == len(calls) - 1
            name, arguments, done = calls[-1]
            assert not done
            calls[-1] = (name, arguments + text, channel == DONE)
            assert channel in (ARGUMENTS, DONE)
    for _, arguments, done in calls:
        if done:
            json.loads(arguments)
    return content, reasoning, calls


def run(splitter: Splitter, pieces: list[str], cut: bool) -> Folded:
    out = [fragment for piece in pieces for fragment in splitter.feed(piece)]
    return fold(out + splitter.flush(cut))


def make(name: str, prompt: str = "", tools: bytes = b"") -> Splitter:
    return FORMATS[name].factory(Opening(prompt, False, tools))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}:{case.text[:40]}")
def test_the_corpus_at_once_by_character_and_by_token(case: Case) -> None:
    want = (case.content, case.reasoning, case.calls)
    for size in (max(1, len(case.text)), 1, 2, 3, 5, 7):
        pieces = [case.text[at : at + size] for at in range(0, len(case.text), size)]
        assert run(make(case.format, case.prompt, case.tools), pieces, case.cut) == want, size


WHOLE = [
    case
    for case in CASES
    if not case.cut
    and case.calls
    and all(call[2] for call in case.calls)
    and case.format not in ("hermes", "mistral")  # of which a few give what is no object as one, once they have it
]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.format}:{case.text[:40]}")
def test_arguments_that_are_cut_off_begin_those_of_the_whole_call(case: Case) -> None:
    """Wherever the answer is cut: never a half tag or name in them, nor what the next character makes something else of."""
    for size in range(len(case.text)):
        _, _, calls = run(make(case.format, case.prompt, case.tools), [case.text[:size]], True)
        for (name, arguments, _), (whole_name, whole, _) in zip(calls, case.calls, strict=False):
            if name == whole_name:
                assert whole.startswith(arguments.rstrip("\ufffd")), (size, arguments)


# What the formats are made of, in any order: most of it is broken.
ATOMS = [
    *sorted({mark for spec in BUILT_IN for mark in spec.marks}),
    *(
        '{"name": "f", "arguments": ',
        '{"name": "f", "parameters": {"a": 1}}',
        '"arguments": {}',
        '"name": "g"',
        "function",
        "analysis",
        "<function=f>",
        "<parameter=a>",
        "</parameter>",
        "</function>",
        "</invoke>",
        '<invoke name="f">',
        '<parameter name="a">',
        '<steptml:invoke name="f">',
        '<steptml:parameter name="a">',
        "</steptml:parameter>",
        "<｜DSML｜function_calls>",
        '<｜DSML｜invoke name="f">',
        '<｜DSML｜parameter name="a" string="false">',
        "</｜DSML｜parameter>",
        "functools[",
        "functions.f:0",
        "Here is my thought process:",
        "Here is my response:",
        "final",
    ),
    *("{", "}", "[", "]", '"', "\\", ",", ":", ";", "(", ")", "=", "'", "f(a=1)", "[f(", "null", "12", "```json", "```", "to=functions.f "),
    *(" ", "\n", "  \n\n", "x", "ä", "🙂", "text", " more text", "<", "</", " " * 70),
]
TEXTS = st.lists(st.one_of(st.sampled_from(ATOMS), st.sampled_from([case.text for case in CASES]), st.text(max_size=4)), max_size=14).map(
    "".join
)


def cut_at(text: str, edges: list[int]) -> list[str]:
    at = sorted({0, len(text), *(edge % (len(text) + 1) for edge in edges)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


@pytest.mark.parametrize("name", FORMATS)
@given(
    text=TEXTS,
    edges=st.lists(st.integers(0, 400), max_size=30),
    cut=st.booleans(),
    prompt=st.sampled_from(["", "<think>\n", "</think>"]),
    tools=st.sampled_from([b"", schema(a={"type": "string"}), schema(a={"type": "integer"}), schema(a={"type": ["null", "string"]})]),
)
@settings(max_examples=300, deadline=None)
@example(text='<tool_call>{"name": "f", "arguments": ""}', edges=[], cut=False, prompt="", tools=b"")
def test_how_the_text_is_cut_does_not_matter(name: str, text: str, edges: list[int], cut: bool, prompt: str, tools: bytes) -> None:
    whole = run(make(name, prompt, tools), [text] if text else [], cut)
    assert run(make(name, prompt, tools), cut_at(text, edges), cut) == whole
    assert run(make(name, prompt, tools), list(text), cut) == whole


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_how_a_broken_answer_is_cut_does_not_matter(name: str, data: st.DataObject) -> None:
    """Of what such models write, pieces in another order."""
    own = [case.text for case in CASES if case.format == name and case.text]
    pieces = []
    for _ in range(data.draw(st.integers(1, 5))):
        text = data.draw(st.sampled_from(own))
        a, b = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
        pieces.append(text[a:b] or text)
    text = "".join(pieces)
    cut, tools = data.draw(st.booleans()), data.draw(st.sampled_from([b"", TYPED]))
    whole = run(make(name, "", tools), [text], cut)
    assert run(make(name, "", tools), cut_at(text, data.draw(st.lists(st.integers(0, 400), max_size=30))), cut) == whole
    assert run(make(name, "", tools), list(text), cut) == whole


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", range(509, 516))
def test_the_longest_name_ends_at_the_same_place(name: str, size: int) -> None:
    for mark in FORMATS[name].marks or ["["]:
        text = mark + "\n<function=" + "x" * size + "<tool_call>" * 60 + ">" + mark
        assert run(make(name), [text], False) == run(make(name), list(text), False)


UNQUOTED = st.lists(st.sampled_from([atom for atom in ATOMS if atom not in ('"', "[CALL_ID]")] + ["🙂"] * 20), max_size=14).map("".join)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"openai"}))  # whose messages have heads, which are no text
@given(text=UNQUOTED, cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_text_is_lost(name: str, text: str, cut: bool) -> None:
    """However broken: only members of calls' objects that mean nothing are left out, and there are none in these."""
    content, reasoning, calls = run(make(name), list(text), cut)
    assert sum(part.count("🙂") for part in (content, reasoning, *(a for _, a, _ in calls), *(n for n, _, _ in calls))) == text.count("🙂")


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_text_without_marks_goes_through(name: str, text: str) -> None:
    content, reasoning, calls = run(make(name), list(text), False)
    assert not calls
    if name in ("deepseek_r1", "ernie45_reasoning"):
        assert (content, reasoning.strip()) == ("", text.strip())
    else:
        assert (content, reasoning) == (text, "")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
ARGUMENT_SETS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), JSON, max_size=3)


def _list(calls: list[tuple[str, str]], name: str = '"name"') -> str:
    return "[" + ", ".join(f'{{{name}: "{n}", "parameters": {a}}}' for n, a in calls) + "]"


WRITTEN = {
    "hermes": lambda calls: "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls),
    "llama3_json": lambda calls: "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls),
    "mistral": lambda calls: "[TOOL_CALLS][" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]",
    "deepseek_v31": lambda calls: (
        "<｜tool▁calls▁begin｜>" + "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{a}<｜tool▁call▁end｜>" for n, a in calls)
    ),
    "kimi_k2": lambda calls: (
        "<|tool_calls_section_begin|>"
        + "".join(f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>" for i, (n, a) in enumerate(calls))
        + "<|tool_calls_section_end|>"
    ),
    "granite": lambda calls: f"<|tool_call|>{_list(calls)}",
    "jamba": lambda calls: f"<tool_calls>{_list(calls)}</tool_calls>",
    "phi4_mini_json": lambda calls: f"functools{_list(calls)}",
    "xlam": lambda calls: _list(calls),
    "internlm": lambda calls: "\n".join(
        f'<|action_start|><|plugin|>\n{{"name": "{n}", "parameters": {a}}}<|action_end|>' for n, a in calls
    ),
    "cohere_command": lambda calls: "<|START_ACTION|>" + _list(calls, '"tool_call_id": "0", "tool_name"') + "<|END_ACTION|>",
    "openai": lambda calls: "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} json<|message|>{a}<|call|>" for n, a in calls
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_weather", "a.b-c"]), ARGUMENT_SETS), min_size=1, max_size=3), ascii=st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_calls_come_out_as_they_were_written(name: str, calls: list[tuple[str, dict[str, object]]], ascii: bool) -> None:
    """Whatever the arguments hold, marks in strings included."""
    written = [(n, json.dumps(a, ensure_ascii=ascii)) for n, a in calls]
    text = WRITTEN[name](written)
    assert run(make(name), list(text), False) == ("", "", [(n, a, True) for n, a in written])


def _invoked(outer: str, mark: str) -> Callable[[str, dict[str, str]], str]:
    def write(name: str, values: dict[str, str]) -> str:
        inside = "".join(f'<{mark}parameter name="{key}">{value}</{mark}parameter>\n' for key, value in values.items())
        return f'<{outer}>\n<{mark}invoke name="{name}">\n{inside}</{mark}invoke>\n</{outer}>'

    return write


def _functions(outer: str) -> Callable[[str, dict[str, str]], str]:
    def write(name: str, values: dict[str, str]) -> str:
        inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<{outer}>\n<function={name}>\n{inside}</function>\n</{outer}>"

    return write


def _glm(name: str, values: dict[str, str]) -> str:
    return (
        f"<tool_call>{name}" + "".join(f"\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>" for k, v in values.items()) + "</tool_call>"
    )


TAGGED = {
    "qwen3_coder": _functions("tool_call"),
    "seed_oss": _functions("seed:tool_call"),
    "minimax_m2": _invoked("minimax:tool_call", ""),
    "deepseek_v32": _invoked("｜DSML｜function_calls", "｜DSML｜"),
    "glm45": _glm,
    "step3": lambda name, values: (
        "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        + _invoked("", "steptml:")(name, values)[3:-4]
        + "<｜tool_call_end｜><｜tool_calls_end｜>"
    ),
}
_SECOND = {
    "deepseek_v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
    "pythonic": "[%s(a=1)]",
}


def _calling(name: str, function: str) -> str:
    """An answer that is one call."""
    if name in WRITTEN:
        return WRITTEN[name]([(function, '{"a": 1}')])
    return TAGGED[name](function, {"a": "1"}) if name in TAGGED else _SECOND[name] % function


@pytest.mark.parametrize("name", sorted({*WRITTEN, *TAGGED, *_SECOND}))
def test_a_function_that_does_not_exist_is_not_called(name: str) -> None:
    """Of a request's tools alone; without any (a splitter that is asked by itself) every name is one."""
    known, tools = _calling(name, "f"), schema(a={"type": "integer"})
    unknown = _calling(name, "get_paris")
    assert [call[0] for call in run(make(name), [unknown], False)[2]] == ["get_paris"]
    assert run(make(name, "", tools), [known], False)[2] == [("f", '{"a": 1}', True)]
    content, reasoning, calls = run(make(name, "", tools), [unknown], False)
    assert (reasoning, calls) == ("", [])
    assert content == unknown or name == "openai", "as it was, but for the marks of gpt-oss's heads"
    assert "get_paris" in content
    assert run(make(name, "", tools), list(unknown), False) == (content, "", [])
    after = run(make(name, "", tools), list(f"{unknown}\n{known}"), False)
    assert "get_paris" in after[0]
    assert {call[0] for call in after[2]} <= {"f"}


KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}
KEYS = st.text("abcdefghijklmnopqrstuvwxyz_-", min_size=1, max_size=6)


@pytest.mark.parametrize("name", TAGGED)
@given(values=st.dictionaries(KEYS, JSON, max_size=4), nullable=st.booleans(), edges=st.lists(st.integers(0, 400), max_size=30))
@settings(max_examples=200, deadline=None)
def test_arguments_in_tags_have_the_schemas_types(name: str, values: dict[str, Any], nullable: bool, edges: list[int]) -> None:
    """Each value comes back as it was, whatever a string looks like: number, JSON, white space."""
    kinds = {key: KINDS[type(value)] for key, value in values.items()}
    tools = schema(**{key: {"type": [kind, "null"] if nullable else kind} for key, kind in kinds.items()})
    bare = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    if any(text.startswith("\n") for text in bare.values()) and name not in ("qwen3_coder", "seed_oss", "glm45"):
        bare = {key: "\n" + text for key, text in bare.items()}  # the first line's end is the format's
    if nullable and any(isinstance(values[key], str) and text.strip().lower() in ("null", "none") for key, text in bare.items()):
        return
    content, reasoning, [(called, arguments, done)] = run(make(name, "", tools), cut_at(TAGGED[name]("f", bare), edges), False)
    assert (content, reasoning, called, done) == ("", "", "f", True)
    got = json.loads(arguments)
    assert got == {key: value.removesuffix("\n") if isinstance(value, str) and name in TRIMMED else value for key, value in values.items()}
    assert [type(value) for value in got.values()] == [type(value) for value in values.values()]
    assert list(got) == list(values)


TRIMMED = {"minimax_m2", "deepseek_v32", "step3"}
"""Of a value that ends in one, the last line's end is the format's too."""


@pytest.mark.parametrize("name", TAGGED)
def test_a_string_in_tags_streams(name: str) -> None:
    """It does not wait for its end, as a call may write a whole file."""
    for kind in ("string", ["string", "null"]):
        text = TAGGED[name]("f", {"a": "line of text " * 50})
        splitter = make(name, "", schema(a={"type": kind}))
        at = text.index("line") + 100
        got = [fragment for piece in list(text[:at]) for fragment in splitter.feed(piece)]
        assert len("".join(fragment.text for fragment in got if fragment.channel == ARGUMENTS)) > 90


@pytest.mark.parametrize(
    "tools",
    [
        b"",
        b"nonsense",
        b"[",
        b"5",
        b"[1, null, {}]",
        b'[{"function": 5}, {"function": {"name": 5}}, {"function": {"name": "f", "parameters": 5}}]',
        b'[{"function": {"name": "f", "parameters": {"properties": {"a": 5, "i": {"type": 5}, "s": {"$ref": "#/x"}}}}}]',
        b'[{"function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/properties/a"}, "i": {"anyOf": [5]}}}}}]',
        b'[{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "widget"}, "i": {"enum": []}, "s": {"allOf": 1}}}}}]',
    ],
)
def test_a_schema_that_is_none_says_nothing(tools: bytes) -> None:
    text = TAGGED["qwen3_coder"]("f", {"a": "5", "i": "x"})
    assert run(make("qwen3_coder", "", tools), list(text), False) == ("", "", [("f", '{"a": "5", "i": "x"}', True)])


def test_kimis_ids_count_the_conversations_calls() -> None:
    first, second = make("kimi_k2"), make("kimi_k2", "x<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>")
    assert first.call_id(0, "f") == "functions.f:0"  # type: ignore[attr-defined]
    assert second.call_id(1, "g") == "functions.g:2"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "atom",
    [
        "<",
        "[",
        "{",
        '{"name": "f", "arguments": {',
        '{"name": "f", "arguments": "',
        "<tool_call>",
        "[f(",
        "<|channel|>",
        " ",
        '"',
        "<function=",
        "\n",
        "<arg_key>a",
    ],
)
def test_long_answers_cost_in_proportion(name: str, atom: str) -> None:
    splitter = make(name)
    for _ in range(20_000):  # quadratic, this would take minutes
        splitter.feed(atom)
    splitter.flush(False)
    make(name).feed(atom * 20_000)


PAIRS = [
    ("qwen3", "qwen3_coder"),
    ("qwen3", "glm45"),
    ("deepseek_r1", "minimax_m2"),
    ("deepseek_r1", "step3"),
    ("kimi_k2_reasoning", "kimi_k2"),
    ("hunyuan_reasoning", "jamba"),
    ("ernie45_reasoning", "hermes"),
    ("seed_oss_reasoning", "seed_oss"),
    ("mistral_reasoning", "mistral"),
    ("granite_reasoning", "granite"),
    ("cohere_command", "cohere_command"),
]


@pytest.mark.parametrize(("reasoning", "tools"), PAIRS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_reasoning_and_calls_of_one_model_keep_apart(reasoning: str, tools: str, data: st.DataObject) -> None:
    """What one says in its part is in that part alone, however it is cut."""
    thoughts = [case for case in CASES if case.format == reasoning and case.reasoning and case.content == "Yes." and not case.prompt]
    calls = [
        case for case in CASES if case.format == tools and case.calls and not (case.content or case.reasoning or case.cut or case.tools)
    ]
    thought, call = data.draw(st.sampled_from(thoughts)), data.draw(st.sampled_from(calls))
    at = thought.text.rindex("Yes.") + len("Yes.")
    text = thought.text[:at] + call.text + thought.text[at:]
    formats = Formats(FORMATS[tools], FORMATS[reasoning])
    submit = SimpleNamespace(split=True, grammar=None, tools=b"[]", continue_final_message=False)
    whole = None
    for pieces in ([text], list(text), cut_at(text, data.draw(st.lists(st.integers(0, 400), max_size=30)))):
        splitter = formats.splitter(SimpleNamespace(submit=submit, prompt_text=""))  # type: ignore[arg-type]
        assert splitter is not None
        got = run(splitter, pieces, False)
        assert whole in (None, got)
        whole = got
    assert whole is not None
    assert whole[1] == thought.reasoning
    assert whole[0].strip() == "Yes."
    assert whole[2] == call.calls
