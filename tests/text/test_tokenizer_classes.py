"""Tokenizer classes and settings against transformers itself, over made-up folders and random texts: same ids, texts and special tokens.

Each folder is loaded by AutoTokenizer and by Penstock in the same run. Folders are the product of four kinds of tokenizer.json, of classes
(named in tokenizer_config.json, or following from config.json's model_type) and of settings.
"""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

CORPUS = [
    "the water runs through the penstock and the wheel turns, turns, turns again",
    "Hello, world! It's 12345 o'clock. Don't they say hello? ÜBER straße naïve café",
    "def f(x):\n    return x + 1\n\n\tprint('hello')  #  spaces   here",
    "你好，世界。こんにちは мир привет 🙂🙂 e\u0301 \u212b ﬁ",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_end|>"]
PIECES = [
    " ", "  ", "\n", "\t", "hello", "Hello", " the", "water", "12345", "'s", "don't", "é", "e\u0301", "\u212b", "ﬁ", "你好", "🙂", "👩‍👩‍👧", "▁", "\u00a0",
    "\r\n", "<s>", "</s>", "<|im_end|>", "<|endoftext|>", "<extra>", " <extra> ", "<mask>", "x" * 9, "\u0000", "ＡＢ", ".", " .", ",", "[SEP]", "İ", "Ǆ", "कि",
]  # fmt: skip


def texts(seed: int, count: int = 12) -> list[str]:
    """Random texts: of pieces that matter to tokenizers, and of any characters."""
    draw = random.Random(seed)
    out = ["", " ", "hello", " hello", "hello <|im_end|> the</s>"]
    for _ in range(count):
        out.append("".join(draw.choice(PIECES) for _ in range(draw.randint(1, 9))))
        points = [draw.choice((draw.randint(32, 126), draw.randint(160, 0x2FFF), draw.randint(0x1F300, 0x1FAFF))) for _ in range(6)]
        out.append("".join(map(chr, points)))
    return out


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<plain>"])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def sentencepiece() -> Tokenizer:
    pieces = [*SPECIAL[:4], *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(
        [line.replace(" ", "▁") for line in CORPUS], trainers.BpeTrainer(vocab_size=460, special_tokens=pieces, show_progress=False)
    )
    described = json.loads(made.to_str())
    described["added_tokens"] = [item for item in described["added_tokens"] if item["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(described))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(SPECIAL[4:])
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL[:4], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


MADE = {make.__name__: make().to_str() for make in (byte_level, sentencepiece, unigram, word_piece)}
CLASSES = [
    None, "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "GPT2Tokenizer",
    "RobertaTokenizerFast", "BartTokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer",
    "GPTNeoXTokenizerFast", "CohereTokenizerFast", "CodeGenTokenizer", "BertTokenizerFast", "NobodysTokenizer",
]  # fmt: skip
TYPES = [None, "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "phi3", "nobodys"]


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def listed(kind: str, *, drop: int = 0, **flags: bool) -> dict[str, Any]:
    """An added_tokens_decoder of what tokenizer.json adds, less the first `drop`, the last token with other flags."""
    items = json.loads(MADE[kind])["added_tokens"]
    found = {str(item["id"]): added(item["content"], special=item["special"]) for item in items[drop:]}
    last = list(found)[-1]
    return {**found, last: {**found[last], **flags}}


def settings(kind: str) -> dict[str, dict[str, Any]]:
    """Name -> keys of tokenizer_config.json; "map" and "added" are the two older files."""
    end = "</s>" if kind in ("sentencepiece", "unigram") else "[SEP]" if kind == "word_piece" else "<|im_end|>"
    strips = added("<extra>", lstrip=True, rstrip=True)
    top = len(Tokenizer.from_str(MADE[kind]).get_vocab())
    return {
        "nothing": {},
        "prefix": {"add_prefix_space": True},
        "no prefix": {"add_prefix_space": False},
        "legacy": {"legacy": True, "add_prefix_space": True},
        "not legacy": {"legacy": False},
        "null": {"legacy": None, "bos_token": None, "pad_token": None},
        "bos and eos": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": end},
        "no bos": {"add_bos_token": False, "bos_token": "<s>"},
        "end": {"eos_token": end, "pad_token": end},
        "new names": {"pad_token": "<newpad>", "eos_token": "<neweos>", "image_token": "<image>", "mask_token": "<m>"},
        "split": {"split_special_tokens": True, "eos_token": end},
        "clean": {"clean_up_tokenization_spaces": True},
        "extra": {"extra_special_tokens": ["<extra>", "hello"]},
        "extra by name": {"extra_special_tokens": {"video_token": "<extra>"}, "eos_token": end},
        "additional": {"additional_special_tokens": ["<extra>", "the"]},
        "both extra": {"extra_special_tokens": [], "additional_special_tokens": ["<extra>"]},
        "typed": {"eos_token": {"__type": "AddedToken", **added("<extra>", lstrip=True)}, "pad_token": "<extra>"},
        "typed extra": {"extra_special_tokens": [{"__type": "AddedToken", "content": "<extra>", "rstrip": True}]},
        "own names": {"model_specific_special_tokens": {"video_token": "<extra>"}},
        "listed": {"added_tokens_decoder": listed(kind), "eos_token": end},
        "listed in part": {"added_tokens_decoder": listed(kind, drop=1), "eos_token": end},
        "listed otherwise": {"added_tokens_decoder": listed(kind, special=False, lstrip=True, normalized=True)},
        "listed as plain": {"added_tokens_decoder": listed(kind, special=False), "eos_token": end, "additional_special_tokens": [end]},
        "one listed": {"added_tokens_decoder": {str(top): strips}},
        "one far away": {"added_tokens_decoder": {str(top + 50): strips, str(top + 10): added("<mask>", special=False, normalized=True)}},
        "listed nothing": {"added_tokens_decoder": {}, "eos_token": end},
        "listed words": {"added_tokens_decoder": {str(top): added("hello", single_word=True, special=False, normalized=True)}},
        "mapped": {"map": {"eos_token": added("<extra>", rstrip=True), "pad_token": "<mask>", "additional_special_tokens": ["the"]}},
        "mapped over": {
            "eos_token": end,
            "additional_special_tokens": ["water"],
            "map": {"eos_token": "<extra>", "additional_special_tokens": ["hello"], "image_token": added("<mask>", lstrip=True)},
        },
        "mapped extra": {"extra_special_tokens": ["water"], "map": {"extra_special_tokens": ["water", {"content": "<extra>", "lstrip": True}]}},
        "mapped but listed": {"added_tokens_decoder": listed(kind), "map": {"eos_token": "<extra>"}},
        "added file": {"added": {"<extra>": top, "<mask>": top + 1}, "eos_token": "<extra>"},
        "added and mapped": {"added": {"<extra>": top + 3}, "map": {"additional_special_tokens": ["<extra>"]}},
        "unknown": {"unk_token": "<extra>"},
        "sep": {"sep_token": "<extra>", "cls_token": "<mask>"},
        "bert": {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
        "offsets": {"trim_offsets": False},
    }


def folder(path: Path, described: str, config: dict[str, Any], model: dict[str, Any]) -> Path:
    files = dict(config)
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(described)
    for name, content in (
        ("special_tokens_map.json", files.pop("map", None)),
        ("added_tokens.json", files.pop("added", None)),
        ("config.json", model),
        ("tokenizer_config.json", files),
    ):
        if content is not None:
            (path / name).write_text(json.dumps(content))
        else:
            (path / name).unlink(missing_ok=True)
    return path


def flags_of(fast: Tokenizer) -> dict[int, tuple[Any, ...]]:
    return {
        token: (item.content, item.special, item.lstrip, item.rstrip, item.normalized, item.single_word)
        for token, item in fast.get_added_tokens_decoder().items()
    }


def compare(path: Path, seed: int, where: str) -> bool:
    """False if transformers refuses the folder."""
    try:
        theirs = AutoTokenizer.from_pretrained(str(path))
    except Exception:  # whatever it is, nobody has ids from it
        return False
    mine = HuggingFaceTokenizer.load(str(path))
    assert flags_of(mine._fast) == flags_of(theirs._tokenizer), where
    assert mine.vocab_size == max(theirs.get_vocab().values()) + 1, where
    assert mine.bos_id == theirs.bos_token_id, where
    assert mine.eos_ids == ([] if theirs.eos_token_id is None else [theirs.eos_token_id]), where
    for text in texts(seed):
        for special in (True, False):
            try:
                want = theirs(text, add_special_tokens=special)["input_ids"]
            except Exception as error:  # a text whose characters are not in a vocabulary without the unknown token
                with pytest.raises(Exception, match=re.escape(str(error))):
                    mine.encode_batch([text], add_special_tokens=special)
                continue
            (ids,) = mine.encode_batch([text], add_special_tokens=special)
            assert ids.tolist() == want, (where, text)
            for skip in (True, False):
                plain = theirs.decode(want, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert mine.decode(want, skip_special_tokens=skip) == plain, (where, text)
    return True


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", CLASSES)
def test_classes(tmp_path: Path, kind: str, name: str | None) -> None:
    served = 0
    for seed, (what, config) in enumerate(settings(kind).items()):
        given = config if name is None else {**config, "tokenizer_class": name}
        served += compare(folder(tmp_path / "checkpoint", MADE[kind], given, {"model_type": "llama"}), seed, f"{name} {kind} {what}")
    assert served
