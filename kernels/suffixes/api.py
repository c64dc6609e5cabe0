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
from penstock.kernels.suffixes.reference import COUNTS, I32, I64

log = logging.getLogger("penstock.kernels")

_P, _I = c_void_p, c_int64
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ps_suffix_new": (_P, []),
    "ps_suffix_free": (None, [_P]),
    "ps_suffix_add": (_I, [_P, _P, _I]),
    "ps_suffix_count": (_I, [_P]),
    "ps_suffix_bytes": (_I, [_P]),
    "ps_suffix_copy": (None, [_P, _I, _P]),
    "ps_suffix_follow": (_I, [_P, _P, _P, _P, _I, _I]),
    "ps_suffix_propose": (_I, [_P, _P, _P, _I, _I, _I, _P, _P]),
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


def _checked(code: int) -> int:
    if code == -2:
        raise KeyError("a row that has not begun")
    if code == -3:
        raise ValueError(COUNTS)
    if code < 0:
        raise MemoryError("no memory for a suffix automaton")
    return code


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


class _Columns(ctypes.Structure):
    """`readers` of suffixes.c."""

    _fields_ = (("own", c_void_p), ("past", c_void_p), ("states", c_void_p), ("matched", c_void_p), ("room", c_int64))


class _Buffer:
    """Memory whose address is known: asking an array for its own costs as much as a call."""

    __slots__ = ("address", "array")

    def __init__(self, dtype: Any) -> None:
        self.array: Any = np.zeros(0, dtype)
        self.room(64)

    def room(self, size: int) -> None:
        """For so many, what is there kept."""
        if size > self.array.size:
            grown = np.zeros(2 * size, self.array.dtype)
            grown[: self.array.size] = self.array
            self.array, self.address = grown, grown.ctypes.data

    def put(self, column: Any) -> int:
        """The address of a copy of it."""
        size = column.size
        if size > self.array.size:
            self.room(size)
        self.array[:size] = column
        return self.address


class NativeReaders:
    """See reference.Readers. The automata of a row are kept until it ends."""

    def __init__(self) -> None:
        self._lib = _library()
        self._kept: dict[int, tuple[NativeAutomaton, NativeAutomaton | None]] = {}
        self._by_row = tuple(_Buffer(dtype) for dtype in (np.uint64, np.uint64, np.int32, np.int32))
        self._columns = _Columns()
        self._rows, self._counts, self._tokens, self._found = (_Buffer(dtype) for dtype in (np.int64, np.int32, np.int32, np.int32))
        self._lay(1)

    def _lay(self, rows: int) -> None:
        for column in self._by_row:
            column.room(rows)
        self._columns = _Columns(*(column.address for column in self._by_row), self._by_row[0].array.size)
        self._this = ctypes.addressof(self._columns)

    def begin(self, row: int, own: NativeAutomaton, past: NativeAutomaton | None) -> None:
        """See reference."""
        if row >= self._columns.room:
            self._lay(row + 1)
        assert own.address
        self._kept[row] = own, past
        for column, value in zip(self._by_row, (own.address, 0 if past is None else past.address or 0, 0, 0), strict=True):
            column.array[row] = value

    def end(self, row: int) -> None:
        """See reference."""
        del self._kept[row]
        self._by_row[0].array[row] = self._by_row[1].array[row] = 0

    def follow(self, rows: I64, counts: I32, tokens: I32) -> None:
        """See reference."""
        assert self._lib is not None
        given = self._rows.put(rows), self._counts.put(counts), self._tokens.put(tokens)
        _checked(self._lib.ps_suffix_follow(self._this, *given, rows.size, tokens.size))

    def propose(self, rows: I64, most: I32, least: int, factor: int) -> tuple[I32, I32]:
        """See reference."""
        assert self._lib is not None
        count = rows.size
        self._found.room(int(np.add.reduce(most)))
        self._tokens.room(count)
        given = self._rows.put(rows), self._counts.put(most)
        total = _checked(self._lib.ps_suffix_propose(self._this, *given, count, least, factor, self._tokens.address, self._found.address))
        return self._tokens.array[:count].copy(), self._found.array[:total].copy()


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
