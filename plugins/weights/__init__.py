"""Where weights come from, as plugins of the engine: safetensors files, GGUF files, or seeded random numbers.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: models, devices.
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.hookspecs import WeightSourceSpec, hookimpl
from penstock.plugins.gguf import is_gguf

SAFETENSORS = "safetensors"


def _safetensors(path: str, load_format: str, **options: Any) -> Any:
    from penstock.plugins.weights.checkpoint import Checkpoint

    return Checkpoint(path, dtype=options["dtype"])


def _gguf(path: str, load_format: str, **options: Any) -> Any:
    from penstock.plugins.weights.gguf import GgufWeights

    return GgufWeights(path, options["dtype"])


def _gguf_config(path: str) -> dict[str, Any]:
    from penstock.plugins.gguf.config import config_of

    return config_of(path)


def _dummy(path: str, load_format: str, **options: Any) -> Any:
    from penstock.plugins.weights.dummy import DummyWeights

    return DummyWeights(dtype=options["dtype"], seed=options.get("seed", 0), std=options.get("std", 0.02), device=options.get("device"))


@hookimpl
def register_weight_sources() -> list[WeightSourceSpec]:
    """`factory(path, load_format, dtype=torch dtype, seed=int, std=float, device=torch device or nothing)` returns an object of
    plugins/models/api.py's Weights. With a device, tensors may lie there or on the host, and `take` may be called from several threads."""
    return [
        WeightSourceSpec(
            name=SAFETENSORS,
            api_level=1,
            doc="Memory-mapped safetensors files.",
            load_formats=["auto", SAFETENSORS],
            factory=_safetensors,
        ),
        WeightSourceSpec(
            name="gguf",
            api_level=1,
            doc="Memory-mapped GGUF files.",
            load_formats=["auto", "gguf"],
            factory=_gguf,
            matches=is_gguf,
            config=_gguf_config,
        ),
        WeightSourceSpec(
            name="dummy", api_level=1, doc="Seeded random weights.", load_formats=["dummy"], factory=_dummy, matches=lambda path: True
        ),
    ]
