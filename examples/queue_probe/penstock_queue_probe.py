"""Two actors as a plugin: text asks the engine every few seconds how long work waits in the device's queue, and logs the answer.

A long wait in the queue: the device is busy. A long way there and a short wait: the engine's process is. Install it beside Penstock
(`pip install ./examples/queue_probe`). QUEUE_PROBE_S: seconds between two questions (10); QUEUE_PROBE_FENCE=0 leaves the device out.
What it does not know: requests, steps, how messages travel.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

from penstock.core.contract.actors import ActorContext, Seat
from penstock.core.contract.hookspecs import ActorSpec, hookimpl
from penstock.core.protocol.control import Message
from penstock.core.protocol.messages import Control, DeviceWork, Extension, WorkDone
from penstock.core.runtime.actor import To

DUE, ASK, ANSWER = "penstock_queue_probe.due", "penstock_queue_probe.ask", "penstock_queue_probe.answer"

log = logging.getLogger("penstock.queue_probe")


class Engine:
    """In the engine's cell: puts a fence into the device's queue, and answers when the queue came to it."""

    name = "queue_probe"

    def __init__(self, context: ActorContext, fence: bool) -> None:
        self.takes: frozenset[type[Message]] = frozenset({WorkDone} if fence else ())
        self.gives: frozenset[type[Message]] = frozenset({DeviceWork} if fence else ())
        self._context = context
        self._fence = fence
        self._asked: dict[int, tuple[int, int]] = {}
        self._next = 0

    def handle(self, message: Message) -> Iterator[Message]:
        now = self._context.now_ns()
        if isinstance(message, Extension):
            sent = int(message.data)
            if not self._fence:
                yield answer(sent, now, now)
                return
            self._next += 1
            self._asked[self._next] = sent, now
            here = {"engine": self._context.id, "epoch": self._context.epoch}
            yield DeviceWork(control=Control(**here, owner=self.name, id=self._next, name="fence"))
        elif isinstance(message, WorkDone):
            yield answer(*self._asked.pop(message.id), now)


def answer(sent: int, came: int, done: int) -> Extension:
    return Extension(kind=ANSWER, data=f"{sent} {came} {done}".encode())


class Text:
    """In text: asks when the timer says so, and logs what comes back."""

    name = "queue_probe"
    takes: frozenset[type[Message]] = frozenset()
    gives: frozenset[type[Message]] = frozenset()

    def __init__(self, context: ActorContext) -> None:
        self._context = context

    def handle(self, message: Message) -> Iterator[To]:
        assert isinstance(message, Extension)
        now = self._context.now_ns()
        if message.kind == DUE:
            yield To(Extension(kind=ASK, data=str(now).encode()), 0)
        else:
            sent, came, done = (int(part) for part in message.data.split())
            there, wait, back = ((b - a) / 1e6 for a, b in ((sent, came), (came, done), (done, now)))
            log.info("to the engine %.2f ms, in the device's queue %.2f ms, back %.2f ms", there, wait, back)


class Timer:
    """A port: what it posts comes from a thread of its own."""

    name = "queue_probe_timer"
    takes: frozenset[type[Message]] = frozenset()
    gives: frozenset[type[Message]] = frozenset()

    def __init__(self, context: ActorContext, period_s: float) -> None:
        self._over = threading.Event()
        self._post = context.post
        self._period_s = period_s
        threading.Thread(target=self._run, name="queue-probe", daemon=True).start()

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            self._post(Extension(kind=DUE, data=b""))

    def deliver(self, message: Message, index: int | None) -> None:
        """Nothing is sent to it."""

    def close(self) -> None:
        self._over.set()


def engine(context: ActorContext) -> Seat:
    actor = Engine(context, os.environ.get("QUEUE_PROBE_FENCE", "1") != "0")
    return Seat(party=actor, takes_kinds=frozenset({ASK}), gives_kinds=frozenset({ANSWER}))


def text(context: ActorContext) -> Seat:
    return Seat(party=Text(context), host="task", takes_kinds=frozenset({DUE, ANSWER}), gives_kinds=frozenset({ASK}))


def timer(context: ActorContext) -> Seat:
    return Seat(party=Timer(context, float(os.environ.get("QUEUE_PROBE_S", "10"))), host="thread")


@hookimpl
def register_actors() -> list[ActorSpec]:
    doc = "how long work waits in the device's queue"
    return [
        ActorSpec(name="queue_probe", api_level=1, where="engine", factory=engine, doc=doc),
        ActorSpec(name="queue_probe_text", api_level=1, where="text", factory=text, doc=doc),
        ActorSpec(name="queue_probe_timer", api_level=1, where="text", factory=timer, doc=doc),
    ]
