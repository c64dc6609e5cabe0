"""The masks: which tokens each sequence with a grammar may draw next.

What it is: an actor with a thread of its own. It keeps one matcher a sequence, advances it with every token that was drawn, and makes the mask of a
step as soon as all earlier steps' tokens are known, while the device runs the step's Forward. Beams that branch take a copy of another's place along. A sequence whose grammar fails gets a mask
of zeros: it alone fails, in the device's own order.
What it does not know: grammars' languages (a plugin's), logits, what a sequence is for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from penstock.core.contract.grammars import Forks, Grammars, Matcher, Together
from penstock.core.protocol.columns import EMPTY_I32, I32, i32
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import InvalidRequest, PenstockError, described, shown, tamed
from penstock.core.protocol.messages import Drawn, GrammarClose, GrammarFailed, GrammarOpen, MaskReady, MaskRequest, Vocabulary

log = logging.getLogger("penstock.engine.masks")
Key = tuple[int, int]


class _Place:
    """A sequence's place in its grammar. `matcher` None: it has failed, or waits to be made."""

    __slots__ = ("drawn", "ends", "last", "matcher", "min_tokens", "past")

    def __init__(self, matcher: Matcher | None, ends: I32, min_tokens: int) -> None:
        self.matcher = matcher
        self.ends = ends
        self.last = frozenset(ends.tolist())
        self.min_tokens = min_tokens
        self.drawn = 0
        self.past: tuple[bytes, list[int]] | None = None
        """Of a beam whose matcher cannot be copied: its grammar, and its tokens."""

    def fork(self, grammars: Grammars) -> _Place:
        """Another beam that has come as far."""
        other = _Place(None, self.ends, self.min_tokens)
        other.drawn = self.drawn
        if self.past is not None:
            grammar, tokens = self.past
            other.past = grammar, list(tokens)
        if isinstance(self.matcher, Forks):
            other.matcher = self.matcher.fork()
        elif self.matcher is not None and self.past is not None:
            other.matcher = grammars.matcher(self.past[0])
            if not all(other.matcher.consume(token) for token in self.past[1]):
                other.matcher = None
        return other

    def advance(self, token: int) -> None:
        self.drawn += 1
        if self.past is not None:
            self.past[1].append(token)
        if self.matcher is not None and token not in self.last and not _yes("consume", self.matcher.consume(token)):
            raise ValueError(f"consume() said no to token {token}, which mask() had allowed")

    def fill(self, out: I32) -> None:
        if self.matcher is None:
            out[:] = 0
            return
        self.matcher.mask(out)
        self.end(out)

    def end(self, out: I32) -> None:
        """Say of the end tokens in a mask what holds."""
        assert self.matcher is not None
        _put(out, self.ends, False)
        if _yes("may_end", self.matcher.may_end()) and (self.drawn >= self.min_tokens or not out.any()):
            _put(out, self.ends, True)


def _yes(call: str, said: Any) -> bool:
    if not isinstance(said, (bool, np.bool_)):
        raise TypeError(f"{call}() gave {shown(said)}, which is neither True nor False")
    return bool(said)


