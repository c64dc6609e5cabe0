"""What transformers' tokenizers take: it means the same here, or it is refused by its name, never with a TypeError; what asks for nothing is let through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from penstock.core.actors.text.careful import CarefulTokenizer
from penstock.core.actors.text.tokenizing import LLMTokenizer
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.renderers.jinja import JinjaRenderer
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

TEXTS = ["Hello there, the water is cold", "a lock", "", "naïve café 🙂", "<|end|> in a text"]


def small_bpe(folder: Path) -> Path:
    """Byte-level, with a begin and an end token around each text, and a longest text."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(["the water is cold and the lock is old, hello there"] * 3, trainer)
    fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 0), ("<|end|>", 1)])
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=24, padding_side="left", **names).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module", params=["demo", "bpe"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLMTokenizer, Any]:
    folder = demo_folder() if request.param == "demo" else small_bpe(tmp_path_factory.mktemp("bpe"))
    mine = LLMTokenizer(CarefulTokenizer(HuggingFaceTokenizer.load(str(folder))), object())  # type: ignore[arg-type]
    return mine, AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer() -> LLMTokenizer:
    folder = str(demo_folder())
    return LLMTokenizer(CarefulTokenizer(HuggingFaceTokenizer.load(folder)), JinjaRenderer.load(folder, None))


def same(mine: Any, theirs: Any) -> bool:
    return json.loads(json.dumps(dict(mine))) == json.loads(json.dumps(dict(theirs)))


# --- the same as transformers


