"""Calls as Mistral's models write them: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and newer ones [TOOL_CALLS]name[ARGS]{...}.

What it is: the spec `mistral`.
What it does not know: other formats.
"""

from __future__ import annotations

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import FUNCTION, State, TableSplitter, collect, probe, read_text, table
from penstock.plugins.formats.values import read_arguments, read_object

_SPACE = " \t\r\n"


def _named(head: str) -> tuple[str, str] | None:
    """The name is all that stands before arguments; an id may follow it."""
    name = head.strip()
    return ("arguments", name) if FUNCTION.fullmatch(name) else None


TABLE = table(
    content=State(read_text, {"[TOOL_CALLS]": "calls"}),
    calls=State(probe, {"[": "list"}, skip=_SPACE, after="name"),
    list=State(probe, {"]": "content"}, skip=_SPACE + ",", chars={"{": "call"}),
    call=State(read_object, {"[TOOL_CALLS]": "calls"}, after="list"),
    name=State(collect, {"[ARGS]": "arguments", "[CALL_ID]": "id"}, chars={"{": "arguments"}, decide=_named),
    id=State(collect, {"[ARGS]": "arguments"}, decide=lambda head: ("arguments", "")),
    arguments=State(read_arguments, {"[TOOL_CALLS]": "calls"}),
)


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "content", opening.tools)


LIST = Spelling(
    begin="[TOOL_CALLS][",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    end="]",
    hides=["[TOOL_CALLS]"],
)
ARGS = Spelling(before="[TOOL_CALLS]", between="[ARGS]", after="", hides=["[TOOL_CALLS]"])

MISTRAL = FormatSpec(
    name="mistral",
    api_level=API_LEVEL["output_formats"],
    doc="[TOOL_CALLS] and JSON (Mistral).",
    role="tools",
    marks=["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    short_ids=True,
    matches=lambda template: "[TOOL_CALLS]" in template,
    factory=_make,
    spelling=lambda template: ARGS if "[ARGS]" in template else LIST,
)
