"""Refusing what is too large before anybody works on it.

What it is: the sizes that one prompt, one conversation and one list may have, derived from the model's context (`limits_of`), and checks that
cost next to nothing against the work that they save: lengths, and the number of items of raw JSON (`items`), which is what parsing it costs.
An edge checks raw JSON before it parses it, text checks what edges (or Python) send, the tokenizer worker checks what a template wrote.
What it does not know: HTTP, templates, what the fields mean.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from penstock.core.protocol.errors import ContextLengthExceeded, InvalidRequest, RequestTooLarge
from penstock.core.protocol.messages import Limits

LEAST_CHARS = 1 << 20
"""A text of so many characters may always be asked about: /tokenize is how people find out that a text is too long."""
CHARS_PER_TOKEN = 16
"""Texts in natural and programming languages have 1 to 5 characters a token. Beyond so many for the whole context a text is refused; memory
for tokenising one is some 150 bytes a character."""
CHARS_PER_ID = 4
"""Lists of ids that are only to be decoded or cut: as long as the text that they would be."""
ESCAPED = 12
"""The most bytes of JSON that one character can take: two \\uXXXX of a surrogate pair."""
FIELD_BYTES = 2 << 20
"""Any other field of a request: lists of tokens, tools, schemas."""
ITEMS = 200_000
"""Most values and keys in a field that is no list of ids: parsing, checking and rendering cost about a microsecond each."""
IDS = 1 << 20
"""Most token ids of one request, all prompts together, unless one prompt of the model's context has more."""
FIELDS = 256
"""Most fields of a request itself, and of an object whose fields are looked at one by one: in tables, or as a template's variables."""
ALL_FIELDS = 100_000
"""Most fields of a whole request, with those of the objects in it."""
TRANSLATED_FIELDS = 32_000
"""The same of a request that is rewritten as another API's before it is understood, which costs thrice as much and may make five fields of two."""
COUNTED = sys.maxsize
"""The same of what such a request became: what the client wrote was counted."""
PROMPTS, DECODED, CUT = ("prompt", "token_ids"), "tokens", "truncate_prompt_tokens"
"""Names of the fields that hold ids of one prompt and ids to be decoded, and of the one by which a prompt is cut."""
SMALL = 64 << 10
"""Bytes of a body that are not worth a look: whatever is in them is cheap."""


DEEPER = 160
MAYBE_DEEP = 500
"""Brackets; JSON with fewer than those is not deep."""
_nested: Any = msgspec.Raw
for _ in range(DEEPER):
    _nested = list[_nested]
_deeper: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_nested)


def limits_of(max_model_len: int, chars_per_token: int, max_prompt_chars: int | None) -> Limits:
    """`chars_per_token` is the longest token's length (Tokenizer.max_chars_per_token; 0: unknown); `max_prompt_chars` the operator's word."""
    most = max_prompt_chars or max(LEAST_CHARS, CHARS_PER_TOKEN * max_model_len)
    return Limits(
        max_model_len=max_model_len,
        max_chars=most,
        context_chars=chars_per_token * max_model_len,
        max_ids=max(max_model_len, most // CHARS_PER_ID),
    )


def check_chars(length: int, limits: Limits, param: str, *, whole: bool) -> None:
    """A text of `length` characters that is to be tokenised; `whole`: it must fit the context as it is. Raises ContextLengthExceeded (it
    cannot fit) or RequestTooLarge."""
    if whole and limits.context_chars and length > limits.context_chars:
        raise ContextLengthExceeded(
            f"The prompt has {length} characters; this model's maximum context length is {limits.max_model_len} tokens, which is at most"
            f" {limits.context_chars} characters. Please shorten it.",
            param=param,
        )
    if length > limits.max_chars:
        raise RequestTooLarge(
            f"{param} has {length} characters; this server takes texts of at most {limits.max_chars} (--max-prompt-chars). Please shorten it.",
            param=param,
        )


def check_count(length: int, limits: Limits, param: str) -> None:
    """A list of `length` token ids that is only cut or decoded. Raises RequestTooLarge."""
    if length > limits.max_ids:
        raise RequestTooLarge(f"{param} has {length} token ids; this server takes at most {limits.max_ids}. Send fewer.", param=param)


def _check_flat(name: str, count: int, limits: Limits, *, cut: bool) -> None:
    """One list of ids, which has one limit: that of `check_count` if it is only cut or decoded, else the context's (so far above it that
    counting was not worth it before)."""
    if name == DECODED or cut:
        check_count(count, limits, name)
    elif count > max(IDS, limits.max_ids):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your {name} resulted in {count} tokens."
            " Please shorten it.",
            param=name,
        )


