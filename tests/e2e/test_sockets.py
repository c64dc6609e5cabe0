"""WebSockets of a real server: many answers at once are those of HTTP, and a kept stream survives the process that began it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from penstock.client import Client, StreamError

CHATS = "/v1/chat/completions"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "websocket.js"


def ask(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 64, "temperature": 0, "ignore_eos": True, **more}


def piece(chunk: Any) -> str:
    return (chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else ""


def test_many_answers_are_those_of_http(starter: Any) -> None:
    server = starter("--deterministic", "--edge-workers", "2")
    questions = [f"Count from {number} to 20." for number in range(8)]
    alone = [server.client.post(CHATS, json=ask(question)).json()["choices"][0]["message"]["content"] for question in questions]

    async def story() -> None:
        async with asyncio.timeout(100), Client(server.url, proxy=None) as client:

            async def one(question: str) -> str:
                return "".join([piece(chunk) async for chunk in await client.start(CHATS, ask(question, stream=True))])

            assert await asyncio.gather(*(one(question) for question in questions)) == alone

            # An edge dies, perhaps that of this connection: what is kept goes on, and says nothing twice.
            kept = [await client.start(CHATS, ask(question, stream=True, retain_s=60)) for question in questions]
            texts = ["".join([piece(await anext(stream)) for _ in range(3)]) for stream in kept]
            socket = client._ws
            assert socket is not None
            port = socket.local_address[1]
            for edge in server.children()["edge"]:
                if any(link.raddr and link.raddr.port == port for link in psutil.Process(edge.pid).net_connections("tcp")):
                    edge.kill()
            for index, stream in enumerate(kept):
                texts[index] += "".join([piece(chunk) async for chunk in stream])
            assert texts == alone
            assert client._ws is not socket

            running = await client.start(CHATS, ask("Count.", stream=True, max_tokens=2000))
            assert piece(await anext(running)) == ""
            await running.cancel()
            with pytest.raises(StreamError):
                [chunk async for chunk in running]

    asyncio.run(story())
    assert server.until(lambda: server.metric("penstock_sequences", 'state="running"') == 0)
    node = shutil.which("node")
    if node is not None:
        said = subprocess.run(
            [node, "--experimental-websocket", str(EXAMPLE), server.url], capture_output=True, text=True, timeout=60, check=True
        )
        assert "42" in said.stdout
        assert "sky" in said.stdout
    with connect(server.url.replace("http", "ws") + "/v1/stream", subprotocols=["penstock.v1"], proxy=None) as socket:  # type: ignore[list-item]
        assert server.stop() == 0
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
