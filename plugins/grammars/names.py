"""No name comes twice in an object.

What it is: `Names` follows the bytes of an answer in JSON, knows which names each open object has, and takes from a mask what would end a name that its object
has already. A grammar cannot say that. Names look the same if they are the same: they are written without escapes by number, which are taken from masks too.
Where the names that there may be come to an end, `lead_on` looks ahead, so that no name begins that could only become a used one.
What it does not know: schemas, the grammar's state (but what a mask will be). Where nothing else could follow, the mask is left as it is, and whoever looks at the
whole answer finds the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from penstock.core.protocol.columns import I32

QUOTE, BACKSLASH = 0x22, 0x5C


class NameTokens:
    """Of a vocabulary: which tokens end a name, and how; and those that may hold a whole name."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.words = -(-len(tokens) // 32)
        self.tokens = tokens
        self.last: dict[bytes, list[int]] = {}
        """What is left of a name, and the tokens that end it so. Not those that begin with the quote."""
        quoted = [id for id, token in enumerate(tokens) if QUOTE in token]
        for id in quoted:
            end = _end(tokens[id])
            if end > 0:
                self.last.setdefault(tokens[id][:end], []).append(id)
        self.by_text: dict[bytes, list[int]] = {}
        for id, token in enumerate(tokens):
            self.by_text.setdefault(token, []).append(id)
        self.opening: dict[bytes, list[int]] = {}
        """What a text begins with that a token leaves open, and the tokens."""
        for id, token in enumerate(tokens):
            if QUOTE in token and (begun := token.rpartition(b'"')[2]):
                self.opening.setdefault(begun, []).append(id)
        self._firsts = np.array([token[0] if token else 0 for token in tokens], np.uint8)
        self.no_quote_first = ~self._of(id for id in quoted if tokens[id][0] == QUOTE)
        self.quotes = self._of(quoted)
        self.no_number = ~self._of(id for id, token in enumerate(tokens) if b"\\u" in token)
        self.no_u_first = ~self._of(id for id, token in enumerate(tokens) if token[:1] == b"u")
        self.whole = tuple(self._of(id for id in quoted if _holds_name(tokens[id], in_text=in_text)) for in_text in (False, True))
        """Outside a text, and within one."""

    def firsts(self, mask: I32) -> list[int]:
        """The bytes that its tokens begin with."""
        found: list[int] = np.unique(self._firsts[_ids(mask)]).tolist()
        return found

    def _of(self, ids: Iterable[int]) -> I32:
        bits = np.zeros(self.words * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def _end(token: bytes) -> int:
    """Where a text ends in it; -1: it goes on."""
    escaped = False
    for at, byte in enumerate(token):
        if byte == QUOTE and not escaped:
            return at
        escaped = byte == BACKSLASH and not escaped
    return -1


def _holds_name(token: bytes, *, in_text: bool) -> bool:
    """May a name begin and end in it?"""
    inside = in_text
    began = escaped = False
    for byte in token:
        if inside:
            if escaped:
                escaped = False
            elif byte == BACKSLASH:
                escaped = True
            elif byte == QUOTE:
                if began:
                    return True
                inside = False
        elif byte == QUOTE:
            inside = began = True
    return False


class Names:
    """One answer."""

    __slots__ = ("_escaped", "_in_name", "_in_text", "_name", "_open", "_tokens", "_wants_name", "again")

    def __init__(self, tokens: NameTokens) -> None:
        self._tokens = tokens
        self._open: list[set[bytes] | None] = []
        """Names of each open object; None: a list."""
        self._in_text = self._escaped = self._in_name = self._wants_name = False
        self._name = bytearray()
        self.again = False
        """Has a name come twice?"""

    def feed(self, data: bytes) -> None:
        for byte in data:
            if self._in_text:
                if not self._escaped and byte == QUOTE:
                    self._in_text = False
                    if self._in_name:
                        self._named()
                    continue
                self._escaped = not self._escaped and byte == BACKSLASH
                if self._in_name:
                    self._name.append(byte)
            elif byte == QUOTE:
                self._in_text, self._in_name, self._wants_name = True, self._wants_name, False
            elif byte == 0x7B:
                self._open.append(set())
                self._wants_name = True
            elif byte == 0x5B:
                self._open.append(None)
                self._wants_name = False
            elif byte in b"}]":
                if self._open:
                    self._open.pop()
                self._wants_name = False
            elif byte == 0x2C:
                self._wants_name = bool(self._open) and self._open[-1] is not None

    def _named(self) -> None:
        name = bytes(self._name)
        self._name.clear()
        self._in_name = False
        names = self._open[-1]
        assert names is not None
        self.again = self.again or name in names
        names.add(name)

    def narrow(self, out: I32) -> None:
        """In place; something is left if anything was."""
        tokens = self._tokens
        left: I32 | None = None
        held = tokens.whole[self._in_text]
        if self._in_name:
            left = out & tokens.no_number
            if self._escaped:
                left &= tokens.no_u_first
                held = tokens.quotes
            else:
                self._end_once(left)
        held = held & (out if left is None else left)
        if held.any():
            left = out.copy() if left is None else left
            for token in _ids(held).tolist():
                ahead = self.copy()
                ahead.feed(tokens.tokens[token])
                if ahead.again:
                    _drop(left, token)
        if left is not None and left.any():
            out[:] = left

    def _end_once(self, left: I32) -> None:
        """Within a name: it does not end as one that is used."""
        names, name, last = self._open[-1], bytes(self._name), self._tokens.last
        assert names is not None
        if name in names:
            left &= self._tokens.no_quote_first
        if len(names) < len(last):
            ids = [last.get(used[len(name) :], ()) for used in names if used.startswith(name)]
        else:
            ids = [some for rest, some in last.items() if name + rest in names]
        for some in ids:
            for token in some:
                _drop(left, token)

    def lead_on(self, out: I32, look: Callable[[bytes], I32]) -> None:
        """In place, after `narrow`: nothing after which only used names could follow. `look(text)`: the mask once `text` has been said."""
        left: I32 | None = None
        for token, names, name in self._ways():
            if out[token // 32] >> (token % 32) & 1 and self._dead(self._tokens.tokens[token], names, name, look):
                left = out.copy() if left is None else left
                _drop(left, token)
        if left is not None and left.any():
            out[:] = left

    def _ways(self) -> Iterator[tuple[int, set[bytes], bytes]]:
        """(a token, its object's names, what there is of a name behind it), where a used name begins with that."""
        tokens = self._tokens
        if self._in_name:
            names, name = self._open[-1], bytes(self._name)
            assert names is not None
            for used in [] if self._escaped else list(names):
                if used.startswith(name):
                    for end in range(len(name) + 1, len(used) + 1):
                        for token in tokens.by_text.get(used[len(name) : end], ()):
                            yield token, names, used[:end]
            return
        for begun in {used[:end] for names in self._open if names for used in names for end in range(1, len(used) + 1)}:
            for token in tokens.opening.get(begun, ()):
                ahead = self.copy()
                ahead.feed(tokens.tokens[token])
                inner = ahead._open[-1] if ahead._in_name else None
                if inner and ahead._name == begun:
                    yield token, inner, begun

    def _dead(self, said: bytes, names: set[bytes], name: bytes, look: Callable[[bytes], I32]) -> bool:
        """Behind `said`, which ends in `name`: could it become no other than a used one?"""
        if not any(used.startswith(name) for used in names):
            return False
        firsts = self._tokens.firsts(look(said))
        if QUOTE in firsts and name not in names:
            return False
        return all(self._dead(said + bytes([byte]), names, name + bytes([byte]), look) for byte in firsts if byte != QUOTE)

    def copy(self) -> Names:
        """Another answer that has come as far."""
        made = Names(self._tokens)
        made._open = [None if names is None else set(names) for names in self._open]
        made._in_text, made._escaped, made._in_name, made._wants_name = self._in_text, self._escaped, self._in_name, self._wants_name
        made._name = bytearray(self._name)
        return made


def _ids(mask: I32) -> npt.NDArray[np.intp]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def _drop(mask: I32, token: int) -> None:
    words = mask.view(np.uint32)
    words[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
