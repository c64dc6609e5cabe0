"""placeholder until the C sources land: no native library."""

from __future__ import annotations

import ctypes


class Native:
    lib: ctypes.CDLL
    isa: str


def library() -> Native | None:
    return None


def describe() -> str:
    return "torch reference kernels"
