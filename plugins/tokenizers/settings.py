"""The special and added tokens of a checkpoint folder.

What it is: the token settings of tokenizer_config.json (and of the older special_tokens_map.json and added_tokens.json, which count where
that file has no `added_tokens_decoder`) as data, and their adding to a fast tokenizer, in the order and with the flags of transformers 5.
What it does not know: how the fast tokenizer was made, ends of answers, chat templates.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.errors import CheckpointError

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
OWN = "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Token = str | AddedToken
"""As the files have it: a text alone takes its flags from where it is added."""

log = logging.getLogger("penstock.tokenizers")


@dataclass(frozen=True)
class TokenSettings:
    """`named`: field -> token, in the order in which new ones get ids; `extra`: further special tokens; `known`: id -> token, what the
    files say is added already."""

    named: dict[str, Token]
    extra: list[Token]
    known: dict[int, AddedToken]

    def text(self, name: str) -> str | None:
        found = self.named.get(name)
        return None if found is None else text_of(found)

    def all(self) -> list[Token]:
        return [*self.named.values(), *self.extra]


def read(
    config: Mapping[str, Any],
    described: Mapping[int, AddedToken],
    *,
    older: Mapping[str, Any] | None = None,
    added: Mapping[str, Any] | None = None,
    absent: Mapping[str, str | None] | None = None,
    first: Mapping[str, str] | None = None,
) -> TokenSettings:
    """From tokenizer_config.json and the added tokens of tokenizer.json (by id), special_tokens_map.json (`older`), added_tokens.json
    (`added`), and the class's own: tokens of fields that are absent, and `first` before all others. Raises CheckpointError naming the field."""
    fields: dict[str, Any] = {key: value for key, value in config.items() if key in NAMED}
    own = {key: value for key, value in config.items() if key not in NAMED and _is_name(key, value)}
    extra: Any = config.get(EXTRA) or config.get(OLD_EXTRA)
    settled = EXTRA in config or OLD_EXTRA in config
    if isinstance(extra, dict):
        own, extra, settled = {**own, **extra}, None, False
    extra = _listed(EXTRA, extra)
    if not own and isinstance(config.get(OWN), dict):
        own = dict(config[OWN])
    front: dict[str, Any] = dict(first or {})
    if config.get("added_tokens_decoder") is None:
        for key, value in (older or {}).items():
            if key == EXTRA:
                if isinstance(value, dict):
                    own.update(value)
                elif value:
                    extra, settled = [*extra, *(item for item in _listed(EXTRA, value) if item not in extra)], True
            elif key in NAMED:
                fields[key] = _marked(value)
            elif _is_name(key, value):
                front[key] = _marked(value)
    marked = {text_of(_token(key, value)) for key, value in fields.items() if value}
    marked |= {text_of(_token(EXTRA, value)) for value in extra if settled}
    if not settled and config.get("added_tokens_decoder") is None:
        extra = _listed(OLD_EXTRA, (older or {}).get(OLD_EXTRA))
    if first and not settled:
        extra = [*extra, *(front[key] for key in first)]
    extras = [_token(EXTRA, value) for value in extra]
    known = _known(config, described, added or {}, marked)
    by_text = {item.content: item for item in known.values()}
    named: dict[str, Token] = {}
    for key in NAMED:
        given = fields.get(key) if key in fields else (absent or {}).get(key)
        if given is not None:
            token = _token(key, given)
            named[key] = by_text.get(text_of(token), token) if key in fields else token
    named.update({key: _token(key, value) for key, value in [*front.items(), *own.items()]})
    return TokenSettings(named, extras, known)


def _known(
    config: Mapping[str, Any], described: Mapping[int, AddedToken], added: Mapping[str, Any], special: set[str]
) -> dict[int, AddedToken]:
    listed = config.get("added_tokens_decoder")
    if listed is None:
        if not all(type(token) is int for token in added.values()):
            raise CheckpointError(f"{ADDED} must be an object of tokens and their ids, but holds {dict(added)!r:.80}.")
        older = {token: AddedToken(text, special=text in special, normalized=text not in special) for text, token in added.items()}
        return {**older, **described}
    if not isinstance(listed, dict) or not all(str(token).isdecimal() for token in listed):
        raise CheckpointError(f"{CONFIG}: added_tokens_decoder must be an object of token ids, but holds {listed!r:.80}.")
    return {int(token): added_token("added_tokens_decoder", item) for token, item in listed.items()}


def apply(fast: FastTokenizer, settings: TokenSettings) -> None:
    """Add and mark the tokens. Says which of them have other ids than the files give them."""
    names = {text_of(token) for token in settings.named.values()}
    tokens: list[Token] = [copy.copy(token) for _, token in sorted(settings.known.items())]
    there = {item.content for item in fast.get_added_tokens_decoder().values()} | {text_of(token) for token in tokens}
    for token in [*settings.named.values(), *settings.extra]:
        if text_of(token) not in there and token not in tokens:
            tokens.append(token)
    made = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for item in made:
        item.special = item.special or item.content in names
    if made:
        fast.add_tokens(made)
    moved = [(item.content, fast.token_to_id(item.content), token) for token, item in settings.known.items()]
    lines = [f"{text!r} is {own}, not {token}" for text, own, token in moved if own != token]
    if lines:
        log.warning("%d added tokens get other ids than the files say, as in transformers: %s", len(lines), "; ".join(lines[:5]))


def _listed(field: str, value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{CONFIG}: {field} must be a list or an object of tokens, but holds {value!r:.80}.", param=field)
    return value or []


def _is_name(key: str, value: Any) -> bool:
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _marked(value: Any) -> Any:
    return {**value, "special": True} if isinstance(value, dict) else value


def text_of(token: Token) -> str:
    return token if isinstance(token, str) else str(token.content)


def added_token(field: str, value: Any) -> AddedToken:
    """Of an object of a token's content and flags, none of which is meant where it is absent. Raises CheckpointError naming the field."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{CONFIG}: {field} must hold tokens (objects with 'content'), but holds {value!r:.80}.", param=field)
    return AddedToken(value["content"], **{key: value[key] for key in _FLAGS if isinstance(value.get(key), bool)})


def _token(field: str, value: Any) -> Token:
    if isinstance(value, (str, AddedToken)):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(
            f"{CONFIG}: {field} must hold tokens (texts, or objects with 'content'), but holds {value!r:.80}.", param=field
        )
    return added_token(field, value if "__type" in value else {"special": True, **value})  # without, transformers refuses it
