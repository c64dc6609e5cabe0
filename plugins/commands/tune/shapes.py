"""The sizes of a model that kernels see, out of its folder.

What it is: `shape_of`, by the family's own reading of config.json.
What it does not know: kernels, weights: none are read.
"""

from __future__ import annotations

from pathlib import Path

from penstock.kernels.tuning.section import Shape
from penstock.plugins.commands.quant.comparing import runner_config
from penstock.plugins.devices.loading import model_of


def shape_of(path: Path) -> tuple[Shape, bool]:
    """And whether its weights have fewer than 16 bits. Raises CheckpointError, ConfigError or UnsupportedFeature."""
    raw, _, facts = model_of(runner_config(path, None, "auto", None, "auto"))
    shape = Shape(
        path.absolute().name, facts.hidden_size, facts.intermediate_size, facts.num_heads, facts.num_kv_heads, facts.head_dim, facts.vocab_size, facts.qk_norm
    )  # fmt: skip
    return shape, "quantization_config" in raw or path.suffix == ".gguf"
