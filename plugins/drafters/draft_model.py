"""A smaller model that guesses: the drafter of the method "draft_model".

What it is: any model of a family that is served, with the vocabulary of the one that it drafts for (Leviathan et al. 2023, arXiv 2211.17192). Its keys and values lie in
the same pages as the other's, so that shared prefixes, copies and moved pages are right for both. Behind a draw it computes the last two tokens that are known (all
drafts may have been right, and the last of them it has not seen), then one token after the other. Prompts it computes as they pass. Where it has not computed a part of a
history, since nothing was drafted for a while, it catches up when it is asked again.
It draws as the sampler would: greedily, or with the same noise (api.py: Proposal.guess).
What it does not know: how drafts are verified, the tokenizer beyond its vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from penstock.core.protocol.columns import I32, Column
from penstock.core.protocol.errors import CheckpointError, ConfigError, spelled
from penstock.core.protocol.messages import Forward
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.drafters.chain import Chain
from penstock.plugins.models.api import Columns, Program

Tensor = torch.Tensor
DRAFTS = 4
"""Behind a token, of whoever does not say."""
SLACK = 128
"""More than the positions of steps in flight."""


class ModelDrafter:
    """See Drafter."""

    name = "draft_model"
    taps: tuple[int, ...] = ()
    states = False

    def __init__(self, config: DraftConfig, parts: Parts) -> None:
        if config.model is None:
            raise ConfigError(
                '--speculative-config: the method "draft_model" needs "model", the folder of a draft model.', param="speculative_config"
            )
        self._model = model = parts.load(config.model, config.quantization)
        check_vocabulary(config.model, parts)
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        attention, facts = model.attention, model.facts
        self.page_bytes = facts.num_layers * attention.bytes_per_token * parts.block_size
        self.kv_layout = f"+{attention.kv_layout}:L{facts.num_layers}:H{facts.num_kv_heads}:D{facts.head_dim}"
        self.nbytes = model.weights_bytes
        self.state_bytes = model.tables_bytes + attention.workspace_bytes
        self._ops = parts.ops
        self._vocab = facts.vocab_size
        self._narrow = facts.vocab_size < parts.facts.vocab_size
        self._chain = Chain(parts)
        self._program: Program | None = None
        self._caches: list[object] = []
        self._have: I32 = np.zeros(parts.slots, np.int32)
        """For each slot: positions before this one hold its keys and values; -1: those before the next step's start."""
        self._ahead: I32 = np.zeros(parts.slots, np.int32)
        """With -1: and so many more."""
        self._now: I32 = np.zeros(0, np.int32)
        """What that comes to for each row of the step; of loose ones counted from their starts, wherever these are."""
        self._upto: Column = np.zeros(0, bool)
        """Rows of the step that are loose, and have everything before their starts."""

    def bind(self, pages: Tensor) -> None:
        """See Drafter."""
        self._caches = self._model.attention.caches(pages)
        self._program = self._ops.fuse(self._model, self._caches)
        self._chain.forget()

    def place(self, slots: Column) -> None:
        """See Drafter. What lies in the blocks that a sequence begins on was computed by this, too."""
        self._have[slots] = -1
        self._ahead[slots] = 0

    def begin(self, work: Forward) -> None:
        """See Drafter."""
        have = self._have[work.slots]
        # Beyond the start only what it drafted itself, for the very step that begins.
        self._now = np.where(have < 0, work.starts + self._ahead[work.slots], np.minimum(have, work.starts))
        loose = work.loose > 0 if len(work.loose) else np.zeros(len(have), bool)
        self._upto = loose & (have < 0)
        # If nothing is drafted behind this step, nobody says how far a loose row really was: it is less than that.
        self._have[work.slots] = np.where(self._upto, np.maximum(0, work.starts - SLACK), self._now)

    def observe(self, seen: Seen) -> None:
        """See Drafter."""
        work = seen.work
        self._catch_up(seen, np.arange(work.num_decode, len(work.slots), dtype=np.int32))

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """See Drafter."""
        assert seen.proposal is not None
        self._chain.run(
            seen, seen.proposal, torch.empty(rows, width, dtype=torch.int32, device=seen.history.device), self._first, self._next
        )

    def _catch_up(self, seen: Seen, rows: Column) -> None:
        """Compute what these rows of the step have that this has not."""
        work = seen.work
        slots, ends = work.slots[rows], work.starts[rows] + work.counts[rows]
        firsts = np.minimum(self._now[rows], work.starts[rows])
        most = self._chain.max_tokens
        while True:
            left = np.flatnonzero(firsts < ends)
            if not left.size:
                break
            counts = np.minimum((ends - firsts)[left], most)
            fits = max(1, int(np.searchsorted(np.cumsum(counts), most, side="right")))
            left, counts = left[:fits], counts[:fits]
            columns = self._chain.ragged(seen, slots[left], firsts[left], counts)
            self._run(columns, None)
            firsts[left] += counts
        self._have[slots] = ends

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        proposal, work = seen.proposal, seen.work
        assert proposal is not None
        ends = work.starts + work.counts
        # A decode row's last draft is computed below, if it was right.
        late = np.flatnonzero((np.arange(len(ends)) >= work.num_decode) | ((self._now < ends - 1) & ~self._upto))
        if late.size:
            self._catch_up(seen, late.astype(np.int32))
        made = self._chain.run(seen, proposal, out, self._first, self._next)
        self._have[proposal.host_slots] = -1
        self._ahead[proposal.host_slots] = made if proposal.sure else 1

    def _first(self, seen: Seen, proposal: Proposal, slots: Tensor, ends: Tensor, kept: Tensor | None) -> Tensor:
        """Logits behind the last token, with the one before it computed anew."""
        columns, last = self._chain.pairs(seen, slots, ends)
        return self._logits(columns, last)

    def _next(self, seen: Seen, slots: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        columns, last = self._chain.single(seen, slots, positions)
        return self._logits(columns, last)

    def _logits(self, columns: Columns, rows: Tensor) -> Tensor:
        hidden = self._run(columns, rows)
        assert hidden is not None
        return self._model.logits(hidden)

    def _run(self, columns: Columns, rows: Tensor | None) -> Tensor | None:
        """A step of the model -> its normalised states at these token rows."""
        if self._narrow:
            columns = columns._replace(tokens=torch.where(columns.tokens < self._vocab, columns.tokens, 0))
        if self._program is not None:
            wanted = torch.empty(0, dtype=torch.int32) if rows is None else rows
            hidden = torch.empty(len(wanted), self._model.facts.hidden_size, dtype=self._chain.dtype)
            self._program(columns, wanted, hidden)
            return hidden
        x, residual, _ = self._model.step(self._ops, self._caches, columns)
        if rows is None:
            return None
        return self._model.final(self._ops, self._ops.take_rows(x, rows), self._ops.take_rows(residual, rows))


def check_vocabulary(folder: str, parts: Parts) -> None:
    """Raises CheckpointError for a drafter whose tokens mean something else. Where a folder has no tokenizer.json nothing is known."""
    files = [Path(place) / "tokenizer.json" for place in (parts.folder, folder)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    one, other = (_vocabulary(file) for file in files)
    if one != other:
        raise CheckpointError(
            f"--speculative-model {spelled(folder)}: its tokenizer.json has another vocabulary than the model's, so that its tokens would mean other texts. Give a"
            " draft model with the same tokenizer.",
            param="speculative_config",
        )


def _vocabulary(file: Path) -> object:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{spelled(str(file))} cannot be read: {error}", param="speculative_config") from error
    return found
