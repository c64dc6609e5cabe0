"""The messages' wire form against a snapshot: structs grow by fields at their end, with defaults, and nothing else changes.

`PENSTOCK_UPDATE_SNAPSHOT=1 make test ARGS=tests/contract` writes the snapshot anew; what may not change is refused all the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import pytest

from penstock.core.protocol import messages
from penstock.core.protocol.messages import Hello, Message, message_types, union_of
from penstock.core.runtime.frames import schema_of

SNAPSHOT = Path(__file__).parent / "wire.txt"
LINKS = ("edge>text", "text>edge", "text>engine", "engine>text", "root>child", "child>root")


def fields(line: str) -> tuple[str, list[tuple[str, str]]]:
    """A line of the schema: (struct, [(field, type as written)])."""
    name, _, inner = line.partition("(")
    depth, parts, current = 0, [], ""
    for char in inner.removesuffix(")"):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    listed = [part.strip().partition(": ") for part in [*parts, current] if part.strip()]
    return name, [(field, kind) for field, _, kind in listed]


def broken(old: str, new: str) -> str:
    """What makes `new` another struct to who speaks `old`; "" if it only grew (a type may take further alternatives)."""
    (name, before), (_, after) = fields(old), fields(new)
    for index, (field, kind) in enumerate(before):
        if index >= len(after) or after[index][0] != field:
            return f"{name}.{field} is gone or has moved"
        if after[index][1] != kind and not _widened(kind, after[index][1]):
            return f"{name}.{field} was {kind} and is {after[index][1]}"
    return ""


def _widened(old: str, new: str) -> bool:
    literal = r"Literal\[(.*)\]"
    a, b = re.fullmatch(literal, old), re.fullmatch(literal, new)
    if a and b:
        return b.group(1).startswith(a.group(1))
    if a and new == "str":  # any word, where it was one of these
        return True
    return set(old.split(" | ")) < set(new.split(" | "))


def test_messages_only_grow() -> None:
    now = {line.partition("(")[0]: line for line in schema_of(message_types())}
    del now["Config"]  # named options, which only processes of one start tell each other: their order means nothing
    kept = {line.partition("(")[0]: line for line in SNAPSHOT.read_text(encoding="utf-8").splitlines()} if SNAPSHOT.exists() else {}
    wrong = [word for name, line in kept.items() if (word := f"{name} is gone" if name not in now else broken(line, now[name]))]
    assert not wrong, wrong
    if os.environ.get("PENSTOCK_UPDATE_SNAPSHOT") == "1":
        SNAPSHOT.write_text("".join(line + "\n" for line in now.values()), encoding="utf-8")
    else:
        assert now == kept, "messages grew: see this module's docstring"


def test_what_was_added_has_a_default() -> None:
    """An older peer leaves new fields out; required ones are those of the snapshot's first days, so a required field may not be behind an
    optional one that the wire already had."""
    for kind in message_types():
        required = [field.required for field in msgspec.structs.fields(kind)]
        first_default = required.index(False) if False in required else len(required)
        late = [field.name for field in msgspec.structs.fields(kind)[first_default:] if field.required]
        assert not late, f"{kind.__name__}: {late}"


def test_tags_are_unique_on_every_link() -> None:
    for link in LINKS:
        tags = [kind.__struct_config__.tag for kind in union_of(link).__args__]  # type: ignore[arg-type]
        assert len(tags) == len(set(tags)), link
        assert Hello in union_of(link).__args__ or link.startswith(("root", "child"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", message_types(), ids=lambda kind: kind.__name__)
def test_every_message_travels_as_its_own_name(kind: type[Message]) -> None:
    assert kind.__struct_config__.tag == kind.__name__
    assert getattr(messages, kind.__name__) is kind


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        ("A(x: int, y: str)", "A(x: int, y: str, z: bool)", True),
        ("A(x: int, y: str)", "A(y: str, x: int)", False),
        ("A(x: int, y: str)", "A(x: int)", False),
        ("A(x: int)", "A(x: int | None)", True),
        ("A(x: int | None)", "A(x: int)", False),
        ("A(x: Literal['a', 'b'])", "A(x: Literal['a', 'b', 'c'])", True),
        ("A(x: Literal['a', 'b'])", "A(x: Literal['b', 'a'])", False),
        ("A(x: Literal['a', 'b'])", "A(x: str)", True),
        ("A(x: str)", "A(x: Literal['a', 'b'])", False),
        ("A(x: dict[str, int], y: int)", "A(x: dict[str, float], y: int)", False),
    ],
)
def test_the_rule_itself(old: str, new: str, good: bool) -> None:
    assert (broken(old, new) == "") is good
