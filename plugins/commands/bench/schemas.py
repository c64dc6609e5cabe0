"""JSON schemas to measure grammars with, each with an answer.

What it is: a seeded generator of schemas as programs send them, of eight kinds that mix within one another, and the reader of a copy of
JSON-Schema-Test-Suite.
What it does not know: grammars, which schemas a server takes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("text", "number", "enum", "pattern", "format", "array", "object", "either")
WORDS = [
    "water",
    "wheel",
    "river",
    "stone",
    "bridge",
    "light",
    "garden",
    "winter",
    "letter",
    "table",
    "market",
    "island",
    "forest",
    "morning",
    "paper",
    "silver",
    "window",
    "road",
]
PATTERNS = [
    ("^[A-Z]{2}[0-9]{4}$", "AB1234"),
    ("^#[0-9a-f]{6}$", "#00ff7f"),
    ("^[a-z]+(-[a-z]+)*$", "river-stone"),
    ("^\\+[0-9]{1,3} [0-9]{6,10}$", "+47 22334455"),
    ("^v[0-9]+\\.[0-9]+\\.[0-9]+$", "v1.20.3"),
]
FORMATS = [
    ("date", "2024-02-29"),
    ("date-time", "2026-11-27T09:00:00Z"),
    ("time", "23:10:00+02:00"),
    ("duration", "P3DT4H"),
    ("email", "anna.berg@example.org"),
    ("hostname", "files.example.org"),
    ("ipv4", "192.168.0.17"),
    ("ipv6", "2001:db8::7"),
    ("uuid", "123e4567-e89b-12d3-a456-426614174000"),
]
DRAFTS = {"draft7": "http://json-schema.org/draft-07/schema#", "draft2020-12": "https://json-schema.org/draft/2020-12/schema"}

Pair = tuple[dict[str, Any], Any]


def made(rng: random.Random, kind: str, depth: int = 0) -> Pair:
    """A schema of this kind, and a value of it."""
    leaf = depth >= 3
    if kind == "text":
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        return {
            "type": "string",
            **rng.choice([{}, {"maxLength": rng.randint(100, 400)}, {"minLength": 1, "maxLength": rng.randint(100, 400)}]),
        }, text
    if kind == "number":
        low = rng.randint(0, 100)
        value = low + rng.randint(0, 50)
        if rng.random() < 0.5:
            return {"type": "number"}, value + 0.25
        return {"type": "integer", "minimum": low, "maximum": low + 1000}, value
    if kind == "enum":
        values = rng.sample(WORDS, rng.randint(2, 12))
        return {"enum": values}, rng.choice(values)
    if kind == "pattern":
        pattern, text = rng.choice(PATTERNS)
        return {"type": "string", "pattern": pattern}, text
    if kind == "format":
        name, text = rng.choice(FORMATS)
        return {"type": "string", "format": name}, text
    inner = KINDS[:5] if leaf else KINDS
    if kind == "array":
        schema, value = made(rng, rng.choice(inner), depth + 1)
        return {"type": "array", "items": schema, "maxItems": rng.randint(4, 20)}, [value] * rng.randint(1, 4)
    if kind == "either":
        one, other = (made(rng, name, depth + 1) for name in rng.sample(inner, 2))
        return {"anyOf": [one[0], other[0]]}, other[1]
    names = [f"{word}_{index}" if index % 5 == 4 else word for index, word in enumerate(rng.sample(WORDS, rng.randint(2, 10)))]
    parts = {name: made(rng, rng.choice(inner), depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    said = {name: value for name, (_, value) in parts.items() if name in required or rng.random() < 0.5}
    schema = {"type": "object", "properties": {name: part for name, (part, _) in parts.items()}, "required": required}
    return schema | {"additionalProperties": False}, said


def generated(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(kind, schema, answer) in turns of the kinds; all but the plain ones are properties of an object, as answers are."""
    rng = random.Random(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        schema, value = made(rng, kind)
        if kind != "object":
            more, other = made(rng, "text")
            title, name = rng.sample(WORDS, 2)
            properties = {title: more, name: schema}
            schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
            value = {title: other, name: value}
        yield kind, json.dumps(schema), json.dumps(value)


def suite(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Those of the suite's cases (its folder `tests`) that have a right instance; whoever takes them finds out which it can."""
    for draft, uri in DRAFTS.items():
        for path in sorted((folder / draft).rglob("*.json")):
            for case in json.loads(path.read_text(encoding="utf-8")):
                right = [test["data"] for test in case["tests"] if test["valid"]]
                if right and isinstance(case["schema"], dict):
                    longest = max((json.dumps(value, ensure_ascii=False) for value in right), key=len)
                    yield "suite", json.dumps({"$schema": uri, **case["schema"]}), longest
