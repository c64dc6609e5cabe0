"""Hugging Face fast tokenizers.

What it is: `tokenizer.json` behind the Tokenizer protocol. It reads the decoder's own description to find out whether a sequence's text is
the concatenation of its tokens' bytes (byte-level BPE; sentencepiece chains with byte fallback), and if so what each token's bytes are.
What it does not know: chat templates, streaming, requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.columns import I32, i32_by_pieces
from penstock.core.protocol.errors import CheckpointError
from penstock.core.protocol.model_files import optional_object
from penstock.plugins.tokenizers.settings import apply

BytesOf = Callable[[str], bytes]
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet: which character stands for which byte (Radford et al. 2019, encoder.py's bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    shifted = [byte for byte in range(256) if byte not in set(plain)]
    table.update({chr(256 + index): byte for index, byte in enumerate(shifted)})
    return table


_ALPHABET = byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def bytes_rule(decoder: dict[str, Any] | None) -> BytesOf | None:
    """The bytes of a token under this decoder (tokenizer.json's "decoder"), or None if they depend on its neighbours.

    A prefix space that only the very first token of a text loses does not count: output follows a prompt.
    """
    if decoder is None:
        return None
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return _byte_level if len(steps) == 1 else None
    replacements: list[tuple[str, str]] = []
    fallback = fused = False
    for step in steps:
        kind = step.get("type")
        if kind == "Replace" and not fused and "String" in step.get("pattern", {}):
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not fused:
            replacements.append((step.get("replacement", "▁"), " "))
        elif kind == "ByteFallback" and not fused:
            fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step.get("stop", 0) == 0 and step.get("start", 0) <= 1 and step.get("content") == " ":
            pass
        else:
            return None
    if not replacements and not fallback:
        return None

    def rule(token: str) -> bytes:
        if fallback and _BYTE_TOKEN.match(token):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return rule


class HuggingFaceTokenizer:
    """See core/contract/text.py's Tokenizer. `config` is tokenizer_config.json; `eos` are further end tokens in order of authority."""

    def __init__(self, fast: FastTokenizer, config: dict[str, Any] | None = None, eos: list[int] | None = None, name: str = "") -> None:
        self._fast = fast
        self._config = config or {}
        fast.no_truncation()
        fast.no_padding()
        apply(fast, self._config)
        vocab = fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._spelling: list[str] = [""] * self.vocab_size
        for text, token in vocab.items():
            self._spelling[token] = text
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, item in added.items() if item.special)
        # The decoder's part of tokenizer.json; writing the whole of it would cost a start with a large vocabulary 0.3 s.
        self._rule = bytes_rule(json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else None)
        self.name = name
        self.bos_id = self._special("bos_token")
        own_end = self._special("eos_token")
        self.eos_ids = list(dict.fromkeys([*(eos or []), *([] if own_end is None else [own_end])]))
        # A bound on what one token can stand for, unless the tokenizer drops characters before it looks.
        swallows = fast.normalizer is not None or any(item.lstrip or item.rstrip for item in added.values())
        unknown = getattr(fast.model, "unk_token", "?") is not None and not getattr(fast.model, "byte_fallback", False)
        self.max_chars_per_token = 0 if swallows or unknown else max((len(text) for text in self._spelling), default=0)

    @classmethod
    def load(cls, model_path: str) -> HuggingFaceTokenizer:
        """From a checkpoint folder. Raises CheckpointError naming the file."""
        folder = Path(model_path)
        path = folder / "tokenizer.json"
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} cannot be read: {error}.") from None
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = optional_object(folder / name).get("eos_token_id")
            found = value if isinstance(value, list) else [] if value is None else [value]
            wrong = next((one for one in found if type(one) is not int), None)
            if wrong is not None or None in found:
                raise CheckpointError(f"{folder / name}: eos_token_id must be a token id or a list of them, but holds {wrong!r:.80}.")
            ends.extend(found)
        config = optional_object(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older file counts only beside the older kind of configuration, and then first
            config.update(optional_object(folder / "special_tokens_map.json"))
        return cls(fast, config, ends, folder.name)

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]:
        encodings = self._fast.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [i32_by_pieces(encoding.ids) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        if self._rule is not None:
            return self._rule(self._spelling[token])
        return self._fast.decode([token], skip_special_tokens=False).encode()

    def token_text(self, token: int) -> str:
        return self._spelling[token] if 0 <= token < self.vocab_size else ""

    def is_byte_exact(self) -> bool:
        return self._rule is not None

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def info(self) -> dict[str, Any]:
        return {
            **self._config,
            "tokenizer_class": self._config.get("tokenizer_class", type(self).__name__),
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_id,
            "eos_token_ids": self.eos_ids,
            "special_tokens": {self._spelling[token]: token for token in sorted(self.special_ids)},
            "byte_exact": self.is_byte_exact(),
        }

    def _special(self, name: str) -> int | None:
        value = self._config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return self._fast.token_to_id(value) if isinstance(value, str) else None
