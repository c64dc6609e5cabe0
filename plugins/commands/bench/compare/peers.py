"""Whom Penstock is compared with, and how each is started and asked.

What it is: `parse` reads NAME=SPEC; `start` brings a peer up and gives a `Server` (asked over HTTP) or a `Stepped` engine (asked in its process), both of which answer a workload
with the arrival of every token. Servers listen on the loopback alone.
What it does not know: cases, turns, ratios; the other engines' code, which runs in their Pythons.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.plugins.commands.bench.client import Client, Record
from penstock.plugins.commands.bench.client import run as on_loop
from penstock.plugins.commands.bench.command import run_load
from penstock.plugins.commands.bench.compare.cases import NotMeasured
from penstock.plugins.commands.bench.compare.processes import Process
from penstock.plugins.commands.bench.server import free_port
from penstock.plugins.commands.bench.workload import Workload

OURS = "penstock"
KINDS = ("openvino", "vllm", "llama-server")
DYING_S = 2.0
"""A process's sockets are closed a moment before it has ended: where answers were cut off it may take so long to be seen."""
POLL_S = 0.1
ASIDE_S = 600.0
"""For a command that is no server: an export, a version."""
SLOTS = 16
"""Sequences at once of llama.cpp's server, each of which has a context of its own."""

VLLM_CACHE_GB = "4"
"""On a CPU it takes nine tenths of the machine's memory where it is told nothing, and others are up beside it."""

FORMS = (
    'NAME=URL (a server that runs), NAME="COMMAND {model} {port}" (started and stopped here), or openvino=PYTHON, vllm=PYTHON (of their virtual environments),'
    " llama-server=PATH; a colon and a word after these three tell two of a kind apart: openvino:int8=PYTHON"
)


class PeerFailed(Exception):
    """A peer that cannot be started or asked; its text says what happened, with the last lines of its log where there is one."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    name: str
    kind: str
    """"url", "command", OURS or one of KINDS."""
    spec: str


def parse(word: str) -> Peer:
    """Raises ValueError, whose text says what is expected."""
    name, sign, spec = word.partition("=")
    spec = spec.strip()
    if not sign or not spec or not re.fullmatch(r"[\w.+:-]+", name):
        raise ValueError(f"{word!r} is no peer: {FORMS}")
    if name == OURS:
        raise ValueError(f"{name!r} is the name of the server that peers are compared with: take another")
    if re.match(r"https?://", spec):
        Client(spec)
        return Peer(name=name, kind="url", spec=spec)
    if "{port}" in spec:
        shlex.split(spec)
        return Peer(name=name, kind="command", spec=spec)
    kind = name.partition(":")[0]
    if kind not in KINDS:
        raise ValueError(f"{spec!r} is neither a URL nor a command with {{port}}, and {kind!r} is none of {', '.join(KINDS)}: {FORMS}")
    if shutil.which(spec) is None:
        raise ValueError(
            f"{spec!r} is no program that can be run: {kind} takes {'the server of llama.cpp' if kind == 'llama-server' else 'a Python'}"
        )
    return Peer(name=name, kind=kind, spec=spec)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What all of them serve, and with what."""

    model: str
    models: Mapping[str, str]
    """By peer, where it reads the model in another form (an OpenVINO export, a GGUF file)."""
    threads: int
    longest: int
    """Tokens of the longest request."""
    serve_args: tuple[str, ...]
    folder: Path
    """Of logs and exports, removed at the end."""
    start_s: float
    turn_s: float
    say: Callable[[str], None] = lambda text: None

    def model_of(self, peer: Peer) -> str:
        return self.models.get(peer.name, self.model)


class Entrant(Protocol):
    """A peer that is up."""

    name: str
    about: str
    """Version, and how it is asked."""

    def answer(self, load: Workload) -> tuple[list[Record], float]:
        """One turn: records and wall seconds. Raises NotMeasured for a turn that failed, PeerFailed where it is not there any more."""
        ...

    def busy_s(self) -> float:
        """CPU seconds of its processes so far; 0 for a server that somebody else runs."""
        ...

    def memory_bytes(self) -> int:
        """Of its processes now; 0 as above."""
        ...

    def stop(self) -> None: ...


