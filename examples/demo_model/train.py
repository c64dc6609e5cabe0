"""Train Brook and its draft from nothing on the synthetic corpus, export both, and measure them.

    python examples/demo_model/train.py --preset brook --seconds 480 --out /tmp/brook    # one GPU
    python examples/demo_model/train.py --preset cpu --seconds 600 --out /tmp/brook-tiny  # any computer

Worker processes write conversations while the model trains; the run is bounded by time, not by steps, and the
learning rate follows the clock. Matrices learn by orthogonalised momentum (Muon), the rest by AdamW. The draft
learns on the same rows, from the corpus and from the target's own probabilities.

Checkpoints are safetensors only. Optimiser state is not kept: resuming starts from the weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism

import brook_chat as chat
import brook_model
import numpy as np
import torch
import torch.nn.functional as F
from brook_corpus import Corpus
from brook_model import SHAPES, Llama, config_of, load_model, packing, save_weights
from brook_optimiser import Learner, rate_scale
from brook_tokenizer import save_tokenizer, train_tokenizer
from evaluate import measure
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

# Share of the time at which conversations may grow to this many tokens: copying is learned on short ones first.
CURRICULUM: Final = ((0.0, 400), (0.12, 1000), (0.26, 2000), (0.42, 3900))
# Text that the assistant did not write is worth little, but it holds the practice in repeating what came before.
_PROMPT_WEIGHT: Final = 0.1
_ANSWER, _PROMPT, _NOTHING = 2, 1, 0


@dataclass(frozen=True)
class Preset:
    """What to train, and in what portions."""

    target: str
    draft: str
    row_tokens: int
    workers: int


PRESETS: Final = {
    "brook": Preset("brook", "draft", 65_536, 11),
    "cpu": Preset("cpu", "cpu-draft", 2_048, 1),
}


# --- rows -----------------------------------------------------------------------------------------------------

Row = tuple[bytes, bytes, bytes, bytes, int]


def pack_row(corpus: Corpus, tokenizer: Tokenizer, size: int, most: int, left_over: list[tuple[list[int], list[int]]]) -> Row:
    """One packed row: token ids, what each next token is worth, where conversations begin, positions, the longest."""
    ids = np.zeros(size, np.uint16)
    worth = np.zeros(size, np.uint8)
    positions = np.zeros(size, np.uint16)
    starts = [0]
    at = 0
    while at < size:
        if not left_over:
            drawn = [corpus.draw(most) for _ in range(48)]
            pieces = [chat.segments(one.messages, one.tools) for one in drawn]
            encoded = iter(tokenizer.encode_batch_fast([text for piece in pieces for text, _ in piece], add_special_tokens=False))
            for piece in pieces:
                tokens: list[int] = []
                marks: list[int] = []
                for _, written in piece:
                    new = next(encoded).ids
                    tokens += new
                    marks += [_ANSWER if written else _PROMPT] * len(new)
                if len(tokens) <= 4096:
                    left_over.append((tokens, marks))
        tokens, marks = left_over.pop()
        end = min(size, at + len(tokens))
        count = end - at
        ids[at:end] = tokens[:count]
        worth[at : end - 1] = marks[1:count]  # each place is judged by the token after it
        positions[at:end] = np.arange(count)
        starts.append(end)
        at = end
    lengths = np.diff(starts)
    return ids.tobytes(), worth.tobytes(), np.array(starts, np.int32).tobytes(), positions.tobytes(), int(lengths.max())


def write_rows(seed: int, tokenizer_file: str, size: int, stage: Any, rows: Any) -> None:
    """A worker: fill the queue with rows until the process is ended."""
    corpus = Corpus(seed)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    left_over: list[tuple[list[int], list[int]]] = []
    while True:
        rows.put(pack_row(corpus, tokenizer, size, CURRICULUM[stage.value][1], left_over))


class Feed:
    """Rows for training: fresh ones while the workers keep up, earlier ones again where they do not."""

    def __init__(self, tokenizer_file: Path, size: int, workers: int, seed: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self._stage = context.Value("i", 0)
        self._queue = context.Queue(maxsize=4 * workers)
        self._workers = [
            context.Process(target=write_rows, args=(seed * 1000 + index, str(tokenizer_file), size, self._stage, self._queue), daemon=True)
            for index in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        self._fresh: queue.Queue[Row] = queue.Queue(maxsize=256)
        self._kept: list[Row] = []
        self._random = random.Random(seed)
        self.fresh = self.repeated = 0
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while True:
            try:
                row = self._queue.get()
            except (EOFError, OSError):
                return
            self._fresh.put(row)

    def set_stage(self, stage: int) -> None:
        """Move the curriculum on; rows of the stages before the last one are not repeated."""
        if stage != self._stage.value:
            self._stage.value = stage
            self._kept = self._kept[-32:]

    def take(self) -> Row:
        """The next row."""
        try:
            row = self._fresh.get(timeout=None if len(self._kept) < 8 else 0.002)
        except queue.Empty:
            self.repeated += 1
            return self._random.choice(self._kept)
        self.fresh += 1
        if len(self._kept) >= 1500:
            self._kept[self._random.randrange(1500)] = row
        else:
            self._kept.append(row)
        return row

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.terminate()


@dataclass
class Batch:
    """A row on the device."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor
    pack: brook_model.Packing


