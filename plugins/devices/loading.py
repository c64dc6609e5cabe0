"""What a device is put together from, and the putting together, for every device alike.

What it is: config.json as the device's plugins will read it; the choice of model family, dtype, attention backend and weight source among what plugins
registered (of equal ones later plugins come before built-in ones, so that a plugin may serve `--load-format auto` or an architecture in their place);
and the loading of a model onto the device's operations.
What it does not know: sizes of caches, how a device computes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts, RunnerConfig
from penstock.core.contract.families import FAMILIES
from penstock.core.contract.guard import fault
from penstock.core.contract.hookspecs import AttentionSpec, ModelSpec, WeightSourceSpec
from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError, PluginFault, UnsupportedFeature, spelled
from penstock.plugins import attention as builtin_attention
from penstock.plugins import models as builtin_models
from penstock.plugins import weights as builtin_weights
from penstock.plugins.devices import kv_cache
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.devices.quantising import quantizer_for, rounding_for, say_head, say_wide
from penstock.plugins.models.api import Attention, Model, Quantizer
from penstock.plugins.models.builder import Builder
from penstock.plugins.models.config import architecture_of, check_model_type, read_config
from penstock.plugins.weights.checked import CheckedWeights
from penstock.plugins.weights.checkpoint import EXPLICIT, sample_of, stored_dtype
from penstock.version import __version__

log = logging.getLogger("penstock.weights")
WHERE = {"cpu": "the CPU", "cuda": "the GPU"}
"""Devices in sentences."""


class Choice(NamedTuple):
    """What is loaded, and for which device."""

    device: str
    """The device's name, as plugins know it."""
    raw: dict[str, Any]
    """config.json with what overrides and files add to it."""
    spec: ModelSpec
    facts: ModelFacts
    dtype_name: str
    dtype: torch.dtype
    attention: AttentionSpec
    quantizer: Quantizer | None
    kv: kv_cache.Wanted
    """What the KV cache holds."""
    rounding: Quantizer | None = None
    """Of the output head."""

    @property
    def kv_name(self) -> str:
        """The word of --kv-cache-dtype for it."""
        return self.kv.kind or self.dtype_name


def choose(
    config: RunnerConfig,
    device: str,
    dtypes: Mapping[str, torch.dtype],
    *,
    other: str,
    attention: AttentionSpec | None = None,
    check: Callable[[ModelFacts], None] = lambda facts: None,
) -> Choice:
    """Choose for a configuration. `dtypes`: what the device computes; `other`: what becomes of a checkpoint in another one; `attention`: not chosen,
    but given; `check` raises what the device has against the model. Raises ConfigError, CheckpointError or UnsupportedFeature naming the field."""
    raw, spec, facts = model_of(config)
    name = resolve_dtype(config.dtype, facts, dtypes, device, other)
    check(facts)
    kv = kv_cache.wanted(config, raw, name)
    chosen = attention or choose_attention(config, facts, name, device, kv.kind if kv.asked else "")
    if kv.kind and kv.kind not in chosen.kv_dtypes:
        log.warning(
            "config.json: its KV cache of %s has the model's dtype here, since attention backend %s keeps no other.", kv.kind, chosen.name
        )
        kv = kv_cache.Wanted("", False, False)
    blamed = functools.partial(blame, config, "quantizers")
    quantizer, rounding = quantizer_for(config, raw, facts, device, blamed), rounding_for(config, facts, device, blamed)
    if quantizer is not None:
        log.info("quantised weights: %s", quantizer.method)
    if kv.kind:
        log.info("KV cache: %s", kv.kind)
    return Choice(device, raw, spec, facts, name, dtypes[name], chosen, quantizer, kv, rounding)


