"""What the kernel does before and around the processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from penstock.core.processes import kernel
from penstock.core.processes.root import memory_table
from penstock.core.processes.spawn import control_hello, read_boot, root_cause, signals_blocked
from penstock.core.protocol.config import Config, build
from penstock.core.protocol.control import Boot, EngineFacts, Ready
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.model_folder import with_model
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


def test_the_memory_table_adds_up_and_lines_up() -> None:
    table = memory_table(FACTS)
    assert [line.split()[0] for line in table] == ["weights", "workspace", "KV", "slack", "total"]
    assert "1,048,629" in table[-1]
    assert len({line.index(" bytes") for line in table}) == 1
    assert "3 blocks of 16 tokens" in table[2]


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
