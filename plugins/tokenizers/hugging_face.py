"""Hugging Face fast tokenizers.

What it is: `tokenizer.json` behind the Tokenizer protocol. It reads the decoder's own description to find out whether a sequence's text is
the concatenation of its tokens' bytes (byte-level BPE; sentencepiece chains with byte fallback), and if so what each token's bytes are.
What it does not know: chat templates, streaming, requests.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.columns import I32, i32_by_pieces
from penstock.core.protocol.errors import CheckpointError
from penstock.core.protocol.model_files import optional_object
from penstock.plugins.tokenizers import settings as tokens
from penstock.plugins.tokenizers.classes import AS_IT_IS, FOREIGN, OTHER, own_code
from penstock.plugins.tokenizers.folder import Folder, pad_token
from penstock.plugins.tokenizers.rebuild import finish, mend_mistral, rebuilt
from penstock.plugins.tokenizers.settings import CONFIG, TokenSettings, added_token

log = logging.getLogger("penstock.tokenizers")
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

    def __init__(
        self,
        fast: FastTokenizer,
        config: dict[str, Any] | None = None,
        eos: list[int] | None = None,
        name: str = "",
        *,
        kind: str = AS_IT_IS,
        settings: TokenSettings | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        """`kind` is a name of classes.py; `settings` are read from `config` where they are not given; `model` is config.json."""
        config = config or {}
        if settings is None:
            settings = tokens.read(config, fast.get_added_tokens_decoder(), absent=pad_token(fast.padding))
        self._fast = fast
        self._config = {**config, **{key: tokens.text_of(token) for key, token in settings.named.items()}}
        fast.no_truncation()
        fast.no_padding()
        tokens.apply(fast, settings)
        mend_mistral(fast, config, model)
        finish(kind, fast, settings, config)
        fast.encode_special_tokens = config.get("split_special_tokens") is True
        _say_what_does_not_count(fast, config, settings)
        vocab = fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._spelling: list[str] = [""] * self.vocab_size
        for text, token in vocab.items():
            self._spelling[token] = text
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, item in added.items() if item.special)
        # An added token that is looked for in normalised text is decoded as the normaliser writes it ("▁<tool>").
        self._decoded = {token: fast.id_to_token(token) or "" for token, item in added.items() if item.normalized}
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
        path = Path(model_path)
        folder = Folder(path)
        listed: dict[int, AddedToken] = {}
        try:
            if folder.recipe is not None:
                described = json.loads(folder.tokenizer.read_text(encoding="utf-8"))
                listed = {item["id"]: added_token("added_tokens", item) for item in described.get("added_tokens") or []}
                settings = folder.settings(listed, described.get("padding"))
                fast = rebuilt(folder.recipe, described, folder.config, settings)
            else:
                fast = FastTokenizer.from_file(str(folder.tokenizer))
                settings = folder.settings(fast.get_added_tokens_decoder(), fast.padding)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises plain Exception; what is read here, whatever its shape may lead to
            raise CheckpointError(f"{folder.tokenizer} cannot be read: {error or type(error).__name__}.") from None
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = optional_object(path / name).get("eos_token_id")
            found = value if isinstance(value, list) else [] if value is None else [value]
            wrong = next((one for one in found if type(one) is not int), None)
            if wrong is not None or None in found:
                raise CheckpointError(f"{path / name}: eos_token_id must be a token id or a list of them, but holds {wrong!r:.80}.")
            ends.extend(found)
        made = cls(fast, folder.config, ends, path.name, kind=folder.kind, settings=settings, model=folder.model)
        _say_what_may_differ(folder, fast, listed)
        return made

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]:
        encodings = self._fast.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [i32_by_pieces(encoding.ids) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        if self._rule is not None:
            return self._rule(self._decoded.get(token, self._spelling[token]))
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


def _say_what_does_not_count(fast: FastTokenizer, config: dict[str, Any], settings: TokenSettings) -> None:
    begin = settings.text("bos_token")
    if config.get("add_bos_token") is True and begin and fast.token_to_id(begin) not in fast.encode("").ids:
        log.warning("%s: add_bos_token is ignored: the post-processor of tokenizer.json writes no begin token, and it decides.", CONFIG)
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
    if config.get("clean_up_tokenization_spaces") is True and (forced or type(fast.model).__name__ != "BPE"):
        log.warning("%s: clean_up_tokenization_spaces is ignored: spaces before signs stay as the tokens have them.", CONFIG)


def _say_what_may_differ(folder: Folder, fast: FastTokenizer, listed: dict[int, AddedToken]) -> None:
    path = folder.tokenizer
    if folder.kind in FOREIGN or folder.kind == OTHER:
        log.warning("%s: transformers makes %s of it, which is not reproduced here: token ids may differ from its ids.", path, folder.kind)
    if own_code(folder.config):
        log.warning("%s: auto_map names the folder's own tokenizer code, which is not run: tokenizer.json counts.", path.parent / CONFIG)
    there = {item.content for item in fast.get_added_tokens_decoder().values()}
    gone = [item.content for item in listed.values() if item.content not in there]
    if gone:
        log.warning(
            "%s: %s has no use for %d added tokens of tokenizer.json that added_tokens_decoder does not list, as in transformers: %s",
            path.parent / CONFIG,
            folder.kind,
            len(gone),
            ", ".join(map(repr, gone[:5])),
        )
