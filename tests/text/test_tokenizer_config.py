"""tokenizer_config.json against transformers itself: the same ids, and the same tokens left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from penstock.core.protocol.errors import CheckpointError
from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

TEXT = "Hello<|end|> you"
STRIPPED = {"7": {"content": "<|end|>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "extra": {"extra_special_tokens": ["lo"]},
    "extra by name": {"extra_special_tokens": {"image_token": "lo"}},
    "additional": {"additional_special_tokens": ["lo"]},
    "own name": {"image_token": "lo"},
    "decoder": {"added_tokens_decoder": STRIPPED},
    "split": {"split_special_tokens": True},
    "bos": {"add_bos_token": True},
    "bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "new": {"pad_token": "<new>"},
    "decoder and extra": {"added_tokens_decoder": STRIPPED, "additional_special_tokens": ["lo"], "add_bos_token": True},
    "extra and split": {"extra_special_tokens": ["lo"], "split_special_tokens": True},
    "decoder and split": {"added_tokens_decoder": STRIPPED, "split_special_tokens": True},
    "decoder of Qwen": {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": STRIPPED},
}


def checkpoint(tmp_path: Path, changes: dict[str, Any], ordinary: tuple[str, ...] = ()) -> Path:
    folder = tmp_path / "brook"
    folder.mkdir()
    for path in Path(demo_folder()).glob("*.json"):
        shutil.copy(path, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    described = json.loads((folder / "tokenizer.json").read_text())
    for item in described["added_tokens"]:
        item["special"] = item["special"] and item["content"] not in ordinary
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ordinary", [(), ("<|end|>", "<|user|>", "<|bos|>")], ids=["marked", "unmarked"])
def test_ids_and_special_tokens_are_those_of_transformers(tmp_path: Path, name: str, ordinary: tuple[str, ...]) -> None:
    folder = checkpoint(tmp_path, SETTINGS[name], ordinary)
    mine, theirs = HuggingFaceTokenizer.load(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    for text in (TEXT, "Hello <|end|> <|user|>lo"):
        for special in (True, False):
            (ids,) = mine.encode_batch([text], add_special_tokens=special)
            assert ids.tolist() == theirs(text, add_special_tokens=special)["input_ids"]
    answer = [0, 1988, 7, 4, 2, 477]
    assert mine.decode(answer, skip_special_tokens=True) == theirs.decode(answer, skip_special_tokens=True)
    if "tokenizer_class" in SETTINGS[name]:
        return  # that class forgets what tokenizer.json adds and the configuration does not list: here the reserved tokens
    special_ids = {token for token, item in theirs._tokenizer.get_added_tokens_decoder().items() if item.special}
    assert mine.special_ids == special_ids


def test_a_begin_token_that_is_not_written_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    HuggingFaceTokenizer.load(str(checkpoint(tmp_path, {"add_bos_token": True})))
    assert [record.getMessage() for record in caplog.records if "add_bos_token" in record.getMessage()] == [
        "tokenizer_config.json: add_bos_token is ignored: the post-processor of tokenizer.json writes no begin token, and it decides."
    ]


@pytest.mark.parametrize("field", ["added_tokens_decoder", "extra_special_tokens", "eos_token"])
def test_what_is_no_token_is_refused_by_name(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        HuggingFaceTokenizer.load(str(checkpoint(tmp_path, {"added_tokens_decoder": STRIPPED, field: 7})))
