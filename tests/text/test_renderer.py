"""Chat templates: equal to Transformers where both render, bounded, and clear where they refuse."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.protocol.errors import CheckpointError, ConfigError, InvalidRequest, UnsupportedFeature
from penstock.plugins.renderers.jinja import JinjaRenderer

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.turns = ns.turns + 1 %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if thinking is defined and not thinking %}{{- '<think>\\n\\n</think>\\n' }}{% endif %}{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{{- raise_exception('Unknown role ' + message.role) }}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '[' ~ date_string ~ ']' }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INST = """{{ bos_token }}{% set loop_messages = messages %}
{% if messages[0]['role'] == 'system' %}
    {% set system_message = messages[0]['content'] %}
    {% set loop_messages = messages[1:] %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + (system_message + '\\n\\n' if loop.first and system_message is defined else '') + message['content'] + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + eos_token }}
        {% if message['content'] == 'enough' %}{% break %}{% endif %}
    {% endif %}
{% endfor %}
"""

PARTS = """{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}</{{ message.role }}>{% endfor %}"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Über <b> & 'so'", "parameters": {"type": "object", "properties": {}}}}
]

TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Wie hoch ist <der> Pegel? 'ja' & \"nein\" 🙂"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "enough"},
        {"role": "user", "content": "d"},
    ],
    "tools": [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": [1, None], "é": "ü"}}}],
        },
        {"role": "tool", "content": "42"},
    ],
}


def theirs(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, **{**SPECIAL, **arguments})
    return str(rendered[0])


def ours(template: str, messages: list[dict[str, Any]], *, tools: Any = None, add: bool = False, go_on: bool = False, **kwargs: Any) -> str:
    return JinjaRenderer({"default": template}, SPECIAL).render(
        messages, tools=tools, add_generation_prompt=add, continue_final_message=go_on, kwargs=kwargs
    )


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    ("template", "talk"),
    [(template, talk) for template in (CHATML, HEADERS, PARTS) for talk in TALKS] + [(INST, talk) for talk in ("one", "system", "turns")],
)
def test_equal_to_transformers(template: str, talk: str, tools: Any, add: bool) -> None:
    messages = TALKS[talk]
    assert ours(template, messages, tools=tools, add=add) == theirs(template, messages, tools=tools, add_generation_prompt=add)


@pytest.mark.parametrize("template", [CHATML, HEADERS, INST, PARTS], ids=["chatml", "headers", "inst", "parts"])
@pytest.mark.parametrize("text", ["The level is", "The level is ", " a\n\n", "assistant", "a"])
def test_continuing_a_message_equals_transformers(template: str, text: str) -> None:
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": text}]
    assert ours(template, messages, go_on=True) == theirs(template, messages, continue_final_message=True)


def test_template_kwargs_reach_the_template() -> None:
    talk = TALKS["one"]
    assert ours(CHATML, talk, add=True, thinking=False).endswith("</think>\n")
    assert ours(HEADERS, talk, date_string="1999").endswith("[1999]")
    with pytest.raises(InvalidRequest, match="messages"):
        JinjaRenderer({"default": CHATML}, {}).render(
            talk, tools=None, add_generation_prompt=False, continue_final_message=False, kwargs={"messages": []}
        )


def test_arguments_of_earlier_calls_become_objects() -> None:
    talk = json.loads(json.dumps(TALKS["tools"]))
    talk[1]["tool_calls"][0]["function"]["arguments"] = '{"x": [1, null], "é": "ü"}'
    talk[1]["content"] = None
    assert ours(CHATML, talk, tools=TOOLS) == ours(CHATML, TALKS["tools"], tools=TOOLS)
    talk[1]["tool_calls"][0]["function"]["arguments"] = "{"
    assert ours(CHATML, talk) == theirs(CHATML, [talk[0], {**talk[1], "content": ""}, talk[2]])


