"""What a drafter's folder holds: heads of the wrong kind are named before their first tensor is missed.

What it is: `check_kind`, which goes by the tensors where they tell, and by the words of config.json elsewhere; what neither tells of is left to whoever reads it.
What it does not know: how any of them drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.protocol.errors import CheckpointError, spelled
from penstock.core.protocol.speculation import method_of

KINDS = {
    "medusa": "Medusa heads",
    "eagle3": "an EAGLE-3 head",
    "eagle": "an EAGLE head",
    "mtp": "a multi-token prediction layer",
    "draft_model": "a model of its own",
}
"""By the method that takes it."""
MEDUSA = ("", "medusa_head.", "medusa_heads.")
"""Before the names of Medusa's tensors."""


def check_kind(method: str, folder: str, raw: Mapping[str, Any], has: Callable[[str], bool] | None, layers: int) -> None:
    """`raw`: its config.json; `has(tensor)`, where tensors can be asked for; `layers`: the model's. Raises CheckpointError naming the method, what the folder is and what helps."""
    told, why = ("", "") if has is None else _by_tensors(has, layers)
    if not told:
        told = method_of(raw)
        if told not in KINDS or told == "draft_model":  # nothing in config.json says otherwise
            return
        said = raw.get("speculators_model_type") or raw.get("architectures") or raw.get("model_type")
        why = f"its config.json says {said!r:.80}"
    if told != method:
        raise CheckpointError(
            f"--speculative-config: the method {method!r} takes {KINDS.get(method, 'something else')}, but {spelled(folder)} is {KINDS[told]} ({why}). Say"
            f' "method": "{told}", or leave the method out, or give another folder.',
            param="speculative_config",
        )


def _by_tensors(has: Callable[[str], bool], layers: int) -> tuple[str, str]:
    """(the method, which tensor says so)."""
    marks = (
        *(("medusa", f"{before}0.0.linear.weight") for before in MEDUSA),
        ("eagle3", "midlayer.hidden_norm.weight"),
        ("eagle3", "layers.0.hidden_norm.weight"),
        ("mtp", f"model.layers.{layers}.enorm.weight"),
        ("eagle", "fc.weight"),  # EAGLE-3 has one too
        ("draft_model", "model.layers.0.self_attn.q_proj.weight"),  # so may heads, whose names are also looked for without "model."
    )
    return next(((method, f"it has a tensor {name!r}") for method, name in marks if has(name)), ("", ""))
