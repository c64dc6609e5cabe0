"""The built-in grammar backends: whatever a model draws under their masks is of the grammar, and ends."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import itertools
import json
import random
import re
import unicodedata
import uuid
from typing import Any

import jsonschema_rs
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.contract.grammars import Forks, Grammars
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import PenstockError
from penstock.plugins.grammars.bounds import LONGEST_NUMBER
from penstock.plugins.grammars.keywords import FORMATS
from penstock.plugins.grammars.llguidance import LlGuidance

WORDS = [
    b"hello",
    b"limit",
    b'{"',
    b'":',
    b"123",
    b"0000",
    b"1e5",
    b"9e",
    b" 5E3",
    b", ",
    b"true",
    b"}}",
    b"\n  ",
    "ü".encode(),
    b"<end>",
    b"",
]
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS
SPECIAL = TOKENS.index(b"<end>")


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def grammars(request: pytest.FixtureRequest) -> Grammars:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    spec = PluginHost("text").load().grammars(request.param)
    assert spec is not None
    made: Grammars = spec.factory(TOKENS, [SPECIAL])
    return made


def allowed(matcher: Any) -> list[int]:
    out = np.zeros(-(-len(TOKENS) // 32), np.int32)
    matcher.mask(out)
    found: list[int] = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
    return found


def draw(grammars: Grammars, kind: str, source: str, seed: int = 0, *, like: bytes = b"", most: int = 400) -> tuple[bytes, bool]:
    """A random model's answer, which prefers tokens that begin with one of the bytes `like`: (what it said, did it end)."""
    rng = random.Random(seed)
    matcher = grammars.matcher(grammars.compile(kind, source))
    said = b""
    for _ in range(most):
        ids = allowed(matcher)
        assert SPECIAL not in ids
        assert all(id < len(TOKENS) and TOKENS[id] for id in ids)
        if matcher.may_end() and (not ids or (not like and rng.random() < 0.3)):
            return said, True
        assert ids, said
        token = rng.choice([id for id in ids if like and TOKENS[id][0] in like] or ids)
        assert matcher.consume(token)
        said += TOKENS[token]
    return said, False


leaves = st.one_of(
    st.just({}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-50, 50), st.integers(0, 100)),
    st.just({"type": "number"}),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(0, 99), st.text("ab \"\\ü", max_size=4)), min_size=1, max_size=4)),
    st.just({"type": "string", "pattern": "^[a-c]{2}x?$"}),
)  # fmt: skip
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(
            lambda parts, needed: {
                "type": "object",
                "properties": parts,
                "required": sorted(parts)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_every_finished_answer_validates(schema: dict[str, Any], seed: int, grammars: Grammars) -> None:
    said, ended = draw(grammars, "json", json.dumps(schema), seed)
    if ended:
        answer = json.loads(said)
        assert jsonschema_rs.validator_for(schema).is_valid(answer), (schema, said)


@pytest.mark.parametrize("schema", ["{}", '{"type":"number"}', '{"type":"integer"}', '{"type":"object"}', '{"type":"array"}'])
@pytest.mark.parametrize("like", [b"0123456789", b"-.eE0", b" \n\t\r"])
def test_numbers_and_white_space_end(schema: str, like: bytes, grammars: Grammars) -> None:
    """A model that loves digits, or white space, gets only so far with each."""
    for seed in range(3):
        said, _ = draw(grammars, "json", schema, seed, like=like, most=200)
        outside = re.sub(rb'"(\\.|[^"\\])*("|$)', b'""', said)
        assert max(map(len, re.findall(rb"[0-9.eE+-]+", outside)), default=0) <= LONGEST_NUMBER + 5
        assert not re.search(rb"(?<![,:])\s|\s\s", outside)
        assert not re.search(rb"[\n\r\t]", outside)
        assert not re.search(rb"[0-9.][eE]", outside)


@pytest.mark.parametrize("schema", ["{}", '{"type":"object"}'])
def test_compact_json_has_no_white_space(schema: str, grammars: Grammars) -> None:
    for seed, like in itertools.product(range(10), (b"", b" ,:", b' "{[')):
        said, _ = draw(grammars, "compact_json", schema, seed, like=like, most=80)
        assert not re.search(rb"\s", re.sub(rb'"(\\.|[^"\\])*("|$)', b'""', said)), said


def test_a_schemas_own_lengths_count(grammars: Grammars) -> None:
    assert draw(grammars, "json", '{"type":"string","minLength":60,"pattern":"^[0-9]+$"}', like=b"0123456789", most=90)[0][1:60].isdigit()
    assert draw(grammars, "json", '{"const":"12345678901234567890123456789012345"}')[0] == b'"12345678901234567890123456789012345"'


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[a-z]{3}", "[a-z]{3}"),
        ("regex", "^[0-9]{2}$", "[0-9]{2}"),
        ("regex", "^a|b$", "a|b"),
        ("choice", '["yes", "no"]', "yes|no"),
        ("choice", '["<a>", "b>c"]', "<a>|b>c"),
        ("choice", '["a+b [c]", "x/y\\n", "ü-!#\\"", "(", "\\\\d"]', r"a\+b \[c\]|x/y\n|ü-!#\"|\(|\\d"),
        ("grammar", 'root ::= "a" [0-9]', "a[0-9]"),
        ("grammar", 'start: "x" NUMBER | "y"\nNUMBER: /[0-9]{1,3}/', "x[0-9]{1,3}|y"),
    ],
)
def test_other_kinds(kind: str, source: str, pattern: str, grammars: Grammars) -> None:
    for seed in range(12):
        said, ended = draw(grammars, kind, source, seed)
        assert ended
        assert re.fullmatch(pattern, said.decode()), said


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "("),
        ("regex", "(?=a)b"),
        ("regex", "(?!a)b"),
        ("grammar", "nonsense"),
        ("grammar", "start: unknown"),
        ("grammar", '%llguidance {}\nstart: "a"'),
        ("grammar", 'start: %json {"x-guidance": {"lenient": true}}'),
        ("grammar", "root ::= missing"),
    ],
)
def test_what_is_no_grammar(kind: str, source: str, grammars: Grammars) -> None:
    with pytest.raises((PenstockError, ValueError)):
        grammars.compile(kind, source)


