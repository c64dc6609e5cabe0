"""--root-path: the server below a path of a reverse proxy, whether the proxy passes that path on or cuts it off; and the HTTP log level."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from edge_kit import MakeEdge

CHAT = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"authorization": "Bearer k"}


@pytest.mark.parametrize("given", ["/api/llm", "/api/llm/"])
@pytest.mark.parametrize("prefix", ["/api/llm", ""])
def test_every_route_is_there_with_and_without_the_path(make_edge: MakeEdge, given: str, prefix: str) -> None:
    http = make_edge(root_path=given).kept
    assert http.get(f"{prefix}/health").status_code == 200
    assert http.get(f"{prefix}/v1/models").json()["data"][0]["id"] == "brook"
    answer = http.post(f"{prefix}/v1/chat/completions", json=CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "Hello world"
    assert http.head(f"{prefix}/v1/models").status_code == 200
    refused = http.get(f"{prefix}/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "OPTIONS, POST")
    assert http.get(f"{prefix}/nothing").status_code == 404
    document = http.get(f"{prefix}/schema/openapi.json").json()
    assert document["servers"] == [{"url": "/api/llm"}]
    assert "/v1/chat/completions" in document["paths"]
    assert 'href="/api/llm/schema/openapi.json"' in http.get(f"{prefix}/schema").text


def test_only_the_whole_path_counts(make_edge: MakeEdge) -> None:
    http = make_edge(root_path="/api").kept
    for path in ("/apix/health", "/api/api/health", "/API/health", "/x/api/health"):
        assert http.get(path).status_code == 404
    assert http.get("/api").status_code == http.get("/").status_code


def test_the_same_paths_are_protected(make_edge: MakeEdge) -> None:
    http = make_edge(root_path="/health", api_key=["k"]).kept
    assert http.get("/health/health").status_code == 200
    assert http.get("/health/v1/models").status_code == 401
    assert http.get("/v1/models").status_code == 401
    assert http.get("/health/v1/models", headers=KEY).status_code == 200


def test_counts_are_by_route(make_edge: MakeEdge) -> None:
    edge = make_edge(root_path="/api")
    edge.kept.get("/api/v1/models")
    edge.kept.get("/v1/models")
    assert [v for k, v in edge.counters().items() if k.startswith("http_requests_total") and 'handler="/v1/models"' in k] == [2]


def test_without_it_nothing_changes(make_edge: MakeEdge) -> None:
    http = make_edge().kept
    assert http.get("/schema/openapi.json").json()["servers"] == [{"url": "/"}]
    assert 'href="/schema/openapi.json"' in http.get("/schema").text


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    found = [logging.getLogger(name) for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi")]
    levels = [logger.level for logger in found]
    yield found
    for logger, level in zip(found, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(("given", "level"), [("critical", 50), ("debug", 10), ("trace", 5)])
def test_the_http_servers_log_level(make_edge: MakeEdge, loggers: list[logging.Logger], given: str, level: int) -> None:
    make_edge(uvicorn_log_level=given)
    assert [logger.level for logger in loggers] == [level] * 3
