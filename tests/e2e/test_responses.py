"""Responses on a real server with several HTTP processes: whichever is asked, and after a restart, what was kept is there and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Server, Starter

PATH = "/v1/responses"
HI: dict[str, Any] = {"model": "brook", "input": "What is a penstock?", "max_output_tokens": 12, "temperature": 0}
LONG: dict[str, Any] = HI | {"max_output_tokens": 900, "ignore_eos": True, "background": True}


def ask(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """On a connection of its own: any of the HTTP processes may get it."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        return client.request(method, path, json=body)


def named(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("kept", [False, True], ids=["in a private folder", "in a file"])
def test_every_http_process_sees_the_same(starter: Starter, tmp_path: Path, kept: bool) -> None:
    path = tmp_path / "kept.sqlite"
    server = starter("--edge-workers", "3", *(["--store", str(path)] if kept else []))
    said = [ask(server, "POST", PATH, HI).json() for _ in range(6)]
    assert len({one["id"] for one in said}) == 6
    for one in said:
        assert ask(server, "GET", f"{PATH}/{one['id']}").json() == one
        more = ask(server, "POST", PATH, HI | {"previous_response_id": one["id"]}).json()
        assert more["usage"]["input_tokens"] > one["usage"]["input_tokens"]
    cancelled = 0
    for _ in range(8):
        queued = ask(server, "POST", PATH, LONG).json()
        gone = ask(server, "POST", f"{PATH}/{queued['id']}/cancel").json()
        assert gone["status"] in ("cancelled", "incomplete"), "it may have ended before"
        assert ask(server, "GET", f"{PATH}/{queued['id']}").json() == gone
        cancelled += gone["status"] == "cancelled"
    assert cancelled
    with httpx.stream("POST", server.url + PATH, json=LONG | {"stream": True, "max_output_tokens": 200}, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                name = json.loads(line.removeprefix("data: "))["response"]["id"]
                break
    streams = [named(ask(server, "GET", f"{PATH}/{name}?stream=true").text) for _ in range(4)]
    assert all(one == streams[0] for one in streams)
    assert streams[0][-1]["response"] == ask(server, "GET", f"{PATH}/{name}").json()
    assert "".join(event["delta"] for event in streams[0] if event["type"] == "response.output_text.delta")
    assert server.until(lambda: server.metric("penstock_requests") == 0)
    running = ask(server, "POST", PATH, LONG | {"max_output_tokens": None}).json()
    assert server.stop() == 0, server.log.read_text()
    assert b"penstock?" not in server.log.read_bytes(), "no prompt in the log"
    again = starter(*(["--store", str(path)] if kept else []))
    for one in said:
        found = ask(again, "GET", f"{PATH}/{one['id']}")
        assert (found.json() == one) if kept else (found.status_code == 404)
    if kept:
        assert ask(again, "GET", f"{PATH}/{running['id']}").json()["status"] in ("completed", "incomplete", "failed")
