"""`x-penstock-trace-chunks`: a stream that says when each write left, and the same stream without it."""

from __future__ import annotations

import re

import httpx
import pytest
from edge_kit import Edge, MakeEdge, events

BODY = {"model": "brook", "messages": [{"role": "user", "content": "hi"}], "stream": True}
ON = {"x-penstock-trace-chunks": "1"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", BODY),
        ("/v1/completions", {"prompt": "hi", "stream": True}),
        ("/v1/messages", BODY | {"max_tokens": 8}),
        ("/v1/responses", {"input": "hi", "stream": True}),
    ],
)
def test_stamps_come_before_what_was_written_and_change_nothing_else(shared_edge: Edge, path: str, body: dict[str, object]) -> None:
    rid = {"x-request-id": "stamped"}
    with shared_edge.http() as http:
        plain = http.post(path, json=body, headers=rid)
        stamped = http.post(path, json=body, headers=ON | rid)
    stamps = re.findall(r"^: sent (\d+\.\d{6})\n\n", stamped.text, re.M)
    assert stamped.text.startswith(": sent ")
    assert [float(stamp) for stamp in stamps] == sorted(map(float, stamps))
    without = re.sub(r"^: sent [\d.]+\n\n", "", stamped.text, flags=re.M)
    other = re.compile(r'"(created|created_at|completed_at)":[\d.]+|"(resp|msg)_[0-9a-f_]+"')
    assert other.sub("", without) == other.sub("", plain.text)
    assert (stamped.headers["x-penstock-trace-chunks"], plain.headers.get("x-penstock-trace-chunks")) == ("HTTP/1.1", None)


def test_lines_and_whole_replies_have_none(shared_edge: Edge) -> None:
    with shared_edge.http() as http:
        lines = http.post("/v1/chat/completions", json=BODY, headers=ON | {"accept": "application/x-ndjson"})
        whole = http.post("/v1/chat/completions", json=BODY | {"stream": False}, headers=ON)
        off = http.post("/v1/chat/completions", json=BODY, headers={"x-penstock-trace-chunks": "0"})
    for reply in (lines, whole, off):
        assert "sent" not in reply.text
        assert "x-penstock-trace-chunks" not in reply.headers


def test_a_kept_stream_has_its_numbers(make_edge: MakeEdge) -> None:
    edge = make_edge()
    with edge.http() as http:
        reply: httpx.Response = http.post("/v1/chat/completions", json=BODY | {"retain_s": 5}, headers=ON)
    numbers = [int(number) for number in re.findall(r"^id: (\d+)\n", reply.text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 3
    assert events(re.sub(r"^id: \d+\n|^: sent [\d.]+\n\n", "", reply.text, flags=re.M))[-1] == "[DONE]"
