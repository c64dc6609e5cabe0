"""A device's operations as Triton kernels.

What it is: `TritonOps`, the `DeviceOps` over kernels/*/triton.py, with the workspaces that those need, allocated once. Importing this module imports
triton: only the CUDA device does it.
What it does not know: attention, slots' owners, graphs, steps. It is long because it is the whole table of a device, a few lines an operation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels import gpu
from penstock.kernels.activation.triton import gated
from penstock.kernels.argmax.triton import argmax
from penstock.kernels.drafting import triton as drafting
from penstock.kernels.embedding.triton import embedding, gather_rows
from penstock.kernels.linear import triton as linear
from penstock.kernels.linear.scheme import Quantised, Scheme
from penstock.kernels.quantised import layout
from penstock.kernels.quantised import triton as quantised
from penstock.kernels.rmsnorm.triton import add_rms_norm, rms_norm, rounded_norm
from penstock.kernels.sampling import triton as sampling
from penstock.kernels.slots import triton as slot_state
from penstock.kernels.w8a8 import triton as w8a8
from penstock.kernels.w8a8.rounding import quantise_rows
from penstock.kernels.w8a8.rows import STEP, Rounded, Rounding
from penstock.plugins.devices.ops import Ahead, Settings
from penstock.plugins.devices.shifted import Shifted, unshifted
from penstock.plugins.models.api import Columns, Linear, Model, Program, QuantisedLinear, Stacked

Tensor = torch.Tensor


def _columns(count: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """int32 columns, each beginning at a multiple of 64 bytes (kernels are compiled anew for other alignments)."""
    return torch.empty(count, -(-size // 16) * 16, dtype=torch.int32, device=device)[:, :size].unbind()


class TritonLinear:
    """A weight [n, K] as it is, in bfloat16 or float16. `out_dtype` float32: an output head. Gated: [2 n, K]."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        workspace: Tensor,
        *,
        deterministic: bool,
        activation: str = "",
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.weight = weight
        self.n, self.k = weight.shape[0] // (2 if activation else 1), weight.shape[1]
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._bias = bias
        self._workspace = workspace
        self._deterministic = deterministic
        self._activation = activation
        self._out_dtype = out_dtype

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        space = self._workspace
        if self._activation and linear.fuses(x, self._deterministic):
            y = linear.skinny(x, self.weight, self._bias, workspace=space, gated=self._activation)
        else:
            y = linear.matmul(x, self.weight, self._bias, out_dtype=self._out_dtype, deterministic=self._deterministic, workspace=space)
            y = gated(self._activation, y) if self._activation else y
        return y if out is None else out.copy_(y)


EIGHT_FROM = 32
"""With more rows than these inputs are rounded to 8 bits, too, where a checkpoint means them to be and there is no kernel for fewer: those wait for the weight's bytes in
either case."""


