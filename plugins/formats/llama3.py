"""Calls as bare JSON, as Llama 3 writes them: {"name": ..., "parameters": {...}}, several separated by semicolons, perhaps after <|python_tag|>.

What it is: the spec `llama3_json`.
What it does not know: other formats.
"""

from __future__ import annotations

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, TableSplitter, probe, read_text, table
from penstock.plugins.formats.values import read_object

TABLE = table(
    start=State(probe, {"<|python_tag|>": "call"}, skip=" \t\r\n", chars={"{": "call"}),
    call=State(read_object, {"<|python_tag|>": "call"}, after="between", bare=True),
    between=State(probe, {"<|python_tag|>": "call"}, skip=" \t\r\n;,", chars={"{": "call"}),
    content=State(read_text, {"<|python_tag|>": "call"}),
)


def matches(template: str) -> bool:
    return "<|python_tag|>" in template or ("<|eot_id|>" in template and '"parameters"' in template)


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "start")


SPELLING = Spelling(before='{"name": "', between='", "parameters": ', after="}", separator="; ", hides=["<|python_tag|>"], first="{")

LLAMA3_JSON = FormatSpec(
    name="llama3_json",
    api_level=API_LEVEL["output_formats"],
    doc="Bare JSON (Llama 3).",
    role="tools",
    aliases=["llama3", "llama4_json"],
    marks=["<|python_tag|>"],
    matches=matches,
    factory=_make,
    spelling=lambda template: SPELLING,
)
