"""Medusa: further heads on the model's last hidden state, one for each token ahead.

What it is: the drafter of the method "medusa" (Cai et al. 2024, arXiv 2401.10774), and the layout of its checkpoints: head k of `medusa_num_heads` has `medusa_num_layers` residual
blocks x + silu(W x + b), named "k.i.linear.weight" and ".bias", then an output head of its own ("k.n.weight") or, where there is none, the model's. Drafts are a
chain, each head's own draw, or the tree that was asked for: a node at depth k with rank r is the r-th likeliest token of head k, whatever lies before it.
What it does not know: how drafts are verified, the model's layers.
"""

from __future__ import annotations

import numpy as np
import torch

from penstock.core.protocol.errors import CheckpointError, ConfigError, spelled
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.api import NoLayers, Parts, Seen
from penstock.plugins.drafters.growth import ranked
from penstock.plugins.drafters.kinds import MEDUSA, check_kind
from penstock.plugins.drafters.trees import Tree
from penstock.plugins.models.api import Linear
from penstock.plugins.models.builder import Part
from penstock.plugins.models.config import read_config

Tensor = torch.Tensor


class MedusaDrafter(NoLayers):
    """See Drafter."""

    name = "medusa"

    def __init__(self, config: DraftConfig, parts: Parts) -> None:
        if config.model is None:
            raise ConfigError(
                '--speculative-config: the method "medusa" needs "model", the folder of the heads.', param="speculative_config"
            )
        raw = read_config(config.model)
        builder = parts.builder(config.model)
        check_kind(self.name, config.model, raw, getattr(builder.weights, "has", None), parts.facts.num_layers)
        count, depth = (_number(raw, name) for name in ("medusa_num_heads", "medusa_num_layers"))
        hidden = parts.facts.hidden_size
        for name in ("hidden_size", "vocab_size"):
            own_size = getattr(parts.facts, name)
            if raw.get(name, own_size) != own_size:
                raise CheckpointError(
                    f"{config.model}: config.json says {name!r} {raw[name]}, the model has {own_size}: these heads are of another model.",
                    param=name,
                )
        tree = Tree.of(config.speculative_token_tree)
        if tree is not None and tree.deepest > count:
            raise ConfigError(
                f"--speculative-config: 'speculative_token_tree' is {tree.deepest} tokens deep, but the folder has {count} heads.",
                param="speculative_config",
            )
        asked = config.num_speculative_tokens or count
        if tree is None and asked > count:
            raise ConfigError(
                f"--speculative-config: 'num_speculative_tokens' is {asked}, but {spelled(config.model)} has {count} Medusa heads, each of which makes one draft."
                f" Ask for at most {count}, or leave the field out.",
                param="num_speculative_tokens",
            )
        has = getattr(builder.weights, "has", lambda name: True)
        prefix = next((one for one in MEDUSA if has(f"{one}0.0.linear.weight")), "")
        bias = has(f"{prefix}0.0.linear.bias")

        def stack(head: int) -> tuple[list[Linear], Linear | None]:
            blocks = [builder.linear([Part(f"{prefix}{head}.{layer}.linear", hidden)], hidden, bias=bias) for layer in range(depth)]
            own = f"{prefix}{head}.{depth}"
            return blocks, builder.linear([Part(own, parts.facts.vocab_size)], hidden) if has(f"{own}.weight") else None

        self._stacks = [stack(head) for head in range(count)]
        builder.finish()
        self.nbytes = builder.nbytes
        self.tree = tree
        self.max_lookahead = asked if tree is None else tree.nodes - 1
        self._model = parts.model
        self._vocab = parts.facts.vocab_size

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        proposal = seen.proposal
        assert proposal is not None
        for k in range(out.shape[1] if self.tree is None else self.tree.deepest):
            nodes = [(k, 0)]
            if self.tree is not None:
                nodes = [(int(node) - 1, int(self.tree.ranks[node])) for node in np.flatnonzero(self.tree.depths == k + 1)]
            most = 1 + max(rank for _, rank in nodes)
            found = ranked(proposal.guess, self._logits(proposal.hidden, k), proposal.slots, proposal.ends + k, most)
            for draft, rank in nodes:
                out[:, draft] = found[rank]

    def _logits(self, x: Tensor, k: int) -> Tensor:
        blocks, own = self._stacks[k]
        for block in blocks:
            x = x + torch.nn.functional.silu(block(x))
        return self._model.logits(x) if own is None else own(x).float()


def _number(raw: dict[str, object], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {name!r} must be a number above 0, but is {value!r:.40}.", param=name)
    return value
