"""What models write, and what it means: the cases that incremental parsers of other servers are known to have failed on.

What it is: `CASES`: format, prompt's end, the answer, and (content, reasoning, calls); a call is (name, arguments, complete).
What it does not know: how formats are read.
"""

from __future__ import annotations

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
]
