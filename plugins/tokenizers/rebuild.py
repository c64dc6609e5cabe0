"""Tokenizers that transformers makes anew, whatever tokenizer.json says.

What it is: a recipe for each class of classes.REBUILT: what of the vocabulary, merges and settings becomes a fast tokenizer, which special
tokens such a class has where the files name none, and what it does once its tokens are added. Of tokenizer.json only the vocabulary, the
merges, the post-processor and the padding count; its added tokens come in again by settings.py. As transformers 5 does it.
What it does not know: files, which class is used, chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.tokenizers.settings import TokenSettings, text_of

END = "<|endoftext|>"
SPACE = "▁"
# The split of Qwen's byte-level tokenizers: contractions, words with one character before them, single digits, other signs, line ends, blanks.
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|\p{{N}}| ?[^\s{others}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = _QWEN.format(letters=r"\p{L}", others=r"\p{L}")
QWEN3_5_SPLIT = _QWEN.format(letters=r"[\p{L}\p{M}]", others=r"\p{L}\p{M}")


@dataclass(frozen=True)
class Source:
    """What a recipe is given: tokenizer.json's vocabulary and merges, tokenizer_config.json, and the special tokens."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    config: Mapping[str, Any]
    settings: TokenSettings

    def flag(self, name: str, absent: bool) -> bool:
        """Raises CheckpointError naming the field."""
        value = self.config.get(name)
        if value is None:
            return absent
        if not isinstance(value, bool):
            raise CheckpointError(f"tokenizer_config.json: {name} must be true or false, but is {value!r:.80}.", param=name)
        return value

    def unknown(self) -> str:
        return str(self.settings.text("unk_token"))  # "None" where there is none, as in transformers

    def bpe(self, **options: Any) -> FastTokenizer:
        return FastTokenizer(models.BPE(vocab=self.vocab, merges=self.merges, **options))


@dataclass(frozen=True)
class Recipe:
    """`named`: special tokens of a class whose files say nothing of that field (None: it has none, and padding does not name one)."""

    build: Callable[[Source], FastTokenizer]
    named: dict[str, str | None] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    """More tokens with names of the class's own, which stay what they are here whatever the files say, and come first."""


def rebuilt(recipe: Recipe, described: Mapping[str, Any], config: Mapping[str, Any], settings: TokenSettings) -> FastTokenizer:
    """A tokenizer of tokenizer.json as an object. Raises CheckpointError, or what the tokenizers library raises (plain Exceptions)."""
    source = Source(_vocab(described), _merges(described), config, settings)
    fast = recipe.build(source)
    rest = _without_vocabulary(described)
    if rest.post_processor is not None:
        fast.post_processor = rest.post_processor
    if rest.padding is not None:
        fast.enable_padding(**rest.padding)
    return fast


def _vocab(described: Mapping[str, Any]) -> dict[str, int]:
    found = described["model"]["vocab"]
    if isinstance(found, list):  # with scores, which none of these classes has a use for
        return {item[0] if isinstance(item, list) else item: token for token, item in enumerate(found)}
    return dict(found)


def _merges(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = described["model"].get("merges") or []
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in found)
    return [(left, right) for left, right in pairs]


def _without_vocabulary(described: Mapping[str, Any]) -> FastTokenizer:
    model = dict(described["model"])
    if model.get("type") in (None, "Unigram"):  # these cannot be made without
        return FastTokenizer.from_str(json.dumps(described))
    model["vocab"] = {}
    if model["type"] == "BPE":
        model["merges"] = []
    return FastTokenizer.from_str(json.dumps({**described, "model": model, "added_tokens": []}))


def _byte_level(source: Source, **options: Any) -> FastTokenizer:
    fast = source.bpe(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=source.flag("add_prefix_space", False), **options)
    fast.decoder = decoders.ByteLevel()
    return fast


def _qwen(split: str) -> Callable[[Source], FastTokenizer]:
    def build(source: Source) -> FastTokenizer:
        fast = _byte_level(source, use_regex=False)
        fast.normalizer = normalizers.NFC()
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), fast.pre_tokenizer])
        return fast

    return build


def _neox(source: Source) -> FastTokenizer:
    fast = _byte_level(source, trim_offsets=source.flag("trim_offsets", True))
    fast.normalizer = normalizers.NFC()
    return fast


def _cohere(source: Source) -> FastTokenizer:
    fast = _byte_level(source, trim_offsets=True)
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), fast.pre_tokenizer])
    return fast


def _sentencepiece(fast: FastTokenizer, scheme: str, *, strip: bool) -> FastTokenizer:
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strip else steps)
    return fast


def _llama(source: Source) -> FastTokenizer:
    prefix = source.flag("add_prefix_space", True)
    scheme = ("always" if source.flag("legacy", False) else "first") if prefix else "never"
    return _sentencepiece(source.bpe(fuse_unk=True, byte_fallback=True), scheme, strip=prefix)


def _code_llama(source: Source) -> FastTokenizer:
    fast = source.bpe(fuse_unk=True, byte_fallback=True, unk_token=source.unknown())
    return _sentencepiece(fast, "first" if source.flag("add_prefix_space", True) else "never", strip=True)


