"""API keys in files and in the environment: in no command line that others can read."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.core import cli
from penstock.core.processes.spawn import _environment
from penstock.core.protocol import config as cfg
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.keys import IN_COMMAND_LINE, read_keys


def keys_of(data: bytes, tmp_path: Path, mode: int = 0o600) -> tuple[list[str], list[str]]:
    file = tmp_path / "keys"
    file.write_bytes(data)
    file.chmod(mode)
    notes: list[str] = []
    return read_keys(str(file), notes.append), notes


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"a\n", ["a"]),
        (b"a", ["a"]),
        (b"# for the team\nsk-1\n\n  sk-2  \r\nsk-3 # of Ada\n#sk-4\n", ["sk-1", "sk-2", "sk-3"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"a#b,c\n", ["a#b,c"]),
        ("schlüssel\n".encode(), ["schlüssel"]),
    ],
)
def test_one_key_a_line_with_comments(tmp_path: Path, data: bytes, keys: list[str]) -> None:
    assert keys_of(data, tmp_path) == (keys, [])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"ok\nsk-1 sk-2\n", "line 2 holds more than one word"),
        (b"a\xff\n", "byte 2 is not UTF-8"),
        (b"a\x00b\n", "line 1"),
    ],
)
def test_a_wrong_file_is_named_and_its_keys_are_not(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keys_of(data, tmp_path)
    assert caught.value.param == "api_key_file"
    assert f"--api-key-file {tmp_path / 'keys'}: " in caught.value.message
    assert said in caught.value.message
    assert "sk-" not in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=f"--api-key-file {path}: the file cannot be read"):
            read_keys(str(path), print)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_a_file_that_everybody_can_read_is_warned_about(tmp_path: Path, mode: int, warned: bool) -> None:
    _, notes = keys_of(b"a\n", tmp_path, mode)
    assert [("every user" in note and "chmod 600" in note) for note in notes] == [True] * warned


def test_keys_of_file_and_option_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("b\na\n")
    file.chmod(0o600)
    notes: list[str] = []
    config = cli.load_config(None, {"api_key": ["a"], "api_key_file": [str(file)]}, notes.append)
    assert config.api_key == ["a", "b"]
    assert notes == [IN_COMMAND_LINE]
    monkeypatch.setenv("PENSTOCK_API_KEY_FILE", str(file))
    assert cli.load_config(None, {}, notes.append).api_key == ["b", "a"]
    assert len(notes) == 1


def test_keys_of_several_files_add_up(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(f"key-of-{file.name}\n")
        file.chmod(0o600)
    config = cli.load_config(None, {"api_key_file": [str(file) for file in files]}, lambda _: None)
    assert config.api_key == ["key-of-a", "key-of-b"]


def test_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setenv("VLLM_API_KEY", "one,key")
    assert cli.load_config(None, {}, notes.append).api_key == ["one,key"]
    monkeypatch.setenv("PENSTOCK_API_KEY", "a,b")
    assert cli.load_config(None, {}, notes.append).api_key == ["a", "b"]
    assert notes == []
    assert cli.load_config(None, {"api_key": ["c"]}, notes.append).api_key == ["c"]
    assert not {"VLLM_API_KEY", "PENSTOCK_API_KEY"} & _environment({}).keys()


def test_an_empty_variable_is_not_taken_for_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(ConfigError, match=r"empty: the server would be open to everybody\. --api-key is set by VLLM_API_KEY"):
        cli.load_config(None, {})


def test_keys_are_hidden_where_the_configuration_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-hidden\n")
    file.chmod(0o600)
    monkeypatch.setenv("PENSTOCK_API_KEY_FILE", str(file))
    output = CliRunner().invoke(cli.cli, ["config"]).output
    assert '"***"' in output
    assert "sk-hidden" not in output
    with pytest.raises(ConfigError) as caught:
        cfg.build({"api_key": [5, "sk-hidden"]})
    assert "sk-hidden" not in caught.value.message
