"""The tokenizer in a GGUF file, made by the tokenizers library.

What it is: byte-level BPE ("gpt2") with the splits of the families that are served, by the name that the file gives the split (`pre`), and BPE by scores with
byte fallback ("llama", as SentencePiece has it), whose merges are the pairs that make a token, the best token first. A split that is not known is
refused by name: with another one the ids would be wrong. In a "llama" each piece of text after a special token begins with a blank, as in llama.cpp.
What it does not know: the container, chat templates, weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from penstock.core.protocol.errors import CheckpointError, PenstockError, described, tamed
from penstock.plugins.gguf.container import GgufFile, shown
from penstock.plugins.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER, Vocabulary
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer
from penstock.plugins.tokenizers.rebuild import MISTRAL_SPLIT, QWEN2_SPLIT, SPACE

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
OLD_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""One after the other: what files mean that name no split of their own."""


class Split(NamedTuple):
    """How a byte-level tokenizer takes a text apart before it merges."""

    steps: Callable[[], list[Any]]
    plain: bool = True
    """The steps are all; else GPT-2's own split follows."""
    composed: bool = False
    """Texts are brought to the form NFC first."""
    whole: bool = False
    """A piece that is a token is it, whatever the merges say."""
    begins: bool = False
    """Prompts get a begin token unless the file says otherwise."""


def _by(*patterns: str) -> Callable[[], list[Any]]:
    return lambda: [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]


_LLAMA3 = Split(_by(LLAMA3_SPLIT), whole=True, begins=True)
_QWEN2 = Split(_by(QWEN2_SPLIT), composed=True)
_GPT2 = Split(list, plain=False)
SPLITS = {
    "default": Split(_by(*OLD_SPLITS)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(composed=False),
    "tekken": Split(_by(MISTRAL_SPLIT), whole=True, begins=True),
    "smollm": Split(lambda: [pre_tokenizers.Digits(individual_digits=True)], plain=False),
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
}
"""Names in `tokenizer.ggml.pre`."""


def load(model_path: str) -> HuggingFaceTokenizer:
    """Raises CheckpointError naming the field, UnsupportedFeature for a tokenizer that is not known here."""
    vocabulary = Vocabulary(GgufFile(model_path))
    try:
        fast = _fast(vocabulary)
    except PenstockError:
        raise
    except BaseException as error:  # the library raises plain Exception, and panics
        why = described(tamed(error), 200)
        raise CheckpointError(f"{vocabulary.file.name}: its tokenizer cannot be made: {why}.", param=vocabulary.key("model")) from None
    config = {**vocabulary.special(), "tokenizer_class": f"GGUF {vocabulary.model}"}
    return HuggingFaceTokenizer(fast, config, vocabulary.ends(), Path(model_path).stem)


def _fast(vocabulary: Vocabulary) -> FastTokenizer:
    for name in ("remove_extra_whitespaces", "add_sep_token"):
        if vocabulary.flag(name, False):
            raise vocabulary.refuse(name, "is not supported yet.")
    if vocabulary.key("precompiled_charsmap") in vocabulary.file.fields:
        raise vocabulary.refuse("precompiled_charsmap", "is there, which is not supported yet.")
    if vocabulary.model == "gpt2":
        fast, begins = _byte_level(vocabulary)
    elif vocabulary.model == "llama":
        fast, begins = _scored(vocabulary), True
    else:
        raise vocabulary.refuse("model", f"{shown(vocabulary.model)} is not supported yet, only 'gpt2' and 'llama'.")
    special = [(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER)]
    fast.add_tokens([AddedToken(token, special=kind != USER, normalized=False) for token, kind in special])
    _ends_of_prompts(fast, vocabulary, begins)
    return fast


def _byte_level(vocabulary: Vocabulary) -> tuple[FastTokenizer, bool]:
    pre = vocabulary.text("pre", "default")
    split = SPLITS.get(pre)
    if split is None:
        raise vocabulary.refuse("pre", f"{shown(pre)} is a split that is not known here, only {', '.join(SPLITS)}.")
    if vocabulary.flag("add_space_prefix", False):
        raise vocabulary.refuse("add_space_prefix", "is not supported yet in a byte-level tokenizer.")
    fast = FastTokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=split.whole))
    if split.composed:
        fast.normalizer = normalizers.NFC()
    steps = [*split.steps(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.plain)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(steps)
    fast.decoder = decoders.ByteLevel()
    return fast, split.begins


def _scored(vocabulary: Vocabulary) -> FastTokenizer:
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.token("unknown")
    fast = FastTokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_of_scores(vocabulary),
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.kinds,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return fast


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the token with the highest score first. Of one token's pairs, those with the earlier tokens first."""
    ids, scores = vocabulary.ids, vocabulary.scores()
    usable = {token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in (NORMAL, USER)}
    pairs: list[tuple[float, int, int, str, str]] = []
    for token in usable:
        if vocabulary.kinds[ids[token]] != NORMAL:
            continue
        score = scores[ids[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                pairs.append((-score, ids[left], ids[right], left, right))
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]


def _ends_of_prompts(fast: FastTokenizer, vocabulary: Vocabulary, begins: bool) -> None:
    """A begin token before each prompt, an end token behind it, as the file says."""
    parts = []
    for name, flag in (("bos", vocabulary.flag("add_bos_token", begins)), ("eos", vocabulary.flag("add_eos_token", False))):
        token = vocabulary.token(name)
        if flag and token is None:
            raise vocabulary.wrong(f"{name}_token_id", f"is missing, which '{vocabulary.key(f'add_{name}_token')}' asks for")
        parts.append([(vocabulary.tokens[token], token)] if flag and token is not None else [])
    before, after = parts
    if before or after:
        single = [*(f"{text}:0" for text, _ in before), "$A:0", *(f"{text}:0" for text, _ in after)]
        fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*before, *after])
