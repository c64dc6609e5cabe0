"""Small files of a model folder: whatever is wrong with one is a sentence that names it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.core.actors.text.resolve import generation_defaults
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.model_files import optional_object, read_object, read_text
from penstock.core.protocol.model_folder import demo_folder, with_model
from penstock.plugins.models.config import read_config
from penstock.plugins.renderers.jinja import JinjaRenderer
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": read_config,
    "generation_config.json": lambda folder: generation_defaults(build({"model": str(folder)}), str(folder)),
    "tokenizer_config.json": lambda folder: HuggingFaceTokenizer.load(str(folder)),
    "special_tokens_map.json": lambda folder: JinjaRenderer.load(str(folder), None),
    "chat_template.jinja": lambda folder: JinjaRenderer.load(str(folder), None),
}
WRONG: dict[str, tuple[bytes, str]] = {
    "Latin-1": (b'{"a": "\xe4"}', "is not UTF-8 (byte 0xe4 at 7)"),
    "nested": (b"[" * 100_000, "is nested too deeply"),
    "no JSON": (b'{"a"', "is not valid JSON"),
    "a list": (b"[]", "must hold a JSON object, not a list"),
    "a text": (b'"text"', "must hold a JSON object, not a text"),
    "null": (b"null", "must hold a JSON object, not null"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model's small files, in a folder with an odd name."""
    made = tmp_path / "folder.json"
    made.mkdir()
    for file in demo_folder().iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, made / file.name)
    return made


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_used_is_named(folder: Path, name: str, wrong: str) -> None:
    content, said = WRONG[wrong]
    if name.endswith(".jinja") and wrong != "Latin-1":
        pytest.skip("a text, not JSON")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        READERS[name](folder)
    assert str(folder / name) in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_may_be_missing_and_a_link_to_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "generation_config.json"
    assert optional_object(file) == {}
    assert not caplog.records
    file.symlink_to("gone")
    with caplog.at_level(logging.WARNING):
        assert optional_object(file) == {}
    assert f"{file} cannot be read: it is a link to gone, which does not exist" in caplog.text
    with pytest.raises(CheckpointError, match="a link to gone"):
        read_object(file)


def test_what_is_no_file_or_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "gone")
    monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=r"x cannot be read: permission denied\. Let the user that Penstock runs as"):
        optional_object(tmp_path / "x")


def test_beside_a_model_of_one_file_there_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert optional_object(file / "generation_config.json") == {}
    assert generation_defaults(build({"model": str(file)}), str(file)) == {}
    with pytest.raises(FileNotFoundError):
        read_text(file / "config.json")
    with pytest.raises(CheckpointError, match=r"does not exist \(--generation-config\)"):
        generation_defaults(build({"model": str(file), "generation_config": str(file)}), str(file))


def test_a_folder_that_may_not_be_looked_into_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"--model .*folder\.json: permission denied"):
        with_model(build({"model": str(folder)}))


def test_a_model_folder_may_be_called_like_a_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.25}')
    for options in ({}, {"generation_config": str(folder)}, {"generation_config": str(folder / "generation_config.json")}):
        assert generation_defaults(build({"model": str(folder), **options}), str(folder))["temperature"] == 0.25


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_broken_template_names_its_file(folder: Path, where: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / where).write_text("{% if %}" if where.endswith("jinja") else '{"chat_template": "{% if %}"}')
    with pytest.raises(CheckpointError, match=f"'default' in .*{where} is not valid Jinja: line 1"):
        JinjaRenderer.load(str(folder), None)


def test_a_template_that_is_none_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be a text or a list of named ones, but is 3"):
        JinjaRenderer.load(str(folder), None)


def test_generation_settings_that_are_not_obeyed_are_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "generation_config.json"
    file.write_text('{"num_beams": 4, "stop_strings": ["x"], "min_new_tokens": 0, "typical_p": 1.0, "suppress_tokens": null, "top_p": 0.5}')
    with caplog.at_level(logging.WARNING):
        assert generation_defaults(build({"model": str(folder)}), str(folder)) == {"top_p": 0.5}
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: these are not obeyed: num_beams, stop_strings. Requests may say what they want instead."
    ]
