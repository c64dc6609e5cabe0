"""AutoRound checkpoints (Cheng et al. 2024, arXiv 2309.05516): their own names for the packings of GPTQ and AWQ.

What it is: `auto_round`, the reader of the packing that `packing_format` names.
What it does not know: how either stores a layer.
"""

from __future__ import annotations

from typing import Any

from penstock.plugins.quantizers.awq import Awq
from penstock.plugins.quantizers.fields import Fields
from penstock.plugins.quantizers.gptq import Gptq

PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_gptq": "gptq",
    "auto_awq": "awq",
}


def auto_round(config: dict[str, Any]) -> Gptq | Awq:
    """Raises UnsupportedFeature for another packing."""
    fields = Fields(config)
    packing = PACKINGS[fields.word("packing_format", "auto_round:auto_gptq", *PACKINGS)]
    fields.word("data_type", "int", "int")
    if not _plain(fields.inner("extra_config"), config):
        raise fields.refuse("extra_config", "quantised layers with settings of their own are not supported yet.")
    if packing == "awq":
        return Awq({"bits": config.get("bits"), "group_size": config.get("group_size"), "zero_point": not config.get("sym", True)})
    return Gptq({**config, "checkpoint_format": packing})


def _plain(layers: Fields | None, config: dict[str, Any]) -> bool:
    """Whether all of them are wide (which the files say, too), or as the others."""

    def same(one: Any) -> bool:
        if not isinstance(one, dict):
            return False
        bits = one.get("bits", config.get("bits"))
        wide = type(bits) is int and bits >= 16
        return wide or all(one.get(name, config.get(name)) == config.get(name) for name in ("bits", "group_size", "sym"))

    return layers is None or all(map(same, layers.config.values()))
