"""Every request field that clients know has a status, and a running edge does what it says."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, delta, full_script

from penstock.core.protocol.messages import Message, Submit
from penstock.transports.abilities import ABILITIES, Ability
from penstock.transports.elsewhere import KNOWN
from penstock.transports.openai_schema import ChatRequest, CompletionRequest
from penstock.transports.responses_schema import ResponsesRequest
from penstock.transports.statuses import IN_PART, IN_PART_OF, NAMED, NO_EFFECT_OF, status_of

ENDPOINTS: dict[type[msgspec.Struct], tuple[str, dict[str, Any]]] = {
    ChatRequest: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    CompletionRequest: ("/v1/completions", {"prompt": "hi"}),
    ResponsesRequest: ("/v1/responses", {"input": "hi", "store": False}),
}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

EXAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "ho"}],
    "prompt": "ho",
    "model": "other",
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": 1,
    "top_logprobs": 1,
    "max_tokens": 7,
    "max_completion_tokens": 7,
    "n": 2,
    "best_of": 2,
    "echo": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a", "b"]},
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'start: "a"',
    "seed": 1,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "stream_options.include_usage": True,
    "retain_s": 5,
    "on_disconnect": "park",
    "stream_interval": 3,
    "stream_smoothing_ms": 20,
    "spec_decode": False,
    "stream_options.events": ["json_value"],
    "stream_options.include_obfuscation": True,
    "stream_options.continuous_usage_stats": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "input": "ho",
    "instructions": "Be brief.",
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_object"}},
    "truncation": "auto",
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 7,
    "max_tool_calls": 2,
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "user": "u",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "metadata": {"a": "b"},
    "store": True,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "safety_identifier": "s",
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "use_beam_search": True,
    "length_penalty": 2,
    "early_stopping": "never",
    "min_tokens": 2,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": 2,
    "prompt_logprobs": 1,
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "documents": [{"text": "d"}],
    "chat_template": "",
    "chat_template_kwargs": {"a": 1},
    "priority": 1,
    "request_id": "mine",
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "cache_salt": "s",
    "rid": "mine",
    "no_stop_trim": True,
}
"""A value of each field that is taken, other than what counts without it if there is one."""
COMPLETION = {"add_special_tokens": False, "store": False}
CHAT = {"logprobs": True}
RESPONSES: dict[str, Any] = {
    "tools": [{"type": "function", "name": "f"}],
    "top_logprobs": 2,
    "background": True,
    "stream_options": {"include_obfuscation": True},
}
"""The same where one endpoint differs."""
OWN: dict[type[msgspec.Struct], dict[str, Any]] = {ChatRequest: CHAT, CompletionRequest: COMPLETION, ResponsesRequest: RESPONSES}

BESIDE: dict[str, dict[str, Any]] = {
    "metadata": {"store": True},
    "best_of": {"use_beam_search": True},
    "length_penalty": {"use_beam_search": True},
    "early_stopping": {"use_beam_search": True},
    "top_logprobs": {"logprobs": True},
    "return_tokens_as_token_ids": {"logprobs": 1},
    "stream_options": STREAM,
    "stream_options.include_usage": STREAM,
    "retain_s": STREAM,
    "on_disconnect": STREAM,
    "stream_interval": STREAM,
    "stream_smoothing_ms": STREAM,
    "stream_options.events": {**STREAM, "response_format": {"type": "json_object"}},
    "stream_options.include_obfuscation": STREAM,
    "stream_options.continuous_usage_stats": USAGE,
}
"""Fields that a field means nothing without: they are there in both requests that are compared."""
BESIDE_OF: dict[type[msgspec.Struct], dict[str, dict[str, Any]]] = {
    ResponsesRequest: {
        "metadata": {},
        "top_logprobs": {"include": ["message.output_text.logprobs"]},
        "background": {"store": True},
        "stream_options": STREAM,
        "store": {},
        "previous_response_id": {},
        "stream_options.events": STREAM,
        "best_of": {},
        "length_penalty": {},
        "early_stopping": {},
        "return_tokens_as_token_ids": {},
    },
}
"""The same of one endpoint."""

WARNED = {"priority"}
"""Fields that work in part, of which a header says where they do not."""
WHEN = {"stream_smoothing_ms"}
"""Fields that work, and say when something comes, not what."""
DOING = {"priority", "response_format", "structured_outputs", "best_of", "input", "text", "tools", "reasoning"}
"""Fields that work in part and change something where they do."""
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
REFUSED_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "best_of": ({"best_of": 3, "n": 2, "use_beam_search": False}, "best_of"),
    "chat_template": ({"chat_template": "{{ messages }}"}, "chat_template"),
    "response_format": ({"response_format": {"type": "json"}}, "response_format"),
    "structured_outputs": ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    "tool_choice": ({**TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
    "spaces_between_special_tokens": ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
}
"""Of each field that works in part: what is refused, and the field that is named."""
REFUSED_OF: dict[type[msgspec.Struct], dict[str, tuple[dict[str, Any], str]]] = {
    ResponsesRequest: {
        "input": ({"input": [{"type": "computer_call_output", "call_id": "c", "output": {}}]}, "input[0].type"),
        "text": ({"text": {"verbosity": "low"}}, "text.verbosity"),
        "tools": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        "reasoning": ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        "tool_choice": ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "custom", "name": "f"}}, "tool_choice"),
    },
}
"""The same of one endpoint."""


CHANGING = r'"(id|item_id|created|created_at|completed_at|obfuscation)":("[^"]*"|[\d.]+)'
"""What differs from one reply to the next."""
TELLS = {"metadata", "store", "truncation"}
"""Fields of Responses whose work is, where nothing is too long, to be told again."""


def script(submit: Submit) -> list[Message]:
    """full_script; where JSON is asked for, a list in three tokens, and where a stream is, more of it."""
    first, *rest = full_script(submit)
    texts = ["B", "C"]
    if submit.grammar is not None and submit.grammar.kind == "json":
        texts = ["[1", ",2", "]"]
        first = msgspec.structs.replace(first, texts=["" for _ in range(submit.sampling.n)])
    more = [
        delta(*({"key": submit.key, "choice": choice, "text": text, "tokens": [], "output": count} for choice in range(submit.sampling.n)))
        for count, text in enumerate(texts, 2)
    ]
    return [first, *more, *rest] if submit.stream else [first, *rest]


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    shared_edge.text.script = script
    return shared_edge


def with_field(base: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return base | {outer: base.get(outer, {}) | {inner: value} if inner else value}


def ask(edge: Edge, path: str, body: dict[str, Any]) -> tuple[list[Any], str, str]:
    """What text was told, the reply, and what is kept of it; all without what differs from one request to the next."""
    before = len(edge.text.received)
    reply = edge.kept.post(path, json=body)
    warning = "priority has no effect without --scheduling-policy priority" if body.get("priority") else None
    assert (reply.status_code, reply.headers.get("x-penstock-warning")) == (200, warning), reply.text
    told = [msgspec.structs.asdict(message) for message in edge.text.received[before:] if isinstance(message, Submit)]
    for one in told:
        for name in ("key", "received_ns", "sent_ns", "to_wall_ns", "traceparent"):
            del one[name]
        if re.fullmatch("[0-9a-f]{32}", one["rid"]):
            del one["rid"]
        one["prompt_ids"] = None if one["prompt_ids"] is None else one["prompt_ids"].tolist()
    id = re.search(r'"id":"(chatcmpl-[^"]*)"', reply.text)
    kept = edge.kept.get(f"/v1/chat/completions/{id.group(1)}").json().get("metadata", "nothing") if id else "nothing"
    return told, re.sub(CHANGING, "", reply.text), str(kept)


def without_echo(text: str, name: str) -> str:
    """A reply of Responses, which repeats what the request said, without that."""
    return re.sub(rf'"{name}":("[^"]*"|\d+|null)', "", text)


def refuse(edge: Edge, path: str, body: dict[str, Any], param: str) -> None:
    reply = edge.kept.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "unsupported_feature"), reply.text
    assert error["param"] == param
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ENDPOINTS, ids=lambda kind: kind.__name__)
def test_a_field_does_what_its_status_says(edge: Edge, kind: type[msgspec.Struct], name: str) -> None:
    path, body = ENDPOINTS[kind]
    own = OWN[kind]
    beside = BESIDE_OF.get(kind, {}).get(name, BESIDE.get(name, {}))
    body = body | {field: own.get(field, value) for field, value in beside.items()}
    status = status_of(kind, name)
    if status.word == "refused":
        refuse(edge, path, with_field(body, name, {"x": 1}), name)
        return
    if name == "previous_response_id":
        value = edge.kept.post(path, json={"input": "before"}).json()["id"]
    else:
        value = own.get(name, EXAMPLES.get(name))
    without, given = ask(edge, path, body), ask(edge, path, with_field(body, name, value))
    if kind is ResponsesRequest and name not in TELLS:
        without, given = ((told, without_echo(text, name), kept) for told, text, kept in (without, given))
    if (status.word == "works" and name not in WHEN) or name in DOING:
        assert given != without
    else:
        assert given == without
    if status.word == "in part" and name not in WARNED:
        fields, param = REFUSED_OF.get(kind, {}).get(name) or REFUSED_VALUES[name]
        refuse(edge, path, body | fields, param)


def test_whatever_is_no_simple_yes_says_why() -> None:
    for kind in ENDPOINTS:
        for name in NAMED:
            status = status_of(kind, name)
            assert (status.word == "works") == (not status.why), name


def test_no_row_is_left_over() -> None:
    known = {name for kind in ENDPOINTS for name in kind.__struct_fields__}
    assert known <= NAMED.keys()
    assert {
        name.partition(".")[0] for name in (*IN_PART, *(name for rows in (*IN_PART_OF.values(), *NO_EFFECT_OF.values()) for name in rows))
    } <= known
    assert EXAMPLES.keys() <= NAMED.keys()


# ------------------------------------------------------------------ abilities, endpoints


@pytest.mark.parametrize("ability", ABILITIES, ids=lambda ability: ability.what.replace(" ", "-"))
def test_what_may_be_asked_for_is_as_the_table_says(edge: Edge, ability: Ability) -> None:
    word = ability.status.word
    if word in ("refused", "in part"):
        refuse(edge, ability.path, ability.body, ability.param)
        return
    reply = edge.kept.post(ability.path, json=ability.body)
    assert (reply.status_code, reply.headers.get("x-penstock-ignored-fields"), ability.param) == (200, None, ""), reply.text


def test_a_pin_is_told_to_nobody(edge: Edge) -> None:
    """Anthropic's cache_control, wherever it stands."""
    pin = {"type": "ephemeral"}
    tool = {"name": "f", "input_schema": {"type": "object"}}
    plain = {"model": "brook", "max_tokens": 8, "system": [{"type": "text", "text": "s"}], "tools": [tool]}
    plain["messages"] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    pinned = {
        **plain,
        "cache_control": pin,
        "system": [{"type": "text", "text": "s", "cache_control": pin}],
        "tools": [{**tool, "cache_control": pin}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {**pin, "ttl": "1h"}}]}],
    }
    assert ask(edge, "/v1/messages", pinned) == ask(edge, "/v1/messages", plain)
    assert edge.kept.post("/v1/messages", json=pinned).json()["usage"]["cache_creation_input_tokens"] == 0


@pytest.mark.parametrize("known", KNOWN)
def test_an_endpoint_is_there_or_says_what_to_use(edge: Edge, known: str) -> None:
    """Of one that is there something is known about the (empty) request; the other says what the table says."""
    method, path = known.split()
    reply = edge.kept.request(method, re.sub(r"{\w+}", "x", path), json={} if method == "POST" else None)
    missing = reply.status_code == 404 and "There is nothing at" in reply.text
    assert missing is bool(KNOWN[known]), reply.text
    if missing:
        assert KNOWN[known] in reply.json()["error"]["message"]
    else:
        assert reply.status_code != 405


def test_unknown_paths_still_point_to_the_document(edge: Edge) -> None:
    for path in ("/nothing", "/v1/conversations/abc/items", "/v1/embeddings/"):
        message = edge.kept.get(path).json()["error"]["message"]
        assert ("See /schema" in message) is (path == "/nothing"), message
