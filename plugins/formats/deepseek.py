"""Calls between DeepSeek's marks, with the arguments in a fenced block (V3, R1) or bare (V3.1).

What it is: the specs `deepseek_v3` and `deepseek_v31`.
What it does not know: other formats, reasoning (thinking.py).
"""

from __future__ import annotations

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import FUNCTION, State, Table, TableSplitter, collect, probe, read_text, table
from penstock.plugins.formats.values import read_arguments

CALLS, CALL, SEP, CALL_END, CALLS_END = (f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_SPACE = " \t\r\n"


def _named(head: str) -> tuple[str, str] | None:
    name = head.strip()
    return ("arguments", name) if FUNCTION.fullmatch(name) else None


def _around(**call: State) -> Table:
    """`call` is the way from CALL to the arguments."""
    return table(
        content=State(read_text, {CALLS: "calls", CALL: "call"}),
        calls=State(probe, {CALL: "call", CALLS_END: "content"}, skip=_SPACE),
        next=State(probe, {CALL: "call", CALLS_END: "content"}, skip=_SPACE, silent=True),
        arguments=State(read_arguments, {"```": "tail", CALL_END: "next", CALLS_END: "content", CALL: "call"}, after="tail"),
        tail=State(read_text, {"```": "tail", CALL_END: "next", CALLS_END: "content", CALL: "call"}, silent=True),
        **call,
    )


V3 = _around(
    call=State(collect, {SEP: "name"}, decide=lambda head: ("name", "") if head.strip() == "function" else None),
    name=State(collect, {"```json": "arguments"}, decide=_named),
)
V31 = _around(call=State(collect, {SEP: "arguments"}, decide=_named))


def _make_v3(opening: Opening) -> TableSplitter:
    return TableSplitter(V3, "content", opening.tools)


def _make_v31(opening: Opening) -> TableSplitter:
    return TableSplitter(V31, "content", opening.tools)


def _spelling(before: str, between: str, after: str) -> Spelling:
    return Spelling(
        begin=CALLS, before=CALL + before, between=between, after=after + CALL_END, separator="\n", end=CALLS_END, hides=[CALLS, CALL]
    )


SPELLING_V3 = _spelling(f"function{SEP}", "\n```json\n", "\n```")
SPELLING_V31 = _spelling("", SEP, "")

_LEVEL = API_LEVEL["output_formats"]
_MARKS = [CALLS, CALL, SEP, CALL_END, CALLS_END]

DEEPSEEK_V3 = FormatSpec(
    name="deepseek_v3",
    api_level=_LEVEL,
    doc="Marks and a fenced block (DeepSeek V3, R1).",
    role="tools",
    aliases=["deepseekv3"],
    marks=_MARKS,
    matches=lambda template: CALL in template and "```json" in template,
    factory=_make_v3,
    spelling=lambda template: SPELLING_V3,
)
DEEPSEEK_V31 = FormatSpec(
    name="deepseek_v31",
    api_level=_LEVEL,
    doc="Marks and bare JSON (DeepSeek V3.1).",
    role="tools",
    aliases=["deepseekv31"],
    marks=_MARKS,
    matches=lambda template: CALL in template and "```json" not in template,
    factory=_make_v31,
    spelling=lambda template: SPELLING_V31,
)