def load_model(
    config: RunnerConfig,
    choice: Choice,
    ops: DeviceOps,
    device: torch.device,
    *,
    max_len: int,
    max_rows: int,
    progress: Callable[[str, float], None],
    finite: bool = False,
) -> tuple[Model, str]:
    """(the model, an identity of its checkpoint). `finite`: see builder_for. Raises CheckpointError and torch.OutOfMemoryError."""
    facts, dtype = choice.facts, choice.dtype
    attention: Attention = choice.attention.factory(
        facts=facts,
        dtype=dtype,
        device=device,
        block_size=config.block_size,
        max_rows=max_rows,
        deterministic=config.deterministic,
        **({"kv": choice.kv.kind} if choice.kv.kind else {}),
    )
    check_attention(config, choice, attention)
    progress("loading weights", 0.0)
    std = float(choice.raw.get("initializer_range") or 0.02)
    tell = functools.partial(progress, "loading weights")
    builder = builder_for(
        config, ops, dtype, device, std=std, tell=tell, quantizer=choice.quantizer, rounding=choice.rounding, finite=finite
    )
    given = kv_cache.scales(builder.weights, facts.num_layers, choice.kv)
    if given is not None:
        fix = getattr(attention, "fix_scales", None)
        if fix is None:
            raise blame(
                config,
                "attention_backends",
                choice.attention.name,
                "factory",
                "returned an object without 'fix_scales', for a KV cache in 8 bits",
            )
        fix(given)
    model: Model = choice.spec.factory(facts=facts, builder=builder, attention=attention, max_len=max_len)
    say_wide(builder.wide, WHERE.get(device.type, device.type))
    say_head(config, builder.rounded, facts)
    for name in ("weights_bytes", "tables_bytes"):
        if type(getattr(model, name)) is not int:
            said = f"returned a model whose {name!r} is {getattr(model, name)!r:.60}, not a number of bytes"
            raise blame(config, "models", choice.spec.name, "factory", said)
    return model, identity(config, builder.weights)


def builder_for(
    config: RunnerConfig,
    ops: DeviceOps,
    dtype: torch.dtype,
    device: torch.device,
    *,
    std: float = 0.02,
    tell: Callable[[float], None] | None = None,
    quantizer: Quantizer | None = None,
    rounding: Quantizer | None = None,
    finite: bool = False,
) -> Builder:
    """What makes layers of the tensors in config.model_path. `finite`: wide ones with NaN or infinity are refused (of a drafter, whose drafts nobody would miss)."""
    source = weights_for(config)
    weights = source.factory(
        config.model_path,
        config.load_format,
        dtype=dtype,
        seed=config.seed,
        std=std,
        **({} if device.type == "cpu" else {"device": device}),
    )
    taken = CheckedWeights(weights, dtype, functools.partial(blame, config, "weight_sources", source.name, "take"), finite)
    return Builder(taken, ops, dtype, device, tell, quantizer, rounding)


def resolve_dtype(wanted: str, facts: ModelFacts, dtypes: Mapping[str, torch.dtype], device: str, other: str) -> str:
    """ "auto" is the checkpoint's dtype, or `other` for one that the device does not compute. Raises ConfigError for such a dtype by name."""
    name = {"half": "float16", "float": "float32"}.get(wanted, wanted)
    if name == "auto":
        return facts.torch_dtype if facts.torch_dtype in dtypes else other
    if name not in dtypes:
        raise ConfigError(f"--dtype {wanted} is not supported on {WHERE.get(device, device)}: use {' or '.join(dtypes)}.", param="dtype")
    return name


def choose_attention(config: RunnerConfig, facts: ModelFacts, dtype: str, device: str, kv: str = "") -> AttentionSpec:
    """--attention-backend, or a plugin's choice, or the highest priority among those for the device that support the model and, if `kv` is not "", a KV cache
    of that kind."""
    able, reasons, kept = [], [], list[str]()
    for spec in attention_of(config).values():
        if device in spec.devices:
            reason = spec.supports(facts, dtype)
            if reason is None and kv and kv not in spec.kv_dtypes:
                reason = f"it keeps no KV cache of {kv}"
                kept.append(spec.name)
            if reason is None:
                able.append(spec)
            else:
                reasons.append(f"{spec.name}: {reason}")
    able.sort(key=lambda spec: (-spec.priority, spec.name))
    names = [spec.name for spec in able]
    wanted = config.attention_backend
    if wanted is None and config.plugins is not None and names:
        wanted = config.plugins.hook.choose_attention_backend(facts=facts, device=device, dtype=dtype, candidates=names)
    if wanted is None and names:
        return able[0]
    if wanted in names:
        return able[names.index(wanted)]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    if wanted in kept or (wanted is None and kept):
        raise ConfigError(
            f"--kv-cache-dtype {kv}: attention backend {wanted or ', '.join(kept)} keeps keys and values in the model's dtype alone on"
            f" {WHERE.get(device, device)}. Use {'--attention-backend ' + names[0] if names else '--kv-cache-dtype ' + dtype}.",
            param="kv_cache_dtype",
        )
    raise ConfigError(
        f"--attention-backend {wanted or 'auto'}: not usable for this model on {WHERE.get(device, device)}{why}. Usable: {', '.join(names) or 'none'}.",
        param="attention_backend",
    )


