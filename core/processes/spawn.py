"""Starting a process, and being one.

What it is: root's side (`spawn`: a socketpair as control link and lifeline, signals blocked while the child starts, nothing else inherited) and the
child's side (`main`: tie the own life to root's, ignore INT and TERM, read `Boot`, call the role's main, report how it ended).
What it does not know: what roles do (Boot names their main), restart policy (core/processes/supervisor.py).

The child dies with root by two independent means: the kernel kills it when root's main thread ends (PR_SET_PDEATHSIG; therefore root
starts children from its main thread only), and roles leave when the control link reports end of file. Frames on the control link: root sends
Boot, then Hello; the child answers with Hello. A child that fails says so in ChildDown before it leaves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from penstock.core.protocol.config import KEY_ENV
from penstock.core.protocol.control import Boot, ChildDown, ChildToRoot, Hello, Message, RootToChild
from penstock.core.protocol.errors import PenstockError, PluginFault, ProtocolError
from penstock.core.runtime.frames import FrameDecoder, encode, make_hello

QUIET = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
BOOT_S = 60.0
"""How long a child waits for Boot."""
HTTP = "http"
"""The name of the listening socket on which edges speak HTTP."""


def socket_of(run_dir: str, role: str, id: int) -> str:
    """Where a process of that role listens to its peers."""
    return str(Path(run_dir) / f"{role}-{id}.sock")


def control_hello(role: str, id: int, epoch: int) -> Hello:
    """A Hello for the control link, whose schema holds no columns (root imports no numpy)."""
    return make_hello(role, id, epoch, (RootToChild, ChildToRoot))


# ------------------------------------------------------------------ root's side


@contextlib.contextmanager
def signals_blocked(numbers: Iterable[signal.Signals] = QUIET) -> Iterator[None]:
    """Nothing is delivered inside, and what is started inside starts with the signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(boot: Boot, env: dict[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m penstock.core.processes.spawn ROLE ID EPOCH ...` and send it Boot and Hello; returns the process and root's end of the
    control link. Main thread only. Needs no loop, so that children import their libraries while root still imports its own."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-P", "-m", __name__ if __name__ != "__main__" else "penstock.core.processes.spawn"]
    command += [boot.role, str(boot.id), str(boot.epoch), str(theirs.fileno()), str(os.getpid())]
    fds = [theirs.fileno(), *boot.listeners.values()]
    with theirs, signals_blocked():
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds, env=_environment(env), close_fds=True)
        except BaseException:
            mine.close()
            raise
    with contextlib.suppress(OSError):  # it died at once: its exit will be seen
        mine.sendall(encode(boot) + encode(control_hello("root", 0, 0)))
    return process, mine


def _environment(extra: dict[str, str]) -> dict[str, str]:
    """Ours without API keys (Boot brings them to who needs them), plus `extra` where the user said nothing. A package that runs from a source
    folder is found from there by the child too."""
    env = {name: value for name, value in {**extra, **os.environ}.items() if name not in KEY_ENV}
    home = str(Path(__file__).absolute().parents[3])
    if home in (str(Path(p or ".").absolute()) for p in sys.path[:1]):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (home, env.get("PYTHONPATH", ""))))
    return env


# ------------------------------------------------------------------ the child's side


def die_with(parent: int, name: str) -> None:
    """Ask the kernel to kill this process when `parent` dies; leave at once if it is dead already. Linux only, elsewhere the lifeline does it."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ignore_signals() -> None:
    """Ctrl-C (and a terminal's end) reaches the whole process group, but it is root that decides. Then let in what was blocked during the start."""
    for number in QUIET:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET)
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # root asks for it before it ends a process that hangs


def read_boot(control: socket.socket) -> Boot:
    """The first frame, and not a byte more."""
    control.settimeout(BOOT_S)
    header = _exactly(control, 4)
    frame = header + _exactly(control, int.from_bytes(header, "little"))
    control.settimeout(None)
    messages = FrameDecoder(Boot).feed(frame)
    assert isinstance(messages[0], Boot)
    return messages[0]


def _exactly(control: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = control.recv(size - len(data))
        if not part:
            os._exit(1)  # root is gone
        data += part
    return data


def report(control: socket.socket, boot: Boot, error: BaseException) -> None:
    """Tell root why this process leaves. Best effort: root sees the exit in any case."""
    from penstock.core.processes.supervisor import failure_of

    frames: list[Message] = [
        control_hello(boot.role, boot.id, boot.epoch),
        ChildDown(role=boot.role, id=boot.id, epoch=boot.epoch, status=1, detail=failure_of(error)),
    ]
    with contextlib.suppress(OSError):
        control.settimeout(1.0)
        control.sendall(b"".join(map(encode, frames)))


def settle() -> None:
    """Called by a role when its start is over: what exists now stays, so later collections need not look at it. `main` had turned the
    collector off, which makes imports a tenth faster."""
    gc.collect()
    gc.freeze()
    gc.enable()


def root_cause(error: BaseException) -> BaseException:
    """The first leaf of an exception group: what went wrong before everything else was cancelled."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(argv: list[str] | None = None) -> None:
    """Entry of every child: ROLE ID EPOCH CONTROL_FD ROOT_PID. Does not return."""
    gc.disable()
    role, id_, _epoch, fd, parent = (argv or sys.argv[1:])[:5]
    die_with(int(parent), f"pk-{role}-{id_}")
    ignore_signals()
    control = socket.socket(fileno=int(fd))
    boot = read_boot(control)
    spare = control.dup()  # the role's loop owns `control` and may have closed it when there is something to report
    status = 1
    try:
        run: Callable[[Boot, socket.socket], int | None] = getattr(importlib.import_module(boot.module), boot.function)
        status = run(boot, control) or 0
    except BaseException as error:
        cause = root_cause(error)
        if not isinstance(cause, PenstockError) or isinstance(cause, (PluginFault, ProtocolError)):
            _log_crash(boot, error)
        report(spare, boot, cause)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no interpreter shutdown: daemon threads and device libraries may hang or crash in it


def _log_crash(boot: Boot, error: BaseException) -> None:
    from penstock.core.telemetry.logs import configure_logging

    configure_logging(boot.config.log_level, boot.config.log_format, f"{boot.role}-{boot.id}").error(
        "process failed", epoch=boot.epoch, exc_info=error
    )


if __name__ == "__main__":
    main()
