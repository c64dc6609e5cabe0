"""The OpenAPI document and a whole server agree about which bodies are well made."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
CLAUDE = {"model": "brook", "max_tokens": 3, **HI}
ALLOWED: list[tuple[str, dict[str, Any]]] = [
    (CHATS, HI | {"max_tokens": 2}),
    (
        CHATS,
        HI | {"max_tokens": 2, "n": 2, "seed": -(2**63), "stop": ["a" * 4096], "top_p": 1, "temperature": None, "logit_bias": {"0": -100}},
    ),
    (CHATS, {"messages": [{"role": "assistant", "content": None, "refusal": "no"}, *HI["messages"]], "max_tokens": 2}),
    (TEXTS, {"prompt": "a"}),
    (TEXTS, {"prompt": [0, 4095], "allowed_token_ids": [0], "stop_token_ids": []}),
    (TEXTS, {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 0}),
    (TEXTS, {"prompt": [[1], [2]], "truncate_prompt_tokens": -1}),
    ("/tokenize", {"prompt": ""}),
    ("/tokenize", HI | {"prompt": None}),
    ("/detokenize", {"tokens": [0, 5]}),
    ("/detokenize", {"tokens": []}),
    ("/v1/messages", CLAUDE | {"stop_sequences": ["a"], "top_k": -1}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, "temperature": 0.5}}),
]
TOO_MUCH: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"messages": []}),
    (CHATS, {"messages": [{"role": "user"}]}),
    (CHATS, {"messages": [{"role": "user", "content": None}]}),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "smell"}]}]}),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (CHATS, {"messages": HI["messages"] * 8193}),
    *((CHATS, HI | more) for more in ({"n": 0}, {"n": 65}, {"temperature": -0.1}, {"temperature": 1001}, {"top_p": 0}, {"top_p": 1.1})),
    *((CHATS, HI | more) for more in ({"top_k": -2}, {"min_p": 2}, {"frequency_penalty": 3}, {"repetition_penalty": 0}, {"seed": 2**63})),
    *((CHATS, HI | more) for more in ({"max_tokens": 0}, {"max_completion_tokens": 2**31}, {"priority": 2**31}, {"min_tokens": -1})),
    *((CHATS, HI | more) for more in ({"stop": ""}, {"stop": ["a"] * 17}, {"stop": ["a", ""]}, {"bad_words": [" "]})),
    *((CHATS, HI | more) for more in ({"logit_bias": {"-1": 1}}, {"logit_bias": {"1": 101}}, {"allowed_token_ids": []})),
    *((CHATS, HI | more) for more in ({"stop_token_ids": [-1]}, {"stop_token_ids": [1] * 257}, {"truncate_prompt_tokens": 0})),
    *(
        (CHATS, HI | more)
        for more in ({"guided_choice": []}, {"structured_outputs": {"choice": []}}, {"response_format": {"type": "poem"}})
    ),
    *(
        (TEXTS, more)
        for more in ({"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": [[1, 2**31]]}, {"prompt": ["a", ""]})
    ),
    *((TEXTS, {"prompt": "a"} | more) for more in ({"max_tokens": 0}, {"max_tokens": -1}, {"logprobs": 21}, {"best_of": 0})),
    *(("/tokenize", more) for more in ({}, {"prompt": None}, {"messages": []}, HI | {"prompt": "a"})),
    *(("/detokenize", {"tokens": more}) for more in ([-1], [2**31])),
    *(("/v1/messages", CLAUDE | more) for more in ({"max_tokens": 0}, {"messages": []}, {"top_p": 0}, {"stop_sequences": [""]}, {"zz": 1})),
    *(
        ("/generate", more)
        for more in ({"inputs": ""}, {"inputs": "a", "parameters": {"temperature": 0}}, {"inputs": "a", "parameters": {"top_k": 0}})
    ),
]


@pytest.fixture(scope="module")
def document(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/schema/openapi.json").json()
    return found


def allows(document: dict[str, Any], path: str, body: dict[str, Any]) -> bool:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return bool(jsonschema_rs.is_valid({**schema, "components": document["components"]}, body))


@pytest.mark.parametrize(("path", "body"), ALLOWED, ids=lambda one: str(one)[:60])
def test_what_the_document_allows_is_taken(server: Any, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    assert allows(document, path, body)
    reply = server.client.post(path, json=body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("path", "body"), TOO_MUCH, ids=lambda one: str(one)[:60])
def test_what_a_field_makes_wrong_is_wrong_by_the_document_too(
    server: Any, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    reply = server.client.post(path, json=body)
    assert reply.status_code == (422 if path == "/generate" else 400), reply.text
    assert not allows(document, path, body)
