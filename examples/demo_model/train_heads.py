"""Train Brook's speculative heads on Brook's own answers, export them, and measure their acceptance.

    python examples/demo_model/train_heads.py plugins/demo_model/brook --seconds 150 --out /tmp/heads     # one GPU
    python examples/demo_model/train_heads.py plugins/demo_model/brook --seconds 1800 --row-tokens 2048 --out /tmp/heads

Worker processes write prompts from the training split; in rounds Brook answers some, greedily or sampled, and the
heads learn from all answers so far. Every head is to say what Brook would say: its loss is the cross entropy against
Brook's own probabilities. The chains (EAGLE-3 and MTP) are trained through several steps on their own hidden states, as they
are used (EAGLE-3's training-time test). Like ``train.py``, a run is bounded by time and its rate follows the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism

import brook_chat as chat
import torch
import torch.nn.functional as F
from brook_corpus import Corpus
from brook_heads import METHODS, Eagle3, Head, HeadShape, Seen, at, load_head, make_head, save_head, watch
from brook_model import Llama, load_model
from brook_optimiser import Learner, rate_scale
from evaluate import answers
from evaluate_heads import measure_heads
from tokenizers import Tokenizer
from torch import Tensor

# Most tokens of a conversation, and how often: long ones teach little per token, but heads must bear them.
_LENGTHS: Final = ((400, 12), (1000, 4), (2000, 2), (3700, 1))
_TEMPERATURES: Final = (0.0, 0.0, 0.7, 1.0)
# Examples are padded to one of these widths.
_WIDTHS: Final = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# A guess counts only where those before it were right, so later steps matter less.
_STEP_DECAY: Final = 0.8


# --- Brook's answers --------------------------------------------------------------------------------------------


def write_prompts(seed: int, tokenizer_file: str, portion: int, prompts: Any) -> None:
    """A worker: fill the queue with portions of prompts until the process is ended."""
    corpus = Corpus(seed)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    while True:
        most = rng.choices([length for length, _ in _LENGTHS], [weight for _, weight in _LENGTHS])[0]
        texts = []
        for _ in range(max(4, portion * 400 // most)):
            one = corpus.draw(most)
            place = rng.choice([index for index, message in enumerate(one.messages) if message["role"] == "assistant"])
            texts.append(chat.render(one.messages[:place], one.tools, add_generation_prompt=True))
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        prompts.put([one for one in ids if len(one) < 3700])


@dataclass
class Example:
    """A prompt with Brook's answer."""

    tokens: list[int]
    prompt: int  # tokens of the prompt


