"""What each form of quantised weights costs a model: `python -m penstock.plugins.commands.bench.quality OUT_FOLDER [form ...] [--model FOLDER | --shape 1b|130m]`; a form is
"scheme/method", or "scheme/method/scheme of the output head".

What it is: for a folder the built-in texts, those of calibration and those of the report. Without one a Llama of random weights with what makes quantisation hard in trained ones (heavy tails, and inputs of very different sizes, through the norms), whose output head is made
larger until the wide model's distributions have the entropy that a language model's have; only the wide model is looked at for that. Then
each form's KL divergence from it, over texts of random tokens that calibration did not have, with intervals by resampling whole texts, and of the methods' differences from
rounding to the nearest by resampling the same texts of both. Results go to quality.json after each form.
What it does not know: what text is. A random model is not a trained one: its figures say whether the arithmetic is right and in what order the forms come, not what a
model of yours loses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMS = ("fp8/rtn", "w8a16/rtn", "w4a16/rtn", "w4a16/awq", "w4a16/gptq")
ENTROPY = 2.0
"""Nats a token of the wide model: about a perplexity of 7."""
TAIL, SPREAD = 6.0, 0.6
"""Degrees of freedom of Student's t, of which weights are drawn; standard deviation of the logarithm of a norm's factors."""
LONG = 128
RESAMPLES = 1000


class Shape(NamedTuple):
    """Of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 32000),
    "130m": Shape(768, 2048, 16, 12, 4, 16384),
    "tiny": Shape(128, 256, 2, 2, 1, 512),
}


def write(folder: Path, shape: Shape, seed: int, *, aligned: bool = False) -> int:
    """The model's folder; the number of its parameters. `aligned`: rows of the head are half those of the embedding table in another order, so that what follows a token
    stands in the hidden states as it does in a trained model's; otherwise every logit is a random projection of all errors."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden, width = shape.hidden, shape.hidden // shape.heads
    residual = (2 * shape.layers) ** -0.5  # of what is added to the residual stream, as GPT-2 begins

    def drawn(n: int, k: int, scale: float = 1.0) -> torch.Tensor:
        normal = torch.randn(n, k, generator=generator)
        squares = torch.zeros(n, k)
        for _ in range(int(TAIL)):
            squares += torch.randn(n, k, generator=generator).square_()
        weight: torch.Tensor = normal / (squares / TAIL).sqrt() * (scale * k**-0.5)
        return weight.bfloat16()

    def factors() -> torch.Tensor:
        return (torch.randn(hidden, generator=generator) * SPREAD).exp().bfloat16()

    tensors = {
        "model.embed_tokens.weight": torch.randn(shape.vocab, hidden, generator=generator).bfloat16(),
        "model.norm.weight": factors(),
    }
    head = drawn(shape.vocab, hidden)
    if aligned:
        order = torch.randperm(shape.vocab, generator=generator)
        head = (head.float() + tensors["model.embed_tokens.weight"][order].float() * hidden**-0.5).bfloat16()
    tensors["lm_head.weight"] = head
    for index in range(shape.layers):
        at = f"model.layers.{index}"
        kv = shape.kv_heads * width
        tensors |= {
            f"{at}.input_layernorm.weight": factors(),
            f"{at}.post_attention_layernorm.weight": factors(),
            f"{at}.self_attn.q_proj.weight": drawn(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": drawn(kv, hidden),
            f"{at}.self_attn.v_proj.weight": drawn(kv, hidden),
            f"{at}.self_attn.o_proj.weight": drawn(hidden, hidden, residual),
            f"{at}.mlp.gate_proj.weight": drawn(shape.inner, hidden),
            f"{at}.mlp.up_proj.weight": drawn(shape.inner, hidden),
            f"{at}.mlp.down_proj.weight": drawn(hidden, shape.inner, residual),
        }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": width,
        "vocab_size": shape.vocab, "max_position_embeddings": 2 * LONG, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def texts(count: int, vocab: int, seed: int) -> list[list[int]]:
    """Random tokens, as frequent as Zipf's law has it."""
    import numpy as np

    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab + 1)
    found: list[list[int]] = rng.choice(vocab, (count, LONG), p=weights / weights.sum()).tolist()
    return found


