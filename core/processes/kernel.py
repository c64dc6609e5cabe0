"""The kernel: from a configuration to a running server.

What it is: the one place that knows which roles there are and how they are put together. `serve` binds the listening socket, makes the private runtime
directory, starts the children side by side and runs root; the children's mains are named here as data. `LocalServer` (core/processes/local.py) puts the
same actors into one process for the Python API.
What it does not know: how anything works inside. It imports nothing heavy: root stays small.

  clients -- HTTP --> edge x E -- text-N.sock --> text -- engine-N.sock --> engine --> device thread
                        \\______________ control links, lifelines ______________/
                                               root

A *pool* is one served model: a text process and the engines behind it. Every edge has a door to each.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.core.contract.known import check_names
from penstock.core.processes.spawn import HTTP, spawn
from penstock.core.processes.supervisor import ChildSpec, Supervisor
from penstock.core.processes.tables_file import TablesFile
from penstock.core.protocol.config import OPTIONS, Config, Option, further_ports
from penstock.core.protocol.control import Boot, Ready
from penstock.core.protocol.errors import ConfigError, PenstockError, spelled
from penstock.core.protocol.model_folder import with_model
from penstock.core.protocol.pools import PoolSpec, pools_of
from penstock.core.protocol.quality import gate
from penstock.core.runtime.clock import SystemClock

if TYPE_CHECKING:
    from penstock.core.processes.local import LocalServer as LocalServer

BACKLOG = 2048
RUN_PREFIX = "penstock-run-"
LONGEST_BASE = 60
"""Bytes of the path above the runtime directory: a unix socket's whole path has 107."""

ENGINE_ENV = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_ARENA_MAX": "2",
    "TOKENIZERS_PARALLELISM": "false",
}
"""OpenMP's spin is bounded: without a bound idle threads burn the core that text needs (a step of 2 ms took 89 ms on busy cores)."""
TEXT_ENV = {"MALLOC_ARENA_MAX": "2", "TOKENIZERS_PARALLELISM": "true"}
EDGE_ENV = {"MALLOC_ARENA_MAX": "2"}


def child_specs(config: Config, pools: Sequence[PoolSpec]) -> list[ChildSpec]:
    """Who runs. The engines first: they take longest to start."""
    engines = [
        ChildSpec(role="engine", id=index, module="penstock.core.processes.engine_process", env=ENGINE_ENV, pool=pool.name)
        for pool in pools
        for index in pool.engines
    ]
    texts = [
        ChildSpec(role="text", id=pool.text, module="penstock.core.processes.text_process", env=TEXT_ENV, pool=pool.name) for pool in pools
    ]
    ports = [option.listener for option, _ in further_ports(config)]
    edges = [
        ChildSpec(role="edge", id=index, module="penstock.transports.edge", env=EDGE_ENV, listeners=[HTTP, *ports])
        for index in range(config.edge_workers)
    ]
    return [*engines, *texts, *edges]


def boot_of(
    spec: ChildSpec,
    epoch: int,
    config: Config,
    *,
    run_dir: str,
    listeners: Mapping[str, int],
    pools: Sequence[PoolSpec],
    extra_plugins: Sequence[str] = (),
) -> Boot:
    """What a child is told at its start; `listeners` name -> file descriptor, all that root holds. Only edges, who check keys, get them."""
    return Boot(
        role=spec.role,
        id=spec.id,
        epoch=epoch,
        config=config if spec.role == "edge" else msgspec.structs.replace(config, api_key=[]),
        run_dir=run_dir,
        root_pid=os.getpid(),
        module=spec.module,
        function=spec.function,
        edges=config.edge_workers,
        texts=len(pools),
        engines=sum(len(pool.engines) for pool in pools),
        extra_plugins=list(extra_plugins),
        listeners={name: listeners[name] for name in spec.listeners},
        pools=list(pools),
    )


