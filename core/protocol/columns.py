"""Columns: numpy arrays as message fields.

What it is: the dtypes that may travel, and the msgpack codec that carries an array as one extension value (code = dtype, data =
little-endian bytes), so that a struct of arrays crosses a process boundary with one copy and crosses a cell with none.
What it does not know: which messages exist, sockets, frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

I32: TypeAlias = npt.NDArray[np.int32]
I64: TypeAlias = npt.NDArray[np.int64]
F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
if TYPE_CHECKING:
    Column: TypeAlias = npt.NDArray[Any]
else:  # msgspec hands the plain class to dec_hook
    Column = np.ndarray

PIECE = 1 << 14
"""Items of a long list that are converted in one go: other threads do not run meanwhile, for some 20 ns an item."""

_CODE_OF: dict[np.dtype[Any], int] = {np.dtype(np.int32): 1, np.dtype(np.int64): 2, np.dtype(np.float32): 3, np.dtype(np.uint8): 4}
_DTYPE_OF: dict[int, np.dtype[Any]] = {code: dtype.newbyteorder("<") for dtype, code in _CODE_OF.items()}

EMPTY_I32: I32 = np.empty(0, np.int32)
EMPTY_I64: I64 = np.empty(0, np.int64)
EMPTY_F32: F32 = np.empty(0, np.float32)
EMPTY_U8: U8 = np.empty(0, np.uint8)
for _empty in (EMPTY_I32, EMPTY_I64, EMPTY_F32, EMPTY_U8):
    _empty.flags.writeable = False


def i32(values: Sequence[int] | Column) -> I32:
    return np.asarray(values, np.int32)


def i32_by_pieces(values: list[int]) -> I32:
    """The same, for lists of any length, while other threads go on."""
    if len(values) <= PIECE:
        return np.array(values, np.int32)
    out = np.empty(len(values), np.int32)
    for start in range(0, len(values), PIECE):
        out[start : start + PIECE] = values[start : start + PIECE]
    return out


def i64(values: Sequence[int] | Column) -> I64:
    return np.asarray(values, np.int64)


def f32(values: Sequence[float] | Column) -> F32:
    return np.asarray(values, np.float32)


def u8(values: Sequence[int] | Column) -> U8:
    return np.asarray(values, np.uint8)


def enc_hook(value: Any) -> Any:
    """msgspec hook: a one-dimensional array becomes Ext(code of its dtype, bytes)."""
    if isinstance(value, np.ndarray):
        code = _CODE_OF.get(value.dtype)
        if code is None or value.ndim != 1:
            raise TypeError(f"a column must be 1-D int32, int64, float32 or uint8, not {value.ndim}-D {value.dtype}")
        return msgspec.msgpack.Ext(code, value.tobytes())
    raise TypeError(f"{type(value).__name__} cannot travel in a message")


def ext_hook(code: int, data: memoryview) -> Column:
    """msgspec hook: Ext back to a read-only array (it owns a copy of the frame's bytes)."""
    dtype = _DTYPE_OF.get(code)
    if dtype is None:
        raise ValueError(f"unknown extension code {code}")
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are no whole number of {dtype} items")
    return np.frombuffer(bytes(data), dtype=dtype)


def dec_hook(kind: type, value: Any) -> Any:
    """msgspec hook for fields typed as arrays: accepts what ext_hook returned, nothing else."""
    if isinstance(value, np.ndarray):
        return value
    raise TypeError(f"expected a column, got {type(value).__name__}")