def _gemma(source: Source) -> FastTokenizer:
    fast = source.bpe(fuse_unk=True, byte_fallback=True, unk_token=source.unknown())
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def _bert(source: Source) -> FastTokenizer:
    fast = FastTokenizer(models.WordPiece(vocab=source.vocab, unk_token=source.unknown()))
    accents = source.config.get("strip_accents")
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=source.flag("tokenize_chinese_chars", True),
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=source.flag("do_lower_case", True),
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    return fast


_QWEN_NAMES: dict[str, str | None] = {"unk_token": END, "bos_token": None, "eos_token": END, "pad_token": END}
_GPT2_NAMES: dict[str, str | None] = {"unk_token": END, "bos_token": END, "eos_token": END, "pad_token": None}
_LLAMA_NAMES: dict[str, str | None] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_BERT_NAMES: dict[str, str | None] = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
RECIPES = {
    "BertTokenizer": Recipe(_bert, _BERT_NAMES),
    "CodeGenTokenizer": Recipe(_byte_level, _GPT2_NAMES),
    "CodeLlamaTokenizer": Recipe(
        _code_llama,
        _LLAMA_NAMES,
        {
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
        },
    ),
    "CohereTokenizer": Recipe(
        _cohere,
        {
            "unk_token": "<UNK>",
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "cls_token": "<CLS>",
            "sep_token": "<SEP>",
            "mask_token": "<MASK_TOKEN>",
        },
    ),
    "GPT2Tokenizer": Recipe(_byte_level, _GPT2_NAMES),
    "GPTNeoXTokenizer": Recipe(_neox, {"unk_token": END, "bos_token": END, "eos_token": END, "pad_token": "<|padding|>"}),
    "GemmaTokenizer": Recipe(
        _gemma, {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}
    ),
    "LlamaTokenizer": Recipe(_llama, _LLAMA_NAMES),
    "Qwen2Tokenizer": Recipe(_qwen(QWEN2_SPLIT), _QWEN_NAMES),
    "Qwen3_5Tokenizer": Recipe(_qwen(QWEN3_5_SPLIT), _QWEN_NAMES),
    "RobertaTokenizer": Recipe(
        _byte_level,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "cls_token": "<s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
}


def finish(kind: str, fast: FastTokenizer, settings: TokenSettings, config: Mapping[str, Any]) -> None:
    """What a class does once its tokens are added: mark them once more, write another post-processor. Raises CheckpointError."""
    if kind == "Qwen2Tokenizer":  # without their flags
        fast.add_tokens([AddedToken(text_of(item), special=True) for item in settings.all()])
    elif kind == "CohereTokenizer":
        fast.add_special_tokens([AddedToken(item, special=True) if isinstance(item, str) else item for item in settings.all()])
    elif kind == "GPTNeoXTokenizer":
        fast.post_processor = _template([], [])
    elif kind == "CodeLlamaTokenizer":
        begin = _with_id(fast, settings, "bos_token")
        fast.post_processor = _template([begin] if begin else [], [])
    elif kind in ("BertTokenizer", "RobertaTokenizer"):
        separator, front = _with_id(fast, settings, "sep_token"), _with_id(fast, settings, "cls_token")
        if separator is None or front is None:
            raise CheckpointError(f"tokenizer_config.json: {kind} needs a cls_token and a sep_token.", param="sep_token")
        if kind == "BertTokenizer":
            fast.post_processor = _template([front], [separator])
        else:
            spaces, trims = config.get("add_prefix_space") is True, config.get("trim_offsets") is not False
            fast.post_processor = processors.RobertaProcessing(separator, front, trim_offsets=trims, add_prefix_space=spaces)


def _with_id(fast: FastTokenizer, settings: TokenSettings, name: str) -> tuple[str, int] | None:
    text = settings.text(name)
    token = fast.token_to_id(text) if text is not None else None
    return None if text is None or token is None else (text, token)


def _template(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> Any:
    single = [*(f"{text}:0" for text, _ in before), "$A:0", *(f"{text}:0" for text, _ in after)]
    return processors.TemplateProcessing(single=single, special_tokens=[*before, *after])


MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
MISTRAL_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def mend_mistral(fast: FastTokenizer, config: Mapping[str, Any], model: Mapping[str, Any] | None) -> None:
    """`fix_mistral_regex` of tokenizer_config.json: another split in large vocabularies of Mistral's that transformers 4 has written, by
    config.json (None: there is none, and nothing to mend)."""
    if config.get("fix_mistral_regex") is not True or model is None or model.get("model_type") not in (None, *MISTRALS):
        return
    version = model.get("transformers_version")
    major = version.split(".")[0] if isinstance(version, str) else "0"
    old = not major.isdecimal() or int(major) < 5
    before = fast.pre_tokenizer
    if not old or before is None or fast.get_vocab_size() <= 100_000:
        return
    split = pre_tokenizers.Split(Regex(MISTRAL_SPLIT), behavior="isolated")
    if isinstance(before, pre_tokenizers.Sequence):
        before[0] = split
        fast.pre_tokenizer = before
        return
    if isinstance(before, pre_tokenizers.Metaspace):
        before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, before])
