"""The text process: edges on its socket, engines behind it, root above.

What it is: the main of the role `text`. Edges connect to it; it connects to an engine when root says that it is up, and tells the actor so only
when the link is open, so that an Admit never has nowhere to go.
What it does not know: requests, tokens (that is the actor).
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import trio

from penstock.core.actors.text.worker import keep_large_apart
from penstock.core.contract.host import PluginHost
from penstock.core.processes.child import Control, accept, bind_unix
from penstock.core.processes.spawn import settle, socket_of
from penstock.core.processes.text_side import TextSide, no_engine
from penstock.core.protocol.control import Boot, EngineDown, EngineUp, Hello, Message, PeerDown, PeerUp, Stop, Tables
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import Extension, union_of
from penstock.core.runtime.links import Link, make_hello
from penstock.core.runtime.wiring import Dropped
from penstock.core.telemetry.logs import configure_logging
from penstock.core.telemetry.traces import configure as configure_traces

RETRY_S = 0.1
SWITCH_S = 0.0005
"""How long the loop waits at most for a tokenizer thread that runs Python (a template, JSON)."""


class TextProcess:
    def __init__(self, boot: Boot, control: socket.socket) -> None:
        self._boot = boot
        self._log = configure_logging(boot.config.log_level, boot.config.log_format, f"text-{boot.id}")
        self._control_socket = control
        self._edges: dict[int, Link] = {}
        self._engines: dict[int, Link] = {}
        self._lost = Dropped()
        self._epochs: dict[int, int] = {}
        """Engine -> its epoch while root says that it is up."""
        self._nursery: trio.Nursery | None = None
        self._side: TextSide | None = None
        self._ready = trio.Event()
        self._tables: Tables | None = None
        self._has_tables = trio.Event()
        self._over = trio.Event()

    async def main(self) -> None:
        boot = self._boot
        # Edges may connect at once; they wait in the backlog until the tokenizer is loaded.
        listener = bind_unix(Path(socket_of(boot.run_dir, "text", boot.id)))
        self._control = control = Control(boot, self._control_socket, heard=self._from_root, progress=self._progress)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(control.run)
            plugins = PluginHost("text", extra=boot.extra_plugins, skip_broken=boot.config.skip_broken_plugins).load()
            self._side = side = TextSide(
                boot.config,
                plugins,
                to_edges=self._to_edge,
                to_engines=self._to_engine,
                to_root=lambda message, index: control.say(message),
                shard=boot.id,
                epoch=boot.epoch,
                traces=configure_traces("text", endpoint=boot.config.otlp_traces_endpoint),
                log=self._log,
            )
            await nursery.start(side.run)
            if boot.config.tables is not None:  # nobody is served before it is known what they may use
                await self._has_tables.wait()
                assert self._tables is not None
                side.post([self._tables])
            self._ready.set()
            nursery.start_soon(accept, listener, self._serve_edge, nursery)
            control.phase("ready")
            control.up()
            settle()
            await self._over.wait()
            await control.flush()
            nursery.cancel_scope.cancel()
        side.close()

    def _progress(self) -> tuple[int, int]:
        return self._side.progress if self._side is not None else (0, 0)

    # --- root

    def _from_root(self, message: Message) -> None:
        if isinstance(message, Stop):
            self._over.set()
        elif isinstance(message, EngineUp):
            if self._epochs.get(message.engine) == message.epoch:
                return  # root says it to a process that starts, and again when it is up
            self._epochs[message.engine] = message.epoch
            assert self._nursery is not None
            self._nursery.start_soon(self._keep_engine, message.engine, message.epoch)
        elif isinstance(message, EngineDown):
            self._epochs.pop(message.engine, None)
            link = self._engines.get(message.engine)
            if self._side is not None:
                self._side.post([message])
            if link is not None:
                link.close()
        elif isinstance(message, Tables) and not self._ready.is_set():
            self._tables = message  # the first takes what was spent along; a later one before the start says the same of that
            self._has_tables.set()
        elif self._side is not None:
            self._side.post([message])

    # --- edges

    async def _serve_edge(self, stream: trio.SocketStream) -> None:
        boot = self._boot
        link = Link(stream, union_of("edge>text"), make_hello("text", boot.id, boot.epoch), peers=("edge",))
        assert self._side is not None
        try:
            peer = await link.greet()
        except ProtocolError as error:
            self._log.error("link to an edge failed", error=str(error))
            return
        old = self._edges.get(peer.id)
        if old is not None:  # its process is dead, only its end has not been seen yet
            self._edge_gone(peer.id, old)
        self._edges[peer.id] = link
        self._side.post([PeerUp(role="edge", id=peer.id, epoch=peer.epoch)])
        try:
            await link.run(self._deliver, self._engine_room)
        except ProtocolError as error:
            self._log.error("link to an edge failed", edge=peer.id, error=str(error))
        finally:
            self._edge_gone(peer.id, link)

    def _edge_gone(self, edge: int, link: Link) -> None:
        if self._edges.get(edge) is link:
            del self._edges[edge]
            link.close()
            assert self._side is not None
            assert link.peer is not None
            self._side.post([PeerDown(role="edge", id=edge, epoch=link.peer.epoch)])

    def _to_edge(self, message: Message, index: int | None) -> None:
        assert index is not None  # the actor says to which
        link = self._edges.get(index)
        if link is not None:
            link.send(message)

    # --- engines

    async def _keep_engine(self, engine: int, epoch: int) -> None:
        """A link to this life of an engine, again if it breaks, until root says that the life is over."""
        boot = self._boot
        await self._ready.wait()
        while self._epochs.get(engine) == epoch:
            try:
                stream = await trio.open_unix_socket(socket_of(boot.run_dir, "engine", engine))
            except OSError:
                await trio.sleep(RETRY_S)
                continue
            link = Link(stream, union_of("engine>text"), make_hello("text", boot.id, boot.epoch), peers=("engine",))
            try:
                peer = await link.greet()
                if peer.epoch != epoch:
                    await stream.aclose()
                    return
                self._engines[engine] = link
                await link.run(self._deliver)
            except ProtocolError as error:
                self._log.error("link to an engine failed", engine=engine, error=str(error))
            finally:
                if self._engines.get(engine) is link:
                    del self._engines[engine]
                    if self._side is not None:
                        self._side.post([PeerDown(role="engine", id=engine, epoch=epoch)])
            await trio.sleep(RETRY_S)

    def _to_engine(self, message: Message, index: int | None) -> None:
        """Without an index, as a plugin actor's Extension may be: to every engine."""
        assert index is not None or type(message) is Extension
        links = self._engines.values() if index is None else [link for link in (self._engines.get(index),) if link is not None]
        if type(message) is Extension and not links:  # whatever else there is gets its answer from what text knows about that engine
            no_engine(self._lost, message.kind, index)
        for link in links:
            link.send(message)

    async def _engine_room(self) -> None:
        """Edges are not read while the way to an engine is full."""
        for link in list(self._engines.values()):
            await link.room()

    def _deliver(self, messages: list[Message]) -> None:
        assert self._side is not None
        self._side.post(m for m in messages if type(m) is not Hello)


def run(boot: Boot, control: socket.socket) -> int:
    """Role main."""
    sys.setswitchinterval(SWITCH_S)
    keep_large_apart()
    trio.run(TextProcess(boot, control).main)
    return 0
