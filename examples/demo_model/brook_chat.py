"""Brook's chat format: its special tokens, its Jinja template and a plain Python renderer of the same text.

The template is what ships in ``tokenizer_config.json``; the Python renderer is what the corpus is written with,
because it is many times faster and tells which spans the assistant wrote. A test holds the two to the same text.

Tool calls follow the Hermes convention: ``<tools>`` in the system message, ``<tool_call>`` in the answer and
``<tool_response>`` around a tool's result.

This module knows nothing about tasks or tensors, and it does not parse a model's answer for a server: only
:func:`parse_tool_calls`, which the evaluation needs.
"""

from __future__ import annotations

import json
from typing import Any, Final

Message = dict[str, Any]
Tool = dict[str, Any]

BOS: Final = "<|bos|>"
EOS: Final = "<|eos|>"
PAD: Final = "<|pad|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
TOOL: Final = "<|tool|>"
END: Final = "<|end|>"

SPECIAL_TOKENS: Final = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, TOOL, END)
RESERVED_TOKENS: Final = tuple(f"<|reserved_{index}|>" for index in range(8))
# These are one token each, but they are text: a client that parses tool calls must find them in what is decoded.
TEXT_TOKENS: Final = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

TOOLS_BEFORE: Final = "You may call these functions:\n<tools>"
TOOLS_AFTER: Final = (
    "\n</tools>\nTo call a function, answer with its name and arguments as JSON:\n<tool_call>\n"
    '{"name": "function", "arguments": {}}\n</tool_call>'
)

CHAT_TEMPLATE: Final = """\
{{- bos_token or '<|bos|>' }}
{%- set ns = namespace(start=0, system='') %}
{%- if messages and messages[0]['role'] in ['system', 'developer'] %}
{%- set ns.start = 1 %}
{%- set first = messages[0]['content'] %}
{%- if first is string %}{% set ns.system = first | trim %}
{%- else %}{% for part in first %}{% if part['type'] == 'text' %}{% set ns.system = ns.system + part['text'] %}\
{% endif %}{% endfor %}{% set ns.system = ns.system | trim %}{% endif %}
{%- endif %}
{%- if tools %}
{{- '<|system|>' }}
{%- if ns.system %}{{- ns.system + '\\n\\n' }}{% endif %}
{{- 'You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools>\\nTo call a function, answer with its name and arguments as JSON:\\n<tool_call>\\n' }}
{{- '{"name": "function", "arguments": {}}\\n</tool_call><|end|>' }}
{%- elif ns.system %}
{{- '<|system|>' + ns.system + '<|end|>' }}
{%- endif %}
{%- for message in messages[ns.start:] %}
{%- set body = namespace(text='') %}
{%- if message['content'] is string %}{% set body.text = message['content'] | trim %}
{%- elif message['content'] %}{% for part in message['content'] %}{% if part['type'] == 'text' %}\
{% set body.text = body.text + part['text'] %}{% endif %}{% endfor %}{% set body.text = body.text | trim %}{% endif %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' + body.text }}
{%- if message['tool_calls'] %}
{%- for call in message['tool_calls'] %}
{%- set function = call['function'] if call['function'] else call %}
{%- if body.text or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": ' }}{{- function['name'] | tojson }}{{- ', "arguments": ' }}
{%- if function['arguments'] is string %}{{- function['arguments'] }}
{%- else %}{{- function['arguments'] | tojson }}{% endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|end|>' }}
{%- elif message['role'] == 'tool' %}
{{- '<|tool|><tool_response>\\n' + body.text + '\\n</tool_response><|end|>' }}
{%- elif message['role'] in ['system', 'developer'] %}
{{- '<|system|>' + body.text + '<|end|>' }}
{%- else %}
{{- '<|user|>' + body.text + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def dumps(value: Any) -> str:
    """JSON as the template's ``tojson`` writes it: on one line, in the order given, Unicode as it is."""
    return json.dumps(value, ensure_ascii=False)


def call_text(call: Message) -> str:
    """One tool call as the assistant writes it."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else dumps(arguments)
    return f'<tool_call>\n{{"name": {dumps(function["name"])}, "arguments": {text}}}\n</tool_call>'


def assistant_text(message: Message) -> str:
    """Everything the assistant wrote in one message."""
    parts = [message["content"].strip()] if message.get("content") else []
    parts.extend(call_text(call) for call in message.get("tool_calls") or [])
    return "\n".join(parts)


def segments(messages: list[Message], tools: list[Tool] | None = None) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces; the flag marks what the assistant wrote, its end token included.

    Every piece starts with a special token or directly follows one, so the pieces can be tokenized apart.
    """
    out: list[tuple[str, bool]] = []
    system = ""
    rest = messages
    if messages and messages[0]["role"] == "system":
        system = messages[0]["content"].strip()
        rest = messages[1:]
    head = BOS
    if tools:
        lead = f"{system}\n\n" if system else ""
        listed = "".join("\n" + dumps(tool) for tool in tools)
        head += f"{SYSTEM}{lead}{TOOLS_BEFORE}{listed}{TOOLS_AFTER}{END}"
    elif system:
        head += f"{SYSTEM}{system}{END}"
    pending = head
    for message in rest:
        role = message["role"]
        if role == "assistant":
            out.append((pending + ASSISTANT, False))
            out.append((assistant_text(message) + END, True))
            pending = ""
        elif role == "tool":
            pending += f"{TOOL}<tool_response>\n{message['content'].strip()}\n</tool_response>{END}"
        else:
            pending += f"{SYSTEM if role == 'system' else USER}{message['content'].strip()}{END}"
    if pending:
        out.append((pending, False))
    return out


def render(messages: list[Message], tools: list[Tool] | None = None, *, add_generation_prompt: bool = False) -> str:
    """The whole conversation as text."""
    text = "".join(piece for piece, _ in segments(messages, tools))
    return text + ASSISTANT if add_generation_prompt else text


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in an answer, or None where one of them is not a call with a name and arguments."""
    calls: list[dict[str, Any]] = []
    for piece in text.split("<tool_call>")[1:]:
        body, mark, _ = piece.partition("</tool_call>")
        try:
            call = json.loads(body)
        except ValueError:
            return None
        if not mark or not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        calls.append(call)
    return calls
