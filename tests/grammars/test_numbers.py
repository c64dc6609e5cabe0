"""Numbers: whatever is drawn is within the bounds, exactly, and what cannot be drawn exactly is refused by keyword."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars.llguidance import LlGuidance

BYTES = LlGuidance([bytes([byte]) for byte in range(256)], [])
VALUES = [0, 1, -1, 3, 10, -10, 0.5, -0.5, 0.1, 1e-7, -1e-7, 1e-3, 3.25, 99.99, 100, 1e6, 2**53, 2**53 + 1, -(2**53) - 1]
VALUES += [2**63 - 1, -(2**63), 2**63, 1e18, 1e25, 1e300, -1e300, 0.3]
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def exact(value: int | float) -> Fraction:
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))


def obeys(value: Fraction, schema: dict[str, Any]) -> bool:
    return (
        value >= exact(schema.get("minimum", value.__floor__() - 1))
        and value <= exact(schema.get("maximum", value.__ceil__() + 1))
        and value > exact(schema.get("exclusiveMinimum", value.__floor__() - 1))
        and value < exact(schema.get("exclusiveMaximum", value.__ceil__() + 1))
        and ("multipleOf" not in schema or (value / exact(schema["multipleOf"])).denominator == 1)
        and all(obeys(value, one) for one in schema.get("allOf", []))
    )


def draw(compiled: bytes, like: bytes, rng: random.Random) -> str:
    matcher = BYTES.matcher(compiled)
    out = np.zeros(8, np.int32)
    said = b""
    while len(said) < 60:
        matcher.mask(out)
        ids = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
        if matcher.may_end() and (not ids or rng.random() < 0.3):
            return said.decode()
        byte = rng.choice([id for id in ids if id in like] or ids)
        assert matcher.consume(byte)
        said += bytes([byte])
    raise AssertionError(f"it does not end: {said!r}")


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_drawn_is_within_bounds(seed: int) -> None:
    """As decimal numbers, and as the second implementation reads them. A range is refused by keyword, or there is none."""
    rng = random.Random(seed)
    drawn = 0
    said = set()
    for _ in range(150):
        schema: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
        for name in BOUNDS:
            if rng.random() < 0.4:
                schema[name] = rng.choice([*VALUES, round(rng.uniform(-3, 3), 2), rng.randint(-300, 300), rng.randint(-(10**18), 10**18)])
        if rng.random() < 0.1:
            schema["multipleOf"] = rng.choice([3, 0.5, 0.01, 100])
        if len(schema) > 2 and rng.random() < 0.2:
            name = list(schema)[-1]
            schema["allOf"] = [{name: schema.pop(name)}]
        try:
            compiled = BYTES.compile("json", json.dumps(schema))
        except InvalidRequest as error:
            said.add(error.message.partition(" at ")[0].partition(":")[0])
            continue
        check = jsonschema_rs.validator_for(schema)
        for like in (b"0", b"9.", b"0123456789.-"):
            text = draw(compiled, like, rng)
            assert obeys(Fraction(Decimal(text)), schema), (schema, text)
            assert check.is_valid(json.loads(text)), (schema, text)
            drawn += 1
    assert drawn > 100
    assert said <= {"Nothing can satisfy it", *(f"The schema's keyword {name!r}" for name in BOUNDS)}


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"const": 1234567890123456789}, "'const' at /"),
        ({"properties": {"a": {"enum": [123456789012345678, 1]}}}, "'enum' at /properties/a"),
        ({"const": {"a": [2**53 + 1]}}, "'const'"),
        ({"const": 18446744073709551616}, "'const'"),
        ({"const": 1e300}, "'const'"),
        ({"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740995}, "'minimum'"),
        ({"type": "integer", "minimum": 18446744073709551614}, "'minimum'"),
        ({"type": "number", "maximum": -1e300}, "'maximum'"),
        ({"type": "integer", "multipleOf": 1000000007}, "'multipleOf'"),
        ({"type": "number", "multipleOf": 0.07}, "'multipleOf'"),
        ({"items": {"$ref": "#/items"}}, "'\\$ref'"),
        ({"$ref": "#"}, "'\\$ref' at /"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "'\\$ref'"),
        ({"properties": {"a": {}}, "additionalProperties": {}, "minProperties": 1}, "'minProperties' at /"),
        ({"items": {"properties": {"a": {}, "b": {}}, "maxProperties": 1}}, "'maxProperties' at /items"),
        ({"allOf": [{"properties": {"a": {}}}, {"minProperties": 1}]}, "'minProperties'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"patternProperties": {"a": {}, "b": {}}}, "'patternProperties'"),
        ({"patternProperties": {"(?=a)": {}}}, "'patternProperties' at /"),
        ({"items": {"pattern": "(?x)a"}}, "'pattern' at /items"),
    ],
)
def test_what_cannot_be_drawn_exactly_is_refused_by_keyword(schema: Any, keyword: str) -> None:
    with pytest.raises(UnsupportedFeature, match=keyword):
        BYTES.compile("json", json.dumps(schema))


def test_multiples_do_not_use_up_what_a_grammar_may_take() -> None:
    """Answers share what is known of a grammar, and its limit."""
    rng = random.Random(1)
    compiled = BYTES.compile("json", '{"type":"integer","multipleOf":4999}')
    for _ in range(300):
        assert int(draw(compiled, b"0123456789", rng)) % 4999 == 0


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            ["0", "-9223372036854774784", "9007199254740993"],
            ["9223372036854775808"],
        ),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, ["0", "9223372036854774784"], ["-1", "18446744073709551616"]),
        ({"type": "number", "minimum": 0, "maximum": 1e308}, ["0", "1.5"], ["-1"]),
        ({"const": 2**53}, ["9007199254740992"], ["9007199254740993"]),
        ({"enum": [-(2**60), 7]}, ["-1152921504606846976", "7"], ["-1152921504606846977"]),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-7}, ["0.00000005"], ["0", "0.0", "0.0000001"]),
        ({"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, ["3.5", "3.001"], ["3", "3.0", "4", "4.0"]),
        ({"type": "number", "exclusiveMinimum": -0.5, "exclusiveMaximum": 0}, ["-0.25"], ["0", "-0", "-0.5"]),
        ({"type": "number", "multipleOf": 0.01}, ["0.07", "3"], ["0.005"]),
        ({"type": "integer", "multipleOf": 3600}, ["0", "-3600", "7200"], ["3601"]),
        ({"type": "integer", "multipleOf": 10000}, ["0", "120000"], ["1000"]),
    ],
)
def test_what_can_be_drawn(schema: Any, right: list[str], wrong: list[str]) -> None:
    compiled = BYTES.compile("json", json.dumps(schema))
    for text in [*right, *wrong]:
        matcher = BYTES.matcher(compiled)
        assert (all(matcher.consume(byte) for byte in text.encode()) and matcher.may_end()) is (text in right), text


@pytest.mark.parametrize(("low", "high"), [(2**55, 2**55 + 8), (2**60, 2**60 + 256), (2**62, 2**62 + 1024), (-(2**62) - 1024, -(2**62))])
def test_bounds_that_doubles_hold_are_obeyed(low: int, high: int) -> None:
    compiled = BYTES.compile("json", json.dumps({"type": "integer", "minimum": low, "maximum": high}))
    for value in (low - 1, low, low + 1, high, high + 1):
        matcher = BYTES.matcher(compiled)
        can = all(matcher.consume(byte) for byte in str(value).encode()) and matcher.may_end()
        assert can is (low <= value <= high), value


def test_no_integer_between_open_ends() -> None:
    with pytest.raises(InvalidRequest, match="Nothing can satisfy it") as raised:
        BYTES.compile("json", '{"type":"integer","exclusiveMinimum":3,"exclusiveMaximum":4}')
    assert not isinstance(raised.value, UnsupportedFeature)
