"""The asyncio link (handshake, lanes, bounds, reconnection) and the gateway's keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from penstock.core.protocol import config as configuration
from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Cancel, EdgeStats, Hello, Message, Query, Submit, TextReady, Unpark, union_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.frames import encode, make_hello
from penstock.core.runtime.links import Link as TrioLink
from penstock.transports.gateway import COUNT_BITS, EDGE_BITS, NONCE_BITS, EdgeKeys, Gateway
from penstock.transports.link import Dialer, Link, LinkBusy, adopt


def submit(key: int, size: int = 0) -> Submit:
    return Submit(key=key, edge=0, rid="r", kind="completion", model="m", sampling=SamplingParams(), prompt="x" * size)


class Ends:
    """Two links over a socketpair: `edge` and `text`; what they hear is in `heard` by role."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Message]] = {"edge": [], "text": []}
        self.closed: dict[str, str] = {}
        self.news = asyncio.Event()

    async def open(self, *, text_hello: Hello | None = None) -> Ends:
        a, b = socket.socketpair()
        self.edge = await self._end(a, "text>edge", "edge", make_hello("edge", 0, 1))
        self.text = await self._end(b, "edge>text", "text", text_hello or make_hello("text", 0, 1))
        return self

    async def _end(self, sock: socket.socket, reads: Any, role: str, greeting: Hello) -> Link:
        def hear(message: Message) -> None:
            self.heard[role].append(message)
            self.news.set()

        def close(reason: str) -> None:
            self.closed[role] = reason
            self.news.set()

        return await adopt(sock, union_of(reads), greeting, on_open=hear, on_message=hear, on_close=close)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.news.clear()
                await self.news.wait()


