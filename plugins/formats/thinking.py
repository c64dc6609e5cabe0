"""Reasoning between <think> and </think>.

What it is: the specs `qwen3` (an answer that begins with <think>, or whose prompt ends with it, reasons) and `deepseek_r1` (every answer reasons, with
the mark or without, but where the prompt has closed it).
What it does not know: calls.
"""

from __future__ import annotations

from typing import Literal

from penstock.core.contract.formats import REASONING, Opening, Thinking
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, TableSplitter, probe, read_text, table

BEGIN, END = "<think>", "</think>"

TABLE = table(
    start=State(probe, {BEGIN: "reasoning"}, skip=" \t\r\n"),
    at_once=State(probe, {BEGIN: "reasoning", END: "content"}, channel=REASONING, skip=" \t\r\n", after="reasoning"),
    reasoning=State(read_text, {END: "content"}, channel=REASONING),
    content=State(read_text),
)


def _state(opening: Opening, without: str) -> str:
    """Where an answer begins; `without`: if the prompt has no mark at its end."""
    prompt = opening.prompt
    if opening.continues:
        return "reasoning" if prompt.rfind(BEGIN) > prompt.rfind(END) else "content"
    end = prompt.rstrip()
    return "at_once" if end.endswith(BEGIN) else "content" if end.endswith(END) else without


def _qwen3(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, _state(opening, "start"))


def _deepseek_r1(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, _state(opening, "at_once"))


def _r1(template: str) -> bool:
    return END in template and "<｜Assistant｜>" in template


def _thinking(without: str) -> Thinking:
    def state(opening: Opening) -> Literal["open", "may", "over"]:
        found = _state(opening, without)
        return "may" if found == "start" else "over" if found == "content" else "open"

    return Thinking(begin=BEGIN, end=END, state=state)


_LEVEL = API_LEVEL["output_formats"]

QWEN3 = FormatSpec(
    name="qwen3",
    api_level=_LEVEL,
    doc="<think> at the beginning (Qwen 3 and others).",
    role="reasoning",
    aliases=["think"],
    marks=[BEGIN, END],
    matches=lambda template: END in template and not _r1(template),
    factory=_qwen3,
    thinking=_thinking("start"),
)
DEEPSEEK_R1 = FormatSpec(
    name="deepseek_r1",
    api_level=_LEVEL,
    doc="Always up to </think> (DeepSeek R1).",
    role="reasoning",
    aliases=["deepseek-r1"],
    marks=[BEGIN, END],
    matches=_r1,
    factory=_deepseek_r1,
    thinking=_thinking("at_once"),
)