class TritonQuantised:
    """A quantised weight in the kernel's own order. See QuantisedLinear. Gated: rows of gate and up alternate, or, `_apart`, lie one below the other."""

    _apart = False

    def __init__(
        self,
        scheme: Scheme,
        rows: Sequence[int],
        inputs: int,
        bias: Stacked | None,
        ops: TritonOps,
        *,
        device: torch.device,
        activation: str,
        head: bool,
    ) -> None:
        self.n, self.k = rows[0] if activation else sum(rows), inputs
        self._rows = rows
        self._left = len(rows)
        self._lock = threading.Lock()
        self._weight = layout.allocate(scheme, sum(rows), inputs, device)
        self._perm = torch.empty(inputs, dtype=torch.int32, device=device) if scheme.permuted else None
        self._bias = bias
        self._joined: Tensor | None = None
        self._ops = ops
        self._activation = activation or None
        self._out_dtype = torch.float32 if head else None
        self.nbytes = self._weight.nbytes + (0 if bias is None else sum(part.nbytes for part in bias.parts))

    def fill(self, index: int, part: Quantised) -> None:
        """See QuantisedLinear."""
        gated = self._activation is not None and not self._apart
        first, every = (index, 2) if gated else (sum(self._rows[:index]), 1)
        layout.fill(self._weight, part, first, every)
        if self._perm is not None and part.perm is not None:
            self._perm.copy_(part.perm)
        with self._lock:
            self._took(part)
            self._left -= 1
            done = self._left == 0
        if done:
            self._filled()

    def _took(self, part: Quantised) -> None:
        """A part is there."""

    def _filled(self) -> None:
        """All parts are there."""
        self._weight = layout.tightened(self._weight)

    def _bias_of(self) -> Tensor | None:
        """Once, when all is read."""
        if self._bias is not None and self._joined is None:
            joined = self._bias.joined()
            self._joined = joined if self._activation is None or self._apart else joined.view(2, -1).t().reshape(-1)
        return self._joined

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        bias = self._bias_of()
        if self._perm is not None:
            x = x.index_select(1, self._perm)
        ops = self._ops
        y = quantised.matmul(
            x,
            self._weight,
            bias,
            out_dtype=self._out_dtype,
            gated=self._activation,
            workspace=ops.linear_space,
            wide=ops.wide_space(x.dtype) if not ops.deterministic and quantised.widens(self._weight, x.shape[0], x.dtype) else None,
            deterministic=ops.deterministic,
        )
        return y if out is None else out.copy_(y)


