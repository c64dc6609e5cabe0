"""The files beside tokenizer.json that say what its tokens are.

What it is: tokenizer_config.json, config.json and the two older files of a checkpoint folder, read once; which class transformers makes of
them, and the special tokens that such a class has.
What it does not know: tokenizer.json's contents, ends of answers, chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from penstock.core.protocol.model_files import optional_object
from penstock.plugins.tokenizers.classes import AS_IT_IS, class_of
from penstock.plugins.tokenizers.rebuild import RECIPES
from penstock.plugins.tokenizers.settings import ADDED, CONFIG, MAP, TokenSettings, read


class Folder:
    """Raises CheckpointError naming a file that is no JSON."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = path / "tokenizer.json"
        self.config = optional_object(path / CONFIG)
        self.model = optional_object(path / "config.json") if (path / "config.json").exists() else None
        self._older, self._added = optional_object(path / MAP), optional_object(path / ADDED)
        self.kind = class_of(self.config, self.model or {}, self._byte_level) if self.tokenizer.is_file() else AS_IT_IS
        self.recipe = RECIPES.get(self.kind)

    def settings(self, described: Mapping[int, AddedToken], padding: Mapping[str, Any] | None = None) -> TokenSettings:
        """With the added tokens of tokenizer.json by id, and its padding. Raises CheckpointError naming the field."""
        named = self.recipe.named if self.recipe else {}
        own = self.recipe.own if self.recipe else {}
        return read(self.config, described, older=self._older, added=self._added, absent={**pad_token(padding), **named}, first=own)

    def _byte_level(self) -> bool:
        return '"ByteLevel"' in self.tokenizer.read_text(encoding="utf-8", errors="replace")


def pad_token(padding: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The pad token of tokenizer.json's padding, which is one where the files name none."""
    return {"pad_token": str(padding["pad_token"])} if padding and "pad_token" in padding else {}


def special_texts(path: Path) -> dict[str, str]:
    """Text of each special token that has a field ("bos_token"), as chat templates know them. Raises CheckpointError."""
    settings = Folder(path).settings({})
    return {name: text for name in settings.named if (text := settings.text(name)) is not None}
