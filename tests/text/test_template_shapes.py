"""What a client says reaches the prompt in whatever shape the template takes: what comes out is what Transformers renders from the right one."""

from __future__ import annotations

import json
from typing import Any

import chat_templates as t
import pytest

from penstock.core.actors.text.chat import FIELDS, Shape, prepare
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.renderers.jinja import JinjaRenderer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}}]

_renderers: dict[str, JinjaRenderer] = {}


def ours(template: str, messages: list[dict[str, Any]], *, tools: Any = None, add: bool = False, go_on: bool = False) -> str:
    renderer = _renderers.setdefault(template, JinjaRenderer({"default": template}, SPECIAL))
    return renderer.render(messages, tools=tools, add_generation_prompt=add, continue_final_message=go_on, kwargs={})


def theirs(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, **{**SPECIAL, **arguments})
    return str(rendered[0])


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(arguments: Any, name: str = "look", **more: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


SPACED = '{"city":"Zürich",   "n": 1}'
TALK = [("system", "Be brief."), ("user", "How high is it?"), ("assistant", "Three metres."), ("user", "And now?")]

# --- content


@pytest.mark.parametrize(
    "template",
    [t.PARTS_ONLY, t.TYPED_PARTS_ONLY, t.MAPPED_PARTS, t.FIRST_PART_ONLY, t.NEEDS_SYSTEM],
    ids=["parts", "typed", "mapped", "first", "needs-system"],
)
def test_a_template_that_knows_only_parts_is_given_parts(template: str) -> None:
    expected = theirs(template, [said(role, parts(text)) for role, text in TALK])
    assert all(text in expected for _, text in TALK)
    assert ours(template, [said(role, text) for role, text in TALK]) == expected
    assert ours(template, [said(role, parts(text)) for role, text in TALK]) == expected


@pytest.mark.parametrize("template", [t.STRINGS_ONLY, t.STRIPPED, t.THREE_ROLES, t.THINKING, t.ONE_CALL, t.TEXT_ARGUMENTS, t.CHANNELS])
def test_a_template_that_knows_only_strings_is_given_strings(template: str) -> None:
    expected = theirs(template, [said(role, text) for role, text in TALK])
    assert ours(template, [said(role, text) for role, text in TALK]) == expected
    assert ours(template, [said(role, parts(text)) for role, text in TALK]) == expected


def test_several_parts_are_kept_apart_where_they_may_be_and_joined_where_not() -> None:
    two = [said("user", parts("one", "two"))]
    assert ours(t.PARTS_ONLY, two) == theirs(t.PARTS_ONLY, two) == "<user>onetwo"
    assert ours(t.VISION, two) == theirs(t.VISION, two)
    assert ours(t.STRIPPED, two) == theirs(t.STRIPPED, [said("user", "one\ntwo")])
    # Only the first part comes out: so there must be only one.
    assert ours(t.FIRST_PART_ONLY, two) == theirs(t.FIRST_PART_ONLY, [said("user", parts("one\ntwo"))])
    system = [said("system", parts("one", "two")), said("user", parts("a", "b"))]
    assert ours(t.SYSTEM_IN_FIRST_PART, system) == theirs(
        t.SYSTEM_IN_FIRST_PART, [said("system", "one\ntwo"), said("user", parts("a", "b"))]
    )


def test_each_role_is_given_its_own_form() -> None:
    expected = theirs(t.PARTS_FOR_USERS, [said(role, parts(text) if role == "user" else text) for role, text in TALK])
    assert expected == "system:Be brief.;U:How high is it?;assistant:Three metres.;U:And now?;"
    for form in (str, parts):
        assert ours(t.PARTS_FOR_USERS, [said(role, form(text)) for role, text in TALK]) == expected


@pytest.mark.parametrize("template", [t.VISION, t.SYSTEM_IN_FIRST_PART])
@pytest.mark.parametrize("form", [str, parts])
def test_where_both_will_do_the_client_decides(template: str, form: Any) -> None:
    messages = [said(role, form(text)) for role, text in TALK]
    assert ours(template, messages, add=True) == theirs(template, messages, add_generation_prompt=True)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_form_that_fails_in_some_conversations_is_not_used(tools: Any) -> None:
    words = [said(role, parts(text)) for role, text in TALK]
    for template, strings in ((t.STRINGS_WITH_TOOLS, "system"), (t.STRINGS_IN_HISTORY, "assistant")):
        right = [said(role, text if role == strings else parts(text)) for role, text in TALK]
        assert ours(template, words, tools=tools) == theirs(template, right, tools=tools)


def test_a_template_may_still_refuse_a_role() -> None:
    with pytest.raises(InvalidRequest, match="No system role here"):
        ours(t.NO_SYSTEM, [said("system", "x"), said("user", "y")])
    with pytest.raises(InvalidRequest, match="must alternate"):
        ours(t.NO_SYSTEM, [said("user", "x"), said("user", "y")])
    with pytest.raises(InvalidRequest, match="of the system"):
        ours(t.NEEDS_SYSTEM, [said("user", "x")])
    with pytest.raises(InvalidRequest, match="nine letters"):
        ours(t.NINE_LETTERS, [said("user", "x"), said("assistant", None, tool_calls=[call("{}", id="call_1")])])
    assert ours(t.NO_SYSTEM, [said("user", " x ")]) == "<turn>user\nx\n"


def test_text_that_would_be_left_out_is_refused() -> None:
    history = [said("user", "x"), said("assistant", None, tool_calls=[call("{}")])]
    with pytest.raises(InvalidRequest, match=r"messages\[2\].*leaves out what the role 'tool' says") as refused:
        ours(t.THREE_ROLES, [*history, said("tool", "42", tool_call_id="abcdefghi")])
    assert refused.value.param == "messages"
    assert ours(t.THREE_ROLES, [*history, said("tool", " ", tool_call_id="abcdefghi")]), "nothing is left out"
    only_the_last = "{{ messages[-1].content if messages[-1].role == 'user' }}"
    assert ours(only_the_last, [said("user", "x")]) == "x"
    with pytest.raises(InvalidRequest, match="'system'"):
        ours(only_the_last, [said("system", "important"), said("user", "x")])
    with pytest.raises(InvalidRequest, match="'user'"):
        ours("{% for m in messages %}{{ m.content.body }}{% endfor %}", [said("user", "x")])


def test_a_system_that_is_only_looked_for_in_the_first_message() -> None:
    first, later = said("system", "Be brief."), said("system", "Be long.")
    user, assistant = said("user", "x"), said("assistant", "y")
    for template in (t.CHANNELS, t.THREE_ROLES, t.STRINGS_ONLY):
        assert "Be brief." in ours(template, [first, user, assistant, user])
    for talk in ([first, later, user], [first, user, assistant, later, user], [user, later]):
        with pytest.raises(InvalidRequest, match=rf"messages\[{talk.index(later)}\].*'system' says after the first message"):
            ours(t.CHANNELS, talk)
        assert ours(t.THREE_ROLES, talk) == theirs(t.THREE_ROLES, talk)
    with pytest.raises(InvalidRequest, match=r"messages\[1\].*'developer' says after"):
        ours(t.CHANNELS, [first, said("developer", "Be long."), user])
    assert ours(t.CHANNELS, [first, said("system", ""), user]) == theirs(t.CHANNELS, [first, user])


def test_what_a_template_leaves_out_on_purpose_is_its_own_affair() -> None:
    messages = [said("user", "a"), said("assistant", "<think>secret</think>b"), said("user", "c")]
    assert ours(t.THINKING, messages) == theirs(t.THINKING, messages) == "<user>a<assistant>b<user>c"
    messages[1] = said("assistant", "b", reasoning_content="secret")
    assert ours(t.THINKING, messages) == "<user>a<assistant>b<user>c"
    last = [said("user", "a"), said("assistant", "b", reasoning_content="kept")]
    assert ours(t.THINKING, last) == theirs(t.THINKING, last) == "<user>a<assistant><think>kept</think>b"
    upper = "{% for m in messages %}{{ m.content | upper }};{% endfor %}"
    assert ours(upper, [said("user", "abc")]) == "ABC;"
    for cut in ("{{ messages[0].content[:5] }}", "{{ messages[0].content | replace('q', 'k') }}"):
        assert ours(cut, [said("user", "quite so")]) == theirs(cut, [said("user", "quite so")])


def test_developers_are_the_system_where_the_template_knows_no_developers() -> None:
    talk = [said("developer", "Be brief."), said("user", "x")]
    for template in (t.THREE_ROLES, t.JSON_ARGUMENTS, t.SYSTEM_IN_FIRST_PART):
        assert ours(template, talk) == theirs(template, [said("system", "Be brief."), said("user", "x")])
    for template in (t.STRINGS_ONLY, t.CHANNELS):
        assert ours(template, talk) == theirs(template, talk)


@pytest.mark.parametrize("template", [t.PARTS_ONLY, t.FIRST_PART_ONLY, t.NEEDS_SYSTEM, t.FIRST_PART_AND_CALLS])
@pytest.mark.parametrize("content", [None, ""])
def test_a_message_without_text_has_the_templates_form_too(template: str, content: Any) -> None:
    start = [said("system", parts("a")), said("user", parts("b"))]
    for more, right in (({"tool_calls": [call(SPACED)]}, {"tool_calls": [call(json.loads(SPACED))]}), ({"tool_calls": []}, {})):
        given = [said("system", "a"), said("user", "b"), said("assistant", content, **more)]
        assert ours(template, given) == theirs(template, [*start, said("assistant", parts(""), **right)])


@pytest.mark.parametrize("template", [t.PARTS_ONLY, t.FIRST_PART_ONLY, t.STRINGS_ONLY, t.VISION])
@pytest.mark.parametrize("form", [str, parts])
def test_a_message_is_continued_in_any_form(template: str, form: Any) -> None:
    whole = ours(template, [said("user", "a?"), said("assistant", "The level")])
    assert ours(template, [said("user", "a?"), said("assistant", form("The level"))], go_on=True) == whole[: whole.index("level") + 5]


def test_a_template_that_is_slow_or_raises_what_it_likes_still_loads() -> None:
    for template in (
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages[9].content }}",
        "{{ messages | tojson }}",
    ):
        JinjaRenderer({"default": template}, {}, timeout_s=0.2)


