"""The Triton kernels: what there is, shapes and dtypes; and what they share.

What it is: an index of `kernels/<op>/triton.py` (imported lazily, by whoever has chosen a GPU: importing them imports triton), the tuned
configuration of each on this device (out of tables.py), and the interpreter switch. Every function takes CUDA tensors, launches on the current stream, never synchronises,
and allocates nothing when `out` (and `workspace`, where there is one) are given: so all of them can be captured in a CUDA graph. Grids
depend on shapes only, never on values: a captured graph replays with any lengths up to the shapes it was captured with. Unlike api.py they
check shapes and dtypes but not values (that would synchronise): an index below 0 means "padding: read zeros, write nowhere".

Layout of the GPU pool (`attention.triton.KV_LAYOUT`): one K and one V cache a layer, [num_blocks, Hkv, block_size, D] row-major, block_size a
power of two from 16 (so 16 tokens of a head are one run of 16*D*2 bytes). Any block strides: a layer may be a slice of a bigger pool, if its
last three dimensions are contiguous. T tokens, R sequences (rows of the step), L rows with results, S slots, W blocks a table row, V vocabulary.

attention.triton
    paged_attention(q[T, Hq, D], k_cache, v_cache, block_tables[R or S, W] i32, q_start[R + 1] i32, kv_len[R] i32, scale, window=0, *,
                    num_decode=0, softcap=0.0, sinks=None[Hq] f32, table_rows=None[R] i32, out=None, lse=None[T, Hq] f32, workspace=None, counters=None,
                    deterministic=False, new_k=None[T, Hkv, D], new_v=None[T, Hkv, D], codes=None) -> out
        The first `num_decode` sequences have one row each and go to the split-KV kernel, all others to the ragged one. deterministic=True: both
        give a row the same bits (segments of `segment_of` keys, which depends on W * block_size: keep W the same). q may have any stride
        between rows. table_rows[r]: the row of block_tables that sequence r uses (slots); without it row r. num_decode -1: who has one row is read from q_start on the device, so that a captured graph replays with any mixture; each of the two
        kernels takes the sequences that are its own. new_k, new_v: this step's own (rotated) keys and values, e.g. views of qkv: prefill reads them by TMA instead of through the
        pages (ignored when deterministic). codes: the caches are uint8, 8 bits with a scale a token and head (attention.coded: `codes_of`; values lie by
        dimension there). kv_len 0: the row's output is zeros (lse -inf). Tokens T beyond q_start[R] are padding: their outputs are not written.
    decode_attention(q[R, Hq, D], k_cache, v_cache, block_tables, kv_len, scale, window=0, *, softcap, sinks, table_rows, out, lse, workspace, counters,
                     deterministic=False, codes=None)
    workspace_elements(rows, num_heads, head_dim, *, deterministic=False, codes=False) -> float32 elements that `workspace` must have for that many decode rows
    merge(out_a[T, Hq, D], lse_a[T, Hq], out_b, lse_b, out=None, lse=None) -> out     exact softmax over the union of two key sets
    allocate_cache, write_kv, read_kv                                                 (torch; for tests and tools)
linear.triton
    matmul(x[M, K], weight[N, K], bias=None[N], *, out=None, out_dtype=None, deterministic=False, workspace=None) -> [M, N]
        bf16/fp16 in, float32 sums, out in x's dtype or float32. Default: M <= 16 the skinny kernel, else torch (cuBLAS). deterministic:
        one Triton kernel whose row results do not depend on M. workspace: float32 [workspace_elements(N)], zero-filled once by the caller.
    skinny(...), invariant(...): the two kernels by themselves.
rmsnorm.triton
    rms_norm(x[M, K], weight[K], eps, out=None);  add_rms_norm(x, residual, weight, eps, out=None)      (residual += x in place)
    rounded_norm(x, residual or None, weight, eps, rounding) -> w8a8.rows.Rounded                         (the same, rounded to 8 bits in the same launch)
w8a8.rounding
    quantise_rows(x[M, K], rounding) -> w8a8.rows.Rounded     codes [M, K rounded up to 128], scales [M] or [groups of 128, M]
w8a8.triton
    matmul(x[M, K] or Rounded, weight, bias=None, *, out=None, gated=None, exact=False, blocks=None) -> [M, N]      8-bit inputs and weights
rope.triton
    rope_and_cache(qkv[T, (Hq + 2 Hkv) * D], positions[T] i32, cos_sin[P, r] f32, k_cache, v_cache, slots[T] i32, num_heads, num_kv_heads,
                   q_norm=None, k_norm=None, eps=1e-6, out=None, *, k_out=None[T, Hkv, D], codes=None, fixed=None) -> q [T, Hq, D]
        k_out: also gets the rotated keys (may be the keys' columns of qkv itself), for paged_attention's new_k. codes: of caches in 8 bits; fixed: (of keys, of
        values), scales instead of tokens' own.
activation.triton
    gated(kind, gate_up[T, 2I], out=None) -> [T, I]
embedding.triton
    embedding(ids[T] i32, table[V, H], out=None) -> [T, H];  gather_rows(x[T, H], rows[L] i32, out=None) -> [L, H]   (the same kernel)
argmax.triton
    argmax(logits[M, V] f32, out=None, workspace=None) -> [M] i32
sampling.triton      (settings are columns by slot; `slots`[R] i32 names each row's, None: row r's own; a slot below 0 is padding: token -1)
    draw(logits[R, V] f32, temperature, top_k, top_p, min_p, seeds, choices, positions[R], *, slots=None, out=None, workspace=None) -> [R] i32
    penalise_(logits, pool_rows[R] i32, counts[P, V] i32, in_prompt[P, V] bool, repetition, frequency, presence, *, slots=None)
    scatter_bias_(logits, rows[E] i32, ids[E] i32, values[E] f32)        logits[row, id] += value (-inf bans); (row, id) pairs distinct
    mask_(logits, mask[Q, ceil(V/32)] i32, mask_rows[R] i32)             bit = 1 keeps; mask row below 0: untouched
    ban_words_(logits, history[S, L], positions[R], words..., )          see the function
    count_(counts, pool_rows[R], tokens[R]);  start_counts(counts, in_prompt, pool_rows[E], history, slots[E], splits[E], ends[E])
    workspace_elements(rows, vocab) -> float64 elements
slots.triton         (device state: history[S, max_len] i32, table[S, W] i32; columns of Forward and Sample in, index tensors of a step out)
    decode_inputs(slots[R], starts[R], history, table, block_size, *, tokens, positions, cache_slots, kv_len)
    ragged_inputs(slots[R], starts[R], q_start[R + 1], history, table, block_size, *, tokens[T], positions[T], cache_slots[T], kv_len[R])
    advance(slots[R], starts[R])                    starts[r] += 1 where slots[r] >= 0: step n+1's decode starts without the host
    write_tokens(slots[R], positions[R], tokens[R], history)              history[slot, position] = max(token, 0)
    place(history, table, slots[E], counts[E], offsets[E], tokens[N])     a slot's history becomes those tokens, its table -1
    set_blocks(table, slots[E], index[E], ids[E])
    copy_blocks(pools [G, num_blocks, ...], src[E] i32, dst[E] i32)        in every group (layer, K/V); no dst is also a src
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch

from penstock.kernels import tables

_COMPILING: ContextVar[bool] = ContextVar("penstock_compiling", default=False)


def compiling() -> bool:
    """Whether launches on this thread only compile: see `compile_only`."""
    return _COMPILING.get()


@contextmanager
def compile_only(*, strict: bool = False) -> Iterator[None]:
    """Inside, a launch of a kernel that was not compiled yet hands it to one of as many threads as there are cores, and nothing runs; leaving waits
    for all of them. What a kernel would have written is not there: for functions whose course does not depend on values, as those that
    graphs capture. A kernel that cannot be compiled raises here if `strict`; else it is left to its first real launch, which raises."""
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="compile") as pool:
        mode = AsyncCompileMode(pool, ignore_errors=True)  # were it to raise, it would stay active on this thread
        before = _COMPILING.set(True)
        try:
            with mode:
                yield
        finally:
            _COMPILING.reset(before)
        if strict:
            for kernel in mode.future_kernels.values():
                kernel.result()
        list(pool.map(_build_launcher, mode.future_kernels.values()))


def _build_launcher(compiled: Any) -> None:
    """Before version 3.7 Triton compiles a launcher in C for each signature when a kernel is first launched: have it in Triton's cache by then. The object
    made here is thrown away. All launchers are extension modules of one name, for which CPython keeps one module object: threads that load some at the
    same time may be given each other's. What is launched is loaded later, by the one thread that launches."""
    from triton.runtime import driver

    with suppress(Exception):  # said by the first real launch, and by nobody where there is no device
        kernel = compiled.result()
        driver.active.launcher_cls(kernel.src, kernel.metadata)