class TritonEight(TritonQuantised):
    """A weight of 8 bits whose inputs are rounded, too. See RoundingLinear. Where there is no kernel for any number of rows few are taken as they come, and `rounding` is None."""

    def __init__(self, scheme: Scheme, rows: Sequence[int], inputs: int, bias: Stacked | None, ops: TritonOps, **more: Any) -> None:
        self._blocks: Tensor | None = None
        self._apart = w8a8.supports_blocks(scheme)
        super().__init__(scheme, rows, inputs, bias, ops, **more)
        self._always = w8a8.always()
        device: torch.device = more["device"]
        self._fixed = torch.zeros((), dtype=torch.float32, device=device) if scheme.activations == "tensor" else None
        self._unfixed = False

    @property
    def rounding(self) -> Rounding | None:
        """See RoundingLinear."""
        return self._own_rounding() if self._always else None

    def _own_rounding(self) -> Rounding:
        kind = self._weight.scheme.kind
        return Rounding(kind, STEP) if self._apart else Rounding(kind, 0, None if self._unfixed else self._fixed)

    def _took(self, part: Quantised) -> None:
        """Parts of one layer have one input: the widest of their scales."""
        if self._fixed is not None and part.input_scale is not None:
            torch.maximum(self._fixed, part.input_scale.float(), out=self._fixed)
        self._unfixed |= part.input_scale is None

    def _filled(self) -> None:
        super()._filled()
        if self._apart:
            self._blocks = w8a8.block_scales(self._weight)
            self._weight = self._weight._replace(scales=self._blocks[:, 0])  # the others repeat these

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        if not self._always and x.shape[0] <= EIGHT_FROM:
            return super().__call__(x, columns, out)
        return self.rounded(quantise_rows(x, self._own_rounding()), columns, out)

    def rounded(self, x: Rounded, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See RoundingLinear."""
        activation = self._activation
        y = w8a8.matmul(
            x,
            self._weight,
            self._bias_of(),
            out_dtype=self._out_dtype,
            gated=None if self._apart else activation,
            blocks=self._blocks,
        )
        if activation is not None and self._apart:
            y = gated(activation, y)
        return y if out is None else out.copy_(y)


class TritonOps:
    """See DeviceOps."""

    capturable = True

    def __init__(self, facts: ModelFacts, device: torch.device, *, max_rows: int, deterministic: bool = False) -> None:
        """`max_rows`: of a decode step, padding included."""
        vocab = facts.vocab_size
        widest = max(facts.hidden_size, 2 * facts.intermediate_size, (facts.num_heads + 2 * facts.num_kv_heads) * facts.head_dim)
        self.deterministic = deterministic
        self.linear_space = torch.zeros(linear.workspace_elements(max(widest, vocab)), dtype=torch.float32, device=device)
        self._sampling = torch.empty(sampling.workspace_elements(max_rows, vocab), dtype=torch.float64, device=device)
        self._steps = torch.arange(2 * max_rows + 1, dtype=torch.int32, device=device)  # a draft model computes two tokens of each row
        self._max_rows = max_rows
        self._wide: Tensor | None = None
        self._widest_quantised = 0
        self._largest_quantised = 0
        self.workspace_bytes = self.linear_space.nbytes + self._sampling.nbytes

    def compile_only(self) -> AbstractContextManager[None]:
        """See DeviceOps."""
        return gpu.compile_only()

    def fuse(self, model: Model, caches: Sequence[Any]) -> Program | None:
        """See DeviceOps: a graph is this device's way to make one call of a step."""
        return None

    # --- layers

    def _layer(self, weight: Tensor, bias: Stacked | None, activation: str = "", out_dtype: torch.dtype | None = None) -> Linear:
        joined = None if bias is None else bias.joined()
        return TritonLinear(weight, joined, self.linear_space, deterministic=self.deterministic, activation=activation, out_dtype=out_dtype)

    def linear(self, weight: Stacked, bias: Stacked | None) -> Linear:
        """See Ops."""
        return self._layer(weight.joined(), bias)

    def gated(self, weight: Stacked, bias: Stacked | None, activation: str) -> Linear:
        """See Ops."""
        return self._layer(weight.joined(), bias, activation)

    def head(self, weight: Tensor) -> Linear:
        """See Ops."""
        return self._layer(weight, None, out_dtype=torch.float32)

    def quantised(
        self, scheme: Scheme, rows: Sequence[int], inputs: int, bias: Stacked | None, activation: str = "", *, head: bool = False
    ) -> QuantisedLinear | None:
        """See Ops. Inputs are rounded where the scheme says so, and only then: where that takes many rows, never in deterministic mode, for then a row's result would depend on what
        else is in the step."""
        device = self.linear_space.device
        if scheme.kind == "int8" and scheme.zeros and not self.deterministic:
            plain = self.quantised(unshifted(scheme), rows, inputs, None, head=True)
            return None if plain is None else Shifted(plain, scheme, rows, inputs, bias, activation, device, gated, head=head)
        if not layout.supports(scheme) or (scheme.permuted and len(rows) > 1):
            return None
        self._widest_quantised = max(self._widest_quantised, inputs)
        self._largest_quantised = max(self._largest_quantised, sum(rows) * inputs)
        always = w8a8.always()
        blocks = w8a8.supports_blocks(scheme) and always and not any(part % STEP for part in rows)
        eight = w8a8.supports(scheme) and not scheme.permuted and (always or (not self.deterministic and gpu.chained()["PDL"]))
        make = TritonEight if blocks or eight else TritonQuantised
        return make(scheme, rows, inputs, bias, self, device=device, activation=activation, head=head)

    def wide_space(self, dtype: torch.dtype) -> Tensor:
        """Memory in which pieces of quantised weights are widened, shared by all layers: taken when it is first asked for."""
        if self._wide is None:
            size = max(min(quantised.PIECE, self._largest_quantised), layout.ROWS_OF_TILE * self._widest_quantised)
            self._wide = torch.empty(size, dtype=dtype, device=self.linear_space.device)
            self.workspace_bytes += self._wide.nbytes
        return self._wide

    # --- state of the slots

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """See DeviceOps."""
        rows = slots.shape[0]
        if rows >= len(self._steps):
            self._steps = torch.arange(2 * rows, dtype=torch.int32, device=slots.device)
        tokens, positions, places, kv_len = _columns(4, rows, slots.device)
        slot_state.decode_inputs(
            slots, starts, history, table, block_size, tokens=tokens, positions=positions, cache_slots=places, kv_len=kv_len
        )
        return Columns(tokens, positions, places, slots, kv_len, self._steps[: rows + 1], table, rows)

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """See DeviceOps."""
        ids, positions, places = _columns(3, tokens, slots.device)
        kv_len = torch.empty_like(slots)
        slot_state.ragged_inputs(
            slots, starts, q_start, history, table, block_size, tokens=ids, positions=positions, cache_slots=places, kv_len=kv_len
        )
        return Columns(ids, positions, places, slots, kv_len, q_start, table, num_decode)

    def place(self, history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """See DeviceOps."""
        slot_state.place(history, table, slots, counts, offsets, tokens)

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """See DeviceOps."""
        slot_state.set_blocks(table, slots, index, ids)

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """See DeviceOps."""
        slot_state.write_tokens(slots, positions, tokens, history)

    def find_ends(self, slots: Tensor, places: Tensor, lens: Tensor) -> None:
        """See DeviceOps."""
        slot_state.find_ends(slots, places, lens)

    # --- the step

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See Ops."""
        return embedding(tokens, table)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Ops."""
        return gather_rows(x, rows)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return add_rms_norm(x, residual, weight, eps)

    def rounded_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounding: Rounding) -> Rounded:
        """See Ops."""
        return rounded_norm(x, residual, weight, eps, rounding)

    # --- sampling

    def greedy(self, logits: Tensor) -> Tensor:
        """See DeviceOps."""
        return argmax(logits)

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """See DeviceOps."""
        s, most = settings, self._max_rows
        columns = (s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.choices)
        out = torch.empty(len(slots), dtype=torch.int32, device=logits.device)
        for at in range(0, len(slots), most):  # with drafts there may be more rows than the workspace is for
            part = slice(at, at + most)
            sampling.draw(logits[part], *columns, positions[part], slots=slots[part], out=out[part], workspace=self._sampling)
        return out

    def penalise(
        self,
        logits: Tensor,
        counted: Tensor,
        slots: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        settings: Settings,
        ahead: Ahead | None = None,
    ) -> None:
        """See DeviceOps."""
        s = settings
        more = None if ahead is None else (ahead.depths, ahead.positions, ahead.history, ahead.deepest)
        sampling.penalise_(logits, counted, counts, in_prompt, s.repetition, s.frequency, s.presence, slots=slots, ahead=more)

    def add_bias(self, logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
        """See DeviceOps."""
        sampling.scatter_bias_(logits, rows, ids, values)

    def mask(self, logits: Tensor, mask: Tensor, mask_rows: Tensor) -> None:
        """See DeviceOps."""
        sampling.mask_(logits, mask, mask_rows)

    def ban_words(
        self,
        logits: Tensor,
        history: Tensor,
        rows: Tensor,
        slots: Tensor,
        positions: Tensor,
        words: Tensor,
        starts: Tensor,
        sizes: Tensor,
        longest: int,
    ) -> None:
        """See DeviceOps. At least WORD_SIZES[0], so that few sizes have kernels."""
        sampling.ban_words_(logits, history, rows, slots, positions, words, starts, sizes, max(longest, 4))

    def start_counts(
        self, counts: Tensor, in_prompt: Tensor, counted: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor
    ) -> None:
        """See DeviceOps."""
        sampling.start_counts(counts, in_prompt, counted, history, slots, splits, ends)

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """See DeviceOps."""
        sampling.count_(counts, counted, tokens)

    # --- drafts

    def verify(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, widest: int
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.verify(tokens, slots, positions, bounds, history, widest)

    def verify_tree(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, parents: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.verify_tree(tokens, slots, positions, bounds, history, parents, deepest)

    def tree_moves(
        self, sources: Tensor, counts: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.tree_moves(sources, counts, slots, positions, bounds, table, block_size)

    def put_drafts(self, drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
        """See DeviceOps."""
        drafting.put_drafts(drafts, slots, ends, history, vocab)

    def ngrams(self, slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
        """See DeviceOps."""
        drafting.ngrams(slots, ends, history, shortest, longest, out)
