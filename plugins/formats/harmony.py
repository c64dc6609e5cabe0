"""gpt-oss's channels: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

What it is: the spec `openai`: `analysis` is reasoning, a message to a function is a call, all else content.
What it does not know: other formats.
"""

from __future__ import annotations

import re

from penstock.core.contract.formats import REASONING, Opening, Spelling, Thinking
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import FUNCTION, State, TableSplitter, collect, probe, read_text, table
from penstock.plugins.formats.values import read_arguments

START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN = (
    f"<|{word}|>" for word in ("start", "channel", "message", "constrain", "end", "call", "return")
)
_TO = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_NEXT = {START: "head", CHANNEL: "head", END: "between", CALL: "between", RETURN: "between"}


def _decide(head: str) -> tuple[str, str] | None:
    to = _TO.search(head)
    if to is not None:
        return ("arguments", to.group(1)) if FUNCTION.fullmatch(to.group(1)) else None
    return ("reasoning" if "analysis" in head else "content"), ""


TABLE = table(
    start=State(probe, {CHANNEL: "head", START: "head", MESSAGE: "content"}, skip=" \t\r\n"),
    between=State(probe, {CHANNEL: "head", START: "head"}, skip=" \t\r\n", silent=True),
    head=State(collect, {MESSAGE: ""}, decide=_decide, silent=True),
    reasoning=State(read_text, _NEXT, channel=REASONING),
    content=State(read_text, _NEXT),
    arguments=State(read_arguments, _NEXT, after="between"),
)


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "content" if opening.continues else "start", opening.tools)


_MARKS = [START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN]
SPELLING = Spelling(before=f"{CHANNEL}commentary to=functions.", between=f" {CONSTRAIN}json{MESSAGE}", after="", most=1, hides=_MARKS)
THINKING = Thinking(
    begin=f"{CHANNEL}analysis{MESSAGE}",
    end=f"{END}{START}assistant",
    state=lambda opening: "over" if opening.continues else "may",
    again=True,
    hides=_MARKS,
    answer=f"{CHANNEL}final{MESSAGE}",
)

OPENAI = FormatSpec(
    name="openai",
    api_level=API_LEVEL["output_formats"],
    doc="gpt-oss's channels.",
    role="both",
    aliases=["gpt-oss", "gpt_oss", "harmony", "openai_gptoss"],
    marks=_MARKS,
    matches=lambda template: CHANNEL in template and MESSAGE in template,
    factory=_make,
    spelling=lambda template: SPELLING,
    thinking=THINKING,
)
