"""References of a schema that lead back to themselves in every value.

What it is: `endless`, the references whose schemas have no finite value, as each would have to hold another of its kind: the least fixed point of what a value
must hold. A backend would follow such a one until its limits are reached.
What it does not know: patterns, lengths and bounds; whatever else leaves no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.plugins.grammars.keywords import MANY, NAMED, ONE, pointed


def endless(root: Any) -> frozenset[str]:
    """Of a schema that has passed `check_schema`, "" among them if the schema is one itself. Of those that point to nothing, nothing is said."""
    targets = {reference: pointed(root, reference) for reference in _references(root)}
    finite = {reference for reference, target in targets.items() if target is None}
    left = targets.keys() - finite
    while found := {reference for reference in left if _ends(targets[reference], finite)}:
        finite |= found
        left -= found
    return frozenset(left if not left or _ends(root, finite) else {*left, ""})


def _references(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield reference
    for keyword, value in schema.items():
        inner = [value] if keyword in ONE else value if keyword in MANY else value.values() if keyword in NAMED else ()
        for one in inner:
            yield from _references(one)


def _ends(schema: Any, finite: set[str]) -> bool:
    """May there be a finite value, if those of the references `finite` are? False where that is certain."""
    if not isinstance(schema, dict):
        return schema is not False
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in finite:
        return False
    if any(keyword in schema and not any(_ends(one, finite) for one in schema[keyword]) for keyword in ("anyOf", "oneOf")):
        return False
    if not all(_ends(one, finite) for one in schema.get("allOf", ())):
        return False
    kinds = schema.get("type")
    if kinds is None or "enum" in schema or "const" in schema:
        return True
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in ("object", "array") or all(_ends(one, finite) for one in (_members if kind == "object" else _items)(schema)):
            return True
    return False


def _members(schema: dict[str, Any]) -> Iterator[Any]:
    """Schemas of the members that an object must have."""
    named = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name in named:
            yield named[name]
        elif "patternProperties" not in schema:
            yield schema.get("additionalProperties", True)


def _items(schema: dict[str, Any]) -> Iterator[Any]:
    """Schemas of the items that an array must have."""
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    yield from first[: int(least)]
    if least > len(first):
        yield schema.get("items", True)
