"""A plugin for tests of real processes: the fake device, and two actors that call each other over the link between text and engine.

What it is: text calls once a tenth of a second and logs what comes back, and sends a kind that nobody takes.
What it does not know: the tests; they put its folder on PYTHONPATH and name it among the extra plugins.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from penstock.core.contract import fake_device
from penstock.core.contract.actors import ActorContext, Seat
from penstock.core.contract.hookspecs import ActorSpec, hookimpl
from penstock.core.protocol.messages import Extension, Message

log = logging.getLogger("echo")
register_devices = fake_device.register_devices


class Echo:
    takes: frozenset[type[Message]] = frozenset()
    gives: frozenset[type[Message]] = frozenset()

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, message: Message) -> Iterator[Message]:
        assert isinstance(message, Extension)
        if message.kind == "echo.due":
            yield Extension(kind="echo.call", data=b"hello")
            yield Extension(kind="echo.nobody", data=b"")
        elif message.kind == "echo.call":
            yield Extension(kind="echo.back", data=message.data + b" " + self.name.encode())
        else:
            log.info(f"heard {message.data.decode()}")


class Timer:
    name = "timer"
    takes: frozenset[type[Message]] = frozenset()
    gives: frozenset[type[Message]] = frozenset()

    def __init__(self, context: ActorContext) -> None:
        self._post = context.post
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not threading.Event().wait(0.1):
            self._post(Extension(kind="echo.due", data=b""))

    def deliver(self, message: Message, index: int | None) -> None:
        """Nothing is sent to it."""


def engine(context: ActorContext) -> Seat:
    return Seat(party=Echo(f"far {context.id}.{context.epoch}"), takes_kinds=frozenset({"echo.call"}), gives_kinds=frozenset({"echo.back"}))


def text(context: ActorContext) -> Seat:
    kinds = frozenset({"echo.call", "echo.nobody"})
    return Seat(party=Echo("near"), takes_kinds=frozenset({"echo.due", "echo.back"}), gives_kinds=kinds)


@hookimpl
def register_actors() -> list[ActorSpec]:
    return [
        ActorSpec(name="far", api_level=1, where="engine", factory=engine),
        ActorSpec(name="near", api_level=1, where="text", factory=text),
        ActorSpec(name="timer", api_level=1, where="text", factory=lambda context: Seat(party=Timer(context), host="thread")),
    ]
