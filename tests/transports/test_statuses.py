"""Every request field that clients know has a status, and a running edge does what it says."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, full_script

from penstock.core.protocol.messages import Submit
from penstock.transports.openai_schema import ChatRequest, CompletionRequest
from penstock.transports.statuses import IN_PART, NAMED, NO_EFFECT, status_of

ENDPOINTS: dict[type[msgspec.Struct], tuple[str, dict[str, Any]]] = {
    ChatRequest: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    CompletionRequest: ("/v1/completions", {"prompt": "hi"}),
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
    "stream_options.include_obfuscation": True,
    "stream_options.continuous_usage_stats": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "tools": [{"type": "function", "function": {"name": "f"}}],
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
"""The same where one endpoint differs."""

BESIDE: dict[str, dict[str, Any]] = {
    "metadata": {"store": True},
    "best_of": {"use_beam_search": True},
    "length_penalty": {"use_beam_search": True},
    "early_stopping": {"use_beam_search": True},
    "top_logprobs": {"logprobs": True},
    "return_tokens_as_token_ids": {"logprobs": 1},
    "stream_options": STREAM,
    "stream_options.include_usage": STREAM,
    "stream_options.include_obfuscation": STREAM,
    "stream_options.continuous_usage_stats": USAGE,
}
"""Fields that a field means nothing without: they are there in both requests that are compared."""

DOING = {"response_format", "structured_outputs", "best_of"}
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


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    shared_edge.text.script = full_script
    return shared_edge


def with_field(base: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return base | {outer: base.get(outer, {}) | {inner: value} if inner else value}


def ask(edge: Edge, path: str, body: dict[str, Any]) -> tuple[list[Any], str, str]:
    """What text was told, the reply, and what is kept of it; all without what differs from one request to the next."""
    before = len(edge.text.received)
    reply = edge.kept.post(path, json=body)
    assert (reply.status_code, reply.headers.get("x-penstock-warning")) == (200, None), reply.text
    told = [msgspec.structs.asdict(message) for message in edge.text.received[before:] if isinstance(message, Submit)]
    for one in told:
        for name in ("key", "received_ns", "sent_ns", "to_wall_ns", "traceparent"):
            del one[name]
        if re.fullmatch("[0-9a-f]{32}", one["rid"]):
            del one["rid"]
        one["prompt_ids"] = None if one["prompt_ids"] is None else one["prompt_ids"].tolist()
    id = re.search(r'"id":"(chatcmpl-[^"]*)"', reply.text)
    kept = edge.kept.get(f"/v1/chat/completions/{id.group(1)}").json().get("metadata", "nothing") if id else "nothing"
    return told, re.sub(r'"(id|created)":("[^"]*"|\d+)', "", reply.text), str(kept)


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
    own = CHAT if kind is ChatRequest else COMPLETION
    body = body | {field: own.get(field, value) for field, value in BESIDE.get(name, {}).items()}
    status = status_of(kind, name)
    if status.word == "refused":
        refuse(edge, path, with_field(body, name, {"x": 1}), name)
        return
    without, given = ask(edge, path, body), ask(edge, path, with_field(body, name, own.get(name, EXAMPLES[name])))
    if status.word == "works" or name in DOING:
        assert given != without
    else:
        assert given == without
    if status.word == "in part":
        fields, param = REFUSED_VALUES[name]
        refuse(edge, path, body | fields, param)


def test_whatever_is_no_simple_yes_says_why() -> None:
    for kind in ENDPOINTS:
        for name in NAMED:
            status = status_of(kind, name)
            assert (status.word == "works") == (not status.why), name


def test_no_row_is_left_over() -> None:
    known = {name for kind in ENDPOINTS for name in kind.__struct_fields__}
    assert known <= NAMED.keys()
    assert {name.partition(".")[0] for name in (*IN_PART, *NO_EFFECT)} <= known
    assert EXAMPLES.keys() <= NAMED.keys()