def test_matchers_of_one_grammar_are_apart(grammars: Grammars) -> None:
    compiled = grammars.compile("regex", "ab")
    one, two = grammars.matcher(compiled), grammars.matcher(compiled)
    assert one.consume(ord("a"))
    assert not one.may_end()
    assert not two.consume(ord("b"))
    assert one.consume(ord("b"))
    assert one.may_end()


def wide(count: int, *, required: bool) -> tuple[str, bytes]:
    """A schema, and an answer."""
    names = {f"property_{i}": {"type": "string" if i % 2 else "integer"} for i in range(count)}
    schema = {"type": "object", "properties": names, "required": list(names) if required else [], "additionalProperties": False}
    return json.dumps(schema), json.dumps({name: "ab" if i % 2 else i for i, name in enumerate(names)}).encode()


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("count", [500, 750])
def test_an_object_of_many_properties(count: int, required: bool, grammars: Grammars) -> None:
    if count > 500 and not isinstance(grammars, LlGuidance):
        pytest.skip("such an object is llguidance's in any case")
    source, answer = wide(count, required=required)
    matcher = grammars.matcher(grammars.compile("json", source))
    for at, byte in enumerate(answer):
        if at < 400 or at % 97 == 0:  # what must follow is said in the longest tokens
            assert any(answer[at : at + len(TOKENS[id])] == TOKENS[id] or TOKENS[id][:1] == answer[at : at + 1] for id in allowed(matcher))
        assert matcher.consume(byte)
    assert matcher.may_end()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_whatever_is_drawn_for_a_format_is_of_it(format: str, grammars: Grammars) -> None:
    """By the second implementation, which knows leap years and how long a host's name may be. However odd a model's taste is."""
    schema = {"type": "string", "format": format}
    check = jsonschema_rs.validator_for(schema, validate_formats=True)
    ends = 0
    for seed, like in itertools.product(range(8), (b"", b"0123456789", b"abcXYZ", b"-.:@", b"23T:+9", b"0")):
        said, ended = draw(grammars, "json", json.dumps(schema), seed, like=like)
        ends += ended
        assert not ended or check.is_valid(json.loads(said)), said
    assert ends > 10


