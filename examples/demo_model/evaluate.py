"""Measure an exported Brook on held-out cases, and how often its draft would have guessed the same token.

Every value in these cases comes from the split that training never draws from. Decoding is greedy. The figures go
to a JSON file, from which the model card is written.

This script knows nothing about servers: it uses the small decoder of ``brook_model``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any, Final

import brook_chat as chat
import torch
from brook_corpus import CASES, Conversation, cases
from brook_model import Llama, argmax_along, generate, load_model
from brook_tools import fits
from tokenizers import Tokenizer

_MOST_NEW: Final = 320
# Rows times width of one decoding batch: bounds the memory of the cache.
_BATCH_TOKENS: Final = 400_000


def right(kind: str, answer: str, case: Conversation) -> bool:
    """Judge one answer."""
    expected = case.expected
    if kind == "number":
        numbers = re.findall(r"-?\d+", answer)
        return bool(numbers) and str(numbers[-1]) == expected
    if kind == "contains":
        return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer) is not None
    if kind == "calls":
        calls = chat.parse_tool_calls(answer)
        return calls is not None and calls == expected
    if kind == "json":
        try:
            value = json.loads(answer)
        except ValueError:
            return False
        return bool(value == case.expected and case.schema is not None and fits(value, case.schema))
    return answer.strip() == expected


def answers(
    model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], temperature: float = 0.0, batch_tokens: int = _BATCH_TOKENS
) -> list[list[int]]:
    """Answers in batches of prompts of like length."""
    stop = {tokenizer.token_to_id(chat.END), tokenizer.token_to_id(chat.EOS)}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end - start + 1) * (len(prompts[order[end]]) + _MOST_NEW) <= batch_tokens:
            end += 1
        batch = order[start:end]
        made = generate(model, [prompts[index] for index in batch], stop=stop, most=_MOST_NEW, temperature=temperature)
        for index, tokens in zip(batch, made, strict=True):
            found[index] = tokens
        start = end
    return found


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    count: int,
    *,
    draft: Llama | None = None,
    until: float | None = None,
    show: int = 2,
    only: str = "",
) -> dict[str, Any]:
    """The share of right answers for each sort of case; stops early at the time ``until``."""
    results: dict[str, Any] = {}
    same = total = 0
    end = tokenizer.token_to_id(chat.END)
    for name, (kind, _) in CASES.items():
        if not re.search(only, name):
            continue
        if until is not None and time.time() > until:
            print(f"no time left for: {name}")
            continue
        drawn = cases(name, count)
        texts = [chat.render(case.messages[:-1], case.tools, add_generation_prompt=True) for case in drawn]
        prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        made = answers(model, tokenizer, prompts)
        said = [tokenizer.decode(tokens) for tokens in made]
        verdicts = [right(kind, answer, case) for answer, case in zip(said, drawn, strict=True)]
        results[name] = {
            "right": sum(verdicts), "cases": len(verdicts), "share": sum(verdicts) / len(verdicts),
            "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        }  # fmt: skip
        if draft is not None:
            for first in range(0, min(len(prompts), 200), 20):
                part = slice(first, first + 20)
                goals = [[*tokens, end] for tokens in made[part]]
                for goal, guess in zip(goals, argmax_along(draft, prompts[part], goals), strict=True):
                    same += sum(one == two for one, two in zip(goal, guess, strict=True))
                    total += len(goal)
        print(f"{name}: {sum(verdicts)}/{len(verdicts)}", flush=True)
        wrong = [index for index, verdict in enumerate(verdicts) if not verdict]
        for index in wrong[:show]:
            asked = drawn[index].messages[-2]["content"][-160:]
            print(f"    asked {asked!r}\n    wants {chat.assistant_text(drawn[index].messages[-1])!r}\n    says  {said[index]!r}")
    if total:
        results["draft agreement"] = {"right": same, "cases": total, "share": same / total}
        print(f"draft agrees on {same}/{total} tokens")
    return results


def main() -> None:
    """Evaluate a folder, with its draft if one is given."""
    parser = argparse.ArgumentParser(description="Measure an exported Brook on held-out cases.")
    parser.add_argument("folder", type=Path, help="exported checkpoint")
    parser.add_argument("--draft", type=Path, help="exported checkpoint of the draft")
    parser.add_argument("--cases", type=int, default=100, help="cases of each sort")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", default="", help="regular expression: the sorts of case to measure")
    parser.add_argument("--show", type=int, default=2, help="wrong answers to print for each sort")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    model = load_model(options.folder, device, dtype)
    draft = load_model(options.draft, device, dtype) if options.draft else None
    results = measure(model, tokenizer, options.cases, draft=draft, show=options.show, only=options.only)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