@functools.cache
def chained() -> dict[str, bool]:
    """Launch options of a kernel that begins with `tile.follow`: where the device can (Hopper and later) it is set up while the kernel before
    still runs, so that neither launch latency nor the ramp up of its loads is seen between two short kernels."""
    can = not interpreting() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}


def interpreting() -> bool:
    """Whether triton's interpreter was asked for (TRITON_INTERPRET=1, before triton is imported): kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def device_key() -> str:
    """The current device's name in tuned.json; "default" where it was never measured."""
    if not torch.cuda.is_available():
        return "interpreter" if interpreting() else "default"
    name = tables.slug(torch.cuda.get_device_name())
    return name if name in tables.shipped() else "default"


def without_table() -> str | None:
    """The card's name if it has no table of its own, shipped or the user's, so that kernels run in default tiles."""
    if not torch.cuda.is_available() or device_key() != "default" or tables.own().table is not None:
        return None
    return torch.cuda.get_device_name()


_TRIED: dict[str, tables.Tile] = {}


@contextmanager
def trying(tiles: Mapping[str, tables.Tile]) -> Iterator[None]:
    """Inside, launches take these tiles in the place of all tables. For one thread at a time, while no other launches anything."""
    before = dict(_TRIED)
    _TRIED.update(tiles)
    tuned.cache_clear()
    try:
        yield
    finally:
        _TRIED.clear()
        _TRIED.update(before)
        tuned.cache_clear()


@functools.cache
def tuned(kernel: str) -> dict[str, int]:
    """The configuration of this kernel on this device: the user's own (`penstock tune`), else the shipped one (measured by gpu_bench.py), else the default.
    Nothing is tuned at run time."""
    if kernel in _TRIED:
        return dict(_TRIED[kernel])
    return {
        **tables.shipped()["default"][kernel],
        **tables.shipped().get(device_key(), {}).get(kernel, {}),
        **tables.own().tiles.get(kernel, {}),
    }


def forget_tables() -> None:
    """Read all tables again when a tile is asked for next."""
    tables.own.cache_clear()
    device_key.cache_clear()
    tuned.cache_clear()
