"""Rotary position embeddings: inverse frequencies and cos/sin tables for every rope_type.

What it is: the frequency formulas, computed in float32 in the same order of operations as `transformers`, so that tables are equal to its
bit by bit; and the one table that a server uses for all sequences.
Sources: RoFormer (arXiv 2104.09864); position interpolation (arXiv 2306.15595); NTK-aware dynamic scaling (as in transformers); YaRN
(arXiv 2309.00071); Llama 3.1's reference code; LongRoPE (arXiv 2402.13753).

Two types depend on the length of the sequence: `dynamic` (a base that grows past the trained length) and `longrope` (short or long factors).
A paged cache shares rotated keys between sequences of different length and keeps them while a sequence grows, so the choice is made once
for the server, from max_model_len: up to the trained (original) length the short form, above it the long form *for every position*. So
- max_model_len <= trained length: equal to transformers for every sequence;
- longer: equal to transformers for a one-shot pass of max_model_len tokens (dynamic) or of any length above the original one (longrope);
  shorter sequences get the long form too, which is said at start. transformers' own cached decoding mixes keys of several bases there,
  which no shared cache could reproduce.
What it does not know: attention, devices, caches.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.protocol.errors import CheckpointError

log = logging.getLogger("penstock.models")
SHORT = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""rope_type -> the longest sequence that has the short form."""


def inverse_frequencies(facts: ModelFacts, max_len: int) -> tuple[torch.Tensor, float]:
    """(inv_freq [head_dim / 2] float32, factor that multiplies cos and sin) for a server whose longest sequence is `max_len`.
    Raises CheckpointError for numbers that the formula cannot take."""
    try:
        return _frequencies(facts, max_len)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise CheckpointError(
            f"config.json: 'rope_parameters' ({facts.rope.type}, rope_theta {facts.rope.theta:g}, {facts.rope.params}) cannot be computed:"
            f" {error}.",
            param="rope_parameters",
        ) from None


def _frequencies(facts: ModelFacts, max_len: int) -> tuple[torch.Tensor, float]:
    rope, dim = facts.rope, facts.head_dim
    params: dict[str, Any] = rope.params
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / float(params["factor"]), 1.0
        case "dynamic":
            return _dynamic(rope.theta, exponents, dim, float(params["factor"]), int(params["max_position_embeddings"]), max_len), 1.0
        case "llama3":
            return _llama3(plain, params), 1.0
        case "yarn":
            return _yarn(rope.theta, exponents, dim, params)
        case "longrope":
            return _longrope(rope.theta, exponents, params, max_len)


def _dynamic(theta: float, exponents: torch.Tensor, dim: int, factor: float, trained: int, length: int) -> torch.Tensor:
    length = max(length, trained)
    base = theta * ((factor * length / trained) - (factor - 1)) ** (dim / (dim - 2))
    return torch.as_tensor(1.0 / (base**exponents))


def _llama3(plain: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    original = params["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, smoothed, scaled)


def _yarn(theta: float, exponents: torch.Tensor, dim: int, params: dict[str, Any]) -> tuple[torch.Tensor, float]:
    original = params["original_max_position_embeddings"]
    factor, attention = params["factor"], params.get("attention_factor")
    if attention is None:
        mscale, mscale_all = params.get("mscale"), params.get("mscale_all_dim")
        if mscale and mscale_all:
            attention = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            attention = _mscale(factor, 1)

    def rotations_at(count: float) -> float:
        return (dim * math.log(original / (count * 2 * math.pi))) / (2 * math.log(theta))

    low, high = rotations_at(params.get("beta_fast") or 32), rotations_at(params.get("beta_slow") or 1)
    if params["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = 0.001 if low == high else high - low
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / span, 0, 1)
    frequencies = theta**exponents
    extrapolated, interpolated = 1.0 / frequencies, 1.0 / (factor * frequencies)
    keep = 1 - ramp
    return torch.as_tensor(interpolated * (1 - keep) + extrapolated * keep), float(attention)


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _longrope(theta: float, exponents: torch.Tensor, params: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    original = params["original_max_position_embeddings"]
    name = "long_factor" if max_len > original else "short_factor"
    factors = torch.tensor(params[name], dtype=torch.float32)
    if factors.shape != exponents.shape:
        raise CheckpointError(f"config.json: '{name}' must hold {exponents.numel()} numbers, but holds {factors.numel()}.", param=name)
    factor, attention = params["factor"], params.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return torch.as_tensor(1.0 / (factors * theta**exponents)), float(attention)


def rope_tables(facts: ModelFacts, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [max_len, head_dim / 2] float32: angle = position * inv_freq, the attention factor multiplied in."""
    short = facts.rope.params.get(SHORT.get(facts.rope.type, ""))
    if short is not None and max_len > short:
        log.warning(
            "config.json: rope_type %s: with --max-model-len %d every sequence is computed in the form for more than %d tokens; transformers"
            " computes shorter ones in another. --max-model-len %d keeps to that one.",
            facts.rope.type,
            max_len,
            short,
            short,
        )
    inv_freq, scale = inverse_frequencies(facts, max_len)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq
    return (angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous()