def sharpen(folder: Path, prompts: Sequence[Sequence[int]]) -> float:
    """Make the head larger until the entropy is ENTROPY: the factor."""
    import torch
    from safetensors.torch import load_file, save_file

    from penstock.plugins.commands.quant.comparing import Loaded

    model = Loaded(folder, longest=LONG)
    logits = torch.cat([model.logits(prompt)(0, LONG)[:: LONG // 16] for prompt in prompts]).double()
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        probabilities = torch.softmax(logits * middle, 1)
        entropy = float(-(probabilities * probabilities.clamp_min(1e-300).log()).sum(1).mean())
        low, high = (middle, high) if entropy > ENTROPY else (low, middle)
    del model
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() * low).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return low


def quantised(wide: Path, out: Path, form: str, calibration: Sequence[Sequence[int]]) -> None:
    """Write the folder of a form."""
    from penstock.plugins.commands.quant import calibrating, methods, writing

    word, method, head = [*form.split("/"), None][:3]
    assert word is not None
    assert method is not None
    plan = writing.plan(writing.open_source(wide), word, (), head)
    partial = writing.start(plan, out, {"method": method})
    if method == "rtn":
        writing.write(plan, partial, writing.nearest(plan))
    else:
        calibrating.calibrate(
            plan, partial, methods.METHODS[method](word), calibration, lambda done, count, what: None, max(map(len, calibration))
        )
    writing.finish(plan, partial, out)


def difference(ours: Sequence[Any], other: Sequence[Any], seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean KL, ours less the other's, over the same texts."""
    import numpy as np

    sums = np.array([[a.kl.sum() - b.kl.sum(), len(a.kl)] for a, b in zip(ours, other, strict=True)])
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn, 0].sum(1) / sums[drawn, 1].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs and prints."""
    from penstock.plugins.commands.quant import comparing

    parser = argparse.ArgumentParser(description="What quantised forms cost a random model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("forms", nargs="*", default=FORMS)
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a wide folder with a tokenizer.json, in place of a random model")
    parser.add_argument(
        "--aligned", action="store_true", help="of a random model: a head that reads what follows a token from its embedding"
    )
    parser.add_argument("--keep", action="store_true", help="leave the quantised folders")
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {"forms": {}}
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.model is None:
        shape, wide = SHAPES[asked.shape], asked.out / "wide"
        found |= {
            "shape": asked.shape,
            "parameters": write(wide, shape, asked.seed, aligned=asked.aligned),
            "aligned": asked.aligned,
            "entropy": ENTROPY,
        }
        found["head_factor"] = sharpen(wide, texts(4, shape.vocab, asked.seed + 1))
        report, calibration = (texts(count, shape.vocab, asked.seed + 2 + k) for k, count in enumerate((asked.texts, asked.calibration)))
    else:
        wide = asked.model
        report, calibration = built_in(wide)
    longest = max(map(len, report))
    full = comparing.Loaded(wide, longest=longest)
    kept: dict[str, list[Any]] = {}
    for form in asked.forms:
        begun = time.perf_counter()
        out = asked.out / form.replace("/", "-")
        quantised(wide, out, form, calibration)
        ours = comparing.Loaded(out, longest=longest, against=wide)
        prompts = comparing.compare(ours, full, [json.dumps(text) for text in report], json.loads)
        summary = comparing.summary(prompts)
        del ours
        if not asked.keep:
            shutil.rmtree(out)
        kept[form] = prompts
        plain = kept.get(f"{form.partition('/')[0]}/rtn")
        one = {**summary._asdict(), "seconds": round(time.perf_counter() - begun, 1)}
        if plain is not None and plain is not prompts:
            one["kl_less_rtn"] = difference(prompts, plain)
        found["forms"][form] = one
        (asked.out / "quality.json").write_text(json.dumps(found, indent=1))
        print(form, json.dumps(one), flush=True)
    if asked.model is None:
        shutil.rmtree(wide)
    return found


def built_in(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the report's texts, and of those of calibration, as `penstock quant` takes them."""
    from tokenizers import Tokenizer

    from penstock.plugins.commands.quant import command, comparing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (comparing.texts_of(Path(command.__file__).with_name(name)) for name in (command.REPORTED, command.CALIBRATION))
    report, calibration = ([list(tokenizer.encode(text).ids)[:512] for text in some] for some in texts)
    return report, calibration


if __name__ == "__main__":
    main()
