"""The embedding table and the output head, which may be one tensor.

What it is: the one place that decides, from `tie_word_embeddings` and from what the checkpoint holds, which tensor is which, as transformers
does: tied, with both tensors there and different, they are used as they are; with only one of them there, that one is both.
What it does not know: packing, devices, files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.models.api import Weights

log = logging.getLogger("penstock.models")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Take = Callable[[], torch.Tensor]


class Ends(NamedTuple):
    """Each is called once, from any thread. Without a head, the table is it."""

    table: Take
    head: Take | None


def ends_of(facts: ModelFacts, weights: Weights, *, quantised: bool = False) -> Ends:
    """Raises CheckpointError, here or when a tensor is taken. A source that cannot say what it holds is asked for what the configuration
    names. `quantised`: the checkpoint holds a head in quantised form, which is then no table, whatever the configuration says; it is not taken here."""
    shape = (facts.vocab_size, facts.hidden_size)

    def later(name: str) -> Take:
        return lambda: weights.take(name, shape)

    if not facts.tie_word_embeddings or quantised:
        return Ends(later(TABLE), later(HEAD))
    has = getattr(weights, "has", None)
    if has is None or not has(HEAD):
        weights.ignore(HEAD)
        return Ends(later(TABLE), None)
    if not has(TABLE):
        log.info("tied embeddings: the checkpoint holds %s only, which is the embedding table too", HEAD)
        return Ends(later(HEAD), None)
    table, head = weights.take(TABLE, shape), weights.take(HEAD, shape)
    if torch.equal(table, head):
        return Ends(lambda: table, None)
    log.warning(
        "config.json says 'tie_word_embeddings', but the checkpoint holds %s and a different %s: each is used as it is, not tied",
        TABLE,
        HEAD,
    )
    return Ends(lambda: table, lambda: head)
