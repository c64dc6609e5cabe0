"""docs/streams.md runs as it stands: its commands, its programs, and what it shows of a WebSocket, each against a server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from websockets.sync.client import connect

from penstock.core.protocol.config import Config
from penstock.transports.request import error_body
from penstock.transports.stream import cut_error

FLAGS = ["--edge-workers", "2"]
ADDRESS = "127.0.0.1:8000"


class Block(NamedTuple):
    kind: str
    text: str


def blocks() -> list[Block]:
    page = (Path(__file__).resolve().parents[2] / "docs" / "streams.md").read_text(encoding="utf-8")
    found = re.findall(r"(?ms)^( *)```(\w*)\n(.*?)^\1```$", page)
    assert len(found) * 2 == len(re.findall(r"(?m)^ *```", page)), "a block that does not end as it begins"
    return [Block("console" if text.startswith("$ ") else kind, re.sub(rf"(?m)^{indent}", "", text)) for indent, kind, text in found]


BLOCKS = blocks()


def shown(server: Any, text: str) -> str:
    """With the server's own address in place of the page's."""
    assert ADDRESS in text
    return text.replace(ADDRESS, f"127.0.0.1:{server.port}")


def run_shell(server: Any, text: str) -> None:
    for program in ("curl", "jq"):
        if program in text and shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", shown(server, text)], capture_output=True, text=True, timeout=60, check=True)
    assert '"error"' not in done.stdout
    if "jq" in text:
        assert [json.loads(line) for line in done.stdout.splitlines()]
    elif "last-event-id: 7" in text:
        rest = done.stdout[done.stdout.rindex("id: 8\n") :]
        assert "id: 7\n" not in rest
        assert done.stdout.count(rest) == 2, "what the first connection had behind event 7 is what the second one has"
    else:
        assert [json.loads(line) for line in done.stdout.splitlines() if line]


def run_python(server: Any, text: str) -> None:
    done = subprocess.run([sys.executable, "-c", shown(server, text)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def shape(value: Any) -> Any:
    """Names, and the kinds of what they name; members that the page leaves out do not count."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return type(value)


def covers(real: Any, told: Any) -> bool:
    """Is all that the page tells of it so?"""
    if isinstance(told, dict):
        return isinstance(real, dict) and all(name in real and covers(real[name], one) for name, one in told.items())
    if isinstance(told, list):
        return isinstance(real, list) and len(real) == len(told) and all(map(covers, real, told))
    return bool(real == told)


def run_frames(server: Any, text: str) -> None:
    """What `>` says is said; what `<` tells comes, and nothing comes whose kind the page does not tell."""
    says = [json.loads(line[2:]) for line in text.splitlines() if line.startswith("> ")]
    told = [shape(json.loads(line[2:])) for line in text.splitlines() if line.startswith("< ")]
    assert len(says) + len(told) == len(text.splitlines())
    with connect(f"ws://127.0.0.1:{server.port}/v1/stream", subprotocols=["penstock.v1"], proxy=None) as ws:  # type: ignore[list-item]
        heard: list[Any] = []
        for said in says:
            ws.send(json.dumps(said))
            while "op" in said and said["op"] != "start" and not any(one.get("op") == said["op"] for one in heard):
                heard.append(json.loads(ws.recv(timeout=20)))
        while not any("done" in one or ("error" in one and "op" not in one) for one in heard):
            heard.append(json.loads(ws.recv(timeout=20)))
    for one in told:
        assert any(covers(shape(real), one) for real in heard), (one, heard)
    kinds = {tuple(one) for one in told}
    assert {tuple(real) for real in heard} <= kinds


