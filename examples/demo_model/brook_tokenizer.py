"""Brook's tokenizer: byte-level BPE whose digits stand alone, trained on the corpus itself.

Byte level means that any text round-trips. Single digits keep sums learnable: ``47`` is always ``4`` and ``7``.
The two files of the Hugging Face format are written here, the chat template among them.

This module knows nothing about models. Run it as a script to train the tokenizer alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import brook_chat as chat
from brook_corpus import Corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE: Final = 4096
CONTEXT: Final = 4096


_ADDED: Final = re.compile("|".join(map(re.escape, (*chat.SPECIAL_TOKENS, *chat.TEXT_TOKENS))))


def _texts(documents: int, seed: int) -> Iterator[str]:
    corpus = Corpus(seed)
    for index in range(documents):
        one = corpus.draw(4000 if index % 8 == 0 else 500)
        # The trainer does not know that added tokens stand alone, so it must not see them.
        yield from filter(None, _ADDED.split(chat.render(one.messages, one.tools)))


def train_tokenizer(documents: int = 40_000, *, seed: int = 7, size: int = VOCABULARY_SIZE) -> Tokenizer:
    """A tokenizer of exactly ``size`` entries (fewer where the corpus has too few merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    special: list[str | AddedToken] = [*chat.SPECIAL_TOKENS, *chat.RESERVED_TOKENS]
    marks = [AddedToken(text, special=False, normalized=False) for text in chat.TEXT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(marks),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # A merge seen twice is a random value seen twice: it would waste an entry.
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents, seed), trainer)
    # The trainer would make these special, and decoding would then hide them.
    tokenizer.add_tokens(marks)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": chat.BOS, "eos_token": chat.END, "pad_token": chat.PAD}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": [chat.SYSTEM, chat.USER, chat.ASSISTANT, chat.TOOL, chat.EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": chat.CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the tokenizer and write it."""
    parser = argparse.ArgumentParser(description="Train Brook's tokenizer on its synthetic corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer's files to")
    parser.add_argument("--documents", type=int, default=40_000, help="conversations to learn the merges from")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    tokenizer = train_tokenizer(options.documents, seed=options.seed)
    save_tokenizer(tokenizer, options.out)
    print(f"{tokenizer.get_vocab_size()} entries in {options.out}")


if __name__ == "__main__":
    main()
