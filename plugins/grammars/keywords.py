"""Which JSON schemas can be obeyed exactly.

What it is: `drafted`, a schema as its draft means it; `check_schema`, which goes through every place of a schema and refuses the first keyword, format or reference that is not on the list: a
backend may ignore what it does not know, and the answer would then disobey.
What it does not know: backends, whether the schema can be satisfied.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature

NOTES = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "discriminator",
    ]
)
"""They ask for nothing."""
PLAIN = frozenset(
    [
        "type",
        "enum",
        "const",
        "required",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ]
)
PLAIN |= frozenset(["pattern", "format", "minItems", "maxItems", "minProperties", "maxProperties", "$ref"])
ONE = frozenset(["additionalProperties", "items"])
"""Their value is a schema."""
MANY = frozenset(["anyOf", "oneOf", "allOf", "prefixItems"])
"""A list of schemas."""
NAMED = frozenset(["properties", "patternProperties", "$defs", "definitions"])
"""An object of schemas."""
FORMATS = frozenset(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
TYPES = frozenset(["object", "array", "string", "number", "integer", "boolean", "null"])
NUMBERS = frozenset(
    ["minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems"]
)
NUMBERS |= frozenset(["minProperties", "maxProperties"])
COUNTS = frozenset(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
DRAFTS = ("draft-07", "draft-06", "2019-09", "2020-12")
ALONE = ("draft-07", "draft-06")
"""In these what stands beside a $ref says nothing."""
DEEPEST = 64
"""Levels of a schema."""
MOST_PROPERTIES = 1500
"""Of a schema, in all places together: each costs time before the first token, in which other requests wait."""
MOST_OPTIONAL = 750
"""Properties of one object that need not be there: any of them may come next, which each step has to look at."""


def drafted(schema: Any) -> Any:
    """The schema as its draft means it: without what stands beside a $ref, if that says nothing. What references point into stays."""
    if isinstance(schema, dict) and any(draft in str(schema.get("$schema")) for draft in ALONE):
        return _alone(schema, 0)
    return schema


def _alone(schema: Any, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > DEEPEST:
        return schema
    if isinstance(schema.get("$ref"), str):
        schema = {keyword: value for keyword, value in schema.items() if keyword in ("$ref", "$schema", "$defs", "definitions")}
    made = dict(schema)
    for keyword, value in schema.items():
        if keyword in ONE:
            made[keyword] = _alone(value, depth + 1)
        elif keyword in MANY and isinstance(value, list):
            made[keyword] = [_alone(one, depth + 1) for one in value]
        elif keyword in NAMED and isinstance(value, dict):
            made[keyword] = {name: _alone(one, depth + 1) for name, one in value.items()}
    return made


def check_schema(schema: Any) -> None:
    """Raises UnsupportedFeature naming the keyword and its place, or InvalidRequest for a schema that is none, or that is too large."""
    if isinstance(schema, dict) and not any(draft in str(schema.get("$schema", DRAFTS[0])) for draft in DRAFTS):
        raise UnsupportedFeature(f"The schema's $schema {str(schema['$schema'])[:80]!r} is not one of the drafts 6 to 2020-12.")
    found = _check(schema, "", 0)
    _check_loops(schema)
    if found > MOST_PROPERTIES:
        raise InvalidRequest(f"The schema has {found} properties, but may have {MOST_PROPERTIES}.")


def free_names(schema: Any) -> bool:
    """May an object have names that the schema does not say one by one? `schema` has passed `check_schema`. True where that is not certain."""
    if not isinstance(schema, dict):
        return schema is not False
    if not {"const", "enum", "$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
        kinds = schema.get("type", ["object"])
        if "object" in kinds and ("patternProperties" in schema or schema.get("additionalProperties") is not False):
            return True
        if "array" in kinds and "items" not in schema:
            return True
    inner = [schema[keyword] for keyword in ONE if keyword in schema]
    inner += [one for keyword in MANY for one in schema.get(keyword, ())]
    inner += [one for keyword in NAMED for one in schema.get(keyword, {}).values()]
    return any(map(free_names, inner))


def refused(keyword: str, at: str, why: str = "is not supported") -> PenstockError:
    """What to raise for a keyword at a place of the schema."""
    return UnsupportedFeature(f"The schema's keyword {keyword[:80]!r} at {(at or '/')[:200]} {why}.")


def _check(schema: Any, at: str, depth: int) -> int:
    """How many properties it has."""
    if isinstance(schema, bool):
        return 0
    if not isinstance(schema, dict):
        raise InvalidRequest(f"The schema is wrong at {(at or '/')[:200]}: a schema is an object, or true or false.")
    if depth > DEEPEST:
        raise UnsupportedFeature(f"The schema is nested more than {DEEPEST} levels deep at {at[:200]}.")
    found = 0
    for keyword, value in schema.items():
        here = f"{at}/{keyword}"
        if keyword in PLAIN:
            _check_plain(keyword, value, at)
        elif keyword in ONE:
            if isinstance(value, list):
                raise refused(keyword, at, "with a list is not supported: use prefixItems")
            found += _check(value, here, depth + 1)
        elif keyword in MANY:
            if not isinstance(value, list) or not value:
                raise InvalidRequest(f"The schema is wrong at {here[:200]}: it must be a list that is not empty.")
            for index, one in enumerate(value):
                found += _check(one, f"{here}/{index}", depth + 1)
        elif keyword in NAMED:
            if not isinstance(value, dict):
                raise InvalidRequest(f"The schema is wrong at {here[:200]}: it must be an object.")
            for name, one in value.items():
                found += _check(one, f"{here}/{name}", depth + 1)
            if keyword == "properties":
                found += len(value)
                _check_optional(schema, value, at)
        elif keyword not in NOTES:
            raise refused(keyword, at)
    return found


def _check_optional(schema: dict[str, Any], properties: dict[str, Any], at: str) -> None:
    required = schema.get("required")
    if not isinstance(required, list):
        required = []
    optional = len(properties.keys() - {name for name in required if isinstance(name, str)})
    if optional > MOST_OPTIONAL:
        raise InvalidRequest(
            f"The object at {(at or '/')[:200]} has {optional} properties that are not required, but may have {MOST_OPTIONAL}."
        )


def _check_plain(keyword: str, value: Any, at: str) -> None:
    if keyword == "format" and value not in FORMATS:
        raise refused("format", at, f"with the value {str(value)[:80]!r} is not supported")
    if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        raise refused("$ref", at, "must begin with '#': other documents are not read")
    if keyword == "type" and not set([value] if isinstance(value, str) else value if isinstance(value, list) else [""]) <= TYPES:
        raise InvalidRequest(f"The schema is wrong at {at[:200]}/type: {str(value)[:80]!r} is no type of JSON.")
    if keyword in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InvalidRequest(f"The schema is wrong at {at[:200]}/{keyword}: it must be a number.")
    if keyword in COUNTS and (value < 0 or value % 1):
        raise InvalidRequest(f"The schema is wrong at {at[:200]}/{keyword}: it must be a whole number that is not below 0.")
    if keyword == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise InvalidRequest(f"The schema is wrong at {at[:200]}/required: it must be a list of names.")
    if keyword == "pattern" and not isinstance(value, str):
        raise InvalidRequest(f"The schema is wrong at {at[:200]}/pattern: it must be a text.")


def _check_loops(root: Any) -> None:
    """A reference that leads back to itself, with nothing of a value in between, says nothing."""
    safe: set[str] = set()

    def follow(schema: Any, at: str, open_: tuple[str, ...]) -> None:
        if not isinstance(schema, dict):
            return
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in safe:
            if reference in open_:
                raise refused("$ref", at, f"with the value {reference[:80]!r} leads back to itself")
            if len(open_) > DEEPEST:
                raise refused("$ref", at, f"leads on more than {DEEPEST} times")
            follow(pointed(root, reference), at, (*open_, reference))
            safe.add(reference)
        for keyword in ("allOf", "anyOf", "oneOf"):
            for one in schema.get(keyword, ()):
                follow(one, at, open_)

    def everywhere(schema: Any, at: str) -> None:
        if not isinstance(schema, dict):
            return
        follow(schema, at, ())
        for keyword, value in schema.items():
            inner = [(keyword, value)] if keyword in ONE else []
            if keyword in MANY:
                inner = [(f"{keyword}/{i}", one) for i, one in enumerate(value)]
            elif keyword in NAMED:
                inner = [(f"{keyword}/{name}", one) for name, one in value.items()]
            for name, one in inner:
                everywhere(one, f"{at}/{name}")

    everywhere(root, "")


def pointed(root: Any, reference: str) -> Any:
    """What a reference within the schema points to; None: nothing."""
    if reference not in ("#", "") and not reference.startswith("#/"):
        return None  # by a name
    found = root
    for part in unquote(reference[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            return None
    return found