MEANT: list[dict[str, Any]] = [
    {},
    {"add_special_tokens": False},
    {"truncation": True, "max_length": 4},
    {"truncation": True, "max_length": 4, "add_special_tokens": False},
    {"max_length": 3},
    {"truncation": "longest_first", "max_length": 5},
    {"truncation": "only_first", "max_length": 2},
    {"truncation": True},
    {"truncation": "do_not_truncate", "padding": "do_not_pad"},
    {"padding": True},
    {"padding": "longest", "padding_side": "left"},
    {"padding": "longest", "padding_side": "right"},
    {"padding": True, "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 12},
    {"padding": "max_length", "max_length": 3},
    {"padding": "max_length", "max_length": 7, "truncation": True},
    {"padding": "max_length"},
    {"return_attention_mask": False, "padding": True},
    {"return_token_type_ids": True, "padding": True},
    {"return_length": True, "padding": True},
    {"verbose": False, "stride": 0},
]


@pytest.mark.parametrize("asked", MEANT, ids=lambda one: " ".join(f"{name}={value}" for name, value in one.items()) or "nothing")
def test_encodings_are_those_of_transformers(both: tuple[LLMTokenizer, Any], asked: dict[str, Any]) -> None:
    mine, theirs = both
    assert same(mine(TEXTS, **asked), theirs(TEXTS, **asked))
    assert mine.batch_encode_plus(TEXTS, **asked) == mine(TEXTS, **asked)
    assert mine.batch_encode(TEXTS, **asked) == theirs(TEXTS, **asked)["input_ids"]
    for text in TEXTS:
        one, other = dict(mine(text, **asked)), dict(theirs(text, **asked))
        one.pop("length", None), other.pop("length", None)  # theirs is a list of one
        assert same(one, other)
        assert mine.encode_plus(text, **asked).input_ids == one["input_ids"]
        assert mine.encode(text, **asked) == theirs.encode(text, **asked)


def test_a_cut_on_the_left_is_that_of_transformers(both: tuple[LLMTokenizer, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = both
    for one in both:
        monkeypatch.setattr(one, "truncation_side", "left")
    for length in (2, 3, 6):
        assert same(mine(TEXTS, truncation=True, max_length=length), theirs(TEXTS, truncation=True, max_length=length))


PADDED: list[tuple[Any, dict[str, Any]]] = [
    ({"input_ids": [[1, 2, 3], [4]]}, {}),
    ({"input_ids": [1, 2, 3]}, {"max_length": 5, "padding": "max_length"}),
    ({"input_ids": [1, 2, 3]}, {"pad_to_multiple_of": 8}),
    ([{"input_ids": [1, 2, 3], "labels": [1]}, {"input_ids": [4], "labels": [2]}], {"padding_side": "left"}),
    (
        {
            "input_ids": [[1, 2, 3], [4]],
            "attention_mask": [[1, 1, 1], [1]],
            "token_type_ids": [[0, 0, 0], [0]],
            "special_tokens_mask": [[0, 0, 0], [0]],
        },
        {},
    ),
    ({"input_ids": [[1, 2, 3], [4]]}, {"return_attention_mask": False}),
]


@pytest.mark.parametrize(("given", "how"), PADDED)
def test_pad_is_that_of_transformers(both: tuple[LLMTokenizer, Any], given: Any, how: dict[str, Any]) -> None:
    mine, theirs = both
    found = mine.pad(json.loads(json.dumps(given)), **how)
    assert same(found, theirs.pad(json.loads(json.dumps(given)), **how))


def test_texts_and_spellings_are_those_of_transformers(both: tuple[LLMTokenizer, Any]) -> None:
    mine, theirs = both
    rows = theirs(TEXTS)["input_ids"]
    for ids in rows:
        for skip in (True, False):
            for clean in (None, True, False):
                wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
                assert mine.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean) == wanted
            assert mine.decode(np.array(ids, np.int64), skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert mine.convert_ids_to_tokens(ids, skip_special_tokens=skip) == theirs.convert_ids_to_tokens(ids, skip_special_tokens=skip)
        tokens = theirs.convert_ids_to_tokens(ids)
        assert mine.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
        assert mine.convert_tokens_to_ids(tokens) == ids
    assert mine.decode(rows) == mine.batch_decode(rows, clean_up_tokenization_spaces=False) == theirs.batch_decode(rows)
    assert mine.tokenize(TEXTS[0]) == theirs.tokenize(TEXTS[0])


def test_what_is_known_of_a_tokenizer_is_what_transformers_says(both: tuple[LLMTokenizer, Any]) -> None:
    mine, theirs = both
    for name in ("model_max_length", "padding_side", "truncation_side", "is_fast", "special_tokens_map"):
        assert (name, getattr(mine, name)) == (name, getattr(theirs, name))
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert (getattr(mine, name), getattr(mine, f"{name}_id")) == (getattr(theirs, name), getattr(theirs, f"{name}_id"))
    assert mine.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    assert mine.get_vocab() == theirs.get_vocab()
    assert len(mine) == len(theirs) == mine.vocab_size
    assert set(mine.all_special_ids) >= set(theirs.all_special_ids)  # theirs leaves out those that no configuration names
    assert set(mine.all_special_tokens) >= set(theirs.all_special_tokens)


CHAT = [{"role": "user", "content": "What is a lock?"}]
LONGER = [*CHAT, {"role": "assistant", "content": "A chamber with gates."}, {"role": "user", "content": "Thanks"}]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"truncation": True, "max_length": 5},
        {"padding": True},
        {"padding": "max_length", "max_length": 40},
        {"padding": True, "add_generation_prompt": True},
        {"return_assistant_tokens_mask": False, "sanitize_control_tokens": False, "return_tensors": None},
    ],
    ids=str,
)
def test_prompts_of_conversations_are_those_of_transformers(tokenizer: LLMTokenizer, asked: dict[str, Any]) -> None:
    theirs = AutoTokenizer.from_pretrained(str(demo_folder()))
    for conversation in (CHAT, [CHAT, LONGER]):
        for as_dict in (True, False):
            found = tokenizer.apply_chat_template(conversation, return_dict=as_dict, **asked)
            wanted = theirs.apply_chat_template(conversation, return_dict=as_dict, **asked)
            assert same(found, wanted) if as_dict else found == wanted
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT, tokenizer_kwargs={"padding": False})
    assert tokenizer.chat_template == theirs.chat_template


# --- refused by name


ASKED: list[dict[str, Any]] = [
    {"return_tensors": "pt"},
    {"text_pair": "b"},
    {"return_offsets_mapping": True},
    {"return_special_tokens_mask": True},
    {"is_split_into_words": True},
    {"stride": 3},
    {"no_such": 1},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda one: next(iter(one)))
def test_what_is_asked_for_is_refused_by_name(tokenizer: LLMTokenizer, asked: dict[str, Any]) -> None:
    name = next(iter(asked))
    for call in (tokenizer, tokenizer.encode, tokenizer.encode_plus, tokenizer.tokenize):
        with pytest.raises(UnsupportedFeature, match=name) as caught:
            call("a", **asked)
        assert caught.value.param == name
    if name not in ("text_pair", "no_such"):
        with pytest.raises(UnsupportedFeature, match=name):
            tokenizer.apply_chat_template(CHAT, **asked)
    if name != "text_pair":
        with pytest.raises(UnsupportedFeature, match=name):
            tokenizer.batch_encode(["a"], **asked)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"truncation": "sometimes"}, "truncation"),
    ({"truncation": "only_second"}, "truncation"),
    ({"padding": 3}, "padding"),
    ({"max_length": -1}, "max_length"),
    ({"max_length": "3"}, "max_length"),
    ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ({"padding": True, "padding_side": "up"}, "padding_side"),
    ({"max_length": 3, "truncation": False}, "max_length"),
]


