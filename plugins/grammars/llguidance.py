"""Grammars by llguidance.

What it is: a Grammars over llguidance's Earley parser with derivative-based lexing (https://github.com/guidance-ai/llguidance). JSON schemas go through an
allow-list first, since the library ignores keywords that it has never heard of. Its own limits bound the work of a step.
What it does not know: end tokens (whoever uses the mask decides about them), processes.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark

from penstock.core.contract import layouts
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.plugins.devices.host_limits import cores
from penstock.plugins.grammars import trial
from penstock.plugins.grammars.bounds import Bounds, Starts
from penstock.plugins.grammars.keywords import check_schema, drafted, free_names
from penstock.plugins.grammars.layouts import Regions, lowered
from penstock.plugins.grammars.spelling import closed_names, spelled, whole

SEPARATORS = {"item_separator": r",\x20?", "key_separator": r":\x20?", "whitespace_flexible": False}
"""White space of JSON: at most one space, after a comma and after a colon. A model that may begin new lines can fill an answer with them."""
COMPACT = {"item_separator": ",", "key_separator": ":"}
ESCAPES = 'nrbtf\\"'
"""Of texts in JSON: each character is written in one way only, so that two names are the same if they look the same."""
MOST_THREADS = 8
"""For the masks of one step: at most half of the cores. Waking more takes as long as they save."""
MOST_KEPT = 64
"""Compiled grammars that a process keeps."""
MOST_ITEMS = 6000
"""Of a row of the parser: twice what an object with `keywords.MOST_OPTIONAL` properties takes."""
STEP_ITEMS = 1_000_000
"""Of all rows that a mask looks at: up to a tenth of a second."""
LARGE = 16384
"""Bytes of a compiled grammar from which on a few masks are tried before it is taken."""
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/\"@!%:=,;'`])")
_REFUSALS = ("doesn't satisfy the grammar", "parser stopped")
"""What the library says of a token that may not follow; all else is a limit that is reached."""
_CONTROL = re.compile(r"\\u00[01][0-9a-fA-F]|\\\\(x[01]|u00|u\{|c|0|s|S)")
"""Of a schema's source: a control character, which has to be written by its number, or a pattern that may ask for one."""
_DIRECTIVE = re.compile(r"^\s*%(?!ignore\b|regex\b|import\b)|%json\b|%lark\b", re.MULTILINE)


_KEYWORDS = (
    ("oneOf constraints", "'oneOf'", "is supported only where no value can be of two of its schemas"),
    ("not disjoint", "'patternProperties'", "is supported only with patterns of which no name can have two"),
    ("min/maxProperties only", "'minProperties' or 'maxProperties'", "is supported only where all names in 'properties' are required"),
    ("lookarounds", "'pattern'", "has an anchor where it cannot be obeyed"),
    (
        "stack level exceeded",
        "'allOf' (or a $ref beside others)",
        "puts schemas together that refer to themselves: write out what they are together",
    ),
    ("circular references", "'$ref'", "leads back to itself beside other keywords or in 'allOf', and is supported alone only"),
    ("Unable to determine if regex is empty", "'pattern'", "is too complex, alone or with 'allOf', 'format' and lengths"),
    ("Pointer", "'$ref'", "points to nothing"),
)
"""What the library says of a schema, and what that means."""


def _limits() -> Any:
    return llguidance.LLParserLimits(max_lexer_states=50_000, max_items_in_row=MOST_ITEMS, step_max_items=STEP_ITEMS, verbose_errors=False)


_EXPRESSION = re.compile(
    r'invalid regex "((?:[^"\\]|\\.)*)" \(in regex\): (?:regex parse error: .*? error: (.*?) 1 \||lookarounds not supported yet; (\w+))'
)
"""What the library says of an expression: itself, and what is wrong, or which anchor it has."""
_ANCHORS = {
    "WordUnicode": "\\b",
    "WordUnicodeNegate": "\\B",
    "WordAscii": "\\b",
    "WordAsciiNegate": "\\B",
    "Start": "^",
    "StartLF": "^",
    "End": "$",
    "EndLF": "$",
}


def _limit(said: str) -> InvalidRequest:
    """The library says that it gives up."""
    if said.startswith("NoExtension"):  # there is nothing that may come
        return InvalidRequest("Nothing can satisfy it.")
    said = re.sub(r"\s*\([^)]*$", "", said.split("\n")[0].split(";")[0][:160])
    return InvalidRequest(f"It is too large or too complex: {said}. Make it smaller.")


