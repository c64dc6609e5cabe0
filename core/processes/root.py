"""The root process: supervises, and does nothing else.

What it is: the ports of the supervisor (child processes, their control links, the screen) and the loop that feeds it with what happens to them,
with signals and with time. Imports neither numpy nor any library that does work.
What it does not know: requests, tokens, HTTP.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import trio

from penstock.core.processes.spawn import control_hello
from penstock.core.processes.spent_file import SpentFile, place_of
from penstock.core.processes.supervisor import Child, ChildSpec, Supervisor
from penstock.core.processes.tables_file import TablesFile
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import (
    ChildDown,
    ChildExited,
    ChildToRoot,
    ChildUp,
    Drain,
    Drained,
    EngineDown,
    EngineFacts,
    EngineUp,
    Extension,
    Heartbeat,
    Hello,
    KillChild,
    Leave,
    Message,
    Notice,
    Ready,
    Signalled,
    Spending,
    StartChild,
    StartupPhase,
    Stop,
    Tick,
    Vitals,
)
from penstock.core.protocol.errors import ConfigError, ProtocolError
from penstock.core.runtime.hosts import FusedHost
from penstock.core.runtime.links import Link
from penstock.core.runtime.wiring import CallPort

TICK_S = 1.0
HURRY_S = 0.05
"""Ticks while stopping or waiting for a restart."""
LAST_WORDS_S = 1.0
"""How long the link of a dead child may still deliver frames."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
RELOAD = signal.SIGHUP
"""Read the tables again. Without tables it is not ours, and ends the process as ever."""


Started = tuple[subprocess.Popen[bytes], socket.socket]
Launch = Callable[[ChildSpec, int], Started]


class Root:
    """`run()` returns what root leaves with. `launch(spec, epoch)` starts a child; `started` are those that run already (their first life);
    `ready(message)` makes the lines that stdout gets when everything is up. `tables` go to edges and texts when they start, and again after SIGHUP. `notes` are
    for the log."""

    def __init__(
        self,
        config: Config,
        supervisor: Supervisor,
        *,
        launch: Launch,
        started: Mapping[tuple[str, int], Started],
        ready: Callable[[Ready], list[str]],
        tables: TablesFile | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self._config = config
        self._launch = launch
        self._ready = ready
        self._tables = tables
        self._notes = notes
        self._spent: SpentFile | None = None
        """Once a tenant has a budget."""
        self.supervisor = supervisor
        self._specs = {(c.spec.role, c.spec.id): c for c in self.supervisor.children}
        self._links: dict[int, Link] = {}
        self._started = {self._specs[name].index: item for name, item in started.items()}
        self._processes = {index: process for index, (process, _) in self._started.items()}
        self._nursery: trio.Nursery | None = None
        self._hurry = trio.Event()
        self._left: Leave | None = None
        self._log: Any = None
        self._host = FusedHost(
            [self.supervisor],
            [
                CallPort("processes", self._to_process, takes={StartChild, KillChild}, gives={ChildExited}),
                CallPort(
                    "children",
                    self._to_child,
                    takes={Drain, Stop, EngineUp, EngineDown, Vitals, StartupPhase},
                    gives={ChildUp, ChildDown, EngineUp, Heartbeat, StartupPhase, Drained},
                ),
                CallPort("screen", self._to_screen, takes={Notice, Ready, Leave}),
                CallPort("world", _nowhere, gives={Tick, Signalled}),
            ],
        )

    # --- life

    async def run(self) -> Leave:
        """Until every child is gone."""
        for note in self._notes:
            self._note("warning", note)
        self._find_spent()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._host.run)
                nursery.start_soon(self._signals)
                nursery.start_soon(self._ticks)
                for index, (process, control) in self._started.items():
                    nursery.start_soon(self._tend, self.supervisor.children[index], 1, process, control)
        finally:
            kill_all(self._processes.values())
        assert self._left is not None
        return self._left

    async def _signals(self) -> None:
        own = (*SIGNALS, RELOAD) if self._tables is not None else SIGNALS
        with trio.open_signal_receiver(*own) as numbers:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, own)  # the kernel kept RELOAD for now
            async for number in numbers:
                if number == RELOAD:
                    self._reload()
                    continue
                self._host.post(Signalled(signum=number))
                self._hurry.set()

    def _reload(self) -> None:
        """Read the tables again and tell the edges; what is wrong with them is logged, and changes nothing."""
        assert self._tables is not None
        try:
            tables = self._tables.read(lambda note: self._note("warning", note))
        except ConfigError as error:
            self._note("error", "tables not loaded, the old ones stay", error=error.message)
            return
        self._find_spent()
        for role in ("text", "edge"):
            for index, link in self._links.items():
                if self.supervisor.children[index].spec.role == role:
                    self._tell_tables(role, link)
        self._note("info", "tables loaded", generation=tables.generation)

    def _find_spent(self) -> None:
        if self._tables is not None and self._tables.budgets and self._spent is None:
            self._spent = SpentFile(place_of(self._tables.path), lambda note: self._note("error", note))

    def _tell_tables(self, role: str, link: Link) -> None:
        """What its role is told of them."""
        if self._tables is None:
            return
        if role == "edge":
            link.send(self._tables.current)
        elif role == "text":
            spent = self._spent.rows if self._spent is not None else []
            link.send(msgspec.structs.replace(self._tables.limits, spent=spent))

    async def _ticks(self) -> None:
        while True:
            urgent = self.supervisor.leaving or any(child.state == "waiting" for child in self.supervisor.children)
            with trio.move_on_after(HURRY_S if urgent else TICK_S):
                await self._hurry.wait()
            self._hurry = trio.Event()
            self._host.post(Tick(now_ns=time.monotonic_ns()))

    # --- children

    def _start(self, message: StartChild) -> None:
        child = self._specs[(message.role, message.id)]
        process, control = self._launch(child.spec, message.epoch)
        self._processes[child.index] = process
        assert self._nursery is not None
        self._nursery.start_soon(self._tend, child, message.epoch, process, control)

    async def _tend(self, child: Child, epoch: int, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        """One life of a child: talk until it is gone."""
        control.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        link = Link(stream, ChildToRoot, control_hello("root", 0, 0), peers=(child.spec.role,))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._talk, child, link)
            status = await _gone(process)
            with trio.move_on_after(LAST_WORDS_S):
                await link.ended.wait()
            link.close()
        self._host.post(ChildExited(role=child.spec.role, id=child.spec.id, epoch=epoch, status=status))
        self._hurry.set()

    async def _talk(self, child: Child, link: Link) -> None:
        try:
            peer = await link.greet(sent=True)
            if peer.id != child.spec.id:
                raise ProtocolError(f"The {child.name} process says that it is {peer.role}-{peer.id}.")
            self._links[child.index] = link
            self._tell_tables(child.spec.role, link)
            await link.run(self._heard)
        except ProtocolError as error:
            if self._processes[child.index].poll() is None and not self.supervisor.leaving:
                self._note("error", "control link failed", process=child.name, error=str(error))
                self._processes[child.index].kill()
        finally:
            link.ended.set()
            if self._links.get(child.index) is link:
                del self._links[child.index]

    def _heard(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, Spending) and self._spent is not None:
                self._spent.take(message.rows)
        self._host.post(*(m for m in messages if not isinstance(m, (Hello, Extension, Spending))))

    def _to_process(self, message: Message, index: int | None) -> None:
        if isinstance(message, StartChild):
            self._start(message)
        elif isinstance(message, KillChild):
            process = self._processes[self._specs[(message.role, message.id)].index]
            if process.poll() is None:
                event = "asking for stacks" if message.signum == signal.SIGUSR2 else "killing"
                self._note("warning", event, process=f"{message.role}-{message.id}", signal=signal.Signals(message.signum).name)
                process.send_signal(message.signum)

    def _to_child(self, message: Message, index: int | None) -> None:
        assert index is not None
        link = self._links.get(index)
        if link is not None:
            link.send(message)
        elif isinstance(message, Stop):
            process = self._processes[index]  # it has not even greeted: nothing in it is worth waiting for
            if process.poll() is None:
                process.kill()

    # --- the screen

    def _to_screen(self, message: Message, index: int | None) -> None:
        if isinstance(message, Notice):
            self._note(message.level, message.event, **message.fields)
        elif isinstance(message, Ready):
            if message.first:
                with contextlib.suppress(OSError):  # whoever read our output may be gone
                    print("\n".join(self._ready(message)), flush=True)
            else:
                self._note("info", "recovered")
        elif isinstance(message, Leave):
            self._left = message
            assert self._nursery is not None
            self._nursery.cancel_scope.cancel()

    def _note(self, level: str, event: str, **fields: Any) -> None:
        if self._log is None:  # late: importing structlog takes as long as starting the children
            if level in ("debug", "info") and self._config.log_level in ("warning", "error"):
                return
            from penstock.core.telemetry.logs import configure_logging

            self._log = configure_logging(self._config.log_level, self._config.log_format, "root")
        getattr(self._log, level)(event, **fields)


