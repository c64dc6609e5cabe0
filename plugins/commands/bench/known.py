"""A model of a real shape whose next tokens are known: so that drafts can be measured where they are worth something, without a checkpoint.

What it is: `known_model` writes a Llama of 0.25 billion parameters. Its layers are computed like any others, but what they would add is 0 (output and down projections), and a row of
the head is the embedding of the token before it: each token of a circle is followed by the next one, for certain. An answer is therefore known before it is given, and
prompts can hold as much of it as a case is about (`prompts`). `known_drafter` writes a drafter for it, of any method that reads a folder, whose drafts are right but behind one token
in `1 / LIES`: chosen acceptance, real times.
What it does not know: how apt a drafter is on texts, how anything is measured (speculation.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.protocol.model_folder import demo_folder

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
DRAFT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Of the shape "small", as draft model: a thirteenth."""
FIRST, CIRCLE = 16, 8000
"""The tokens that follow one another: from FIRST on, so many."""
LIES = 0.2
METHODS = ("draft_model", "medusa", "eagle", "eagle3", "mtp")
HEADS = 4
"""Of Medusa."""
CASES = {
    "rewrites": "the prompt has the answer, but every 10th token is another one",
    "edits": "the same, every 40th",
    "misleads": "the prompt has each third pair of tokens of the answer, followed by others",
    "copies nothing": "the prompt has nothing of the answer",
}


def shape_of(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a shape."""
    return {**SHAPES[name], **changes}


def followers(shape: dict[str, Any]) -> np.ndarray[Any, Any]:
    """[V]: the token behind each."""
    count = min(CIRCLE, shape["vocab_size"] - FIRST)
    order = FIRST + np.random.default_rng(1).permutation(count)
    found = np.arange(shape["vocab_size"])
    found[order] = np.roll(order, -1)
    return found


def answer(shape: dict[str, Any], first: int, count: int) -> list[int]:
    """What follows a token."""
    following, found = followers(shape), []
    for _ in range(count):
        first = int(following[first])
        found.append(first)
    return found


def prompts(shape: dict[str, Any], case: str, rows: int, tokens: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, the `tokens` that follow it) for each of `rows` requests of a case."""
    rng = np.random.default_rng([seed, list(CASES).index(case)])
    found = []
    last = FIRST + min(CIRCLE, shape["vocab_size"] - FIRST)
    for _ in range(rows):
        noise = rng.integers(last, shape["vocab_size"], 4 * tokens + 64).tolist()
        start = int(rng.integers(FIRST, last))
        known = answer(shape, start, tokens)
        text = [start, *known]
        if case == "misleads":
            held = [token for at in range(0, tokens, 3) for token in (text[at], text[at + 1], *(noise.pop() for _ in range(4)))]
        elif case == "copies nothing":
            held = [noise.pop() for _ in range(tokens)]
        else:
            every = 10 if case == "rewrites" else 40
            held = [noise.pop() if at % every == every - 1 else token for at, token in enumerate(text)]
        found.append(([*held, *(noise.pop() for _ in range(16)), start], known))
    return found


def known_model(root: Path, shape: dict[str, Any], name: str = "known") -> str:
    """Its folder, with the demo model's tokenizer, which nobody needs."""
    import torch

    torch.manual_seed(1)
    embedding = torch.randn(shape["vocab_size"], shape["hidden_size"]).bfloat16()
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": _behind(shape, embedding), **_norm("model.norm", shape)}
    for layer in range(shape["num_hidden_layers"]):
        tensors |= _layer(f"model.layers.{layer}.", shape, shape["hidden_size"])
        tensors |= _norm(f"model.layers.{layer}.input_layernorm", shape)
    return _written(root / name, shape, tensors)


def known_drafter(root: Path, shape: dict[str, Any], method: str, lies: float = LIES) -> str:
    """A folder for --speculative-config's "model"."""
    import torch

    generator = torch.Generator().manual_seed(2)
    vocab, hidden = shape["vocab_size"], shape["hidden_size"]
    wrong = torch.rand(vocab, generator=generator) < lies
    """Behind these tokens it drafts others."""
    if method == "draft_model":
        its = {**shape, **DRAFT}
        embedding = torch.randn(vocab, its["hidden_size"], generator=generator).bfloat16()
        head = _behind(its, embedding)
        head[torch.from_numpy(followers(shape))[wrong]] = 0
        tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, **_norm("model.norm", its)}
        for layer in range(its["num_hidden_layers"]):
            tensors |= _layer(f"model.layers.{layer}.", its, its["hidden_size"])
            tensors |= _norm(f"model.layers.{layer}.input_layernorm", its)
        return _written(root / method, its, tensors)
    torch.manual_seed(1)
    known = torch.randn(vocab, hidden).bfloat16()  # as known_model has it
    spoiled = torch.where(wrong[:, None], torch.randn(vocab, hidden, generator=generator).bfloat16(), known)
    if method == "medusa":
        tensors, following = {}, torch.from_numpy(followers(shape))
        row = following
        for head in range(HEADS):
            before, row, own = row, following[row], torch.zeros(vocab, hidden, dtype=torch.bfloat16)
            own[row] = known
            own[row[wrong[before]]] = 0
            tensors |= {f"{head}.0.linear.weight": torch.zeros(hidden, hidden, dtype=torch.bfloat16), f"{head}.1.weight": own}
            tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden, dtype=torch.bfloat16)
        its = {"architectures": ["MedusaModel"], "model_type": "medusa", "medusa_num_heads": HEADS, "medusa_num_layers": 1}
        return _written(root / method, {**its, "hidden_size": hidden, "vocab_size": vocab}, tensors)
    its = {**shape, "num_hidden_layers": 1}
    half = torch.eye(hidden, dtype=torch.bfloat16)
    reads_embedding = torch.cat([half, torch.zeros_like(half)], 1)
    if method == "eagle":  # the state is the embedding of the token behind
        tensors = {**_layer("layers.0.", shape, hidden), "fc.weight": reads_embedding, "embed_tokens.weight": spoiled}
        return _written(root / method, {**its, "architectures": ["LlamaForCausalLMEagle"]}, tensors)
    if method == "mtp":
        at = f"model.layers.{shape['num_hidden_layers']}."
        tensors = {**_layer(at, shape, hidden), f"{at}eh_proj.weight": reads_embedding, f"{at}embed_tokens.weight": spoiled}
        for one in ("enorm", "hnorm", "input_layernorm", "shared_head.norm"):
            tensors |= _norm(f"{at}{one}", shape)
        return _written(root / method, {**its, "architectures": ["LlamaForCausalLMNextN"]}, tensors)
    return _written(root / method, *_eagle3(its, known, wrong))


