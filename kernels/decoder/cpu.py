"""The decoder program in C: descriptions of the weights built once, one library call a step.

What it is: `CpuDecoder`, which holds the C structs of a `DecoderParts`, a workspace that grows to the largest step seen, and the call. The
whole step is one parallel region (team.h says how its threads share it).
What it does not know: requests, sampling; shapes and dtypes were checked by the entry.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from penstock.kernels.attention.layout import describe
from penstock.kernels.decoder.parts import DecoderParts
from penstock.kernels.linear import PackedGated, PackedLinear
from penstock.kernels.native.bind import Layer, Native, Program, Step, check


class CpuDecoder:
    """See the module."""

    def __init__(self, lib: Native, parts: DecoderParts) -> None:
        self._lib = lib.lib
        self._held: list[Tensor] = []
        self._workspace = torch.empty(0, dtype=torch.uint8)
        bf16 = parts.embedding.dtype == torch.bfloat16
        self._layers = (Layer * len(parts.layers))()
        for target, layer in zip(self._layers, parts.layers, strict=True):
            self._describe(target, "qkv", layer.qkv)
            self._describe(target, "o", layer.o)
            self._describe(target, "gate_up", layer.gate_up)
            self._describe(target, "down", layer.down)
            target.attn_norm = self._wide(layer.attn_norm)
            target.mlp_norm = self._wide(layer.mlp_norm)
            target.q_norm = None if layer.q_norm is None else self._wide(layer.q_norm)
            target.k_norm = None if layer.k_norm is None else self._wide(layer.k_norm)
            target.window = layer.window
        self._program = Program(
            layers_count=len(parts.layers), hidden=parts.embedding.shape[1], heads=parts.num_heads, kv_heads=parts.num_kv_heads,
            dim=parts.head_dim, inter=parts.layers[0].gate_up.n, vocab=parts.lm_head.n, bf16=bf16, rotary=parts.cos_sin.shape[1],
            table_rows=parts.cos_sin.shape[0], eps=parts.eps, scale=parts.scale, embedding_rows=parts.embedding.shape[0], embedding=parts.embedding.data_ptr(), final_norm=self._wide(parts.final_norm),
            cos_sin=parts.cos_sin.data_ptr(), layers=self._layers,
        )  # fmt: skip
        self._describe(self._program, "lm_head", parts.lm_head)
        for target, k_cache, v_cache, scales in zip(self._layers, parts.k_caches, parts.v_caches, parts.scales, strict=True):
            describe(self._program, target, k_cache, v_cache, scales)

    def _describe(self, target: ctypes.Structure, name: str, linear: PackedLinear | PackedGated) -> None:
        assert linear.packed is not None, "weights were packed before the library was loaded"
        setattr(target, name, linear.packed.weight)

    def _wide(self, norm: Tensor) -> int:
        self._held.append(norm.float())
        return self._held[-1].data_ptr()

    def __call__(
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
        """One step. Raises IndexError for an index outside its table (nothing has been written then)."""
        step = Step(
            tokens.data_ptr(), positions.data_ptr(), slots.data_ptr(), block_tables.data_ptr(), q_start.data_ptr(), kv_len.data_ptr(),
            rows.data_ptr(), tokens.shape[0], kv_len.shape[0], block_tables.shape[1], rows.shape[0],
            None if logits is None else logits.data_ptr(), None if hidden is None else hidden.data_ptr(),
            None if greedy is None else greedy.data_ptr(), None, torch.get_num_threads(),
        )  # fmt: skip
        if tap_layers is not None and taps is not None:
            step.tap_layers, step.taps, step.tap_count = tap_layers.data_ptr(), taps.data_ptr(), len(tap_layers)
        if ancestors is not None:
            step.ancestors = ancestors.data_ptr()
        if given is not None:
            step.given, step.given_normed = given[0].data_ptr(), given[1].data_ptr()
        program, at = ctypes.byref(self._program), ctypes.byref(step)
        needed = self._lib.ps_step_bytes(program, at)
        if needed > self._workspace.shape[0]:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        step.workspace = self._workspace.data_ptr()
        check(self._lib.ps_step(program, at))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch held now."""
        return self._workspace.shape[0]