def fingerprint(*parts: object) -> str:
    """A digest of everything that numerics depend on, version of Penstock and torch included."""
    text = "\n".join(str(part) for part in (__version__, torch.__version__, *parts))
    return "pk_" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def model_of(config: RunnerConfig) -> tuple[dict[str, Any], ModelSpec, ModelFacts]:
    """(config.json with what overrides and files add to it, the family that serves it, its facts). Raises CheckpointError and
    UnsupportedFeature naming the field."""
    if EXPLICIT in (config.hf_overrides or {}):
        raise ConfigError(f"--hf-overrides: {EXPLICIT} counts in config.json alone, which says what the folder holds.", param=EXPLICIT)
    raw = read_config(config.model_path, config.hf_overrides, own_config(config))
    check_model_type(raw)
    spec = model_for(architecture_of(raw), models_of(config))
    if raw.get("dtype") is None and raw.get("torch_dtype") is None and weights_for(config).name == builtin_weights.SAFETENSORS:
        stored = stored_dtype(config.model_path)
        raw |= {"dtype": stored} if stored else {}
    facts = spec.facts(raw)
    wrong = wrong_facts(facts)
    if wrong:
        raise blame(config, "models", spec.name, "facts", wrong)
    return raw, spec, facts


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position")


def wrong_facts(facts: Any) -> str | None:
    """What is wrong with what a family says of a model, or None."""
    if not isinstance(facts, ModelFacts):
        return f"returned {type(facts).__name__}, not ModelFacts"
    for name in SIZES:
        value = getattr(facts, name)
        if type(value) is not int or value < 1:
            return f"returned {name} {value!r}, which must be a number above 0"
    if facts.num_heads % facts.num_kv_heads:
        return f"returned {facts.num_heads} heads for {facts.num_kv_heads} KV heads, which does not divide"
    return None


def check_attention(config: RunnerConfig, choice: Choice, attention: Attention) -> None:
    """Raises PluginFault naming the backend for attributes that cannot be used, and for a pool that is not what it says."""
    name, facts = choice.attention.name, choice.facts

    def wrong(call: str, what: Exception | str) -> PluginFault:
        return blame(config, "attention_backends", name, call, what)

    for member, kind in (("name", str), ("kv_layout", str), ("bytes_per_token", int), ("workspace_bytes", int), ("capturable", bool)):
        value = getattr(attention, member)
        if type(value) is not kind or (member in ("kv_layout", "bytes_per_token") and not value):
            raise wrong(
                "factory", f"returned an object whose {member!r} is {value!r:.60}, not {'a text' if kind is str else kind.__name__}"
            )

    def asked(call: str, of: Callable[[], Any]) -> Any:
        try:
            return of()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise wrong(call, error) from error

    page = facts.num_layers * attention.bytes_per_token * config.block_size
    pool = asked("allocate", lambda: attention.allocate(1))
    if not isinstance(pool, torch.Tensor) or pool.nbytes != page:
        found = f"a tensor of {pool.nbytes} bytes" if isinstance(pool, torch.Tensor) else type(pool).__name__
        raise wrong("allocate", f"returned {found} for one block, which by its bytes_per_token takes {page}")
    caches = asked("caches", lambda: attention.caches(pool))
    if not isinstance(caches, (list, tuple)) or len(caches) != facts.num_layers:
        found = f"{len(caches)}" if isinstance(caches, (list, tuple)) else type(caches).__name__
        raise wrong("caches", f"returned {found}, not one for each of {facts.num_layers} layers")


