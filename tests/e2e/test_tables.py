"""`penstock serve --tables FILE`: keys come and go while the server runs."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

CHAT = {"model": "brook", "messages": [{"role": "user", "content": "Count from 3 to 30."}], "stream": True}
LONG = {**CHAT, "max_tokens": 1500, "ignore_eos": True}
SHORT = {"model": "brook", "prompt": "one", "max_tokens": 1}


def table(name: str, key: str, *lines: str) -> str:
    return "\n".join([f"[keys.{name}]", f'sha256 = "{sha256(key.encode()).hexdigest()}"', *lines, ""])


def test_keys_come_and_go_on_sighup_and_a_broken_file_changes_nothing(starter: Any, tmp_path: Path) -> None:
    file, of_file = tmp_path / "tables.toml", tmp_path / "key"
    of_file.write_text("sk-of-a-file\n")
    of_file.chmod(0o600)
    kept = table("watch", "sk-watch", 'scopes = ["metrics"]') + "[keys.filed]\nfile = 'key'\n"
    file.write_text(kept + table("ada", "sk-ada"))
    server = starter("--tables", str(file), "--edge-workers", "2")

    def status(key: str, path: str = "/v1/models") -> int:
        """As every edge says; two of them share the socket."""
        seen = {server.client.get(path, headers={"x-api-key": key, "connection": "close"}).status_code for _ in range(8)}
        return int(seen.pop()) if len(seen) == 1 else 0

    def reload() -> None:
        os.killpg(server.process.pid, signal.SIGHUP)  # as a terminal's end would: it is root's alone

    def events(name: str) -> list[Any]:
        lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    before = {child.pid for some in server.children().values() for child in some}
    assert [status(key) for key in ("sk-ada", "sk-of-a-file", "sk-watch", "sk-bob")] == [200, 200, 403, 401]
    assert [status(key, "/metrics") for key in ("sk-ada", "sk-watch")] == [403, 200]

    with (
        server.client.stream("POST", "/v1/chat/completions", json=CHAT, headers={"x-api-key": "sk-of-a-file"}) as other,
        server.client.stream("POST", "/v1/chat/completions", json=LONG, headers={"x-api-key": "sk-ada"}) as reply,
    ):
        lines, others = reply.iter_lines(), other.iter_lines()
        next(lines), next(others)
        [engine] = server.children()["engine"]
        engine.suspend()  # nothing ends by itself meanwhile
        file.write_text(kept + table("bob", "sk-bob"))
        reload()
        assert server.until(lambda: status("sk-bob") == 200)
        assert server.until(lambda: status("sk-ada") == 401)
        last = json.loads([line for line in lines if line.startswith("data: {")][-1].removeprefix("data: "))
        engine.resume()
        assert (last["error"]["code"], "revoked" in last["error"]["message"]) == ("invalid_api_key", True)
        assert list(others)[-2:] == ["data: [DONE]", ""]

    file.write_text(table("eve", "sk-eve") + "[routes.x]\n")
    reload()
    assert server.until(lambda: bool(events("tables not loaded, the old ones stay")))
    (said,) = events("tables not loaded, the old ones stay")
    assert said["error"] == f"--tables {file}: the table [routes] is not supported yet. Leave it out."
    assert [status(key) for key in ("sk-bob", "sk-eve")] == [200, 401]
    assert [event["generation"] for event in events("tables loaded")] == [2]

    edge = server.children()["edge"][0]
    edge.kill()
    assert server.until(lambda: len({child.pid for child in server.children().get("edge", [])} - {edge.pid}) == 2)
    server.ready()
    assert server.until(lambda: status("sk-bob") == 200), "a new edge has the tables that count"
    assert status("sk-eve") == 401
    after = {child.pid for some in server.children().values() for child in some}
    assert len(before & after) == len(before) - 1, "SIGHUP ends nobody"

    for process in [psutil.Process(server.process.pid), *(child for some in server.children().values() for child in some)]:
        words = [*process.cmdline(), *process.environ().values()]
        assert not [word for word in words if "sk-" in word or sha256(b"sk-bob").hexdigest() in word]
    assert "sk-" not in server.log.read_text()
    assert server.stop() == 0


def test_limits_are_counted_once_for_all_edges_and_budgets_outlive_processes(starter: Any, tmp_path: Path) -> None:
    file = tmp_path / "tables.toml"
    keys = {name: sha256(f"sk-{name}".encode()).hexdigest() for name in ("slow", "few", "poor")}
    file.write_text(
        f"""
        [tenants.slow]
        keys_sha256 = ["{keys["slow"]}"]
        requests_per_minute = 1
        [tenants.few]
        keys_sha256 = ["{keys["few"]}"]
        concurrency = 3
        [tenants.poor]
        keys_sha256 = ["{keys["poor"]}"]
        budget_tokens = 2
        budget_period = "total"
        """
    )
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    server = starter("--tables", str(file), "--edge-workers", "2", env=env)

    def ask(key: str) -> Any:
        """On a connection of its own, so that either edge may get it."""
        return server.client.post("/v1/completions", json=SHORT, headers={"x-api-key": key, "connection": "close"})

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, ["sk-slow"] * 12))
        assert sorted(reply.status_code for reply in replies) == [200, *[429] * 11]
        for reply in replies:
            assert (reply.headers["x-ratelimit-limit-requests"], reply.headers["x-ratelimit-remaining-requests"]) == ("1", "0")
        [engine] = server.children()["engine"]
        engine.suspend()  # nothing ends meanwhile
        asked = [pool.submit(ask, "sk-few") for _ in range(12)]
        try:
            assert server.until(lambda: sum(one.done() for one in asked) == 9, timeout_s=30)
        finally:
            engine.resume()
        assert sorted(one.result().status_code for one in asked) == [200] * 3 + [429] * 9
    assert ask("sk-few").status_code == 200

    assert ask("sk-poor").status_code == 200
    assert ask("sk-poor").json()["error"]["code"] == "budget_exceeded"
    assert server.until(lambda: bool(list((tmp_path / "state").rglob("spent-*.json"))))
    [text] = server.children()["text"]
    text.kill()
    assert server.until(lambda: server.client.get("/health").status_code == 503)
    server.ready()
    assert ask("sk-poor").json()["error"]["code"] == "budget_exceeded"
    assert server.stop() == 0
    server = starter("--tables", str(file), env=env)
    refused = ask("sk-poor")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "budget_exceeded")
    assert server.stop() == 0


def test_a_hangup_without_tables_ends_the_server_as_ever(starter: Any) -> None:
    server = starter()
    children = [child for some in server.children().values() for child in some]
    server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(60) == -signal.SIGHUP
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
