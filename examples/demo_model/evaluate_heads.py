"""Measure how many of a head's guesses Brook would take, on held-out prompts and by task.

    python examples/demo_model/evaluate_heads.py plugins/demo_model/brook plugins/demo_model/brook-eagle3 --cases 100

Brook answers each prompt; then every position of the answer gets a chain of guesses, and a walk over them counts
what speculative decoding would have taken: passes of Brook, and guesses offered and taken at each place of the chain.
A guess counts when it equals the token of Brook's answer, be that greedy or sampled. A folder of a whole model is
measured as a draft model. This script knows nothing about servers.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import brook_chat as chat
import brook_tasks as tasks
import torch
from brook_corpus import Conversation, cases, say
from brook_heads import Head, HeadShape, load_head, tokens_of, watch
from brook_model import Llama, argmax_along, load_model
from brook_pools import HELD_OUT, Pools
from evaluate import answers
from tokenizers import Tokenizer

_CHAT: Final = (tasks.smalltalk, tasks.penstock, tasks.unknown, tasks.listing, tasks.story)
# The tasks of the cards: names of held-out cases, or tasks whose turns are drawn.
TASKS: Final[dict[str, tuple[str, ...] | tuple[Callable[[Pools], tasks.Turn], ...]]] = {
    "chat": _CHAT,
    "sums": ("addition", "subtraction"),
    "rewriting": ("rewriting",),
    "recall, up to 3000 tokens": ("recall, up to 500 tokens", "recall, 1000 to 2000 tokens", "recall, 2000 to 3000 tokens"),
    "table look-up": ("table look-up",),
    "tool calls": ("tool call, one tool", "tool call, several tools", "tool calls in parallel"),
    "answer from a tool's result": ("answer from a tool's result",),
    "JSON by schema": ("JSON by schema",),
}
# Tokens of one batch, padding included.
_BATCH_TOKENS: Final = 32_768


@dataclass
class Tally:
    """What a walk over some answers found."""

    tokens: int = 0
    passes: int = 0
    offered: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def walk(self, right: list[list[bool]]) -> None:
        """Decode one answer; ``right[i][j]`` tells whether guess ``j`` after token ``i`` is right. The first token is given."""
        steps = len(right[0]) if right else 0
        self.offered += [0] * (steps - len(self.offered))
        self.taken += [0] * (steps - len(self.taken))
        place = 0
        while place < len(right):
            left = min(steps, len(right) - place)
            run = next((step for step in range(left) if not right[place][step]), left)
            for step in range(left):
                self.offered[step] += 1
                self.taken[step] += step < run
            emitted = min(run + 1, len(right) - place)
            self.tokens += emitted
            self.passes += 1
            place += emitted

    def figures(self) -> dict[str, Any]:
        """Tokens per pass of the target, and the share of guesses taken at each place and in all."""
        return {
            "tokens_per_pass": round(self.tokens / max(1, self.passes), 3),
            "acceptance": round(sum(self.taken) / max(1, sum(self.offered)), 4),
            "per_position": [round(taken / max(1, offered), 4) for taken, offered in zip(self.taken, self.offered, strict=True)],
            "tokens": self.tokens,
            "passes": self.passes,
        }

    def add(self, other: Tally) -> None:
        """Count another tally in."""
        self.tokens += other.tokens
        self.passes += other.passes
        for mine, theirs in ((self.offered, other.offered), (self.taken, other.taken)):
            mine += [0] * (len(theirs) - len(mine))
            for index, count in enumerate(theirs):
                mine[index] += count


def prompts_of(task: str, tokenizer: Tokenizer, count: int, seed: int = 2024) -> list[list[int]]:
    """Held-out prompts of one task, always the same for a seed."""
    kinds = TASKS[task]
    drawn: list[Conversation] = []
    for index, kind in enumerate(kinds):
        share = count // len(kinds) + (index < count % len(kinds))
        if isinstance(kind, str):
            drawn += cases(kind, share, seed)
        else:
            p = Pools(random.Random(seed + zlib.crc32(kind.__name__.encode())), HELD_OUT)
            turns = [kind(p) for _ in range(share)]
            drawn += [Conversation(task, [say("user", turn.user), say("assistant", turn.assistant)]) for turn in turns]
    texts = [chat.render(one.messages[:-1], one.tools, add_generation_prompt=True) for one in drawn]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@torch.inference_mode()
def rights(
    head: Head, shape: HeadShape, target: Llama, prompts: list[list[int]], said: list[list[int]], steps: int
) -> list[list[list[bool]]]:
    """For each answer and each of its tokens but the last: which of the guesses after it are right."""
    device = target.model.norm.weight.device
    out: list[list[list[bool]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(said[index]))
    while order:
        width = len(prompts[order[-1]]) + len(said[order[-1]])
        size = max(1, _BATCH_TOKENS // width)
        order, batch = order[:-size], order[-size:]
        rows = [prompts[index] + said[index] for index in batch]
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        most = max(len(said[index]) for index in batch)
        starts = torch.tensor([len(prompts[index]) - 1 for index in batch], device=device)
        roots = (starts[:, None] + torch.arange(most, device=device)).clamp_max(width - 1)
        guesses = head.guess(target, tokens, watch(target, tokens, shape.taps), roots, steps)
        for step, logits in enumerate(guesses):
            truth = tokens.gather(1, (roots + 2 + step).clamp_max(width - 1))
            same = (tokens_of(head, logits) == truth).tolist()
            for row, index in enumerate(batch):
                places = max(0, len(said[index]) - 1)
                if step == 0:
                    out[index] = [[] for _ in range(places)]
                for place in range(places):
                    out[index][place].append(bool(same[row][place]))
    return out


def draft_rights(draft: Llama, prompts: list[list[int]], said: list[list[int]], steps: int) -> list[list[list[bool]]]:
    """The same for a draft model, which reads its own guesses: they are the true tokens as long as they count."""
    out = []
    for first in range(0, len(prompts), 20):
        part = slice(first, first + 20)
        for goal, guess in zip(said[part], argmax_along(draft, prompts[part], said[part]), strict=True):
            same = [one == two for one, two in zip(goal, guess, strict=True)] + [False] * steps
            out.append([same[place + 1 : place + 1 + steps] for place in range(len(goal) - 1)])
    return out


def measure_heads(
    target: Llama, tokenizer: Tokenizer, heads: dict[str, tuple[Head, HeadShape] | Llama], *, count: int, lengths: tuple[int, ...],
    temperature: float = 0.0, only: tuple[str, ...] = tuple(TASKS), seed: int = 2024,
) -> dict[str, Any]:  # fmt: skip
    """Figures for each head, number of guesses and task; ``all`` weighs every pass alike."""
    end = tokenizer.token_to_id(chat.END)
    totals = {(name, length): Tally() for name in heads for length in lengths}
    results: dict[str, Any] = {name: {str(length): {} for length in lengths} for name in heads}
    for task in only:
        prompts = prompts_of(task, tokenizer, count, seed)
        said = [[*tokens, end] for tokens in answers(target, tokenizer, prompts, temperature)]
        for name, head in heads.items():
            if isinstance(head, Llama):
                found = draft_rights(head, prompts, said, max(lengths))
            else:
                found = rights(*head, target, prompts, said, max(lengths))
            for length in lengths:
                tally = Tally()
                for one in found:
                    tally.walk([steps[:length] for steps in one])
                totals[name, length].add(tally)
                results[name][str(length)][task] = tally.figures()
    for (name, length), tally in totals.items():
        results[name][str(length)]["all"] = tally.figures()
        print(f"{name} K={length} T={temperature}: {tally.figures()}", flush=True)
    return results


def main() -> None:
    """Measure folders of heads."""
    parser = argparse.ArgumentParser(description="Measure the acceptance of Brook's speculative heads.")
    parser.add_argument("target", type=Path, help="Brook's folder")
    parser.add_argument("heads", type=Path, nargs="+", help="folders of heads, or of a draft model")
    parser.add_argument("--cases", type=int, default=100, help="prompts of each task")
    parser.add_argument("--lengths", type=int, nargs="+", default=[3, 4], help="numbers of guesses")
    parser.add_argument("--temperature", type=float, default=0.0, help="of Brook's answers; guesses are always greedy")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    target = load_model(options.target, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    heads: dict[str, tuple[Head, HeadShape] | Llama] = {}
    for folder in options.heads:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaForCausalLM"]
        heads[folder.name] = load_model(folder, device, target.model.norm.weight.dtype) if whole else load_head(folder, target)
    results = measure_heads(
        target, tokenizer, heads, count=options.cases, lengths=tuple(options.lengths), temperature=options.temperature
    )  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
