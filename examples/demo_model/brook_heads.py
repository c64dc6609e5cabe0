"""Brook's speculative heads in plain PyTorch: Medusa, EAGLE-3 and a DeepSeek-style MTP head, in their published layouts.

They serve training, the evaluation and as the reference of what a server must compute. The meaning of positions is
the same for all three. A *root* is a position ``p`` whose hidden state Brook has computed; Brook itself predicts token
``p + 1`` there, which is therefore known before a head speaks:

* Medusa's head ``k`` (from 0) reads the normalised last hidden state of ``p`` and guesses token ``p + 2 + k``.
* EAGLE-3 and MTP are chains. Step ``j`` (from 0) reads a hidden state and the embedding of token ``p + 1 + j``, sits at
  rotary position ``p + j`` and guesses token ``p + 2 + j``. Step 0 reads Brook's hidden state of ``p``; a later step reads the
  hidden state of the step before. A step attends to step 0 of all positions up to ``p``, and to the earlier steps
  of its own chain.

Weights may be wider than activations: they are cast on use. This module knows nothing about text or training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from brook_model import Layer, Llama, RMSNorm, Shape, rotary, rotate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

METHODS: Final = ("medusa", "eagle3", "mtp")


@dataclass(frozen=True)
class HeadShape:
    """The sizes of the heads, apart from those of the target."""

    medusa_heads: int = 3
    medusa_layers: int = 2
    eagle_intermediate: int = 128
    draft_vocabulary: int = 2048
    # Tap i is the residual stream that enters layer i: what i layers have made of the embeddings.
    taps: tuple[int, ...] = (2, 4, 5)
    mtp_intermediate: int = 128


@dataclass
class Seen:
    """What the target shows to its heads, each (rows, tokens, width)."""

    last: Tensor  # after the last norm: what the output head reads
    taps: Tensor  # the tapped residual streams side by side


@torch.no_grad()
def watch(target: Llama, tokens: Tensor, taps: tuple[int, ...]) -> Seen:
    """Run the target over rows padded on the right."""
    cos, sin = rotary(torch.arange(tokens.shape[1], device=tokens.device), target.shape)
    x = target.model.embed_tokens(tokens)
    kept = {}
    for index, layer in enumerate(target.model.layers):
        if index in taps:
            kept[index] = x
        q, k, v = (part.transpose(1, 2) for part in layer.before(x, cos, sin))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = layer.after(x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    kept[len(target.model.layers)] = x
    return Seen(target.model.norm(x), torch.cat([kept[tap] for tap in taps], dim=-1))


def at(x: Tensor, places: Tensor) -> Tensor:
    """The vectors of each row at the given places."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


# --- Medusa -----------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """``x + silu(W x + b)``, which starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return x + F.silu(_linear(x, self.linear))


class Medusa(nn.ModuleList):
    """One stack of residual blocks for each further token; all are read by the target's own output head."""

    method = "medusa"

    def __init__(self, target: Shape, shape: HeadShape) -> None:
        super().__init__(nn.Sequential(*(ResBlock(target.hidden) for _ in range(shape.medusa_layers))) for _ in range(shape.medusa_heads))

    def guess(self, target: Llama, tokens: Tensor, seen: Seen, roots: Tensor, steps: int) -> list[Tensor]:
        """For each step the logits at the roots."""
        del tokens
        x = at(seen.last, roots)
        head = target.model.embed_tokens.weight
        return [F.linear(stack(x), head.to(x.dtype)) for stack in list(self)[:steps]]


# --- chains -----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """What EAGLE-3 and MTP share: one transformer layer that feeds on its own hidden states."""

    sizes: Shape

    def first(self, seen: Seen) -> Tensor:
        """The hidden states that step 0 reads."""
        raise NotImplementedError

    def before(self, hidden: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream, queries, keys and values of one step."""
        raise NotImplementedError

    def after(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The hidden states that the next step reads."""
        raise NotImplementedError

    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """The guess of a step."""
        raise NotImplementedError

    def guess(self, target: Llama, tokens: Tensor, seen: Seen, roots: Tensor, steps: int) -> list[Tensor]:
        """For each step the logits at the roots, where ``tokens`` continue truly.

        A chain in use feeds on its own guesses, but these count only as long as they are the true tokens. So every
        chain is computed at once: training-time test, and an exact measurement of greedy acceptance.
        """
        rows, width = tokens.shape
        table = target.model.embed_tokens.weight
        groups = self.sizes.heads // self.sizes.kv_heads
        cos, sin = rotary(torch.arange(width, device=tokens.device), self.sizes)
        x, q, k, v = self.before(self.first(seen), F.embedding(tokens.roll(-1, 1), table).to(seen.last.dtype), cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)))
        hidden = at(self.after(x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)), roots)
        out = [self.logits(target, hidden)]
        mask = (torch.arange(width, device=tokens.device) <= roots[..., None]).unsqueeze(1)
        own = torch.eye(roots.shape[1], dtype=torch.bool, device=tokens.device).expand(rows, 1, -1, -1)
        for step in range(1, steps):
            embeds = F.embedding(tokens.gather(1, (roots + 1 + step).clamp_max(width - 1)), table).to(hidden.dtype)
            x, q, more_k, more_v = self.before(hidden, embeds, *rotary(roots + step, self.sizes))
            k = torch.cat((k, more_k.repeat_interleave(groups, -2).transpose(1, 2)), dim=2)
            v = torch.cat((v, more_v.repeat_interleave(groups, -2).transpose(1, 2)), dim=2)
            mask = torch.cat((mask, own), dim=-1)
            attended = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
            hidden = self.after(x, attended.transpose(1, 2))
            out.append(self.logits(target, hidden))
        return out