# --- tool calls

TURN = [said("user", "x"), said("assistant", None, tool_calls=[call(SPACED)]), said("tool", "42", tool_call_id="abcdefghi")]


def with_arguments(arguments: Any, content: Any = None) -> list[dict[str, Any]]:
    return [TURN[0], said("assistant", content, tool_calls=[call(arguments)]), TURN[2]]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("template", [t.TEXT_ARGUMENTS, t.PRINTED_ARGUMENTS])
def test_templates_that_splice_arguments_get_the_clients_text(template: str, tools: Any) -> None:
    rendered = ours(template, TURN, tools=tools, add=True)
    assert rendered == theirs(template, TURN, tools=tools, add_generation_prompt=True)
    assert rendered.count(SPACED) == 1
    assert ours(template, with_arguments({"city": "Zürich"}), add=True) == theirs(
        template, with_arguments('{"city": "Zürich"}'), add_generation_prompt=True
    )


ARGUMENTS = "{{ c.function.arguments }}"


@pytest.mark.parametrize(
    "use",
    [
        "{{ c.function.arguments | e }}",
        "{{ c.function.arguments | escape }}",
        "{{ c.function.arguments | forceescape }}",
        "{{ c.function.arguments | string }}",
        "{{ c.function.arguments | string | e }}",
        "{{ c.function.arguments | trim }}",
        "{{ c.function.arguments | upper }}",
        "{{ c.function.arguments | lower }}",
        "{{ c.function.arguments | replace('\"', '\\\\\"') }}",
        "{{ c.function.arguments | replace(' ', '_') }}",
        "{{ c.function.arguments | indent(4) }}",
        "{{ c.function.arguments | wordwrap(200) }}",
        "{{ c.function.arguments | truncate(4000) }}",
        "{{ c.function.arguments | center(90) }}",
        "{{ c.function.arguments | striptags }}",
        "{{ c.function.arguments | string | urlencode }}",
        "{{ [c.function.arguments] | join(', ') }}",
        "{{ c.function.name ~ ' ' ~ c.function.arguments }}",
        "{{ '%s %s' | format(c.function.name, c.function.arguments) }}",
        "{{ '%s' % c.function.arguments }}",
        "{{ '{} {}'.format(c.function.name, c.function.arguments) }}",
        "{{ c.function.arguments[:4000] }}",
        "{{ c.function.arguments[:5] }}",
        "{{ c.function.arguments[1:] | wordwrap(8) }}",
        "{{ c.function.arguments | wordwrap(20) }}",
        "{{ c.function.arguments | truncate(9) }}",
        "{{ c.function.arguments | truncate(4, true, '') }}",
        "{{ c.function.arguments.startswith('{') }}",
        "{{ c.function.arguments.split(':') | first }}",
        "{{ c.function.arguments.find('x') }}",
        "{{ c.function.arguments.strip() }}",
        "{{ c.function.arguments.replace('x', 'y') }}",
        "{% if '}' in c.function.arguments %}{{ c.function.arguments }}{% else %}nothing{% endif %}",
        "{% if c.function.arguments | length > 2 %}{{ c.function.arguments }}{% endif %}",
        "{% set a = c.function.arguments %}{{ a | default('none') }}",
    ],
)
def test_whatever_makes_a_text_of_the_arguments_gets_the_clients(use: str) -> None:
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    expected = theirs(template, with_arguments(SPACED, ""))
    assert "nothing" not in expected
    assert ours(template, TURN) == expected


