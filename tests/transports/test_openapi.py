"""The OpenAPI document against the server: what it says is what comes, and nothing else comes."""

from __future__ import annotations

import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from edge_kit import Edge, events
from hypothesis import HealthCheck, Phase, given, seed, settings

from penstock.transports import openapi_replies as replies
from penstock.transports.http import PUBLIC

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi_checks

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
EXAMPLES = 40
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {})
    one.text.answers["tokenize"] = lambda _: (200, b'{"count":1,"max_model_len":64,"tokens":[1],"token_strs":null}')
    one.text.answers["detokenize"] = lambda _: (200, b'{"prompt":"x"}')
    one.start()
    yield one
    one.stop()


def document(edge: Edge) -> dict[str, Any]:
    with edge.http() as http:
        found: dict[str, Any] = http.get("/schema/openapi.json").json()
    return found


def test_every_operation_tells_its_replies(edge: Edge) -> None:
    found = document(edge)
    assert found["paths"].keys() == replies.REPLIES.keys()
    for path, item in found["paths"].items():
        for method, operation in item.items():
            assert operation["responses"].keys() >= {"400", "408", "431"}, path
            assert ("405" in operation["responses"]) is (method != "options"), path
            for status, answer in operation["responses"].items():
                assert answer["description"]
                silent = method == "head" or status == "204"
                assert bool(answer.get("content")) is not silent, (path, method, status)
                if silent:
                    continue
                if int(status) >= 400 and not path.startswith("/health"):
                    shapes = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in replies.error_bodies(path, int(status))]
                    shape = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
                    assert answer["content"]["application/json"]["schema"] == shape
            assert ("requestBody" in operation) is (
                method == "post" and not path.endswith("/cancel") and path != "/v1/requests/{request_id}"
            )
        assert "options" in item
        assert ("head" in item) is ("get" in item)
    names = [operation["operationId"] for item in found["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert set(found["paths"][CHATS]["post"]["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
        "application/x-ndjson",
    }
    assert set(found["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    for path, names in (("/v1/models", ("ModelList", "MessageModelList")), ("/v1/models/{model_id}", ("Model", "MessageModel"))):
        schema = found["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert schema == {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
    assert "securitySchemes" not in found["components"]


def test_with_keys_the_document_says_where_they_are_needed(tmp_path: Path) -> None:
    edge = Edge(tmp_path, {"api_key": ["secret"]}).start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{edge.port}", headers={"x-api-key": "secret"}) as http:
            found = http.get("/schema/openapi.json").json()
        assert found["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
        for path, item in found["paths"].items():
            for method, operation in item.items():
                free = path in PUBLIC or method == "options"
                assert operation.get("security", []) == ([] if free else [{"bearer": []}, {"key": []}])
    finally:
        edge.stop()


def test_replies_have_the_documented_shape(edge: Edge) -> None:
    """By structs that forbid what they do not name."""

    def exactly(kind: type[msgspec.Struct], data: Any) -> None:
        known = {kind: set(kind.__struct_fields__)}
        assert set(data) <= known[kind], set(data) - known[kind]
        msgspec.convert(data, kind)

    with edge.http() as http:
        for more in ({}, {"n": 2, "logprobs": True, "return_token_ids": True}):
            body = {"model": "brook", "messages": [{"role": "user", "content": "hi"}], **more}
            whole = http.post(CHATS, json=body, headers={"x-include-metrics": "1"}).json()
            exactly(replies.ChatReply, whole)
            for choice in whole["choices"]:
                exactly(replies.ChatChoice, choice)
            for event in events(http.post(CHATS, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text)[:-1]:
                exactly(replies.ChatChunk, event)
                for choice in event["choices"]:
                    exactly(replies.ChatChunkChoice, choice)
        whole = http.post(TEXTS, json={"model": "brook", "prompt": "a", "logprobs": 1}).json()
        exactly(replies.CompletionReply, whole)
        exactly(replies.TextChoice, whole["choices"][0])
        exactly(replies.ReadyReply, http.get("/health").json())
        exactly(replies.ModelList, http.get("/v1/models").json())
        version = {"anthropic-version": "2023-06-01"}
        page = http.get("/v1/models", headers=version).json()
        exactly(replies.MessageModelList, page)
        exactly(replies.MessageModel, page["data"][0])
        exactly(replies.MessageModel, http.get("/v1/models/brook", headers=version).json())
        exactly(replies.MessageError, http.get("/v1/files", headers=version).json())
        exactly(replies.VersionReply, http.get("/version").json())
        wrong = http.post(TEXTS, json={}).json()
        exactly(replies.ErrorReply, wrong)
        exactly(replies.ErrorFields, wrong["error"])


@pytest.mark.parametrize("path", sorted(replies.REPLIES))
def test_nothing_undocumented_comes(edge: Edge, path: str) -> None:
    """Schemathesis makes requests from the document; each reply must be one of those that it names."""
    schema = schemathesis.openapi.from_dict(document(edge))
    base = f"http://127.0.0.1:{edge.port}"
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path != path:
            continue
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @seed(7)
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def run(case: Any) -> None:
                nonlocal tried
                tried += 1
                reply = case.call(base_url=base)
                streams = "text/event-stream" in str(
                    reply.headers.get("content-type")
                )  # it takes the schema of an event's data for one of the event
                case.validate_response(
                    reply, checks=[check for check in CHECKS if not (streams and check is openapi_checks.response_schema_conformance)]
                )

            try:
                run()
            except Exception as error:
                if "Unsatisfiable" in type(error).__name__:  # there is nothing to get wrong in a GET without parameters
                    continue
                raise
    assert tried


NO_HTTP = {
    "a header without a colon": b"nocolon\r\n\r\n",
    "a control character": b"a: \x01\r\n\r\n",
    "a length in words": b"content-length: abc\r\n\r\n",
    "a negative length": b"content-length: -5\r\n\r\n",
    "two lengths": b"content-length: 1\r\ncontent-length: 2\r\n\r\na",
    "a length and chunks": b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    "an unknown transfer": b"transfer-encoding: foo\r\n\r\n",
    "a bad chunk": b"transfer-encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("what", NO_HTTP)
def test_what_is_no_http_is_documented_too(edge: Edge, what: str) -> None:
    found = document(edge)["paths"]
    for path, method in (
        ("/health", "get"),
        ("/schema/openapi.json", "get"),
        ("/version", "head"),
        ("/tokenize", "options"),
        (TEXTS, "post"),
    ):
        with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as sock:
            sock.sendall(b"%s %s HTTP/1.1\r\nhost: x\r\n%s" % (method.upper().encode(), path.encode(), NO_HTTP[what]))
            reply = b"".join(iter(lambda: sock.recv(4096), b""))
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert msgspec.json.decode(body)["error"]["code"] == "invalid_value"
        assert "400" in found[path][method]["responses"]


def test_a_word_that_is_no_method_is_no_http_and_a_path_that_is_none_has_no_options(edge: Edge) -> None:
    with edge.http() as http:
        assert http.request("BREW", "/health").status_code == 400
        assert http.request("PROPFIND", "/health").status_code == 405
        assert http.options("/nope").status_code == 404


def test_preflights_are_documented(tmp_path: Path) -> None:
    edge = Edge(tmp_path, {"allowed_origins": ["https://a.example"]}).start()
    try:
        found = document(edge)["paths"]
        with edge.http() as http:
            for path, item in found.items():
                for headers in ({}, {"origin": "https://a.example", "access-control-request-method": "GET"}):
                    reply = http.options(re.sub("{[a-z_]+}", "x", path), headers=headers)
                    assert str(reply.status_code) in item["options"]["responses"]
                    assert reply.status_code == 204
                    assert not reply.content
    finally:
        edge.stop()


def test_other_methods_are_405_without_a_key_too(tmp_path: Path) -> None:
    """Which there are is no secret: OPTIONS tells them. What is there, and where nothing is, needs a key."""
    edge = Edge(tmp_path, {"api_key": ["secret"]}).start()
    try:
        with edge.http() as http:
            for path in sorted(replies.REPLIES):
                real = path.replace("{model_id}", "x").replace("{request_id}", "x")
                allowed = http.options(real).headers["allow"].split(", ")
                for method in ("TRACE", "PROPFIND", "DELETE", "PATCH"):
                    reply = http.request(method, real)
                    if method in allowed:
                        assert reply.status_code == 401
                        continue
                    assert (reply.status_code, reply.headers["allow"].split(", ")) == (405, allowed), (method, path)
                    assert method in reply.text
            assert http.request("TRACE", "/nope").status_code == 401
            assert http.request("TRACE", CHATS, headers={"x-api-key": "secret"}).status_code == 405
    finally:
        edge.stop()


@pytest.mark.parametrize("path", sorted(replies.REPLIES))
@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "TRACE", "GET", "POST"])
def test_other_methods_are_405_with_allow(edge: Edge, path: str, method: str) -> None:
    item = document(edge)["paths"][path]
    with edge.http() as http:
        reply = http.request(method, re.sub("{[a-z_]+}", "x", path))
    if method.lower() in item:
        assert reply.status_code != 405
    else:
        assert reply.status_code == 405
        wrong = reply.json()
        assert (
            wrong["error"]["code"] == "method_not_allowed"
            if path not in replies.OWN_ERRORS
            else msgspec.convert(wrong, replies.OWN_ERRORS[path])
        )
        assert {one.lower() for one in reply.headers["allow"].split(", ")} >= set(item)
