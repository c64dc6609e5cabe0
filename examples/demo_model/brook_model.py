"""A plain Llama in PyTorch for training Brook: RMSNorm, rotary positions, grouped queries, SwiGLU, tied embeddings.

Training runs on packed text: conversations lie end to end in one long row, and each attends only to itself. On a
GPU that is variable-length flash attention, elsewhere a mask. Parameter names are those of a Hugging Face Llama
checkpoint, so that exporting is a cast to bfloat16.

:func:`generate` decodes in batches, for the evaluation and for the heads' training: the server has its own machinery.
This module knows nothing about text. It is a little long because model, folders and decoding share the layer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 4096
    context: int = 4096
    theta: float = 500_000.0  # slow rotations leave part of each head free to match by content over long distances
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden // self.heads


SHAPES: Final = {
    "brook": Shape(hidden=256, layers=8, heads=8, kv_heads=4, intermediate=768),
    "draft": Shape(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=128),
    "cpu": Shape(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384),
    "cpu-draft": Shape(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128),
}


@dataclass
class Packing:
    """Where the conversations of a packed row begin, and each token's position in its own conversation."""

    starts: Tensor  # int32, with the total as last entry
    longest: int
    positions: Tensor
    mask: Tensor | None = None  # only where there is no variable-length kernel


def _varlen_kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_VARLEN: Final = _varlen_kernel()
# The argument for causal attention was renamed between PyTorch releases.
_CAUSAL: Final[dict[str, Any]] = (
    {} if _VARLEN is None
    else {"window_size": (-1, 0)} if "window_size" in inspect.signature(_VARLEN).parameters
    else {"is_causal": True}
)  # fmt: skip


def packing(starts: Tensor, positions: Tensor, longest: int) -> Packing:
    """Prepare a packed row for attention on the device it lies on."""
    if positions.is_cuda and _VARLEN is not None:
        return Packing(starts, longest, positions)
    total = positions.shape[0]
    owner = torch.bucketize(torch.arange(total, device=positions.device), starts[1:].long(), right=True)
    order = torch.arange(total, device=positions.device)
    mask = (owner[:, None] == owner[None, :]) & (order[:, None] >= order[None, :])
    return Packing(starts, longest, positions, mask)


@torch.compiler.disable
def _attend(q: Tensor, k: Tensor, v: Tensor, pack: Packing) -> Tensor:
    """Causal attention within each conversation; inputs are (tokens, heads, width)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if pack.mask is None:
        out: Tensor = _VARLEN(q, k, v, pack.starts, pack.starts, pack.longest, pack.longest, **_CAUSAL)
        return out
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=pack.mask)
    return out.transpose(0, 1)


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * gain.float()).to(x.dtype)


def _before(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = cos.shape[-1]
    normed = _norm(x, gain, epsilon)
    q = F.linear(normed, wq.to(x.dtype)).unflatten(-1, (-1, width))
    k = F.linear(normed, wk.to(x.dtype)).unflatten(-1, (-1, width))
    v = F.linear(normed, wv.to(x.dtype)).unflatten(-1, (-1, width))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _after(x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor, epsilon: float) -> Tensor:
    x = x + F.linear(attended.flatten(-2), wo.to(x.dtype))
    normed = _norm(x, gain, epsilon)
    inner = F.silu(F.linear(normed, gate.to(x.dtype))) * F.linear(normed, up.to(x.dtype))
    return x + F.linear(inner, down.to(x.dtype))


# Functions of plain tensors, so that one compilation serves every layer of a shape.
_halves: dict[str, Callable[..., Any]] = {"before": _before, "after": _after}


def compile_layers() -> None:
    """Compile both halves of the layer, for training."""
    _halves.update(before=torch.compile(_before, dynamic=False), after=torch.compile(_after, dynamic=False))


def plain_layers() -> None:
    """Go back to eager layers: the evaluation's shapes change at every step."""
    _halves.update(before=_before, after=_after)


def rotary(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the given positions, each (..., 1, head_dim)."""
    half = shape.head_dim // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions.float()[..., None] * shape.theta**-steps
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions."""
    one, two = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-two, one), dim=-1).float() * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in float32."""
        return _norm(x, self.weight, self.epsilon)


class Attention(nn.Module):
    """The four projections of attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(shape.heads * width, shape.hidden, bias=False)


class MLP(nn.Module):
    """The three matrices of SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)


class Layer(nn.Module):
    """One transformer layer, split around attention so that both halves can be compiled.

    The weights may be wider than the activations: they are cast on use, so float32 weights train in bfloat16.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.epsilon = shape.epsilon
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.epsilon)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, with the heads as the second-last axis."""
        part = self.self_attn
        out: tuple[Tensor, Tensor, Tensor] = _halves["before"](
            x, cos, sin, self.input_layernorm.weight, part.q_proj.weight, part.k_proj.weight, part.v_proj.weight, self.epsilon
        )
        return out

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention and the feed-forward."""
        gate, up, down = self.mlp.gate_proj.weight, self.mlp.up_proj.weight, self.mlp.down_proj.weight
        out: Tensor = _halves["after"](
            x, attended, self.self_attn.o_proj.weight, self.post_attention_layernorm.weight, gate, up, down, self.epsilon
        )
        return out


