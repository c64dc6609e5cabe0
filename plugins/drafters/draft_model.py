"""A smaller model that guesses: the drafter of the method "draft_model".

What it is: any model of a family that is served (Leviathan et al. 2023, arXiv 2211.17192): `ModelDrafter` with the vocabulary of the one that it drafts for; with another one
it is that of translated.py, which `draft_model` finds out. Its keys and values lie in
the same pages as the other's, so that shared prefixes, copies and moved pages are right for both. Behind a draw it computes the last two tokens that are known (all
drafts may have been right, and the last of them it has not seen), then one token after the other. Prompts it computes as they pass. Where it has not computed a part of a
history, since nothing was drafted for a while, it catches up when it is asked again.
It draws as the sampler would: greedily, or with the same noise (api.py: Proposal.guess).
What it does not know: how drafts are verified, a tokenizer beyond its vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from penstock.core.contract.devices import READS_TOKENS
from penstock.core.protocol.columns import I32, Column
from penstock.core.protocol.errors import CheckpointError, ConfigError, spelled
from penstock.core.protocol.messages import Forward
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.api import Drafter, Parts, Proposal, Seen
from penstock.plugins.drafters.chain import Chain
from penstock.plugins.drafters.holes import Holes
from penstock.plugins.drafters.kinds import check_kind
from penstock.plugins.drafters.layers import DraftLayers
from penstock.plugins.gguf import is_gguf
from penstock.plugins.models.api import Columns, Model
from penstock.plugins.models.config import read_config

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
    reads = READS_TOKENS

    def __init__(self, config: DraftConfig, parts: Parts, model: Model) -> None:
        self._model = model
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        attention, facts = model.attention, model.facts
        self.page_bytes = facts.num_layers * attention.bytes_per_token * parts.block_size
        self.kv_layout = f"+{attention.kv_layout}:L{facts.num_layers}:H{facts.num_kv_heads}:D{facts.head_dim}"
        self.nbytes = model.weights_bytes
        self.state_bytes = model.tables_bytes + attention.workspace_bytes
        self._ops = parts.ops
        self._vocab = facts.vocab_size
        self._narrow = facts.vocab_size < parts.facts.vocab_size
        self._wide = facts.vocab_size > parts.facts.vocab_size
        self._known = parts.facts.vocab_size
        self._chain = Chain(parts)
        self._layers: DraftLayers
        self._have: I32 = np.zeros(parts.slots, np.int32)
        """For each slot: positions before this one hold its keys and values; -1: those before the next step's start."""
        self._ahead: I32 = np.zeros(parts.slots, np.int32)
        """With -1: and so many more."""
        self._holes = Holes(parts.slots, parts.block_size)
        self._open = False
        """Somebody may have -1, or more than its next step's start."""
        self._now: I32 = np.zeros(0, np.int32)
        """What that comes to for each row of the step; of loose ones counted from their starts, wherever these are."""
        self._upto: Column = np.zeros(0, bool)
        """Rows of the step that are loose, and have everything before their starts."""

    def bind(self, pages: Tensor) -> None:
        """See Drafter."""
        self._layers = DraftLayers(self._model, self._ops, self._model.attention.caches(pages), self._chain.dtype)
        self._chain.forget()
        self._holes.bind(len(pages))

    def place(self, slots: Column) -> None:
        """See Drafter. What lies in the blocks that a sequence begins on was computed by this, too."""
        self._have[slots] = -1
        self._ahead[slots] = 0
        self._open = True
        self._holes.attend(slots)

    def skip(self, slots: Column) -> None:
        """See Drafter. If it is asked after all it begins at the beginning."""
        self._have[slots] = 0
        self._holes.skip(slots)

    def attend(self, slots: Column) -> None:
        """See Drafter."""
        self._holes.attend(slots)

    def begin(self, work: Forward) -> None:
        """See Drafter."""
        if len(work.block_ids) or len(work.copy_src):
            self._holes.note(work, self._have)
        have = self._have[work.slots]
        if not self._open:  # nothing changes while nothing is drafted
            self._now, self._upto = have, np.zeros(len(have), bool)
            return
        # Beyond the start only what it drafted itself, for the very step that begins.
        self._now = np.where(have < 0, work.starts + self._ahead[work.slots], np.minimum(have, work.starts))
        loose = work.loose > 0 if len(work.loose) else np.zeros(len(have), bool)
        self._upto = loose & (have < 0)
        # If nothing is drafted behind this step, nobody says how far a loose row really was: it is less than that.
        self._have[work.slots] = np.where(self._upto, np.maximum(0, work.starts - SLACK), self._now)
        self._open = bool((self._now > work.starts).any() or (self._have < 0).any())

    def observe(self, seen: Seen) -> None:
        """See Drafter."""
        work = seen.work
        rows = np.arange(work.num_decode, len(work.slots), dtype=np.int32)
        self._catch_up(seen, rows if seen.read is None else rows[seen.read[rows]])

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
            self._run(columns)
            firsts[left] += counts
        self._have[slots] = ends
        self._holes.filled(slots)

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        proposal, work = seen.proposal, seen.work
        assert proposal is not None
        ends = work.starts + work.counts
        # A decode row's last draft is computed below, if it was right.
        lacking = (np.arange(len(ends)) >= work.num_decode) | ((self._now < ends - 1) & ~self._upto)
        late = np.flatnonzero(lacking if seen.read is None else lacking & seen.read)
        if late.size:
            self._catch_up(seen, late.astype(np.int32))
        made = self._chain.run(seen, proposal, out, self._first, self._next)
        self._have[proposal.host_slots] = -1
        self._open = True
        self._ahead[proposal.host_slots] = made if proposal.sure else 1

    def _first(self, seen: Seen, proposal: Proposal, slots: Tensor, ends: Tensor, kept: Tensor | None) -> Tensor:
        """Logits behind the last token, with the one before it computed anew."""
        columns, last = self._chain.pairs(seen, slots, ends)
        return self._logits(columns, last)

    def _next(self, seen: Seen, slots: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        columns, last = self._chain.single(seen, slots, positions)
        return self._logits(columns, last)

    def _logits(self, columns: Columns, rows: Tensor) -> Tensor:
        found = self._layers.logits(self._narrowed(columns), rows)
        # Rows of padding, as most checkpoints have some, are no tokens of the model: to draw one would end the draft.
        return found[:, : self._known].contiguous() if self._wide else found

    def _run(self, columns: Columns) -> None:
        self._layers.run(self._narrowed(columns), None)

    def _narrowed(self, columns: Columns) -> Columns:
        """Without tokens that this has not."""
        return columns._replace(tokens=torch.where(columns.tokens < self._vocab, columns.tokens, 0)) if self._narrow else columns


def draft_model(config: DraftConfig, parts: Parts) -> Drafter:
    """With the same vocabulary or with another one. Raises ConfigError and CheckpointError."""
    if config.model is None:
        raise ConfigError(
            '--speculative-config: the method "draft_model" needs "model", the folder of a draft model.', param="speculative_config"
        )
    same = same_vocabulary(config.model, parts)
    if same and config.options:
        raise ConfigError(
            f"--speculative-config: 'options.{next(iter(config.options))}' says nothing to a draft model with the model's own vocabulary, which lies in the model's pages."
            " Leave it out.",
            param="speculative_config",
        )
    if Path(config.model).is_dir():
        check_kind(ModelDrafter.name, config.model, read_config(config.model), None, 0)
    model = parts.load(config.model, config.quantization)
    if same:
        return ModelDrafter(config, parts, model)
    from penstock.plugins.drafters.translated import TranslatedDrafter, aligned

    return TranslatedDrafter(config, parts, model, aligned(config.model, parts, model))


def same_vocabulary(folder: str, parts: Parts) -> bool:
    """Do its tokens mean what the model's do? Where one of them comes without a tokenizer nothing is known, and it is believed. Raises CheckpointError for one that cannot be
    read."""
    places = parts.folder, folder
    files = [Path(place) / "tokenizer.json" for place in places]
    if all(file.is_file() for file in files):
        return files[0].read_bytes() == files[1].read_bytes() or _vocabulary(files[0]) == _vocabulary(files[1])
    packed = [is_gguf(place) for place in places]
    if not any(packed) or not all(one or file.is_file() for one, file in zip(packed, files, strict=True)):
        return True
    texts = [[one.token_bytes(token) for token in range(one.vocab_size)] for one in map(parts.tokenizer, places)]
    return texts[0] == texts[1]


def _vocabulary(file: Path) -> object:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{spelled(str(file))} cannot be read: {error}", param="speculative_config") from error
    return found
