"""Calls whose arguments stand in tags: whatever their grammars allow is read back as arguments that obey the tool's schema, and what models write is allowed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.core.protocol.calling import Calling, Offered, calling_of
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars.bounds import LONGEST_STRING

sys.path.insert(0, str(Path(__file__).parent))  # for layout_kit.py: pytest's importlib mode does not

from layout_kit import WORDS, Vocabulary, follows, formats_of, read, request_of, verified

NAMES = ["qwen3_coder", "seed_oss", "minimax_m2", "deepseek_v32", "step3", "glm45", "glm45-short"]
TAGS = [
    b"</parameter>",
    b"\n</parameter>",
    b"<parameter=",
    b"\n<parameter=a>",
    b"</arg_value>",
    b"\n<arg_key>",
    b"parameter>",
    b"\n</function>",
    b'" string="true">',
]
VALUES = [
    b"null",
    b"None",
    b"true",
    b"False",
    b" 12",
    b"-3",
    b"1.5",
    b"[1]",
    b"{}",
    b'"a"',
    b"\\",
    b"\\u003c",
    b"\n",
    b"(",
    b"#",
    b"\r\n",
    "é٣".encode(),
    b"abc",
]
SEEDS = 32
VOCABULARIES = {special: Vocabulary(special, [*WORDS, *TAGS, *VALUES]) for special in (True, False)}


def schema_of(rng: random.Random, depth: int = 0) -> Any:
    """A property's."""
    numbers = [
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "number"},
        {"type": "number", "minimum": 0.5},
    ]
    strings: list[Any] = [
        {"type": "string"},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "maxLength": 3, "description": "d"},
        {"type": "string", "pattern": "^[a-z]{2,4}$"},
        {"type": "string", "pattern": r"\d\w"},
        {"type": "string", "pattern": "^(a|b/)", "minLength": 3},
        {"type": "string", "format": rng.choice(["date", "time", "date-time", "email", "hostname", "ipv4", "uuid"])},
        {"type": "string", "enum": rng.choice([["CET", "null", "12", "", "a b"], ["x", "y/"]])},
        {"const": "x"},
        {"enum": ["one", "two"]},
        {"allOf": [{"type": "string"}, {"minLength": 1}]},
        {"oneOf": [{"const": "p", "title": "P"}, {"const": "q"}]},
        {"$ref": "#/$defs/color"},
    ]
    others: list[Any] = [*numbers, {"type": "boolean"}, {"type": "null"}, {"enum": [1, 2.5, None]}, {"$ref": "#/$defs/place"}]
    if depth < 2:
        others += [
            {"type": "array", "items": schema_of(rng, depth + 1), "maxItems": 2},
            {"type": "object", "properties": {"k": schema_of(rng, depth + 1)}, "required": ["k"], "additionalProperties": False},
            {"properties": {"k": {"type": "string"}}, "required": ["k"]},
            {"type": "object"},
        ]
    text = rng.choice(strings)
    mixed: list[Any] = [
        {},
        True,
        {"type": ["string", "null"]},
        {"type": ["string", "integer"], "maximum": 20, "maxLength": 6},
        {"type": ["string", "boolean", "null"], "minLength": 1},
        {"type": ["array", "string"], "maxItems": 1},
        {"anyOf": [text, {"type": "null"}]},
        {"anyOf": [text, rng.choice(others)]},
        {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        {"enum": ["many", 1, None, True]},
        {"minLength": 2},
    ]
    return rng.choice(rng.choice([strings, others, mixed]))


def function_of(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(["a", "b-c", "naïve", "d.e", "two words", "class", "$f", "n_1"], rng.randint(0, 4))
    schema = {
        "type": "object",
        "properties": {name: schema_of(rng) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "$defs": {
            "color": {"type": "string", "enum": ["red", "blue"]},
            "place": {"type": "object", "properties": {"x": {"type": "integer"}, "s": {"type": "string"}}, "required": ["s"], "additionalProperties": False},
        },
    }  # fmt: skip
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    return schema


def strictly(*schemas: Any) -> Calling:
    calling = calling_of([Offered(f"f{i}", schema, True) for i, schema in enumerate(schemas)], "required")
    assert calling is not None
    return calling


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_random_walks_obey_random_schemas(name: str, special: bool) -> None:
    formats = formats_of(name)
    ended_, given, refused = 0, set(), 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        calling = strictly(function_of(rng), function_of(rng))
        request = request_of(calling)
        try:
            formats.check(request.submit)
        except UnsupportedFeature:
            refused += 1
            continue
        grammar = formats.grammar(request)
        for draw in range(2):
            text, ended = VOCABULARIES[special].draw(grammar, 2 * seed + draw, "</", "\n", most=400)
            said, done, _ = read(formats, request, text, ended)
            if ended:
                ended_ += 1
                assert said.wrong(calling, None, True) == "", text
                assert done == len(said.calls) >= 1, text
                verified(said, calling, None)
                given |= {type(value).__name__ for _, pieces in said.calls for value in json.loads("".join(pieces)).values()}
    assert ended_ >= SEEDS / 2
    assert refused <= SEEDS / 3
    assert given >= {"str", "int", "NoneType"}


# ------------------------------------------------------------------ what models write

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "fields": {"type": "array", "items": {"type": "string"}},
        "near": {"type": "object"},
    },
    "required": ["city"],
}
NOW: dict[str, Any] = {"type": "object", "properties": {}}
GIVEN: dict[str, Any] = {
    "city": 'São Paulo\n<b>"centro"</b>',
    "days": 3,
    "when": None,
    "fields": ["wind", "</parameter>", '\\"</invoke>'],
    "near": {"a": [1, {"b": "</ parameter>"}], "c": "</steptml:parameter>"},
}
LINES = {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in GIVEN.items()}


def _tagged(values: dict[str, str], parameter: str, end: str = "</parameter>", line: str = "\n") -> str:
    return "".join(f"{parameter.format(name)}{line}{value}{line}{end}\n" for name, value in values.items())


def _coder(name: str, values: dict[str, str], outer: str = "tool_call", line: str = "\n") -> str:
    return f"<{outer}>\n<function={name}>\n{_tagged(values, '<parameter={}>', line=line)}</function>\n</{outer}>"


def _invoke(name: str, values: dict[str, str], prefix: str = "") -> str:
    parameters = _tagged(values, f'<{prefix}parameter name="{{}}">', f"</{prefix}parameter>", "")
    return f'<{prefix}invoke name="{name}">\n{parameters}</{prefix}invoke>'


def _dsml(name: str, values: dict[str, str]) -> str:
    said = "".join(
        f'<｜DSML｜parameter name="{key}" string="{"true" if key == "city" else "false"}">{value}</｜DSML｜parameter>\n'
        for key, value in values.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{said}</｜DSML｜invoke>\n'


def _glm(name: str, values: dict[str, str], line: str) -> str:
    inside = "".join(f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for key, value in values.items())
    return f"<tool_call>{name}{line}{inside}</tool_call>"


_STEP = "<｜tool_call_begin｜>function<｜tool_sep｜>{}<｜tool_call_end｜>\n"
WRITTEN = {
    "qwen3_coder": [_coder("f0", LINES), _coder("f1", {}), _coder("f0", {"city": ""}) + "\n" + _coder("f1", {})],
    "seed_oss": [
        _coder("f0", LINES, "seed:tool_call", ""),
        _coder("f0", LINES, "seed:tool_call") + "\n" + _coder("f1", {}, "seed:tool_call", ""),
    ],
    "minimax_m2": [f"<minimax:tool_call>\n{_invoke('f0', LINES)}\n{_invoke('f1', {})}\n</minimax:tool_call>"],
    "deepseek_v32": [f"<｜DSML｜function_calls>\n{_dsml('f0', LINES)}{_dsml('f1', {})}</｜DSML｜function_calls>"],
    "step3": [
        f"<｜tool_calls_begin｜>\n{_STEP.format(_invoke('f0', LINES, 'steptml:'))}{_STEP.format(_invoke('f1', {}, 'steptml:'))}<｜tool_calls_end｜>"
    ],
    "glm45": [_glm("f0", LINES, "\n"), _glm("f0", {"city": "x"}, "\n") + "\n" + _glm("f1", {}, "\n")],
    "glm45-short": [_glm("f0", LINES, "")],
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRITTEN.items() for text in texts])
def test_what_models_write_is_allowed(name: str, text: str, special: bool) -> None:
    formats, vocabulary, calling = formats_of(name), VOCABULARIES[special], strictly(WEATHER, NOW)
    request = request_of(calling)
    formats.check(request.submit)
    matcher = vocabulary.grammars.matcher(vocabulary.grammars.compile("layout", formats.grammar(request).source))
    assert follows(vocabulary, matcher, text)
    assert matcher.may_end()
    said, done, _ = read(formats, request, text, True)
    assert said.wrong(calling, None, True) == ""
    assert done == len(said.calls)
    verified(said, calling, None)
    for called, pieces in said.calls:
        arguments = json.loads("".join(pieces))
        assert called == "f0" or arguments == {}
        assert arguments in ({}, {"city": ""}, {"city": "x"}, GIVEN)


# ------------------------------------------------------------------ what cannot be said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"minProperties": 1}, "minProperties"),
        ({"allOf": [WEATHER]}, "allOf"),
        ({"properties": {"a\nb": {"type": "string"}}}, "a\\nb"),
        ({"properties": {"a>b": {"type": "string"}}}, "a>b"),
        ({"required": ["a"]}, "required"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, "$ref"),
        (
            {"properties": {"a": {"type": "string", "enum": ["x", "</parameter></arg_value></｜DSML｜parameter></steptml:parameter>"]}}},
            "enum",
        ),
        ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "not"),
        ({"properties": {"a": {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]}}}, "oneOf"),
        ({"properties": {"a": {"type": "string", "pattern": "a(?=b)"}}}, "a(?=b)"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "^a|b$"),
    ],
)
def test_what_text_without_quotes_cannot_say_is_refused_by_name(name: str, schema: dict[str, Any], says: str) -> None:
    formats = formats_of(name)
    request = request_of(strictly(schema))

    def ask() -> None:
        formats.check(request.submit)
        VOCABULARIES[True].grammars.compile("layout", formats.grammar(request).source)

    with pytest.raises(UnsupportedFeature) as raised:
        ask()
    assert raised.value.param == "tools[0].function.parameters"
    assert says in raised.value.message


