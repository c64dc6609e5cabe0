"""Drafters of one layer that feeds on the model's hidden states: EAGLE, EAGLE-3 and multi-token prediction.

What it is: `HeadDrafter`, and the three shapes of what stands before and behind its layer. A *root* is a position whose state the model has computed and kept; the layer
sits at a root's position with the state there and the embedding of the token behind it, and guesses the token after that one; further drafts feed on the layer's own
states, one position later each. The layer sees every token of every step that the drafter is asked in, prompts at once; its keys and values lie in the model's pages. Where the
lane is direct it also sees, once it is asked again, what passed in between (gaps.py).

    eagle3  (arXiv 2503.01840)  state = fc(taps);  x = state;  attention reads [input_layernorm(embedding), hidden_norm(state)]; head: norm, lm_head of draft_vocab_size tokens,
                                token t of which is the model's t + d2t[t]
    eagle   (arXiv 2401.15077)  state = the model's normalised last;  x = fc([embedding, state]), read as it is; head: the model's
    mtp     (arXiv 2412.19437)  state as eagle's;  x = eh_proj([enorm(embedding), hnorm(state)]); head: shared_head.norm, the model's

What it does not know: how drafts are verified, how a tree of them grows (growth.py). It is long because
three methods share one layer, along a chain and along a tree, and differ in a few lines each.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch

from penstock.core.contract.devices import READS_ALL, ModelFacts
from penstock.core.protocol.columns import Column
from penstock.core.protocol.errors import CheckpointError, ConfigError, UnsupportedFeature
from penstock.core.protocol.messages import Forward
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.drafters.chain import Chain
from penstock.plugins.drafters.gaps import Gaps
from penstock.plugins.drafters.growth import Growth
from penstock.plugins.drafters.kinds import check_kind
from penstock.plugins.drafters.trees import Tree
from penstock.plugins.models.api import AttnCall, Block, Columns
from penstock.plugins.models.builder import Builder, Part
from penstock.plugins.models.config import decoder_facts, read_config
from penstock.plugins.models.rope import rope_tables

Tensor = torch.Tensor
DRAFTS = 4
"""Behind a token, of whoever does not say."""
NOBODY = torch.empty(0, dtype=torch.int32)


class HeadDrafter:
    """See Drafter. It must see a sequence from its beginning: states are nowhere else."""

    reads = READS_ALL

    def __init__(self, config: DraftConfig, parts: Parts) -> None:
        self.name = method = config.method or ""
        if config.model is None:
            raise ConfigError(
                f'--speculative-config: the method "{method}" needs "model", the folder of the head.', param="speculative_config"
            )
        if parts.model.plain is None:
            raise UnsupportedFeature(
                f"--speculative-config: {method!r} reads the model's embeddings, which this model's family does not show.",
                param="speculative_config",
            )
        raw = read_config(config.model)
        builder = parts.builder(config.model)
        check_kind(method, config.model, raw, getattr(builder.weights, "has", None), parts.facts.num_layers)
        self._facts = facts = _facts_of(raw, parts.facts)
        self._ops = parts.ops
        self._model = parts.model
        self._vocab = parts.facts.vocab_size
        self._eps = facts.rms_norm_eps
        self._attention = parts.attention(facts)
        self._shape: Eagle3 | Eagle | Mtp = SHAPES[method](raw, builder, facts, parts)
        self._layer(builder, self._shape.prefix, facts)
        has = getattr(builder.weights, "has", lambda name: False)
        own = next((name for name in (f"{self._shape.prefix}embed_tokens.weight", "embed_tokens.weight") if has(name)), None)
        self._embedding = builder.tensor(own, self._vocab, facts.hidden_size) if own is not None else parts.model.plain.embedding
        builder.ignore(*self._shape.ignored)
        builder.finish()
        self._cos_sin = torch.cat(rope_tables(facts, parts.max_len), dim=1).contiguous().to(builder.device)
        self._call = AttnCall(float(facts.head_dim**-0.5))
        self.taps: tuple[int, ...] = self._shape.taps
        self.states = not self.taps
        self.tree = Tree.of(config.speculative_token_tree)
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        self._growth = None if self.tree is None else Growth(self.tree, parts)
        self.page_bytes = self._attention.bytes_per_token * parts.block_size
        self.kv_layout = f"+{self._attention.kv_layout}:L1:H{facts.num_kv_heads}:D{facts.head_dim}"
        self.nbytes = builder.nbytes
        self.state_bytes = self._cos_sin.nbytes + self._attention.workspace_bytes
        wide = parts.max_rows * (1 if self._growth is None else self._growth.widest)
        self.state_bytes += wide * facts.hidden_size * parts.dtype.itemsize
        self._at_once = 2 * parts.max_rows
        self.follows = parts.lane.direct
        self._gaps = Gaps(parts.slots, self._shape.sees, parts.dtype) if self.follows else None
        self.state_bytes += 0 if self._gaps is None else self._gaps.nbytes
        self._chain = Chain(parts)
        self._caches: list[Any] = []
        self._fused: Any = None
        """The layer as one call, where the device has that."""
        self._state = torch.zeros(wide, facts.hidden_size, dtype=parts.dtype, device=parts.lane.device)
        """What the last step of the chain left for the next, in its first rows. Graphs read and write it."""

    def _layer(self, builder: Builder, at: str, facts: ModelFacts) -> None:
        hidden, dim, inner, reads = facts.hidden_size, facts.head_dim, facts.intermediate_size, self._shape.reads
        q_rows, kv_rows = facts.num_heads * dim, facts.num_kv_heads * dim
        heads = [Part(f"{at}self_attn.{name}_proj", rows) for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))]
        builder.ignore(f"{at}self_attn.rotary_emb.inv_freq")
        self._qkv = builder.linear(heads, reads, bias=facts.attention_bias)
        self._o = builder.linear([Part(f"{at}self_attn.o_proj", hidden)], q_rows, bias=facts.attention_out_bias)
        self._q_norm = builder.tensor(f"{at}self_attn.q_norm.weight", dim) if facts.qk_norm else None
        self._k_norm = builder.tensor(f"{at}self_attn.k_norm.weight", dim) if facts.qk_norm else None
        self._mlp_norm = builder.tensor(f"{at}post_attention_layernorm.weight", hidden)
        gate, up = (Part(f"{at}mlp.{name}_proj", inner) for name in ("gate", "up"))
        self._gate_up = builder.gated(gate, up, hidden, "silu", bias=facts.mlp_bias)
        self._down = builder.linear([Part(f"{at}mlp.down_proj", hidden)], inner, bias=facts.mlp_bias)

    def bind(self, pages: Tensor) -> None:
        """See Drafter."""
        self._caches = self._attention.caches(pages)
        fuse, plain = getattr(self._ops, "fuse_layer", None), self._model.plain
        if fuse is not None and plain is not None:
            block = Block(
                attn_norm=self._mlp_norm,  # it has none of its own
                qkv=self._qkv,
                o=self._o,
                mlp_norm=self._mlp_norm,
                gate_up=self._gate_up,
                down=self._down,
                q_norm=self._q_norm,
                k_norm=self._k_norm,
                call=self._call,
            )
            self._fused = fuse(block, self._embedding, plain.head, self._facts, self._cos_sin, self._attention, self._caches[0])
        self._chain.forget()
        if self._growth is not None:
            self._growth.forget()

    def place(self, slots: Column) -> None:
        """See Drafter: its keys and values came with the blocks."""
        if self._gaps is not None:
            self._gaps.enter(slots)

    def skip(self, slots: Column) -> None:
        """See Drafter."""
        if self._gaps is not None:
            self._gaps.skip(slots)

    def begin(self, work: Forward) -> None:
        """See Drafter. On a device what passes while nobody asks is not seen again: later drafts are less apt until the text has moved on."""
        if self._gaps is not None:
            self._gaps.begin(work)

    def observe(self, seen: Seen) -> None:
        """See Drafter. Prompts are read, and of other rows it is kept what there was to read."""
        if seen.columns is None:
            return
        if self._gaps is None:
            self._everything(seen, None)
            return
        work, decode = seen.work, seen.work.num_decode
        states = self._shape.states(seen)
        if decode == len(work.slots):
            self._gaps.keep(work, decode, states)
        else:
            at = int(work.counts[:decode].sum())
            if decode:
                self._gaps.keep(work, decode, states[:at])
            prompts = np.arange(len(work.slots)) >= decode
            self._catch_up(seen, self._gaps, prompts if seen.read is None else prompts & seen.read)
            slots, starts, counts = work.slots[decode:], work.starts[decode:], work.counts[decode:]
            self._read(seen, self._chain.ragged(seen, slots, starts, counts), states[at:], None)
            self._gaps.read(slots, starts + counts)

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """See Drafter. How many tokens the first step sees is another thing each time."""
        assert seen.proposal is not None
        if self._growth is not None:
            out = torch.zeros(rows, self.max_lookahead, dtype=torch.int32, device=seen.history.device)
            self._growth.begin(
                seen.proposal.guess,
                self._nothing(seen, seen.proposal, seen.proposal.slots, seen.proposal.ends, None),
                seen.proposal.slots,
                seen.proposal.ends,
                out,
            )
            self._growth.run(seen, seen.proposal, out, self._grow)
            return
        out = torch.empty(rows, width, dtype=torch.int32, device=seen.history.device)
        self._chain.run(seen, seen.proposal, out, self._nothing, self._next, before=2, fixed=False)

    def _nothing(self, seen: Seen, proposal: Proposal, slots: Tensor, ends: Tensor, kept: Tensor | None) -> Tensor:
        return torch.zeros(len(slots), self._vocab, device=slots.device)

    def propose(self, seen: Seen, out: Tensor) -> None:
        """See Drafter."""
        proposal, work = seen.proposal, seen.work
        assert proposal is not None
        if seen.columns is None:  # nobody thought of drafts when the step began: from the next one on
            return
        if self._gaps is not None:
            self._catch_up(seen, self._gaps, seen.read)
            self._gaps.read(work.slots, work.starts + work.counts)
            self._gaps.read(proposal.host_slots, proposal.ends.numpy() - 1)
        if self._growth is None:
            self._chain.run(seen, proposal, out, self._first, self._next, before=2, fixed=False)
            return
        slots, ends = proposal.slots, proposal.ends
        self._growth.begin(proposal.guess, self._first(seen, proposal, slots, ends, None), slots, ends, out)
        self._growth.run(seen, proposal, out, self._grow)

    def _grow(self, columns: Columns, tokens: Tensor, over: Tensor) -> Tensor:
        """One level of a tree: of each token the state of `over`, a row of the level before."""
        state = self._state[over]
        if len(tokens) <= self._at_once:
            return self._logits(self._stepped(state, tokens, columns))
        parts = [slice(at, at + self._at_once) for at in range(0, len(tokens), self._at_once)]  # attention has room for no more
        return self._logits(torch.cat([self._stepped(state[part], tokens[part], _part(columns, part)) for part in parts]))

    def _stepped(self, state: Tensor, tokens: Tensor, columns: Columns) -> Tensor:
        every = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        behind = self._step(state, tokens, columns, every)
        assert behind is not None
        return behind

    def _catch_up(self, seen: Seen, gaps: Gaps, rows: Column | None) -> None:
        missing = gaps.missing(seen.work, rows)
        if missing is None:
            return
        at, most = 0, self._chain.max_tokens
        ends = np.cumsum(missing.counts)
        while at < len(ends):  # a ring is no longer than a step
            before = int(ends[at - 1]) if at else 0
            following = max(at + 1, int(np.searchsorted(ends, before + most, side="right")))
            part = slice(at, following)
            columns = self._chain.ragged(seen, missing.slots[part], missing.starts[part], missing.counts[part])
            self._read(seen, columns, missing.states[before : int(ends[following - 1])], None)
            at = following

    def _everything(self, seen: Seen, rows: Tensor | None) -> Tensor | None:
        """The layer over all tokens of the step: see _read."""
        assert seen.columns is not None
        return self._read(seen, seen.columns, self._shape.states(seen), rows)

    def _read(self, seen: Seen, columns: Columns, states: Tensor, rows: Tensor | None) -> Tensor | None:
        """The layer over these tokens, at which the model has these states: its own states [n, H] of the token rows `rows` [n]. Without rows it only takes note of the tokens."""
        row = torch.bucketize(torch.arange(len(columns.tokens), device=columns.tokens.device), columns.q_start[1:].long(), right=True)
        slots = columns.slots[row.clamp_max(len(columns.slots) - 1)].clamp_min(0).long()
        following = (columns.positions + 1).clamp_max(seen.history.shape[1] - 1).long()
        return self._step(self._shape.first(states), seen.history[slots, following], columns, rows)

    def _first(self, seen: Seen, proposal: Proposal, slots: Tensor, ends: Tensor, kept: Tensor | None) -> Tensor:
        # A row's tokens lie one behind the other. That of the last position which counts: of a prompt its last one, of a decode row as far behind its first as
        # it has drawn tokens.
        work, rows = seen.work, proposal.rows
        first = np.cumsum(work.counts) - work.counts
        last = self._chain.sent((first[rows] + np.where(rows < work.num_decode, 1, work.counts[rows]) - 2).astype(np.int32))
        shift = last - proposal.begins
        state = self._everything(seen, ends + (shift if kept is None else shift[kept]))
        assert state is not None
        return self._logits(state)

    def _next(self, seen: Seen, slots: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        state = self._state[: len(slots)] if kept is None else self._state[kept]
        columns, every = self._chain.single(seen, slots, positions)
        tokens = seen.history[slots.clamp_min(0).long(), (positions + 1).clamp_max(seen.history.shape[1] - 1).long()]
        state_behind = self._step(state, tokens, columns, every)
        assert state_behind is not None
        return self._logits(state_behind)

    def _step(self, state: Tensor, tokens: Tensor, columns: Columns, rows: Tensor | None) -> Tensor | None:
        ops, attention, cache = self._ops, self._attention, self._caches[0]
        residual, x = self._shape.before(state, ops.embed(tokens.int(), self._embedding))
        if self._fused is not None:
            return self._fused(residual, x, columns, NOBODY if rows is None else rows)  # type: ignore[no-any-return]
        qkv = self._qkv(x, columns)
        q = attention.store(qkv, columns, self._cos_sin, cache, self._q_norm, self._k_norm, self._eps)
        if rows is None:
            return None
        attended = attention.attend(q, qkv, cache, columns, self._call)
        if len(rows) < len(residual):
            attended, residual = ops.take_rows(attended.view(len(attended), -1), rows), ops.take_rows(residual, rows)
        residual = residual + self._o(attended.reshape(attended.shape[0], -1))
        x = self._gate_up(ops.norm(residual, self._mlp_norm, self._eps))
        return residual + self._down(x)

    def _logits(self, state: Tensor) -> Tensor:
        if len(state) > len(self._state):
            self._state = torch.zeros(2 * len(state), *state.shape[1:], dtype=state.dtype, device=state.device)
        self._state[: len(state)].copy_(state)
        return self._shape.logits(state)


class Eagle3:
    """See the module."""

    prefix = "midlayer."
    ignored = ("t2d", "d2t")

    def __init__(self, raw: dict[str, Any], builder: Builder, facts: ModelFacts, parts: Parts) -> None:
        hidden, eps = facts.hidden_size, facts.rms_norm_eps
        has = getattr(builder.weights, "has", lambda name: False)
        if not has("midlayer.hidden_norm.weight") and has("layers.0.hidden_norm.weight"):
            self.prefix = "layers.0."
        self.taps = _taps_of(raw, parts.facts.num_layers)
        self.reads, self.sees = 2 * hidden, len(self.taps) * parts.facts.hidden_size
        self._ops, self._eps = parts.ops, eps
        self._fc = builder.linear([Part("fc", hidden)], len(self.taps) * parts.facts.hidden_size, bias=has("fc.bias"))
        self._embed_norm = builder.tensor(f"{self.prefix}input_layernorm.weight", hidden)
        self._state_norm = builder.tensor(f"{self.prefix}hidden_norm.weight", hidden)
        self._norm = builder.tensor("norm.weight", hidden)
        self._after = bool(raw.get("norm_before_residual"))
        size = raw.get("draft_vocab_size") or facts.vocab_size
        if type(size) is not int or size < 1:
            raise CheckpointError(
                f"config.json: 'draft_vocab_size' must be a number above 0, but is {size!r:.40}.", param="draft_vocab_size"
            )
        self._vocab, self._small, self._model = parts.facts.vocab_size, size, parts.model
        self._head = builder.linear([Part("lm_head", size)], hidden) if has("lm_head.weight") else None
        self._ids: Tensor | None = None
        if has("d2t"):
            shift = builder.weights.raw("d2t")  # type: ignore[attr-defined]
            self._ids = (shift.long() + torch.arange(size)).to(builder.device)
            if len(shift) != size or int(self._ids.min()) < 0 or int(self._ids.max()) >= self._vocab:
                raise CheckpointError("The drafter's d2t names tokens that the model does not have.", param="d2t")

    def states(self, seen: Seen) -> Tensor:
        """[T, self.sees] of the model's."""
        return torch.cat(list(seen.taps), 1) if seen.joined is None else seen.joined

    def first(self, states: Tensor) -> Tensor:
        """[T, H] for the first step of the chain."""
        return self._fc(states)

    def before(self, state: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(the residual, what attention reads)."""
        normed = self._ops.norm(state, self._state_norm, self._eps)
        x = torch.cat([self._ops.norm(embeds, self._embed_norm, self._eps), normed], 1)
        return (normed if self._after else state), x

    def logits(self, state: Tensor) -> Tensor:
        """[R, V] of the model's tokens."""
        x = self._ops.norm(state, self._norm, self._eps)
        if self._head is None:
            return self._model.logits(x)
        logits = self._head(x).float()
        if self._ids is None:
            return logits
        full = torch.full((len(x), self._vocab), -torch.inf, device=x.device)
        return full.index_copy_(1, self._ids, logits)


class Eagle:
    """See the module."""

    prefix = "layers.0."
    taps: tuple[int, ...] = ()
    ignored = ("layers.0.input_layernorm.weight", "lm_head.weight")

    def __init__(self, raw: dict[str, Any], builder: Builder, facts: ModelFacts, parts: Parts) -> None:
        self.reads = self.sees = facts.hidden_size
        self._model = parts.model
        bias = getattr(builder.weights, "has", lambda name: False)("fc.bias")
        self._fc = builder.linear([Part("fc", facts.hidden_size)], 2 * facts.hidden_size, bias=bias)

    def states(self, seen: Seen) -> Tensor:
        """See Eagle3."""
        assert seen.states is not None
        return seen.states

    def first(self, states: Tensor) -> Tensor:
        """See Eagle3."""
        return states

    def before(self, state: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3."""
        x = self._fc(torch.cat([embeds, state], 1))
        return x, x

    def logits(self, state: Tensor) -> Tensor:
        """See Eagle3."""
        return self._model.logits(state)


class Mtp:
    """See the module."""

    taps: tuple[int, ...] = ()

    def __init__(self, raw: dict[str, Any], builder: Builder, facts: ModelFacts, parts: Parts) -> None:
        hidden = facts.hidden_size
        self.prefix = f"model.layers.{parts.facts.num_layers}."
        self.ignored = (f"{self.prefix}shared_head.head.weight",)
        self.reads = self.sees = hidden
        self._ops, self._eps, self._model = parts.ops, facts.rms_norm_eps, parts.model
        norms = ("enorm", "hnorm", "input_layernorm", "shared_head.norm")
        self._enorm, self._hnorm, self._norm, self._last = (builder.tensor(f"{self.prefix}{name}.weight", hidden) for name in norms)
        self._project = builder.linear([Part(f"{self.prefix}eh_proj", hidden)], 2 * hidden)

    def states(self, seen: Seen) -> Tensor:
        """See Eagle3."""
        assert seen.states is not None
        return seen.states

    def first(self, states: Tensor) -> Tensor:
        """See Eagle3."""
        return states

    def before(self, state: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3."""
        norm, eps = self._ops.norm, self._eps
        x = self._project(torch.cat([norm(embeds, self._enorm, eps), norm(state, self._hnorm, eps)], 1))
        return x, norm(x, self._norm, eps)

    def logits(self, state: Tensor) -> Tensor:
        """See Eagle3."""
        return self._model.logits(self._ops.norm(state, self._last, self._eps))


SHAPES: dict[str, type[Eagle3] | type[Eagle] | type[Mtp]] = {"eagle3": Eagle3, "eagle": Eagle, "mtp": Mtp}


def _part(columns: Columns, part: slice) -> Columns:
    """Some rows of a step of one token each."""
    ancestors = None if columns.ancestors is None else columns.ancestors[part]
    tokens, positions, places, slots, kv_len = (column[part] for column in columns[:5])
    table = columns.table[part] if columns.dense else columns.table
    return Columns(
        tokens, positions, places, slots, kv_len, columns.q_start[: len(tokens) + 1], table, len(tokens), columns.dense, ancestors
    )


def _facts_of(raw: dict[str, Any], model: ModelFacts) -> ModelFacts:
    """The layer's shape. Raises CheckpointError for one of another model."""
    facts = decoder_facts({**raw, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1})
    for name in ("hidden_size", "vocab_size"):
        if getattr(facts, name) != getattr(model, name):
            raise CheckpointError(
                f"--speculative-model: its config.json says {name!r} {getattr(facts, name)}, the model has {getattr(model, name)}: it is the drafter of"
                " another model.",
                param=name,
            )
    return msgspec.structs.replace(facts, num_layers=1)


def _taps_of(raw: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers in front of which EAGLE-3 looks: as its config.json says, or those of the paper's code."""
    own = raw.get("eagle_config") if isinstance(raw.get("eagle_config"), dict) else {}
    said = raw.get("eagle_aux_hidden_state_layer_ids") or (own or {}).get("eagle_aux_hidden_state_layer_ids")
    if said is None:
        return tuple(sorted({2, layers // 2, max(0, layers - 3)}))
    if not isinstance(said, list) or not all(isinstance(one, int) and 0 <= one <= layers for one in said) or sorted(set(said)) != said:
        raise CheckpointError(
            f"config.json: 'eagle_aux_hidden_state_layer_ids' must be ascending layers from 0 to {layers}, but is {said!r:.60}.",
            param="eagle_aux_hidden_state_layer_ids",
        )
    return tuple(said)