@pytest.mark.parametrize(
    "use",
    [
        "{% set text = c.function.arguments | string %}{{ c.function.arguments | tojson }}",
        "{% if c.function.arguments | length > 0 %}{{ c.function.arguments | tojson(indent=2) }}{% endif %}",
        "{{ c.function.arguments | tojson | e }}",
        "{{ c.function.arguments | tojson | upper }}",
        "{{ c.function.arguments | tojson | replace('\"', '\\\\\"') }}",
        "{{ c.function.arguments | tojson | string | trim }}",
        "{{ c.function.arguments | urlencode }}",
        "{% for k, v in c.function.arguments | dictsort %}{{ k ~ '=' ~ v }}{% endfor %}",
        "{% if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{% else %}{{ c.function.arguments | e }}{% endif %}",
        "{% for k in c.function.arguments %}{{ k | e }}: {{ c.function.arguments[k] | string | e }}{% endfor %}",
    ],
)
def test_whatever_looks_into_the_arguments_gets_the_object(use: str) -> None:
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    assert ours(template, TURN) == theirs(template, with_arguments(json.loads(SPACED), ""))


@pytest.mark.parametrize(
    "use",
    [
        "{{ c.function.arguments[0] }}",
        "{{ c.function.arguments[-1] }}",
        "{{ c.function.arguments[0] }}{{ c.function.arguments | length }}",
        "{{ c.function.arguments | reverse }}",
        "{{ c.function.arguments | reverse | join }}",
        "{% if c.function.arguments == '{}' %}none{% else %}some{% endif %}",
        "{% for x in c.function.arguments %}{{ x }}{% endfor %}",
        "{{ c.function.arguments }}{{ c.function.arguments | first }}{{ c.function.arguments | last }}",
        "{{ c.function.arguments }}{{ c.function.arguments | length }}{{ 'y' in c.function.arguments }}",
        "{{ c.function.arguments }}{% for x in c.function.arguments %}{{ x }}.{% endfor %}",
    ],
)
@pytest.mark.parametrize("arguments", [SPACED, "{}", '{"city": "Zür'])
def test_whatever_asks_for_places_of_a_text_gets_the_clients(use: str, arguments: str) -> None:
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    assert ours(template, with_arguments(arguments)) == theirs(template, with_arguments(arguments, ""))


