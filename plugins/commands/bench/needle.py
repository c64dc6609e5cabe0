"""Needles in a long context, with each kind of KV cache: `python -m penstock.plugins.commands.bench.needle OUT_FOLDER [--device cuda] [--lengths N ...] [--kinds WORD ...]`.

What it is: a Llama of two layers whose weights are made, not trained, so that it answers one question: after "... key value ... key value ... question" comes the value that stood
behind the question's key. Its first layer writes beside each token which token stands before it (a head that looks one place back, by the fast pairs of rotary positions); its
second looks, by the slow ones, for the place whose predecessor resembles the question's key, and copies the token there. Keys are random directions that resemble each other by
chance, so that all places draw a little attention; how sharp a question is (SHARPNESS) is set for each length so that with a cache of 16 bits some 95 in 100 needles are found, at about one
percent of the attention: a cache that loses digits over a long context finds fewer. With `--twins 3` each needle has three keys that resemble it closely: a cache that rounds keys too coarsely
takes one for the other. Keys have channels of ten times the others' size, as those of trained models do.
Each context is computed once, by the first question; the others find it in the prefix cache. The engine is the one that serves, from prompt to token.
What it does not know: what a model of yours does with its keys. Attention that is sharper than this is easier.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from penstock.plugins.commands.bench.cuda_bench import folder_of

KINDS = ("auto", "fp8_e4m3", "fp8_e5m2", "int8")
LENGTHS = (4096, 32768, 131072)
BLOCK = 16
THETA = 1e12
"""Base of the rotary positions: the slower half of the pairs turns by at most a seventh of a radian over 131,072 tokens, and is left to the content."""
OUTLIER, OUTLIERS = 10.0, 2
"""Times the usual size of a key's element, in so many channels that no question looks at."""
BACK = 12.0
"""How much the first layer's head prefers the place before in each of its pairs: a tenth of a percent of its attention goes elsewhere."""
SHARPEST = 24.0
"""Mean score of a needle for a question of full strength. A question's own strength is a share of it, and stands in its embedding."""
SHARPNESS = {4096: 3.85, 32768: 5.75, 131072: 7.3}
"""By length: chosen by a cache of 16 bits alone. Those of lengths between lie between."""
LIKE, TWIN_SHARPNESS = 0.955, 16.0
"""Cosine between a needle's key and its twins; with them questions are so sharp that other keys hardly count, and some 95 in 100 needles are found at any length."""
RESAMPLES = 2000


class Shape(NamedTuple):
    """Of the model: dimensions of a token's content, a quarter of the hidden size; and heads."""

    content: int = 256
    heads: int = 8
    kv_heads: int = 4
    dim: int = 128


class Case(NamedTuple):
    """A context of `length` tokens, and the questions about it."""

    context: list[int]
    questions: list[int]
    answers: list[int]


class Plan(NamedTuple):
    """What the tokens are: keys of needles, other keys, values, then questions of each length."""

    needles: int
    others: int
    values: int
    sharpness: dict[int, float]
    """By length."""
    twins: int = 0
    """Of the other keys, so many for each needle's resemble it (LIKE), and stand in the context once each."""

    @property
    def vocab(self) -> int:
        """Of the model."""
        return self.needles * (1 + len(self.sharpness)) + self.others + self.values


def sharpness(length: int) -> float:
    """So sharp that of the needles in a context of this length some 95 in 100 are found (of Shape(), among 8,192 keys and 2,048 values)."""
    return float(np.interp(math.log2(length), [math.log2(one) for one in SHARPNESS], list(SHARPNESS.values())))


