"""Whole conversations as texts, in a JSON list: what `penstock quant report --text` and `penstock quantize --calibration` take.

`plugins/commands/quant/builtin.json` was made by `python examples/demo_model/texts.py --seed 71 --count 96 --beside plugins/commands/quant/calibration.json OUT`. They are of the
split that training never draws from, and none stands in the file that `--beside` names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from brook_chat import render
from brook_corpus import Corpus
from brook_pools import HELD_OUT

MOST_TOKENS = 400


def texts(seed: int, count: int, beside: set[str]) -> list[str]:
    """So many different ones."""
    corpus = Corpus(seed, HELD_OUT)
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = corpus.draw(MOST_TOKENS)
        text = "<|bos|>" + render(drawn.messages, drawn.tools).removeprefix("<|bos|>")
        if text not in beside:
            found[text] = None
    return list(found)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description="Write conversations as a JSON list of texts.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--beside", type=Path, help="JSON list of texts none of which may come again")
    options = parser.parse_args()
    beside = set(json.loads(options.beside.read_text(encoding="utf-8"))) if options.beside else set()
    made = texts(options.seed, options.count, beside)
    options.out.write_text("[\n" + ",\n".join(json.dumps(text, ensure_ascii=False) for text in made) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
