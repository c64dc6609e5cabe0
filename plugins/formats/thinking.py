"""Reasoning between two marks, as in <think>...</think>.

What it is: the specs `qwen3` (an answer that begins with <think>, or whose prompt ends with it, reasons), `deepseek_r1` (every answer reasons, with
the mark or without, but where the prompt has closed it), and those of models that have other marks, or marks around the answer too; a spec whose
model's calls have a format of the same name goes by that name as well.
What it does not know: calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from penstock.core.contract.formats import REASONING, Opening, Thinking
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.kimi import SECTION
from penstock.plugins.formats.scanner import State, Table, TableSplitter, probe, read_text, table

BEGIN, END = "<think>", "</think>"
_SPACE = " \t\r\n"


def between(begins: Sequence[str], ends: Sequence[str], *, instead: Sequence[str] = (), around: tuple[str, str] | None = None) -> Table:
    """Reasoning from one of `begins` to one of `ends`, or to one of `instead`, which are content. `around`: marks that may stand around the
    answer."""
    starts = dict.fromkeys(begins, "reasoning")
    after = dict.fromkeys(ends, "content" if around is None else "answer")
    states = {
        "start": State(probe, starts, skip=_SPACE),
        "at_once": State(probe, {**starts, **after}, channel=REASONING, skip=_SPACE, after="reasoning"),
        "reasoning": State(read_text, {**after, **dict.fromkeys(instead, "content")}, channel=REASONING, keep=frozenset(instead)),
        "content": State(read_text),
    }
    if around is not None:
        begin, end = around
        states["start"] = State(probe, {**starts, begin: "lead"}, skip=_SPACE)
        states["answer"] = State(probe, {begin: "lead"}, skip=_SPACE, silent=True)
        states["lead"] = State(probe, skip=_SPACE, after="inside", silent=True)
        states["inside"] = State(read_text, {end: "content", "\n" + end: "content"})
    return table(**states)


def _make(states: Table, begin: str, end: str, without: str = "start") -> Callable[[Opening], TableSplitter]:
    """`without`: where an answer begins if the prompt has no mark at its end."""

    closed = "answer" if "answer" in states else "content"

    def make(opening: Opening) -> TableSplitter:
        place = _place(opening, begin, end, without)
        return TableSplitter(states, closed if place == "over" else place)

    return make


def _place(opening: Opening, begin: str, end: str, without: str) -> str:
    """Where an answer begins: a state's name, or "over" after a mark that closed the reasoning."""
    prompt = opening.prompt
    if opening.continues:
        return "reasoning" if prompt.rfind(begin) > prompt.rfind(end) else "content"
    last = prompt.rstrip()
    return "at_once" if last.endswith(begin) else "over" if last.endswith(end) else without


def _thinking(begin: str, end: str, without: str = "start", *, hides: Sequence[str] = ()) -> Thinking:
    """The same for grammars."""

    def state(opening: Opening) -> Literal["open", "may", "over"]:
        place = _place(opening, begin, end, without)
        return "may" if place == "start" else "open" if place in ("at_once", "reasoning") else "over"

    return Thinking(begin=begin, end=end, state=state, hides=list(hides))


def _r1(template: str) -> bool:
    return END in template and "<｜Assistant｜>" in template


_LEVEL = API_LEVEL["output_formats"]
TABLE = between([BEGIN], [END])
KIMI_TABLE = between([BEGIN], [END], instead=[SECTION])
HUNYUAN_TABLE = between([BEGIN], [END], around=("<answer>", "</answer>"))
ERNIE_TABLE = between([BEGIN], [END], around=("<response>", "</response>"))
SEED_BEGIN, SEED_END = "<seed:think>", "</seed:think>"
SEED_TABLE = between([SEED_BEGIN], [SEED_END])
MISTRAL_TABLE = between(["[THINK]"], ["[/THINK]"])
OLD_KIMI_BEGIN, OLD_KIMI_END = "◁think▷", "◁/think▷"
OLD_KIMI_TABLE = between([OLD_KIMI_BEGIN], [OLD_KIMI_END])
GRANITE_BEGINS = [f"{here} my thought process:" for here in ("Here is", "Here's")]
GRANITE_ENDS = [f"{here} my response:" for here in ("Here is", "Here's")]
GRANITE_TABLE = between(GRANITE_BEGINS, GRANITE_ENDS)