def _qkv(x: Tensor, part: nn.Module, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_linear(x, getattr(part, name)).unflatten(-1, (-1, cos.shape[-1])) for name in ("q_proj", "k_proj", "v_proj"))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


class EagleLayer(Layer):
    """A Llama layer whose attention reads an embedding and a hidden state side by side."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width = shape.head_dim
        self.self_attn.q_proj = nn.Linear(2 * shape.hidden, shape.heads * width, bias=False)
        self.self_attn.k_proj = nn.Linear(2 * shape.hidden, shape.kv_heads * width, bias=False)
        self.self_attn.v_proj = nn.Linear(2 * shape.hidden, shape.kv_heads * width, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden, shape.epsilon)


class Eagle3(Chain):
    """EAGLE-3: low, middle and high states of the target, a small vocabulary of its own."""

    method = "eagle3"

    def __init__(self, target: Shape, shape: HeadShape) -> None:
        super().__init__()
        self.sizes = Shape(**{**asdict(target), "layers": 1, "intermediate": shape.eagle_intermediate})
        self.fc = nn.Linear(len(shape.taps) * target.hidden, target.hidden, bias=False)
        self.midlayer = EagleLayer(self.sizes)
        self.norm = RMSNorm(target.hidden, target.epsilon)
        self.lm_head = nn.Linear(target.hidden, shape.draft_vocabulary, bias=False)
        # The target's token of a draft's token t is t + d2t[t]; t2d tells which of the target's tokens the draft has.
        self.register_buffer("d2t", torch.zeros(shape.draft_vocabulary, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(target.vocabulary, dtype=torch.bool))

    def choose(self, target: Llama, kept: Tensor) -> None:
        """Set the vocabulary to the given tokens of the target, and start from its rows of the output head."""
        kept = kept.sort().values
        self.d2t.copy_(kept - torch.arange(len(kept), device=kept.device))
        self.t2d.zero_()[kept] = True
        with torch.no_grad():
            self.lm_head.weight.copy_(target.model.embed_tokens.weight[kept])

    def kept(self) -> Tensor:
        """The target's token for each of the draft's."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def first(self, seen: Seen) -> Tensor:
        """The tapped states in one."""
        return _linear(seen.taps, self.fc)

    def before(self, hidden: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention reads embedding, then hidden state; the residual stream is the hidden state before its norm."""
        layer = self.midlayer
        both = torch.cat((layer.input_layernorm(embeds), layer.hidden_norm(hidden)), dim=-1)
        return hidden, *_qkv(both, layer.self_attn, cos, sin)

    def after(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention and the feed-forward, not normalised."""
        return self.midlayer.after(residual, attended)

    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """Over the draft's vocabulary."""
        del target
        return _linear(self.norm(hidden), self.lm_head)


class _SharedHead(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.hidden, shape.epsilon)


class Mtp(Chain, Layer):
    """A multi-token-prediction layer: a Llama layer over a projection of embedding and hidden state."""

    method = "mtp"

    def __init__(self, target: Shape, shape: HeadShape) -> None:
        sizes = Shape(**{**asdict(target), "intermediate": shape.mtp_intermediate})
        Layer.__init__(self, sizes)
        self.sizes = sizes
        self.enorm = RMSNorm(target.hidden, target.epsilon)
        self.hnorm = RMSNorm(target.hidden, target.epsilon)
        self.eh_proj = nn.Linear(2 * target.hidden, target.hidden, bias=False)
        self.shared_head = _SharedHead(target)

    def first(self, seen: Seen) -> Tensor:
        """The target's normalised last hidden states."""
        return seen.last

    def before(self, hidden: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer reads a projection of the normalised embedding and the normalised hidden state, in this order."""
        x = _linear(torch.cat((self.enorm(embeds), self.hnorm(hidden)), dim=-1), self.eh_proj)
        return x, *_qkv(self.input_layernorm(x), self.self_attn, cos, sin)

    def after(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The residual stream, before ``shared_head.norm``."""
        return Layer.after(self, residual, attended)

    def logits(self, target: Llama, hidden: Tensor) -> Tensor:
        """Through the target's own output head."""
        return F.linear(self.shared_head.norm(hidden), target.model.embed_tokens.weight.to(hidden.dtype))


Head = Medusa | Eagle3 | Mtp
_CLASSES: Final[dict[str, type[Medusa] | type[Eagle3] | type[Mtp]]] = {"medusa": Medusa, "eagle3": Eagle3, "mtp": Mtp}


def make_head(method: str, target: Shape, shape: HeadShape) -> Head:
    """A new head with random weights."""
    head = _CLASSES[method](target, shape)
    deep = (2 * (target.layers + 1)) ** -0.5
    if method != "medusa":
        for name, weight in head.named_parameters():
            if weight.ndim == 2:
                late = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (deep if late else 1.0))
    return head


def tokens_of(head: Head, logits: Tensor) -> Tensor:
    """The target's token that each guess would choose greedily."""
    best = logits.argmax(-1)
    return head.kept()[best] if isinstance(head, Eagle3) else best


# --- folders ----------------------------------------------------------------------------------------------------


def head_config(method: str, target: dict[str, Any], sizes: Shape, shape: HeadShape) -> dict[str, Any]:
    """The ``config.json`` of a head for the target whose own config is given."""
    if method == "medusa":
        return {
            "architectures": ["MedusaModel"], "model_type": "medusa", "base_model_name_or_path": "brook",
            "medusa_num_heads": shape.medusa_heads, "medusa_num_layers": shape.medusa_layers, "medusa_fc_bias": True,
            "original_lm_head": True, "hidden_size": sizes.hidden, "vocab_size": sizes.vocabulary,
            "truncated_vocab_size": sizes.vocabulary, "torch_dtype": "bfloat16",
        }  # fmt: skip
    if method == "eagle3":
        own = {"architectures": ["LlamaForCausalLMEagle3"], "intermediate_size": shape.eagle_intermediate, "num_hidden_layers": 1,
               "draft_vocab_size": shape.draft_vocabulary, "tie_word_embeddings": False, "target_hidden_size": sizes.hidden,
               "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(shape.taps), "use_aux_hidden_state": True},
               "eagle_aux_hidden_state_layer_ids": list(shape.taps), "norm_before_residual": False}  # fmt: skip
    else:
        own = {"architectures": ["LlamaForCausalLMNextN"], "intermediate_size": shape.mtp_intermediate,
               "num_nextn_predict_layers": 1}  # fmt: skip
    return {**target, **own}


def _prefix(method: str, sizes: Shape) -> str:
    return f"model.layers.{sizes.layers}." if method == "mtp" else ""


def save_head(head: Head, target_folder: Path, sizes: Shape, shape: HeadShape, folder: Path) -> None:
    """Write weights in bfloat16 and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target_folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(head_config(head.method, config, sizes, shape), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    prefix = _prefix(head.method, sizes)
    tensors = {}
    for name, weight in head.state_dict().items():
        dtype = torch.bfloat16 if weight.is_floating_point() else weight.dtype
        tensors[prefix + name] = weight.detach().to("cpu", dtype).contiguous()
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")


def load_head(folder: Path, target: Llama) -> tuple[Head, HeadShape]:
    """A head from its folder, on the target's device and in its precision."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] == ["MedusaModel"]:
        method, shape = "medusa", HeadShape(medusa_heads=config["medusa_num_heads"], medusa_layers=config["medusa_num_layers"])
    elif config["architectures"] == ["LlamaForCausalLMEagle3"]:
        taps = tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
        method, shape = "eagle3", HeadShape(
            eagle_intermediate=config["intermediate_size"], draft_vocabulary=config["draft_vocab_size"], taps=taps
        )  # fmt: skip
    else:
        method, shape = "mtp", HeadShape(mtp_intermediate=config["intermediate_size"])
    head = _CLASSES[method](target.shape, shape)
    prefix = _prefix(method, target.shape)
    tensors = load_file(folder / "model.safetensors")
    head.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    table = target.model.embed_tokens.weight
    return head.to(table.device, table.dtype).eval(), shape
