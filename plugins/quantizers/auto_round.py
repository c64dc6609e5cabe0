"""AutoRound checkpoints (Cheng et al. 2024, arXiv 2309.05516): their own names for the packings of GPTQ and AWQ.

What it is: `auto_round`, the reader of the packing that `packing_format` names, with what `extra_config` says of single layers.
What it does not know: how either stores a layer.
"""

from __future__ import annotations

from typing import Any

from penstock.plugins.quantizers.awq import Awq
from penstock.plugins.quantizers.fields import Fields
from penstock.plugins.quantizers.gptq import Gptq
from penstock.plugins.quantizers.overrides import auto_round_rules

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
    rules = auto_round_rules(fields)
    if packing != "awq":
        return Gptq({**config, "checkpoint_format": packing}, rules)
    told = tuple(rule if rule.fields is None else rule._replace(fields=_awq(rule.fields)) for rule in rules)
    return Awq(_awq(fields).config, told)


def _awq(fields: Fields) -> Fields:
    """The same in AutoAWQ's words."""
    named = {name: fields.config.get(name) for name in ("bits", "group_size")}
    return Fields({**named, "zero_point": not fields.flag("sym", True)}, fields.where)