def serve(config: Config, *, extra_plugins: Sequence[str] = (), specs: Sequence[ChildSpec] | None = None) -> int:
    """Run a server until it is told to stop. Returns the exit status: 0 after a clean drain, 1 on failure, 128 + n if signal n cut it short.

    Errors that the user can mend are one line on stderr.
    """
    run_dir: Path | None = None
    listener: socket.socket | None = None
    further: dict[str, socket.socket] = {}
    started: dict[tuple[str, int], tuple[subprocess.Popen[bytes], socket.socket]] = {}
    try:
        if specs is None:
            check_names(config, extra_plugins)
            config = with_model(config)
        notes = [note] if (note := gate(config)) is not None else []
        tables = None
        if config.tables is not None:
            tables = TablesFile(config.tables, notes.append, served=config.served_model_name, policy=config.scheduling_policy)
        listener = bind(config)
        further = bind_further(config)
        pools = pools_of(config)
        run_dir = make_run_dir()
        where = url_of(config, listener)
        also = {name: address_of(config, sock) for name, sock in further.items()}
        directory, listeners = str(run_dir), {HTTP: listener.fileno(), **{name: sock.fileno() for name, sock in further.items()}}

        def launch(spec: ChildSpec, epoch: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
            boot = boot_of(spec, epoch, config, run_dir=directory, listeners=listeners, pools=pools, extra_plugins=extra_plugins)
            return spawn(boot, spec.env)

        if config.tables is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # one that comes before root listens to it waits
        supervisor = Supervisor(
            child_specs(config, pools) if specs is None else specs,
            clock=SystemClock(),
            drain_s=config.shutdown_timeout,
            max_restarts=config.engine_restarts,
            watchdog_s=config.watchdog_timeout,
        )
        for child, message in zip(supervisor.children, supervisor.start(), strict=True):
            started[child.spec.role, child.spec.id] = launch(child.spec, message.epoch)

        import trio  # only now: the children import their libraries meanwhile

        from penstock.core.processes.root import Root, complain

        root = Root(
            config,
            supervisor,
            launch=launch,
            started=started,
            ready=lambda message: ready_lines(config, where, message, also),
            tables=tables,
            notes=notes,
        )
        left = trio.run(root.run)
        if left.error:
            complain(left.error)
        return left.status
    except PenstockError as error:
        print(f"penstock: {error.message}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # before root listens to signals
        return 128 + signal.SIGINT
    finally:
        for process, _ in started.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        if listener is not None:
            forget(config, listener)
        for sock in further.values():
            sock.close()
        if run_dir is not None:
            shutil.rmtree(run_dir, ignore_errors=True)


# ------------------------------------------------------------------ the listening socket


def bind(config: Config) -> socket.socket:
    """The listening socket of HTTP, which the edges inherit. Raises ConfigError when the place is taken or cannot be had."""
    return _bind_port(config, OPTIONS["port"], config.port) if config.uds is None else _bind_unix(config.uds)


def bind_further(config: Config) -> dict[str, socket.socket]:
    """Those of the ports beside it, by the names of their listeners. Raises as `bind`; then none is left open."""
    with contextlib.ExitStack() as opened:
        found = {option.listener: opened.enter_context(_bind_port(config, option, port)) for option, port in further_ports(config)}
        opened.pop_all()
        return found


def _bind_port(config: Config, option: Option, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, ValueError) as error:  # the latter for what no name can be
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {config.host}: the address cannot be resolved ({why}).", param="host") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart; never SO_REUSEPORT: two servers would share a port
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            hint = f"Another server runs there; choose another {option.flag} (0 picks a free one)."
            raise ConfigError(f"Port {port} on {config.host} is in use. {hint}", param=option.name) from None
        raise ConfigError(f"Cannot listen on {config.host} port {port}: {error.strerror}.", param="host") from None
    return sock


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            try:
                sock.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()  # of a server that is dead
            else:
                raise ConfigError(f"--uds {path}: another server listens there.", param="uds")
            finally:
                sock.close()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--uds {path}: cannot listen there ({error.strerror or error}).", param="uds") from None
    except ConfigError:
        sock.close()
        raise
    return sock


def forget(config: Config, listener: socket.socket) -> None:
    listener.close()
    if config.uds is not None:
        Path(config.uds).unlink(missing_ok=True)


def url_of(config: Config, listener: socket.socket) -> str:
    """The address for people: the real port, and a host that can be typed into a client."""
    return f"unix:{config.uds}" if config.uds is not None else f"http://{address_of(config, listener)}"


def address_of(config: Config, listener: socket.socket) -> str:
    """Of a port of --host."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(config.host, config.host)
    return f"{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{listener.getsockname()[1]}"


# ------------------------------------------------------------------ the runtime directory


def make_run_dir() -> Path:
    """A private directory (0700) for the sockets between processes. Those of servers that were killed are removed."""
    places = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    usable = [Path(place) for place in places if place and _fits(place) and os.access(place, os.W_OK | os.X_OK)]
    if not usable:
        raise ConfigError("No writable directory with a short path for the sockets between processes: set XDG_RUNTIME_DIR.", param=None)
    base = usable[0]
    for old in base.glob(f"{RUN_PREFIX}*"):
        _remove_if_stale(old)
    return Path(tempfile.mkdtemp(prefix=f"{RUN_PREFIX}{os.getpid()}-", dir=base))


def _fits(place: str) -> bool:
    """The other processes are told it (so it must be UTF-8), and a socket's path has few bytes."""
    return spelled(place) == place and len(os.fsencode(place)) <= LONGEST_BASE


def _remove_if_stale(path: Path) -> None:
    try:
        info = path.lstat()
        pid = int(path.name.removeprefix(RUN_PREFIX).split("-")[0])
        if info.st_uid != os.getuid() or not stat.S_ISDIR(info.st_mode):
            return
        os.kill(pid, 0)
    except ProcessLookupError:
        shutil.rmtree(path, ignore_errors=True)
    except (OSError, ValueError):
        return


# ------------------------------------------------------------------ what is said when all is up


def ready_lines(config: Config, where: str, message: Ready, also: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """What stdout gets: the engines, their memory, where to go (`also`: further listeners and their addresses), a command that works."""
    from penstock.core.processes.root import engine_lines

    lines = [line for facts in message.facts for line in engine_lines(facts)]
    name = config.served_model_name[0] if config.served_model_name else "default"
    lines += [f"{listener} on {address}" for listener, address in also.items()]
    lines.append(f"Penstock is ready: {where} (model {name}) after {message.seconds:.1f} s. Try:")
    at = f"--unix-socket {config.uds} http://localhost" if config.uds is not None else where
    key = " -H 'Authorization: Bearer YOUR-KEY'" if config.api_key or config.tables else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello! Who are you?"}}], "max_tokens": 64}}'
    lines.append(f"  curl {at}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    return lines


def __getattr__(name: str) -> Any:
    if name == "LocalServer":  # late: root must not import what it needs
        from penstock.core.processes.local import LocalServer

        return LocalServer
    raise AttributeError(name)
