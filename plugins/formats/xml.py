"""Calls in tags, with each argument in a tag of its own.

What it is: the specs `qwen3_coder` (<tool_call><function=NAME><parameter=KEY>...), `seed_oss` and `minimax_m2` (the same with other words), `step3` (the same
between marks), `deepseek_v32` (the same, and each value says whether it is a string) and `glm45` (<tool_call>NAME<arg_key>...<arg_value>...).
What it does not know: how such calls are read (tagged.py) and asked for (unquoted.py), types (schemas.py).
"""

from __future__ import annotations

from penstock.core.contract.formats import Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.core.contract.layouts import Mark, Part, Text
from penstock.plugins.formats.scanner import State, collect, probe, read_text, table
from penstock.plugins.formats.tagged import SPACE, TaggedSplitter, read_called, read_fields, read_key, read_value, tags
from penstock.plugins.formats.unquoted import Tagging, arguments

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

# ------------------------------------------------------------------ the other way round


def _line(name: str) -> list[Part]:
    return [Text(f"<parameter={name}>\n")]


def _plain(name: str) -> list[Part]:
    return [Text(f"<parameter={name}>")]


def _quoted(prefix: str) -> Tagging:
    """Of <parameter name="KEY">."""
    end = f"</{prefix}parameter>"
    without = [end, f"\n<{prefix}parameter name=", f"\n</{prefix}invoke>"]
    return Tagging(lambda name: [Text(f'<{prefix}parameter name="{name}">')], end, [Text("\n")], without, line=True, trimmed=True)


_ENDED = ["</parameter>", "\n<parameter=", "\n</function>"]
_DSML_TAGGING = Tagging(
    lambda name: [],
    f"</{_DSML}parameter>",
    [Text("\n")],
    [f"</{_DSML}parameter>", f"\n<{_DSML}parameter name=", f"\n</{_DSML}invoke>"],
    line=True,
    trimmed=True,
    loose=True,
    says=lambda name, text: [Text("<"), Mark(_DSML), Text(f'parameter name="{name}" string="{"true" if text else "false"}">')],
)
QWEN_SPELLING = Spelling(
    before="<tool_call>\n<function=",
    between=">\n",
    after="</function>\n</tool_call>",
    separator="\n",
    hides=["<tool_call>", "<function="],
    arguments=arguments(Tagging(_line, "\n</parameter>", [Text("\n")], _ENDED)),
)
SEED_SPELLING = Spelling(
    before="<seed:tool_call>\n<function=",
    between=">\n",
    after="</function>\n</seed:tool_call>",
    separator="\n",
    hides=["<seed:tool_call>"],
    arguments=arguments(Tagging(_plain, "</parameter>", [Text("\n")], _ENDED, line=True, trimmed=True)),
)
MINIMAX_SPELLING = Spelling(
    begin="<minimax:tool_call>\n",
    before='<invoke name="',
    between='">\n',
    after="</invoke>\n",
    end="</minimax:tool_call>",
    hides=["<minimax:tool_call>"],
    arguments=arguments(_quoted("")),
)
DEEPSEEK_SPELLING = Spelling(
    begin=f"<{_DSML}function_calls>\n",
    before=f'<{_DSML}invoke name="',
    between='">\n',
    after=f"</{_DSML}invoke>\n",
    end=f"</{_DSML}function_calls>",
    hides=[f"<{_DSML}function_calls>"],
    arguments=arguments(_DSML_TAGGING),
)
STEP_SPELLING = Spelling(
    begin=f"{CALLS}\n",
    before=f'{CALL}function{SEP}<steptml:invoke name="',
    between='">\n',
    after=f"</steptml:invoke>{CALL_END}\n",
    end=CALLS_END,
    hides=[CALLS, CALL],
    arguments=arguments(_quoted("steptml:")),
)


def _glm(template: str) -> Spelling:
    """Version 4.7 leaves the lines' ends out."""
    line = "" if "</arg_key><arg_value>" in template else "\n"

    def before(name: str) -> list[Part]:
        return [Mark("<arg_key>"), Text(name), Mark("</arg_key>"), *ends, Mark("<arg_value>")]

    ends: list[Part] = [Text(line)] if line else []
    return Spelling(
        before="<tool_call>",
        between=line,
        after="</tool_call>",
        separator="\n",
        hides=["<tool_call>"],
        arguments=arguments(Tagging(before, "</arg_value>", ends, ["</arg_value>", "\n<arg_key>", "\n</tool_call>"], loose=True)),
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
    spelling=lambda template: QWEN_SPELLING,
)
SEED_OSS = FormatSpec(
    name="seed_oss",
    api_level=_LEVEL,
    doc="<function=...> and <parameter=...> tags in <seed:tool_call> (Seed-OSS).",
    role="tools",
    marks=["<seed:tool_call>", "</seed:tool_call>"],
    matches=lambda template: "<seed:tool_call>" in template,
    factory=lambda opening: TaggedSplitter(SEED, "content", opening),
    spelling=lambda template: SEED_SPELLING,
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
    spelling=lambda template: MINIMAX_SPELLING,
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
    spelling=lambda template: DEEPSEEK_SPELLING,
)
STEP3 = FormatSpec(
    name="step3",
    api_level=_LEVEL,
    doc="<steptml:invoke> and <steptml:parameter> between marks (Step 3).",
    role="tools",
    marks=[CALLS, CALL, SEP, CALL_END, CALLS_END],
    matches=lambda template: CALL in template,
    factory=lambda opening: TaggedSplitter(STEP, "content", opening),
    spelling=lambda template: STEP_SPELLING,
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
    spelling=_glm,
)
