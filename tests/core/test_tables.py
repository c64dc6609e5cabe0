"""The file of --tables: what is read, and how each mistake is named."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from penstock.core.processes import kernel
from penstock.core.processes.tables_file import TablesFile
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.tables import SCOPES, KeyTable, Principal, digest_of, read_tables

DIGEST = sha256(b"sk-ada").hexdigest()


def table_of(text: str, tmp_path: Path) -> dict[str, Principal]:
    file = tmp_path / "tables.toml"
    file.write_text(text)
    notes: list[str] = []
    found = read_tables(str(file), notes.append).keys
    assert notes == []
    return found


def test_a_key_is_its_own_tenant_and_good_for_inference_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert table_of(f"[keys.ada]\nsha256 = '{DIGEST.upper()}'\n", tmp_path) == {
        digest_of(b"sk-ada"): Principal(tenant="ada", key_id="ada", scopes=frozenset({"inference"}))
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
    assert found[DIGEST] == Principal(tenant="lab", key_id="ada", tier="gold", scopes=frozenset({"inference", "metrics"}))
    assert found[digest_of(b"sk-watch")] == Principal(tenant="lab", key_id="watch", tier="none", scopes=frozenset({"metrics"}))


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
        ("[classes]\n", "the table [classes] is not supported yet"),
        ("[prices.x]\n", "the table [prices] is not supported yet"),
        ("[key.a]\n", "'key' is not a known table. Did you mean 'keys'?"),
        ("tier = 'x'\n", "'tier' is not a known table"),
        ("keys = 3\n", "'keys' must be tables [keys.NAME]"),
        ("[keys]\na = 'sk-secret'\n", "[keys]: 'a' stands outside of a table [keys.NAME]"),
        (f"[keys.a]\nsha265 = '{DIGEST}'\n", "[keys.a]: 'sha265' is not a known field. Did you mean 'sha256'?"),
        ("[keys.a]\nkey = 'sk-secret'\n", "[keys.a]: 'key' is not a known field."),
        ("[tenants.t]\nscope = ['metrics']\n", "[tenants.t]: 'scope' is not a known field. Did you mean 'scopes'?"),
        ("[tenants.t]\nweight = 2\n", "[tenants.t]: 'weight' is not a known field."),
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