def on_loop(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    asyncio.run(run())


def test_hello_then_messages() -> None:
    async def main() -> None:
        ends = await Ends().open()
        await ends.until(lambda: ends.edge.open and ends.text.open)
        assert ends.edge.peer is not None
        assert ends.edge.peer.role == "text"
        ends.edge.send(Cancel(key=5))
        ends.text.send(TextReady(ready=True))
        await ends.until(lambda: len(ends.heard["edge"]) == 2 and len(ends.heard["text"]) == 2)
        assert ends.heard["text"][1] == Cancel(key=5)
        assert ends.heard["edge"][1] == TextReady(ready=True)
        ends.edge.close()
        await ends.until(lambda: len(ends.closed) == 2)
        assert not ends.edge.open
        ends.edge.send(Cancel(key=6))  # falls to the ground
        assert ends.closed["text"] == "closed by the other side"

    on_loop(main)


@pytest.mark.parametrize("change", [{"protocol_level": 99}, {"schema_fingerprint": "another build"}])
def test_another_build_is_refused(change: dict[str, Any]) -> None:
    async def main() -> None:
        right = make_hello("text", 0, 1)
        wrong = Hello(**{name: getattr(right, name) for name in right.__struct_fields__} | change)
        ends = await Ends().open(text_hello=wrong)
        await ends.until(lambda: "edge" in ends.closed)
        assert "one version" in ends.closed["edge"]
        assert ends.heard["edge"] == []

    on_loop(main)


def test_a_peer_of_another_role_is_refused() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        closed = asyncio.get_running_loop().create_future()
        hello = make_hello("edge", 0, 1)
        await adopt(
            a, union_of("text>edge"), hello, on_open=pytest.fail, on_message=pytest.fail, on_close=closed.set_result, peers=("text",)
        )
        with b:
            b.sendall(encode(make_hello("grammar", 0, 1)))
            assert "role 'grammar' spoke on a link for text" in await closed

    on_loop(main)


def test_garbage_closes_the_link() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        closed: list[str] = []
        gone = asyncio.Event()

        def close(reason: str) -> None:
            closed.append(reason)
            gone.set()

        heard: list[Message] = []
        await adopt(a, union_of("text>edge"), make_hello("edge", 0, 1), on_open=heard.append, on_message=heard.append, on_close=close)
        with b:
            b.sendall(encode(make_hello("text", 0, 1)))
            async with asyncio.timeout(10):
                while not heard:
                    await asyncio.sleep(0.001)
                b.sendall(b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1")
                await gone.wait()
        assert "cannot be decoded" in closed[0]
        assert [type(m) for m in heard] == [Hello]

    on_loop(main)


def test_control_overtakes_data_but_not_its_own_submit() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        nothing: Any = lambda _: None  # noqa: E731
        link = await adopt(a, union_of("text>edge"), make_hello("edge", 0, 1), on_open=nothing, on_message=nothing, on_close=nothing)
        link.pause_writing()
        link.send(submit(1))
        link.send(submit(2))
        link.send(Unpark(key=7))
        link.send(Cancel(key=2))
        link.resume_writing()
        text = Ends()
        await text._end(b, "edge>text", "text", make_hello("text", 0, 1))
        await text.until(lambda: len(text.heard["text"]) == 5)
        assert [(type(m).__name__, getattr(m, "key", None)) for m in text.heard["text"][1:]] == [
            ("Unpark", 7),
            ("Submit", 1),
            ("Submit", 2),
            ("Cancel", 2),
        ]
        link.close()
        await text.until(lambda: bool(text.closed))

    on_loop(main)


def test_the_queue_is_bounded_but_control_still_goes() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        nothing: Any = lambda _: None  # noqa: E731
        link = Link(
            union_of("text>edge"), make_hello("edge", 0, 1), on_open=nothing, on_message=nothing, on_close=nothing, max_queued=10_000
        )
        a.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=a)
        link.pause_writing()
        with b:
            for key in range(3):
                link.send(submit(key, 4000))
            with pytest.raises(LinkBusy):
                link.send(submit(9, 4000))
            link.send(Cancel(key=1))
            link.close()
            await asyncio.sleep(0)

    on_loop(main)


def test_reconnects_with_backoff_and_greets_anew(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "text-0.sock")
        log: list[str] = []
        news = asyncio.Event()

        def note(what: str) -> Callable[[Any], None]:
            def take(_: Any) -> None:
                log.append(what)
                news.set()

            return take

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(log) < count:
                    news.clear()
                    await news.wait()

        dialer = Dialer(
            path, union_of("text>edge"), make_hello("edge", 3, 1), on_open=note("open"), on_message=note("message"), on_close=note("close")
        )
        dialer.start()
        ends = Ends()

        def accept() -> Link:
            ends.text = Link(
                union_of("edge>text"),
                make_hello("text", 0, 1),
                on_open=ends.heard["text"].append,
                on_message=ends.heard["text"].append,
                on_close=lambda _: None,
            )
            return ends.text

        for life in (1, 2):  # the socket appears only after the first attempts, goes, and comes back
            server = await asyncio.get_running_loop().create_unix_server(accept, path)
            await until(3 * life - 2)
            ends.text.send(TextReady(ready=True))
            await until(3 * life - 1)
            assert dialer.link is not None
            server.close()
            ends.text.close()
            await until(3 * life)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        assert log == ["open", "message", "close"] * 2
        assert [m.id for m in ends.heard["text"] if isinstance(m, Hello)] == [3, 3]
        await dialer.stop()

    on_loop(main)


def test_speaks_with_the_trio_link(tmp_path: Path) -> None:
    """The text process is on trio: the two adapters of one codec understand each other."""
    a, b = socket.socketpair()
    heard: list[Message] = []

    async def text() -> None:
        b.setblocking(False)
        link = TrioLink(trio.SocketStream(trio.socket.from_stdlib_socket(b)), union_of("edge>text"), make_hello("text", 0, 1))
        await link.greet()
        link.send(TextReady(ready=True, reason="so"))
        await link.run(heard.extend)

    async def edge() -> None:
        got: list[Message] = []
        news = asyncio.Event()

        def hear(message: Message) -> None:
            got.append(message)
            news.set()

        link = await adopt(a, union_of("text>edge"), make_hello("edge", 0, 1), on_open=got.append, on_message=hear, on_close=lambda _: None)
        async with asyncio.timeout(10):
            await news.wait()
        assert got[1] == TextReady(ready=True, reason="so")
        link.send(submit(4, 300_000))
        link.send(EdgeStats(edge=0, counters={"a": 1.0}))
        link._transport.close()  # type: ignore[union-attr]  # an orderly end: what was sent arrives
        while link._transport is not None:
            await asyncio.sleep(0.001)

    import threading

    thread = threading.Thread(target=lambda: trio.run(text))
    thread.start()
    asyncio.run(edge())
    thread.join(10)
    assert [type(m).__name__ for m in heard] == ["Submit", "EdgeStats"]
    assert heard[0] == submit(4, 300_000)


# ------------------------------------------------------------------ keys and queries


def test_keys_are_unique_over_edges_lives_and_counts() -> None:
    assert EDGE_BITS + NONCE_BITS + COUNT_BITS == 56
    keys = [EdgeKeys(edge, nonce) for edge in (0, 1, 255) for nonce in (0, 1, 2**NONCE_BITS - 1)]
    seen = [k() for _ in range(100) for k in keys]
    assert len(set(seen)) == len(seen)
    assert all(0 < key < 2**56 for key in seen)
    assert EdgeKeys(0)() >> COUNT_BITS != EdgeKeys(0)() >> COUNT_BITS  # a restart takes another nonce


def test_keys_whose_count_is_used_up_take_another_nonce() -> None:
    keys = EdgeKeys(1, 7)
    keys._count = 2**COUNT_BITS - 2
    last, first = keys(), keys()
    assert last >> COUNT_BITS == (1 << NONCE_BITS) + 7
    assert first >> COUNT_BITS != last >> COUNT_BITS
    assert first >> (NONCE_BITS + COUNT_BITS) == 1


def test_a_query_that_is_not_answered_in_time() -> None:
    class Deaf:
        open = True
        sent: list[Message] = []  # noqa: RUF012

        def send(self, message: Message) -> None:
            self.sent.append(message)

    async def main() -> None:
        gateway = Gateway(configuration.build(), 0)
        deaf = Deaf()
        gateway.door().attach(lambda: deaf)  # type: ignore[arg-type, return-value]
        with pytest.raises(PenstockError) as caught:
            await gateway.query("models", timeout=0.01)
        assert caught.value.status == 503
        assert isinstance(deaf.sent[0], Query)
        assert gateway.door()._queries == {}

    on_loop(main)
