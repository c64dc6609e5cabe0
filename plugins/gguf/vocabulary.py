"""The vocabulary in a GGUF file: texts, kinds and special tokens, and the file's chat templates.

What it is: the fields `tokenizer.*`, typed and checked, as tokenizers and renderers ask for them.
What it does not know: how texts become tokens, templates' language.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.plugins.gguf.container import GgufFile, Texts, decoded, shown

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""
LONGEST = 4096
"""Characters of a token; the longest that models have are runs of some hundred blanks."""
NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Hugging Face's names of special tokens -> those of the fields (one of which is spelled so)."""
ENDS = ("eos", "eot", "eom")
"""Fields of the tokens that end an answer."""
ENDS_BY_TEXT = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eom_id|>", "<end_of_turn>")
"""Control tokens that end an answer whatever fields say, as llama.cpp has it: a file has no list of them."""
PREFIX = "tokenizer.ggml."
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


class Vocabulary:
    """Raises CheckpointError naming a field that is missing or wrong."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = self.text("model")
        tokens = self._texts("tokens")
        if not len(tokens):
            raise self.wrong("tokens", "holds none")
        self.tokens = self._decoded("tokens", tokens)
        long = next((index for index, token in enumerate(self.tokens) if len(token) > LONGEST), None)
        if long is not None:
            raise self.wrong("tokens", f"holds a token of {len(self.tokens[long])} characters, as {long}")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(index for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.wrong("tokens", f"has {shown(self.tokens[twice])} twice, as {twice} and {self.ids[self.tokens[twice]]}")
        kinds = self._numbers("token_type", np.integer)
        self.kinds: list[int] = [NORMAL] * len(self.tokens) if kinds is None else kinds

    def key(self, name: str) -> str:
        return PREFIX + name

    def wrong(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.name}: '{self.key(name)}' {why}.", param=self.key(name))

    def refuse(self, name: str, why: str) -> UnsupportedFeature:
        return UnsupportedFeature(f"{self.file.name}: '{self.key(name)}' {why}", param=self.key(name))

    def text(self, name: str, default: str | None = None) -> str:
        value = self.file.fields.get(self.key(name), default)
        if not isinstance(value, str):
            raise self.wrong(name, "is missing" if value is None else f"must be a text, but is {shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.file.fields.get(self.key(name), default)
        if not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, but is {shown(value)}")
        return value

    def token(self, name: str) -> int | None:
        """The id in the field `name`_token_id, or None: there is none."""
        field = f"{name}_token_id"
        value = self.file.fields.get(self.key(field))
        if value is None or value == 0xFFFFFFFF or value == -1:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.wrong(field, f"must be one of the {len(self.tokens)} tokens, but is {shown(value)}")
        return value

    def scores(self) -> list[float]:
        """One a token."""
        found = self._numbers("scores", np.floating)
        if found is None:
            raise self.wrong("scores", "is missing")
        return found

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in order of rank."""
        pairs: list[tuple[str, str]] = []
        ids = self.ids
        for index, merge in enumerate(self._decoded("merges", self._texts("merges"))):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise self.wrong("merges", f"must hold pairs with one blank between them, but merge {index} is {shown(merge)}")
            if left not in ids or right not in ids or left + right not in ids:
                raise self.wrong("merges", f"holds {shown(merge)} as merge {index}, and these or what they make are no tokens")
            pairs.append((left, right))
        return pairs

    def special(self) -> dict[str, str]:
        """Hugging Face's names of the special tokens that there are, and their texts."""
        ids = ((name, self.token(field)) for name, field in NAMED.items())
        return {name: self.tokens[token] for name, token in ids if token is not None}

    def ends(self) -> list[int]:
        """Tokens that end an answer, the file's own end token first."""
        named = [token for field in ENDS if (token := self.token(field)) is not None]
        known = [self.ids[text] for text in ENDS_BY_TEXT if text in self.ids and self.kinds[self.ids[text]] == CONTROL]
        return list(dict.fromkeys([*named, *known]))

    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        fields: dict[str, Any] = self.file.fields
        found: dict[str, str] = {}
        if TEMPLATE in fields:
            found["default"] = fields[TEMPLATE]
        names = fields.get(TEMPLATES)
        if names is None:
            names = ()
        elif not isinstance(names, Texts):
            raise CheckpointError(f"{self.file.name}: '{TEMPLATES}' must be a list of texts, but is {shown(names)}.", param=TEMPLATES)
        for raw in names:
            name = decoded(raw, f"{self.file.name}: '{TEMPLATES}'")
            key = f"{TEMPLATE}.{name}"
            if key not in fields:
                raise CheckpointError(f"{self.file.name}: '{key}' is missing, which '{TEMPLATES}' names.", param=key)
            found[name] = fields[key]
        wrong = next((name for name, template in found.items() if not isinstance(template, str)), None)
        if wrong is not None:
            raise CheckpointError(f"{self.file.name}: the chat template {shown(wrong)} is no text.", param=TEMPLATE)
        return found

    def _decoded(self, name: str, texts: Texts) -> list[str]:
        found: list[str] = []
        try:
            for raw in texts:
                found.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise self.wrong(name, f"holds what is no UTF-8, as {len(found)}: the file is damaged") from None
        return found

    def _texts(self, name: str) -> Texts:
        value = self.file.fields.get(self.key(name))
        if not isinstance(value, Texts):
            raise self.wrong(name, "is missing" if value is None else "must be a list of texts")
        return value

    def _numbers(self, name: str, kind: type) -> list[Any] | None:
        value = self.file.fields.get(self.key(name))
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, kind) or len(value) != len(self.tokens):
            raise self.wrong(name, f"must hold a number for each of the {len(self.tokens)} tokens")
        found: list[Any] = value.tolist()
        return found
