"""Calls in tags: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes, Qwen and the demo model Brook write them.

What it is: the spec `hermes`.
What it does not know: other formats.
"""

from __future__ import annotations

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, TableSplitter, probe, read_text, table
from penstock.plugins.formats.values import read_object

TABLE = table(
    content=State(read_text, {"<tool_call>": "call"}),
    call=State(read_object, {"</tool_call>": "content", "<tool_call>": "call"}, after="tail"),
    tail=State(probe, {"</tool_call>": "content", "<tool_call>": "call"}, skip=" \t\r\n", after="junk", silent=True),
    junk=State(read_text, {"</tool_call>": "content", "<tool_call>": "call"}),
)


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "content", opening.tools)


SPELLING = Spelling(
    before='<tool_call>\n{"name": "', between='", "arguments": ', after="}\n</tool_call>", separator="\n", hides=["<tool_call>"]
)

HERMES = FormatSpec(
    name="hermes",
    api_level=API_LEVEL["output_formats"],
    doc="JSON in <tool_call> tags (Hermes, Qwen, Ernie 4.5, the demo model).",
    role="tools",
    aliases=["qwen", "qwen25", "brook", "ernie45"],
    marks=["<tool_call>", "</tool_call>"],
    matches=lambda template: "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template,
    factory=_make,
    spelling=lambda template: SPELLING,
)