@pytest.mark.parametrize(
    ("use", "gives"),
    [
        ("{{ c.function.arguments | tojson }}{{ c.function.arguments | length }}", '{"city": "Zürich", "n": 1}2'),
        ("{{ c.function.arguments | tojson }}{{ c.function.arguments | first }}", '{"city": "Zürich", "n": 1}city'),
        ("{{ c.function.arguments.city }}{{ 'n' in c.function.arguments }}{{ c.function.arguments | last }}", "ZürichTruen"),
        ("{% for k in c.function.arguments %}{{ k }}={{ c.function.arguments[k] }};{% endfor %}", "city=Zürich;n=1;"),
        ("{{ c.function.arguments[0] }}{{ c.function.arguments | tojson }}", '{{"city": "Zürich", "n": 1}'),
        ("{{ c.function.arguments[-1] }}{{ c.function.arguments['city'] }}", "}Zürich"),
    ],
)
@pytest.mark.parametrize("arguments", [SPACED, json.loads(SPACED)])
def test_beside_fields_a_question_is_about_the_object(use: str, gives: str, arguments: Any) -> None:
    assert f"<call>look {gives}</call>" in ours(t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use), with_arguments(arguments))


@pytest.mark.parametrize(
    "use",
    [
        "{{ c.function.arguments | first }}",
        "{{ c.function.arguments | last }}",
        "{{ c.function.arguments | length }}",
        "{{ c.function.arguments | list | length }}",
        "{{ c.function.arguments | join(',') }}",
        "{{ 'Z' in c.function.arguments }}",
        "{% for x in c.function.arguments %}{{ x }}.{% endfor %}",
        "{% for x in c.function.arguments | reverse %}{{ x }}.{% endfor %}",
    ],
)
def test_a_question_that_means_two_things_is_refused_where_the_answers_differ(use: str) -> None:
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    with pytest.raises(InvalidRequest, match="their text or the object in it") as refused:
        ours(template, with_arguments(SPACED))
    assert refused.value.param == "messages"
    assert ours(template, TURN[:1]) == "<user>x"
    assert ours(template, [TURN[0], said("assistant", "y")]) == "<user>x<assistant>y"
    same = t.PRINTED_ARGUMENTS.replace(
        ARGUMENTS, "{% if c.function.arguments | length > 0 %}some{% endif %}{{ 'x' in c.function.arguments }}"
    )
    assert "<call>look someFalse</call>" in ours(same, with_arguments(SPACED))
    with pytest.raises(InvalidRequest, match="their text or the object in it"):
        ours(same, with_arguments("{}"))


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "template",
    [t.EITHER_ARGUMENTS, t.JSON_ARGUMENTS, t.ITEM_ARGUMENTS, t.ITEMS_FILTER, t.ONE_CALL, t.NINE_LETTERS, t.CHANNELS],
    ids=["either", "json", "items", "items-filter", "one-call", "nine-letters", "channels"],
)
def test_templates_that_take_objects_get_the_object(template: str, content: Any) -> None:
    expected = theirs(template, with_arguments({"city": "Zürich", "n": 1}, ""))
    assert "Zürich" in expected
    assert "None" not in expected
    assert ours(template, with_arguments(SPACED, content)) == expected
    assert ours(template, with_arguments({"city": "Zürich", "n": 1}, content)) == expected