def _nowhere(message: Message, index: int | None) -> None:
    raise AssertionError("nothing is sent to the world")


def kill_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Whatever happened: no child outlives root's end."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


async def _gone(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process without blocking the loop. Negative: killed by that signal."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):  # an old kernel, or no Linux
        while process.poll() is None:
            await trio.sleep(0.05)
    else:
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
    return process.wait()


# ------------------------------------------------------------------ what is printed


def memory_table(facts: EngineFacts) -> list[str]:
    """Exact bytes of an engine, aligned."""
    rows: list[tuple[str, int]] = [
        ("weights", facts.weights_bytes),
        ("workspace", facts.workspace_bytes),
        ("KV cache", facts.kv_bytes),
        ("slack", facts.slack_bytes),
    ]
    rows.append(("total", sum(size for _, size in rows)))
    lines = [f"  {name:<10} {size:>16,} bytes  {size / (1 << 20):>10,.1f} MiB" for name, size in rows]
    lines[2] += f"  = {facts.num_blocks} blocks of {facts.block_size} tokens in {facts.kv_dtype or facts.dtype}"
    return lines


def engine_lines(facts: EngineFacts) -> Iterator[str]:
    yield (
        f"{facts.architecture} on {facts.device}, {facts.dtype}, attention {facts.attention}, context {facts.max_model_len},"
        f" up to {facts.max_num_seqs} sequences and {facts.max_num_batched_tokens} tokens a step"
        + (", deterministic" if facts.deterministic else "")
    )
    yield from memory_table(facts)


def complain(text: str) -> None:
    """The one line for the user."""
    with contextlib.suppress(OSError):
        print(f"penstock: {text}", file=sys.stderr, flush=True)
