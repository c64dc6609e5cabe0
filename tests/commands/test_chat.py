"""`penstock chat` against a scripted server: streams, keeps the conversation, shows the server's own errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.plugins.commands.chat import chat


class Script(BaseHTTPRequestHandler):
    """Answers each chat with its pieces; keeps what was asked."""

    asked: list[dict[str, Any]]
    pieces: list[str]
    status: int
    whole: bool

    def do_GET(self) -> None:
        self._say(200, json.dumps({"data": [{"id": "demo"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.status != 200:
            self._say(self.status, json.dumps({"error": {"message": "too busy", "type": "x", "code": "y"}}).encode(), "application/json")
            return
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in self.pieces]
        body = b": keep-alive\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        self._say(200, body + (b"data: [DONE]\n\n" if self.whole else b""), "text/event-stream")

    def _say(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Script]]]:
    handler = type("Handler", (Script,), {"asked": [], "pieces": ["Hal", "lo 🎉"], "status": 200, "whole": True})
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listener.server_address[1]}", handler
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_one_question_one_answer(server: tuple[str, type[Script]]) -> None:
    url, handler = server
    result = CliRunner().invoke(chat, ["Hi there", "--url", url + "/v1", "--system", "Be brief.", "--temperature", "0"])
    assert result.exit_code == 0, result.output
    assert result.output == "Hallo 🎉\n"
    (body,) = handler.asked
    assert body["model"] == "demo"
    assert body["stream"] is True
    assert body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["system", "user"]


def test_a_conversation_is_kept_until_new(server: tuple[str, type[Script]]) -> None:
    url, handler = server
    result = CliRunner().invoke(chat, ["--url", url], input="one\ntwo\n/new\nthree\n/exit\n")
    assert result.exit_code == 0, result.output
    assert [len(body["messages"]) for body in handler.asked] == [1, 3, 1]
    assert handler.asked[1]["messages"][1] == {"role": "assistant", "content": "Hallo 🎉"}


def test_the_servers_error_is_shown_and_nothing_is_kept(server: tuple[str, type[Script]]) -> None:
    url, handler = server
    handler.status = 503
    result = CliRunner().invoke(chat, ["Hi", "--url", url])
    assert result.exit_code == 1
    assert "too busy (status 503)" in result.output
    talk = CliRunner().invoke(chat, ["--url", url], input="one\ntwo\n")
    assert talk.exit_code == 0
    assert [len(body["messages"]) for body in handler.asked] == [1, 1, 1]


def test_a_stream_without_its_end_mark_is_said_to_be_incomplete(server: tuple[str, type[Script]]) -> None:
    url, handler = server
    handler.whole = False
    result = CliRunner().invoke(chat, ["Hi", "--url", url])
    assert result.exit_code == 1
    assert "incomplete" in result.output


def test_no_server_is_one_clear_line() -> None:
    result = CliRunner().invoke(chat, ["Hi", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "penstock serve" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [["--url", "http://a\udcff"], ["--model", "a\udcff"], ["--api-key", "a\udcff", "--model", "m"]])
def test_what_cannot_be_asked_is_one_clear_line(words: list[str]) -> None:
    result = CliRunner().invoke(chat, ["Hi", "--url", "http://127.0.0.1:9", *words])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert "cannot be asked" in result.output
