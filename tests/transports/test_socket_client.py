"""penstock.client against an edge: payloads, steering, and connections that break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent
from socket_kit import dial
from test_retained import Stream, stream  # noqa: F401
from websockets.exceptions import InvalidHandshake

from penstock.client import Client, StreamError
from penstock.core.protocol.messages import Attach, Submit

CHATS = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


def run(edge: Edge, story: Callable[[Client], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def inside() -> Any:
        async with asyncio.timeout(20), Client(edge.url, proxy=None, **options) as client:
            return await story(client)

    return asyncio.run(inside())


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def break_all(edge: Edge) -> None:
    sockets = [one for one in edge.server._state.connections if "Socket" in type(one).__name__]
    edge.text.call(lambda: [one.transport.abort() for one in sockets])


def test_streams_side_by_side(edge: Edge) -> None:
    async def story(client: Client) -> list[str]:
        async def one() -> str:
            return text_of([chunk async for chunk in await client.start(CHATS, HI)])

        return await asyncio.gather(*(one() for _ in range(20)))

    assert run(edge, story) == ["Hello world"] * 20


def test_errors(edge: Edge) -> None:
    async def story(client: Client) -> None:
        with pytest.raises(StreamError) as wrong:
            [chunk async for chunk in await client.start(CHATS, {"messages": []})]
        assert (wrong.value.status, wrong.value.error["param"]) == (400, "messages")
        running = await client.start(CHATS, HI)
        with pytest.raises(StreamError) as wrong:
            await running.pause()
        assert wrong.value.code == "not_found"
        await running.cancel()
        with pytest.raises(StreamError) as wrong:
            [chunk async for chunk in running]
        assert wrong.value.code == "cancelled"
        await running.stop()  # it has ended

    edge.text.script = silent
    run(edge, story)


def test_a_kept_stream_goes_on_where_the_connection_broke(edge: Edge, stream: Stream) -> None:  # noqa: F811
    edge.text.script = silent

    async def story(client: Client) -> tuple[str, str]:
        kept = await client.start(CHATS, HI | {"retain_s": 30})
        lost = await client.start(CHATS, HI)
        submits = await asyncio.to_thread(edge.text.wait_for, Submit, 2)
        key = next(submit.key for submit in submits if submit.retain_s)
        await asyncio.to_thread(edge.text.send, delta({"key": key, "text": "Hello", "tokens": [10]}))
        got = [await anext(kept), await anext(kept)]
        mine = submits[0] if submits[0].retain_s else submits[1]
        edge.text.received.remove(mine)
        edge.text.received.append(mine)  # the fixture plays the last one again
        await asyncio.to_thread(break_all, edge)
        with pytest.raises(ConnectionError):
            await anext(lost)
        got += [chunk async for chunk in kept]
        assert kept.stream_id == mine.rid
        again = [chunk async for chunk in await client.attach(kept.stream_id)]
        assert got == again
        return text_of(got), text_of(again)

    assert run(edge, story) == ("Hello world", "Hello world")
    assert len(edge.text.wait_for(Submit)) == 2
    assert edge.text.wait_for(Attach, 2)


def test_a_start_that_was_lost_is_said_again(edge: Edge, stream: Stream) -> None:  # noqa: F811
    async def story(client: Client) -> str:
        say = client._say

        async def lose(message: dict[str, Any]) -> None:
            client._say = say  # type: ignore[method-assign]
            await asyncio.to_thread(break_all, edge)

        client._say = lose  # type: ignore[method-assign]
        return text_of([chunk async for chunk in await client.start(CHATS, HI | {"retain_s": 30})])

    assert run(edge, story) == "Hello world"


def test_a_server_that_is_gone_is_an_error(make_edge: MakeEdge) -> None:
    edge = make_edge()
    edge.text.script = silent

    async def story(client: Client) -> None:
        kept = await client.start(CHATS, HI | {"retain_s": 30})
        await asyncio.to_thread(edge.text.wait_for, Submit)
        client._url = "ws://127.0.0.1:9/"
        await asyncio.to_thread(break_all, edge)
        with pytest.raises(ConnectionError):
            await anext(kept)
        with pytest.raises(ConnectionError):
            await client.start(CHATS, HI)

    run(edge, story, attempts=2)


def test_the_page_s_examples(edge: Edge) -> None:
    """The client's code runs, and the messages shown are those that come."""
    page = (DOCS / "streams.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "penstock.client" in code]
    names: dict[str, Any] = {"print": lambda *words, **_: said.append(str(words[0]))}
    said: list[str] = []
    exec(compile(code.replace("http://127.0.0.1:8000", edge.url), "streams.md", "exec"), names)
    assert "".join(said) == "Hello world"
    (shown,) = [shown for shown in re.findall(r"```json\n(.*?)```", page, re.S) if shown.startswith("> ")]
    # The same messages over a bare connection.

    edge.text.script = silent
    edge.text.answers["control"] = lambda _: (200, b"{}")
    sent = [line[2:] for line in shown.splitlines() if line.startswith("> ")]
    expected = [json.loads(line[2:]) for line in shown.splitlines() if line.startswith("< ")]
    with dial(edge) as ws:
        heard = []
        for message in sent:
            ws.send(message)
            heard.append(json.loads(ws.recv(timeout=10)))
        key = edge.text.wait_for(Submit, len(edge.text.wait_for(Submit)))[-1].key
        edge.text.send(
            delta({"key": key, "text": "Hel", "tokens": [10]}),
            delta({"key": key, "text": "lo", "tokens": [11], "reason": "stop"}),
            finished(key),
        )
        while "done" not in heard[-1]:
            heard.append(json.loads(ws.recv(timeout=10)))
    assert [set(message) for message in heard] == [set(message) for message in expected]
    assert [message.get("seq") for message in heard] == [message.get("seq") for message in expected]


def test_cut_at_any_byte_a_kept_stream_says_everything_once(edge: Edge) -> None:
    """A proxy between them cuts each connection after so many bytes of the server's; text keeps the rows, as it does."""
    words = [f"w{number} " for number in range(60)]
    kept = Stream(edge)
    edge.text.script = silent
    own = edge.text._on_message

    def rows(key: int) -> list[Any]:
        return [delta({"key": key, "text": word}) for word in words] + [delta({"key": key, "reason": "stop", "tokens": []}), finished(key)]

    def on_message(link: Any, message: Any) -> None:
        own(link, message)
        if isinstance(message, (Submit, Attach)):
            key = message.key if isinstance(message, Submit) else message.keys[0]
            for row in rows(key):
                link.send(row)

    edge.text._on_message = on_message  # type: ignore[method-assign]
    chance = random.Random(7)
    cuts = 0

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cuts
        inner, outer = await asyncio.open_connection("127.0.0.1", edge.port)
        left = chance.randrange(1, 1500)

        async def up() -> None:
            while data := await reader.read(4096):
                outer.write(data)

        sending = asyncio.ensure_future(up())
        while left and (data := await inner.read(min(left, 100))):
            left -= len(data)
            writer.write(data)
        cuts += not left
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        for one in (writer, outer):
            one.close()
            await asyncio.gather(one.wait_closed(), return_exceptions=True)

    async def story() -> str:
        server = await asyncio.start_server(through, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, asyncio.timeout(60):
            for _ in range(100):  # the first handshake may be cut, too, of which its caller is told
                with contextlib.suppress(InvalidHandshake):
                    async with Client(url, proxy=None, attempts=100) as client:
                        return text_of([chunk async for chunk in await client.start(CHATS, HI | {"retain_s": 30})])
        raise AssertionError("no handshake came through")

    assert asyncio.run(story()) == "".join(words)
    assert len(kept.submits) == 1
    assert cuts > 10
