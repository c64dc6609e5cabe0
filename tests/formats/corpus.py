"""What models write, and what it means: the cases that incremental parsers of other servers are known to have failed on.

What it is: `CASES`: format, prompt's end, the answer, and (content, reasoning, calls); a call is (name, arguments, complete).
What it does not know: how formats are read.
"""

from __future__ import annotations

import json
from typing import NamedTuple

Calls = list[tuple[str, str, bool]]


class Case(NamedTuple):
    format: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: Calls = []  # noqa: RUF012  # never changed
    prompt: str = ""
    cut: bool = False
    tools: bytes = b""


NESTED = '{"a": {"b": [1, {"c": "} ] </tool_call> \\" {"}]}, "d": -1.5e3, "e": null}'
UNICODE = '{"city": "Grüße 東京 🙂 \\u00e9", "q": "a\\\\"}'


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _v3(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def _v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def _deepseek(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def _harmony(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


def schema(**arguments: object) -> bytes:
    """Tools of a request: the function f with these arguments."""
    function = {"name": "f", "parameters": {"type": "object", "properties": arguments, "$defs": {"place": {"type": ["object", "null"]}}}}
    return json.dumps([{"type": "function", "function": function}]).encode()


TYPED = schema(
    s={"type": "string"},
    i={"type": "integer"},
    n={"type": "number"},
    b={"type": "boolean"},
    o={"type": "object"},
    a={"items": {}},
    u={"anyOf": [{"type": "string"}, {"type": "null"}]},
    e={"enum": [1, 2, "many"]},
    r={"$ref": "#/$defs/place"},
    x={},
)


def _coder(*arguments: tuple[str, str], name: str = "f") -> str:
    """As Qwen 3 Coder writes a call."""
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def _glm(*arguments: tuple[str, str], name: str = "f", line: str = "\n") -> str:
    inside = line.join(f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>" for key, value in arguments)
    return f"<tool_call>{name}{line}{inside}{line}</tool_call>"


def _kimi(name: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{name}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def _section(*calls: str) -> str:
    return "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>"


def _invoked(outer: str, prefix: str, between: str = "") -> str:
    """A call of f with s, of the formats that say invoke and parameter."""
    return f'<{outer}>\n{between}<{prefix}invoke name="f">\n<{prefix}parameter name="s">a\nb</{prefix}parameter>\n</{prefix}invoke>\n</{outer}>'


_STEP = "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>{}<｜tool_call_end｜><｜tool_calls_end｜>"
_LISTED = '[{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]'
_TWO: Calls = [("f", '{"a": "]"}', True), ("g", "{}", True)]
_ACTIONS = '[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": "]"}},\n    {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]'

THINK = "<think>\nHm, <tool_call> or not?\n</think>\n\nYes."

CASES = [
    # --- plain answers go through as they are
    *[
        Case(name, "Just text, with {braces} and [lists] < 3.\n", "Just text, with {braces} and [lists] < 3.\n")
        for name in ("hermes", "mistral", "deepseek_v3", "deepseek_v31", "llama3_json", "pythonic", "qwen3", "openai")
    ],
    *[Case(name, "", "") for name in ("hermes", "llama3_json", "pythonic", "openai", "qwen3")],
    # --- hermes
    Case("hermes", _hermes("f", "{}"), calls=[("f", "{}", True)]),
    Case("hermes", _hermes("f", NESTED), calls=[("f", NESTED, True)]),
    Case("hermes", _hermes("f", UNICODE), calls=[("f", UNICODE, True)]),
    Case("hermes", _hermes("f", '{"a":1}') + "\n" + _hermes("g", '{"b":[]}'), calls=[("f", '{"a":1}', True), ("g", '{"b":[]}', True)]),
    Case("hermes", "Let me see.\n\n" + _hermes("f", "{}"), "Let me see.", calls=[("f", "{}", True)]),
    Case("hermes", "Let me see.\n" + _hermes("f", "{}") + "\nDone.", "Let me see.\n\nDone.", calls=[("f", "{}", True)]),
    Case("hermes", "\n" + _hermes("f", "{}") + "\nDone.", "Done.", calls=[("f", "{}", True)]),
    Case("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', calls=[("f", '{"a": 1}', True)]),
    Case("hermes", '<tool_call>{"name": "f"}</tool_call>', calls=[("f", "{}", True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', calls=[("f", "{}", True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}</tool_call>', calls=[("f", '{"a": "x"}', True)]),
    Case("hermes", '<tool_call>{"arguments": "{\\"a\\": 1}", "id": 7, "name": "f"}</tool_call>', calls=[("f", '{"a": 1}', True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "x"}</tool_call>', calls=[("f", '{"a": 1}', True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ok', "ok", calls=[("f", '{"a": 1}', True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>ok', "ok", calls=[("f", '{"a": 1', False)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', calls=[("f", '{"a": "x', False)], cut=True),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', calls=[("f", '{"a": 1}', True)], cut=True),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_c', calls=[("f", '{"a": 1}', True)], cut=True),
    Case("hermes", 'x <tool_call>\n{"name": "f', 'x <tool_call>\n{"name": "f', cut=True),
    Case("hermes", "x <tool_ca", "x <tool_ca", cut=True),
    Case("hermes", "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>"),
    Case("hermes", '<tool_call>{"nome": "f"}</tool_call>.', '<tool_call>{"nome": "f"}</tool_call>.'),
    Case("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    Case("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    Case("hermes", '<tool_call>{"na' + _hermes("f", "{}"), '<tool_call>{"na' + _hermes("f", "{}")),
    Case("hermes", "<tool_call>" + _hermes("f", "{}"), "<tool_call>", calls=[("f", "{}", True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {}} junk</tool_call>', "junk", calls=[("f", "{}", True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": 5}</tool_call>', calls=[("f", "5", True)]),
    Case("hermes", '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', calls=[("f", '{"a": }', False)]),
    Case("hermes", '<tool_call>\n{"name": "f", "arguments": {"city": "5}}\n</tool_call> ok', "ok", calls=[("f", '{"city": "5}}\n', False)]),
    Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "x\n } y", "b": 1}}</tool_call>',
        calls=[("f", '{"a": "x\n } y", "b": 1}', False)],
    ),
    Case("hermes", "a < b <tool> </tool_call> c", "a < b <tool> </tool_call> c"),
    # --- llama 3
    Case("llama3_json", '{"name": "f", "parameters": {}}', calls=[("f", "{}", True)]),
    Case("llama3_json", ' {"name": "f", "parameters": ' + NESTED + "}", calls=[("f", NESTED, True)]),
    Case("llama3_json", '<|python_tag|>{"name": "f", "parameters": ' + UNICODE + "}", calls=[("f", UNICODE, True)]),
    Case(
        "llama3_json",
        '{"name": "f", "parameters": {"a":1}}; {"name": "g", "parameters": {}}',
        calls=[("f", '{"a":1}', True), ("g", "{}", True)],
    ),
    Case("llama3_json", '{"type": "function", "name": "f", "parameters": {}} done', "done", calls=[("f", "{}", True)]),
    Case("llama3_json", '{"answer": 42}', '{"answer": 42}'),
    Case("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}'),
    Case("llama3_json", '<|python_tag|>print("x")', '<|python_tag|>print("x")'),
    Case("llama3_json", 'Sure: {"name": "f", "parameters": {}}', 'Sure: {"name": "f", "parameters": {}}'),
    Case("llama3_json", '{"name": "f", "parameters": {"a', calls=[("f", '{"a', False)], cut=True),
    Case("llama3_json", '{"name": "f", "par', '{"name": "f", "par', cut=True),
    # --- mistral
    Case("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', calls=[("f", "{}", True)]),
    Case(
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": ' + NESTED + '}, {"arguments": {"b":2}, "name": "g"}]',
        calls=[("f", NESTED, True), ("g", '{"b":2}', True)],
    ),
    Case(
        "mistral", "Hi [TOOL_CALLS]f[ARGS]" + UNICODE + '[TOOL_CALLS]g{"a": 1}', "Hi", calls=[("f", UNICODE, True), ("g", '{"a": 1}', True)]
    ),
    Case("mistral", '[TOOL_CALLS]f[CALL_ID]abc123xyz[ARGS]{"a":[[1]]}', calls=[("f", '{"a":[[1]]}', True)]),
    Case(
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": "[TOOL_CALLS]"}}] end',
        "end",
        calls=[("f", '{"a": "[TOOL_CALLS]"}', True)],
    ),
    Case("mistral", "[TOOL_CALLS] no call", "[TOOL_CALLS] no call"),
    Case("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", cut=True),
    Case("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]"),
    Case("mistral", '[TOOL_CALLS]f{"a": ', calls=[("f", '{"a": ', False)], cut=True),
    # --- deepseek
    Case("deepseek_v3", _deepseek(_v3("f", "{}")), calls=[("f", "{}", True)]),
    Case("deepseek_v3", "Ok.\n" + _deepseek(_v3("f", NESTED), _v3("g", UNICODE)), "Ok.", calls=[("f", NESTED, True), ("g", UNICODE, True)]),
    Case("deepseek_v3", _deepseek(_v3("f", "")), calls=[("f", "{}", True)]),
    Case("deepseek_v3", _deepseek(_v3("f", "{}"))[:-20], calls=[("f", "{}", True)], cut=True),
    Case("deepseek_v3", "<｜tool▁calls▁begin｜>text", "<｜tool▁calls▁begin｜>text"),
    Case("deepseek_v31", _deepseek(_v31("f", "{}")), calls=[("f", "{}", True)]),
    Case("deepseek_v31", _deepseek(_v31("f", NESTED), _v31("g", "")), calls=[("f", NESTED, True), ("g", "{}", True)]),
    Case("deepseek_v31", _deepseek(_v31("function", "{}")) + "After", "After", calls=[("function", "{}", True)]),
    # --- pythonic
    Case("pythonic", "[f()]", calls=[("f", "{}", True)]),
    Case(
        "pythonic",
        "[f(a=1, b='x)]\\'', c=[1, {'k': None}], d=true, e=-2.5), g.h(z=\"東京 🙂\")]",
        calls=[("f", '{"a": 1, "b": "x)]\'", "c": [1, {"k": null}], "d": true, "e": -2.5}', True), ("g.h", '{"z": "東京 🙂"}', True)],
    ),
    Case("pythonic", "<|python_start|>[f(a=False)]<|python_end|>", calls=[("f", '{"a": false}', True)]),
    Case("pythonic", '[f(a="\\ud83d\\ude42", b="\\u00e9\\n")]', calls=[("f", '{"a": "🙂", "b": "é\\n"}', True)]),
    Case("pythonic", "[f(a=1)] then", "then", calls=[("f", '{"a": 1}', True)]),
    Case("pythonic", "[1, 2, 3]", "[1, 2, 3]"),
    Case("pythonic", "[link](url)", "[link](url)"),
    Case("pythonic", "[f(x)]", "[f(x)]"),
    Case("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]"),
    Case("pythonic", "[f(a=1e999)]", "[f(a=1e999)]"),
    Case("pythonic", "[f(a=1), g(b=", calls=[("f", '{"a": 1}', True)], content=", g(b=", cut=True),
    Case("pythonic", "[f(a='", "[f(a='", cut=True),
    # --- reasoning
    Case("qwen3", THINK, "Yes.", "Hm, <tool_call> or not?"),
    Case("qwen3", "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", prompt="<think>\n"),
    Case("qwen3", "<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm.", prompt="<think>\n"),
    Case("qwen3", "What <think> means: </think>", "What <think> means: </think>"),
    Case("qwen3", "<think>never ends", "", "never ends", cut=True),
    Case("qwen3", "<think></think>", ""),
    Case("qwen3", "Yes.", "Yes.", prompt="<think>\n\n</think>\n\n"),
    Case("deepseek_r1", "Hm.\n</think>\n\nYes.", "Yes.", "Hm."),
    Case("deepseek_r1", THINK, "Yes.", "Hm, <tool_call> or not?"),
    Case("deepseek_r1", "Yes.", "Yes.", prompt="</think>"),
    # --- gpt-oss
    Case("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "Yes.", "Hm."),
    Case("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" + _harmony("f", NESTED), "", "Hm.", [("f", NESTED, True)]),
    Case("openai", _harmony("f", "{}") + "<|call|>", calls=[("f", "{}", True)]),
    Case("openai", _harmony("f", "") + "<|call|>", calls=[("f", "{}", True)]),
    Case(
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + _harmony("f", UNICODE),
        "I look.",
        calls=[("f", UNICODE, True)],
    ),
    Case("openai", "<|channel|>analysis<|message|>Hm", "", "Hm", cut=True),
    Case("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assis", "", "Hm.", cut=True),
    Case("openai", _harmony("f", '{"a": 1'), calls=[("f", '{"a": 1', False)], cut=True),
    Case("openai", "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}", calls=[("f", "{}", True)]),
    Case("openai", "No channels.", "No channels."),
    # --- arguments in tags
    Case("qwen3_coder", _coder(), calls=[("f", "{}", True)]),
    Case("qwen3_coder", _coder(("s", "5"), ("i", "5")), calls=[("f", '{"s": "5", "i": "5"}', True)]),
    Case("qwen3_coder", _coder(("s", "5"), ("i", "5")), calls=[("f", '{"s": "5", "i": 5}', True)], tools=TYPED),
    Case(
        "qwen3_coder",
        _coder(
            ("n", "-2.5e3"), ("b", "True"), ("o", '{"k": [1]}'), ("a", "['x', None]"), ("u", "null"), ("e", "2"), ("r", "None"), ("x", "7")
        ),
        calls=[("f", '{"n": -2.5e3, "b": true, "o": {"k": [1]}, "a": ["x", null], "u": null, "e": 2, "r": null, "x": "7"}', True)],
        tools=TYPED,
    ),
    Case(
        "qwen3_coder",
        _coder(("i", "five"), ("n", "nan"), ("b", "yes"), ("o", "[1]"), ("u", "nullable"), ("e", "many"), ("r", "x")),
        calls=[("f", '{"i": "five", "n": "nan", "b": "yes", "o": "[1]", "u": "nullable", "e": "many", "r": "x"}', True)],
        tools=TYPED,
    ),
    Case(
        "qwen3_coder",
        _coder(("s", '\n  if a < b:\n\treturn "</p>" \\ 🙂\n'), ("i", " 007 ")),
        calls=[("f", '{"s": "\\n  if a < b:\\n\\treturn \\"</p>\\" \\\\ 🙂\\n", "i": 7}', True)],
        tools=TYPED,
    ),
    Case("qwen3_coder", "Ok.\n" + _coder() + "\n" + _coder(name="g") + " end", "Ok.\n\n end", calls=[("f", "{}", True), ("g", "{}", True)]),
    Case("qwen3_coder", _coder().removeprefix("<tool_call>\n"), calls=[("f", "{}", True)]),
    Case("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=s>a</parameter></tool_call>", calls=[("f", '{"s": "a"}', True)]),
    Case(
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n<parameter=i>\n5\n</function>\n</tool_call>",
        calls=[("f", '{"s": "a", "i": 5}', True)],
        tools=TYPED,
    ),
    Case("qwen3_coder", _coder(("s", "abc")).split("</function")[0], calls=[("f", '{"s": "abc"}', True)]),
    Case("qwen3_coder", _coder(("s", "abc")).split("rameter>\n</f")[0], calls=[("f", '{"s": "abc', False)], cut=True),
    Case("qwen3_coder", _coder(("i", "12")).split("rameter>\n</f")[0], calls=[("f", '{"i": 12', False)], cut=True, tools=TYPED),
    Case("qwen3_coder", _coder(("s", "abc")).split("abc")[0], calls=[("f", '{"s": "', False)], cut=True),
    Case("qwen3_coder", "<tool_call>\n<function=f", "<tool_call>\n<function=f", cut=True),
    Case("qwen3_coder", "<tool_call>\n<function=a b>\n", "<tool_call>\n<function=a b>\n"),
    Case("qwen3_coder", "<tool_call>no</tool_call>", "<tool_call>no</tool_call>"),
    Case("qwen3_coder", "<tool_call><function=f>what</function>", "what</function>", calls=[("f", "", False)]),
    Case("seed_oss", _coder(("s", "a")).replace("tool_call", "seed:tool_call"), calls=[("f", '{"s": "a"}', True)]),
    Case("minimax_m2", _invoked("minimax:tool_call", ""), calls=[("f", '{"s": "a\\nb"}', True)]),
    Case("deepseek_v32", "Hm.\n\n" + _invoked("｜DSML｜function_calls", "｜DSML｜"), "Hm.", calls=[("f", '{"s": "a\\nb"}', True)]),
    Case(
        "deepseek_v32",
        '<｜DSML｜function_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="s" string="true">5</｜DSML｜parameter>'
        '<｜DSML｜parameter name="i" string="false">5</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>',
        calls=[("f", '{"s": "5", "i": 5}', True)],
    ),
    Case("step3", _STEP.format(_invoked("q", "steptml:")[4:-5]), calls=[("f", '{"s": "a\\nb"}', True)]),
    Case("step3", _STEP.format("text"), _STEP.format("text")),
    Case("glm45", _glm(), calls=[("f", "{}", True)]),
    Case("glm45", _glm(line=""), calls=[("f", "{}", True)]),
    Case("glm45", "A.\n" + _glm(("s", "5"), ("i", "5")), "A.", calls=[("f", '{"s": "5", "i": 5}', True)], tools=TYPED),
    Case("glm45", _glm(("s", "5"), ("x", "[1]"), ("y", "z"), line=""), calls=[("f", '{"s": 5, "x": [1], "y": "z"}', True)]),
    Case("glm45", _glm(("s", " a\n"), ("x", "true")), calls=[("f", '{"s": " a\\n", "x": true}', True)], tools=TYPED),
    Case("glm45", _glm() + "\n" + _glm(name="g") + "B.", "B.", calls=[("f", "{}", True), ("g", "{}", True)]),
    Case("glm45", _hermes("f", "{}"), _hermes("f", "{}")),
    Case("glm45", _glm(("o", ' {"k": "</arg_value>\\""}')), calls=[("f", '{"o": {"k": "</arg_value>\\""}}', True)], tools=TYPED),
    Case("qwen3_coder", _coder(("a", '["</parameter>"]')), calls=[("f", '{"a": ["</parameter>"]}', True)], tools=TYPED),
    Case(
        "qwen3_coder",
        _coder(("a", '["never closed]'), ("s", "x")),
        calls=[("f", '{"a": "[\\"never closed]", "s": "x"}', True)],
        tools=TYPED,
    ),
    Case(
        "qwen3_coder",
        _coder(("s", '["</parameter>')),
        "</parameter>\n</function>\n</tool_call>",
        calls=[("f", '{"s": "[\\""', False)],
        tools=TYPED,
    ),
    Case("glm45", _glm(("s", "abc")).split("</arg_value")[0], calls=[("f", '{"s": "abc', False)], cut=True, tools=TYPED),
    # --- lists after marks
    Case(
        "kimi_k2", _section(_kimi("functions.f:0", NESTED), _kimi("functions.g.h:1", "")), calls=[("f", NESTED, True), ("g.h", "{}", True)]
    ),
    Case("kimi_k2", "A. " + _section(_kimi("f", "{}")) + "B.", "A. B.", calls=[("f", "{}", True)]),
    Case("kimi_k2", _section("text"), _section("text")),
    Case("kimi_k2", _section(_kimi("functions.f:0", "{}"))[:-40], calls=[("f", "{}", True)], cut=True),
    *[
        Case(name, before + _LISTED + after + " end", "end", calls=_TWO)
        for name, before, after in (
            ("granite", "<|tool_call|>", ""),
            ("granite", "<tool_call>\n", "</tool_call>"),
            ("jamba", "<tool_calls>", "</tool_calls>"),
            ("jamba", "<tool_calls>\n", "\n</tool_calls>"),
            ("phi4_mini_json", "<|tool_call|>", "<|/tool_call|>"),
            ("xlam", "", ""),
            ("xlam", "```json\n", "\n```"),
            ("xlam", "[TOOL_CALLS]", ""),
        )
    ],
    Case("granite", "<|tool_call|>" + _LISTED, calls=_TWO),
    Case("granite", "<|tool_call|>", "<|tool_call|>"),
    Case("granite", "<|tool_call|>[1]", "<|tool_call|>[1]"),
    Case(
        "jamba",
        '<tool_calls>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_calls>',
        calls=[("f", "{}", True), ("g", "{}", True)],
    ),
    Case("phi4_mini_json", "functools" + _LISTED, calls=_TWO),
    Case("phi4_mini_json", "functools[1]", "functools[1]"),
    Case(
        "internlm",
        'A<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": 1}}<|action_end|>\nB',
        "A\nB",
        calls=[("f", '{"a": 1}', True)],
    ),
    Case("internlm", "<|action_start|> <|interpreter|>", "<|action_start|> <|interpreter|>"),
    Case("xlam", '[{"name": "Bob", "age": 3}]', '[{"name": "Bob", "age": 3}]'),
    Case("xlam", "[1, 2]", "[1, 2]"),
    # --- cohere
    Case(
        "cohere_command",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
        "Yes.",
        "Hm.",
    ),
    Case("cohere_command", "Hm.<|END_THINKING|><|START_TEXT|>Yes.<|END_TEXT|>", "Yes.", "Hm.", prompt="<|START_THINKING|>"),
    Case("cohere_command", "<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>" + _ACTIONS + "<|END_ACTION|>", "", "Hm.", _TWO),
    Case("cohere_command", "Yes.<|END_RESPONSE|>", "Yes.", prompt="<|START_RESPONSE|>"),
    Case("cohere_command", "<|START_ACTION|>" + _ACTIONS[:-1], calls=_TWO, cut=True),
    Case("cohere_command", "<|START_ACTION|>" + _ACTIONS + "<|END_ACTION|>", calls=_TWO),
    Case("cohere_command", "Plain.", "Plain."),
    # --- more reasoning
    Case("mistral_reasoning", "[THINK]Hm.[/THINK]Yes.", "Yes.", "Hm."),
    Case("mistral_reasoning", "Yes. [THINK] [/THINK]", "Yes. [THINK] [/THINK]"),
    Case("seed_oss_reasoning", "<seed:think>Hm.</seed:think>Yes.", "Yes.", "Hm."),
    Case("granite_reasoning", "Here is my thought process:\nHm.\n\nHere is my response: Yes.", "Yes.", "Hm."),
    Case("granite_reasoning", "Here's my thought process: Hm. Here's my response:\nYes.", "Yes.", "Hm."),
    Case("granite_reasoning", "Here is my answer.", "Here is my answer."),
    Case("hunyuan_reasoning", "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>", "Yes.", "Hm."),
    Case("hunyuan_reasoning", "<think>\nHm.\n</think>\nYes <answer>", "Yes <answer>", "Hm."),
    Case("hunyuan_reasoning", "<answer>\nYes.\n</answer>", "Yes.", prompt="<think>\n\n</think>\n"),
    Case("ernie45_reasoning", "Hm.\n</think>\n\n<response>\nYes.\n</response>\n", "Yes.\n", "Hm."),
    Case("ernie45_reasoning", "Hm.\n</think>\n\nYes.", "Yes.", "Hm."),
    Case("kimi_k2_reasoning", "<think>Hm." + _section(_kimi("functions.f:0", "{}")), _section(_kimi("functions.f:0", "{}")), "Hm."),
    Case("kimi_k2_reasoning", "<think>Hm.</think>Yes.", "Yes.", "Hm."),
    Case("kimi_reasoning", "◁think▷Hm.◁/think▷Yes.", "Yes.", "Hm."),
]
