"""A trio process under root: the conversation that every such role has.

What it is: the control link (Hello, heartbeats, what root says), the lifeline (end of file: root is dead, leave at once), and the accept loop for
unix sockets in the runtime directory.
What it does not know: what the role does. (The edge has the same in asyncio.)
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from penstock.core.processes.spawn import control_hello
from penstock.core.protocol.control import Boot, ChildUp, Heartbeat, Hello, Message, RootToChild, StartupPhase
from penstock.core.runtime.links import Link

HEARTBEAT_S = 1.0


class Control:
    """`heard(message)` is called for what root says; `progress()` gives a heartbeat's two numbers."""

    def __init__(
        self, boot: Boot, control: socket.socket, *, heard: Callable[[Message], None], progress: Callable[[], tuple[int, int]]
    ) -> None:
        self.boot = boot
        self._heard = heard
        self._progress = progress
        self._began = time.monotonic()
        control.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        self._link = Link(stream, RootToChild, control_hello(boot.role, boot.id, boot.epoch), peers=("root",))
        self.leaving = False

    def say(self, message: Message) -> None:
        self._link.send(message)

    def phase(self, phase: str, table: list[list[str]] | None = None) -> None:
        """Tell how the start goes."""
        self.say(StartupPhase(role=self.boot.role, id=self.boot.id, phase=phase, seconds=time.monotonic() - self._began, table=table or []))

    def up(self) -> None:
        self.say(ChildUp(role=self.boot.role, id=self.boot.id, epoch=self.boot.epoch, pid=os.getpid()))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._link.greet()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            task_status.started()
            await self._link.run(self._deliver)
            if not self.leaving:
                os._exit(1)  # the lifeline is cut: nobody would ever stop this process again
            nursery.cancel_scope.cancel()

    def _deliver(self, messages: list[Message]) -> None:
        for message in messages:
            if not isinstance(message, Hello):
                self._heard(message)

    async def _beat(self) -> None:
        boot = self.boot
        while True:
            progress, pending = self._progress()
            self.say(Heartbeat(role=boot.role, id=boot.id, at_ns=time.monotonic_ns(), progress=progress, pending=pending))
            await trio.sleep(HEARTBEAT_S)

    async def flush(self) -> None:
        """Before leaving: what was said must arrive."""
        self.leaving = True
        with trio.move_on_after(1.0):
            await self._link.flush()


def bind_unix(path: Path) -> trio.SocketListener:
    """Listen on a socket file of the runtime directory; one of a dead predecessor is replaced."""
    with suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(64)
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def accept(listener: trio.SocketListener, serve: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery) -> None:
    """Serve each connection in a task of `nursery`."""
    while True:
        stream = await listener.accept()
        nursery.start_soon(serve, stream)
