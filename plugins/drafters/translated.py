"""A draft model with another vocabulary: the drafter of the method "draft_model" where the tokenizers differ.

What it is: the draft model on contexts of its own (contexts.py), whose tokens are looked up by text (alignment.py). It draws among the tokens that both vocabularies
have (Timor et al. 2025, arXiv 2502.05202: token-level intersection), as the sampler would, with the noise of the model's own draw at that place: its logits are put where their
twins are in the model's vocabulary, others are out of the question. So a draft is one token in both, and follows its place one to one.
What it does not know: how drafts are verified, tokenizers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from penstock.core.contract.devices import READS_ALL
from penstock.core.protocol.columns import Column
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.messages import Forward
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.alignment import Alignment
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.drafters.chain import Chain
from penstock.plugins.drafters.contexts import Contexts, DeviceContexts, HostContexts
from penstock.plugins.drafters.draft_model import DRAFTS
from penstock.plugins.drafters.layers import DraftLayers
from penstock.plugins.models.api import Columns, Model

Tensor = torch.Tensor
CONTEXT = 4096
"""Places of a slot, of whoever does not say,"""
POOL_BYTES = 2 << 30
"""and less if the keys and values of all slots took more than this;"""
LEAST = 512
"""but at least so many."""
SHORTEST = 16


class TranslatedDrafter:
    """See Drafter."""

    name = "draft_model"
    taps: tuple[int, ...] = ()
    states = False
    page_bytes = 0
    kv_layout = ""
    reads = READS_ALL

    def __init__(self, config: DraftConfig, parts: Parts, model: Model, alignment: Alignment) -> None:
        facts, attention = model.facts, model.attention
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        device = parts.lane.device
        token_bytes = facts.num_layers * attention.bytes_per_token
        length = _length(config, parts, token_bytes)
        blocks = parts.slots * -(-length // parts.block_size)
        pool = attention.allocate(blocks)
        pool.zero_()  # a place that is read before it is written holds numbers at least
        self._layers = DraftLayers(model, parts.ops, attention.caches(pool), parts.dtype)
        self._chain = Chain(dataclasses.replace(parts, facts=facts, max_len=length))
        kind = HostContexts if parts.lane.direct else DeviceContexts
        self._contexts: Contexts = kind(parts, alignment, self._chain, self._compute, length, self.max_lookahead)
        # Index -1, no token, finds the last entry: none either.
        self._to_draft, self._to_model = (
            torch.from_numpy(np.append(one, np.int32(-1))).to(device) for one in (alignment.to_draft, alignment.to_model)
        )
        # Of a token that both have, its twin's twin is it: where two share one, the first alone can be drafted.
        only = (alignment.to_draft >= 0) & (alignment.to_model[alignment.to_draft] == np.arange(len(alignment.to_draft)))
        self._only = torch.from_numpy(np.where(only, alignment.to_draft, 0)).long().to(device)
        self._out = torch.from_numpy(np.flatnonzero(~only)).to(device)
        self.nbytes = model.weights_bytes
        self.state_bytes = model.tables_bytes + attention.workspace_bytes + pool.nbytes + self._contexts.nbytes
        self.state_bytes += sum(one.nbytes for one in (self._to_draft, self._to_model, self._only, self._out))

    def _compute(self, columns: Columns) -> None:
        self._layers.run(columns, None)

    def bind(self, pages: Tensor) -> None:
        """See Drafter. The pages are none of its own."""
        self._chain.forget()

    def place(self, slots: Column) -> None:
        """See Drafter: `begin` sees their tokens."""

    def skip(self, slots: Column) -> None:
        """See Drafter."""
        self._contexts.skip(slots)

    def begin(self, work: Forward) -> None:
        """See Drafter."""
        self._contexts.begin(work)

    def observe(self, seen: Seen) -> None:
        """See Drafter."""
        self._contexts.read(seen)

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        proposal, contexts = seen.proposal, self._contexts
        assert proposal is not None
        contexts.read(seen)
        fits = contexts.most_rows
        if fits < len(out):
            rows, slots = proposal.rows[:fits], proposal.host_slots[:fits]
            proposal = dataclasses.replace(proposal, rows=rows, host_slots=slots, slots=proposal.slots[:fits], ends=proposal.ends[:fits])
            out = out[:fits]
        made = self._run(seen, dataclasses.replace(proposal, ends=contexts.follow(seen, proposal)), out)
        contexts.drafted(proposal, made)
        out.copy_(self._to_model[out])

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """See Drafter."""
        assert seen.proposal is not None
        out = torch.empty(rows, width, dtype=torch.int32, device=seen.history.device)
        self._run(seen, dataclasses.replace(seen.proposal, ends=torch.ones_like(seen.proposal.ends)), out)

    def _run(self, seen: Seen, proposal: Proposal, out: Tensor) -> Column:
        """Drafts as the draft model's own tokens, behind contexts that end at the proposal's ends."""
        guess, contexts = proposal.guess, self._contexts

        def translated(logits: Tensor, slots: Tensor, ends: Tensor) -> Tensor:
            wide = logits.index_select(1, self._only).index_fill_(1, self._out, -torch.inf)
            tokens = guess(wide, slots, contexts.positions(slots, ends))
            return self._to_draft[tokens]

        def first(own: Seen, proposal: Proposal, slots: Tensor, ends: Tensor, kept: Tensor | None) -> Tensor:
            return self._layers.logits(*contexts.last(seen, slots, ends))

        proposal = dataclasses.replace(proposal, guess=translated)
        return self._chain.run(contexts.own(seen, proposal), proposal, out, first, self._next)

    def _next(self, seen: Seen, slots: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        columns, last = self._chain.single(seen, slots, positions)
        return self._layers.logits(columns, last)


def aligned(folder: str, parts: Parts, draft: Model) -> Alignment:
    """The folder's vocabulary beside the model's. Raises CheckpointError."""
    return Alignment(parts.tokenizer(parts.folder), parts.tokenizer(folder), parts.facts.vocab_size, draft.facts.vocab_size, folder)


def _length(config: DraftConfig, parts: Parts, token_bytes: int) -> int:
    """Places of a slot. Raises ConfigError for an option that says none."""
    for name, value in config.options.items():
        if name != "context" or type(value) is not int or value < SHORTEST:
            raise ConfigError(
                f"--speculative-config: 'options.{name}' of method 'draft_model' is {value!r:.40}; with a draft model of another vocabulary there is 'context', the tokens"
                f" that it looks back over, {SHORTEST} or more.",
                param="speculative_config",
            )
    asked = config.options.get("context")
    most = min(CONTEXT, max(LEAST, POOL_BYTES // (parts.slots * token_bytes))) if asked is None else asked
    return int(min(most, parts.max_len))