class Pool:
    """All answers so far, and batches of them."""

    def __init__(self, target: Llama, folder: Path, workers: int, portion: int, seed: int) -> None:
        self.target = target
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.examples: list[Example] = []
        self._rng = random.Random(seed)
        self._rounds = 0
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self._queue = context.Queue(maxsize=16 * workers)
        file = str(folder / "tokenizer.json")
        self._workers = [
            context.Process(target=write_prompts, args=(seed * 1000 + 500 + index, file, portion, self._queue), daemon=True)
            for index in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def grow(self, count: int) -> None:
        """Let Brook answer at least ``count`` more prompts."""
        prompts: list[list[int]] = []
        while len(prompts) < count:
            prompts += self._queue.get()
        temperature = _TEMPERATURES[self._rounds % len(_TEMPERATURES)]
        self._rounds += 1
        end = self.tokenizer.token_to_id(chat.END)
        said = answers(self.target, self.tokenizer, prompts, temperature)
        self.examples += [Example([*prompt, *words, end], len(prompt)) for prompt, words in zip(prompts, said, strict=True) if words]

    def batches(self, row_tokens: int) -> Any:
        """All examples once, in random order, those of one width together."""
        waiting: dict[int, list[Example]] = {}
        self._rng.shuffle(self.examples)
        for example in list(self.examples):
            width = next(width for width in (*_WIDTHS, len(example.tokens)) if width >= len(example.tokens))
            group = waiting.setdefault(width, [])
            group.append(example)
            if len(group) * width >= row_tokens:
                yield width, group
                waiting[width] = []

    def vocabulary(self, size: int) -> tuple[list[int], float]:
        """The most frequent tokens of the answers, and the share of the answers that they make up."""
        counts = Counter(token for example in self.examples for token in example.tokens[example.prompt :])
        best = counts.most_common(size)
        chosen = [token for token, _ in best]
        spare = (token for token in range(self.target.shape.vocabulary) if token not in counts)
        while len(chosen) < size:
            chosen.append(next(spare))
        return chosen, sum(count for _, count in best) / max(1, counts.total())

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.terminate()


# --- losses -----------------------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """A batch on the device, with what Brook says to it."""

    tokens: Tensor
    seen: Seen
    roots: Tensor  # (rows, roots): from the last token of the prompt on
    probabilities: Tensor  # (rows, roots + steps, vocabulary): Brook's, at the places from one after the first root on
    ends: Tensor  # (rows,): the place of each row's last token


def lesson(target: Llama, width: int, group: list[Example], taps: tuple[int, ...], steps: int) -> Lesson:
    """Run Brook over a batch."""
    device = target.model.norm.weight.device
    tokens = torch.tensor([one.tokens + [0] * (width - len(one.tokens)) for one in group])
    most = -(-max(len(one.tokens) - one.prompt for one in group) // 8) * 8  # kernels like multiples of eight
    starts = torch.tensor([one.prompt - 1 for one in group])
    ends = torch.tensor([len(one.tokens) - 1 for one in group])
    tokens, starts, ends = (part.to(device, non_blocking=True) for part in (tokens, starts, ends))
    places = starts[:, None] + torch.arange(most + steps, device=device)
    seen = watch(target, tokens, taps)
    with torch.no_grad():
        wise = at(seen.last, (places + 1).clamp_max(width - 1))
        probabilities = F.linear(wise, target.model.embed_tokens.weight.to(wise.dtype)).float().softmax(-1)
    return Lesson(tokens, seen, places[:, :most].clamp_max(width - 1), probabilities, ends)


def head_loss(head: Head, target: Llama, one: Lesson, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The loss to learn from, and each step's share of guesses equal to Brook's first choice."""
    guesses = head.guess(target, one.tokens, one.seen, one.roots, steps)
    total = torch.zeros((), device=one.tokens.device)
    shares = []
    for step, logits in enumerate(guesses):
        goal = one.probabilities[:, step : step + one.roots.shape[1]]
        best = goal.argmax(-1)
        valid = one.roots + 2 + step <= one.ends[:, None]
        known = valid
        if isinstance(head, Eagle3):
            known = valid & head.t2d[best]
            kept = head.kept()
            picked = goal[known][:, kept]
            goal, best = picked / picked.sum(-1, keepdim=True), picked.argmax(-1)
        else:
            goal, best = goal[known], best[known]
        logs = logits[known].float().log_softmax(-1)
        count = valid.sum().clamp_min(1)
        total = total - _STEP_DECAY**step * (goal * logs).sum() / count
        shares.append((logs.argmax(-1) == best).sum() / count)
    return total, [share.detach() for share in shares]


# --- training ---------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """The whole run."""
    began = time.time()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = load_model(options.target, device, dtype).requires_grad_(False)
    shape = HeadShape(
        medusa_layers=options.medusa_layers, draft_vocabulary=options.draft_vocabulary, taps=tuple(options.taps),
        eagle_intermediate=options.eagle_intermediate, mtp_intermediate=options.mtp_intermediate,
    )  # fmt: skip
    workers = min(options.workers, os.cpu_count() or 1)
    pool = Pool(target, options.target, workers, options.portion, options.seed)
    heads = {method: make_head(method, target.shape, shape).to(device) for method in options.methods}
    learners = {method: Learner(head, options.rate) for method, head in heads.items()}
    for method, head in heads.items():
        print(f"{method}: {sum(weight.numel() for weight in head.parameters()):,} parameters", flush=True)
    folders = {method: options.out / f"brook-{method}" for method in heads}
    pool.grow(options.round_prompts)
    print(f"{time.time() - began:.1f}s first {len(pool.examples)} answers", flush=True)
    pool.grow(options.round_prompts)
    if "eagle3" in heads:
        chosen, share = pool.vocabulary(shape.draft_vocabulary)
        heads["eagle3"].choose(target, torch.tensor(chosen, device=device))
        print(f"draft vocabulary: {share:.4%} of the answers' tokens", flush=True)

    started = saved = logged = grown = time.time()
    step = tokens = 0
    source = pool.batches(options.row_tokens)
    while (progress := (time.time() - started) / max(1.0, began + options.seconds - started)) < 1.0:
        if progress < 0.85 and time.time() - grown > options.round_seconds:
            pool.grow(options.round_prompts)
            source, grown = pool.batches(options.row_tokens), time.time()
        batch = next(source, None)
        if batch is None:
            source = pool.batches(options.row_tokens)
            continue
        one = lesson(target, *batch, shape.taps, options.steps)
        seen = {}
        for method, head in heads.items():
            loss, shares = head_loss(head, target, one, options.steps)
            loss.backward()
            learners[method].step(rate_scale(progress))
            seen[method] = (loss, shares)
        step += 1
        tokens += one.tokens.numel()
        if step <= 2 or time.time() - logged > options.log_seconds:
            logged = time.time()
            text = "  ".join(
                f"{method} {loss.item():.3f} [{' '.join(f'{share.item():.3f}' for share in shares)}]"
                for method, (loss, shares) in seen.items()
            )
            print(f"{logged - began:6.1f}s step {step} {progress:.3f} {len(pool.examples)} answers {tokens / 1e6:.1f}M  {text}", flush=True)
        if time.time() - saved > options.save_seconds:
            saved = time.time()
            for method, head in heads.items():
                save_head(head, options.target, target.shape, shape, folders[method])
    pool.close()
    for method, head in heads.items():
        save_head(head, options.target, target.shape, shape, folders[method])
    run = {"steps": step, "tokens": tokens, "answers": len(pool.examples), "seconds": round(time.time() - began), "device": device.type,
           "seed": options.seed}  # fmt: skip
    (options.out / "heads.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    print(run, flush=True)
    if options.cases:
        loaded: dict[str, Any] = {folder.name: load_head(folder, target) for folder in folders.values()}
        results = measure_heads(target, pool.tokenizer, loaded, count=options.cases, lengths=(3, 4))
        (options.out / "acceptance.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"done after {time.time() - began:.0f}s", flush=True)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description="Train Brook's Medusa, EAGLE-3 and MTP heads on Brook's own answers.")
    parser.add_argument("target", type=Path, help="Brook's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for brook-medusa/, brook-eagle3/ and brook-mtp/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=150, help="length of the training, its start included")
    parser.add_argument("--steps", type=int, default=5, help="steps of a chain to train")
    parser.add_argument("--row-tokens", type=int, default=16_384, help="tokens of a batch, padding included")
    parser.add_argument("--round-prompts", type=int, default=3000, help="prompts that Brook answers in each round")
    parser.add_argument("--round-seconds", type=float, default=8, help="seconds between rounds")
    parser.add_argument("--portion", type=int, default=64, help="short prompts in a worker's portion")
    parser.add_argument("--workers", type=int, default=12, help="processes that write prompts")
    sizes = HeadShape()
    parser.add_argument("--taps", type=int, nargs=3, default=sizes.taps, help="EAGLE-3's tapped layers: the streams that enter them")
    parser.add_argument("--draft-vocabulary", type=int, default=sizes.draft_vocabulary, help="EAGLE-3's vocabulary")
    parser.add_argument("--eagle-intermediate", type=int, default=sizes.eagle_intermediate, help="width of EAGLE-3's feed-forward")
    parser.add_argument("--mtp-intermediate", type=int, default=sizes.mtp_intermediate, help="width of MTP's feed-forward")
    parser.add_argument("--medusa-layers", type=int, default=sizes.medusa_layers, help="residual blocks of a Medusa head")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--cases", type=int, default=60, help="held-out prompts of each task to measure (0: none)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-seconds", type=float, default=5)
    parser.add_argument("--save-seconds", type=float, default=30)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
