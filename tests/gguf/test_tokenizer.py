"""Tokenizers and chat templates of GGUF files: token by token what the originals say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_kit import CONTROL, NORMAL, UNUSED, USER, convert, set_fields, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from penstock.core.protocol.errors import CheckpointError, InvalidRequest, PenstockError, UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.renderers.gguf import load as load_renderer
from penstock.plugins.renderers.jinja import JinjaRenderer
from penstock.plugins.tokenizers.gguf import SPLITS, load
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; I'll say WE'LL go.",
    "  two  spaces\tand\n\nlines \r\n  end   ",
    "naïve café — \u0041\u030a Ångström ﬁ 日本語テスト ½ ²³ 漢字、かな。",
    "def f(x):\n    return x**2 + 1000000 // 3  # comment\n",
    "👩‍👩‍👧‍👦 emoji \U0001f1e9\U0001f1ea <|bos|>x<|end|> <unk> </s> <b>",
    "camelCaseWord ALLCAPS mixedCASE123abc a/b//c\n\n/",
]
ANY_TEXT = st.text(
    alphabet=st.one_of(st.sampled_from(" \n\tabcXYZ019'.,/<|>_ßé日☃"), st.characters(exclude_categories=["Cs"])), max_size=40
)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, fields: dict[str, Any], **over: Any) -> str:
    """A file of nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    set_fields(writer, fields, {f"tokenizer.ggml.{key}": value for key, value in over.items()})
    write(writer)
    return str(path)


@pytest.fixture(scope="module")
def brook(tmp_path_factory: pytest.TempPathFactory) -> tuple[HuggingFaceTokenizer, HuggingFaceTokenizer, str]:
    """(the folder's, the file's, the file)."""
    path = str(convert(demo_folder(), tmp_path_factory.mktemp("brook") / "brook.gguf", "BF16"))
    return HuggingFaceTokenizer.load(str(demo_folder())), load(path), path


def same(one: HuggingFaceTokenizer, other: HuggingFaceTokenizer, texts: list[str]) -> None:
    for special in (False, True):
        a, b = (t.encode_batch(texts, add_special_tokens=special) for t in (one, other))
        assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_brook_is_brook(brook: Any) -> None:
    original, found, _ = brook
    same(original, found, TEXTS)
    assert (found.vocab_size, found.bos_id) == (original.vocab_size, original.bos_id)
    assert found.special_ids == original.special_ids
    assert found.is_byte_exact()
    for token in range(original.vocab_size):
        assert found.token_bytes(token) == original.token_bytes(token)
        assert found.token_text(token) == original.token_text(token)
    ids = original.encode_batch([TEXTS[2]], add_special_tokens=False)[0].tolist()
    assert found.decode(ids, skip_special_tokens=True) == TEXTS[2]
    assert found.eos_ids == [7]
    assert found.name == "brook"
    assert found.info()["eos_token"] == "<|end|>"


@QUIET
@given(text=ANY_TEXT)
def test_brook_is_brook_for_any_text(brook: Any, text: str) -> None:
    same(brook[0], brook[1], [text])


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "llama-bpe": CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL,
    "qwen2": CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL,
    "tekken": CASES,
}
"""As the tokenizer.json of these families have them."""


def reference(pre: str) -> Tokenizer:
    """A small tokenizer as the family's tokenizer.json makes it, trained on TEXTS."""
    fast = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pre in PATTERNS:
        first = [pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated")]
    fast.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS)])
    if pre == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=["<|a|>", "<|b|>"]
    )
    fast.train_from_iterator(TEXTS * 3, trainer)
    return fast