def test_calls_come_out_whatever_stands_beside_them() -> None:
    """As DeepSeek R1: only beside null. Text beside a call becomes a message before it."""
    expected = theirs(t.TEXT_ARGUMENTS, TURN)
    assert "<call>function<sep>look" in expected
    for content in (None, "", [], "\n\n"):
        assert ours(t.TEXT_ARGUMENTS, with_arguments(SPACED, content)) == expected
    absent = [TURN[0], {"role": "assistant", "tool_calls": [call(SPACED)]}, TURN[2]]
    assert ours(t.TEXT_ARGUMENTS, absent) == expected
    assert ours(t.TEXT_ARGUMENTS, with_arguments(SPACED, "Let me look.")) == theirs(
        t.TEXT_ARGUMENTS, [TURN[0], said("assistant", "Let me look."), *TURN[1:]]
    )
    assert ours(t.JSON_ARGUMENTS, with_arguments(SPACED, "Let me look.")) == theirs(
        t.JSON_ARGUMENTS, with_arguments(json.loads(SPACED), "Let me look.")
    )


CUT = '{"city": "Zür'


@pytest.mark.parametrize("arguments", [CUT, "no JSON", "{'a': 1}", '{"a": 1}}', '{"a": NaN}', "[" * 100_000])
def test_arguments_that_are_no_json_are_passed_on(arguments: str) -> None:
    for template in (t.TEXT_ARGUMENTS, t.PRINTED_ARGUMENTS, t.EITHER_ARGUMENTS, t.JSON_ARGUMENTS, t.ONE_CALL, t.NINE_LETTERS, t.CHANNELS):
        talk = with_arguments(arguments, None if template is t.TEXT_ARGUMENTS else "")
        assert ours(template, talk) == theirs(template, talk)
    # Where only an object's items can be named, the text is the one item: nothing is lost, nothing made up.
    for template in (t.ITEM_ARGUMENTS, t.ITEMS_FILTER):
        assert ours(template, with_arguments(arguments)) == theirs(template, with_arguments({"arguments": arguments}, ""))


