"""The engine process: one Engine, the text process on its socket, root above.

What it is: the main of the role `engine`. It is up when the model is loaded; it tells root and every text that connects what it is (EngineUp). When
text goes, its sequences are aborted; when the device or an actor fails, the process leaves with the reason and root starts a new one.
What it does not know: what is computed, who asks.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import trio

from penstock.core.contract.host import PluginHost
from penstock.core.processes.child import Control, accept, bind_unix
from penstock.core.processes.engine import Engine
from penstock.core.processes.spawn import settle, socket_of
from penstock.core.protocol.control import Boot, Drain, EngineUp, Hello, Message, PeerDown, Stop
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import Drained, Extension, StepTokens, union_of
from penstock.core.runtime.links import Link, make_hello
from penstock.core.telemetry.logs import configure_logging

SWITCH_S = 0.0005
"""Thread switch interval: the device's thread must get the interpreter within a fraction of a step."""


class EngineProcess:
    def __init__(self, boot: Boot, control: socket.socket) -> None:
        self._boot = boot
        self._log = configure_logging(boot.config.log_level, boot.config.log_format, f"engine-{boot.id}")
        self._plugins = PluginHost("engine", extra=boot.extra_plugins, skip_broken=boot.config.skip_broken_plugins).load()
        self._engine = Engine(
            boot.config,
            output=self._output,
            engine=boot.id,
            epoch=boot.epoch,
            plugins=self._plugins,
            progress=self._progress,
        )
        self._control_socket = control
        self._control: Control | None = None
        self._text: Link | None = None
        self._over = trio.Event()
        self._phase = ""

    async def main(self) -> None:
        boot = self._boot
        self._control = control = Control(boot, self._control_socket, heard=self._from_root, progress=lambda: self._engine.progress)
        async with trio.open_nursery() as nursery:
            await nursery.start(control.run)
            facts = await self._engine.start(nursery)
            nursery.start_soon(accept, bind_unix(Path(socket_of(boot.run_dir, "engine", boot.id))), self._serve, nursery)
            control.phase("ready")
            control.up()
            control.say(EngineUp(engine=boot.id, epoch=boot.epoch, facts=facts))
            settle()
            await self._over.wait()
            await control.flush()
            nursery.cancel_scope.cancel()

    def _progress(self, phase: str, fraction: float) -> None:
        if self._control is not None and phase != self._phase:
            self._phase = phase
            self._control.phase(phase)

    def _from_root(self, message: Message) -> None:
        if isinstance(message, Stop):
            if self._engine.facts is None:
                os._exit(0)  # the device's thread is loading and cannot be interrupted; nothing is there to be kept
            self._over.set()
        elif isinstance(message, Drain):
            if self._engine.facts is not None:
                self._engine.post(message)
            elif self._control is not None:
                self._control.say(Drained(role="engine", id=self._boot.id))

    def _output(self, message: Message) -> None:
        if type(message) is StepTokens or type(message) is Extension:
            if self._text is not None:
                self._text.send(message)
        elif self._control is not None:
            self._control.say(message)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One text process; a newer one takes the place of an older one."""
        boot = self._boot
        link = Link(stream, union_of("text>engine"), make_hello("engine", boot.id, boot.epoch), peers=("text",))
        try:
            peer = await link.greet()
            self._drop_text()
            self._text = link
            assert self._engine.facts is not None
            link.send(EngineUp(engine=boot.id, epoch=boot.epoch, facts=self._engine.facts))
            await link.run(self._from_text, self._engine.room)
        except ProtocolError as error:
            self._log.error("link to text failed", error=str(error))
        else:
            self._log.info("text is gone", epoch=peer.epoch)
        finally:
            if self._text is link:
                self._drop_text()

    def _drop_text(self) -> None:
        link, self._text = self._text, None
        if link is not None:
            link.close()
            peer = link.peer
            if peer is not None:
                self._engine.post(PeerDown(role="text", id=peer.id, epoch=peer.epoch))

    def _from_text(self, messages: list[Message]) -> None:
        self._engine.post(*(m for m in messages if type(m) is not Hello))


def run(boot: Boot, control: socket.socket) -> int:
    """Role main."""
    sys.setswitchinterval(SWITCH_S)
    trio.run(EngineProcess(boot, control).main)
    return 0
