"""Whole answers of every output format, drawn at random under the masks of their layouts, read back by the format's own splitter."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.actors.text.answers import MOST_CALLS, laid_out
from penstock.core.actors.text.formats import Formats
from penstock.core.contract.formats import Opening
from penstock.core.contract.layouts import Chain, Free, Mark, Obey, Tag, Tags, Text, decode, encode, leaves
from penstock.core.protocol.calling import Offered, calling_of
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar
from penstock.plugins.grammars.bounds import LONGEST_NUMBER, Starts
from penstock.plugins.grammars.layouts import Regions

sys.path.insert(0, str(Path(__file__).parent))  # for layout_kit.py: pytest's importlib mode does not

from layout_kit import FORMATS, VOCABULARIES, follows, formats_of, hides, loved, read, request_of, verified

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
ZONE: dict[str, Any] = {"type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}
OFFERED = [Offered("get_weather", CITY, True), Offered("now", None, True), Offered("get_time", ZONE, True)]
ANSWER: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": False}
TOOLS = ["hermes", "llama3_json", "mistral", "mistral-args", "deepseek_v3", "deepseek_v31", "openai", "pythonic", "pythonic-start"]
TOOLS += [
    "kimi_k2",
    "granite",
    "jamba",
    "internlm",
    "qwen3_coder",
    "seed_oss",
    "minimax_m2",
    "deepseek_v32",
    "step3",
    "glm45",
    "glm45-short",
    "phi4_mini_json",
    "xlam",
]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize(
    ("choice", "parallel", "prompt"),
    [
        ("required", True, ""),
        ("required", False, "<think>\n"),
        ({"type": "function", "function": {"name": "get_time"}}, True, ""),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}}, True, ""),
    ],
)  # fmt: skip
def test_calls_that_must_be(name: str, choice: Any, parallel: bool, prompt: str, special: bool) -> None:
    formats = formats_of(name, "qwen3" if prompt else None)
    calling = calling_of(OFFERED, choice)
    assert calling is not None
    assert calling.must
    request = request_of(calling, prompt=prompt, parallel=parallel)
    formats.check(request.submit)
    ends = 0
    for seed in range(12):
        text, ended = VOCABULARIES[special].draw(formats.grammar(request), seed)
        said, done, _ = read(formats, request, text, ended)
        if ended:
            ends += 1
            assert said.wrong(calling, None, parallel) == "", text
            assert done == len(said.calls) >= 1, text
            verified(said, calling, None)
    assert ends >= 6


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("prompt", [None, "", "<think>", "<think></think>\n"])
def test_strict_under_auto(name: str, prompt: str | None, special: bool) -> None:
    """Content is whatever it is, and what the splitter reads as a call is one that was meant."""
    formats = formats_of(name, None if prompt is None else "qwen3")
    calling = calling_of(OFFERED, "auto")
    assert calling is not None
    request = request_of(calling, prompt=prompt or "")
    formats.check(request.submit)
    calls = contents = 0
    for seed in range(30 if name == "deepseek_v32" else 20):  # whose calls begin with a character that is no mark
        text, ended = VOCABULARIES[special].draw(formats.grammar(request), seed, *loved(formats), "</think>")
        said, done, _ = read(formats, request, text, ended)
        if ended:
            assert said.wrong(calling, None, True) == "", text
            assert done == len(said.calls), text
            verified(said, calling, None)
            calls += bool(said.calls)
            contents += bool("".join(said.content).strip())
            assert hides(formats) not in "".join(said.content), text
    assert calls
    assert contents


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", [name for name in TOOLS if name != "xlam"])  # whose calls are a list of JSON
@pytest.mark.parametrize("prompt", [None, "", "<think>"])
def test_a_call_or_an_answer_that_obeys(name: str, prompt: str | None, special: bool) -> None:
    formats = formats_of(name, None if prompt is None else "qwen3")
    answer = Grammar(kind="json", source=json.dumps(ANSWER), field="response_format")
    calling = calling_of([Offered("f", {}, False)], None, answer.field)
    assert calling is not None
    request = request_of(calling, answer, prompt=prompt or "")
    formats.check(request.submit)
    calls = answers = 0
    for seed in range(24):
        text, ended = VOCABULARIES[special].draw(formats.grammar(request), seed)
        said, done, _ = read(formats, request, text, ended)
        if ended:
            assert said.wrong(calling, answer, True) == "", text
            assert done == len(said.calls), text
            verified(said, calling, answer)
            calls += bool(said.calls)
            answers += not said.calls
    assert calls
    assert answers


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("name", "prompt", "may_reason", "may_not"),
    [
        ("qwen3", "", True, True),
        ("qwen3", "<think>\n", True, False),
        ("qwen3", "<think>\n\n</think>\n\n", False, True),
        ("deepseek_r1", "", True, False),
        ("deepseek_r1", "</think>", False, True),
        ("openai", "<|start|>assistant", True, True),
    ],
)
def test_the_answer_channel_obeys_and_reasoning_is_free(name: str, prompt: str, may_reason: bool, may_not: bool, special: bool) -> None:
    formats = Formats(None, FORMATS[name])
    answer = Grammar(kind="json", source=json.dumps(ANSWER), field="response_format")
    request = request_of(None, answer, prompt=prompt)
    reasoned = plain = 0
    for seed in range(40):
        text, ended = VOCABULARIES[special].draw(formats.grammar(request), seed)
        if not ended:
            continue
        said, _, reasoning = read(formats, request, text, ended)
        assert said.wrong(None, answer, True) == ""
        verified(said, None, answer)
        reasoned += bool(reasoning)
        plain += not reasoning
    assert bool(reasoned) <= may_reason
    assert plain or not may_not


@pytest.mark.parametrize(("kind", "source", "pattern"), [("regex", "[a-c]{2}", "[a-c]{2}"), ("choice", '["yes", "no"]', "yes|no"), ("grammar", 'start: "x" /[0-9]/+\n%ignore " "', "[x0-9 ]+")])  # fmt: skip
def test_other_kinds_after_reasoning(kind: Any, source: str, pattern: str) -> None:
    formats = Formats(None, FORMATS["deepseek_r1"])
    request = request_of(None, Grammar(kind=kind, source=source, field="guided"), prompt="")
    for seed in range(10):
        text, ended = VOCABULARIES[False].draw(formats.grammar(request), seed)
        if ended:
            said, _, _ = read(formats, request, text, ended)
            assert re.fullmatch(pattern, "".join(said.content)), text


def test_numbers_are_bounded_in_values_and_nowhere_else() -> None:
    """Bounds of JSON do not reach free text: nothing there is a number to end."""
    vocabulary = VOCABULARIES[True]
    formats = formats_of("hermes")
    calling = calling_of([Offered("f", {"properties": {"n": {"type": "number"}}, "required": ["n"]}, True)], "auto")
    grammar = formats.grammar(request_of(calling))
    matcher = vocabulary.grammars.matcher(vocabulary.grammars.compile("layout", grammar.source))
    for byte in b"1" * (LONGEST_NUMBER + 5) + b"e5 beef":
        assert byte in vocabulary.allowed(matcher)
        assert matcher.consume(byte)
    assert matcher.consume(vocabulary.tokens.index(b"<tool_call>"))
    for byte in b'\n{"name": "f", "arguments": {"n":' + b"1" * LONGEST_NUMBER:
        assert matcher.consume(byte)
    assert ord("1") not in vocabulary.allowed(matcher)
    assert matcher.consume(ord("}"))
    for token in [*b"}\n", vocabulary.tokens.index(b"</tool_call>")]:
        assert matcher.consume(token)
    assert matcher.may_end()


@pytest.mark.parametrize(
    ("openers", "said", "bounded"),
    [
        ([""], "1", True),
        ([""], " [1", True),
        ([""], '{"a": 1} 1', False),
        ([""], "1 1", False),
        (["x:"], "1", False),
        (["x:"], "x:1", True),
        (["x:"], 'x:"x:1', False),
        (["x:"], 'x:"a" x:[[1], 1', True),
        (["x:"], "x:[[1]] 1", False),
        (["x:", "yx:"], "1yx: 1", True),
        ([], "1", False),
    ],
)
def test_regions(openers: list[str], said: str, bounded: bool) -> None:
    """A number may go on for so long where a JSON value is, and nowhere else."""
    vocabulary = VOCABULARIES[False]
    words = -(-len(vocabulary.tokens) // 32)
    regions = Regions(Starts(vocabulary.tokens, words), [opener.encode() for opener in openers])
    regions.feed(said.encode() + b"1" * LONGEST_NUMBER)
    out = np.full(words, -1, np.int32)
    regions.narrow(out, False)
    assert bool(out.view(np.uint32)[ord("1") // 32] >> np.uint32(ord("1") % 32) & np.uint32(1)) is not bounded
    regions.feed(b"a" * 100_000)  # what is kept of it is no longer than an opener
    assert len(regions._tail) <= max(map(len, openers), default=0)


def test_structural_tags() -> None:
    tags = Tags(
        ["<f", "<g="], [Tag("<f=1>", Obey("json", json.dumps(CITY)), "</f>"), Tag("<g=", Obey("regex", "[0-9]{2}"), ">"), Tag("<fx>", Obey("json", "{}"), "!")]
    )  # fmt: skip
    pattern = re.compile(r"<f=1>(\{.*?\})</f>|<g=[0-9]{2}>|<fx>.*!", re.DOTALL)
    hits = 0
    for seed in range(30):
        text, ended = VOCABULARIES[False].draw(Grammar(kind="layout", source=encode(tags)), seed, "<")
        if ended:
            hits += "<f" in text or "<g=" in text
            for start in re.finditer("<f|<g=", text):
                assert pattern.match(text, start.start()) or "<fx>" in text, text
    assert hits


def test_a_layouts_json_form() -> None:
    part = Chain([Text("a"), Mark("<m>"), Free(["<m>"], then="<m>"), Obey("json", "{}", "f")])
    assert decode(encode(part)) == part
    assert list(leaves(part)) == [Obey("json", "{}", "f")]
    with pytest.raises(InvalidRequest):
        decode('{"type": "nonsense"}')


@pytest.mark.parametrize(
    ("formats", "answer", "name", "param"),
    [
        (Formats(msgspec.structs.replace(FORMATS["hermes"], spelling=None)), None, "f", "tool_choice"),
        (Formats(FORMATS["pythonic"]), None, "get-time", "tools[0].function.name"),
        (Formats(FORMATS["pythonic"]), None, "import", "tools[0].function.name"),
        (Formats(FORMATS["pythonic"]), Grammar(kind="regex", source="a", field="response_format"), "f", "response_format"),
        (Formats(FORMATS["xlam"]), Grammar(kind="json", source="{}", field="response_format"), "f", "response_format"),
        (Formats(FORMATS["hermes"]), Grammar(kind="layout", source="{}", field="response_format"), "f", "response_format"),
        (Formats(FORMATS["llama3_json"]), Grammar(kind="json", source="{}", field="response_format"), "f", "response_format"),
        (Formats(FORMATS["hermes"]), None, 'a"b', "tools[0].function.name"),
    ],
)
def test_what_cannot_be_asked_for(formats: Formats, answer: Grammar | None, name: str, param: str) -> None:
    calling = calling_of([Offered(name, {}, False)], "auto" if answer else "required", answer.field if answer else "")
    with pytest.raises(UnsupportedFeature) as raised:
        formats.check(request_of(calling, answer).submit)
    assert raised.value.param == param


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [CITY]},
        {"properties": {"a-b": {}}},
        {"properties": {"class": {}}},
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}},
        {"required": ["a"]},
        {"minProperties": 1},
    ],
)
def test_schemas_that_keyword_arguments_cannot_express(schema: dict[str, Any]) -> None:
    calling = calling_of([Offered("f", schema, False)], "required")
    with pytest.raises(UnsupportedFeature) as raised:
        Formats(FORMATS["pythonic"]).check(request_of(calling).submit)
    assert raised.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize("seed", range(10))
def test_values_of_keyword_arguments_are_what_json_says(seed: int) -> None:
    values = {
        "s": {"type": "string", "maxLength": 6},
        "o": {"type": "object"},
        "r": {"$ref": "#/$defs/r"},
        "n": {"type": ["null", "boolean", "number"]},
    }
    schema = {"type": "object", "properties": values, "required": ["r"], "$defs": {"r": {"enum": [1, "ü", None]}}}
    calling = calling_of([Offered("a.b", schema, False)], "required")
    formats = Formats(FORMATS["pythonic"])
    request = request_of(calling)
    formats.check(request.submit)
    text, ended = VOCABULARIES[True].draw(formats.grammar(request), seed)
    if ended:
        said, _, _ = read(formats, request, text, ended)
        assert said.wrong(calling, None, True) == "", text
        verified(said, calling, None)


def test_functions_that_are_not_strict_have_arguments_of_any_type_by_their_names() -> None:
    """Beside one that is: keyword arguments are spelt by names."""
    calling = calling_of(
        [Offered("f", CITY, False), Offered("g", {"allOf": [], "properties": {"a-b": 1, "x": 2}}, False)], "auto", "response_format"
    )
    assert calling is not None
    assert [json.loads(function.schema) for function in calling.functions] == [{"type": "object"}] * 2
    formats = Formats(FORMATS["pythonic"])
    request = request_of(calling)
    formats.check(request.submit)
    seen = set()
    for seed in range(40):
        text, ended = VOCABULARIES[True].draw(formats.grammar(request), seed, "[")
        said, _, _ = read(formats, request, text, ended)
        if ended:
            assert said.wrong(calling, None, True) == "", text
            seen |= {(name, key) for name, arguments in said.calls for key in json.loads("".join(arguments))}
    assert seen == {("f", "city"), ("f", "n"), ("g", "x")}


def test_a_format_that_cannot_be_spelt_leaves_the_grammar_to_the_whole_answer() -> None:
    formats = Formats(None, msgspec.structs.replace(FORMATS["qwen3"], thinking=None))
    answer = Grammar(kind="json", source="{}", field="response_format")
    request = request_of(None, answer)
    assert formats.splitter(request) is None


def test_the_prompts_end_decides() -> None:
    thinking = FORMATS["qwen3"].thinking
    answer = Grammar(kind="json", source="{}")
    open_ = laid_out(Opening("<think>", False), thinking=thinking, answer=answer, marks=["<think>", "</think>"])
    over = laid_out(Opening("<think></think>", False), thinking=thinking, answer=answer, marks=["<think>", "</think>"])
    assert isinstance(open_, Chain)
    assert open_.parts[0] == Free(["</think>"], then="</think>")
    assert over == Obey("json", "{}", "")


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/at"}},
    "required": ["at"],
    "$defs": {"at": {"enum": ["here", 1]}},
}
LISTS: dict[str, Any] = {"type": "array", "items": {"enum": ["f()", "now", None, True, [], {}]}, "maxItems": 3}


@pytest.mark.parametrize(
    ("name", "schema"), [("llama3_json", PERSON), ("llama3_json", LISTS), ("pythonic", PERSON), ("pythonic", LISTS), ("pythonic", {})]
)
def test_an_answer_that_begins_like_a_call(name: str, schema: Any) -> None:
    formats = formats_of(name)
    answer = Grammar(kind="json", source=json.dumps(schema), field="response_format")
    calling = calling_of([Offered("now", None, True), Offered("name", PLACE, True)], "auto", answer.field)
    assert calling is not None
    request = request_of(calling, answer)
    formats.check(request.submit)
    calls = answers = several = 0
    for seed in range(60):
        text, ended = VOCABULARIES[False].draw(formats.grammar(request), seed, "[now", '{"name": "now", "par', "; ")
        said, done, _ = read(formats, request, text, ended)
        if ended:
            assert said.wrong(calling, answer, True) == "", text
            assert done == len(said.calls), text
            verified(said, calling, answer)
            calls += bool(said.calls)
            several += len(said.calls) > 1
            answers += not said.calls
    assert calls
    assert answers
    assert several


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (PERSON, True),
        ({"type": "object"}, False),
        ({}, False),
        (True, False),
        ({"type": ["array", "string"]}, True),
        ({"properties": {"name": {}, "parameters": {}}, "additionalProperties": False}, False),
        ({"properties": {"name": {}, "arguments": {}}, "additionalProperties": False}, False),
        ({"properties": {"parameters": {}}, "additionalProperties": False}, True),
        ({"properties": {"name": {}}, "patternProperties": {"^p": {}}, "additionalProperties": False}, False),
        ({"anyOf": [PERSON, {"type": "null"}]}, True),
        ({"anyOf": [PERSON, {"type": "object"}]}, False),
        ({"$ref": "#/$defs/p", "$defs": {"p": PERSON}}, True),
        ({"$ref": "#"}, False),
        ({"enum": [{"name": "f", "parameters": {}}, 1]}, False),
        ({"const": {"name": "f"}}, True),
    ],
)
def test_which_answers_could_be_read_as_bare_json_calls(schema: Any, told: bool) -> None:
    answer = Grammar(kind="json", source=json.dumps(schema), field="response_format")
    submit = request_of(calling_of([Offered("f", {}, False)], "auto", answer.field), answer).submit
    if told:
        formats_of("llama3_json").check(submit)
    else:
        with pytest.raises(UnsupportedFeature, match="could not be told from a call") as raised:
            formats_of("llama3_json").check(submit)
        assert raised.value.param == "response_format"


def test_a_bare_json_call_beside_an_answer_refers_to_definitions_alone() -> None:
    answer = Grammar(kind="json", source=json.dumps(PERSON), field="response_format")
    looped = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    with pytest.raises(UnsupportedFeature) as raised:
        formats_of("llama3_json").check(request_of(calling_of([Offered("f", looped, True)], "auto", answer.field), answer).submit)
    assert raised.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize("name", TOOLS)
def test_an_answer_has_so_many_calls_and_no_more(name: str) -> None:
    formats = formats_of(name)
    calling = calling_of([Offered("f", None, True)], "required")
    request = request_of(calling)
    assert formats.spelling is not None
    whole = Grammar(kind="layout", source=formats.grammar(request).source)
    spelling = formats.spelling
    call = f"{spelling.before}f{spelling.between}{'' if spelling.arguments else '{}'}{spelling.after}"
    vocabulary = VOCABULARIES[True]
    compiled = vocabulary.grammars.compile("layout", whole.source)
    most = spelling.most or MOST_CALLS
    for count, may in ((1, True), (most, True), (most + 1, False)):
        text = spelling.begin + spelling.separator.join([call] * count) + spelling.end
        matcher = vocabulary.grammars.matcher(compiled)
        assert (follows(vocabulary, matcher, text) and matcher.may_end()) is may, count
        if may:
            said, done, _ = read(formats, request, text, True)
            assert done == len(said.calls) == count