QWEN3 = FormatSpec(
    name="qwen3",
    api_level=_LEVEL,
    doc="<think> at the beginning (Qwen 3, GLM, DeepSeek V3 and others).",
    role="reasoning",
    aliases=["think", "glm45", "glm47", "deepseek_v3", "deepseek_v31", "holo2", "mimo", "nemotron_v3", "olmo3", "step3p5"],
    marks=[BEGIN, END],
    matches=lambda template: END in template and not _r1(template),
    factory=_make(TABLE, BEGIN, END),
    thinking=_thinking(BEGIN, END),
)
DEEPSEEK_R1 = FormatSpec(
    name="deepseek_r1",
    api_level=_LEVEL,
    doc="Always up to </think> (DeepSeek R1, MiniMax M2, Step 3).",
    role="reasoning",
    aliases=["deepseek-r1", "minimax_m2", "minimax", "step3"],
    marks=[BEGIN, END],
    matches=_r1,
    factory=_make(TABLE, BEGIN, END, "at_once"),
    thinking=_thinking(BEGIN, END, "at_once"),
)
KIMI_K2_REASONING = FormatSpec(
    name="kimi_k2_reasoning",
    api_level=_LEVEL,
    doc="<think>, which calls end too (Kimi K2).",
    role="reasoning",
    aliases=["kimi_k2"],
    marks=[BEGIN, END, SECTION],
    matches=lambda template: SECTION in template,
    factory=_make(KIMI_TABLE, BEGIN, END),
    thinking=_thinking(BEGIN, END, hides=[SECTION]),
)
KIMI = FormatSpec(
    name="kimi_reasoning",
    api_level=_LEVEL,
    doc="◁think▷ (Kimi VL).",
    role="reasoning",
    aliases=["kimi"],
    marks=[OLD_KIMI_BEGIN, OLD_KIMI_END],
    matches=lambda template: OLD_KIMI_BEGIN in template,
    factory=_make(OLD_KIMI_TABLE, OLD_KIMI_BEGIN, OLD_KIMI_END),
    thinking=_thinking(OLD_KIMI_BEGIN, OLD_KIMI_END),
)
HUNYUAN = FormatSpec(
    name="hunyuan_reasoning",
    api_level=_LEVEL,
    doc="<think>, and <answer> around the rest (Hunyuan).",
    role="reasoning",
    aliases=["hunyuan", "hunyuan_a13b"],
    marks=[BEGIN, END, "<answer>", "</answer>"],
    matches=lambda template: BEGIN in template and "<answer>" in template,
    factory=_make(HUNYUAN_TABLE, BEGIN, END),
)
ERNIE45_REASONING = FormatSpec(
    name="ernie45_reasoning",
    api_level=_LEVEL,
    doc="Always up to </think>, and <response> around the rest (Ernie 4.5).",
    role="reasoning",
    aliases=["ernie45"],
    marks=[BEGIN, END, "<response>", "</response>"],
    matches=lambda template: END in template and "<response>" in template,
    factory=_make(ERNIE_TABLE, BEGIN, END, "at_once"),
)
SEED_OSS_REASONING = FormatSpec(
    name="seed_oss_reasoning",
    api_level=_LEVEL,
    doc="<seed:think> (Seed-OSS).",
    role="reasoning",
    aliases=["seed_oss"],
    marks=[SEED_BEGIN, SEED_END],
    matches=lambda template: SEED_BEGIN in template,
    factory=_make(SEED_TABLE, SEED_BEGIN, SEED_END),
    thinking=_thinking(SEED_BEGIN, SEED_END),
)
MISTRAL_REASONING = FormatSpec(
    name="mistral_reasoning",
    api_level=_LEVEL,
    doc="[THINK] (Magistral and later).",
    role="reasoning",
    aliases=["mistral"],
    marks=["[THINK]", "[/THINK]"],
    matches=lambda template: "[THINK]" in template,
    factory=_make(MISTRAL_TABLE, "[THINK]", "[/THINK]"),
    thinking=_thinking("[THINK]", "[/THINK]"),
)
GRANITE_REASONING = FormatSpec(
    name="granite_reasoning",
    api_level=_LEVEL,
    doc="Here is my thought process: ... Here is my response: (Granite 3.2).",
    role="reasoning",
    aliases=["granite"],
    matches=lambda template: GRANITE_BEGINS[0] in template,
    factory=_make(GRANITE_TABLE, GRANITE_BEGINS[0], GRANITE_ENDS[0]),
)
