"""The machinery's budget per decode step, counted instead of timed.

The design allows on the critical path at most 10 fused messages, 2 task switches (the waiter's wake, the link's writer), 1 columnar encode, and no
plugin call, no log line and nothing per sequence.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import pluggy
import pytest
import trio
import trio.testing

from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.control import Message
from penstock.core.protocol.messages import Admit, StepTokens, TextToEngine
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime import frames
from penstock.core.runtime.frames import make_hello
from penstock.core.runtime.links import Link
from penstock.plugins.policies.fcfs import FirstComeFirstServed

WARM = 5
STEPS = 40


class Switches(trio.abc.Instrument):
    """Counts task steps by task name, but not those of the test itself."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()
        self.ignored: set[Any] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task not in self.ignored:
            self.steps[task.name] += 1

    @property
    def total(self) -> int:
        return self.steps.total()


class Socket(trio.abc.Stream):
    """The engine's end of a link; notes how many task steps had passed when bytes went out."""

    def __init__(self, inner: trio.SocketStream, switches: Switches) -> None:
        self._inner = inner
        self._switches = switches
        self.sent_at: list[int] = []

    async def send_all(self, data: Any) -> None:
        self.sent_at.append(self._switches.total)
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts encodes and hook calls."""
    count: Counter[str] = Counter()
    encode = frames.encode

    def counting(message: Message) -> bytes:
        count[type(message).__name__] += 1
        return encode(message)

    call = pluggy.HookCaller.__call__

    def hook(self: Any, **kwargs: Any) -> Any:
        count["hook"] += 1
        return call(self, **kwargs)

    monkeypatch.setattr(frames, "encode", counting)
    monkeypatch.setattr(pluggy.HookCaller, "__call__", hook)
    return count


@pytest.mark.parametrize(("rows", "lookahead"), [(1, 0), (64, 0), (64, 4)])
def test_a_decode_step_stays_within_its_budget(rows: int, lookahead: int, counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, two steps in flight, too."""
    monkeypatch.setattr(Widths, "choose", Widths.most)
    switches = Switches()
    device = FakeDevice(FakeOptions(manual=True, lookahead=lookahead, depth=1 + (lookahead > 0)))
    used: list[tuple[int, int, int]] = []

    async def main() -> None:
        me = trio.lowlevel.current_task()
        switches.ignored.add(me)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        stream = Socket(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), switches)
        peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        link = Link(stream, TextToEngine, make_hello("engine", 0, 1))
        engine = Engine(
            build({"max_num_seqs": 64, "admission_forecast": False}),  # the cache does not hold what they might all draw
            output=lambda message: link.send(message),
            device=device,
            policy=FirstComeFirstServed(),
        )
        await peer.send_all(frames.encode(make_hello("text", 0, 1)))
        decoder = frames.FrameDecoder(frames.Hello | StepTokens)

        async def next_tokens() -> StepTokens:
            with trio.fail_after(20):
                while True:
                    for message in decoder.feed(await peer.receive_some(1 << 16)):
                        if isinstance(message, StepTokens):
                            return message

        async with trio.open_nursery() as nursery:
            await link.greet()
            await engine.start(nursery)
            nursery.start_soon(link.run, engine.post)
            requests = [
                Admit(
                    key=key,
                    incarnation=1,
                    prompt=i32([1, 2, 3, key % 100]),
                    hashes=b"",
                    root_hash=b"0" * 16,
                    choices=i32([0]),
                    sampling=SamplingParams(temperature=0),
                    max_tokens=500,
                    eos=i32([]),
                    arrival_ns=key,
                )
                for key in range(1, rows + 1)
            ]
            engine.post(*requests)
            for _ in range(WARM):
                device.release()
                await next_tokens()
            host = engine.host
            assert host is not None
            for _ in range(STEPS):
                await trio.testing.wait_all_tasks_blocked()
                counted.clear()
                before, handled = switches.total, host.handled
                sent = len(stream.sent_at)
                device.release()
                tokens = await next_tokens()
                assert len(tokens.seqs) == rows if not lookahead else rows < len(tokens.seqs) <= rows * (1 + lookahead)
                assert len(stream.sent_at) == sent + 1
                used.append((stream.sent_at[-1] - before, host.handled - handled, sum(counted.values())))
                assert set(counted) == {"StepTokens"}
                await trio.testing.wait_all_tasks_blocked()
            link.close()
            await peer.aclose()
            nursery.cancel_scope.cancel()
        device.release(4)
        engine.close()

    trio.run(main, instruments=[switches])
    worst_switches, worst_messages, worst_encodes = (max(row[k] for row in used) for k in range(3))
    assert worst_switches <= 2, switches.steps
    assert worst_messages <= 10
    assert worst_encodes == 1
    # One Forward and one Sample for every step, those that were in flight at the end included.
    assert device.launches["forward"] <= WARM + STEPS + 1 + (lookahead > 0)
    assert device.launches["sample"] <= WARM + STEPS + 1 + (lookahead > 0)
