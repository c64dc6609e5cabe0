"""Grammars by llguidance.

What it is: a Grammars over llguidance's Earley parser with derivative-based lexing (https://github.com/guidance-ai/llguidance). JSON schemas go through an
allow-list first, since the library ignores keywords that it has never heard of. Its own limits bound the work of a step.
What it does not know: end tokens (whoever uses the mask decides about them), processes.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark

from penstock.core.contract import layouts
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars.bounds import Bounds, Starts
from penstock.plugins.grammars.keywords import check_schema
from penstock.plugins.grammars.layouts import Regions, lowered

WHITE = r"[\x20\x0A\x0D\x09]{0,40}"
"""White space between two parts of JSON: enough for ten levels of indentation."""
MOST_KEPT = 64
"""Compiled grammars that a process keeps."""
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/\"@!%:=,;'`])")
_DIRECTIVE = re.compile(r"^\s*%(?!ignore\b|regex\b|import\b)|%json\b|%lark\b", re.MULTILINE)


def _limits() -> Any:
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class _Tokens:
    """What llguidance wants of a tokenizer."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        hidden = {*special, len(tokens) - 1}
        self._ids = {token: id for id, token in reversed(list(enumerate(tokens))) if token and id not in hidden}
        self._longest = max(map(len, self._ids), default=0)
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        """The longest token first: how a forced text is looked at, not how it is drawn."""
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        at = 0
        while at < len(data):
            for size in range(min(self._longest, len(data) - at), 0, -1):
                token = self._ids.get(data[at : at + size])
                if token is not None:
                    ids.append(token)
                    at += size
                    break
            else:
                break  # no token begins so
        return ids


class LlGuidance:
    """See Grammars."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self._size = len(tokens)
        self._words = -(-self._size // 32)
        end = len(tokens)  # one of its own, behind the vocabulary: ours are none of its business
        wrapper = llguidance.TokenizerWrapper(_Tokens([*tokens, b"<|end|>"], [*special, end]))
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=end + 1)
        self._tokens = tokens
        self._spelt = {tokens[token].decode(errors="replace"): token for token in reversed(special) if tokens[token]}
        self._starts: Starts | None = None
        self._kept: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()

    def compile(self, kind: str, source: str) -> bytes:
        """See Grammars."""
        if kind == "layout":
            openers, made = lowered(layouts.decode(source), self._spelt, _grammar)
            compiled = b"l" + json.dumps(openers).encode() + b"\n" + made.encode()
        else:
            compiled = (b"j" if kind == "json" else b"t") + _grammar(kind, source).encode()
        matcher = self.matcher(compiled)
        out = np.zeros(self._words, np.int32)
        matcher.mask(out)
        if not out.any() and not matcher.may_end():
            raise InvalidRequest("Nothing can satisfy it.")
        return compiled

    def matcher(self, compiled: bytes) -> LlMatcher:
        """See Grammars."""
        inner = self._kept.pop(compiled, None)
        openers, _, grammar = compiled[1:].partition(b"\n") if compiled[:1] == b"l" else (b"", b"", compiled[1:])
        if inner is None:
            inner = llguidance.LLMatcher(self._tokenizer, grammar.decode(), log_level=0, limits=_limits())
            if inner.is_error():
                raise InvalidRequest(" ".join(inner.get_error().split())[:400])
        self._kept[compiled] = inner
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        bounds: Bounds | Regions | None = None
        if compiled[:1] in b"jl":
            if self._starts is None:
                self._starts = Starts(self._tokens, self._words)
            bounds = Regions(self._starts, [text.encode() for text in json.loads(openers)]) if openers else Bounds(self._starts)
        return LlMatcher(inner.deep_copy(), self._tokens, bounds)


class LlMatcher:
    """See Matcher."""

    def __init__(self, inner: llguidance.LLMatcher, tokens: list[bytes], bounds: Bounds | Regions | None) -> None:
        self._inner = inner
        self._tokens = tokens
        self._bounds = bounds
        self._room: I32 = np.zeros(-(-(len(tokens) + 1) // 32), np.int32)

    def consume(self, token: int) -> bool:
        """See Matcher."""
        if self._bounds is not None:
            self._bounds.feed(self._tokens[token])
        return bool(self._inner.consume_token(token))

    def mask(self, out: I32) -> None:
        """See Matcher. Raises ValueError where the library gives up."""
        room, size = self._room, len(self._tokens)
        self._inner.unsafe_compute_mask_ptr(room.ctypes.data, room.nbytes)
        if self._inner.is_error():
            raise ValueError(self._inner.get_error()[:200])
        room.view(np.uint32)[size // 32] &= np.uint32((1 << (size % 32)) - 1)
        out[:] = room[: len(out)]
        if self._bounds is not None:
            self._bounds.narrow(out, self.may_end())

    def may_end(self) -> bool:
        """See Matcher."""
        return bool(self._inner.is_accepting())


def _grammar(kind: str, source: str) -> str:
    """What llguidance compiles. Raises InvalidRequest or UnsupportedFeature."""
    if kind == "json":
        try:
            schema = json.loads(source)
        except ValueError as error:
            raise InvalidRequest(f"The schema is not valid JSON: {error}.") from None
        check_schema(schema)
        if schema is False:
            raise InvalidRequest("Nothing can satisfy it.")
        options: Any = {"whitespace_pattern": WHITE}
        try:
            made: str = llguidance.LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=options)
        except ValueError as error:  # a number beyond 64 bits, say
            raise InvalidRequest(f"The schema cannot be used: {error}."[:300]) from None
        return made
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(_whole(source)))
    if kind == "choice":
        choices = json.loads(source)
        return str(llguidance.LLMatcher.grammar_from_regex("|".join(_META.sub(r"\\\1", choice) for choice in choices)))
    if (found := _DIRECTIVE.search(source)) is not None:
        raise UnsupportedFeature(f"The grammar's directive {found[0].strip()!r} is not supported.")
    if "::=" in source:
        try:
            source = gbnf_to_lark(source)
        except Exception as error:  # its own are no more than Exception
            raise InvalidRequest(f"The grammar is no GBNF: {error}."[:300]) from None
    return str(llguidance.LLMatcher.grammar_from_lark(source))


def _whole(source: str) -> str:
    """An expression is for the whole answer, with or without anchors at its ends."""
    if source.startswith("^") and "|" not in source:
        source = source[1:]
    if source.endswith("$") and not source.endswith("\\$") and "|" not in source:
        source = source[:-1]
    return source
