"""Every format: what it makes of what models write, and that it does not matter how the text was cut."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.contract.formats import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Fragment, Opening, Splitter
from penstock.plugins.formats import BUILT_IN

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not

from corpus import CASES, Calls, Case, schema

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
WRITTEN = {
    "hermes": lambda calls: "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls),
    "llama3_json": lambda calls: "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls),
    "mistral": lambda calls: "[TOOL_CALLS][" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]",
    "deepseek_v31": lambda calls: (
        "<｜tool▁calls▁begin｜>" + "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{a}<｜tool▁call▁end｜>" for n, a in calls)
    ),
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "atom", ["<", "[", "{", '{"name": "f", "arguments": {', '{"name": "f", "arguments": "', "<tool_call>", "[f(", "<|channel|>", " ", '"']
)
def test_long_answers_cost_in_proportion(name: str, atom: str) -> None:
    splitter = make(name)
    for _ in range(20_000):  # quadratic, this would take minutes
        splitter.feed(atom)
    splitter.flush(False)
    make(name).feed(atom * 20_000)
