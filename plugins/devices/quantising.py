"""Which quantizer reads a checkpoint, or quantises it while it loads.

What it is: the choice among what plugins registered, by `quantization_config` in config.json and `--quantization`, and the words for what cannot be.
What it does not know: formats, devices' kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.contract.devices import ModelFacts, RunnerConfig
from penstock.core.contract.hookspecs import QuantizerSpec
from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import CheckpointError, ConfigError, UnsupportedFeature
from penstock.kernels.linear.scheme import Scheme
from penstock.plugins import quantizers as builtin_quantizers
from penstock.plugins.models.api import Quantizer
from penstock.plugins.quantizers.checked import CheckedQuantizer

log = logging.getLogger("penstock.weights")
Blame = Callable[[str, str, Exception | str], Exception]
CONFIGS = ("quantization_config", "compression_config")
"""Names that config.json gives it, the one that counts first."""


def quantizers_of(config: RunnerConfig) -> Mapping[str, QuantizerSpec]:
    """Quantizers by name, built-in ones first."""
    if config.plugins is not None:
        return dict(config.plugins.quantizers())
    return {spec.name: spec for spec in builtin_quantizers.register_quantizers()}


def quantizer_for(config: RunnerConfig, raw: Mapping[str, Any], facts: ModelFacts, device: str, blame: Blame) -> Quantizer | None:
    """`blame(name, call, what)`: the error that names the plugin. None: nothing is quantised. Raises ConfigError naming the option, CheckpointError or UnsupportedFeature naming the field."""
    specs = list(quantizers_of(config).values())
    wanted = config.quantization
    method, own = method_of(raw)
    if method is None:
        if wanted is None:
            return None
        able = [spec for spec in reversed(specs) if wanted in spec.schemes]
        if not able:
            raise ConfigError(_unknown(wanted, specs), param="quantization")
        return _made(able[0], wanted, {}, facts, device, blame)
    if wanted is not None and _plain(wanted) != method:
        raise ConfigError(
            f"--quantization {wanted}: the checkpoint is quantised already (config.json: {method}). Leave the option out, or take the wide checkpoint.",
            param="quantization",
        )
    able = [spec for spec in reversed(specs) if method in spec.methods]
    if not able:
        known = ", ".join(sorted({one for spec in specs for one in spec.methods}))
        raise UnsupportedFeature(f"config.json: quant_method {method!r} is not supported yet. Known: {known}.", param="quant_method")
    return _made(able[0], method, own, facts, device, blame)


def rounding_for(config: RunnerConfig, facts: ModelFacts, device: str, blame: Blame) -> Quantizer | None:
    """What quantises the output head, by `--lm-head-quantization`. Raises ConfigError naming the option."""
    wanted = config.lm_head_quantization
    if wanted is None:
        return None
    specs = list(quantizers_of(config).values())
    able = [spec for spec in reversed(specs) if wanted in spec.schemes]
    if not able:
        words = sorted({word for spec in specs for word in spec.schemes})
        raise ConfigError(
            f"--lm-head-quantization {wanted}: no plugin knows it.{nearest(wanted, words)} Known: {', '.join(words)}.",
            param="lm_head_quantization",
        )
    return _made(able[0], wanted, {}, facts, device, blame, head=True)


def say_head(config: RunnerConfig, made: Scheme | None, facts: ModelFacts) -> None:
    """What the quantised output head means, where the option asked for one. Raises ConfigError where it had no effect."""
    wanted = config.lm_head_quantization
    if wanted is None:
        return
    if made is None:
        raise ConfigError(
            f"--lm-head-quantization {wanted}: this model's family builds its output head itself. Leave the option out.",
            param="lm_head_quantization",
        )
    log.warning(
        "the output head (%d x %d) is rounded to %s while loading, which no record of the checkpoint's quality covers%s. What it costs: penstock quant report"
        " MODEL%s --lm-head-quantization %s",
        facts.vocab_size,
        facts.hidden_size,
        wanted,
        "; the embedding table that it was tied to stays wide beside it" if facts.tie_word_embeddings else "",
        f" --quantization {config.quantization}" if config.quantization else "",
        wanted,
    )


def method_of(raw: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(quant_method, the configuration) of config.json; (None, {}) where it has none."""
    name = next((name for name in CONFIGS if raw.get(name)), None)
    if name is None:
        return None, {}
    own = raw[name]
    if not isinstance(own, Mapping):
        raise CheckpointError(f"config.json: '{name}' must be an object, but is {own!r:.60}.", param=name)
    method = own.get("quant_method") or ("compressed-tensors" if "config_groups" in own else None)
    if not isinstance(method, str):
        raise CheckpointError(f"config.json: '{name}.quant_method' must name a method, but is {method!r:.60}.", param="quant_method")
    return method.lower(), dict(own)


def say_wide(wide: Mapping[Scheme, tuple[int, int]], device: str) -> None:
    """One warning a scheme for layers that the device multiplies as wide ones: how many, and the bytes that this takes."""
    for scheme, (layers, more) in wide.items():
        log.warning(
            "%d layers of %s (%s%s) are held in full width on %s, which has no kernel for them: %.2f GB more memory than as they are stored, and the time of an"
            " unquantised model; their values are those of the checkpoint.",
            layers,
            scheme.kind,
            f"groups of {scheme.group}" if scheme.group else "no groups",
            ", zero points" if scheme.zeros else "",
            device,
            more / 1e9,
        )


def _plain(word: str) -> str:
    """Other servers name kernels beside methods: gptq_marlin is gptq."""
    word = word.lower().replace("_marlin", "")
    return {"compressed_tensors": "compressed-tensors", "auto_round": "auto-round", "modelopt_fp4": "modelopt"}.get(word, word)


def _made(spec: QuantizerSpec, method: str, own: dict[str, Any], facts: ModelFacts, device: str, blame: Blame, **more: Any) -> Quantizer:
    made = spec.factory(method=method, config=own, facts=facts, device=device, **more)
    return CheckedQuantizer(made, functools.partial(blame, spec.name))


def _unknown(wanted: str, specs: list[QuantizerSpec]) -> str:
    words = sorted({word for spec in specs for word in spec.schemes})
    if any(_plain(wanted) in spec.methods for spec in specs):
        return (
            f"--quantization {wanted}: config.json has no quantization_config, so that the checkpoint is none of {wanted}. To quantise it while it loads"
            f" use one of {', '.join(words)}."
        )
    return f"--quantization {wanted}: no plugin knows it.{nearest(wanted, words)} Known: {', '.join(words)}."
