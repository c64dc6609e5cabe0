"""Train Brook's speculative heads on Brook's own answers, export them, and measure their acceptance.

    python examples/demo_model/train_heads.py plugins/demo_model/brook --seconds 150 --out /tmp/heads     # one GPU
    python examples/demo_model/train_heads.py plugins/demo_model/brook --seconds 1800 --row-tokens 2048 --sampled 200 --out /tmp/heads

Worker processes write conversations of the training split. Brook reads each up to one of its answers, and the answer
counts up to the first token that Brook would not have chosen: so far it is Brook's own greedy answer, without
decoding it. Beside these stand answers that Brook has sampled. Every head is to say what Brook would say: its loss
is the cross entropy against Brook's own probabilities. The chains (EAGLE-3 and MTP) are trained through several steps
on their own hidden states, as they are used (EAGLE-3's training-time test). Like ``train.py``, a run is bounded by time and its
rate follows the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import random
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism

import brook_chat as chat
import numpy as np
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
_TEMPERATURES: Final = (0.7, 1.0)
_SAMPLED_SHARE: Final = 0.25
# Prompts longer than this are not sampled from: the rows of a batch share one width.
_SAMPLED_PROMPT: Final = 800
# Examples are padded to one of these widths.
_WIDTHS: Final = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# A guess counts only where those before it were right, so later steps matter less.
_STEP_DECAY: Final = 0.8


# --- Brook's answers --------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A prompt with an answer."""

    tokens: array[int]
    prompt: int  # tokens of the prompt
    sampled: bool = False  # by Brook; otherwise the corpus's answer, of which a part may be Brook's


