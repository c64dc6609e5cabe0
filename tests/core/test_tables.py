"""The file of --tables: what is read, and how each mistake is named."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.processes import kernel
from penstock.core.processes.spent_file import SpentFile, place_of
from penstock.core.processes.tables_file import TablesFile
from penstock.core.protocol.config import build
from penstock.core.protocol.control import Spent
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.tables import FIELDS, SCOPES, KeyTable, Principal, Read, digest_of, read_tables
from penstock.core.protocol.tenants import Price, SloClass, Tenant, TenantTable, mark_of

DIGEST = sha256(b"sk-ada").hexdigest()


def table_of(text: str, tmp_path: Path) -> dict[str, Principal]:
    file = tmp_path / "tables.toml"
    file.write_text(text)
    notes: list[str] = []
    found = read_tables(str(file), notes.append).keys.keys
    assert notes == []
    return found


def test_a_key_is_its_own_tenant_and_good_for_inference_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert table_of(f"[keys.ada]\nsha256 = '{DIGEST.upper()}'\n", tmp_path) == {
        digest_of(b"sk-ada"): Principal(tenant="ada", key_id="ada", scopes=frozenset({"inference"}), mark=mark_of(DIGEST))
    }


def test_a_key_has_what_its_tenant_has_and_its_own_word_counts_more(tmp_path: Path) -> None:
    found = table_of(
        f"""
        [tenants.lab]
        tier = "gold"
        scopes = ["inference", "metrics"]

        [keys.ada]
        sha256 = "{DIGEST}"
        tenant = "lab"

        [keys.watch]
        sha256 = "{digest_of(b"sk-watch")}"
        tenant = "lab"
        scopes = ["metrics"]
        tier = "none"
        """,
        tmp_path,
    )
    watch = digest_of(b"sk-watch")
    gold = Principal(tenant="lab", key_id="ada", tier="gold", scopes=frozenset({"inference", "metrics"}), mark=mark_of(DIGEST))
    assert found == {
        DIGEST: gold,
        watch: Principal(tenant="lab", key_id="watch", tier="none", scopes=frozenset({"metrics"}), mark=mark_of(watch)),
    }


def test_keys_may_lie_in_files_beside_the_tables_and_are_not_in_what_comes_out(tmp_path: Path) -> None:
    file = tmp_path / "of-ada"
    file.write_text("sk-new\nsk-old # until May\n")
    file.chmod(0o600)
    found = table_of("[keys.ada]\nfile = 'of-ada'\n", tmp_path)
    assert found.keys() == {digest_of(b"sk-new"), digest_of(b"sk-old")}
    assert {principal.key_id for principal in found.values()} == {"ada"}
    assert b"sk-" not in msgspec.msgpack.encode(KeyTable(keys=found))
    file.chmod(0o644)
    notes: list[str] = []
    read_tables(str(tmp_path / "tables.toml"), notes.append)
    assert "[keys.ada]: file" in notes[0]
    assert "every user of this machine" in notes[0]


LIMITS = """
[prices.brook]
input = 0.15
output = 0.6
cached = 0.075
[prices."org/other:7b"]
input = 1
output = 0
[classes.interactive]
ttft_ms = 300
itl_ms = 40.5
priority = -10
[tenants.acme]
keys_sha256 = ["%s", "%s"]
requests_per_minute = 60
tokens_per_minute = 100_000
concurrency = 8
context = 4096
models = ["brook"]
class = "interactive"
weight = 2.5
budget_tokens = 10_000_000
budget_usd = 25.5
budget_period = "day"
[keys.ops]
sha256 = "%s"
tenant = "acme"
scopes = ["metrics"]
[tenants.free]
"""


def limits_of(text: str, tmp_path: Path, **known: Any) -> tuple[Read, list[str]]:
    file = tmp_path / "tables.toml"
    file.write_text(text)
    notes: list[str] = []
    return read_tables(str(file), notes.append, **known), notes


def test_limits_go_to_text_with_marks_and_without_anything_of_a_key(tmp_path: Path) -> None:
    one, two, ops = (digest_of(name) for name in (b"sk-1", b"sk-2", b"sk-ops"))
    found, notes = limits_of(LIMITS % (one, two.upper(), ops), tmp_path, served=["brook", "other"])
    assert found.tenants.tenants["free"] == Tenant()
    assert found.tenants.tenants["acme"] == Tenant(
        requests_per_minute=60,
        tokens_per_minute=100_000,
        concurrency=8,
        context=4096,
        models=["brook"],
        klass="interactive",
        priority=-10,
        weight=2.5,
        budget_tokens=10_000_000,
        budget_pusd=25_500_000_000_000,
        budget_period="day",
    )
    assert found.tenants.marks == {mark_of(one): "acme", mark_of(two): "acme"}, "the third is not good for inference"
    assert found.tenants.prices == {
        "brook": Price(input=150_000, output=600_000, cached=75_000),
        "org/other:7b": Price(input=1_000_000, output=0, cached=1_000_000),
    }
    assert found.tenants.classes == {"interactive": SloClass(ttft_ms=300, itl_ms=40.5, priority=-10)}
    body = msgspec.msgpack.encode(found.tenants)
    assert not [digest for digest in (one, two, ops) if digest.encode() in body]
    assert msgspec.msgpack.decode(body, type=TenantTable) == found.tenants
    assert found.keys.keys[two] == Principal(
        tenant="acme", key_id=f"acme-{two[:8]}", scopes=frozenset({"inference"}), mark=mark_of(two), models=["brook"]
    )
    assert found.keys.keys[ops].key_id == "ops"
    assert [note.partition(": ")[2] for note in notes] == [
        "weight of [tenants.acme] has no effect yet",
        "names models that are not served: org/other:7b",
    ]


def test_the_pages_example_is_right_and_the_page_names_every_field(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tables.md").read_text(encoding="utf-8")
    text = page.split("```toml")[1].split("```")[0]
    text = re.sub("[0-9a-f]{4}…", lambda found: digest_of(found.group().encode()), text)
    key = tmp_path / "ci.key"
    key.write_text("sk-ci")
    key.chmod(0o600)
    found, notes = limits_of(text, tmp_path, served=["brook"])
    assert notes == []
    assert found.tenants.tenants.keys() == {"acme", "lab"}
    for fields in FIELDS.values():
        for field in fields:
            assert f"`{field}`" in page, field


def test_a_priority_that_nobody_looks_at_is_noted(tmp_path: Path) -> None:
    text = f"[classes.low]\npriority = 5\n[keys.a]\nsha256 = '{DIGEST}'\n"
    assert limits_of(text, tmp_path, policy="priority")[1] == []
    [note] = limits_of(text, tmp_path, policy="fcfs")[1]
    assert "--scheduling-policy priority" in note


def test_a_budget_in_dollars_needs_the_served_models_price(tmp_path: Path) -> None:
    text = f"[tenants.t]\nkeys_sha256 = ['{DIGEST}']\nbudget_usd = 1\n[prices.alias]\ninput = 1\noutput = 1\n"
    assert limits_of(text, tmp_path, served=["brook", "alias"])[1] == []
    with pytest.raises(ConfigError, match=re.escape('[tenants.t]: budget_usd needs what tokens cost: [prices."brook"]')):
        limits_of(text, tmp_path, served=["brook"])


def tenant(line: str) -> str:
    return f"[tenants.t]\nkeys_sha256 = ['{DIGEST}']\n{line}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (tenant(f"{name} = {value}"), f"[tenants.t]: {name} must be a whole number from 1 to ")
            for name in ("requests_per_minute", "tokens_per_minute", "concurrency", "context", "budget_tokens")
            for value in ("0", "-1", "1.0", "'5'", "true", "1_000_000_000_001")
        ),
        *(
            (tenant(f"weight = {value}"), "[tenants.t]: weight must be a number above 0")
            for value in ("0", "-1", "inf", "nan", "true", "'1'", "1e-400")
        ),
        *((tenant(f"budget_usd = {value}"), "[tenants.t]: budget_usd must be a number above 0") for value in ("0", "-0.1", "1e9", "[1]")),
        (tenant("budget_usd = 1.0000000000001"), "[tenants.t]: budget_usd must have at most twelve decimal places"),
        (tenant("budget_usd = 1"), '[tenants.t]: budget_usd needs what tokens cost: [prices."MODEL"]'),
        (tenant("budget_tokens = 1\nbudget_period = 'week'"), "[tenants.t]: budget_period must be one of day, month, total, but is 'week'"),
        (tenant("budget_period = 'day'"), "[tenants.t]: budget_period says nothing without"),
        *((tenant(f"models = {value}"), "[tenants.t]: models must be a list") for value in ("[]", "'brook'", "[1]", "['']")),
        (tenant("class = 'fast'"), "[tenants.t]: class must be the NAME of a table [classes.NAME], but is 'fast'. There is none."),
        (tenant("class = 1\n[classes.fast]"), "[tenants.t]: class must be the NAME of a table [classes.NAME], but is 1. There are fast."),
        (tenant("request_per_minute = 1"), "'request_per_minute' is not a known field. Did you mean 'requests_per_minute'?"),
        ("[tenants.t]\nkeys_sha256 = []\n", "[tenants.t]: keys_sha256 must be a list of at least one SHA-256"),
        (f"[tenants.t]\nkeys_sha256 = '{DIGEST}'\n", "[tenants.t]: keys_sha256 must be a list"),
        ("[tenants.t]\nkeys_sha256 = ['sk-secret']\n", "[tenants.t]: keys_sha256[0] must be 64 hexadecimal digits"),
        (
            f"[tenants.t]\nkeys_sha256 = ['{DIGEST}', '{DIGEST}']\n",
            "[tenants.t] keys_sha256[1] and [tenants.t] keys_sha256[0] are the same key",
        ),
        (tenant(f"[keys.a]\nsha256 = '{DIGEST}'"), "[keys.a] and [tenants.t] keys_sha256[0] are the same key"),
        ("[tenants.t]\nweight = 1\n", "it holds no [keys.NAME] and no keys_sha256"),
        ("[classes.c]\nttft = 1\n", "[classes.c]: 'ttft' is not a known field. Did you mean 'ttft_ms'?"),
        ("[classes.c]\nttft_ms = 0\n", "[classes.c]: ttft_ms must be a number above 0"),
        ("[classes.c]\nitl_ms = 'fast'\n", "[classes.c]: itl_ms must be a number above 0"),
        ("[classes.c]\npriority = 1.5\n", "[classes.c]: priority must be a whole number"),
        ("[classes.c]\npriority = 65_537\n", "[classes.c]: priority must be a whole number"),
        ("[classes.standard]\n", "[classes.standard]: that is what metrics call the class of those that have none."),
        ("[classes]\nc = 1\n", "[classes]: 'c' stands outside of a table [classes.NAME]"),
        ("[classes.'a b']\n", "[classes.a b]: the name must be letters"),
        ("[prices.x]\ninput = 1\n", '[prices."x"]: output is missing'),
        ("[prices.x]\ninput = -1\noutput = 1\n", '[prices."x"]: input must be a number from 0'),
        ("[prices.x]\ninput = 1\noutput = 0.0000001\n", '[prices."x"]: output must have at most six decimal places'),
        ("[prices.x]\ninput = 1\noutput = 1\ncache = 1\n", "'cache' is not a known field. Did you mean 'cached'?"),
    ],
)
def test_a_mistake_in_limits_is_named_with_file_table_and_field(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        limits_of(text, tmp_path)
    assert caught.value.message.startswith(f"--tables {tmp_path / 'tables.toml'}: ")
    assert said in caught.value.message
    assert "sk-" not in caught.value.message


def test_what_was_spent_outlives_the_server(tmp_path: Path) -> None:
    rows = [Spent(tenant="a", period="2026-11", tokens=5, pusd=7), Spent(tenant="b", period="", tokens=1, pusd=10**17)]
    path = tmp_path / "state" / "spent.json"
    first = SpentFile(path, pytest.fail)
    assert first.rows == []
    first.take(rows)
    later = msgspec.structs.replace(rows[0], tokens=6)
    first.take([later])
    assert SpentFile(path, pytest.fail).rows == [later, rows[1]] == first.rows
    assert [file.name for file in path.parent.iterdir()] == ["spent.json"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_file_of_what_was_spent_that_is_no_good_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "spent.json"
    path.write_text('[{"tenant": 3}]')
    notes: list[str] = []
    spent = SpentFile(path, notes.append)
    path.unlink()
    path.mkdir()
    row = Spent(tenant="a", period="", tokens=1, pusd=1)
    spent.take([row])
    assert spent.rows == [row]
    assert len(notes) == 1
    assert "is damaged: budgets begin anew" in notes[0]
    assert not list(tmp_path.glob("*.new"))


def test_each_tables_file_has_its_own_account_of_what_was_spent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert place_of("a.toml").parent == tmp_path / "penstock"
    assert place_of("a.toml") == place_of(str(tmp_path / "a.toml")) != place_of("b.toml")


def test_what_scopes_allow() -> None:
    assert [Principal(scopes=frozenset({"metrics"})).may(scope) for scope in SCOPES] == [False, True, False]
    assert all(Principal(scopes=frozenset({"admin"})).may(scope) for scope in SCOPES)
    assert all(Principal().may(scope) for scope in SCOPES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it holds no [keys.NAME]"),
        ("[keys.a\n", "it is not valid TOML"),
        ("[[[[", "it is not valid TOML"),
        ("x = " + "[" * 100_000, "it is not valid TOML"),
        ("[pools.a]\n", "the table [pools] is not supported yet"),
        ("[routes]\n", "the table [routes] is not supported yet"),
        ("[key.a]\n", "'key' is not a known table. Did you mean 'keys'?"),
        ("tier = 'x'\n", "'tier' is not a known table"),
        ("keys = 3\n", "'keys' must be tables [keys.NAME]"),
        ("[keys]\na = 'sk-secret'\n", "[keys]: 'a' stands outside of a table [keys.NAME]"),
        (f"[keys.a]\nsha265 = '{DIGEST}'\n", "[keys.a]: 'sha265' is not a known field. Did you mean 'sha256'?"),
        ("[keys.a]\nkey = 'sk-secret'\n", "[keys.a]: 'key' is not a known field."),
        ("[tenants.t]\nscope = ['metrics']\n", "[tenants.t]: 'scope' is not a known field. Did you mean 'scopes'?"),
        ("[keys.a]\n", "[keys.a]: give either sha256"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nfile = 'x'\n", "[keys.a]: give either sha256"),
        ("[keys.a]\nsha256 = 'sk-secret'\n", "[keys.a]: sha256 must be 64 hexadecimal digits"),
        ("[keys.a]\nsha256 = 5\n", "[keys.a]: sha256 must be 64 hexadecimal digits"),
        (f"[keys.a]\nsha256 = '{sha256().hexdigest()}'\n", "[keys.a]: sha256 is that of nothing"),
        ("[keys.a]\nfile = 'none'\n", "[keys.a]: file none: there is no such file"),
        ("[keys.a]\nfile = '.'\n", "[keys.a]: file .: that is a folder. Name the file in it."),
        ("[keys.a]\nfile = ['x']\n", "[keys.a]: file must be a path"),
        ("[keys.a]\nfile = 'empty'\n", "empty: it holds no key"),
        (f"[keys.'a b']\nsha256 = '{DIGEST}'\n", "[keys.a b]: the name must be letters"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\ntenant = ''\n", "[keys.a]: tenant must be letters"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\ntier = 3\n", "[keys.a]: tier must be letters"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = 'admin'\n", "[keys.a]: scopes must be a list"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = []\n", "[keys.a]: scopes must be a list"),
        (f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = [3]\n", "[keys.a]: scopes must be a list"),
        (
            f"[keys.a]\nsha256 = '{DIGEST}'\nscopes = ['metric']\n",
            "'metric' is not one of inference, metrics, admin. Did you mean 'metrics'?",
        ),
        (f"[keys.a]\nsha256 = '{DIGEST}'\n[keys.b]\nsha256 = '{DIGEST}'\n", "[keys.b] and [keys.a] are the same key"),
    ],
)
def test_a_mistake_is_named_with_file_table_and_field_and_without_any_key(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError) as caught:
        table_of(text, tmp_path)
    assert caught.value.param == "tables"
    assert caught.value.message.startswith(f"--tables {tmp_path / 'tables.toml'}: ")
    assert said in caught.value.message
    assert "sk-" not in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pipe, bytes_ = tmp_path / "pipe", tmp_path / "bytes"
    os.mkfifo(pipe)  # reading it would never end
    bytes_.write_bytes(b"a\xff")
    for path, said in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "that is a folder. Name the file in it."),
        (pipe, "no regular file"),
        (bytes_, "byte 2 is not UTF-8, as TOML must be. Save the file as UTF-8"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_tables(str(path), print)


def test_a_wrong_file_ends_the_start_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tables.toml"
    file.write_text("[routes]\n")
    assert kernel.serve(build({"port": 0, "tables": str(file)})) == 1
    said = capsys.readouterr()
    assert said.err == f"penstock: --tables {file}: the table [routes] is not supported yet. Leave it out.\n"


def test_a_reading_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "tables.toml"
    file.write_text(f"[keys.ada]\nsha256 = '{DIGEST}'\n")
    tables = TablesFile(str(file), print)
    first = tables.current
    assert first.generation == 1
    file.write_text("[keys")
    with pytest.raises(ConfigError):
        tables.read(print)
    assert tables.current is first
    file.write_text(f"[keys.bob]\nsha256 = '{digest_of(b'sk-bob')}'\n")
    second = tables.read(print)
    assert second.generation == 2
    assert msgspec.msgpack.decode(second.body, type=KeyTable).keys.keys() == {digest_of(b"sk-bob")}
