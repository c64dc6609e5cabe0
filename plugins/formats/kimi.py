"""Calls as Kimi K2 writes them: <|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>{...}<|tool_call_end|>, in a section of their own.

What it is: the spec `kimi_k2`. NUMBER counts a conversation's calls, and the whole is the call's id, which the template writes again: so ids are made so.
What it does not know: other formats, reasoning (thinking.py).
"""

from __future__ import annotations

import re

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import FUNCTION, State, TableSplitter, collect, probe, read_text, table
from penstock.plugins.formats.values import read_arguments

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, SEP, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_SPACE = " \t\r\n"
_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?", re.DOTALL)


def _named(head: str) -> tuple[str, str] | None:
    found = _NAME.fullmatch(head.strip())
    return ("arguments", found.group(1)) if found is not None and FUNCTION.fullmatch(found.group(1)) else None


_NEXT = {CALL: "call", CALL_END: "next", SECTION_END: "content"}
TABLE = table(
    content=State(read_text, {SECTION: "calls", CALL: "call"}),
    calls=State(probe, {CALL: "call", SECTION_END: "content"}, skip=_SPACE),
    call=State(collect, {SEP: "arguments"}, decide=_named),
    arguments=State(read_arguments, _NEXT, after="tail"),
    tail=State(read_text, _NEXT, silent=True),
    next=State(probe, {CALL: "call", SECTION_END: "content"}, skip=_SPACE, silent=True),
)


class KimiSplitter(TableSplitter):
    __slots__ = ("_before",)

    def __init__(self, opening: Opening) -> None:
        super().__init__(TABLE, "content", opening.tools)
        self._before = opening.prompt.count(CALL)

    def call_id(self, call: int, name: str) -> str:
        """See Splitter."""
        return f"functions.{name}:{self._before + call}"


SPELLING = Spelling(
    begin=SECTION,
    before=f"{CALL}functions.",
    between=f":0{SEP}",
    after=CALL_END,
    end=SECTION_END,
    hides=[SECTION, CALL],
)

KIMI_K2 = FormatSpec(
    name="kimi_k2",
    api_level=API_LEVEL["output_formats"],
    doc="A section of marked calls (Kimi K2).",
    role="tools",
    aliases=["kimi"],
    marks=[SECTION, CALL, SEP, CALL_END, SECTION_END],
    matches=lambda template: SECTION in template,
    factory=KimiSplitter,
    spelling=lambda template: SPELLING,
)