def write(root: Path, shape: Shape, plan: Plan, seed: int) -> Path:
    """The model's folder."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    def units(count: int, size: int) -> torch.Tensor:
        return torch.nn.functional.normalize(drawn(count, size), dim=1)

    def projection(rows: int, columns: int) -> torch.Tensor:
        """With orthonormal rows."""
        rows_of: torch.Tensor = torch.linalg.qr(drawn(columns, rows))[0].T
        return rows_of

    c, dim, half = shape.content, shape.dim, shape.dim // 2
    hidden, group = 4 * c, shape.heads // shape.kv_heads
    before, answer, constant, rest = c, 2 * c, 3 * c, 3 * c + 1  # where in the residual stream; the content stands first
    tokens = plan.needles + plan.others + plan.values
    content = units(tokens, c)
    twins = content[plan.needles : plan.needles * (1 + plan.twins)]
    twins.copy_(torch.nn.functional.normalize(LIKE * content[: plan.needles].repeat(plan.twins, 1) + (1 - LIKE**2) ** 0.5 * twins, dim=1))
    strengths = torch.tensor([[strength / SHARPEST] for strength in plan.sharpness.values()])
    asked = (strengths[:, None] * content[: plan.needles]).flatten(0, 1)
    embedding = torch.zeros(plan.vocab, hidden)
    embedding[:, :c] = torch.cat((content, asked))
    embedding[:, constant] = 1
    filled = (2 - embedding[:, :c].square().sum(1)).sqrt()  # all embeddings have one norm, so that norms divide all by the same
    embedding[:, rest:] = units(plan.vocab, hidden - rest) * filled[:, None]
    first, second = (hidden / 3) ** 0.5, (hidden / 4) ** 0.5
    """What the norms before the two layers' attention multiply by."""

    # The first layer: a query that is its key turned one place back, for as many fast pairs as fit; values are the content, shared out among the heads.
    pairs = min(half // 4, 16)
    turn = THETA ** -(torch.arange(pairs) / half)
    size = (BACK * dim**0.5) ** 0.5 / first
    looks, keys, values = torch.zeros(dim, hidden), torch.zeros(dim, hidden), torch.zeros(shape.kv_heads * dim, hidden)
    keys[:pairs, constant] = size
    looks[:pairs, constant], looks[half : half + pairs, constant] = size * turn.cos(), -size * turn.sin()
    share = c // shape.kv_heads
    out = torch.zeros(hidden, shape.heads * dim)
    for head in range(shape.heads):
        kv, at = head // group, torch.arange(share)
        values[kv * dim + at, kv * share + at] = 1 / first
        out[before + kv * share + at, head * dim + at] = 1 / group

    # The second layer: each KV head has a projection of its own of what stands before; its queries look at three quarters of it each.
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(dim - half // 2, dim)))
    usual = (c / second**2) ** 0.5  # makes a key's elements of the size 1
    queries2, keys2 = torch.zeros(shape.heads * dim, hidden), torch.zeros(shape.kv_heads * dim, hidden)
    values2, out2 = torch.zeros(shape.kv_heads * dim, hidden), torch.zeros(hidden, shape.heads * dim)
    for kv in range(shape.kv_heads):
        content_of, copied = projection(len(slow), c) * usual, projection(min(dim, c), c)
        keys2[kv * dim + slow, before : before + c] = content_of
        keys2[kv * dim + pairs : kv * dim + pairs + OUTLIERS, constant] = OUTLIER / second
        values2[kv * dim : kv * dim + len(copied), :c] = copied / second
        for place in range(group):
            head, seen = kv * group + place, len(slow) * 3 // 4
            part = slice(0, seen) if place % 2 == 0 else slice(len(slow) - seen, len(slow))
            queries2[head * dim + slow[part], :c] = content_of[part] * (SHARPEST * dim**0.5 / seen)
            out2[answer : answer + c, head * dim : head * dim + len(copied)] = copied.T
    head_rows = torch.zeros(plan.vocab, hidden)
    head_rows[:tokens, answer : answer + c] = content
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden), "lm_head.weight": head_rows}
    layers = ((looks.repeat(shape.heads, 1), keys.repeat(shape.kv_heads, 1), values, out), (queries2, keys2, values2, out2))
    for index, weights in enumerate(layers):
        layer = f"model.layers.{index}"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": weight for name, weight in zip("qkvo", weights, strict=True)}
        tensors |= {f"{layer}.{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": torch.zeros(c, hidden) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = torch.zeros(hidden, c)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": c, "num_hidden_layers": 2,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": dim, "vocab_size": plan.vocab, "rope_theta": THETA,
        "max_position_embeddings": max(plan.sharpness) + BLOCK, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    folder = Path(folder_of(config, root, "needle"))
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def case(plan: Plan, length: int, seed: int) -> Case:
    """Pairs of a key and a value, as many needles as have room spread evenly at random among others."""
    rng = np.random.default_rng((seed, length))
    pairs = length // 2
    count = min(plan.needles, pairs // (2 + plan.twins))
    keys = plan.needles * (1 + plan.twins) + rng.integers(0, plan.others - plan.needles * plan.twins, pairs)
    values = plan.needles + plan.others + rng.integers(0, plan.values, pairs)
    edges = np.linspace(0, pairs, count + 1).astype(int)
    places = rng.integers(edges[:-1], edges[1:])
    order = rng.permutation(count)
    keys[places] = order
    twins = (plan.needles * np.arange(1, plan.twins + 1)[:, None] + order).ravel()
    keys[rng.permutation(np.setdiff1d(np.arange(pairs), places))[: len(twins)]] = twins
    first = plan.vocab - plan.needles * (len(plan.sharpness) - list(plan.sharpness).index(length))
    return Case(np.stack((keys, values), 1).ravel().tolist(), (first + order).tolist(), values[places].tolist())


def ask(folder: Path, cases: Sequence[Case], kind: str, device: str, at_once: int) -> list[list[bool]]:
    """Of each case, for each needle from the context's beginning to its end whether its value is the likeliest token."""
    from penstock.core.llm import LLM
    from penstock.core.protocol.sampling import SamplingParams

    longest = max(len(one.context) for one in cases)
    blocks = -(-longest // BLOCK) + 2 * at_once
    greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    found = []
    with LLM(
        str(folder), device=device, kv_cache_dtype=kind, max_model_len=longest + BLOCK, num_gpu_blocks_override=blocks, max_num_seqs=at_once,
        max_num_batched_tokens=max(8192, at_once) if device == "cuda" else 2048, enable_prefix_caching=True, block_size=BLOCK,
    ) as llm:  # fmt: skip
        for one in cases:
            said = []
            edges = [0, *range(1, len(one.questions), at_once), len(one.questions)]  # the first computes the context
            for start, end in itertools.pairwise(edges):
                prompts = [[*one.context, question] for question in one.questions[start:end]]
                answers = llm.generate(prompt_token_ids=prompts, sampling_params=greedy)
                said += [answer.outputs[0].token_ids[0] for answer in answers]
            found.append([token == wanted for token, wanted in zip(said, one.answers, strict=True)])
    return found


def interval(ours: Sequence[bool], other: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference of the shares, ours less the other's, by resampling needles."""
    differences = np.array(ours, dtype=np.float64) - np.array(other, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def summary(found: dict[str, list[list[bool]]], lengths: Sequence[int]) -> dict[str, Any]:
    """By length and kind; the first kind is what others are compared with."""
    base = next(iter(found))
    out: dict[str, Any] = {}
    for index, length in enumerate(lengths):
        out[str(length)] = rows = {}
        for kind, all_of in found.items():
            one, other = all_of[index], found[base][index]
            rows[kind] = {"found": sum(one), "of": len(one), "by_thirds": [sum(part) for part in _thirds(one)]}
            if kind != base:
                lost = sum(b and not a for a, b in zip(one, other, strict=True))
                rows[kind] |= {"lost": lost, "won": sum(one) - sum(other) + lost, "difference": interval(one, other)}
    return out


def _thirds(found: Sequence[bool]) -> list[Sequence[bool]]:
    edges = [len(found) * third // 3 for third in range(4)]
    return [found[start:end] for start, end in itertools.pairwise(edges)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description="Needles in a long context, with each kind of KV cache.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a context, multiples of 16")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="words of --kv-cache-dtype; the others are compared with the first")
    parser.add_argument("--needles", type=int, default=500, help="at most so many in a context")
    parser.add_argument("--twins", type=int, default=0, help="keys that resemble each needle's, which questions must tell from it")
    parser.add_argument("--sharpness", type=float, help="of every question, in place of what its length calls for")
    parser.add_argument("--at-once", type=int, default=32, help="questions that are asked together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--side-by-side", action="store_true", help="all kinds at once: nothing is timed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    sharp = {length: asked.sharpness or (TWIN_SHARPNESS if asked.twins else sharpness(length)) for length in asked.lengths}
    plan = Plan(asked.needles, 8192, 2048, sharp, asked.twins)
    if asked.one:
        with tempfile.TemporaryDirectory() as root:
            folder = write(Path(root), Shape(), plan, asked.seed)
            found = ask(folder, [case(plan, length, asked.seed) for length in asked.lengths], asked.one, asked.device, asked.at_once)
        (asked.out / f"needle-{asked.one}.json").write_text(json.dumps(found))
        return {}
    running = []
    for kind in asked.kinds:  # a process each: what one leaves on the device must not bind the next
        given = sys.argv[1:] if arguments is None else list(arguments)
        one = subprocess.Popen([sys.executable, "-m", "penstock.plugins.commands.bench.needle", *given, "--one", kind])
        running.append(one)
        if not asked.side_by_side:
            one.wait()
    for one in running:
        one.wait()
    files = {kind: asked.out / f"needle-{kind}.json" for kind in asked.kinds}
    kept = {kind: json.loads(file.read_text()) for kind, file in files.items() if file.exists()}
    result = {
        "device": _device(asked.device),
        "sharpness": plan.sharpness,
        "twins": asked.twins,
        "lengths": summary(kept, asked.lengths) if kept else {},
    }
    (asked.out / "needle.json").write_text(json.dumps(result, indent=1))
    for length, rows in result["lengths"].items():
        for kind, row in rows.items():
            print(length, kind, json.dumps(row), flush=True)
    return result


def _device(name: str) -> str:
    import torch

    return torch.cuda.get_device_name() if name == "cuda" else name


if __name__ == "__main__":
    main()