@pytest.mark.parametrize(
    ("name", "values"),
    [("qwen3_coder", ["1", 1]), ("glm45", [True, "true"]), ("seed_oss", ["\na", None]), ("minimax_m2", ["x", [1], "[1]"])],
)
def test_values_that_would_be_read_as_others_are_refused(name: str, values: list[Any]) -> None:
    with pytest.raises(UnsupportedFeature, match="'enum'"):
        formats_of(name).check(request_of(strictly({"properties": {"a": {"enum": values}}})).submit)


@pytest.mark.parametrize("schema", [{"properties": []}, {"properties": {}, "required": "a"}, {"required": [1]}])
def test_a_schema_that_is_none(schema: dict[str, Any]) -> None:
    for name in ("qwen3_coder", "pythonic"):
        with pytest.raises(InvalidRequest) as raised:
            formats_of(name).check(request_of(strictly(schema)).submit)
        assert raised.value.param == "tools[0].function.parameters"


def test_a_schema_of_false_is_left_out() -> None:
    formats = formats_of("qwen3_coder")
    request = request_of(strictly({"properties": {"a": False, "b": {"type": "string"}}}))
    formats.check(request.submit)
    assert "<parameter=a>" not in formats.grammar(request).source
    with pytest.raises(UnsupportedFeature):
        formats.check(request_of(strictly({"properties": {"a": False}, "required": ["a"]})).submit)