@pytest.mark.parametrize("arguments", [CUT, "no JSON", "[1, 2]", "5"])
@pytest.mark.parametrize(
    ("use", "gives"),
    [
        ("{{ c.function.arguments.keys() | join(',') }}", "arguments"),
        ("{{ c.function.arguments[0] + c.function.arguments.city[-1] + c.function.arguments.city }}", "ENDSTEXT"),
        ("{% for k in c.function.arguments.keys() %}{{ k }}={{ c.function.arguments[k] }}{% endfor %}", "arguments=TEXT"),
        ("{{ c.function.arguments.values() | join(',') }}", "TEXT"),
        ("{{ c.function.arguments.get('city') }}", "TEXT"),
        ("{{ c.function.arguments.get('city', 'Bern') | upper }}", "UPPER"),
        ("{{ 'In ' + c.function.arguments['city'] }}", "In TEXT"),
        ("{{ 'In ' + c.function.arguments.city }}", "In TEXT"),
        ("{{ c.function.arguments.city }}", "TEXT"),
        ("{{ c.function.arguments['place']['city'] + '!' }}", "TEXT!"),
        ("{{ c.function.arguments.place.get('city') + '!' }}", "TEXT!"),
        ("{% for k, v in c.function.arguments.place.items() %}{{ k }}={{ v }}{% endfor %}", "arguments=TEXT"),
        ("{{ c.function.arguments.place.values() | join + c.function.arguments.place.keys() | join }}", "TEXTarguments"),
        ("{% for k, v in c.function.arguments | items %}{{ k + v }}{% endfor %}", "argumentsTEXT"),
        ("{% for k, v in c.function.arguments | dictsort %}{{ k + v }}{% endfor %}", "argumentsTEXT"),
        ("{% for k in c.function.arguments %}{{ k + c.function.arguments[k] }}{% endfor %}", "argumentsTEXT"),
        ("{{ '%(city)s' % c.function.arguments }}", "TEXT"),
        ("{{ c.function.arguments.copy() | string }}", "TEXT"),
        ("{{ c.function.arguments | tojson }}", "DUMPED"),
        ("{% if c.function.arguments is not mapping %}{{ raise_exception('!') }}{% endif %}{{ c.function.arguments.city }}", "TEXT"),
    ],
)
def test_no_template_refuses_a_history_for_arguments_that_are_no_object(use: str, gives: str, arguments: str) -> None:
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    for word, value in (
        ("TEXT", arguments),
        ("ENDS", arguments[0] + arguments[-1]),
        ("UPPER", arguments.upper()),
        ("DUMPED", json.dumps(arguments, ensure_ascii=False)),
    ):
        gives = gives.replace(word, value)
    assert f"<call>look {gives}</call>" in ours(template, with_arguments(arguments, ""))


def test_a_template_that_the_probes_misjudged_gets_the_other_form() -> None:
    """It takes no object where tools are named otherwise than the probes' are."""
    use = "{% if c.function.name == 'look' %}{{ c.function.arguments + '' }}{% else %}{{ c.function.arguments.items() | list }}{% endif %}"
    template = t.PRINTED_ARGUMENTS.replace(ARGUMENTS, use)
    assert f"<call>look {CUT}</call>" in ours(template, with_arguments(CUT, ""))
    with pytest.raises(InvalidRequest, match="failed on the conversation"):
        ours(template, with_arguments(SPACED, ""))


@pytest.mark.parametrize("arguments", ['"text"', "5", "[1, 2]", "null", "true"])
def test_json_that_is_no_object_is_passed_on_as_text(arguments: str) -> None:
    assert f"```json\n{arguments}\n```" in ours(t.TEXT_ARGUMENTS, with_arguments(arguments))
    assert f"<call>look {arguments}</call>" in ours(t.EITHER_ARGUMENTS, with_arguments(arguments))
    assert f"<arguments>{arguments}</arguments>" in ours(t.ITEM_ARGUMENTS, with_arguments(arguments))


@pytest.mark.parametrize("arguments", ["", "  ", None])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    assert "look\n```json\n{}\n```" in ours(t.TEXT_ARGUMENTS, with_arguments(arguments))
    for template in (t.EITHER_ARGUMENTS, t.JSON_ARGUMENTS, t.ITEM_ARGUMENTS):
        assert ours(template, with_arguments(arguments)) == theirs(template, with_arguments({}, ""))
    missing = with_arguments("")
    del missing[1]["tool_calls"][0]["function"]["arguments"]
    assert ours(t.JSON_ARGUMENTS, missing) == theirs(t.JSON_ARGUMENTS, with_arguments({}, ""))


