"""A JSON schema as the backend is to see it: the same, said so that it is obeyed exactly.

What it is: `spelled` says a schema again: patterns in the backend's syntax (ecma.py), formats as patterns (texts.py), bounds as numbers that it keeps exactly
(numbers.py), names that are few one by one, so that none comes twice, and how many properties there may be as the ways to choose them. Where bounds leave no number
there are values of other types, or there is none (false).
What it does not know: which keywords there may be (see keywords.py), backends.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars import ecma, texts
from penstock.plugins.grammars.endless import endless
from penstock.plugins.grammars.keywords import COUNTS, MANY, NAMED, ONE, TYPES, pointed, refused
from penstock.plugins.grammars.numbers import BOUNDS, NoNumber, bounded, check_step, drawable

MOST_NAMES = 64
"""Names that a pattern allows and that are said one by one."""
MOST_WAYS = 64
"""To choose properties."""
_COUNTED = (("string", "minLength", "maxLength"), ("array", "minItems", "maxItems"), ("object", "minProperties", "maxProperties"))


def spelled(schema: Any) -> Any:
    """`schema` has passed `check_schema`. What was given is left as it is. Raises UnsupportedFeature naming the keyword and its place, or InvalidRequest if its
    bounds leave nothing at all."""
    made = _spelled(schema, "")
    loops = endless(made)
    if "" in loops:
        raise InvalidRequest(
            "Nothing can satisfy it: the schema refers to itself without end, as each value must hold another of its kind. Make the one within optional."
        )
    while (dead := _dead(made, made, loops)) != made:  # what refers to nothing may be what others refer to
        made = dead
    if isinstance(made, dict) and isinstance(made.get("$ref"), str) and pointed(made, made["$ref"]) is False:
        raise InvalidRequest("Nothing can satisfy it: its $ref points to a schema of no values.")
    return made


def _dead(schema: Any, root: Any, loops: frozenset[str]) -> Any:
    """The backend takes a reference to a schema of no values for a mistake, and follows those of `loops`: such a one is false where it stands."""
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and schema is not root and (reference in loops or pointed(root, reference) is False):
        return False
    made = dict(schema)
    for keyword, value in schema.items():
        if keyword in ONE:
            made[keyword] = _dead(value, root, loops)
        elif keyword in MANY:
            made[keyword] = [_dead(one, root, loops) for one in value]
        elif keyword in NAMED:
            made[keyword] = {name: _dead(one, root, loops) for name, one in value.items()}
    return made


def _spelled(schema: Any, at: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        here = f"{at}/{keyword}"
        if keyword in ONE:
            value = _spelled(value, here)
        elif keyword in MANY:
            value = [_spelled(one, f"{here}/{i}") for i, one in enumerate(value)]
        elif keyword in NAMED:
            value = {name: _spelled(one, f"{here}/{name}") for name, one in value.items()}
        elif keyword in COUNTS and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif keyword == "pattern" and isinstance(value, str):
            value = _pattern("pattern", value, at)
        elif keyword in ("const", "enum"):
            if (number := next(drawable(value), None)) is not None:
                raise refused(
                    keyword,
                    at,
                    f"has {number!r}, which cannot be drawn exactly: give it as a text, or a number below 2^63 that a double holds",
                )
        elif keyword == "multipleOf":
            check_step(value, at)
        if keyword not in BOUNDS:
            made[keyword] = value
    try:
        made |= bounded(schema, at)
    except NoNumber:
        given = schema.get("type", sorted(TYPES))
        others = [one for one in ([given] if isinstance(given, str) else given) if one not in ("integer", "number")]
        if not others and not at:
            raise
        if not others:
            return False
        made["type"] = others
    _format(made)
    if at and any(made.get("type") == kind and made.get(least, 0) > made.get(most, math.inf) for kind, least, most in _COUNTED):
        return False
    return _counted(_named(made, at), at)


def closed_names(schema: Any) -> bool:
    """Is there an object whose names follow patterns and cannot always be made longer, so that only used ones might be left? `schema` as for `spelled`."""
    if not isinstance(schema, dict):
        return False
    patterns = schema.get("patternProperties", {})
    if schema.get("additionalProperties") is False and not all(map(ecma.extendable, patterns)):
        return True
    inner = [schema[keyword] for keyword in ONE if keyword in schema]
    inner += [one for keyword in MANY for one in schema.get(keyword, ())]
    inner += [one for keyword in NAMED for one in schema.get(keyword, {}).values()]
    return any(map(closed_names, inner))


def _pattern(keyword: str, pattern: str, at: str) -> str:
    try:
        return ecma.translated(pattern)
    except UnsupportedFeature as error:
        raise refused(keyword, at, f"with {pattern[:80]!r} cannot be obeyed exactly: {error.message[:-1]}") from None


def _format(made: dict[str, Any]) -> None:
    pattern = texts.PATTERNS.get(str(made.get("format")))
    if pattern is None:
        return
    longest = texts.LONGEST.get(made.pop("format"))
    if longest is not None:
        made["maxLength"] = min(made.get("maxLength", longest), longest)
    if "pattern" in made:
        made["allOf"] = [*made.get("allOf", []), {"pattern": f"^(?:{pattern})$"}]
    else:
        made["pattern"] = f"^(?:{pattern})$"


def _named(made: dict[str, Any], at: str) -> dict[str, Any]:
    """Patterns of names: those of few names, of an object that has no others, one by one."""
    patterns = made.get("patternProperties")
    if not isinstance(patterns, dict):
        return made
    names: dict[str, Any] | None = dict(made.get("properties", {})) if made.get("additionalProperties") is False else None
    translated = {}
    for pattern, schema in patterns.items():
        translated[_pattern("patternProperties", pattern, at)] = schema
        found = ecma.words(pattern, MOST_NAMES) if names is not None else None
        if names is None or found is None or len(names) + len(found) > MOST_NAMES:
            names = None
            continue
        for name in found:
            names[name] = {"allOf": [names[name], schema]} if name in names else schema
    if names is not None:
        made = {keyword: value for keyword, value in made.items() if keyword != "patternProperties"}
        return made | {"properties": names}
    if (
        made.get("additionalProperties") is False
        and not all(map(ecma.extendable, patterns))
        and made.get("properties", {}).keys() <= set(made.get("required", []))
    ):
        most = max(MOST_NAMES, made.get("minProperties", 0))  # so many at least there are
        made["maxProperties"] = min(made.get("maxProperties", most), most)
    return made | {"patternProperties": translated}


def _counted(made: dict[str, Any], at: str) -> dict[str, Any]:
    """How many properties, where not all of those that are named must be there: as the sets that there may be."""
    least, most = made.get("minProperties", 0), made.get("maxProperties")
    named = made.get("properties", {})
    required = [name for name in made.get("required", []) if isinstance(name, str)]
    optional = [name for name in named if name not in required]
    if not optional or (least <= len(required) and most is None):
        return made
    keyword = "minProperties" if least > len(required) else "maxProperties"
    if made.get("additionalProperties") is not False or "patternProperties" in made:
        raise refused(keyword, at, "is supported only where all names in 'properties' are required, or where there are no others")
    if (least <= len(required) + 1 and most in (None, len(required) + 1)) or not set(required) <= named.keys():
        return made  # the backend can do that, or nothing can
    more = range(max(0, least - len(required)), min(len(optional), len(optional) if most is None else most - len(required)) + 1)
    sizes = more if most is not None else more[:1]
    if sum(math.comb(len(optional), size) for size in sizes) > MOST_WAYS:
        raise refused(keyword, at, f"would allow more than {MOST_WAYS} sets of properties, and is not supported for so many")
    ways: list[dict[str, Any]] = []
    for size in sizes:
        for chosen in itertools.combinations(optional, size):
            needed = [*required, *chosen]
            kept = named if most is None else {name: one for name, one in named.items() if name in needed}
            ways.append({"properties": kept, "required": needed, "additionalProperties": False})
    if not ways:
        return made
    rest = {keyword: value for keyword, value in made.items() if keyword not in ("minProperties", "maxProperties")}
    return rest | {"allOf": [*rest.get("allOf", []), {"anyOf": ways}]}


def whole(source: str) -> str:
    """An expression is for the whole answer, with or without anchors at its ends."""
    if source.startswith("^") and "|" not in source:
        source = source[1:]
    if source.endswith("$") and not source.endswith("\\$") and "|" not in source:
        source = source[:-1]
    return source