class Body(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.epsilon)


class Llama(nn.Module):
    """A Llama whose output head is its embedding table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        deep = (2 * shape.layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=scale * (deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0))

    def hidden(self, tokens: Tensor, pack: Packing) -> Tensor:
        """The last hidden states of a packed row."""
        cos, sin = rotary(pack.positions, self.shape)
        x = self.model.embed_tokens(tokens)
        if x.is_cuda:
            x = x.bfloat16()
        for layer in self.model.layers:
            x = layer.after(x, _attend(*layer.before(x, cos, sin), pack))
        out: Tensor = self.model.norm(x)
        return out

    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(weight.numel() for weight in self.parameters())


# --- folders --------------------------------------------------------------------------------------------------


def config_of(shape: Shape, *, bos: int, eos: list[int], pad: int) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def save_weights(model: Llama, path: Path) -> None:
    """Write the weights in bfloat16 under their Hugging Face names, whole or not at all."""
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def shape_of(folder: Path) -> Shape:
    """Read the shape back from a ``config.json``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Shape(
        hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], intermediate=config["intermediate_size"], vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"], theta=config["rope_theta"], epsilon=config["rms_norm_eps"],
    )  # fmt: skip


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """A model for evaluation from an exported folder."""
    model = Llama(shape_of(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device, dtype).eval()


# --- decoding in batches ----------------------------------------------------------------------------------------


def _pick(logits: Tensor, temperature: float) -> Tensor:
    if temperature:  # the largest of logits with Gumbel noise is a sample
        logits = logits.float() / temperature - torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    return logits.argmax(-1)


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], *, stop: set[int], most: int, temperature: float = 0.0) -> list[list[int]]:
    """Continuations without the stop token. Prompts are padded on the right, so no mask is needed to read them."""
    device = model.model.norm.weight.device
    shape = model.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    rows = len(prompts)
    tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    room = width + most
    dtype = model.model.norm.weight.dtype
    cache = torch.zeros(shape.layers, 2, rows, shape.kv_heads, room, shape.head_dim, device=device, dtype=dtype)
    head = model.model.embed_tokens.weight

    cos, sin = rotary(torch.arange(width, device=device), shape)
    x = model.model.embed_tokens(tokens)
    groups = shape.heads // shape.kv_heads
    for index, layer in enumerate(model.model.layers):
        q, k, v = (part.transpose(1, 2) for part in layer.before(x, cos, sin))
        cache[index, 0, :, :, :width], cache[index, 1, :, :, :width] = k, v
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = layer.after(x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    last = x[torch.arange(rows, device=device), lengths - 1]
    current = _pick(model.model.norm(last) @ head.T, temperature)

    found: list[list[int]] = [[] for _ in prompts]
    active = list(range(rows))
    slots = torch.arange(room, device=device)
    for step in range(most):
        going = []
        for place, token in enumerate(current.tolist()):
            if token not in stop:
                found[active[place]].append(token)
                going.append(place)
        if not going or step == most - 1:
            break
        if len(going) < len(active):  # rows that have ended cost nothing more
            keep = torch.tensor(going, device=device)
            active = [active[place] for place in going]
            current, lengths, cache = current[keep], lengths[keep], cache[:, :, keep]
        every = torch.arange(len(active), device=device)
        at = lengths + step
        cos, sin = rotary(at[:, None], shape)
        used = int(at.max()) + 1
        seen = (slots[None, :used] <= at[:, None])[:, None, None, :]
        x = model.model.embed_tokens(current[:, None])
        for index, layer in enumerate(model.model.layers):
            q, k, v = layer.before(x, cos, sin)
            cache[index, 0, every, :, at] = k[:, 0]
            cache[index, 1, every, :, at] = v[:, 0]
            keys, values = cache[index, 0, :, :, :used], cache[index, 1, :, :, :used]
            # The queries of one group share their keys: they are extra rows of one attention.
            grouped = q.view(len(active), shape.kv_heads, groups, shape.head_dim)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen)
            x = layer.after(x, out.reshape(len(active), 1, shape.heads, shape.head_dim))
        current = _pick(model.model.norm(x[:, 0]) @ head.T, temperature)
    return found


@torch.inference_mode()
def argmax_along(model: Llama, prompts: list[list[int]], continuations: list[list[int]]) -> list[list[int]]:
    """What the model would say at each token of given continuations: the ground of a draft's acceptance rate."""
    device = model.model.norm.weight.device
    rows = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    cos, sin = rotary(torch.arange(width, device=device), model.shape)
    x = model.model.embed_tokens(tokens)
    groups = model.shape.heads // model.shape.kv_heads
    for layer in model.model.layers:
        q, k, v = (part.transpose(1, 2) for part in layer.before(x, cos, sin))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = layer.after(x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    x = model.model.norm(x)
    out = []
    for row, (prompt, more) in enumerate(zip(prompts, continuations, strict=True)):
        logits = x[row, len(prompt) - 1 : len(prompt) + len(more) - 1] @ model.model.embed_tokens.weight.T
        out.append(logits.argmax(-1).tolist())
    return out
