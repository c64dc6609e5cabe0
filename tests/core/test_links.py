"""Links over real stream pairs on trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from penstock.core.protocol import columns
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import Abort, Admit, Cancel, EdgeToText, Message, Park, Submit, TextReady, TextToEdge, Unpark, union_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime import links
from penstock.core.runtime.frames import encode, make_hello
from penstock.core.runtime.links import Link


def submit(key: int, size: int = 10) -> Submit:
    return Submit(key=key, edge=0, rid=str(key), kind="completion", model="m", sampling=SamplingParams(), prompt="x" * size)


class CountingStream(trio.abc.Stream):
    """A stream that counts send_all calls and can be held back."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.sends = 0
        self.gate = trio.Event()
        self.gate.set()

    async def send_all(self, data: Any) -> None:
        self.sends += 1
        await self.gate.wait()
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def pair(**kwargs: Any) -> tuple[Link, Link, CountingStream]:
    left, right = trio.testing.memory_stream_pair()
    counting = CountingStream(left)
    edge = Link(counting, TextToEdge, make_hello("edge", 0, 1), **kwargs)
    text = Link(right, EdgeToText, make_hello("text", 0, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(edge.greet)
        nursery.start_soon(text.greet)
    return edge, text, counting


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0.01))


def test_messages_travel_both_ways_in_order() -> None:
    async def main() -> None:
        edge, text, _ = await pair()
        assert edge.peer is not None
        assert (edge.peer.role, text.peer.role if text.peer else "") == ("text", "edge")
        at_text: list[Message] = []
        at_edge: list[Message] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run, at_edge.extend)
            nursery.start_soon(text.run, at_text.extend)
            for key in range(50):
                edge.send(submit(key))
            text.send(TextReady(ready=True))
            await trio.testing.wait_all_tasks_blocked()
            assert [m.key for m in at_text if isinstance(m, Submit)] == list(range(50))
            assert at_edge == [TextReady(ready=True)]
            edge.close()
            await text.ended.wait()  # the other side sees the end
        assert not edge.open
        edge.send(submit(1))  # dropped, no error

    run(main)


def test_a_peer_of_another_role_is_refused() -> None:
    async def main() -> None:
        here, there = trio.testing.memory_stream_pair()
        link = Link(here, union_of("edge>text"), make_hello("text", 0, 1), peers=("edge",))
        await there.send_all(encode(make_hello("batch", 0, 1)))
        with pytest.raises(ProtocolError, match="role 'batch' spoke on a link for edge"):
            await link.greet()

    run(main)


def test_small_frames_of_one_moment_are_one_send() -> None:
    async def main() -> None:
        edge, text, stream = await pair()
        got: list[Message] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run, lambda _: None)
            nursery.start_soon(text.run, got.extend)
            await trio.testing.wait_all_tasks_blocked()
            before = stream.sends
            for key in range(30):
                edge.send(submit(key))
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == 30
            assert stream.sends == before + 1
            nursery.cancel_scope.cancel()

    run(main)


def test_control_passes_data_that_waits() -> None:
    async def main() -> None:
        edge, text, stream = await pair()
        got: list[Any] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run, lambda _: None)
            nursery.start_soon(text.run, got.extend)
            stream.gate = trio.Event()
            edge.send(submit(1))
            await trio.testing.wait_all_tasks_blocked()  # the writer is in send_all with the first frame
            for key in range(2, 6):
                edge.send(submit(key, size=100_000))
            edge.send(Park(key=1))
            edge.send(Cancel(key=4))
            stream.gate.set()
            await trio.testing.wait_all_tasks_blocked()
            order = [(type(m).__name__, m.key) for m in got]
            assert order.index(("Park", 1)) == 1
            assert order.index(("Cancel", 4)) > order.index(("Submit", 4))
            nursery.cancel_scope.cancel()

    run(main)


def test_a_full_consumer_holds_back_its_peer_and_room_its_producers() -> None:
    async def main() -> None:
        edge, text, stream = await pair()
        got: list[Message] = []
        gate = trio.Event()
        passed = trio.Event()

        async def produce() -> None:
            for key in range(100, 130):
                await edge.room()
                edge.send(submit(key, size=200_000))
            passed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run, lambda _: None)
            nursery.start_soon(text.run, got.extend, gate.wait)
            edge.send(submit(1))
            await trio.testing.wait_all_tasks_blocked()
            edge.send(submit(2))
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == 1  # nothing is read before the consumer has room
            stream.gate = trio.Event()
            nursery.start_soon(produce)
            await trio.testing.wait_all_tasks_blocked()
            assert not passed.is_set()
            assert edge.queued_bytes < links.HIGH_WATER + 300_000
            stream.gate.set()
            gate.set()
            await passed.wait()
            await edge.flush()
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == 32
            nursery.cancel_scope.cancel()

    run(main)


def test_a_peer_that_takes_nothing_loses_the_link() -> None:
    async def main() -> None:
        edge, _, stream = await pair(max_queued=1_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.run, lambda _: None)
            stream.gate = trio.Event()
            for key in range(20):
                edge.send(submit(key, size=100_000))
                await trio.testing.wait_all_tasks_blocked()
            assert edge.ended.is_set()
            assert edge.queued_bytes == 0

    run(main)


def test_malformed_frames_end_the_link_with_a_reason() -> None:
    async def main() -> None:
        left, right = trio.testing.memory_stream_pair()
        link = Link(right, EdgeToText, make_hello("text", 0, 1))
        await left.send_all(encode(make_hello("edge", 0, 1)))
        await link.greet()
        await left.send_all(encode(Abort(seqs=columns.i64([1]))))
        with pytest.raises(ProtocolError, match="cannot be decoded"):
            await link.run(lambda _: None)
        assert link.ended.is_set()

    run(main)


def test_greeting_fails_on_silence_strangers_and_early_ends() -> None:
    async def main() -> None:
        left, right = trio.testing.memory_stream_pair()
        with pytest.raises(ProtocolError, match="did not greet"):
            await Link(right, EdgeToText, make_hello("text", 0, 1)).greet()
        left, right = trio.testing.memory_stream_pair()
        await left.send_all(encode(Unpark(key=1)))
        with pytest.raises(ProtocolError, match="must be Hello"):
            await Link(right, EdgeToText, make_hello("text", 0, 1)).greet()
        left, right = trio.testing.memory_stream_pair()
        await left.aclose()
        with pytest.raises(ProtocolError, match=r"closed|broke"):
            await Link(right, EdgeToText, make_hello("text", 0, 1)).greet()

    run(main)


def test_frames_behind_the_hello_are_not_lost() -> None:
    async def main() -> None:
        left, right = trio.testing.memory_stream_pair()
        link = Link(right, EdgeToText, make_hello("text", 0, 1))
        await left.send_all(encode(make_hello("edge", 0, 1)) + encode(submit(5)))
        await left.send_eof()
        await link.greet()
        got: list[Any] = []
        await link.run(got.extend)
        assert [m.key for m in got] == [5]

    run(main)


def test_admit_type_is_not_for_edges() -> None:
    """The unions keep a message from leaving by the wrong link."""
    assert Admit not in EdgeToText.__args__
