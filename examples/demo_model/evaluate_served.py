"""Measure a folder of Brook's family on the held-out cases as Penstock serves it: quantised or not, with any KV cache, on its own kernels.

Options behind the folder that are not listed here are those of `penstock serve`: ``--quantization int8 --kv-cache-dtype fp8 --enforce-eager true``.
All cases of all sorts are asked at once. Judging and cases are those of ``evaluate``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import brook_chat as chat
import evaluate
from brook_corpus import CASES, cases
from tokenizers import Tokenizer

from penstock.core.llm import LLM
from penstock.core.protocol.sampling import SamplingParams

_MOST_NEW: Final = 320


def measure(folder: Path, count: int, *, only: str = "", **options: Any) -> dict[str, Any]:
    """The number of right answers for each sort of case. ``options``: of the server, by their names."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = [tokenizer.token_to_id(token) for token in (chat.END, chat.EOS)]
    drawn = [(name, case) for name in CASES if re.search(only, name) for case in cases(name, count)]
    texts = [chat.render(case.messages[:-1], case.tools, add_generation_prompt=True) for _, case in drawn]
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    greedy = SamplingParams(temperature=0.0, max_tokens=_MOST_NEW, stop_token_ids=stops)
    with LLM(str(folder), **options) as llm:
        answers = llm.generate(prompt_token_ids=prompts, sampling_params=greedy)
    results: dict[str, Any] = {}
    for (name, case), answer in zip(drawn, answers, strict=True):
        said = tokenizer.decode([token for token in answer.outputs[0].token_ids if token not in stops])
        sort = results.setdefault(name, {"right": 0, "cases": 0})
        sort["cases"] += 1
        sort["right"] += evaluate.right(CASES[name][0], said, case)
    return results


def _value(text: str) -> Any:
    return text == "true" if text in ("true", "false") else int(text) if text.isdigit() else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a folder."""
    parser = argparse.ArgumentParser(description="Measure a folder on held-out cases as it is served.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=100, help="cases of each sort")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", default="", help="regular expression: the sorts of case to measure")
    parser.add_argument("--device", default="cuda")
    options, rest = parser.parse_known_args(arguments)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        parser.error(f"options of the server come as --name value, not {' '.join(rest)}")
    served = {name[2:].replace("-", "_"): _value(value) for name, value in zip(rest[::2], rest[1::2], strict=True)}
    results = measure(options.folder, options.cases, only=options.only, device=options.device, **served)
    for name, sort in results.items():
        print(f"{name}: {sort['right']}/{sort['cases']}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