def write_examples(seed: int, tokenizer_file: str, examples: Any) -> None:
    """A worker: fill the queue with portions of the corpus until the process is ended."""
    corpus = Corpus(seed)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    while True:
        most = rng.choices([length for length, _ in _LENGTHS], [weight for _, weight in _LENGTHS])[0]
        drawn = [corpus.draw(most) for _ in range(max(4, 20_000 // most))]
        pieces = [chat.segments(one.messages, one.tools) for one in drawn]
        encoded = iter(tokenizer.encode_batch_fast([text for piece in pieces for text, _ in piece], add_special_tokens=False))
        portion = []
        for piece in pieces:
            ids = [next(encoded).ids for _ in piece]
            place = rng.choice([index for index, (_, written) in enumerate(piece) if written])
            prompt = sum(len(part) for part in ids[:place])
            tokens = array("H", [token for part in ids[: place + 1] for token in part])
            if len(tokens) <= _WIDTHS[-1]:
                portion.append(Example(tokens, prompt))
        examples.put(portion)


class Pool:
    """Examples for training: fresh ones while the workers keep up, earlier ones again where they do not."""

    def __init__(self, target: Llama, folder: Path, workers: int, seed: int) -> None:
        self.target = target
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.sampled: list[Example] = []
        self.fresh = self.repeated = 0
        self._kept: list[list[Example]] = []
        self._rng = random.Random(seed)
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self._queue = context.Queue(maxsize=64 * workers)
        file = str(folder / "tokenizer.json")
        self._workers = [
            context.Process(target=write_examples, args=(seed * 1000 + 500 + index, file, self._queue), daemon=True)
            for index in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        self._fresh: queue.Queue[list[Example]] = queue.Queue(maxsize=256)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        # Apart from the training: a portion that a worker has only half written must not hold it up.
        while True:
            try:
                portion = self._queue.get()
            except (EOFError, OSError):
                return
            self._fresh.put(portion)

    def portion(self) -> list[Example]:
        """Some examples of the corpus."""
        try:
            portion = self._fresh.get(timeout=None if len(self._kept) < 100 else 0.001)
        except queue.Empty:
            self.repeated += 1
            return self._rng.choice(self._kept)
        self.fresh += 1
        if len(self._kept) < 6000:
            self._kept.append(portion)
        else:
            self._kept[self._rng.randrange(6000)] = portion
        return portion

    def sample(self, count: int, temperature: float, batch_tokens: int) -> None:
        """Let Brook answer so many prompts."""
        prompts: list[list[int]] = []
        while len(prompts) < count:
            prompts += [one.tokens[: one.prompt].tolist() for one in self.portion() if one.prompt <= _SAMPLED_PROMPT]
        end = self.tokenizer.token_to_id(chat.END)
        said = answers(self.target, self.tokenizer, prompts, temperature, batch_tokens)
        for prompt, words in zip(prompts, said, strict=True):
            self.sampled.append(Example(array("H", [*prompt, *words, end]), len(prompt), sampled=True))

    def batches(self, row_tokens: int) -> Iterator[tuple[int, list[Example]]]:
        """Batches of examples of like width, without end."""
        waiting: dict[int, list[Example]] = {}
        while True:
            portion = self.portion()
            if self.sampled:
                portion = portion + self._rng.choices(self.sampled, k=round(len(portion) * _SAMPLED_SHARE / (1 - _SAMPLED_SHARE)))
            for example in portion:
                width = next(width for width in (*_WIDTHS, len(example.tokens)) if width >= len(example.tokens))
                group = waiting.setdefault(width, [])
                group.append(example)
                if len(group) * width >= row_tokens:
                    yield width, waiting.pop(width)

    def vocabulary(self, size: int) -> tuple[list[int], float]:
        """The most frequent tokens of the answers, and the share of the answers that they make up."""
        counts: Counter[int] = Counter()
        for example in itertools.chain(self.sampled, *(self.portion() for _ in range(400))):
            counts.update(example.tokens[example.prompt :])
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
    probabilities: Tensor  # (rows, roots + steps, vocabulary): Brook's, from one place after the first root on
    places: list[tuple[Tensor, Tensor]]  # for each step the rows and roots at which the text is Brook's and goes on


def lesson(target: Llama, width: int, group: list[Example], taps: tuple[int, ...], steps: int) -> Lesson:
    """Run Brook over a batch."""
    device = target.model.norm.weight.device
    block = np.zeros((len(group), width), np.int16)  # ids are below 2**15
    for row, one in enumerate(group):
        block[row, : len(one.tokens)] = one.tokens
    most = -(-max(len(one.tokens) - one.prompt for one in group) // 8) * 8  # kernels like multiples of eight
    facts = torch.tensor([(one.prompt - 1, len(one.tokens) - 1, one.sampled) for one in group])
    tokens, facts = torch.from_numpy(block).to(device, non_blocking=True).long(), facts.to(device, non_blocking=True)
    starts, ends, sampled = facts[:, :1], facts[:, 1:2], facts[:, 2:].bool()
    at_all = starts + torch.arange(most + steps + 1, device=device)
    seen = watch(target, tokens, taps)
    with torch.no_grad():
        wise = at(seen.last, at_all.clamp_max(width - 1))
        probabilities = F.linear(wise, target.model.embed_tokens.weight.to(wise.dtype)).float().softmax(-1)
        own = sampled | (probabilities.argmax(-1) == tokens.gather(1, (at_all + 1).clamp_max(width - 1)))
        valid = own.cumprod(1).bool()[:, :-1] & (at_all[:, 1:] < ends)
        places = [valid[:, step : step + most].nonzero(as_tuple=True) for step in range(steps)]
    return Lesson(tokens, seen, at_all[:, :most].clamp_max(width - 1), probabilities[:, 1:], places)


def head_loss(head: Head, target: Llama, one: Lesson, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The loss to learn from, and each step's share of guesses equal to Brook's first choice."""
    guesses = head.guess(target, one.tokens, one.seen, one.roots, steps)
    total = torch.zeros((), device=one.tokens.device)
    shares = []
    for step, (logits, (rows, roots)) in enumerate(zip(guesses, one.places, strict=False)):
        goal = one.probabilities[rows, roots + step]
        logs = logits[rows, roots].float().log_softmax(-1)
        known = torch.ones(len(rows), device=rows.device)
        if isinstance(head, Eagle3):  # what the small vocabulary cannot say teaches nothing
            known = head.t2d[goal.argmax(-1)].float()
            goal = goal[:, head.kept()]
            goal = goal / goal.sum(-1, keepdim=True)
        total = total - _STEP_DECAY**step * ((goal * logs).sum(-1) * known).sum() / max(1, len(rows))
        shares.append(((logs.argmax(-1) == goal.argmax(-1)) * known).sum() / max(1, len(rows)))
    return total, [share.detach() for share in shares]


# --- training ---------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """The whole run."""
    began = time.time()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape, and no two batches have the same
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = load_model(options.target, device, dtype).requires_grad_(False)
    shape = HeadShape(
        medusa_heads=options.medusa_heads, medusa_layers=options.medusa_layers, draft_vocabulary=options.draft_vocabulary, taps=tuple(options.taps),
        eagle_intermediate=options.eagle_intermediate, mtp_intermediate=options.mtp_intermediate,
    )  # fmt: skip
    workers = min(options.workers, os.cpu_count() or 1)
    pool = Pool(target, options.target, workers, options.seed)
    heads = {method: make_head(method, target.shape, shape).to(device) for method in options.methods}
    learners = {method: Learner(head, options.rate) for method, head in heads.items()}
    for method, head in heads.items():
        print(f"{method}: {sum(weight.numel() for weight in head.parameters()):,} parameters", flush=True)
    folders = {method: options.out / f"brook-{method}" for method in heads}
    for temperature in _TEMPERATURES:
        pool.sample(options.sampled // len(_TEMPERATURES), temperature, options.sampled_tokens)
        print(f"{time.time() - began:.1f}s {len(pool.sampled)} sampled answers", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if "eagle3" in heads:
        chosen, share = pool.vocabulary(shape.draft_vocabulary)
        heads["eagle3"].choose(target, torch.tensor(chosen, device=device))
        print(f"draft vocabulary: {share:.4%} of the answers' tokens", flush=True)

    started = saved = logged = time.time()
    step = tokens = 0
    source = pool.batches(options.row_tokens)
    while (progress := (time.time() - started) / max(1.0, began + options.seconds - started)) < 1.0:
        batch = next(source)
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
            print(
                f"{logged - began:6.1f}s step {step} {progress:.3f} {tokens / 1e6:.1f}M fresh {pool.fresh} repeated {pool.repeated}  {text}",
                flush=True,
            )
        if time.time() - saved > options.save_seconds:
            saved = time.time()
            for method, head in heads.items():
                save_head(head, options.target, target.shape, shape, folders[method])
    for method, head in heads.items():
        save_head(head, options.target, target.shape, shape, folders[method])
    pool.close()
    run = {"steps": step, "tokens": tokens, "sampled": len(pool.sampled), "fresh": pool.fresh, "repeated": pool.repeated, "seconds": round(time.time() - began), "device": device.type,
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
    parser.add_argument("--row-tokens", type=int, default=32_768, help="tokens of a batch, padding included")
    parser.add_argument("--sampled", type=int, default=6000, help="answers to sample")
    parser.add_argument("--sampled-tokens", type=int, default=3_000_000, help="tokens of one batch of them, padding included")
    parser.add_argument("--workers", type=int, default=12, help="processes that write prompts")
    sizes = HeadShape()
    parser.add_argument("--taps", type=int, nargs=3, default=sizes.taps, help="EAGLE-3's tapped layers: the streams that enter them")
    parser.add_argument("--draft-vocabulary", type=int, default=sizes.draft_vocabulary, help="EAGLE-3's vocabulary")
    parser.add_argument("--eagle-intermediate", type=int, default=sizes.eagle_intermediate, help="width of EAGLE-3's feed-forward")
    parser.add_argument("--mtp-intermediate", type=int, default=sizes.mtp_intermediate, help="width of MTP's feed-forward")
    parser.add_argument("--medusa-heads", type=int, default=sizes.medusa_heads)
    parser.add_argument("--medusa-layers", type=int, default=sizes.medusa_layers, help="residual blocks of a Medusa head")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--cases", type=int, default=60, help="held-out prompts of each task to measure (0: none)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-seconds", type=float, default=5)
    parser.add_argument("--save-seconds", type=float, default=30)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