def blame(config: RunnerConfig, family: str, name: str, call: str, what: Exception | str) -> PluginFault:
    """A fault of the plugin that brought this spec."""
    if config.plugins is not None and hasattr(config.plugins, "blame"):
        found: PluginFault = config.plugins.blame(family, name, call, what)
        return found
    return fault(f"The {FAMILIES[family].noun} {name!r}", call, what, "Fix or uninstall it.")


def models_of(config: RunnerConfig) -> Mapping[str, ModelSpec]:
    """Model families by name, built-in ones first."""
    return config.plugins.models() if config.plugins is not None else {s.name: s for s in builtin_models.register_models()}


def attention_of(config: RunnerConfig) -> Mapping[str, AttentionSpec]:
    """Attention backends by name, built-in ones first."""
    if config.plugins is not None:
        return dict(config.plugins.attention_backends())
    return {s.name: s for s in builtin_attention.register_attention_backends()}


def model_for(architecture: str, specs: Mapping[str, ModelSpec]) -> ModelSpec:
    """The family that serves config.json's architecture: the highest priority, of equal ones the last. Raises UnsupportedFeature listing
    those known."""
    able = [spec for spec in specs.values() if architecture in spec.architectures]
    if able:
        return max(reversed(able), key=lambda spec: spec.priority)
    known = ", ".join(sorted({name for spec in specs.values() for name in spec.architectures}))
    raise UnsupportedFeature(f"config.json: architecture {architecture!r} is not supported yet. Known: {known}.", param="architectures")


def weights_of(config: RunnerConfig) -> list[WeightSourceSpec]:
    """Weight sources, built-in ones first."""
    return list(config.plugins.weight_sources().values()) if config.plugins is not None else builtin_weights.register_weight_sources()


def weights_for(config: RunnerConfig) -> WeightSourceSpec:
    """The source that serves --load-format and reads the model's path. Raises ConfigError listing the formats known."""
    wanted, specs = config.load_format, weights_of(config)
    serving = [spec for spec in reversed(specs) if wanted in spec.load_formats]
    for spec in serving:
        if _reads(spec, config.model_path):
            return spec
    known = sorted({name for spec in specs for name in spec.load_formats})
    if serving:
        raise ConfigError(
            f"--load-format {wanted}: {spelled(config.model_path)} is nothing that it reads. Leave the option out.", param="load_format"
        )
    raise ConfigError(
        f"--load-format {wanted}: no plugin serves it.{nearest(wanted, known)} Known: {', '.join(known)}.", param="load_format"
    )


def _reads(spec: WeightSourceSpec, path: str) -> bool:
    return Path(path).is_dir() if spec.matches is None else spec.matches(path)


def own_config(config: RunnerConfig) -> dict[str, Any] | None:
    """The configuration of a model that has no config.json, from the source that reads it; None for every other."""
    path, specs = config.model_path, reversed(weights_of(config))
    spec = next((spec for spec in specs if spec.config is not None and _reads(spec, path)), None)
    if spec is None or spec.config is None:
        return None
    found = spec.config(path)
    if not isinstance(found, dict):
        raise blame(config, "weight_sources", spec.name, "config", f"returned {type(found).__name__}, not a dict of config.json's fields")
    return found


def identity(config: RunnerConfig, weights: Any) -> str:
    """A digest that changes with the checkpoint: its configuration and what the weight source says of itself (`identity()`, a text), or else every
    file of the folder."""
    given = own_config(config)
    whole = (Path(config.model_path) / "config.json").read_bytes() if given is None else json.dumps(given, sort_keys=True).encode()
    digest = hashlib.sha256(whole)
    own = getattr(weights, "identity", None)
    if own is not None:
        digest.update(str(own()).encode())
    elif Path(config.model_path).is_file():
        digest.update(f"{config.load_format}".encode() + sample_of(Path(config.model_path)))
    else:
        for file in sorted(file for file in Path(config.model_path).iterdir() if file.is_file()):
            digest.update(f"{file.name} {config.load_format}".encode() + sample_of(file))
    return digest.hexdigest()
