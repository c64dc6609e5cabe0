"""What transformers' tokenizers take and ours does not is refused by its name, never with a TypeError; what asks for nothing is let through."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.actors.text.tokenizing import LLMTokenizer
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> LLMTokenizer:
    return LLMTokenizer(HuggingFaceTokenizer.load(str(demo_folder())), object())  # type: ignore[arg-type]


ASKED: list[dict[str, Any]] = [
    {"return_tensors": "pt"},
    {"truncation": True, "max_length": 3},
    {"padding": "max_length"},
    {"text_pair": "b"},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda one: next(iter(one)))
def test_what_is_asked_for_is_refused_by_name(tokenizer: LLMTokenizer, asked: dict[str, Any]) -> None:
    name = "max_length" if "max_length" in asked else next(iter(asked))
    for call in (tokenizer, tokenizer.encode):
        with pytest.raises(UnsupportedFeature, match=name):
            call("a", **asked)
    if "text_pair" not in asked:
        with pytest.raises(UnsupportedFeature, match=name):
            tokenizer.batch_encode(["a"], **asked)


def test_what_asks_for_nothing_is_let_through(tokenizer: LLMTokenizer) -> None:
    nothing: dict[str, Any] = {"return_tensors": None, "truncation": False, "padding": False}
    assert tokenizer("a lock", **nothing).input_ids == tokenizer.encode("a lock", None, **nothing) == tokenizer.encode("a lock")


def test_spellings_without_special_tokens(tokenizer: LLMTokenizer) -> None:
    ids = tokenizer.encode("a lock", add_special_tokens=False)
    special = tokenizer.all_special_ids[0]
    assert tokenizer.convert_ids_to_tokens([special, *ids], skip_special_tokens=True) == tokenizer.convert_ids_to_tokens(ids)
    assert len(tokenizer.convert_ids_to_tokens([special, *ids])) == len(ids) + 1