def _put(out: I32, tokens: I32, bit: bool) -> None:
    words = out.view(np.uint32)
    for token in tokens.tolist():
        flag = np.uint32(1 << (token % 32))
        words[token // 32] = words[token // 32] | flag if bit else words[token // 32] & ~flag


class Masks:
    """`make(tokens, special)` is GrammarSpec.factory; `vocab` is the model's; `blame(call, error)` words whose fault it is if the backend fails."""

    name = "masks"
    takes: frozenset[type[Message]] = frozenset({Vocabulary, GrammarOpen, GrammarClose, MaskRequest, Drawn})
    gives: frozenset[type[Message]] = frozenset({MaskReady, GrammarFailed})

    def __init__(
        self,
        make: Callable[[list[bytes], list[int]], Grammars],
        *,
        vocab: int,
        blame: Callable[[str, Exception | str], PenstockError] | None = None,
    ) -> None:
        self._make = make
        self._blame = blame or _plain
        self._unusable = ""
        """Why no sequence can have a grammar."""
        self._vocab = vocab
        self._words = -(-vocab // 32)
        self._grammars: Grammars | None = None
        self._together: Together | None = None
        self._places: dict[Key, _Place] = {}
        self._asked: deque[MaskRequest] = deque()
        """Those that wait for tokens of earlier steps."""
        self._undrawn: set[int] = set()
        """Steps that were asked for and whose tokens have not come."""
        self._blamed: list[GrammarFailed] = []

    def __len__(self) -> int:
        return len(self._places)

    def handle(self, message: Message) -> Iterable[Message]:
        if isinstance(message, MaskRequest):
            self._asked.append(message)
            return self._ready()
        if isinstance(message, Drawn):
            self._drawn(message)
            return self._ready()
        if isinstance(message, GrammarOpen):
            self._open(message)
        elif isinstance(message, GrammarClose):
            for key in zip(message.seqs.tolist(), message.incarnations.tolist(), strict=True):
                self._places.pop(key, None)
        elif isinstance(message, Vocabulary):
            self._learn(message)
        return ()

    def _learn(self, vocabulary: Vocabulary) -> None:
        ends = np.cumsum(vocabulary.counts).tolist()
        tokens = [vocabulary.data[end - count : end] for end, count in zip(ends, vocabulary.counts.tolist(), strict=True)]
        tokens = tokens[: self._vocab] + [b""] * (self._vocab - len(tokens))
        try:
            self._grammars = self._make(tokens, [token for token in vocabulary.special.tolist() if token < self._vocab])
            self._together = self._grammars if isinstance(self._grammars, Together) else None
        except BaseException as error:
            self._unusable = _said(self._blame, "factory", tamed(error))
            log.exception("requests with a grammar will fail: %s", self._unusable)

    def _open(self, message: GrammarOpen) -> None:
        at = 0
        ends = message.ends[(message.ends >= 0) & (message.ends < self._vocab)]
        for seq, count in zip(message.seqs.tolist(), message.output_counts.tolist() or [0] * len(message.seqs), strict=True):
            key = seq, message.incarnation
            place = self._places[key] = _Place(None, ends, message.min_tokens)
            try:
                if self._grammars is not None:
                    place.matcher = _usable(self._grammars.matcher(message.grammar))
                    if message.beams and not isinstance(place.matcher, Forks):
                        place.past = message.grammar, []
                for token in message.outputs[at : at + count].tolist():
                    place.advance(token)
            except BaseException as error:  # a library's panic is no Exception
                self._fail(key, place, "matcher" if place.matcher is None else "consume", error)
            if self._unusable:
                self._blamed.append(GrammarFailed(seq=key[0], incarnation=key[1], error=self._unusable, broken=True))
            at += count

    def _drawn(self, message: Drawn) -> None:
        self._undrawn.discard(message.step)
        if message.sources.size:
            self._branch(message)
        tokens, at = message.tokens.tolist(), 0
        for seq, incarnation, count in zip(
            message.seqs.tolist(), message.incarnations.tolist(), message.counts.tolist() or [1] * len(message.seqs), strict=True
        ):
            place = self._places.get((seq, incarnation))
            mine, at = tokens[at : at + count], at + count
            if place is None:
                continue
            try:
                for token in mine:
                    if token >= 0:
                        place.advance(token)
                    if token in place.last:
                        break  # what was drawn behind it is dropped
            except BaseException as error:
                self._fail((seq, incarnation), place, "consume", error)

    def _branch(self, message: Drawn) -> None:
        """Beams go on from where others were: all from before this step."""
        assert self._grammars is not None
        moved: dict[Key, _Place] = {}
        for seq, incarnation, source in zip(message.seqs.tolist(), message.incarnations.tolist(), message.sources.tolist(), strict=True):
            place = self._places.get((source, incarnation))
            if seq == source or place is None or (seq, incarnation) not in self._places:
                continue
            try:
                moved[seq, incarnation] = place.fork(self._grammars)
            except BaseException as error:
                moved[seq, incarnation] = _Place(None, place.ends, place.min_tokens)
                self._fail((seq, incarnation), moved[seq, incarnation], "fork", error)
        self._places |= moved

    def _ready(self) -> Iterator[Message]:
        while self._asked and not self._undrawn:
            request = self._asked.popleft()
            self._undrawn.add(request.step)
            keys = list(zip(request.seqs.tolist(), request.incarnations.tolist(), strict=True))
            places = [self._places.get(key) for key in keys]  # None: it is over already, what is drawn for it is dropped
            mask = np.zeros((len(keys), self._words), np.int32)
            if self._together is not None and len(keys) > 1:
                self._fill_together(keys, places, mask, self._together)
            else:
                for key, place, out in zip(keys, places, mask, strict=True):
                    if place is not None:
                        self._fill(key, place, out)
            counts = EMPTY_I32
            if request.draft_counts.size:
                mask, counts = self._ahead(request, keys, places, mask)
            if self._blamed:
                yield from self._blamed
                self._blamed.clear()
            yield MaskReady(step=request.step, rows=request.rows, mask=mask.ravel(), counts=counts)

    def _ahead(self, request: MaskRequest, keys: list[Key], places: list[_Place | None], first: I32) -> tuple[I32, I32]:
        """With the masks behind drafts: all masks, and how many each row has. A grammar that fails behind a draft is as it was in front of it: it is blamed
        when it comes to that."""
        masks: list[I32] = []
        counts: list[int] = []
        at = 0
        for place, out, count in zip(places, first, request.draft_counts.tolist(), strict=True):
            mine, drafts = [out], request.drafts[at : at + count].tolist()
            at += count
            if place is not None and place.matcher is not None and drafts:
                mine += self._behind(place, out, drafts)
            masks += mine
            counts.append(len(mine))
        return np.stack(masks) if masks else first, i32(counts)

    def _behind(self, place: _Place, first: I32, drafts: list[int]) -> list[I32]:
        """The masks behind drafts, as far as it can be said what follows."""
        masks: list[I32] = []
        before, ahead = first, None
        for token in drafts:
            if token in place.last or not before.view(np.uint32)[token // 32] >> np.uint32(token % 32) & 1:
                break  # it ends there, or the draft will not be drawn
            try:
                if ahead is None:
                    if not isinstance(place.matcher, Forks) or self._grammars is None:
                        break
                    ahead = place.fork(self._grammars)
                ahead.advance(token)
                before = np.zeros_like(first)
                ahead.fill(before)
            except BaseException as error:
                tamed(error)
                break
            masks.append(before)
        return masks

    def _fill(self, key: Key, place: _Place, out: I32) -> None:
        try:
            place.fill(out)
        except BaseException as error:
            self._fail(key, place, "mask", error)
            out[:] = 0

    def _fill_together(self, keys: list[Key], places: list[_Place | None], mask: I32, together: Together) -> None:
        rows = [row for row, place in enumerate(places) if place is not None and place.matcher is not None]
        held = [place for place in places if place is not None and place.matcher is not None]
        out = mask if len(rows) == len(mask) else np.empty((len(rows), self._words), np.int32)
        try:
            failed: Mapping[int, BaseException] = together.masks([place.matcher for place in held], out)
        except BaseException as error:  # of whom is not known
            failed = dict.fromkeys(range(len(held)), error)
        for at, place in enumerate(held):
            if at in failed:
                self._fail(keys[rows[at]], place, "masks", failed[at])
                out[at] = 0
                continue
            try:
                place.end(out[at])
            except BaseException as error:
                self._fail(keys[rows[at]], place, "may_end", error)
                out[at] = 0
        if out is not mask:
            mask[rows] = out

    def _fail(self, key: Key, place: _Place, call: str, error: BaseException) -> None:
        place.matcher = None
        if isinstance(error, InvalidRequest):
            self._blamed.append(GrammarFailed(seq=key[0], incarnation=key[1], error=error.message))
            return
        said = _said(self._blame, call, tamed(error))
        log.error("a sequence's grammar failed, and the sequence with it: %s", said)
        self._blamed.append(GrammarFailed(seq=key[0], incarnation=key[1], error=said, broken=True))


def _usable(matcher: Matcher) -> Matcher:
    lacking = [name for name in ("consume", "mask", "may_end") if not hasattr(matcher, name)]
    if lacking:
        raise TypeError(f"matcher() gave {shown(matcher)}, which has no {' and no '.join(lacking)}")
    return matcher


def _plain(call: str, error: Exception | str) -> PenstockError:
    return PenstockError(f"The grammar backend is broken: {call}() failed with {error if isinstance(error, str) else described(error)}.")


def _said(blame: Callable[[str, Exception | str], PenstockError], call: str, error: Exception) -> str:
    return error.message if isinstance(error, PenstockError) else blame(call, error).message
