"""Load the library and declare its functions; the C structs as ctypes mirror images.

What it is: `library()`, decided once a process: the typed library, or None with one logged note when it cannot be built or
PENSTOCK_KERNELS=reference asks for the torch reference. PENSTOCK_KERNELS may also name one instruction set (build.py).
What it does not know: tensors. Callers pass addresses and keep the memory alive.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_double, c_int64, c_void_p

from penstock.kernels.native.build import VARIANTS, BuildError, build, missing

log = logging.getLogger("penstock.kernels")


FORMATS = {
    name: number
    for number, name in enumerate(("f32", "bf16", "int8", "int8_zeros", "fp8_e4m3", "fp8_e5m2", "int4", "int4_zeros", "table4"))
}
"""What a panel holds: the numbers of codes.h."""


class Weight(ctypes.Structure):
    """`weight` of gemm.h."""

    _fields_ = (
        ("w", c_void_p), ("bias", c_void_p), ("table", c_void_p), ("perm", c_void_p), ("exact", c_void_p), ("n", c_int64), ("k", c_int64), ("panels", c_int64),
        ("panel_bytes", c_int64), ("format", c_int64), ("group", c_int64), ("gated", c_int64), ("act", c_int64),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """`layer` of decoder.h."""

    _fields_ = (
        ("qkv", Weight), ("o", Weight), ("gate_up", Weight), ("down", Weight), ("attn_norm", c_void_p), ("mlp_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("k_cache", c_void_p), ("v_cache", c_void_p), ("k_scales", c_void_p), ("v_scales", c_void_p),
        ("window", c_int64), ("k_fixed", c_double), ("v_fixed", c_double),
    )  # fmt: skip


class Program(ctypes.Structure):
    """`program` of decoder.h."""

    _fields_ = (
        ("layers_count", c_int64), ("hidden", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("dim", c_int64), ("inter", c_int64),
        ("vocab", c_int64), ("bf16", c_int64), ("rotary", c_int64), ("table_rows", c_int64),
        ("embedding_rows", c_int64), ("blocks", c_int64), ("block_size", c_int64), ("block_bytes", c_int64), ("kv_format", c_int64),
        ("eps", c_double), ("scale", c_double), ("embedding", c_void_p), ("final_norm", c_void_p), ("cos_sin", c_void_p),
        ("lm_head", Weight), ("layers", ctypes.POINTER(Layer)),
    )  # fmt: skip


class Step(ctypes.Structure):
    """`step` of decoder.h."""

    _fields_ = (
        ("tokens", c_void_p), ("positions", c_void_p), ("slots", c_void_p), ("tables", c_void_p), ("q_start", c_void_p),
        ("kv_len", c_void_p), ("rows", c_void_p), ("token_count", c_int64), ("sequences", c_int64), ("table_width", c_int64),
        ("row_count", c_int64), ("logits", c_void_p), ("hidden", c_void_p), ("greedy", c_void_p), ("workspace", c_void_p), ("threads", c_int64),
        ("tap_layers", c_void_p), ("taps", c_void_p), ("tap_count", c_int64), ("given", c_void_p), ("given_normed", c_void_p),
        ("ancestors", c_void_p),
    )  # fmt: skip


_P, _I, _D = c_void_p, c_int64, c_double
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ps_isa": (ctypes.c_char_p, []),
    "ps_sizes": (_I, [_I]),
    "ps_pack": (None, [_P, _P, _P, _I, _I, _I, _I, _I]),
    "ps_panel_bytes": (_I, [_I, _I, _I]),
    "ps_pack_codes": (None, [_P, _P, _P, _P, _I, _I, _I, _I, _I]),
    "ps_linear": (_I, [_P, _P, _I, _I, _P, _I, _I]),
    "ps_norm": (None, [_P, _P, _P, _P, _I, _I, _D, _I, _I]),
    "ps_gated": (None, [_P, _P, _I, _I, _I, _I, _I]),
    "ps_rope": (_I, [_P, _P, _P, _P, _P, _I, _P, _I]),
    "ps_attention": (_I, [_P, _P, _P, _P, _P]),
    "ps_embedding": (_I, [_P, _P, _P, _I, _I, _I, _I]),
    "ps_argmax": (None, [_P, _P, _I, _I, _I]),
    "ps_draw": (_I, [_P, _I, _I, _P, _P, _P, _P, _P, _P, _P, _P, _I]),
    "ps_verify": (_I, [_P, _P, _P, _P, _I, _P, _I, _I, _P, _P]),
    "ps_verify_tree": (_I, [_P, _P, _P, _P, _I, _P, _I, _I, _P, _I, _P, _P, _P]),
    "ps_move_kv": (_I, [_P, _P, _P, _P, _I, _I]),
    "ps_put_drafts": (_I, [_P, _P, _P, _I, _I, _P, _I, _I, _I]),
    "ps_ngrams": (_I, [_P, _I, _I, _P, _P, _I, _I, _I, _P, _I, _I]),
    "ps_mask": (_I, [_P, _I, _I, _P, _I, _P, _I]),
    "ps_step_bytes": (_I, [_P, _P]),
    "ps_step": (_I, [_P, _P]),
}
INDEX_ERRORS = {
    1: "q_start must rise from 0 to the number of query rows",
    2: "kv_len must count this step's rows and fit the block table",
    3: "a block table names a block outside the cache",
    4: "a token id lies outside the embedding table",
    5: "a position lies outside the rotary table",
    6: "a slot lies outside the cache",
    7: "a wanted row lies outside the step",
    8: "mask_rows must name rows of mask",
    9: "a slot or an end lies outside the history",
    10: "a tap names no layer, or what lies behind the last one, of which more rows are wanted than there are tokens",
}


class Native:
    """The loaded library: its functions as attributes of `lib`, and the instruction set that it was compiled for."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        for which, struct in enumerate((Weight, Layer, Program, Step)):
            if self.lib.ps_sizes(which) != ctypes.sizeof(struct):
                raise OSError(f"{path}: {struct.__name__} differs between C and Python")
        self.isa: str = self.lib.ps_isa().decode()


def check(code: int) -> None:
    """Raise what a non-zero code of the library means: IndexError, or MemoryError."""
    if code:
        if code < 0:
            raise MemoryError("no scratch memory for a kernel")
        raise IndexError(INDEX_ERRORS[code])


@functools.cache
def _load() -> tuple[Native | None, str]:
    wanted = os.environ.get("PENSTOCK_KERNELS") or "native"
    if wanted not in ("native", "reference", *VARIANTS):
        raise ValueError(f"PENSTOCK_KERNELS must be one of native, {', '.join(VARIANTS)}, reference, but is {wanted!r}")
    if wanted == "reference":
        return None, "torch reference kernels (PENSTOCK_KERNELS=reference)"
    variant = wanted if wanted in VARIANTS else None
    if variant is not None and (lacks := missing(variant)):
        raise ValueError(f"PENSTOCK_KERNELS={variant} needs a processor with {', '.join(lacks)}; leave it out to take what this one has")
    try:
        native = Native(str(build(variant)))
    except (BuildError, OSError, AttributeError) as error:
        note = f"torch reference kernels, correct but several times slower: {error}"
        log.warning("%s", note)
        return None, note
    return native, f"C kernels ({native.isa})"


def library() -> Native | None:
    """The library, or None: then use the reference."""
    return _load()[0]


def describe() -> str:
    """One line for people: which kernels run here and, if not the fast ones, why."""
    return _load()[1]
