"""Answers drawn at random under the masks of a layout, and read back by the format's own splitter."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import numpy as np

from penstock.core.actors.text.answers import Said
from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.ledger import Request
from penstock.core.contract.formats import DONE
from penstock.core.protocol.calling import Calling
from penstock.core.protocol.messages import Grammar, Submit
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.formats import BUILT_IN
from penstock.plugins.grammars.llguidance import LlGuidance

FORMATS = {spec.name: spec for spec in BUILT_IN}
MARKS = sorted({mark for spec in BUILT_IN for mark in spec.marks})
WORDS = [
    b"hello",
    b'{"',
    b'": "',
    b"123",
    b"1e5",
    b"\n\n",
    b" the",
    b", ",
    b"}}",
    b"<thi",
    b"</",
    b"tool",
    b"<f",
    b"=1>",
    b"<g=",
    "ü".encode(),
    b"name",
]
TEMPLATES = {"args": "[ARGS]", "start": "<|python_start|>", "short": "</arg_key><arg_value>"}


class Vocabulary:
    """All bytes, some words, and the formats' marks: as special tokens, or as ordinary ones."""

    def __init__(self, special: bool, words: Sequence[bytes] = WORDS) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [*words] + [mark.encode() for mark in MARKS] + [b"<end>"]
        first = self.first_mark = 256 + len(words)
        self.special = [*(range(first, first + len(MARKS)) if special else ()), len(self.tokens) - 1]
        self.known = frozenset(self.tokens)
        self.grammars = LlGuidance(self.tokens, self.special)

    def allowed(self, matcher: Any) -> list[int]:
        out = np.zeros(-(-len(self.tokens) // 32), np.int32)
        matcher.mask(out)
        found: list[int] = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
        return found

    def draw(self, grammar: Grammar, seed: int, *love: str, most: int = 600) -> tuple[str, bool]:
        """A random model's answer: (what it said, did it end). It loves letters, ends what it can, and often tries a mark, those that begin with one of `love` above all."""
        rng = random.Random(seed)
        matcher = self.grammars.matcher(self.grammars.compile(grammar.kind, grammar.source))
        said, hearts = b"", [text.encode() for text in love]
        for _ in range(most):
            ids = self.allowed(matcher)
            begun: list[int] = []
            for heart in set(hearts) - self.known:  # of several tokens
                there = next(size for size in range(len(heart) - 1, -1, -1) if said.endswith(heart[:size]))
                begun += [id for id in ids if heart.startswith(self.tokens[id], there) and rng.random() < (0.98 if there else 0.15)]
            if matcher.may_end() and not begun and (not ids or rng.random() < 0.15):
                return said.decode(errors="replace"), True
            assert ids, said
            loved = begun or [id for id in ids if self.tokens[id].startswith(tuple(hearts)) and rng.random() < 0.15]
            marks = [id for id in ids if id >= self.first_mark]
            closing = [id for id in ids if self.tokens[id][:1] in b'"}])<']
            plain = [id for id in ids if self.tokens[id].isascii() and self.tokens[id].isalpha()]
            token = rng.choice(loved or rng.choice([marks or ids, closing or ids, plain or ids, ids]))
            assert matcher.consume(token)
            said += self.tokens[token]
        return said.decode(errors="replace"), False


VOCABULARIES = {special: Vocabulary(special) for special in (True, False)}


def formats_of(name: str, reasoning: str | None = None) -> Formats:
    name, _, variant = name.partition("-")
    spec = FORMATS[name]
    thinks = spec if spec.role == "both" else FORMATS[reasoning] if reasoning else None
    return Formats(spec, thinks, TEMPLATES.get(variant, ""))


def tools_of(calling: Calling) -> bytes:
    functions = [{"name": one.name, "parameters": json.loads(one.hint or one.schema)} for one in calling.functions]
    return json.dumps([{"type": "function", "function": function} for function in functions]).encode()


def request_of(
    calling: Calling | None, answer: Grammar | None = None, *, prompt: str = "", parallel: bool = True, continues: bool = False
) -> Request:
    submit = Submit(
        key=1,
        edge=0,
        rid="r",
        kind="chat",
        model="m",
        sampling=SamplingParams(),
        messages=b"[]",
        tools=tools_of(calling) if calling is not None else b"",
        split=True,
        calling=calling,
        grammar=answer,
        parallel_calls=parallel,
        continue_final_message=continues,
    )
    request = Request(submit, submit.sampling, None, 0)  # type: ignore[arg-type]
    request.prompt_text = prompt
    return request


def read(formats: Formats, request: Request, text: str, ended: bool) -> tuple[Said, int, str]:
    """(what it said, complete calls, its reasoning): by characters, as it may come."""
    splitter = formats.splitter(request)
    assert splitter is not None
    fragments = [fragment for char in text for fragment in splitter.feed(char)] + splitter.flush(not ended)
    said = Said()
    said.take(fragments)
    return said, sum(f.channel == DONE for f in fragments), "".join(f.text for f in fragments if f.channel == 1)


def hides(formats: Formats) -> str:
    assert formats.spelling is not None
    return formats.spelling.hides[0]


def loved(formats: Formats) -> list[str]:
    """What calls begin with."""
    assert formats.spelling is not None
    begin = formats.spelling.begin + formats.spelling.before
    return [mark for mark in MARKS if begin.startswith(mark)] or [
        next((mark for mark in formats.spelling.hides if begin.startswith(mark)), begin[:1])
    ]


def verified(said: Said, calling: Calling | None, answer: Grammar | None) -> None:
    for check in said.checks(calling, answer):
        assert check.grammar.kind == "json"
        assert jsonschema_rs.validator_for(json.loads(check.grammar.source), validate_formats=True).is_valid(json.loads(check.text)), check


def follows(vocabulary: Vocabulary, matcher: Any, text: str) -> bool:
    """Special tokens first, else the longest token."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    special = [vocabulary.tokens[id] for id in vocabulary.special]
    for data in re.split(b"(" + b"|".join(map(re.escape, sorted(special, key=len, reverse=True))) + b")", text.encode()):
        at = 0
        while at < len(data):
            size = next(size for size in range(min(len(data) - at, 40), 0, -1) if data[at : at + size] in ids)
            if not matcher.consume(ids[data[at : at + size]]):
                return False
            at += size
    return True