def test_no_date_is_of_year_0(grammars: Grammars) -> None:
    matcher = grammars.matcher(grammars.compile("json", '{"type":"string","format":"date"}'))
    assert all(matcher.consume(byte) for byte in b'"000')
    assert {TOKENS[id] for id in allowed(matcher)} & {b"0", b"1"} == {b"1"}


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("date", datetime.date),
        ("time", datetime.time),
        ("date-time", datetime.datetime),
        ("duration", datetime.timedelta),
        ("ipv4", ipaddress.IPv4Address),
        ("ipv6", ipaddress.IPv6Address),
        ("uuid", uuid.UUID),
        ("uri", pydantic.HttpUrl),
    ],
)
def test_types_of_a_client_take_whatever_is_drawn_for_their_format(format: str, kind: Any, grammars: Grammars) -> None:
    """Year 0, a leap second or a duration of a thousand million weeks would be of the format, and of no use."""
    adapter = pydantic.TypeAdapter(kind)
    ends = 0
    for seed, like in itertools.product(range(12), (b"", b"0123456789", b"abc.", b"-.:@/?#", b"09-:TZ", b"0", b"P9YMD")):
        said, ended = draw(grammars, "json", json.dumps({"type": "string", "format": format}), seed, like=like)
        ends += ended
        if ended:
            adapter.validate_python(json.loads(said))
    assert ends > 10


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"format": "date"}, ["2024-02-29", "2000-02-29", "1900-02-28", 5], ["2023-02-29", "1900-02-29", "2026-04-31", "2026-13-01"]),
        ({"format": "time"}, ["23:59:59Z", "10:00:00.25+02:00", "10:00:00z"], ["24:00:00Z", "10:59:60Z", "10:00:00", "10:00Z"]),
        ({"format": "date-time"}, ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2024-02-29 00:00:00Z"]),
        ({"format": "duration"}, ["P1Y2M3DT4H5M6S", "PT36S", "P2W"], ["P", "P1D2W", "PT", "1D"]),
        ({"format": "ipv6"}, ["::1", "::", "1:2:3:4:5:6:7:8", "fe80::a:b"], ["1:2:3", "1::2::3", ":1", "12345::"]),
        ({"format": "uri"}, ["https://example.org/a?b=c#d", "http://10.0.0.1:80", "http://a"], ["a/b", "http://a b", "http://a/%zz"]),
        ({"format": "hostname"}, ["a", "xn--nxasmq6b", "a-b.c1", "a" * 63], ["-a", "a-", "a..b", "a" * 64, "ab--c"]),
        ({"format": "email", "maxLength": 8}, ["a.b+@d.e"], ["a.b+c@d.efg", "a", "a..b@c"]),
        ({"format": "date", "pattern": "^2024"}, ["2024-02-29"], ["2025-01-01", "2024-02-30"]),
        ({"properties": {"format": {"format": "date"}}}, [{"format": "2024-02-29"}], [{"format": "x"}]),
        ({"enum": [{"format": "date"}]}, [{"format": "date"}], [{"format": "2024-02-29"}]),
        ({"anyOf": [{"maxItems": 1.0, "type": "array"}, {"minLength": 2.0, "type": "string"}]}, [[1], "ab"], [[1, 2], "a"]),
    ],
)
def test_what_a_schema_says_in_other_words(schema: dict[str, Any], right: list[Any], wrong: list[Any], grammars: Grammars) -> None:
    check = jsonschema_rs.validator_for(schema, validate_formats=True)
    compiled = grammars.compile("json", json.dumps(schema))
    for value in [*right, *wrong]:
        matcher = grammars.matcher(compiled)
        can = all(matcher.consume(byte) for byte in json.dumps(value).encode()) and matcher.may_end()
        assert (can, check.is_valid(value)) == (value in right, value in right) or (value == "xn--nxasmq6b" and not can), value


@pytest.mark.parametrize(
    ("kind", "source", "said", "other"),
    [
        ("json", '{"type":"array","items":{"type":"string"}}', b'["a\\', b'n", "b"]'),
        ("regex", "(ab|ac)*", b"aba", b"c"),
        ("choice", '["left", "right"]', b"le", b"ft"),
        ("grammar", 'root ::= "(" root ")" | ""', b"((", b"))"),
    ],
)
def test_a_copy_goes_its_own_way(kind: str, source: str, said: bytes, other: bytes, grammars: Grammars) -> None:
    """As far as the first had come, its bounds included; and neither feels the other."""
    one = grammars.matcher(grammars.compile(kind, source))
    assert all(one.consume(byte) for byte in said)
    assert isinstance(one, Forks)
    before = allowed(one)
    two = one.fork()
    assert allowed(two) == before
    assert all(two.consume(byte) for byte in other)
    assert two.may_end()
    assert allowed(one) == before
    assert not one.may_end()
    assert all(one.consume(byte) for byte in other)


def test_what_is_replayed_is_where_it_was(grammars: Grammars) -> None:
    """The same tokens bring the same masks, from what was compiled alone: in another process, and another Grammars."""
    compiled = grammars.compile("json", '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}')
    rng = random.Random(2)
    one, said = grammars.matcher(compiled), []
    for _ in range(40):
        ids = allowed(one)
        if not ids:
            break
        said.append(rng.choice(ids))
        assert one.consume(said[-1])
    fresh = type(grammars)(TOKENS, [SPECIAL])  # type: ignore[call-arg]
    two = fresh.matcher(compiled)
    assert all(two.consume(token) for token in said)
    assert (allowed(two), two.may_end()) == (allowed(one), one.may_end())


expressions = st.recursive(
    st.sampled_from(["a", "b", "\\.", "[ab]", "[^a]", "[b-d.]", "\\d", ".", "ab", "-", "[a-]", "\\n", "/", '"', "ü"]),
    lambda inner: st.one_of(
        st.builds("({}){}".format, inner, st.sampled_from(["", "*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}"])),
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(source=expressions, texts=st.lists(st.text('ab.c-d1\n/"ü', max_size=6), max_size=8), seed=st.integers(0, 2**32))
def test_expressions_are_those_of_python(source: str, texts: list[str], seed: int, grammars: Grammars) -> None:
    """Whatever is drawn matches, and whatever matches can be drawn."""
    compiled = grammars.compile("regex", source)
    for text in texts:
        matcher = grammars.matcher(compiled)
        can = all(matcher.consume(byte) for byte in text.encode()) and matcher.may_end()
        assert can == (re.fullmatch(source, text) is not None), (source, text)
    said, ended = draw(grammars, "regex", source, seed, like=b"ab.-", most=12)
    known = all(unicodedata.category(char) != "Cn" for char in said.decode(errors="replace"))  # the library's Unicode may be a newer one
    assert not ended or not known or re.fullmatch(source, said.decode()), (source, said)
