"""What Python code may give as a prompt or a conversation.

What it is: vLLM's prompt shapes, singly or in a list, as Submit's fields; anything else is an error that names the argument, the place in it, and
what is allowed.
What it does not know: requests in flight, the vocabulary, chat templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import msgspec

from penstock.core.actors.text.chat import ROLES
from penstock.core.protocol.columns import Column, i32
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.sampling import check_text, check_tokens

Prompt = str | Sequence[int] | dict[str, Any]
"""A text, token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}, which may have a "cache_salt" besides."""

_PROMPT = "must be a text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"
CONVERSATION = "must be a list of messages such as {'role': 'user', 'content': text}"


def need(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise InvalidRequest(message, param=param)


def prompt_parts(prompts: Any, name: str, *, only_ids: bool = False) -> list[dict[str, Any]]:
    """Submit's fields for each of the prompts that a caller gave as its argument `name`. Raises InvalidRequest naming the wrong one."""
    wanted = "must be a list of token ids, or a list of such lists" if only_ids else f"{_PROMPT}, or a list of those"
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Mapping)):
        need(not only_ids, f"{name} {wanted}, but is {_shown(prompts)}.", name)
        return [prompt_part(prompts, name)]
    if isinstance(prompts, (bytes, bytearray, memoryview)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"{name} {wanted}, but is {_shown(prompts)}.", param=name)
    many = list(prompts)
    if many and isinstance(many[0], SupportsIndex) and not isinstance(many[0], Iterable):  # an array has an __index__ too
        return [prompt_part(many, name)]
    if only_ids:
        wrong = next((i for i, one in enumerate(many) if isinstance(one, (str, bytes, Mapping)) or not isinstance(one, Iterable)), None)
        if wrong is not None:
            raise InvalidRequest(f"{name}[{wrong}] must be a list of token ids, but is {_shown(many[wrong])}.", param=f"{name}[{wrong}]")
    return [prompt_part(prompt, f"{name}[{i}]") for i, prompt in enumerate(many)]


def prompt_part(prompt: Any, name: str) -> dict[str, Any]:
    """Submit's fields for one prompt."""
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        need(
            keys - {"cache_salt"} in ({"prompt"}, {"prompt_token_ids"}),
            f"{name} must have either the key 'prompt' or 'prompt_token_ids' and, but for 'cache_salt', no other, but has {sorted(map(str, keys))}.",
            name,
        )
        if "cache_salt" in keys:
            salt = prompt["cache_salt"]
            need(isinstance(salt, str) and salt != "", f"{name}.cache_salt must be a text that is not empty.", f"{name}.cache_salt")
            check_text(salt, f"{name}.cache_salt")
            return {**prompt_part({key: prompt[key] for key in prompt if key != "cache_salt"}, name), "cache_salt": salt}
        (key,) = keys
        prompt, name = prompt[key], f"{name}.{key}"
        if (key == "prompt") != isinstance(prompt, str):
            raise InvalidRequest(f"{name} must be {'a text' if key == 'prompt' else 'a list of token ids'}.", param=name)
    if isinstance(prompt, str):
        check_text(prompt, name)
        return {"prompt": prompt, "prompt_name": name}
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, (bytes, bytearray, memoryview)) or not isinstance(prompt, Iterable):
        raise InvalidRequest(f"{name} {_PROMPT}, but is {_shown(prompt)}.", param=name)
    return {"prompt_ids": _column(prompt, name), "prompt_name": name}


def conversation_json(messages: Any, name: str) -> bytes:
    """Submit.messages. Raises InvalidRequest for what HTTP would refuse before a template sees it."""
    need(isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)), f"{name} {CONVERSATION}.", name)
    for i, message in enumerate(messages):
        need(isinstance(message, Mapping), f"{name}[{i}] must be a message such as {{'role': 'user', 'content': text}}.", f"{name}[{i}]")
        role = message.get("role")
        known = isinstance(role, str) and role in ROLES
        need(known, f"{name}[{i}].role must be one of {', '.join(map(repr, ROLES))}, but is {_shown(role)}.", f"{name}[{i}].role")
    return json_of(list(messages), name)


def json_of(value: Any, name: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds a text that is no valid Unicode ({error.object[error.start]!a} is half of a pair).", param=name
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} cannot be written as JSON: {error}.", param=name) from None


def _shown(value: Any) -> str:
    return f"{value!a:.80}"


def _column(ids: Iterable[Any], name: str) -> Column:
    """Token ids as a column. Raises InvalidRequest for what is none; text knows the vocabulary's size."""
    listed = list(ids)
    need(bool(listed), f"{name} is empty: a prompt must have at least one token.", name)
    wrong = next((i for i, token in enumerate(listed) if type(token) is not int and not _index(token)), None)
    if wrong is not None:
        raise InvalidRequest(f"{name}[{wrong}] is {_shown(listed[wrong])}, which is no token id.", param=f"{name}[{wrong}]")
    check_tokens(listed, name, None)
    return i32(listed)


def _index(token: Any) -> bool:
    """Asked only of what is no plain int: a protocol's check takes microseconds, and a prompt may have a hundred thousand tokens."""
    return isinstance(token, SupportsIndex) and not isinstance(token, bool)
