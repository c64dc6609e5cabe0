"""The edge process.

What it is: `run`, the process entry that root starts: uvloop, uvicorn's HTTP protocol on the inherited listening socket (several edges share
it), transports' listeners on theirs, the links to the pools' text processes, and the control link to root, which is also the lifeline. `Server` is the part without processes: tests and the
in-process wiring use it too.
What it does not know: routes (http.py, transports), the supervisor's policy.

INT and TERM are ignored (core/processes/spawn.py): root decides. Drain: readiness turns false and new requests get 503 while connections are still accepted (the
socket is shared, so that closing it would strand clients in its backlog); when nothing runs any more, or at the deadline, Drained is sent.
Another Drain may bring the deadline forward. Whatever ends a request before its time, its stream ends with an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from email.utils import formatdate
from types import MappingProxyType
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from penstock.core.contract.host import BUILT_IN, PluginHost
from penstock.core.contract.transports import Transport
from penstock.core.processes.spawn import HTTP, control_hello, settle, socket_of
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import RootToChild
from penstock.core.protocol.errors import Draining, described, tamed
from penstock.core.protocol.messages import (
    Boot,
    ChildUp,
    Drain,
    Drained,
    Heartbeat,
    Hello,
    Message,
    StartupPhase,
    Stop,
    Tables,
    union_of,
)
from penstock.core.protocol.pools import PoolSpec
from penstock.core.runtime.frames import make_hello
from penstock.core.telemetry.logs import configure_logging
from penstock.core.telemetry.traces import configure
from penstock.transports.batch_runner import BatchRunner
from penstock.transports.batches import served
from penstock.transports.blame import Owned, raised_in
from penstock.transports.counters import Gauges
from penstock.transports.folder import Folder
from penstock.transports.gateway import STATS_PERIOD_S, Door, Gateway
from penstock.transports.http import make_app
from penstock.transports.keyring import Keyring
from penstock.transports.link import Dialer, Link, adopt
from penstock.transports.protocol import server_options
from penstock.transports.store import open_store
from penstock.transports.tracing import NO_TRACING, OtelTracing, Tracing

log = logging.getLogger("penstock.edge")

HEARTBEAT_S = 1.0
BACKLOG = 2048
GOODBYE_S = 1.0
"""How long idle connections get to close at the end."""
FLUSH_S = 0.3
"""How long a last word may take to leave. Altogether a stop stays well within what root allows for it."""
JOIN_S = 2.0
"""An edge that has not met text by then accepts connections all the same, to say so."""


class Server:
    """HTTP on listening sockets plus a link to each pool's text process, on the running loop. `run_dir` is where those listen."""

    def __init__(
        self,
        config: Config,
        *,
        edge: int = 0,
        epoch: int = 1,
        pools: Sequence[PoolSpec],
        run_dir: str,
        factories: Iterable[Callable[[Gateway], Transport]] = (),
        tracing: Tracing = NO_TRACING,
        keyring: Keyring | None = None,
    ) -> None:
        self._store = open_store(config, run_dir)
        self._folder = Folder(self._store.place.folder) if self._store is not None else None
        self.gateway = Gateway(config, edge, pools=pools, tracing=tracing, store=self._store)
        transports = [factory(self.gateway) for factory in factories]
        self.app = make_app(self.gateway, [route for transport in transports for route in transport.routes], keyring)
        self._listeners = [listener for transport in transports for listener in transport.listeners]
        runs_batches = self._store is not None and edge == 0 and served(self.app.app)
        self._runner = BatchRunner(self.gateway, self.app.app, self._store) if runs_batches and self._store is not None else None
        hello = make_hello("edge", edge, epoch)
        self._dialers = [_dialer(door, run_dir, hello) for door in self.gateway.doors.values()]
        options = server_options(
            config.max_header_bytes,
            config.receive_timeout_s,
            max_message_bytes=config.max_body_bytes,
            ping_s=config.keep_alive_s,
            pong_s=config.stream_stall_s,
        )
        self._uvicorn = uvicorn.Config(self.app, **options, log_level=config.uvicorn_log_level)
        self._state = ServerState()
        self.gateway.counters.sources.append(Gauges(self._now))
        self._servers: list[asyncio.Server] = []
        self._ticker: asyncio.Task[None] | None = None
        self._drain_until = math.inf
        self._drain_timeout: asyncio.Timeout | None = None

    async def start(self, sockets: Sequence[socket.socket], further: Mapping[str, socket.socket] = MappingProxyType({})) -> None:
        """`sockets` are HTTP's, `further` those of transports' listeners, by name; all listen already and stay the caller's."""
        loop = asyncio.get_running_loop()
        self._uvicorn.load()
        protocol: Any = self._uvicorn.http_protocol_class
        self._set_date()
        if self._store is not None and self._folder is not None and self._store.place.lasting:
            await self._store.open()  # a file that is no good is better known now than when somebody asks
            if self.gateway.edge == 0:
                self._folder.lock()
        for dialer in self._dialers:
            dialer.start()
        # Edges share the listening socket: one that has not met text yet leaves connections to those that have.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_S):
                await self.gateway.joined()
        for sock in sockets:
            sock.setblocking(False)
            create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
            server = await create(
                lambda: protocol(config=self._uvicorn, server_state=self._state, app_state={}, _loop=loop), sock=sock, backlog=BACKLOG
            )
            self._servers.append(server)
        for listener in self._listeners:
            await listener.start(further.get(listener.name), self.app)
        self._ticker = loop.create_task(self._tick(), name="edge tick")
        if self._runner is not None:
            self._runner.start()

    def _now(self) -> dict[str, float]:
        """What is open."""
        sockets = self.app.sockets.open
        return {
            'penstock_edge_connections{kind="http"}': max(0, len(self._state.connections) - sockets),
            'penstock_edge_connections{kind="websocket"}': sockets,
            "penstock_edge_streams": self.gateway.active,
        }

    def _set_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(STATS_PERIOD_S)
            self._set_date()
            self.gateway.flush_stats()

    async def drain(self, deadline_s: float) -> int:
        """Refuse new requests, return when none is in progress; at the deadline (seconds) end the rest and return how many they were."""
        self.gateway.draining = True
        self.drain_within(deadline_s)
        if self._runner is not None:
            await self._runner.stop()
        cut = 0
        try:
            async with asyncio.timeout_at(self._drain_until) as self._drain_timeout:
                await self.gateway.wait_idle()
        except TimeoutError:
            cut = self.gateway.active
            log.warning("%d requests were still running at the end of the drain", cut)
            self._end_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self.gateway.wait_idle()
        finally:
            self._drain_timeout = None
        return cut

    def drain_within(self, deadline_s: float) -> None:
        """Bring the deadline of a drain forward, to so many seconds from now; never back."""
        self._drain_until = min(self._drain_until, asyncio.get_running_loop().time() + deadline_s)
        if self._drain_timeout is not None and not self._drain_timeout.expired():
            self._drain_timeout.reschedule(self._drain_until)

    def _end_all(self) -> None:
        self.gateway.fail_all(self._goodbye(), "drain")

    def _goodbye(self) -> Draining:
        return Draining("The server is shutting down and could not finish this request.", retry_after_s=2.0)

    async def stop(self) -> None:
        """Close everything. What still runs is cut, and told so."""
        self.gateway.draining = True
        if self._runner is not None:
            await self._runner.stop()
        self._end_all()
        if self._ticker is not None:
            self._ticker.cancel()
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        await asyncio.gather(*(dialer.stop() for dialer in self._dialers))
        await asyncio.gather(self._gone(GOODBYE_S), *(listener.stop(GOODBYE_S) for listener in self._listeners))
        ours: list[Any] = list(self._state.connections)
        for connection in ours:
            connection.refuse(self._goodbye())  # who still sends a request is told, too
        await self._gone(FLUSH_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:  # each finds its client gone; what does not is a fault, and logged
            await asyncio.wait(list(self._state.tasks), timeout=FLUSH_S)
        tasks = [task for task in self._state.tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            self._store.close()
        if self._folder is not None:
            self._folder.unlock()

    async def _gone(self, limit_s: float) -> None:
        """Return when every connection is closed, or after `limit_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._state.connections:
                    await asyncio.sleep(0.01)


def _dialer(door: Door, run_dir: str, hello: Hello) -> Dialer:
    """Keeps the link behind a door."""
    dialer = Dialer(
        socket_of(run_dir, "text", door.pool.text),
        union_of("text>edge"),
        hello,
        on_open=door.link_opened,
        on_message=door.on_message,
        on_close=door.link_closed,
        peers=("text",),
    )
    door.attach(lambda: dialer.link)
    return dialer


def transport_factories(host: PluginHost, config: Config) -> list[Callable[..., Transport]]:
    """The factories of the transports that `--transports` allows. Raises ConfigError naming an unknown one."""
    host.transports()
    factories: list[Callable[..., Transport]] = []
    for name in config.transports:
        factory = host.pick("transports", name, "transports").factory  # type: ignore[attr-defined]
        own = host.package_of("transports", name) == BUILT_IN
        factories.append(factory if own else Owned(factory, functools.partial(host.blame, "transports", name)))
    return factories


class _Process:
    """The conversation with root."""

    def __init__(self, boot: Boot, started: float) -> None:
        self._boot = boot
        self._started = started
        self._over = asyncio.Event()
        self._keyring = Keyring(boot.config)
        self._has_tables = asyncio.Event()
        self._link: Link | None = None
        self._server: Server | None = None
        self._drain: asyncio.Task[None] | None = None
        self.status = 0

    async def main(self, control: socket.socket, tracing: Tracing) -> int:
        boot = self._boot
        config = boot.config
        self._link = await adopt(
            control,
            RootToChild,
            control_hello("edge", boot.id, boot.epoch),
            on_open=lambda _: None,
            on_message=self._on_root,
            on_close=self._root_gone,
            peers=("root",),
        )
        host = PluginHost("edge", extra=boot.extra_plugins, skip_broken=config.skip_broken_plugins).load()
        self._server = server = Server(
            config,
            edge=boot.id,
            epoch=boot.epoch,
            pools=boot.pools,
            run_dir=boot.run_dir,
            factories=transport_factories(host, config),
            tracing=tracing,
            keyring=self._keyring,
        )
        if config.tables is not None:  # nobody gets in before it is known who may
            await self._has_tables.wait()
        with contextlib.ExitStack() as opened:
            sockets = {name: opened.enter_context(socket.socket(fileno=number)) for name, number in boot.listeners.items()}
            await server.start([sockets.pop(HTTP)], sockets)
            settle()
            self._say(StartupPhase(role="edge", id=boot.id, phase="listen", seconds=time.monotonic() - self._started))
            tasks = [asyncio.create_task(work(), name=work.__name__) for work in (self._beat, self._announce)]
            await self._over.wait()
            for task in tasks:
                task.cancel()
            await server.stop()
        return self.status

    def _say(self, message: Message) -> None:
        if self._link is not None:
            self._link.send(message)

    async def _announce(self) -> None:
        """Up means that a request can be answered: root tells the user to send one."""
        assert self._server is not None
        await self._server.gateway.open()
        self._say(ChildUp(role="edge", id=self._boot.id, epoch=self._boot.epoch, pid=os.getpid()))

    async def _beat(self) -> None:
        boot = self._boot
        while True:
            progress = self._server.gateway.delivered if self._server else 0
            self._say(Heartbeat(role="edge", id=boot.id, at_ns=time.monotonic_ns(), progress=progress))
            await asyncio.sleep(HEARTBEAT_S)

    def _on_root(self, message: Message) -> None:
        if isinstance(message, Drain) and self._drain is not None and self._server is not None:
            self._server.drain_within(message.deadline_s)
        elif isinstance(message, Drain):
            self._drain = asyncio.get_running_loop().create_task(self._drained(message.deadline_s), name="drain")
        elif isinstance(message, Tables):
            self._keyring.take(message)
            self._has_tables.set()
        elif isinstance(message, Stop):
            self._over.set()

    async def _drained(self, deadline_s: float) -> None:
        cut = await self._server.drain(deadline_s) if self._server is not None else 0
        self._say(Drained(role="edge", id=self._boot.id, cut=cut))

    def _root_gone(self, reason: str) -> None:
        if not self._over.is_set():
            # The lifeline is cut: nobody would ever stop this process again, and nobody waits for it.
            os._exit(1)


def to_its_end(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, int]) -> int:
    """Run the loop until `main` is over. SystemExit and KeyboardInterrupt stop a loop wherever they are raised: in a task that a plugin began by itself, or in a
    callback of its. Nobody means this process by them (root decides, and INT is ignored), so the loop goes on."""
    task = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt) as raised:
            tamed(raised)  # Ctrl-C, where somebody minds it
            if task.done():
                raise
            log.error(
                "a task or callback of a plugin raised %s (%s); the server goes on", described(raised), raised_in(raised), exc_info=raised
            )


def run(boot: Boot, control: socket.socket) -> int:
    """The role's main, for core/processes/spawn.py. `control` is the inherited socket to root, from which Boot was read. Returns the exit status."""
    started = time.monotonic()
    configure_logging(boot.config.log_level, boot.config.log_format, f"edge-{boot.id}")
    if boot.config.uvicorn_log_level is not None:
        log.setLevel(uvicorn.config.LOG_LEVELS[boot.config.uvicorn_log_level])
    traces = configure("edge", endpoint=boot.config.otlp_traces_endpoint)
    tracing = OtelTracing(traces.provider) if traces.active else NO_TRACING
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return to_its_end(runner.get_loop(), _Process(boot, started).main(control, tracing))
    finally:
        traces.shutdown()
