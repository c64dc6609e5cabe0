"""Calls in tags, with each argument in a tag of its own.

What it is: the specs `qwen3_coder` (<tool_call><function=NAME><parameter=KEY>...), `seed_oss` and `minimax_m2` (the same with other words), `step3` (the same
between marks), `deepseek_v32` (the same, and each value says whether it is a string) and `glm45` (<tool_call>NAME<arg_key>...<arg_value>...).
What it does not know: how such calls are read (tagged.py), types (schemas.py).
"""

from __future__ import annotations

from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, collect, probe, read_text, table
from penstock.plugins.formats.tagged import SPACE, TaggedSplitter, read_called, read_fields, read_key, read_value, tags

_LEVEL = API_LEVEL["output_formats"]

QWEN = tags(
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "<parameter=",
    ended=("</function>", "</parameter>"),
    content=State(read_text, {"<tool_call>": "call", "<function=": "name"}),  # the outer tag is often forgotten
)
SEED = tags("<seed:tool_call>", "</seed:tool_call>", "<function=", "<parameter=", ended=("</function>", "</parameter>"))
MINIMAX = tags("<minimax:tool_call>", "</minimax:tool_call>", "<invoke name=", "<parameter name=", ended=("</invoke>", "</parameter>"))
_DSML = "｜DSML｜"
DEEPSEEK = tags(
    f"<{_DSML}function_calls>",
    f"</{_DSML}function_calls>",
    f"<{_DSML}invoke name=",
    f"<{_DSML}parameter name=",
    ended=(f"</{_DSML}invoke>", f"</{_DSML}parameter>"),
)

CALLS, CALL, SEP, CALL_END, CALLS_END = (f"<｜tool_{word}｜>" for word in ("calls_begin", "call_begin", "sep", "call_end", "calls_end"))
_NEXT = {CALL: "head", CALL_END: "next", CALLS_END: "content"}
STEP = tags(
    CALLS,
    CALLS_END,
    "<steptml:invoke name=",
    "<steptml:parameter name=",
    ended=("</steptml:invoke>", "</steptml:parameter>"),
    content=State(read_text, {CALLS: "calls", CALL: "head"}),
    calls=State(probe, {CALL: "head", CALLS_END: "content"}, skip=SPACE),
    head=State(collect, {SEP: ""}, decide=lambda head: ("call", "") if head.strip() == "function" else None),
    tail=State(probe, _NEXT, skip=SPACE, after="junk", silent=True),
    next=State(probe, _NEXT, skip=SPACE, silent=True),
    junk=State(read_text, _NEXT),
)

GLM = table(
    content=State(read_text, {"<tool_call>": "name"}),
    name=State(read_called, {"<arg_key>": "key", "</tool_call>": "content"}),
    fields=State(read_fields, {"<arg_key>": "key", "</tool_call>": "content", "<tool_call>": "name"}, silent=True),
    key=State(read_key, {"</arg_key>": "between"}, silent=True),
    between=State(probe, {"<arg_value>": "value"}, skip=SPACE, silent=True),
    value=State(read_value, {"</arg_value>": "fields", "\n<arg_key>": "key", "\n</tool_call>": "content"}, silent=True),
)


QWEN3_CODER = FormatSpec(
    name="qwen3_coder",
    api_level=_LEVEL,
    doc="<function=...> and <parameter=...> tags (Qwen 3 Coder, Qwen 3.5, Step 3.5, Nemotron 3).",
    role="tools",
    aliases=["qwen3_xml", "step3p5", "mimo"],
    marks=["<tool_call>", "</tool_call>"],
    matches=lambda template: "<function=" in template and "<tool_call>" in template,
    factory=lambda opening: TaggedSplitter(QWEN, "content", opening),
)
SEED_OSS = FormatSpec(
    name="seed_oss",
    api_level=_LEVEL,
    doc="<function=...> and <parameter=...> tags in <seed:tool_call> (Seed-OSS).",
    role="tools",
    marks=["<seed:tool_call>", "</seed:tool_call>"],
    matches=lambda template: "<seed:tool_call>" in template,
    factory=lambda opening: TaggedSplitter(SEED, "content", opening),
)
MINIMAX_M2 = FormatSpec(
    name="minimax_m2",
    api_level=_LEVEL,
    doc="<invoke> and <parameter> in <minimax:tool_call> (MiniMax M2).",
    role="tools",
    aliases=["minimax-m2"],
    marks=["<minimax:tool_call>", "</minimax:tool_call>"],
    matches=lambda template: "<minimax:tool_call>" in template,
    factory=lambda opening: TaggedSplitter(MINIMAX, "content", opening),
)
DEEPSEEK_V32 = FormatSpec(
    name="deepseek_v32",
    api_level=_LEVEL,
    doc="｜DSML｜ tags (DeepSeek V3.2).",
    role="tools",
    aliases=["deepseekv32"],
    marks=[_DSML],
    matches=lambda template: _DSML in template,
    factory=lambda opening: TaggedSplitter(DEEPSEEK, "content", opening, loose=True),
)
STEP3 = FormatSpec(
    name="step3",
    api_level=_LEVEL,
    doc="<steptml:invoke> and <steptml:parameter> between marks (Step 3).",
    role="tools",
    marks=[CALLS, CALL, SEP, CALL_END, CALLS_END],
    matches=lambda template: CALL in template,
    factory=lambda opening: TaggedSplitter(STEP, "content", opening),
)
GLM45 = FormatSpec(
    name="glm45",
    api_level=_LEVEL,
    doc="<arg_key> and <arg_value> in <tool_call> (GLM 4.5 to 4.7).",
    role="tools",
    aliases=["glm47", "glm4_moe", "glm"],
    marks=["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    matches=lambda template: "<arg_key>" in template,
    factory=lambda opening: TaggedSplitter(GLM, "content", opening, loose=True),
)
