"""What the KV cache holds: the word of --kv-cache-dtype, or the checkpoint's; and the scales that a checkpoint brings for it.

What it is: `wanted`, from the option and from `quantization_config` in config.json (`kv_cache_scheme` of compressed-tensors and ModelOpt, ModelOpt's `kv_cache_quant_algo`);
`scales`, from the tensors that these formats store. A checkpoint's scale is one number for all keys (or values) of a layer: it takes the place of
the scales of tokens there, and what is larger saturates.
What it does not know: pages, kernels, which backend can.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.kernels.attention.codes import KINDS
from penstock.plugins.devices.quantising import method_of
from penstock.plugins.models.api import Weights

log = logging.getLogger("penstock.weights")
WIDE = ("bfloat16", "float16", "float32")
NAMES = (
    ("{at}.k_scale", "{at}.v_scale"),
    ("{at}.k_proj.k_scale", "{at}.v_proj.v_scale"),
    ("{at}.attn.k_scale", "{at}.attn.v_scale"),
    ("{at}.k_proj.output_scale", "{at}.v_proj.output_scale"),
    ("{at}.kv_scale", "{at}.kv_scale"),
)
"""How checkpoints call the scales of keys and values; the first that is there counts."""


class Wanted(NamedTuple):
    """What the cache is to hold."""

    kind: str
    """One of KINDS; "": the model's dtype."""
    asked: bool
    """By the option: what cannot be done is an error. Else by the checkpoint: then the dtype serves, too."""
    scaled: bool
    """The checkpoint's own scales are of this kind."""


def wanted(config: RunnerConfig, raw: Mapping[str, Any], dtype: str) -> Wanted:
    """`dtype`: what the model computes in. Raises ConfigError naming the option, CheckpointError naming the field."""
    word, own = config.kv_cache_dtype, scheme_of(raw)
    if word == "auto":
        return Wanted(own or "", False, bool(own))
    if word in KINDS:  # files without a word about it that have such scales nonetheless have those of E4M3
        return Wanted(word, True, word == (own or "fp8_e4m3"))
    if word in WIDE and word != dtype:
        raise ConfigError(
            f"--kv-cache-dtype {word}: the model computes in {dtype}. Use {dtype} or auto, or one of {', '.join(('fp8', *KINDS))}.",
            param="kv_cache_dtype",
        )
    if word != dtype:
        raise ConfigError(f"--kv-cache-dtype {word} is not known: use one of auto, fp8, {', '.join(KINDS)}.", param="kv_cache_dtype")
    return Wanted("", True, False)


def scheme_of(raw: Mapping[str, Any]) -> str | None:
    """One of KINDS, if config.json says that the checkpoint was made for such a cache. Raises CheckpointError for a field that is none."""
    _, fields = method_of(raw)
    inner = fields.get("quantization")
    fields = {**(inner if isinstance(inner, Mapping) else {}), **fields}
    word = fields.get("kv_cache_quant_algo")
    if isinstance(word, str) and word.upper() == "FP8":
        return "fp8_e4m3"
    scheme = fields.get("kv_cache_scheme")
    if scheme is None or (isinstance(scheme, str) and not scheme):
        return None
    if not isinstance(scheme, Mapping):
        raise CheckpointError(
            f"config.json: 'quantization_config.kv_cache_scheme' must be an object, but is {scheme!r:.60}.", param="kv_cache_scheme"
        )
    bits, kind = scheme.get("num_bits"), scheme.get("type")
    if bits == 8 and kind in ("float", "int") and scheme.get("symmetric") in (None, True):
        return "fp8_e4m3" if kind == "float" else "int8"
    log.warning("config.json: 'kv_cache_scheme' of %r bits and type %r is not served: the KV cache has the model's dtype.", bits, kind)
    return None


def scales(weights: Weights, layers: int, wanted: Wanted) -> list[tuple[float, float] | None] | None:
    """(of keys, of values) a layer, None where there are none; None if no layer has any, or the cache is of another kind. They count as known to
    `weights` in any case. Raises CheckpointError naming a tensor that is no scale."""
    found: list[tuple[float, float] | None] = []
    has, raw = getattr(weights, "has", None), getattr(weights, "raw", None)
    odd = ""
    for layer in range(layers):
        pairs = [(k.format(at=at), v.format(at=at)) for at in (f"model.layers.{layer}.self_attn",) for k, v in NAMES]
        weights.ignore(*(name for pair in pairs for name in pair))
        names = None if has is None or raw is None else next((pair for pair in pairs if has(pair[0]) and has(pair[1])), None)
        if names is None or not wanted.kind or not wanted.scaled:
            found.append(None)
            continue
        assert raw is not None
        tensors = [raw(name) for name in names]
        if any(tensor.numel() != 1 for tensor in tensors):
            odd = odd or names[0]
            found.append(None)
            continue
        k, v = (_number(name, float(tensor.float())) for name, tensor in zip(names, tensors, strict=True))
        found.append((k, v))
    if odd:
        log.warning("tensor %r holds more than one scale, which is not served: every token gets a scale of its own there.", odd)
    given = sum(pair is not None for pair in found)
    if given:
        log.info("the KV cache has the checkpoint's scales in %d of %d layers", given, layers)
    return found if given else None


def _number(name: str, value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"tensor {name!r} holds {value!r}, which is no scale: it must be above 0.", param=name)
    return value
