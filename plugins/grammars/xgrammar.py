"""Grammars by xgrammar.

What it is: a Grammars over xgrammar's pushdown automata with masks prepared for each of their states (https://github.com/mlc-ai/xgrammar), for what it can
express exactly (plain.py); all else goes to llguidance, and what neither can is refused with the latter's words. What is compiled carries its
prepared masks with it, so that an engine only unpacks it. Importing the library imports torch and transformers: only a compiling process and an
engine ever do.
What it does not know: end tokens (whoever uses the mask decides about them), processes.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np

from penstock.core.contract.grammars import Matcher
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.plugins.grammars import trial
from penstock.plugins.grammars.bounds import Bounds, TameBounds, TameStarts
from penstock.plugins.grammars.keywords import check_schema, drafted
from penstock.plugins.grammars.llguidance import LlGuidance
from penstock.plugins.grammars.plain import choices, plain_ebnf, plain_lark, plain_regex, plain_schema
from penstock.plugins.grammars.spelling import spelled, whole

os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # its bindings would build an extension for torch, which is not used here

import xgrammar

MOST_KEPT = 64
"""Compiled grammars that a process keeps."""
MOST_BYTES = 8 << 20
"""Of a compiled grammar before it is packed: what an engine unpacks within `trial.PREPARE_S`, or nearly."""


class XGrammar:
    """See Grammars."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self._tokens = tokens
        self._special = special
        self._words = -(-len(tokens) // 32)
        hidden = frozenset(special)
        text = [b"" if id in hidden else token for id, token in enumerate(tokens)]
        self._end = len(tokens)  # an end token of the library's own, behind the vocabulary: ours are none of its business
        self._info = xgrammar.TokenizerInfo(
            text, xgrammar.VocabType.RAW, vocab_size=self._end + 1, stop_token_ids=[self._end], add_prefix_space=False
        )
        self._starts = TameStarts(tokens, self._words)
        self._trial = trial.Trial(tokens)
        self._kept: OrderedDict[bytes, Any] = OrderedDict()
        self._other: LlGuidance | None = None

    def _beside(self) -> LlGuidance:
        if self._other is None:
            self._other = LlGuidance(self._tokens, self._special)
        return self._other

    def compile(self, kind: str, source: str) -> bytes:
        """See Grammars."""
        try:
            made = self._compiled(kind, source)
        except UnsupportedFeature:
            return self._beside().compile(kind, source)
        except PenstockError:
            raise
        except RuntimeError:  # the library's own: it does not take it
            return self._beside().compile(kind, source)
        body = made.serialize_json().encode()
        if len(body) > MOST_BYTES:
            return self._beside().compile(kind, source)
        try:
            return self._tried(kind, body)
        except InvalidRequest:  # nothing can satisfy it, or it costs too much here
            return self._beside().compile(kind, source)

    def _tried(self, kind: str, body: bytes) -> bytes:
        """Packed, if an engine can afford it."""
        compiled = (b"X" if kind == "json" else b"x") + zlib.compress(body, 1)
        began = time.thread_time()
        matcher = self.matcher(compiled)
        trial.affordable("to be prepared", time.thread_time() - began, trial.PREPARE_S)
        out = np.zeros(self._words, np.int32)
        matcher.mask(out)
        if not out.any() and not matcher.may_end():
            raise InvalidRequest("Nothing can satisfy it.")
        self._trial.walk(matcher, out)
        return compiled

    def _compiled(self, kind: str, source: str) -> Any:
        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        if kind == "json":
            schema = drafted(json.loads(source))
            check_schema(schema)
            plain = plain_schema(spelled(schema))
            source = json.dumps(plain, ensure_ascii=False)
            return compiler.compile_json_schema(source, strict_mode=False, any_whitespace=False, separators=(", ", ": "))
        if kind == "regex":
            return compiler.compile_grammar(plain_regex(whole(source)))
        if kind == "choice":
            return compiler.compile_grammar(choices(json.loads(source)))
        if kind == "grammar":
            return compiler.compile_grammar(plain_ebnf(source) if "::=" in source else plain_lark(source))
        raise UnsupportedFeature(f"xgrammar has no grammars of the kind {kind!r}.")

    def matcher(self, compiled: bytes) -> Matcher:
        """See Grammars."""
        if compiled[:1] not in (b"x", b"X"):
            return self._beside().matcher(compiled)
        made = self._kept.pop(compiled, None)
        if made is None:
            body = zlib.decompressobj().decompress(compiled[1:], MOST_BYTES)
            made = xgrammar.CompiledGrammar.deserialize_json(body.decode(), self._info)
        self._kept[compiled] = made
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        bounds = TameBounds(self._starts) if compiled[:1] == b"X" else None
        return XgMatcher(xgrammar.GrammarMatcher(made), self._tokens, bounds)


class XgMatcher:
    """See Matcher."""

    def __init__(self, inner: Any, tokens: list[bytes], bounds: Bounds | None) -> None:
        self._inner = inner
        self._tokens = tokens
        self._bounds = bounds
        self._room: I32 = np.zeros((1, -(-(len(tokens) + 1) // 32)), np.int32)

    def fork(self) -> XgMatcher:
        """See Forks."""
        return XgMatcher(self._inner.fork(), self._tokens, None if self._bounds is None else self._bounds.copy())

    def consume(self, token: int) -> bool:
        """See Matcher."""
        if self._bounds is not None:
            self._bounds.feed(self._tokens[token])
        return bool(self._inner.accept_token(token))

    def mask(self, out: I32) -> None:
        """See Matcher."""
        self._inner.fill_next_token_bitmask(self._room)
        count = len(self._tokens)
        self._room[0, count // 32 :] &= (1 << (count % 32)) - 1
        out[:] = self._room[0, : len(out)]
        if self._bounds is not None:
            self._bounds.narrow(out, self.may_end())

    def may_end(self) -> bool:
        """See Matcher."""
        return bool(self._inner.is_completed())