def check_messages(count: int, most: int, param: str = "messages") -> None:
    """Raises InvalidRequest for a conversation of too many messages."""
    if count > most:
        raise InvalidRequest(
            f"{param} has {count} messages; this server takes at most {most} (--max-messages). Send fewer, or join them.", param=param
        )


def items(raw: bytes, most: int) -> int:
    """How many values and keys a piece of JSON has at most, exactly where that matters: only a piece that could have more than `most` is
    looked at closely (a comma or a brace within a string is none). Linear, and never slower than parsing it."""
    bound = 1 + raw.count(b",") + raw.count(b"{") + raw.count(b"[")
    if bound <= most:
        return bound
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # pairs first: what is left before a quote escapes it
    strings = bare.count(b'"') // 2
    if strings > 2 * most:  # a value counts, a key and its value together too
        return -(-strings // 2)
    bare = b"".join(bare.split(b'"')[::2])
    return 1 + bare.count(b",") + bare.count(b"{") + bare.count(b"[")


def fields_in(raw: bytes, most: int) -> int:
    """How many fields a piece of JSON has at most, with those of the objects in it. Only a piece that could have more than `most` is looked at more closely."""
    colons = raw.count(b":")  # each field has its colon
    if colons <= most:
        return colons
    return min(colons, raw.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') // 2)  # and its name is a string


def check_body(body: bytes, most: int = ALL_FIELDS) -> None:
    """A whole request before it is split into its fields, which costs a third of a microsecond each. Raises RequestTooLarge."""
    count = 0 if len(body) <= SMALL else fields_in(body, most)
    if count > most:
        raise RequestTooLarge(f"The request and the objects in it have {count} fields; this server takes at most {most}. Send fewer.")


def check_depth(body: bytes) -> None:
    """Raises RecursionError for JSON that is nested too deeply. The parser's own bound is how much of the interpreter's stack is left, and so is that of whatever
    parses or writes parts of it later, on more of that stack: so the parser must be able to take it DEEPER levels deeper."""
    if body.count(b"{") + body.count(b"[") >= MAYBE_DEEP:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # what else is wrong with it is said by whoever parses it
            _deeper.decode(b"".join((b"[" * DEEPER, body, b"]" * DEEPER)))


def check_fields(count: int, param: str | None = None) -> None:
    """Raises RequestTooLarge for a request, or an object in it, of too many fields, before anybody looks at each."""
    if count > FIELDS:
        raise RequestTooLarge(f"{param or 'The request'} has {count} fields; this server takes at most {FIELDS}. Send fewer.", param=param)


def check_raw(fields: Mapping[str, bytes], limits: Limits, *, known: Iterable[str], texts: Mapping[str, int]) -> None:
    """The top-level fields of a request as raw JSON, before they are parsed. `texts` are those that hold prompts, with how many prompts each
    may hold. Raises RequestTooLarge naming the field. Unknown fields are never parsed, so they may be anything."""
    for name in known:
        raw = fields.get(name)
        if raw is None or len(raw) <= SMALL:
            continue
        prompts = texts.get(name)
        if prompts is not None and raw[:1] != b'"' and b'"' not in raw:
            if name in (*PROMPTS, DECODED) and raw.count(b"[") == 1:
                _check_flat(name, raw.count(b",") + 1, limits, cut=fields.get(CUT, b"null") != b"null")
            most, what = max(IDS, limits.max_ids) + ITEMS, "token ids"
        else:
            most, what = ITEMS, "items"
            allowed = FIELD_BYTES + (0 if prompts is None else ESCAPED * limits.max_chars * prompts)
            if len(raw) > allowed:
                raise RequestTooLarge(f"{name} has {len(raw)} bytes; this server takes at most {allowed}. Send less.", param=name)
        count = items(raw, most)
        if count > most:
            raise RequestTooLarge(f"{name} has {count} {what}; this server takes at most {most}. Send fewer.", param=name)