@pytest.mark.parametrize("name", NAMES)
def test_functions_that_are_not_strict_have_values_of_their_types(name: str) -> None:
    formats = formats_of(name)
    odd = {
        "properties": {
            "s": {"type": "string", "not": {}},
            "i": {"type": "integer", "minimum": 5},
            "m": {"type": ["string", "null"]},
            "a\nb": {},
        }
    }
    calling = calling_of([Offered("f0", odd, False), Offered("f1", NOW, True)], "auto")
    assert calling is not None
    request = request_of(calling)
    formats.check(request.submit)
    seen: dict[str, set[str]] = {}
    for seed in range(40):
        assert formats.spelling is not None
        begin = next(mark for mark in formats.spelling.hides if (formats.spelling.begin + formats.spelling.before).startswith(mark))
        text, ended = VOCABULARIES[True].draw(formats.grammar(request), seed, begin)
        said, _, _ = read(formats, request, text, ended)
        if ended:
            assert said.wrong(calling, None, True) == "", text
            for _, pieces in said.calls:
                for key, value in json.loads("".join(pieces)).items():
                    seen.setdefault(key, set()).add(type(value).__name__)
    assert seen.keys() <= {"s", "i", "m"}
    assert seen.get("s", {"str"}) == {"str"}
    assert seen.get("i", {"int"}) == {"int"}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_string_without_quotes_ends(name: str, special: bool) -> None:
    """After as many bytes as one in quotes may have; numbers and quotes in it are no JSON."""
    formats, vocabulary = formats_of(name), VOCABULARIES[special]
    request = request_of(strictly({"properties": {"s": {"type": "string"}}, "required": ["s"]}))
    matcher = vocabulary.grammars.matcher(vocabulary.grammars.compile("layout", formats.grammar(request).source))
    written = {
        "qwen3_coder": _coder,
        "seed_oss": lambda *a: _coder(*a, "seed:tool_call", ""),
        "glm45": lambda *a: _glm(*a, "\n"),
        "glm45-short": lambda *a: _glm(*a, ""),
    }
    outer = {
        "minimax_m2": "<minimax:tool_call>\n{}",
        "step3": "<｜tool_calls_begin｜>\n" + _STEP,
        "deepseek_v32": "<｜DSML｜function_calls>\n{}",
    }
    inner = {
        "minimax_m2": _invoke,
        "step3": lambda *a: _invoke(*a, "steptml:"),
        "deepseek_v32": lambda *a: _dsml(*a).replace("false", "true"),
    }
    text = written[name]("f0", {"s": "X"}) if name in written else outer[name].format(inner[name]("f0", {"s": "X"}))
    begin = text[: text.index("X")]
    assert follows(vocabulary, matcher, begin + '{"1e55' + "9" * 30)
    byte = ord("9")
    assert byte in vocabulary.allowed(matcher)
    count = LONGEST_STRING // 50
    for _ in range(count):
        assert follows(vocabulary, matcher, "hello" * 10)
    allowed = [vocabulary.tokens[id].decode(errors="replace") for id in vocabulary.allowed(matcher)]
    end = text[text.index("X") + 1 :]
    assert allowed
    assert all(end.startswith(token) for token in allowed), allowed
    assert follows(vocabulary, matcher, end.split(">", 1)[0] + ">")
