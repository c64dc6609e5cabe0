"""What tokenizer_config.json changes in a fast tokenizer.

What it is: the token settings of tokenizer_config.json (and of the older special_tokens_map.json), applied to what tokenizer.json describes
as transformers 5 applies them. What it does not know: checkpoints' other files, ends of answers, chat templates.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.errors import CheckpointError

CONFIG = "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_REBUILT = ("Qwen2Tokenizer", "GPT2Tokenizer")  # classes that make the pre-tokenizer anew and ask add_prefix_space

log = logging.getLogger("penstock.tokenizers")


def apply(fast: FastTokenizer, config: dict[str, Any]) -> None:
    """Add and mark the tokens that the configuration names. Raises CheckpointError naming the field."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        known = dict(fast.get_added_tokens_decoder())
    elif isinstance(listed, dict) and all(str(token).isdecimal() for token in listed):
        known = {int(token): _token("added_tokens_decoder", item, special=False) for token, item in listed.items()}
    else:
        raise CheckpointError(f"{CONFIG}: added_tokens_decoder must be an object of token ids, but holds {listed!r:.80}.")
    named = {key: _token(key, config[key], special=True) for key in config if _is_name(key, config[key])}
    extra: Any = next((config[key] for key in _EXTRA if config.get(key)), [])
    if isinstance(extra, dict):
        named.update({key: _token(_EXTRA[0], value, special=True) for key, value in extra.items()})
        extra = []
    if not isinstance(extra, list):
        raise CheckpointError(f"{CONFIG}: {_EXTRA[0]} must be a list or an object of tokens, but holds {extra!r:.80}.")
    names = {item.content for item in named.values()}
    tokens = [_special(item) if item.content in names else item for _, item in sorted(known.items())]
    there = {item.content for item in fast.get_added_tokens_decoder().values()} | {item.content for item in tokens}
    for item in [*named.values(), *(_token(_EXTRA[0], value, special=True) for value in extra)]:
        if item.content not in there:
            there.add(item.content)
            tokens.append(item)
    if tokens:
        fast.add_tokens(tokens)
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "Qwen2Tokenizer":  # it adds its special tokens once more, without their flags
        plain = [*names, *(_token(_EXTRA[0], value, special=True).content for value in extra)]
        fast.add_tokens([AddedToken(content, special=True) for content in plain])
    begin = named.get("bos_token")
    if config.get("add_bos_token") is True and begin and fast.token_to_id(begin.content) not in fast.encode("").ids:
        log.warning("%s: add_bos_token is ignored: the post-processor of tokenizer.json writes no begin token, and it decides.", CONFIG)
    fast.encode_special_tokens = config.get("split_special_tokens") is True
    if kind in _REBUILT and config.get("add_prefix_space") is True and not _prefixes(fast):
        log.warning("%s: add_prefix_space is ignored: the pre-tokenizer of tokenizer.json says false, and it decides.", CONFIG)


def _is_name(key: str, value: Any) -> bool:
    if key in NAMED:
        return value is not None
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _token(field: str, value: Any, *, special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{CONFIG}: {field} must hold tokens (texts, or objects with 'content'), but holds {value!r:.80}.")
    flags = {key: value[key] for key in _FLAGS if isinstance(value.get(key), bool)}
    return AddedToken(value["content"], **{"special": special, **flags})


def _special(item: AddedToken) -> AddedToken:
    item.special = True
    return item


def _prefixes(fast: FastTokenizer) -> bool:
    if fast.pre_tokenizer is None:
        return False
    state = json.loads(fast.pre_tokenizer.__getstate__())
    return any(step.get("add_prefix_space") is True for step in [state, *state.get("pretokenizers", [])])