def _expression(said: str) -> PenstockError | None:
    """What is wrong with an expression of the client's own: that of a schema's pattern was read before (ecma.py)."""
    found = _EXPRESSION.search(said)
    if found is None:
        return None
    shown = found[1].replace("\\\\", "\\").replace('\\"', '"')[:80]
    if found[2] is not None:
        kind = UnsupportedFeature if "not supported" in found[2] else InvalidRequest
        return kind(f"The expression /{shown}/ cannot be read: {found[2][:160]}.")
    anchor = _ANCHORS.get(found[3], found[3])
    return UnsupportedFeature(
        f"The expression /{shown}/ has {anchor!s} where it cannot be obeyed: ^ and $ are taken at the ends of a whole expression alone, \\b and \\B nowhere."
    )


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
        self._spelling = _Tokens([*tokens, b"<|end|>"], [*special, end])
        wrapper = llguidance.TokenizerWrapper(self._spelling)
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=end + 1)
        self._tokens = tokens
        self._spelt = {tokens[token].decode(errors="replace"): token for token in reversed(special) if tokens[token]}
        self._starts = Starts(tokens, self._words)
        self._trial = trial.Trial(tokens)
        self._kept: OrderedDict[bytes, list[llguidance.LLMatcher]] = OrderedDict()
        """Matchers at the beginning. Copies of one share its lexer and a lock: once masks are made together there are as many as threads use at once, of
        large grammars one."""
        self._turn = 0
        self._threads = min(MOST_THREADS, cores() // 2)
        self._crew: llguidance.LLExecutor | None = None
        self._room: I32 = np.zeros((0, 0), np.int32)

    def compile(self, kind: str, source: str) -> bytes:
        """See Grammars."""
        if kind == "layout":
            made = lowered(layouts.decode(source), self._spelt, _grammar)
            compiled = b"l" + json.dumps([made.openers, made.bare]).encode() + b"\n" + made.grammar.encode()
        else:
            text = _grammar(kind, source)
            compiled = (_names(json.loads(source)) if kind in layouts.JSON else b"t") + text.encode()
        began = time.thread_time()
        matcher = self.matcher(compiled)
        trial.affordable("to be prepared", time.thread_time() - began, trial.PREPARE_S)
        out = np.zeros(self._words, np.int32)
        matcher.mask(out)
        if not out.any() and not matcher.may_end():
            raise InvalidRequest("Nothing can satisfy it.")
        if len(compiled) >= LARGE:
            self._trial.walk(matcher, out)
        return compiled

    def matcher(self, compiled: bytes) -> LlMatcher:
        """See Grammars."""
        kept = self._kept.pop(compiled, [])
        openers, _, grammar = compiled[1:].partition(b"\n") if compiled[:1] == b"l" else (b"", b"", compiled[1:])
        if not kept or (self._crew is not None and len(kept) < self._threads and len(compiled) < LARGE):
            inner = llguidance.LLMatcher(self._tokenizer, grammar.decode(), log_level=0, limits=_limits())
            if inner.is_error():
                raise _wrong(" ".join(inner.get_error().split()), schema=compiled[:1] in b"jcn")
            kept.append(inner)
            which = len(kept) - 1
        else:
            self._turn += 1
            which = self._turn % len(kept)
        self._kept[compiled] = kept
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        bounds: Bounds | Regions | None = None
        if openers:
            bounds = _regions(self._starts, *json.loads(openers))
        elif compiled[:1] in b"jcn":
            bounds = Bounds(self._starts, free_names=compiled[:1] != b"n")
        made = LlMatcher(kept[which].deep_copy(), self._tokens, bounds, which)
        if compiled[:1] == b"c":
            made.spelling = self._spelling
        return made

    def masks(self, matchers: Sequence[LlMatcher], out: I32) -> dict[int, Exception]:
        """See Together."""
        failed: dict[int, Exception] = {}
        if self._threads < 2:
            for at, matcher in enumerate(matchers):
                try:
                    matcher.mask(out[at])
                except Exception as error:
                    failed[at] = error
            return failed
        if self._crew is None:
            self._crew = llguidance.LLExecutor(self._threads)
        count, width = len(matchers), -(-(self._size + 1) // 32)
        if len(self._room) < count:
            self._room = np.zeros((count, width), np.int32)
        room = self._room
        # Neighbours in the list go to the same thread: those that share a lock had better be neighbours.
        jobs = sorted(range(count), key=lambda at: matchers[at].group)
        self._crew.unsafe_compute_mask_ptr([(matchers[at]._inner, at) for at in jobs], room.ctypes.data, width * 4, len(room))
        room[:count].view(np.uint32)[:, self._size // 32] &= np.uint32((1 << (self._size % 32)) - 1)
        out[:] = room[:count, : out.shape[1]]
        for at, matcher in enumerate(matchers):
            if matcher._inner.is_error():
                failed[at] = _limit(matcher._inner.get_error())
            else:
                matcher.narrow(out[at])
        return failed


class LlMatcher:
    """See Matcher."""

    def __init__(self, inner: llguidance.LLMatcher, tokens: list[bytes], bounds: Bounds | Regions | None, group: int = 0) -> None:
        """`group`: which of the grammar's matchers `inner` is a copy of."""
        self.group = group
        self.spelling: Callable[[bytes], list[int]] | None = None
        """Where names may come to an end: how a text is spelt in tokens."""
        self._inner = inner
        self._tokens = tokens
        self._bounds = bounds
        self._room: I32 = np.zeros(-(-(len(tokens) + 1) // 32), np.int32)
        self._where = self._room.ctypes.data, self._room.nbytes
        self._last = self._room[len(tokens) // 32 :]
        """The word with the library's own end token, which is the first bit that is not ours."""

    def fork(self) -> LlMatcher:
        """See Forks."""
        other = LlMatcher(self._inner.deep_copy(), self._tokens, None if self._bounds is None else self._bounds.copy(), self.group)
        other.spelling = self.spelling
        return other

    def consume(self, token: int) -> bool:
        """See Matcher."""
        if self._bounds is not None:
            self._bounds.feed(self._tokens[token])
        if self._inner.consume_token(token):
            return True
        said = self._inner.get_error()
        if said and not any(words in said for words in _REFUSALS):
            raise _limit(said)
        return False

    def mask(self, out: I32) -> None:
        """See Matcher."""
        self._inner.unsafe_compute_mask_ptr(*self._where)
        if self._inner.is_error():
            raise _limit(self._inner.get_error())
        self._last &= (1 << (len(self._tokens) % 32)) - 1
        out[:] = self._room[: len(out)]
        self.narrow(out)

    def narrow(self, out: I32) -> None:
        """The bounds in a mask of the library's."""
        if self._bounds is not None:
            self._bounds.narrow(out, self.may_end())
        if self.spelling is not None and isinstance(self._bounds, Bounds) and self._bounds.names is not None:
            self._bounds.names.lead_on(out, self._ahead)

    def _ahead(self, text: bytes) -> I32:
        assert self.spelling is not None
        inner = self._inner.deep_copy()
        if not all(inner.consume_token(token) for token in self.spelling(text)):
            return np.zeros_like(self._room)
        room = np.zeros_like(self._room)
        inner.unsafe_compute_mask_ptr(room.ctypes.data, room.nbytes)
        room[len(self._tokens) // 32 :] &= (1 << (len(self._tokens) % 32)) - 1
        return room[: -(-len(self._tokens) // 32)]

    def may_end(self) -> bool:
        """See Matcher."""
        return bool(self._inner.is_accepting())


def _regions(starts: Starts, openers: list[str], bare: dict[str, tuple[str, str]]) -> Regions:
    return Regions(
        starts,
        [text.encode() for text in openers],
        {begin.encode(): (end.encode(), firsts.encode()) for begin, (end, firsts) in bare.items()},
    )


def _wrong(said: str, *, schema: bool) -> PenstockError:
    """What the library says of a grammar that it does not take. `schema`: it is made of a schema."""
    if not schema and (wrong := _expression(said)) is not None:
        return wrong
    said = said[:400]
    if "Regex is empty" in said:
        return InvalidRequest("Nothing can satisfy it: no text is of a 'pattern' together with its 'allOf', 'format' and lengths.")
    if said.startswith("Unsatisfiable schema"):
        return InvalidRequest(f"Nothing can satisfy it: {said.partition(': ')[2]}.")
    for words, keyword, why in _KEYWORDS:
        if words in said:
            return UnsupportedFeature(f"The schema's keyword {keyword} {why}.")
    if " not supported" in said:
        return UnsupportedFeature(said.partition(" Enable ")[0])  # what may be enabled would be approximate
    return InvalidRequest(said)


def _names(schema: Any) -> bytes:
    """How much of the names in objects has to be looked at, as the first byte of what is compiled."""
    return b"n" if not free_names(schema) else b"c" if closed_names(schema) else b"j"


def _grammar(kind: str, source: str) -> str:
    """What llguidance compiles. Raises InvalidRequest or UnsupportedFeature."""
    if kind in layouts.JSON:
        try:
            schema = drafted(json.loads(source))
        except ValueError as error:
            raise InvalidRequest(f"The schema is not valid JSON: {error}.") from None
        check_schema(schema)
        if schema is False:
            raise InvalidRequest("Nothing can satisfy it.")
        options: Any = (
            SEPARATORS
            | (COMPACT if kind == "compact_json" else {})
            | {"json_allowed_escapes": ESCAPES + ("u" if _CONTROL.search(source) else "")}
        )
        try:
            made: str = llguidance.LLMatcher.grammar_from_json_schema({} if schema is True else spelled(schema), overrides=options)
        except ValueError as error:  # a number beyond 64 bits, say
            raise InvalidRequest(f"The schema cannot be used: {error}."[:300]) from None
        return made
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(whole(source)))
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