def fields_from(fast: Tokenizer, pre: str) -> dict[str, Any]:
    described = json.loads(fast.to_str())
    ids = {token: text for text, token in fast.get_vocab().items()}
    special = {item["id"] for item in described["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids[i] for i in range(len(ids))],
        "tokenizer.ggml.token_type": [CONTROL if i in special else NORMAL for i in range(len(ids))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": fast.token_to_id("<|a|>"),
        "tokenizer.ggml.eos_token_id": fast.token_to_id("<|b|>"),
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smollm", "gpt-2"])
def test_splits_are_those_of_the_families(tmp_path: Path, pre: str) -> None:
    fast = reference(pre)
    found = load(written(tmp_path / "x.gguf", fields_from(fast, pre)))

    @QUIET
    @given(text=ANY_TEXT)
    def alike(text: str) -> None:
        (ids,) = found.encode_batch([text], add_special_tokens=False)
        assert ids.tolist() == fast.encode(text, add_special_tokens=False).ids

    for text in TEXTS:
        alike.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    alike()


def test_the_default_split_cuts_digits_by_threes_and_signs_apart(tmp_path: Path) -> None:
    found = load(written(tmp_path / "x.gguf", fields_from(reference("gpt-2"), "default")))
    pieces = [piece for piece, _ in found._fast.pre_tokenizer.pre_tokenize_str("It's 12345, no?!")]
    assert pieces == ["It", "'", "s", "Ġ", "123", "45", ",", "Ġno", "?!"]


def test_all_names_of_splits_load(tmp_path: Path) -> None:
    fields = fields_from(reference("gpt-2"), "gpt-2")
    for pre in SPLITS:
        load(written(tmp_path / f"{pre}.gguf", fields, pre=pre))
    load(written(tmp_path / "none.gguf", fields, pre=None))


@pytest.mark.parametrize(
    ("pre", "flags", "around"),
    [
        ("llama-bpe", {}, ([0], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("qwen2", {}, ([], [])),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
    ],
)
def test_prompts_begin_and_end_as_the_file_says(tmp_path: Path, pre: str, flags: dict[str, bool], around: Any) -> None:
    found = load(written(tmp_path / "x.gguf", fields_from(reference(pre), pre), **flags))
    plain, with_special = (found.encode_batch(["ab"], add_special_tokens=special)[0].tolist() for special in (False, True))
    assert with_special == [*around[0], *plain, *around[1]]


def test_ends_of_answers(tmp_path: Path) -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>", "<turn>", "<|im_end|>", "<|eom_id|>", "<eom>"],
        "tokenizer.ggml.token_type": [NORMAL, NORMAL, NORMAL, CONTROL, CONTROL, CONTROL, UNUSED, CONTROL],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 7,
    }
    assert load(written(tmp_path / "x.gguf", fields)).eos_ids == [3, 4, 7, 5]


# --- tokens with scores

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "aa", "aaa", "▁▁", "▁▁▁▁", "ca", "▁b", "bb"]
SCORES = [-50.0, -60.0, -61.0, -62.0, -1.0, -2.0, -3.0, -9.0, -5.0, -4.0, -7.0, -6.5, -8.0, -10.0, -11.0, -12.0]


def scored_fields() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<b>", "[INST]"]
    kinds = [2, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * len(PIECES), USER, CONTROL]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + SCORES + [0.0, 0.0],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def by_scores(text: str, prefix: bool) -> list[int]:
    """What SentencePiece's BPE makes of a text without special tokens: the neighbours with the best score are joined, the first of equal ones."""
    tokens = scored_fields()["tokenizer.ggml.tokens"]
    score = dict(zip(PIECES, SCORES, strict=True))
    parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
    while True:
        best = max(((score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score), default=None)
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [tokens.index(part)] if part in score else [3 + byte for byte in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_are_obeyed(tmp_path: Path, prefix: bool) -> None:
    found = load(written(tmp_path / "x.gguf", scored_fields(), add_space_prefix=prefix))
    assert found.is_byte_exact()

    @settings(max_examples=400, deadline=None)
    @given(text=st.text(alphabet="aabbc  é☃", max_size=16))
    def alike(text: str) -> None:
        (ids,) = found.encode_batch([text], add_special_tokens=False)
        assert ids.tolist() == by_scores(text, prefix)
        assert b"".join(found.token_bytes(token) for token in ids.tolist()).decode() == (" " if prefix and text else "") + text

    alike()
    assert found.encode_batch(["a"], add_special_tokens=True)[0].tolist() == [1, *by_scores("a", prefix)]


def test_text_after_special_tokens_begins_with_a_blank(tmp_path: Path) -> None:
    found = load(written(tmp_path / "x.gguf", scored_fields()))
    tokens = scored_fields()["tokenizer.ggml.tokens"]
    (ids,) = found.encode_batch(["<s>[INST] ab<b>b</s>"], add_special_tokens=False)
    assert [tokens[i] for i in ids] == ["<s>", "[INST]", "▁", "▁ab", "<b>", "▁b", "</s>"]
    assert found.special_ids == {0, 1, 2, len(tokens) - 1}


# --- what is wrong


@pytest.mark.parametrize(
    ("over", "kind", "said"),
    [
        ({"model": "bert"}, UnsupportedFeature, "'tokenizer.ggml.model' 'bert' is not supported yet, only 'gpt2' and 'llama'"),
        ({"model": None}, CheckpointError, "'tokenizer.ggml.model' is missing"),
        ({"pre": "klingon"}, UnsupportedFeature, "'tokenizer.ggml.pre' 'klingon' is a split that is not known here, only default, "),
        ({"pre": 3}, CheckpointError, "'tokenizer.ggml.pre' must be a text, but is 3"),
        ({"tokens": None}, CheckpointError, "'tokenizer.ggml.tokens' is missing"),
        ({"tokens": [1, 2]}, CheckpointError, "'tokenizer.ggml.tokens' must be a list of texts"),
        ({"tokens": ["a", "b", "a"]}, CheckpointError, "has 'a' twice, as 0 and 2"),
        ({"tokens": ["a", "b" * 5000]}, CheckpointError, "holds a token of 5000 characters, as 1"),
        ({"token_type": [1, 1]}, CheckpointError, r"'tokenizer.ggml.token_type' must hold a number for each of the \d+ tokens"),
        ({"merges": None}, CheckpointError, "'tokenizer.ggml.merges' is missing"),
        ({"merges": ["ab"]}, CheckpointError, "must hold pairs with one blank between them, but merge 0 is 'ab'"),
        ({"merges": ["! nothing"]}, CheckpointError, "holds '! nothing' as merge 0, and these or what they make are no tokens"),
        ({"merges": ["! ~"]}, CheckpointError, "holds '! ~' as merge 0, and these or what they make are no tokens"),
        ({"bos_token_id": 100000}, CheckpointError, r"'tokenizer.ggml.bos_token_id' must be one of the \d+ tokens, but is 100000"),
        ({"add_bos_token": 1}, CheckpointError, "'tokenizer.ggml.add_bos_token' must be true or false, but is 1"),
        ({"add_bos_token": True, "bos_token_id": None}, CheckpointError, "'tokenizer.ggml.bos_token_id' is missing, which"),
        ({"remove_extra_whitespaces": True}, UnsupportedFeature, "'tokenizer.ggml.remove_extra_whitespaces' is not supported yet"),
        (
            {"precompiled_charsmap": [1, 2]},
            UnsupportedFeature,
            "'tokenizer.ggml.precompiled_charsmap' is there, which is not supported yet",
        ),
        ({"add_space_prefix": True}, UnsupportedFeature, "'tokenizer.ggml.add_space_prefix' is not supported yet"),
    ],
)
def test_what_is_wrong_names_the_field(tmp_path: Path, over: dict[str, Any], kind: type[PenstockError], said: str) -> None:
    fields = fields_from(reference("gpt-2"), "gpt-2")
    with pytest.raises(kind, match=said) as caught:
        load(written(tmp_path / "x.gguf", fields, **over))
    assert "x.gguf" in caught.value.message


def test_scores_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'tokenizer\.ggml\.scores' is missing"):
        load(written(tmp_path / "x.gguf", scored_fields(), scores=None))


# --- templates

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
PLAIN: dict[str, Any] = {"tools": None, "add_generation_prompt": True, "continue_final_message": False, "kwargs": {}}


def test_the_template_is_the_files(brook: Any) -> None:
    found, original = load_renderer(brook[2], None), JinjaRenderer.load(str(demo_folder()), None)
    assert found.render(MESSAGES, **PLAIN) == original.render(MESSAGES, **PLAIN)
    assert (
        load_renderer(brook[2], "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}").render(MESSAGES[1:], **PLAIN)
        == "<|bos|><|end|>Hi"
    )


def test_named_templates_and_none(tmp_path: Path) -> None:
    fields = fields_from(reference("gpt-2"), "gpt-2")
    named = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]}
    found = load_renderer(written(tmp_path / "x.gguf", fields | named), None)
    assert found.render(MESSAGES, **PLAIN) == "plain"
    assert found.render(MESSAGES, **{**PLAIN, "tools": [{"type": "function", "function": {"name": "f"}}]}) == "tools"
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_renderer(written(tmp_path / "y.gguf", fields), None).render(MESSAGES, **PLAIN)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer.chat_template": 3}, "the chat template 'default' is no text"),
        ({"tokenizer.chat_templates": ["rag"]}, "'tokenizer.chat_template.rag' is missing, which 'tokenizer.chat_templates' names"),
        ({"tokenizer.chat_templates": [1]}, "'tokenizer.chat_templates' must be a list of texts"),
        ({"tokenizer.chat_template": "{% if %}"}, r"The chat template 'default' in .*x\.gguf is not valid Jinja"),
    ],
)
def test_wrong_templates_are_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "x.gguf", fields_from(reference("gpt-2"), "gpt-2") | fields)
    with pytest.raises(CheckpointError, match=said):
        load_renderer(path, None)