# --- what else clients send


@pytest.mark.parametrize(
    ("message", "wrong", "right"),
    [
        ({"role": "assistant", "content": "", "toolCalls": [call(SPACED)]}, "toolCalls", "tool_calls"),
        ({"role": "tool", "content": "", "tool-call-id": "a"}, "tool-call-id", "tool_call_id"),
        ({"role": "assistant", "content": "", "functionCall": {}}, "functionCall", "function_call"),
        ({"role": "user", "content": "a", "Content": "b"}, "Content", "content"),
        ({"role": "assistant", "content": "a", "Prefix": True}, "Prefix", "prefix"),
        ({"role": "user", "content": "a", "IMAGES": ["x"]}, "IMAGES", "images"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "Arguments": "{}"}}]}, "Arguments", "arguments"),
        ({"role": "assistant", "function_call": {"name": "f", "Arguments": "{}"}}, "Arguments", "arguments"),
    ],
)
def test_a_field_in_another_spelling_is_told_its_name(message: dict[str, Any], wrong: str, right: str) -> None:
    with pytest.raises(UnsupportedFeature, match=rf"messages\[0\]\..*{wrong} is not supported here. Its name here is {right}\."):
        prepare([message])


def test_nulls_within_a_call_are_not_given() -> None:
    whole = {"function": {"name": "look", "arguments": "{}"}}
    nulls = {"id": None, "type": None, "index": None, "function": {"name": "look", "arguments": "{}", "strict": None}}
    assert prepare([said("assistant", None, tool_calls=[nulls])]) == prepare([said("assistant", None, tool_calls=[whole])])


def test_every_field_that_a_request_may_name_has_one_spelling() -> None:
    from penstock.transports.openai_schema import ChatMessage

    assert set(ChatMessage.__struct_fields__) == FIELDS


def test_fields_that_nobody_knows_reach_the_template() -> None:
    [message] = prepare([{"role": "user", "content": "a", "reasoning_content": "b", "Contents": 1, "toolcalls" * 20: 2}])
    assert message["Contents"] == 1
    assert message["reasoning_content"] == "b"


def test_fields_that_are_null_or_empty_are_not_there() -> None:
    """As the official client dumps its own messages. ONE_CALL and CHANNELS ask whether the key is there."""
    dumped = said("assistant", "hello", refusal=None, annotations=None, audio=None, function_call=None, tool_calls=None, name=None)
    for template in (t.ONE_CALL, t.CHANNELS, t.NINE_LETTERS, t.LEGACY_CALLS):
        expected = theirs(template, [said("user", "x"), said("assistant", "hello")])
        assert ours(template, [said("user", "x"), dumped]) == expected
        assert ours(template, [said("user", "x"), said("assistant", "hello", tool_calls=[])]) == expected
        nothing = theirs(template, [said("user", "x"), said("assistant", "")])
        assert ours(template, [said("user", "x"), said("assistant", None, tool_calls=[])]) == nothing


def test_a_refusal_is_what_the_assistant_said() -> None:
    expected = theirs(t.STRINGS_ONLY, [said("user", "x"), said("assistant", "I will not.")])
    for message in (
        said("assistant", [{"type": "refusal", "refusal": "I will not."}]),
        said("assistant", None, refusal="I will not."),
        said("assistant", "", refusal="I will not."),
        said("assistant", "I will not.", refusal=None),
    ):
        assert ours(t.STRINGS_ONLY, [said("user", "x"), message]) == expected
    both = said("assistant", [*parts("Well."), {"type": "refusal", "refusal": "I will not."}])
    assert ours(t.VISION, [said("user", "x"), both]) == "<user>x<assistant>Well.I will not."
    assert ours(t.STRINGS_ONLY, [said("user", "x"), said("assistant", "Well.", refusal="No.")]).endswith("[assistant]Well.\nNo.\n")
    with pytest.raises(UnsupportedFeature, match="'refusal'"):
        ours(t.STRINGS_ONLY, [said("user", [{"type": "refusal", "refusal": "x"}])])