class Server:
    """Asked over HTTP. `process` is None where somebody else runs it."""

    def __init__(self, name: str, about: str, client: Client, process: Process | None) -> None:
        self.name, self.about = name, about
        self._client, self._process = client, process

    def answer(self, load: Workload) -> tuple[list[Record], float]:
        records, wall = on_loop(run_load(self._client, load, None, lambda: None))
        cut = any(record.error is not None and record.status in (0, 200) for record in records)
        if self._process is not None and self._process.left(DYING_S if cut else 0.0):
            raise PeerFailed(with_log("it ended while it was asked", self._process))
        return records, wall

    def busy_s(self) -> float:
        return 0.0 if self._process is None else self._process.busy_s()

    def memory_bytes(self) -> int:
        return 0 if self._process is None else self._process.memory_bytes()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


class Stepped:
    """Asked through the pipes of its worker (stepped.py)."""

    def __init__(self, name: str, process: Process, start_s: float, turn_s: float) -> None:
        self.name, self.about = name, "in process"
        self._process, self._turn_s = process, turn_s
        self._rest = b""
        hello = self._read(start_s, "it was not ready")
        self.about = ", ".join(filter(None, (hello.get("version"), hello.get("note"), "in process")))

    def answer(self, load: Workload) -> tuple[list[Record], float]:
        asked = [{"prompt": one.prompt, "output": one.output, "at": one.at} for one in load.requests]
        try:
            self._process.stdin.write(json.dumps({"requests": asked}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerFailed(with_log(f"it does not listen any more ({error})", self._process)) from None
        told = self._read(self._turn_s, "it did not answer")
        if "error" in told:
            raise NotMeasured(str(told["error"]))
        return [
            Record(
                scheduled=one.at,
                sent=one.at,
                done=times[-1] if times else 0.0,
                prompt_tokens=len(one.prompt),
                want=one.output,
                tokens=times,
                status=200,
            )
            for one, times in zip(load.requests, told["tokens"], strict=True)
        ], float(told["wall"])

    def _read(self, limit_s: float, what: str) -> dict[str, Any]:
        """One line of JSON, within the limit."""
        deadline = time.monotonic() + limit_s
        out = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise PeerFailed(with_log(f"{what} within {limit_s:.0f} s", self._process))
            data = os.read(out, 1 << 16)
            if not data:
                raise PeerFailed(with_log("it ended", self._process))
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PeerFailed(with_log(f"its worker said {line[:200]!r}", self._process))
        return found

    def busy_s(self) -> float:
        return self._process.busy_s()

    def memory_bytes(self) -> int:
        return self._process.memory_bytes()

    def stop(self) -> None:
        self._process.stop()


def with_log(what: str, process: Process) -> str:
    tail = process.tail()
    return f"{what}. Its last lines:\n{tail}" if tail else f"{what}, and its log is empty"


def start(peer: Peer, wanted: Wanted) -> Entrant:
    """Raises PeerFailed."""
    if peer.kind == "url":
        return _server(peer, peer.spec, None, wanted, "")
    log = wanted.folder / f"{re.sub(r'[^A-Za-z0-9]', '-', peer.name)}.log"
    if peer.kind == "openvino":
        folder = exported(peer, wanted)
        command = [peer.spec, str(Path(__file__).with_name("stepped.py")), peer.kind, folder, str(wanted.threads), str(wanted.longest)]
        process = Process(command, log, env=environment(peer), piped=True)
        try:
            return Stepped(peer.name, process, wanted.start_s, wanted.turn_s)
        except BaseException:
            process.stop()
            raise
    port = free_port()
    process = Process(serving(peer, wanted, port), log, env=environment(peer))
    try:
        return _server(peer, f"http://127.0.0.1:{port}", process, wanted, version(peer))
    except BaseException:
        process.stop()
        raise


def serving(peer: Peer, wanted: Wanted, port: int) -> list[str]:
    """The command of a server."""
    model, threads = wanted.model_of(peer), str(wanted.threads)
    at = ["--host", "127.0.0.1", "--port", str(port)]
    if peer.kind == OURS:
        return [sys.executable, "-m", "penstock", "serve", model, *wanted.serve_args, *at]
    if peer.kind == "vllm":
        return [peer.spec, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *at]
    if peer.kind == "llama-server":
        context = SLOTS * -(-(wanted.longest + 1) // 256) * 256
        return [peer.spec, "-m", gguf(model), *at, "-t", threads, "-tb", threads, "-np", str(SLOTS), "-c", str(context)]
    # Word by word, so that a path with spaces stays one word.
    known = {"{model}": model, "{port}": str(port), "{threads}": threads}
    return [re.sub(r"\{(?:model|port|threads)\}", lambda found: known[found.group()], word) for word in shlex.split(peer.spec)]


def environment(peer: Peer) -> dict[str, str]:
    """No engine looks for the network, and vLLM binds its threads itself: a count of somebody else's makes it many times slower."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if peer.kind == "vllm":
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            env.pop(name, None)
        env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", VLLM_CACHE_GB)
    if peer.kind == OURS:
        env.setdefault("PENSTOCK_LOG_LEVEL", "warning")
    return env


def gguf(model: str) -> str:
    """The GGUF file that llama.cpp reads: what is given, or the one in the folder. Raises PeerFailed."""
    path = Path(model)
    if path.is_file():
        return model
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return str(found[0])
    have = f"has {len(found)} of them ({', '.join(one.name for one in found)})" if found else "has none"
    raise PeerFailed(
        f"llama.cpp reads a GGUF file, and {model} {have}: name one with --peer-model NAME=FILE (convert_hf_to_gguf.py of llama.cpp writes it)"
    )


def exported(peer: Peer, wanted: Wanted) -> str:
    """The folder that OpenVINO reads: what is given if it is an export, else an export of the model, made once a run. Raises PeerFailed."""
    model = Path(wanted.model_of(peer))
    if (model / "openvino_model.xml").exists():
        return str(model)
    made = wanted.folder / "openvino"
    if (made / "openvino_model.xml").exists():
        return str(made)
    tool = Path(shutil.which(peer.spec) or peer.spec).with_name("optimum-cli")
    if not tool.exists():
        raise PeerFailed(
            f"{model} is no OpenVINO export, and {tool} is not there to make one: pip install optimum-intel there, or name an export with --peer-model {peer.name}=FOLDER"
        )
    wanted.say(f"{peer.name}: exporting {model} (kept with --peer-model {peer.name}=FOLDER of an export of your own)")
    command = [
        str(tool),
        "export",
        "openvino",
        "-m",
        str(model),
        "--task",
        "text-generation-with-past",
        "--weight-format",
        "fp16",
        str(made),
    ]
    process = Process(command, wanted.folder / "openvino-export.log", env=environment(peer))
    try:
        deadline = time.monotonic() + ASIDE_S
        while not process.left() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not (made / "openvino_model.xml").exists():
            raise PeerFailed(with_log("optimum-cli exported nothing", process))
    finally:
        process.stop()
    return str(made)


_VLLM_VERSION = "import importlib.metadata as m; print(next(d.version for n in ('vllm', 'vllm-cpu') for d in m.distributions(name=n)))"


def version(peer: Peer) -> str:
    """As the program itself says it; "" where it does not."""
    if peer.kind == OURS:
        from penstock.version import __version__

        return __version__
    if peer.kind == "vllm":
        command = [peer.spec, "-c", _VLLM_VERSION]
    elif peer.kind == "llama-server":
        command = [peer.spec, "--version"]
    else:
        return ""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"(?m)^(?:version: )?(b?\d[\w.+-]*)", said.stdout + said.stderr) if said.returncode == 0 else None
    return found.group(1) if found else ""


def _server(peer: Peer, url: str, process: Process | None, wanted: Wanted, known: str) -> Server:
    """Wait until it lists its models (servers of every kind do so, and only once they can answer)."""
    client = Client(url, key=os.environ.get("OPENAI_API_KEY") if process is None else None, timeout_s=wanted.turn_s)
    deadline = time.monotonic() + wanted.start_s
    while True:
        try:
            client.model, said = on_loop(_ready(client))
            break
        except (OSError, ValueError, LookupError, TypeError, TimeoutError) as error:
            if process is None:
                raise PeerFailed(f"no OpenAI server answers at {url} ({error})") from None
            if process.left():
                raise PeerFailed(with_log("it ended before it was ready", process)) from None
            if time.monotonic() > deadline:
                raise PeerFailed(with_log(f"it was not ready within {wanted.start_s:.0f} s", process)) from None
            time.sleep(POLL_S)
    return Server(peer.name, ", ".join(filter(None, (known or said, "HTTP"))), client, process)


async def _ready(client: Client) -> tuple[str, str]:
    """The model's name, and the version where the server has such a route."""
    for path in ("/health/ready", "/health"):  # ours, and everybody's; 404: it has no such route
        status, _ = await client.get(path)
        if status not in (200, 404):
            raise ConnectionError(f"{path} answered {status}")
    name, _ = await client.first_model()
    _, said = await client.get("/version")
    return name, str(said.get("version", "")) if isinstance(said, dict) else ""