@pytest.mark.parametrize(("asked", "name"), WRONG)
def test_what_cannot_be_meant_is_refused_by_name(tokenizer: LLMTokenizer, asked: dict[str, Any], name: str) -> None:
    for call in (lambda: tokenizer("a", **asked), lambda: tokenizer.apply_chat_template(CHAT, **asked)):
        with pytest.raises(InvalidRequest, match=name) as caught:
            call()
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: t.apply_chat_template(CHAT, return_assistant_tokens_mask=True), "return_assistant_tokens_mask"),
        (lambda t: t.apply_chat_template(CHAT, max_length=3), "max_length"),
        (lambda t: t.apply_chat_template(CHAT, tokenize=False, truncation=True, max_length=3), "max_length"),
        (lambda t: t.apply_chat_template(CHAT, tokenize=False, return_dict=True), "return_dict"),
        (lambda t: t.apply_chat_template(CHAT, tools=[len]), r"tools\[0\]"),
        (lambda t: t.decode([5], no_such=1), "no_such"),
        (lambda t: t.convert_tokens_to_string(["no such token at all"]), r"tokens\[0\]"),
        (lambda t: t.pad({"attention_mask": [1]}), "encoded_inputs"),
        (lambda t: t.pad([]), "encoded_inputs"),
        (lambda t: t.pad([{"input_ids": [1]}, {"ids": [1]}]), r"encoded_inputs\[1\]"),
        (lambda t: t.pad({"input_ids": [[1]], "attention_mask": [[1, 1]]}), "attention_mask"),
        (lambda t: t.encode_plus(["a"]), "text"),
        (lambda t: t.batch_encode_plus("a"), "batch_text_or_text_pairs"),
        (lambda t: t(b"a"), "text"),
    ],
)
def test_wrong_calls_are_refused_by_name(tokenizer: LLMTokenizer, call: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        call(tokenizer)
    assert caught.value.param


def test_what_asks_for_nothing_is_let_through(tokenizer: LLMTokenizer) -> None:
    nothing: dict[str, Any] = {"return_tensors": None, "truncation": False, "padding": False}
    assert tokenizer("a lock", **nothing).input_ids == tokenizer.encode("a lock", None, **nothing) == tokenizer.encode("a lock")


# --- the padding token, and tokenizers that fail


def test_a_tokenizer_without_a_padding_token_says_so_and_may_be_given_one() -> None:
    own = HuggingFaceTokenizer.load(str(demo_folder()))
    own._config = {name: value for name, value in own._config.items() if name != "pad_token"}
    mine = LLMTokenizer(CarefulTokenizer(own), object())  # type: ignore[arg-type]
    assert mine.pad_token is None
    with pytest.raises(InvalidRequest, match="no padding token"):
        mine(["a", "a longer one"], padding=True)
    with pytest.raises(InvalidRequest, match="pad_token"):
        mine.pad_token = "no such token at all"
    mine.pad_token = mine.eos_token
    assert mine(["a", "a longer one"], padding=True).input_ids[0][-1] == mine.eos_token_id == mine.pad_token_id


def test_what_a_tokenizer_raises_comes_as_a_request_would_see_it() -> None:
    class Odd:
        vocab_size, bos_id, eos_ids, special_ids, name, max_chars_per_token = 9, None, [0], frozenset({0}), "odd", 1
        encode_batch = token_text = decode = is_byte_exact = staticmethod(lambda *args, **kwargs: 1 / 0)
        info = staticmethod(dict)

    mine = LLMTokenizer(CarefulTokenizer(Odd()), object())  # type: ignore[arg-type]
    for call in (
        lambda: mine.encode("a"),
        lambda: mine(["a"]),
        lambda: mine.decode([1]),
        lambda: mine.convert_ids_to_tokens([1]),
        mine.get_vocab,
        lambda: mine.eos_token,
        lambda: mine.apply_chat_template(CHAT),
    ):
        with pytest.raises(PenstockError):
            call()


def test_spellings_without_special_tokens(tokenizer: LLMTokenizer) -> None:
    ids = tokenizer.encode("a lock", add_special_tokens=False)
    special = tokenizer.all_special_ids[0]
    assert tokenizer.convert_ids_to_tokens([special, *ids], skip_special_tokens=True) == tokenizer.convert_ids_to_tokens(ids)
    assert len(tokenizer.convert_ids_to_tokens([special, *ids])) == len(ids) + 1
