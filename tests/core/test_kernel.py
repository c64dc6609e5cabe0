"""What the kernel does before and around the processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import msgspec
import pytest
import trio

from penstock.core.processes import kernel
from penstock.core.processes.root import Root, memory_table
from penstock.core.processes.spawn import control_hello, read_boot, root_cause, signals_blocked, socket_of
from penstock.core.processes.supervisor import ChildSpec, Supervisor
from penstock.core.processes.tables_file import TablesFile
from penstock.core.protocol.config import Config, build
from penstock.core.protocol.control import Boot, EngineFacts, Ready, RootToChild, Tables
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.model_folder import with_model
from penstock.core.protocol.pools import PoolSpec, pools_of
from penstock.core.protocol.tables import digest_of
from penstock.core.runtime.clock import FakeClock
from penstock.core.runtime.frames import FrameDecoder, encode


def test_root_imports_nothing_heavy() -> None:
    """Not even numpy: root is the one process that must never be what runs out of memory."""
    heavy = [
        "torch",
        "numpy",
        "litestar",
        "uvicorn",
        "tokenizers",
        "transformers",
        "jinja2",
        "opentelemetry",
        "structlog",
        "rich",
        "httpx",
        "safetensors",
    ]
    code = (
        "import sys; from penstock.core.cli import build_cli; build_cli();"
        "import penstock.core.processes.kernel, penstock.core.processes.root;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_socket_is_bound_once_and_a_taken_port_is_an_error() -> None:
    config = build({"port": 0})
    first = kernel.bind(config)
    with first:
        port = first.getsockname()[1]
        assert kernel.url_of(config, first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 is in use"):
            kernel.bind(build({"port": port}))
        with socket.create_connection(("127.0.0.1", port)):
            pass  # it listens already: clients wait while the server starts
    with kernel.bind(build({"port": port})):
        pass
    with pytest.raises(ConfigError, match="cannot be resolved"):
        kernel.bind(build({"host": "no-such-host.invalid"}))
    with pytest.raises(ConfigError, match="cannot be resolved"):  # what no name can be is no OSError
        kernel.bind(build({"host": "a" * 64 + "é.invalid"}))


def test_further_ports_are_bound_too_or_none_is() -> None:
    assert kernel.bind_further(build({})) == {}
    [(name, sock)] = kernel.bind_further(build({"grpc_port": 0, "uds": "/x"})).items()
    with sock:
        port = sock.getsockname()[1]
        assert name == "grpc"
        assert kernel.address_of(build({"host": "0.0.0.0"}), sock) == f"127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 is in use.*choose another --grpc-port"):
            kernel.bind_further(build({"grpc_port": port}))


def test_a_unix_socket_replaces_a_dead_one_but_not_a_living_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    config = build({"uds": path})
    first = kernel.bind(config)
    with pytest.raises(ConfigError, match="another server listens"):
        kernel.bind(config)
    first.close()  # its file stays, as after a kill
    second = kernel.bind(config)
    assert kernel.url_of(config, second) == f"unix:{path}"
    kernel.forget(config, second)
    assert not os.path.exists(path)
    with pytest.raises(ConfigError, match="cannot listen"):
        kernel.bind(build({"uds": str(tmp_path / "no" / "folder" / "s")}))


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")])
def test_the_printed_address_can_be_used(host: str, shown: str) -> None:
    try:
        sock = kernel.bind(build({"host": host, "port": 0}))
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    with sock:
        assert kernel.url_of(build({"host": host}), sock) == f"http://{shown}:{sock.getsockname()[1]}"


def test_run_directories_are_private_and_only_dead_ones_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LONGEST_BASE", 500)  # no socket is bound in this test
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = tmp_path / f"{kernel.RUN_PREFIX}{child.pid}-abc"
    mine = tmp_path / f"{kernel.RUN_PREFIX}{os.getpid()}-abc"
    odd = tmp_path / f"{kernel.RUN_PREFIX}what"
    for folder in (dead, mine, odd):
        folder.mkdir()
    fresh = kernel.make_run_dir()
    assert fresh.parent == tmp_path
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert not dead.exists()
    assert mine.exists()
    assert odd.exists()


def test_models_are_resolved_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        with_model(build({"model": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        with_model(build({"model": str(tmp_path)}))
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = with_model(build({"model": str(folder)}))
    assert (found.model, found.served_model_name) == (str(folder), ["some-model"])
    assert with_model(build({"model": str(folder), "served_model_name": ["x", "y"]})).served_model_name == ["x", "y"]
    demo = with_model(build({}))
    assert demo.served_model_name == ["brook"]


def test_serve_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.serve(build({"model": "/no/such/folder"})) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("penstock: --model /no/such/folder: there is no such folder.")
    assert said.err.count("\n") == 1


FACTS = EngineFacts(
    model="m",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    device="cpu",
    attention="native",
    vocab_size=10,
    max_model_len=4096,
    block_size=16,
    num_blocks=3,
    max_num_seqs=4,
    max_num_batched_tokens=8,
    deterministic=True,
    fingerprint="f",
    kv_layout="l",
    weights_bytes=1 << 20,
    workspace_bytes=5,
    kv_bytes=48,
    slack_bytes=0,
)


def test_the_ready_message_holds_a_curl_line_that_a_shell_understands() -> None:
    import json
    import shlex

    ready = Ready(facts=[FACTS], first=True, seconds=1.25)
    config = build({"served_model_name": ["m"], "api_key": ["secret"]})
    lines = kernel.ready_lines(config, "http://127.0.0.1:8000", ready)
    assert "Penstock is ready: http://127.0.0.1:8000 (model m)" in lines[-2]
    words = shlex.split(lines[-1])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "m"
    assert body["messages"][0]["role"] == "user"
    assert "secret" not in "\n".join(lines)
    assert "deterministic" in lines[0]
    assert "grpc on 127.0.0.1:7" in kernel.ready_lines(config, "http://127.0.0.1:8000", ready, {"grpc": "127.0.0.1:7"})


def test_the_memory_table_adds_up_and_lines_up() -> None:
    table = memory_table(FACTS)
    assert [line.split()[0] for line in table] == ["weights", "workspace", "KV", "slack", "total"]
    assert "1,048,629" in table[-1]
    assert len({line.index(" bytes") for line in table}) == 1
    assert "3 blocks of 16 tokens" in table[2]


# ------------------------------------------------------------------ who runs


def test_one_model_is_one_pool() -> None:
    (pool,) = pools_of(build({"served_model_name": ["m", "alias"], "edge_workers": 2}))
    assert pool == PoolSpec(name="m", models=["m", "alias"], text=0, engines=[0])
    specs = kernel.child_specs(build({"edge_workers": 2}), [pool])
    assert [(spec.role, spec.id, spec.pool, spec.listeners) for spec in specs] == [
        ("engine", 0, "m", []),
        ("text", 0, "m", []),
        ("edge", 0, "", ["http"]),
        ("edge", 1, "", ["http"]),
    ]


def test_edges_inherit_further_ports() -> None:
    config = build({"grpc_port": 0})
    specs = kernel.child_specs(config, pools_of(config))
    assert [(spec.role, spec.listeners) for spec in specs] == [("engine", []), ("text", []), ("edge", ["http", "grpc"])]
    boots = [kernel.boot_of(spec, 1, config, run_dir="/r", listeners={"http": 7, "grpc": 8}, pools=pools_of(config)) for spec in specs]
    assert [boot.listeners for boot in boots] == [{}, {}, {"http": 7, "grpc": 8}]


def test_children_of_two_pools_have_their_own_names_and_sockets_and_only_edges_get_keys_and_listeners() -> None:
    pools = [
        PoolSpec(name="a", models=["a"], text=0, engines=[0]),
        PoolSpec(name="b", models=["b", "b2"], text=1, engines=[1, 2]),
    ]
    config = build({"api_key": ["secret"]})
    specs = kernel.child_specs(config, pools)
    boots = [kernel.boot_of(spec, 1, config, run_dir="/r", listeners={"http": 7, "admin": 8}, pools=pools) for spec in specs]
    assert [(spec.pool, socket_of(boot.run_dir, boot.role, boot.id)) for spec, boot in zip(specs, boots, strict=True)] == [
        ("a", "/r/engine-0.sock"),
        ("b", "/r/engine-1.sock"),
        ("b", "/r/engine-2.sock"),
        ("a", "/r/text-0.sock"),
        ("b", "/r/text-1.sock"),
        ("", "/r/edge-0.sock"),
    ]
    for boot in boots:
        assert boot.listeners == ({"http": 7} if boot.role == "edge" else {})
        assert boot.config.api_key == (["secret"] if boot.role == "edge" else [])
        assert (boot.pools, boot.texts, boot.engines) == (pools, 2, 3)


@pytest.mark.parametrize(
    ("role", "id", "why"),
    [
        ("grammar", 0, "role 'grammar' spoke on a link for edge"),
        ("text", 0, "role 'text' spoke on a link for edge"),
        ("edge", 3, "says that it is edge-3"),
    ],
)
def test_a_child_that_says_to_be_another_is_refused(role: str, id: int, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Roles are open words: root knows those of its specs, and which process it started as which."""
    supervisor = Supervisor([ChildSpec(role="edge", id=0, module="m")], clock=FakeClock(), drain_s=1.0, max_restarts=0)
    list(supervisor.start())
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(["sleep", "60"])
    root = Root(
        build({"log_format": "json"}),
        supervisor,
        launch=lambda spec, epoch: pytest.fail("nothing is started again"),
        started={("edge", 0): (child, ours)},
        ready=lambda message: [],
    )
    with ours, theirs:
        theirs.sendall(encode(control_hello(role, id, 1)))
        left = trio.run(root.run)
    assert left.status == 1
    assert child.returncode == -signal.SIGKILL
    assert why in capfd.readouterr().err


