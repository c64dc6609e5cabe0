"""Layers as the formats' own tools store them, written here from the formats' descriptions in numpy and Python integers, each with the weight that it means in
float64. Nothing of the readers is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

F64 = np.ndarray[Any, np.dtype[np.float64]]
Rng = np.random.Generator


class Layer(NamedTuple):
    """Tensors by what follows the layer's name (".qweight"), and the weight [N, K] that they mean."""

    tensors: dict[str, torch.Tensor]
    dense: F64


class Format(NamedTuple):
    config: dict[str, Any]
    make: Callable[[Rng, int, int], Layer]


def words(codes: Any, bits: int) -> torch.Tensor:
    """Codes along the last axis into 32-bit words, the first in the lowest bits."""
    per = 32 // bits
    codes = np.asarray(codes, dtype=np.int64)
    short = -codes.shape[-1] % per
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), dtype=np.int64)
    for place in range(per):
        out |= codes[..., place::per] << (bits * place)
    return torch.from_numpy(np.where(out >= 1 << 31, out - (1 << 32), out).astype(np.int32))


def half(rng: Rng, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.01, 0.05, shape)).half()


def gptq(rng: Rng, n: int, k: int, *, bits: int, group: int, sym: bool, act_order: bool, v2: bool, lone: bool = True) -> Layer:
    size = k if group == -1 else group
    groups = -(-k // size)
    codes = rng.integers(0, 1 << bits, (k, n))
    zeros = np.full((groups, n), 1 << (bits - 1)) if sym else rng.integers(1, 1 << bits, (groups, n))
    scales = half(rng, groups, n)
    of = np.arange(k) // size
    if act_order:
        of = rng.permutation(of)
    dense = (codes - zeros[of]) * scales.double().numpy()[of]
    tensors = {
        ".qweight": words(codes.T, bits).t().contiguous(),
        ".qzeros": words(zeros - (0 if v2 else 1), bits),
        ".scales": scales,
        ".g_idx": torch.from_numpy(of.astype(np.int32)),
    }
    return Layer(tensors, dense.T)


def awq(rng: Rng, n: int, k: int, *, group: int) -> Layer:
    groups = -(-k // group)
    codes, zeros, scales = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (groups, n)), half(rng, groups, n)
    of = np.arange(k) // group
    dense = (codes - zeros[of]) * scales.double().numpy()[of]

    def pack(table: Any) -> torch.Tensor:
        return words(table.reshape(len(table), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(table), -1), 4)

    return Layer({".qweight": pack(codes), ".qzeros": pack(zeros), ".scales": scales}, dense.T)


def packed(rng: Rng, n: int, k: int, *, bits: int, group: int, sym: bool, ordered: bool = False) -> Layer:
    size = group or k
    groups = -(-k // size)
    low = -(1 << (bits - 1))
    codes = rng.integers(low, -low, (n, k))
    zeros = np.zeros((n, groups), dtype=np.int64) if sym else rng.integers(low, -low, (n, groups))
    scales = torch.from_numpy(rng.uniform(0.01, 0.05, (n, groups))).bfloat16()
    of = rng.permutation(np.arange(k) // size) if ordered else np.arange(k) // size
    dense = (codes - zeros[:, of]) * scales.double().numpy()[:, of]
    tensors = {".weight_packed": words(codes - low, bits), ".weight_scale": scales, ".weight_shape": torch.tensor([n, k])}
    if not sym:
        tensors[".weight_zero_point"] = words((zeros - low).T, bits).t().contiguous()
    if ordered:
        tensors[".weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
    return Layer(tensors, dense)


def plain_int8(rng: Rng, n: int, k: int, *, fixed: bool, whole: bool = False) -> Layer:
    codes = rng.integers(-128, 128, (n, k))
    scales = torch.from_numpy(rng.uniform(0.001, 0.005, (1,) if whole else (n, 1))).float()
    tensors = {".weight": torch.from_numpy(codes.astype(np.int8)), ".weight_scale": scales}
    if fixed:
        tensors[".input_scale"] = torch.tensor([0.05])
    return Layer(tensors, codes * scales.double().numpy().reshape(-1, 1))


def of_e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def of_e5m2(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 2 & 31, code & 3
    return sign * (mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


def of_e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def fp8(
    rng: Rng, n: int, k: int, *, suffix: str, blocks: tuple[int, int] | None, shape: str = "one", wide: bool = False, fixed: bool = False
) -> Layer:
    low, high, of, dtype = (0, 124, of_e5m2, torch.float8_e5m2) if wide else (0, 127, of_e4m3, torch.float8_e4m3fn)
    codes = rng.integers(low, high, (n, k)) % (80 if wide else 127) + 128 * rng.integers(0, 2, (n, k))
    values = np.vectorize(of)(codes)
    if blocks:
        scales = torch.from_numpy(rng.uniform(0.001, 0.002, (-(-n // blocks[0]), -(-k // blocks[1])))).float()
        spread = scales.double().numpy()[np.arange(n)[:, None] // blocks[0], np.arange(k)[None, :] // blocks[1]]
    else:
        scales = torch.from_numpy(rng.uniform(0.001, 0.002, {"one": (1,), "none": (), "row": (n, 1)}[shape])).float()
        spread = scales.double().numpy().reshape(-1, 1)
    tensors = {".weight": torch.from_numpy(codes.astype(np.uint8)).view(dtype), suffix: scales}
    if fixed:
        tensors[".input_scale"] = torch.tensor(0.5)
    return Layer(tensors, values * spread)


def nibbles(codes: Any, *, high_first: bool = False) -> torch.Tensor:
    first, second = codes[..., 0::2], codes[..., 1::2]
    return torch.from_numpy((first << 4 | second if high_first else first | second << 4).astype(np.uint8))


def nvfp4(rng: Rng, n: int, k: int, *, divided: bool) -> Layer:
    codes, scales = rng.integers(0, 16, (n, k)), rng.integers(40, 80, (n, k // 16))
    whole = torch.tensor([300.0 if divided else 0.004])
    factor = 1 / np.float32(300.0) if divided else np.float32(0.004)
    dense = np.vectorize(of_e2m1)(codes) * (np.vectorize(of_e4m3)(scales) * np.float64(factor)).astype(np.float32).repeat(16, 1)
    kept = torch.from_numpy(scales.astype(np.uint8)).view(torch.float8_e4m3fn)
    if divided:
        return Layer({".weight_packed": nibbles(codes), ".weight_scale": kept, ".weight_global_scale": whole}, dense)
    return Layer({".weight": nibbles(codes), ".weight_scale": kept, ".weight_scale_2": whole.reshape(())}, dense)


def mxfp4(rng: Rng, n: int, k: int) -> Layer:
    codes, powers = rng.integers(0, 16, (n, k)), rng.integers(115, 125, (n, k // 32))
    dense = np.vectorize(of_e2m1)(codes) * (2.0 ** (powers.astype(np.float64) - 127)).repeat(32, 1)
    return Layer({".weight_packed": nibbles(codes), ".weight_scale": torch.from_numpy(powers.astype(np.uint8))}, dense)


NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def nf4(rng: Rng, n: int, k: int, *, block: int, double: bool) -> Layer:
    codes = rng.integers(0, 16, n * k)
    count = n * k // block
    tensors = {".weight": nibbles(codes, high_first=True).reshape(-1, 1), ".weight.quant_map": torch.tensor(NORMAL)}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    if double:
        inner, table = rng.integers(0, 256, count), torch.from_numpy(np.sort(rng.uniform(-1, 1, 256))).float()
        outer = torch.from_numpy(rng.uniform(0.01, 0.02, -(-count // 16))).float()
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.06}
        scales = (table[torch.from_numpy(inner)] * outer.repeat_interleave(16)[:count] + 0.06).double().numpy()
        tensors |= {
            ".weight.absmax": torch.from_numpy(inner.astype(np.uint8)),
            ".weight.nested_absmax": outer,
            ".weight.nested_quant_map": table,
        }
    else:
        kept = torch.from_numpy(rng.uniform(0.01, 0.1, count)).float()
        tensors[".weight.absmax"], scales = kept, kept.double().numpy()
    tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return Layer(tensors, (np.array(NORMAL, dtype=np.float32).astype(np.float64)[codes] * scales.repeat(block)).reshape(n, k))


def llm_int8(rng: Rng, n: int, k: int) -> Layer:
    codes, largest = rng.integers(-127, 128, (n, k)), torch.from_numpy(rng.uniform(0.1, 0.5, n)).float()
    scales = (largest / 127).double().numpy()
    return Layer(
        {".weight": torch.from_numpy(codes.astype(np.int8)), ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)},
        codes * scales[:, None],
    )


def ct(form: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, "type": "int", **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FIXED = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}


def _gptq(bits: int, group: int, *, sym: bool = True, act_order: bool = False, v2: bool = False) -> Format:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": sym}
    config |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return Format(config, lambda rng, n, k: gptq(rng, n, k, bits=bits, group=group, sym=sym, act_order=act_order, v2=v2))


FORMATS: dict[str, Format] = {
    "gptq 4 sym": _gptq(4, 16),
    "gptq 4 asym": _gptq(4, 16, sym=False),
    "gptq 4 act-order": _gptq(4, 8, act_order=True),
    "gptq 4 rows": _gptq(4, -1),
    "gptq 4 v2 asym": _gptq(4, 16, sym=False, v2=True),
    "gptq 8 sym": _gptq(8, 16),
    "gptq 8 asym act-order": _gptq(8, 8, sym=False, act_order=True),
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, lambda r, n, k: awq(r, n, k, group=16)
    ),
    "auto-round gptq": Format(
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "packing_format": "auto_round:auto_gptq"},
        lambda r, n, k: gptq(r, n, k, bits=4, group=16, sym=True, act_order=False, v2=False),
    ),
    "auto-round awq": Format(
        {"quant_method": "intel/auto-round", "bits": 4, "group_size": 16, "sym": False, "packing_format": "auto_round:auto_awq"},
        lambda r, n, k: awq(r, n, k, group=16),
    ),
    "ct w4a16": Format(
        ct("pack-quantized", num_bits=4, strategy="group", group_size=16), lambda r, n, k: packed(r, n, k, bits=4, group=16, sym=True)
    ),
    "ct w4a16 asym": Format(
        ct("pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False),
        lambda r, n, k: packed(r, n, k, bits=4, group=16, sym=False),
    ),
    "ct w4a16 ordered": Format(
        ct("pack-quantized", num_bits=4, strategy="group", group_size=8, actorder="group"),
        lambda r, n, k: packed(r, n, k, bits=4, group=8, sym=True, ordered=True),
    ),
    "ct w8a16": Format(ct("pack-quantized", num_bits=8, strategy="channel"), lambda r, n, k: packed(r, n, k, bits=8, group=0, sym=True)),
    "ct w8a8 token": Format(ct("int-quantized", TOKEN, num_bits=8, strategy="channel"), lambda r, n, k: plain_int8(r, n, k, fixed=False)),
    "ct w8a8 fixed": Format(
        ct("int-quantized", FIXED, num_bits=8, strategy="tensor"), lambda r, n, k: plain_int8(r, n, k, fixed=True, whole=True)
    ),
    "ct fp8": Format(
        ct("float-quantized", {**TOKEN, "type": "float"}, num_bits=8, type="float", strategy="channel"),
        lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=None, shape="row"),
    ),
    "ct fp8 block": Format(
        ct("float-quantized", {**TOKEN, "type": "float"}, num_bits=8, type="float", strategy="block", block_structure=[16, 24]),
        lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=(16, 24)),
    ),
    "ct nvfp4": Format(
        ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        lambda r, n, k: nvfp4(r, n, k, divided=True),
    ),
    "fp8": Format(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=None, shape="none", fixed=True),
    ),
    "fp8 e5m2": Format({"quant_method": "fp8"}, lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=None, wide=True)),
    "fp8 blocks": Format(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]},
        lambda r, n, k: fp8(r, n, k, suffix=".weight_scale_inv", blocks=(16, 24)),
    ),
    "fbgemm": Format({"quant_method": "fbgemm_fp8"}, lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=None, shape="row")),
    "modelopt fp8": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda r, n, k: fp8(r, n, k, suffix=".weight_scale", blocks=None, shape="none", fixed=True),
    ),
    "modelopt nvfp4": Format({"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda r, n, k: nvfp4(r, n, k, divided=False)),
    "bnb nf4": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda r, n, k: nf4(r, n, k, block=16, double=False),
    ),
    "bnb nf4 double": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda r, n, k: nf4(r, n, k, block=16, double=True),
    ),
    "bnb int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
}