def _eagle3(its: dict[str, Any], known: Any, wrong: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its layer's residual is a norm whose weights are 0. What remains is what attention gives, which sees at each position hardly more than that itself: queries and keys are
    the same projection of the token's embedding, and values, as many as KV heads have, tell it from others."""
    import torch

    hidden, heads, kv, dim = (its[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    at, group = "midlayer.", heads // kv
    small = FIRST + CIRCLE
    keys, values = (torch.randn(kv * dim, hidden, generator=torch.Generator().manual_seed(seed)) * hidden**-0.5 for seed in (3, 4))
    nothing = torch.zeros(kv * dim, hidden)
    queries = 4 * keys.view(kv, 1, dim, hidden).expand(kv, group, dim, hidden).reshape(heads * dim, hidden)
    tensors = _layer(at, its, 2 * hidden)
    both = (("q", queries, torch.zeros(heads * dim, hidden)), ("k", keys, nothing), ("v", values, nothing))
    tensors |= {f"{at}self_attn.{name}_proj.weight": torch.cat([one, other], 1).bfloat16() for name, one, other in both}
    out = torch.zeros(hidden, heads * dim)
    for group_of in range(kv):  # the first of each group
        out[group_of * dim : (group_of + 1) * dim, group_of * group * dim : group_of * group * dim + dim] = torch.eye(dim)
    tensors[f"{at}self_attn.o_proj.weight"] = out.bfloat16()
    head = torch.zeros(small, hidden)
    following = torch.from_numpy(followers(its))[:small]
    wide = known[:small].float()
    head[following, : kv * dim] = (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True))) @ values.T
    head[following[wrong[:small]]] = 0
    tensors |= {"lm_head.weight": head.bfloat16(), "fc.weight": torch.zeros(hidden, 3 * hidden, dtype=torch.bfloat16)}
    tensors |= {**_norm("norm", its), **_norm(f"{at}input_layernorm", its), "embed_tokens.weight": known}
    tensors[f"{at}hidden_norm.weight"] = torch.zeros(hidden, dtype=torch.bfloat16)
    tensors["d2t"] = torch.zeros(small, dtype=torch.int64)
    named = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": small, "norm_before_residual": True}
    return {**its, **named}, tensors


def _behind(shape: dict[str, Any], embedding: Any) -> Any:
    """A head whose row of a token is the embedding of the one before it."""
    import torch

    head = torch.zeros_like(embedding)
    head[torch.from_numpy(followers(shape))] = embedding
    return head


def _norm(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {f"{name}.weight": torch.ones(shape["hidden_size"], dtype=torch.bfloat16)}


def _layer(at: str, shape: dict[str, Any], reads: int) -> dict[str, Any]:
    """A layer that adds nothing."""
    import torch

    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    some = {"self_attn.q_proj": (q, reads), "self_attn.k_proj": (kv, reads), "self_attn.v_proj": (kv, reads)}
    some |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    nothing = {"self_attn.o_proj": (hidden, q), "mlp.down_proj": (hidden, inner)}
    tensors = {f"{at}{name}.weight": (torch.randn(size) * 0.02).bfloat16() for name, size in some.items()}
    tensors |= {f"{at}{name}.weight": torch.zeros(size, dtype=torch.bfloat16) for name, size in nothing.items()}
    return tensors | _norm(f"{at}post_attention_layernorm", shape)


def _written(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> str:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_bytes((Path(demo_folder()) / file).read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return str(folder)
