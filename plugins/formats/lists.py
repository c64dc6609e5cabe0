"""Calls as JSON objects, in a list or alone, after a mark.

What it is: the specs `granite` (<|tool_call|>[...]), `jamba` (<tool_calls>[...]</tool_calls>; Hunyuan and MiniMax M1 too), `phi4_mini_json` (functools[...]),
`internlm` (<|action_start|><|plugin|>{...}<|action_end|>), `xlam` (a bare list) and `cohere_command` (<|START_ACTION|>[...]<|END_ACTION|>, and the
marks around its reasoning and its text).
What it does not know: how objects are read (values.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.contract.formats import REASONING, Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, Table, TableSplitter, probe, read_text, table
from penstock.plugins.formats.values import read_object

_LEVEL = API_LEVEL["output_formats"]
_SPACE = " \t\r\n"


def listed(begins: Sequence[str], ends: Sequence[str] = (), **more: State) -> Table:
    """A list of calls, or calls alone, after one of `begins`, and perhaps before one of `ends`."""
    on = {**dict.fromkeys(begins, "calls"), **dict.fromkeys(ends, "content")}
    states = {
        "content": State(read_text, dict.fromkeys(begins, "calls")),
        "calls": State(probe, {"[": "list"}, skip=_SPACE, chars={"{": "call"}),
        "list": State(probe, {"]": "tail" if ends else "content", **on}, skip=_SPACE + ",", chars={"{": "call"}),
        "call": State(read_object, on, after="list"),
        "tail": State(probe, on, skip=_SPACE, after="junk", silent=True),
        "junk": State(read_text, on),
    }
    return table(**{**states, **more})


GRANITE_TABLE = listed(["<|tool_call|>", "<tool_call>"], ["</tool_call>"])
JAMBA_TABLE = listed(["<tool_calls>"], ["</tool_calls>"])
PHI_TABLE = listed(
    ["<|tool_call|>"],
    ["<|/tool_call|>"],
    content=State(read_text, {"<|tool_call|>": "calls", "functools[": "list"}),
)
_PLUGIN = {"<|action_start|>": "start", "<|action_end|>": "content"}
INTERNLM_TABLE = table(
    content=State(read_text, {"<|action_start|>": "start"}),
    start=State(probe, {"<|plugin|>": "call"}, skip=_SPACE),
    call=State(read_object, _PLUGIN, after="tail"),
    tail=State(probe, _PLUGIN, skip=_SPACE, after="junk", silent=True),
    junk=State(read_text, _PLUGIN),
)
_FENCES = {"```json": "calls", "<tool_call>": "calls", "[TOOL_CALLS]": "calls"}
XLAM_TABLE = listed(
    ["<tool_call>", "[TOOL_CALLS]"],
    ["</tool_call>", "```"],
    start=State(probe, _FENCES, skip=_SPACE, chars={"[": "calls"}),
    content=State(read_text, {"<tool_call>": "calls", "[TOOL_CALLS]": "calls"}),
    call=State(read_object, {"</tool_call>": "content"}, after="list", bare=True),
)

THINKING, THINKING_END = "<|START_THINKING|>", "<|END_THINKING|>"
ACTION, ACTION_END = "<|START_ACTION|>", "<|END_ACTION|>"
RESPONSE, TEXT = "<|START_RESPONSE|>", "<|START_TEXT|>"
_RESPONSES = [RESPONSE, "<|END_RESPONSE|>", TEXT, "<|END_TEXT|>"]
_PARTS = {**dict.fromkeys(_RESPONSES, "content"), THINKING: "reasoning", ACTION: "calls"}
COHERE_TABLE = listed(
    [ACTION],
    [ACTION_END],
    start=State(probe, _PARTS, skip=_SPACE),
    at_once=State(probe, {THINKING: "reasoning", THINKING_END: "start"}, channel=REASONING, skip=_SPACE, after="reasoning"),
    reasoning=State(read_text, {THINKING_END: "start"}, channel=REASONING),
    content=State(read_text, _PARTS),
    call=State(read_object, {ACTION_END: "content", ACTION: "calls"}, after="list", named="tool_name"),
)


def _cohere(opening: Opening) -> TableSplitter:
    end = opening.prompt.rstrip()
    if opening.continues or end.endswith((RESPONSE, TEXT)):
        return TableSplitter(COHERE_TABLE, "content", opening.tools)
    return TableSplitter(COHERE_TABLE, "at_once" if end.endswith(THINKING) else "start", opening.tools)


_CALL = {"before": '{"name": "', "between": '", "arguments": ', "after": "}", "separator": ", "}
GRANITE_SPELLING = Spelling(begin="<|tool_call|>[", end="]", hides=["<|tool_call|>", "<tool_call>"], **_CALL)  # type: ignore[arg-type]
JAMBA_SPELLING = Spelling(begin="<tool_calls>[", end="]</tool_calls>", hides=["<tool_calls>"], **_CALL)  # type: ignore[arg-type]
PHI_SPELLING = Spelling(begin="functools[", end="]", hides=["functools[", "<|tool_call|>"], **_CALL)  # type: ignore[arg-type]
XLAM_SPELLING = Spelling(begin="[", end="]", hides=["<tool_call>", "[TOOL_CALLS]"], first="[`", **_CALL)  # type: ignore[arg-type]
INTERNLM_SPELLING = Spelling(
    before='<|action_start|><|plugin|>{"name": "',
    between='", "parameters": ',
    after="}<|action_end|>",
    hides=["<|action_start|>"],
)

GRANITE = FormatSpec(
    name="granite",
    api_level=_LEVEL,
    doc="<|tool_call|> and a JSON list (Granite 3).",
    role="tools",
    marks=["<|tool_call|>", "<tool_call>", "</tool_call>"],
    matches=lambda template: "<|tool_call|>" in template,
    factory=lambda opening: TableSplitter(GRANITE_TABLE, "content", opening.tools),
    spelling=lambda template: GRANITE_SPELLING,
)
JAMBA = FormatSpec(
    name="jamba",
    api_level=_LEVEL,
    doc="A JSON list in <tool_calls> (Jamba, Hunyuan, MiniMax M1).",
    role="tools",
    aliases=["hunyuan_a13b", "hunyuan", "minimax"],
    marks=["<tool_calls>", "</tool_calls>"],
    matches=lambda template: "<tool_calls>" in template,
    factory=lambda opening: TableSplitter(JAMBA_TABLE, "content", opening.tools),
    spelling=lambda template: JAMBA_SPELLING,
)
PHI4_MINI = FormatSpec(
    name="phi4_mini_json",
    api_level=_LEVEL,
    doc="functools and a JSON list (Phi 4 mini).",
    role="tools",
    aliases=["phi4_mini"],
    marks=["<|tool_call|>", "<|/tool_call|>"],
    matches=lambda template: "<|/tool|>" in template or "functools[" in template,
    factory=lambda opening: TableSplitter(PHI_TABLE, "content", opening.tools),
    spelling=lambda template: PHI_SPELLING,
)
INTERNLM = FormatSpec(
    name="internlm",
    api_level=_LEVEL,
    doc="<|action_start|><|plugin|> and JSON (InternLM 2).",
    role="tools",
    aliases=["internlm2"],
    marks=["<|action_start|>", "<|plugin|>", "<|action_end|>"],
    matches=lambda template: "<|plugin|>" in template,
    factory=lambda opening: TableSplitter(INTERNLM_TABLE, "content", opening.tools),
    spelling=lambda template: INTERNLM_SPELLING,
)
XLAM = FormatSpec(
    name="xlam",
    api_level=_LEVEL,
    doc="A JSON list at the beginning, bare, fenced or tagged (xLAM); only by name.",
    role="tools",
    marks=["<tool_call>", "</tool_call>", "[TOOL_CALLS]"],
    matches=lambda template: False,
    factory=lambda opening: TableSplitter(XLAM_TABLE, "start", opening.tools),
    spelling=lambda template: XLAM_SPELLING,
)
COHERE = FormatSpec(
    name="cohere_command",
    api_level=_LEVEL,
    doc="<|START_ACTION|>, <|START_THINKING|> and <|START_RESPONSE|> (Command R7B, Command A).",
    role="both",
    aliases=["cohere_command3", "cohere_command4", "cohere", "command_r7b", "command_a"],
    marks=[THINKING, THINKING_END, ACTION, ACTION_END, *_RESPONSES],
    matches=lambda template: ACTION in template,
    factory=_cohere,
)