def test_edges_get_keys_and_texts_limits_when_they_start_and_after_a_hangup_even_one_that_came_too_early(tmp_path: Path) -> None:
    file = tmp_path / "tables.toml"
    file.write_text(f"[keys.a]\nsha256 = '{digest_of(b'one')}'\n")
    specs = [ChildSpec(role="edge", id=0, module="m"), ChildSpec(role="text", id=0, module="m")]
    supervisor = Supervisor(specs, clock=FakeClock(), drain_s=1.0, max_restarts=0)
    list(supervisor.start())
    pairs = [socket.socketpair() for _ in specs]
    children = [subprocess.Popen(["sleep", "60"]) for _ in specs]
    root = Root(
        build({"log_format": "json"}),
        supervisor,
        launch=lambda spec, epoch: pytest.fail("nothing is started again"),
        started={(spec.role, spec.id): (child, ours) for spec, child, (ours, _) in zip(specs, children, pairs, strict=True)},
        ready=lambda message: [],
        tables=TablesFile(str(file), pytest.fail),
    )
    edge, text = (theirs for _, theirs in pairs)
    file.write_text(f"[keys.b]\nsha256 = '{digest_of(b'two')}'\n")
    heard: list[Tables] = []

    def hear() -> None:
        """What the edge gets, up to the second reading; then everybody leaves."""
        decoder = FrameDecoder(RootToChild)
        while not heard or heard[-1].generation < 2:
            heard.extend(message for message in decoder.feed(edge.recv(1 << 16)) if isinstance(message, Tables))
        for child in children:
            child.kill()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(root.run)
            await trio.to_thread.run_sync(hear)

    with pairs[0][0], pairs[1][0], edge, text:
        edge.sendall(encode(control_hello("edge", 0, 1)))
        text.sendall(encode(control_hello("text", 0, 1)))
        with signals_blocked({signal.SIGHUP}):
            signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # it waits for root, as behind the kernel's block
            trio.run(main)
        text.setblocking(False)
        said = FrameDecoder(RootToChild).feed(text.recv(1 << 16))
    assert digest_of(b"two").encode() in heard[-1].body
    limits = [message for message in said if isinstance(message, Tables)]
    assert limits[-1].generation == 2
    assert not [message for message in limits if digest_of(b"one").encode() in message.body or digest_of(b"two").encode() in message.body]


