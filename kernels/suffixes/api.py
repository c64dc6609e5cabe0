"""Who keeps suffix automata: C where there is a compiler, else the reference.

What it is: `suffixes()`, decided once a process, and the C library's automata with the interface of reference.py. Their memory is flat: about a hundred bytes a token, given back at once.
Calls are a column of rows each, and let go of the GIL.
What it does not know: whose texts they are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_int64, c_void_p
from typing import Any, NamedTuple, Protocol

import numpy as np

from penstock.kernels.native.build import BuildError, build
from penstock.kernels.suffixes import reference
from penstock.kernels.suffixes.reference import I32, I64

log = logging.getLogger("penstock.kernels")

_P, _I = c_void_p, c_int64
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ps_suffix_new": (_P, []),
    "ps_suffix_free": (None, [_P]),
    "ps_suffix_add": (_I, [_P, _P, _I]),
    "ps_suffix_count": (_I, [_P]),
    "ps_suffix_bytes": (_I, [_P]),
    "ps_suffix_copy": (None, [_P, _I, _P]),
    "ps_suffix_follow": (_I, [_P, _P, _P, _P, _P, _P, _P, _I]),
    "ps_suffix_propose": (_I, [_P, _P, _P, _P, _P, _P, _I, _I, _I, _P, _P]),
}


class Automaton(Protocol):
    """See reference.Automaton."""

    def __len__(self) -> int: ...
    def learn(self, tokens: I32, /) -> None: ...
    def since(self, first: int, /) -> I32: ...
    def shrink(self, states: int, /) -> int: ...


class Readers(Protocol):
    """See reference.Readers."""

    def begin(self, row: int, own: Any, past: Any, /) -> None: ...
    def end(self, row: int, /) -> None: ...
    def follow(self, rows: I64, counts: I32, tokens: I32, /) -> None: ...
    def propose(self, rows: I64, most: I32, least: int, factor: int, /) -> tuple[I32, I32]: ...


class Suffixes(NamedTuple):
    automaton: type[Any]
    """Gives an empty Automaton."""
    readers: type[Any]
    """Gives Readers of none."""
    quick: int
    """Tokens that are learned in about half a millisecond."""


def _checked(code: int) -> None:
    if code < 0:
        raise MemoryError("no memory for a suffix automaton")


class NativeAutomaton:
    """See reference.Automaton."""

    __slots__ = ("_lib", "address")

    def __init__(self) -> None:
        self.address: int | None = None
        self._lib = _library()
        assert self._lib is not None
        self.address = self._lib.ps_suffix_new()
        if self.address is None:
            raise MemoryError("no memory for a suffix automaton")

    def __len__(self) -> int:
        assert self._lib is not None
        return int(self._lib.ps_suffix_count(self.address)) if self.address else 0

    def learn(self, tokens: I32) -> None:
        """See reference."""
        assert self._lib is not None
        assert self.address
        mine = np.ascontiguousarray(tokens, np.int32)
        _checked(self._lib.ps_suffix_add(self.address, mine.ctypes.data, mine.size))

    def since(self, first: int) -> I32:
        """See reference."""
        assert self._lib is not None
        found = np.empty(max(0, len(self) - first), np.int32)
        if found.size:
            self._lib.ps_suffix_copy(self.address, first, found.ctypes.data)
        return found

    @property
    def bytes(self) -> int:
        """Of memory."""
        assert self._lib is not None
        return int(self._lib.ps_suffix_bytes(self.address)) if self.address else 0

    def shrink(self, states: int = 0) -> int:
        """See reference: here it is one call."""
        if self.address and self._lib is not None:
            self._lib.ps_suffix_free(self.address)
        self.address = None
        return 0

    def __del__(self) -> None:
        self.shrink()


class NativeReaders:
    """See reference.Readers. The automata of a row are kept until it ends."""

    def __init__(self) -> None:
        self._lib = _library()
        self._kept: dict[int, tuple[NativeAutomaton, NativeAutomaton | None]] = {}
        self._own, self._past = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        self._states, self._matched = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._columns: tuple[int, ...] = ()

    def begin(self, row: int, own: NativeAutomaton, past: NativeAutomaton | None) -> None:
        """See reference."""
        if row >= self._own.size:
            more = 2 * row + 16 - self._own.size
            self._own, self._past, self._states, self._matched = (
                np.concatenate([column, np.zeros(more, column.dtype)]) for column in (self._own, self._past, self._states, self._matched)
            )
            self._columns = tuple(column.ctypes.data for column in (self._own, self._past, self._states, self._matched))
        self._kept[row] = own, past
        assert own.address
        self._own[row], self._past[row] = own.address, 0 if past is None else past.address or 0
        self._states[row] = self._matched[row] = 0

    def end(self, row: int) -> None:
        """See reference."""
        del self._kept[row]
        self._own[row] = self._past[row] = 0

    def follow(self, rows: I64, counts: I32, tokens: I32) -> None:
        """See reference."""
        if rows.size:
            assert self._lib is not None
            given = _flat(rows, np.int64), _flat(counts, np.int32), _flat(tokens, np.int32)
            self._check(given[0])
            _checked(self._lib.ps_suffix_follow(*self._columns, *(column.ctypes.data for column in given), rows.size))

    def propose(self, rows: I64, most: I32, least: int, factor: int) -> tuple[I32, I32]:
        """See reference."""
        counts, found = np.empty(rows.size, np.int32), np.empty(int(most.sum()), np.int32)
        if not rows.size:
            return counts, found
        assert self._lib is not None
        given = _flat(rows, np.int64), _flat(most, np.int32)
        self._check(given[0])
        total = self._lib.ps_suffix_propose(
            *self._columns, *(column.ctypes.data for column in given), rows.size, least, factor, counts.ctypes.data, found.ctypes.data
        )
        return counts, found[:total]

    def _check(self, rows: I64) -> None:
        if not self._own[rows].all():
            raise KeyError("a row that has not begun")


def _flat(column: Any, dtype: Any) -> Any:
    return np.ascontiguousarray(column, dtype)


@functools.cache
def _library() -> Any:
    """None: there is none."""
    if os.environ.get("PENSTOCK_KERNELS") == "reference":
        return None
    try:
        lib = ctypes.CDLL(str(build(name="suffixes")))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (BuildError, OSError, AttributeError) as error:
        log.warning("suffix automata in Python, which costs each step with drafts several times as much: %s", error)
        return None
    return lib


def suffixes() -> Suffixes:
    """Automata, and who reads them."""
    if _library() is None:
        return Suffixes(reference.Automaton, reference.Readers, 256)
    return Suffixes(NativeAutomaton, NativeReaders, 2048)
