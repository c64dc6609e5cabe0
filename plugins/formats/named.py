"""A function's arguments by their names, for formats that spell each for itself and not all as one JSON object.

What it is: `named`, the schemas of a function's properties in their order, if its schema says no more of them; `unstrict`, those of a function whose arguments
need not obey it.
What it does not know: formats, how a value is written.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from penstock.core.protocol.calling import Function
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature

NOTES = frozenset(["title", "description", "$schema", "$id", "$comment", "examples", "default"])
DEFINED = ("$defs", "definitions")


class Argument(NamedTuple):
    """`schema` is the property's own, without the definitions that it may refer to."""

    name: str
    schema: Any
    required: bool


class Arguments(NamedTuple):
    """In the schema's order. `definitions`: what their schemas' references mean."""

    arguments: list[Argument]
    definitions: dict[str, Any]

    def whole(self, schema: Any) -> str:
        """A schema of one of them, as JSON that stands for itself."""
        return json.dumps({**schema, **self.definitions} if isinstance(schema, dict) else schema)


def named(function: Function, names: str, writer: str) -> Arguments:
    """`names` is an expression for names that can be written so. Raises UnsupportedFeature naming the function's field, and the keyword that `writer` (whatever
    writes arguments so) cannot express, or InvalidRequest for a schema that is none."""
    schema: dict[str, Any] = json.loads(function.schema)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidRequest(f"{function.field}: properties must be an object, and required a list of names.", param=function.field)
    odd = next(
        (
            f"the keyword {key[:80]!r}"
            for key in schema
            if key not in {*NOTES, *DEFINED, "type", "properties", "required", "additionalProperties"}
        ),
        None,
    )
    odd = odd or next((f"a property of the name {name[:80]!r}" for name in properties if re.fullmatch(names, name) is None), None)
    odd = odd or next((f"{name[:80]!r} in required, but not in properties" for name in required if name not in properties), None)
    if odd is None and re.search(r'"\$ref": *"#(?!/(\$defs|definitions)/)', function.schema):
        odd = "a $ref outside of $defs"
    if odd is not None:
        raise UnsupportedFeature(f"{function.field} holds {odd}, which {writer} cannot express.", param=function.field)
    return Arguments(
        [Argument(name, own, name in required) for name, own in properties.items()],
        {name: schema[name] for name in DEFINED if name in schema},
    )


def unstrict(function: Function, names: str) -> list[tuple[str, Any, Any]]:
    """Arguments of whose schema (`hint`) nothing is certain: name, own schema, the function's."""
    schema = json.loads(function.hint)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = properties.items() if isinstance(properties, dict) else ()
    return [(name, own, schema) for name, own in found if re.fullmatch(names, name)]