LEGACY = [
    said("user", "x"),
    said("assistant", None, function_call={"name": "look", "arguments": SPACED}),
    said("function", "42", name="look"),
    said("assistant", "done"),
]


@pytest.mark.parametrize("template", [t.TEXT_ARGUMENTS, t.JSON_ARGUMENTS, t.ITEM_ARGUMENTS, t.NINE_LETTERS, t.CHANNELS, t.ONE_CALL])
def test_legacy_function_calls_are_tool_calls(template: str) -> None:
    arguments = SPACED if template is t.TEXT_ARGUMENTS else json.loads(SPACED)
    modern = [
        LEGACY[0],
        said("assistant", None if template is t.TEXT_ARGUMENTS else "", tool_calls=[call(arguments, id="call00000")]),
        said("tool", "42", name="look", tool_call_id="call00000"),
        LEGACY[3],
    ]
    expected = theirs(template, modern)
    assert "42" in expected
    assert "Zürich" in expected
    assert ours(template, LEGACY) == expected


def test_a_template_that_reads_function_call_keeps_it() -> None:
    assert ours(t.LEGACY_CALLS, LEGACY) == theirs(t.LEGACY_CALLS, LEGACY)
    assert f"<call>look {SPACED}</call><function look>42" in ours(t.LEGACY_CALLS, LEGACY)
    cut = [LEGACY[0], said("assistant", None, function_call={"name": "look", "arguments": CUT})]
    assert CUT in ours(t.LEGACY_CALLS, cut)


def test_a_template_that_asks_about_function_call_keeps_it_too() -> None:
    spliced = "' ' + m.function_call.arguments"
    asking = [LEGACY[0], said("assistant", None, function_call={"name": "look", "arguments": SPACED})]
    for use, gives in (
        ("m.function_call.arguments[0] ~ m.function_call.arguments[-1]", "look{}"),
        ("m.function_call.arguments.city", "lookZürich"),
        ("' ' + m.function_call.arguments[:8]", "look " + SPACED[:8]),
    ):
        template = t.LEGACY_CALLS.replace(spliced, use)
        assert f"<call>{gives}</call>" in ours(template, asking)
    with pytest.raises(InvalidRequest, match="their text or the object in it"):
        ours(t.LEGACY_CALLS.replace(spliced, "(m.function_call.arguments | length | string)"), asking)


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user"}, r"messages\[0\]\.content is required"),
        ({"role": "assistant"}, r"messages\[0\]\.content is required"),
        ({"role": "tool", "content": None}, r"messages\[0\]\.content is required"),
        ({"role": "user", "content": 5}, r"messages\[0\]\.content must"),
        ({"role": "user", "content": [5]}, r"messages\[0\]\.content\[0\] must"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, r"messages\[0\]\.content\[0\] is of type"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"messages\[0\]\.content\[0\]\.text must"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, r"messages\[0\]\.content\[0\]\.refusal must"),
        ({"role": "assistant", "refusal": 5}, r"messages\[0\]\.refusal must"),
        ({"role": "assistant", "tool_calls": {}}, r"messages\[0\]\.tool_calls must"),
        ({"role": "assistant", "tool_calls": ["x"]}, r"messages\[0\]\.tool_calls\[0\] must"),
        ({"role": "assistant", "tool_calls": [{"function": None}]}, r"messages\[0\]\.tool_calls\[0\] must"),
        ({"role": "assistant", "tool_calls": [call(5)]}, r"messages\[0\]\.tool_calls\[0\]\.function\.arguments must"),
        ({"role": "assistant", "tool_calls": [call(["x"])]}, r"messages\[0\]\.tool_calls\[0\]\.function\.arguments must"),
        ({"role": "assistant", "function_call": "look"}, r"messages\[0\]\.function_call must"),
        ({"role": "assistant", "function_call": {"arguments": 1}}, r"messages\[0\]\.function_call\.arguments must"),
    ],
)
def test_what_is_no_message_is_named(message: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest, match=where) as refused:
        prepare([message])
    assert refused.value.param == "messages"


def test_the_clients_messages_are_left_alone() -> None:
    before = json.dumps(LEGACY + TURN)
    prepare(LEGACY + TURN, Shape(instead={"function": "tool"}, calls_alone=True, empty=("null",)))
    assert json.dumps(LEGACY + TURN) == before
