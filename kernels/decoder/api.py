"""Checked entry of the whole-model program: a step of a Llama-like decoder in one call.

    program = DecoderProgram(embedding=[V, H], layers=[DecoderLayer...], final_norm=[H], lm_head=PackedLinear, num_heads=..., num_kv_heads=...,
                             head_dim=..., eps=..., cos_sin=[P, r] float32, scale=None, k_caches=[...], v_caches=[...],
                             scales=[])
    program(tokens[T], positions[T], slots[T], block_tables[R, B], q_start[R + 1], kv_len[R], rows[L],
            logits=None | [L, V] float32, hidden=None | [L, H], greedy=None | [L] int32,
            tap_layers=None | [K], taps=None | [T, K, H], given=None | ([T, H], [T, k])) -> None

All index tensors int32, contiguous; meanings as in `rope_and_cache` and `paged_attention` (positions index the rotary table). `rows` names
the token rows (0..T-1) whose results are wanted; any of the three outputs may be given: `logits`, `hidden` (after the final norm, model
dtype, the input of lm_head), `greedy` (as `kernels.argmax`: first maximum, -1 for a bad row). `taps` are the streams in front of the layers `tap_layers` (ascending;
the number of layers: behind the last one, of the wanted rows in their order, no more than there are tokens). `given` stands in place of the tokens' embeddings and of
the first layer's norm, in the model's dtype: where a layer reads something else than a norm of its stream, and something of another width. Prefill chunks and decode rows mix freely. A row's
results do not depend on what else is in the step. Results equal the composition in `decoder.reference` bit for bit.

Caches: one pair a layer, as in `attention.layout`, all of the model's elements or, with `scales` (one a layer), all of codes; the program keeps references, the caller may zero or copy blocks between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.argmax import argmax
from penstock.kernels.attention.api import check_tables
from penstock.kernels.attention.layout import Scales, check_cache
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.decoder import reference
from penstock.kernels.decoder.cpu import CpuDecoder
from penstock.kernels.decoder.parts import DecoderLayer, DecoderParts
from penstock.kernels.linear import PackedLinear


class DecoderProgram:
    """A model bound to its caches; see the module. Not re-entrant: one step at a time."""

    def __init__(
        self,
        *,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        lm_head: PackedLinear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        cos_sin: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        scale: float | None = None,
        scales: Sequence[Scales | None] = (),
    ) -> None:
        tensor("embedding", embedding, (None, None), *FLOATS)
        dtype, hidden = embedding.dtype, embedding.shape[1]
        require(len(layers) == len(k_caches) == len(v_caches) > 0, "there must be one K and one V cache for each layer")
        of_codes = list(scales) or [None] * len(layers)
        require(len(of_codes) == len(layers), "there must be scales for the caches of each layer")
        require(len({None if one is None else one.kind for one in of_codes}) == 1, "the caches of all layers must hold the same codes")
        tensor("final_norm", final_norm, (hidden,), dtype)
        tensor("cos_sin", cos_sin, (None, None), torch.float32)
        require(cos_sin.shape[1] % 2 == 0 and cos_sin.shape[1] <= head_dim, "cos_sin must have an even number of columns, at most head_dim")
        require(num_heads % num_kv_heads == 0, "the number of heads must be a multiple of the number of KV heads")
        for index, (layer, k_cache, v_cache) in enumerate(zip(layers, k_caches, v_caches, strict=True)):
            check_cache(k_cache, v_cache, num_kv_heads, dtype, of_codes[index])
            alike = k_cache.shape == k_caches[0].shape and k_cache.stride() == k_caches[0].stride()
            require(alike and k_cache.shape[3] == head_dim, f"layer {index}: the cache has another shape")
            shapes = (
                (layer.qkv, (num_heads + 2 * num_kv_heads) * head_dim, hidden if index else layers[0].qkv.k),
                (layer.o, hidden, num_heads * head_dim),
                (layer.gate_up, layer.gate_up.n, hidden),
                (layer.down, hidden, layer.gate_up.n),
            )
            for weight, n, k in shapes:
                fits = (weight.n, weight.k) == (n, k) and dtype in weight.dtypes and not weight.gathers
                require(fits, f"layer {index}: a weight is not [{n}, {k}] for {dtype}, its columns in order")
            for name, norm, size in (
                ("attn_norm", layer.attn_norm, hidden),
                ("mlp_norm", layer.mlp_norm, hidden),
                ("q_norm", layer.q_norm, head_dim),
                ("k_norm", layer.k_norm, head_dim),
            ):
                if norm is not None:
                    tensor(f"layer {index}: {name}", norm, (size,), dtype)
        require(lm_head.k == hidden and dtype in lm_head.dtypes and not lm_head.gathers, "lm_head does not fit the hidden size or dtype")
        scale = head_dim**-0.5 if scale is None else scale
        self.parts = DecoderParts(
            embedding,
            list(layers),
            final_norm,
            lm_head,
            num_heads,
            num_kv_heads,
            head_dim,
            eps,
            scale,
            cos_sin,
            list(k_caches),
            list(v_caches),
            of_codes,
        )
        lib = native.library()
        self._cpu = None if lib is None else CpuDecoder(lib, self.parts)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        rows: Tensor,
        *,
        logits: Tensor | None = None,
        hidden: Tensor | None = None,
        greedy: Tensor | None = None,
        tap_layers: Tensor | None = None,
        taps: Tensor | None = None,
        given: tuple[Tensor, Tensor] | None = None,
        ancestors: Tensor | None = None,
    ) -> None:
        """Run one step; see the module."""
        tensor("tokens", tokens, (None,), torch.int32)
        tensor("positions", positions, tokens.shape, torch.int32)
        tensor("slots", slots, tokens.shape, torch.int32)
        check_tables(block_tables, q_start, kv_len)
        tensor("rows", rows, (None,), torch.int32)
        count = rows.shape[0]
        if logits is not None:
            tensor("logits", logits, (count, self.parts.lm_head.n), torch.float32)
        if hidden is not None:
            tensor("hidden", hidden, (count, self.parts.embedding.shape[1]), self.parts.embedding.dtype)
        if greedy is not None:
            tensor("greedy", greedy, (count,), torch.int32)
        require((tap_layers is None) == (taps is None), "tap_layers and taps belong together")
        if tap_layers is not None and taps is not None:
            tensor("tap_layers", tap_layers, (None,), torch.int32)
            tensor("taps", taps, (tokens.shape[0], tap_layers.shape[0], self.parts.embedding.shape[1]), self.parts.embedding.dtype)
        reads, width = self.parts.layers[0].qkv.k, self.parts.embedding.shape[1]
        require(given is not None or reads == width, "the first layer reads what is no norm of an embedding: it must be given")
        if given is not None:
            tensor("given[0]", given[0], (tokens.shape[0], width), self.parts.embedding.dtype)
            tensor("given[1]", given[1], (tokens.shape[0], reads), self.parts.embedding.dtype)
        if ancestors is not None:
            tensor("ancestors", ancestors, tokens.shape, torch.int64)
        self.trusted(
            tokens, positions, slots, block_tables, q_start, kv_len, rows, logits, hidden, greedy, tap_layers, taps, given, ancestors
        )

    def trusted(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        rows: Tensor,
        logits: Tensor | None,
        hidden: Tensor | None,
        greedy: Tensor | None,
        tap_layers: Tensor | None = None,
        taps: Tensor | None = None,
        given: tuple[Tensor, Tensor] | None = None,
        ancestors: Tensor | None = None,
    ) -> None:
        """As a call, for tensors whose shapes and dtypes the caller made itself: what they hold is checked all the same."""
        if self._cpu is not None:
            self._cpu(
                tokens, positions, slots, block_tables, q_start, kv_len, rows, logits, hidden, greedy, tap_layers, taps, given, ancestors
            )
            return
        kept = {} if tap_layers is None or taps is None else {layer: taps[:, at] for at, layer in enumerate(tap_layers.tolist())}
        states = reference.hidden_states(self.parts, tokens, positions, slots, block_tables, q_start, kv_len, rows, kept, given, ancestors)
        if hidden is not None:
            hidden.copy_(states)
        if logits is None and greedy is None:
            return
        scores = reference.logits(self.parts, states)
        if logits is not None:
            logits.copy_(scores)
        if greedy is not None:
            argmax(scores, out=greedy)