def to_device(row: Row, device: torch.device) -> Batch:
    """Unpack a row. Page-locked memory lets the copy run beside the previous step."""

    def move(part: bytes, kind: type[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.frombuffer(part, kind).copy())
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    # All ids and positions are below 2**15, which makes int16 of them.
    ids, positions = move(row[0], np.int16).long(), move(row[3], np.int16).long()
    worth, starts = move(row[1], np.uint8), move(row[2], np.int32)
    weights = (worth == _ANSWER).float() + _PROMPT_WEIGHT * (worth == _PROMPT).float()
    longest = 1 << (row[4] - 1).bit_length()
    return Batch(ids, ids.roll(-1), weights, (worth == _ANSWER).float(), packing(starts, positions, min(longest, 4096)))


# --- losses ---------------------------------------------------------------------------------------------------


def corpus_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted loss to learn from, and the plain loss on the assistant's words to look at."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), (losses.detach() * answers).sum() / answers.sum()


def draft_loss(
    hidden: Tensor, head: Tensor, wise: Tensor, wise_head: Tensor, targets: Tensor, weights: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """Half the corpus's loss, half the distance to the target's probabilities on the assistant's words."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    with torch.no_grad():
        goal = F.linear(wise, wise_head.to(wise.dtype)).float().softmax(-1)
    logs = logits.log_softmax(-1)
    losses = -logs.gather(1, targets[:, None]).squeeze(1)
    distances = -(goal * logs).sum(-1)
    total = 0.5 * (losses * weights).sum() / weights.sum() + 0.5 * (distances * answers).sum() / answers.sum()
    return total, (losses.detach() * answers).sum() / answers.sum()


# --- export ---------------------------------------------------------------------------------------------------


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    bos, end, eos, pad = (tokenizer.token_to_id(token) for token in (chat.BOS, chat.END, chat.EOS, chat.PAD))
    config = config_of(model.shape, bos=bos, eos=[end, eos], pad=pad)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": bos, "eos_token_id": [end, eos], "pad_token_id": pad, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_weights(model, folder / "model.safetensors")


def export_beside(out: Path, name: str) -> Path:
    """The folder of the target or of the draft."""
    return out / name


# --- training -------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """The whole run."""
    began = time.time()
    preset = PRESETS[options.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    else:
        tokenizer = train_tokenizer(options.tokenizer_documents)
    brook, draft = export_beside(out, "brook"), export_beside(out, "brook-draft")
    save_tokenizer(tokenizer, brook)
    workers = min(options.workers or preset.workers, os.cpu_count() or 1)
    feed = Feed(brook / "tokenizer.json", options.row_tokens or preset.row_tokens, workers, options.seed)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    models = {"target": Llama(SHAPES[preset.target]), "draft": Llama(SHAPES[preset.draft])}
    if options.resume:
        for folder, model in ((options.resume / "brook", models["target"]), (options.resume / "brook-draft", models["draft"])):
            model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    learners = {name: Learner(model.to(device), options.rate) for name, model in models.items()}
    target, small = learners["target"].model, learners["draft"].model
    print(f"target {target.parameter_count():,} parameters, draft {small.parameter_count():,}", flush=True)
    loss_of, distil = corpus_loss, draft_loss
    if device.type == "cuda":
        brook_model.compile_layers()
        loss_of = torch.compile(corpus_loss, dynamic=False)
        distil = torch.compile(draft_loss, dynamic=False)

    deadline = began + options.seconds
    first_step = last_log = saved = time.time()
    step = tokens = logged_tokens = 0
    stage = min(options.stage, len(CURRICULUM) - 1)
    progress = 0.0
    while True:
        now = time.time()
        if step == 3:
            first_step = last_log = now  # compilation is over: the schedule starts here
        progress = (now - first_step) / max(1.0, deadline - first_step) if step >= 3 else 0.0
        if progress >= 1.0 or (options.steps and step >= options.steps):
            break
        while stage + 1 < len(CURRICULUM) and progress >= CURRICULUM[stage + 1][0]:
            stage += 1
        feed.set_stage(stage)
        scale = rate_scale(progress) * options.rate_scale
        # Larger batches once the rate is about to fall: less noise where it matters.
        for _ in range(1 if progress < 0.4 else options.accumulate):
            batch = to_device(feed.take(), device)
            hidden = target.hidden(batch.tokens, batch.pack)
            head = target.model.embed_tokens.weight
            loss, seen = loss_of(hidden, head, batch.targets, batch.weights, batch.answers)
            loss.backward()
            tokens += batch.tokens.numel()
        learners["target"].step(scale)
        small_seen = None
        if step % options.draft_every == 0:
            small_loss, small_seen = distil(
                small.hidden(batch.tokens, batch.pack), small.model.embed_tokens.weight, hidden.detach(), head.detach(),
                batch.targets, batch.weights, batch.answers,
            )  # fmt: skip
            small_loss.backward()
            learners["draft"].step(scale)
        step += 1
        if step <= 3 or (step % options.log_every == 0):
            now = time.time()
            speed = (tokens - logged_tokens) / max(1e-9, now - last_log)
            draft_text = f" draft {small_seen.item():.4f}" if small_seen is not None else ""
            print(
                f"{now - began:6.1f}s step {step} {progress:.3f} stage {stage} answer loss {seen.item():.4f}{draft_text} "
                f"{tokens / 1e6:.1f}M tokens {speed / 1e3:.0f}k/s fresh {feed.fresh} repeated {feed.repeated}",
                flush=True,
            )
            last_log, logged_tokens = now, tokens
        if now - saved > options.save_seconds:
            saved = time.time()
            save_weights(target, brook / "model.safetensors")
            (out / "brook-draft").mkdir(exist_ok=True)
            save_weights(small, draft / "model.safetensors")
    feed.close()
    export(target, tokenizer, brook)
    export(small, tokenizer, draft)
    run = {"steps": step, "tokens": tokens, "seconds": round(time.time() - began), "device": device.type,
           "fresh_rows": feed.fresh, "repeated_rows": feed.repeated}  # fmt: skip
    (out / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    print(run, flush=True)
    if options.cases:
        brook_model.plain_layers()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        both = (load_model(brook, device, dtype), load_model(draft, device, dtype))
        until = began + options.until if options.until else None
        results = {"brook": measure(both[0], tokenizer, options.cases, draft=both[1], until=until)}
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print("--- the draft alone", flush=True)
        results["brook-draft"] = measure(both[1], tokenizer, options.cases, until=until, show=0)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"done after {time.time() - began:.0f}s", flush=True)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description="Train Brook and Brook-draft on their synthetic corpus.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="brook")
    parser.add_argument("--out", type=Path, required=True, help="folder for brook/ and brook-draft/")
    parser.add_argument("--seconds", type=float, default=480, help="length of the training, its start included")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by time alone)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    parser.add_argument("--tokenizer-documents", type=int, default=40_000)
    parser.add_argument("--resume", type=Path, help="folder of an earlier run whose weights to start from")
    parser.add_argument("--stage", type=int, default=0, help="stage of the curriculum to start in")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="factor on the learning rate, for resumed runs")
    parser.add_argument("--accumulate", type=int, default=2, help="rows per step in the later part")
    parser.add_argument("--draft-every", type=int, default=2, help="train the draft at every so many steps")
    parser.add_argument("--row-tokens", type=int, default=0, help="tokens of one packed row (0: the preset's)")
    parser.add_argument("--workers", type=int, default=0, help="processes that write the corpus (0: the preset's)")
    parser.add_argument("--cases", type=int, default=100, help="held-out cases of each sort to measure (0: none)")
    parser.add_argument("--until", type=float, default=0, help="start no further measurement after so many seconds (0: no limit)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-seconds", type=float, default=75)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