def test_text_parts_are_joined_unless_the_template_takes_parts() -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ours(CHATML, talk) == "<|im_start|>user\na\nb<|im_end|>\n"
    assert ours(PARTS, talk) == "<user>ab</user>"
    with pytest.raises(UnsupportedFeature, match="image_url") as refused:
        ours(CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert refused.value.param == "messages"


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest, match="alternate") as refused:
        ours(INST, [{"role": "assistant", "content": "x"}])
    assert refused.value.param == "messages"
    with pytest.raises(InvalidRequest, match="Unknown role narrator"):
        ours(HEADERS, [{"role": "narrator", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'x' * 4000000 }}{{ 'x' * 4000000 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content.nothing.there }}",
    ],
)
def test_hostile_or_broken_templates_fail_alone_and_soon(template: str) -> None:
    renderer = JinjaRenderer({"default": template}, {}, max_chars=1_000_000, timeout_s=0.2)
    with pytest.raises(InvalidRequest):
        renderer.render([{"role": "user", "content": "x"}], tools=None, add_generation_prompt=True, continue_final_message=False, kwargs={})


def test_without_a_template_the_user_is_told_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="--chat-template"):
        JinjaRenderer({}, {}).render(
            [{"role": "user", "content": "x"}], tools=None, add_generation_prompt=True, continue_final_message=False, kwargs={}
        )


def test_a_template_that_does_not_parse_stops_the_start() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        JinjaRenderer({"default": "a\n{% for %}"}, {})


def test_where_templates_come_from(tmp_path: Path) -> None:
    def render(renderer: JinjaRenderer, tools: Any = None) -> str:
        return renderer.render(
            [{"role": "user", "content": "x"}], tools=tools, add_generation_prompt=False, continue_final_message=False, kwargs={}
        )

    config = {
        "chat_template": [{"name": "default", "template": "d{{ bos_token }}"}, {"name": "tool_use", "template": "t"}],
        "bos_token": {"content": "<b>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    renderer = JinjaRenderer.load(str(tmp_path), None)
    assert render(renderer) == "d<b>"
    assert render(renderer, TOOLS) == "t"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render(JinjaRenderer.load(str(tmp_path), None)) == "file"
    other = tmp_path / "other.jinja"
    other.write_text("other {{ eos_token is defined }}")
    assert render(JinjaRenderer.load(str(tmp_path), str(other))) == "other False"
    assert render(JinjaRenderer.load(str(tmp_path), "{{ messages[0].role }}")) == "user"
    other.write_bytes(b"\xe9{{ messages }}")
    for given, said in (
        ("missing.jinja", "--chat-template missing.jinja is neither"),
        ("{{ bad", "--chat-template is not valid Jinja: line 1"),
        (str(other), "--chat-template .*other.jinja cannot be read: it is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            JinjaRenderer.load(str(tmp_path), given)
        assert caught.value.param == "chat_template"


# ------------------------------------------------------------------ templates of requests


def talk(renderer: JinjaRenderer, text: str = "hi") -> str:
    return renderer.render(
        [{"role": "user", "content": text}], tools=None, add_generation_prompt=True, continue_final_message=False, kwargs={}
    )


def test_a_requests_template_has_the_same_special_tokens_and_its_own_shape() -> None:
    renderer = JinjaRenderer({"default": CHATML}, {"bos_token": "<s>"})
    before = talk(renderer)
    assert talk(renderer.with_template("{{ bos_token }}{{ messages[0].content[0].text }}")) == "<s>hi", "content in parts, as it wants it"
    assert talk(renderer) == before
    assert renderer.with_template("{{ 1 }}") is renderer.with_template("{{ 1 }}")


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | no_such_filter }}", "{% include 'x' %}{{"])
def test_a_requests_template_that_is_not_jinja_is_the_requests_fault(template: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat_template is not valid Jinja: line 1: .*[^.]\.$") as caught:
        JinjaRenderer({}, {}).with_template(template)
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10**9 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    ],
)
def test_a_requests_template_runs_in_the_sandbox(template: str) -> None:
    renderer = JinjaRenderer({"default": CHATML}, {}, timeout_s=0.2)
    with contextlib.suppress(InvalidRequest):
        assert talk(renderer.with_template(template)) == ""
