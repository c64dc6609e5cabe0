"""Where prompt tokens begin in the prompt's text: by property over several kinds of tokenizers, and what an echo shows of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.detokenizer import TokenTable
from penstock.core.actors.text.offsets import prompt_offsets
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import seq_of
from penstock.core.protocol.sampling import SamplingParams

TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(["the water", " ", "é", "中", "\U0001f9ff", "東京", "<|bos|>", "<|im_end|>", "<s>", "<tool call>", "\n", "a"]),
    max_size=12,
).map("".join)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["tokenizer", "spm", "pieces"])
def kind(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, list[bytes]]:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return request.param, tokenizer, TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=False).data


def check(name: str, tokenizer: Tokenizer, data: list[bytes], ids: list[int], text: str) -> None:
    offsets = prompt_offsets(ids, text, data, tokenizer.special_ids)
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    if name != "tokenizer":
        return
    # Byte-level: what is a whole character stands where its offset says, and each token's bytes are at its place.
    ends = [*offsets[1:], len(text)]
    for token, offset, end in zip(ids, offsets, ends, strict=False):
        try:
            piece = data[token].decode()
        except UnicodeDecodeError:
            continue
        if token in tokenizer.special_ids and end == offset:
            continue  # not written in this text
        assert text[offset : offset + len(piece)] == piece


@QUICK
@given(text=TEXT, special=st.booleans())
@example(text="Three é", special=False)
@example(text="中", special=False)
@example(text="<|bos|>x<|bos|>", special=False)
@example(text="hi <s> there", special=True)
def test_offsets_of_an_encoded_text(kind: tuple[str, Tokenizer, list[bytes]], text: str, special: bool) -> None:
    name, tokenizer, data = kind
    ids = tokenizer.encode_batch([text], add_special_tokens=special)[0].tolist()
    check(name, tokenizer, data, ids, text)
    if special and tokenizer.bos_id is not None and (not ids or ids[0] != tokenizer.bos_id):
        check(name, tokenizer, data, [tokenizer.bos_id, *ids], text)


@QUICK
@given(draw=st.data())
def test_offsets_of_any_ids(kind: tuple[str, Tokenizer, list[bytes]], draw: st.DataObject) -> None:
    name, tokenizer, data = kind
    ids = draw.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    offsets = prompt_offsets(ids, text, data, tokenizer.special_ids)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    if name == "tokenizer":
        for token, offset in zip(ids, offsets, strict=True):
            if token not in tokenizer.special_ids and (piece := data[token].decode("utf-8", "replace")).isascii():
                # Characters that this token cuts off are shown where they began.
                assert text[offset:].lstrip("\ufffd").startswith(piece)


def test_words_are_found_in_any_kind(kind: tuple[str, Tokenizer, list[bytes]]) -> None:
    name, tokenizer, data = kind
    text = "the water the water"
    ids = tokenizer.encode_batch([text], add_special_tokens=False)[0].tolist()
    offsets = prompt_offsets(ids, text, data, tokenizer.special_ids)
    for token, offset in zip(ids, offsets, strict=True):
        assert text[offset:].lstrip().startswith(data[token].decode().strip()), name


def test_tokens_of_one_character_share_its_place() -> None:
    data = [b"a", *(bytes([byte]) for byte in "中".encode()), b"<s>"]
    assert prompt_offsets([4, 0, 1, 2, 3, 0], "a中a", data, frozenset({4})) == [0, 0, 1, 1, 1, 2]
    assert prompt_offsets([1, 2, 0, 3], "\ufffda\ufffd", data, frozenset({4})) == [0, 0, 0, 2]
    assert prompt_offsets([4, 0, 4], "<s>a<s>", data, frozenset({4})) == [0, 3, 4]


def test_an_echo_with_logprobs_brings_the_first_token_and_the_offsets(bench: Any) -> None:
    ids = bench.tokenizer.encode_batch(["Three \U0001f9ff é"], add_special_tokens=False)[0].tolist()
    bench.submit(1, "Three \U0001f9ff é", echo=True, sampling=SamplingParams(max_tokens=1, prompt_logprobs=1))
    bench.submit(2, echo=True, prompt_ids=i32(ids), sampling=SamplingParams(max_tokens=1, prompt_logprobs=1))
    bench.submit(3, echo=True, prompt_ids=i32(ids))
    for key in (1, 2, 3):
        bench.scripts[seq_of(key, 0)] = ids[:1]
    bench.run()
    first, second, bare = (bench.received[key, 0].extras[0] for key in (1, 2, 3))
    assert first.prompt_first == second.prompt_first == bench.tokenizer.token_bytes(ids[0])
    assert first.prompt_offsets == second.prompt_offsets
    assert (len(first.prompt_offsets), first.prompt_offsets[0], first.prompt_offsets[-1]) == (len(ids), 0, 8)
    assert (bare.prompt_first, bare.prompt_offsets) == (b"", [])