def run_json(server: Any, text: str) -> None:
    if text.startswith("> "):
        run_frames(server, text)
        return
    told = json.loads(text)
    if "error" in told:
        assert told == json.loads(error_body(cut_error("stalled", Config(), kept=False)))
        return
    schema = {
        "type": "object",
        "properties": {
            "people": {
                "type": "array",
                "items": {"type": "object", "properties": {"name": {"const": "Ada"}}, "required": ["name"]},
                "minItems": 1,
                "maxItems": 1,
            }
        },
        "required": ["people"],
        "additionalProperties": False,
    }
    ask = {"messages": [{"role": "user", "content": "Who?"}], "guided_json": schema, "max_tokens": 200, "stream": True}
    reply = server.client.post(
        "/v1/chat/completions", json=ask | {"stream_options": {"events": ["json_value"]}}, headers={"accept": "application/x-ndjson"}
    )
    assert any(covers(json.loads(line), told) for line in reply.text.splitlines()), reply.text


def run_console(server: Any, text: str) -> None:
    """What is typed is run against this server; what it prints begins with the word that is shown: the rest is the machine's own."""
    command, *shown = text.splitlines()
    words = re.sub(r"http://[\w.:]+", server.url, command.removeprefix("$ ")).split()
    assert words[0] == "penstock"
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.split()[:1] == shown[0].split()[:1], done.stdout + done.stderr


RUN = {"sh": run_shell, "python": run_python, "json": run_json, "console": run_console}


def test_the_page_has_them_all() -> None:
    kinds = {block.kind for block in BLOCKS}
    assert {"sh", "python", "json"} <= kinds <= set(RUN), "each block says what it is, and is of a kind that is run"
    assert {ADDRESS in block.text for block in BLOCKS if block.kind in ("sh", "python")} == {True}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.kind}-{block.text.splitlines()[0][:24]}")
def test_it_runs(server: Any, block: Block) -> None:
    RUN[block.kind](server, block.text)


class Cutter(threading.Thread):
    """Between a client and the server: each of the first connections breaks after some bytes of its answer."""

    def __init__(self, port: int, after: list[int]) -> None:
        super().__init__(daemon=True)
        self._upstream = port
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def run(self) -> None:
        with self._listener:
            while True:
                client, _ = self._listener.accept()
                with client, socket.create_connection(("127.0.0.1", self._upstream)) as server:
                    left = self._after.pop(0) if self._after else 1 << 30
                    asked = client.recv(65536)
                    if not asked:  # the test is over
                        return
                    while b"\r\n\r\n" not in asked or (asked.startswith(b"POST") and not asked.endswith(b"}")):
                        asked += client.recv(65536)
                    server.sendall(asked)
                    while left and (data := server.recv(min(left, 65536))):
                        left -= len(data)
                        client.sendall(data)
                        if data.endswith(b"\r\n0\r\n\r\n") or b" 204 " in data[:16]:
                            break


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 60, "stream": True, "ignore_eos": True},
        ),
        ("/v1/messages", {"model": "brook", "messages": [{"role": "user", "content": "Count to 20."}], "max_tokens": 60, "stream": True}),
        ("/generate_stream", {"inputs": "<|user|>Count to 20.<|end|><|assistant|>", "parameters": {"max_new_tokens": 60}}),
    ],
)
def test_the_client_that_misses_nothing_does_not(server: Any, path: str, body: dict[str, Any]) -> None:
    (text,) = [block.text for block in BLOCKS if "def exactly_once" in block.text]
    found: dict[str, Any] = {}
    exec(text[: text.index("\nask = ")], found)
    rid = uuid.uuid4()
    found["uuid"] = SimpleNamespace(uuid4=lambda: rid)
    cutter = Cutter(server.port, [0, 100, 500, 700, 1300, 900, 2000, 450, 1500, 800])
    cutter.start()
    payloads = list(found["exactly_once"](f"127.0.0.1:{cutter.port}", path, body))
    assert not cutter._after, "it was cut each time"
    socket.create_connection(("127.0.0.1", cutter.port)).close()
    cutter.join(10)
    whole = server.client.get(f"/v1/streams/{rid.hex}").text
    assert payloads == [line[5:].strip() for line in whole.splitlines() if line.startswith("data:")]
