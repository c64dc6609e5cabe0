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
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.tokenizers.classes import ALIASES, AS_IT_IS, FOREIGN, OTHER, REBUILT, class_of
from penstock.plugins.tokenizers.folder import special_texts
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer
from penstock.plugins.tokenizers.rebuild import RECIPES

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


def texts(seed: int, count: int = 5) -> list[str]:
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
        "mapped extra": {
            "extra_special_tokens": ["water"],
            "map": {"extra_special_tokens": ["water", {"content": "<extra>", "lstrip": True}]},
        },
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
    special = {name: str(token) for name, token in theirs._special_tokens_map.items() if token is not None}
    assert special_texts(path) == special, where
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
            if mine.is_byte_exact() and "\ufffd" not in plain:  # a stream's text; only the first token of all may lose a space
                streamed = b"".join(mine.token_bytes(token) for token in want).decode()
                assert streamed in (plain, " " + plain), (where, text)
    return True


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_settings(tmp_path: Path, kind: str, name: str | None) -> None:
    for seed, (what, config) in enumerate(settings(kind).items()):
        given = config if name is None else {**config, "tokenizer_class": name}
        path = folder(tmp_path / "checkpoint", MADE[kind], given, {"model_type": "llama"})
        assert compare(path, seed, f"{name} {kind} {what}"), "transformers takes all of these"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("model_type", TYPES)
def test_model_types(tmp_path: Path, kind: str, model_type: str | None) -> None:
    model = {} if model_type is None else {"model_type": model_type}
    for seed, name in enumerate((None, "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast")):
        for where in (0, 1):
            named = {} if name is None else {"tokenizer_class": name}
            config = {"add_prefix_space": True, "added_tokens_decoder": listed(kind, drop=1), **(named if where == 0 else {})}
            path = folder(tmp_path / "checkpoint", MADE[kind], config, {**model, **(named if where == 1 else {})})
            assert compare(path, seed, f"{model_type} {kind} {name} {where}")


CODE = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_5", "code_llama", "jais2", "gpt-sw3", "siglip2", "nezha", "t5", "mixtral"])
def test_the_class_is_that_of_transformers(tmp_path: Path, model_type: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(lambda cls, *_, **__: cls))
    names = [None, "Qwen2TokenizerFast", "LlamaTokenizerFast", "BartTokenizer", "T5TokenizerFast", "ByT5Tokenizer", "NobodysTokenizer"]
    for kind in ("byte_level", "sentencepiece"):
        for name in [*names, "PreTrainedTokenizer", "ParakeetTokenizer", "BloomTokenizerFast"]:
            for own in (None, CODE):
                config = {key: value for key, value in (("tokenizer_class", name), ("auto_map", own)) if value}
                model = {"model_type": model_type} if model_type else {}
                path = folder(tmp_path / "checkpoint", MADE[kind], config, model)
                mine = class_of(config, model, lambda kind=kind: kind == "byte_level")
                try:
                    theirs = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False).__name__
                except ValueError:  # it would have to run the folder's code
                    assert own
                    continue
                same = AS_IT_IS if theirs in ("PythonBackend", "ParakeetTokenizer") else theirs
                assert mine == (OTHER if mine == OTHER and same in FOREIGN else same), (model_type, name, kind, own)


def test_every_class_is_known() -> None:
    """Those that are rebuilt have a recipe, the foreign ones are named; what is in neither list takes tokenizer.json as it is."""
    assert set(RECIPES) == REBUILT
    for name in dir(transformers):
        found = getattr(transformers, name, None) if name.endswith(("Tokenizer", "TokenizerFast")) else None
        if not isinstance(found, type) or not issubclass(found, PreTrainedTokenizerBase) or "PreTrained" in name:
            continue
        plain = name.removesuffix("Fast")
        if ALIASES.get(plain, plain) in REBUILT:
            assert found.__name__ == ALIASES.get(plain, plain)
        elif plain not in FOREIGN:
            assert issubclass(found, transformers.TokenizersBackend), name
            assert "__init__" not in vars(found), name


@pytest.mark.parametrize(
    ("fix", "kind", "model_type", "version"),
    [
        (True, "sequence", "mistral", "4.57.0"),
        (True, "metaspace", None, None),
        (True, "sequence", "mistral", "5.1.0"),
        (True, "sequence", "llama", "4.57.0"),
        (None, "sequence", "mistral", "4.57.0"),
    ],
)
def test_the_mended_split_of_mistral(tmp_path: Path, fix: bool | None, kind: str, model_type: str | None, version: str | None) -> None:
    described = json.loads(MADE["byte_level"])
    vocab = described["model"]["vocab"]
    described["added_tokens"] = []
    for number in range(100_001):
        vocab[f"filler {number}"] = len(vocab)
    if kind == "metaspace":
        described["pre_tokenizer"] = json.loads(pre_tokenizers.Metaspace().__getstate__())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **({} if fix is None else {"fix_mistral_regex": fix})}
    model = {key: value for key, value in (("model_type", model_type), ("transformers_version", version)) if value}
    path = folder(tmp_path / "checkpoint", json.dumps(described), config, model)
    theirs, mine = AutoTokenizer.from_pretrained(str(path)), HuggingFaceTokenizer.load(str(path))
    for text in [*texts(1), "helloWorld 12345 don't  x\n\n/y"]:
        assert mine.encode_batch([text], add_special_tokens=True)[0].tolist() == theirs(text)["input_ids"], text


def said(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        HuggingFaceTokenizer.load(str(path))
    return "\n".join(record.getMessage() for record in caplog.records)


def test_what_may_differ_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def of(config: dict[str, Any], kind: str = "byte_level") -> str:
        return said(folder(tmp_path / "checkpoint", MADE[kind], config, {"model_type": "llama"}), caplog)

    assert of({"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}) == ""
    assert "makes T5Tokenizer of it, which is not reproduced" in of({"tokenizer_class": "T5TokenizerFast"})
    assert "auto_map names the folder's own tokenizer code, which is not run" in of({"auto_map": CODE})
    assert "clean_up_tokenization_spaces is ignored" in of({"clean_up_tokenization_spaces": True}, "word_piece")
    assert of({"clean_up_tokenization_spaces": True}) == "", "transformers passes over it too"
    assert "no use for 1 added tokens" in of({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed("byte_level", drop=1)})
    assert "'<far>' is 424, not 900" in of({"added_tokens_decoder": {"900": added("<far>")}})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "out of vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, "tokenizer.json"),
        ({"model": {"type": "BPE"}}, "tokenizer.json"),
        ({"model": None}, "tokenizer.json"),
        ({"added_tokens": [{"content": 7, "id": 1}]}, "added_tokens"),
    ],
)
def test_a_file_that_cannot_be_rebuilt_is_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    described = {**json.loads(MADE["byte_level"]), **change}
    path = folder(tmp_path / "checkpoint", json.dumps(described), {"tokenizer_class": "Qwen2Tokenizer"}, {})
    with pytest.raises(CheckpointError, match=what):
        HuggingFaceTokenizer.load(str(path))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("add_prefix_space", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": "yes"}),
        ("legacy", {"tokenizer_class": "LlamaTokenizer", "legacy": 1}),
        ("sep_token", {"tokenizer_class": "RobertaTokenizer", "sep_token": None}),
        ("added_tokens.json", {"added": {"<extra>": "7"}}),
        ("additional_special_tokens", {"map": {"additional_special_tokens": 7}}),
        ("eos_token", {"map": {"eos_token": 7}}),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=name):
        HuggingFaceTokenizer.load(str(folder(tmp_path / "checkpoint", MADE["sentencepiece"], config, {})))