# ------------------------------------------------------------------ being a child


def boot() -> Boot:
    return Boot(role="text", id=0, epoch=1, config=build({"port": 1}), run_dir="/r", root_pid=1, module="m")


def test_boot_is_read_to_the_byte_so_that_the_loop_gets_the_rest() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        hello = control_hello("root", 0, 0)
        ours.sendall(encode(boot()) + encode(hello))
        assert read_boot(theirs) == boot()
        assert FrameDecoder(type(hello)).feed(theirs.recv(1 << 16)) == [hello]


def test_every_configuration_survives_the_way_to_a_child() -> None:
    config = build({"api_key": ["a", "b"], "max_model_len": 100, "dtype": "half", "uds": "/x"})
    sent = msgspec.structs.replace(boot(), config=config)
    (back,) = FrameDecoder(Boot).feed(encode(sent))
    assert back.config == config
    assert isinstance(back.config, Config)


def test_signals_are_only_delayed_while_a_child_starts() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert seen == []
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_root_cause_of_nested_groups_is_the_first_leaf() -> None:
    inner = ValueError("x")
    assert root_cause(BaseExceptionGroup("g", [ExceptionGroup("h", [inner]), KeyError()])) is inner


def test_a_child_without_its_parent_leaves_at_once() -> None:
    code = "import penstock.core.processes.spawn as p; p.die_with(1, 'x') or print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_place_that_is_no_utf_8_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are told where their sockets are."""
    for name, variable in (("a\udcff", "XDG_RUNTIME_DIR"), ("b", "TMPDIR")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(kernel, "LONGEST_BASE", 1000)
    assert kernel.make_run_dir().parent == tmp_path / "b"
