"""Streaming by concatenation: whatever the tokens, the pieces joined are the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.detokenizer import ByteDecoder, TokenTable, WindowDecoder


def stream(decoder: Any, ids: list[int]) -> list[str]:
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), skip=st.booleans())
def test_any_text_streams_to_itself(tokenizer: Any, text: str, skip: bool) -> None:
    [ids] = tokenizer.encode_batch([text], add_special_tokens=False)
    table = TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=skip)
    pieces = stream(ByteDecoder(table), ids.tolist())
    assert "".join(pieces) == tokenizer.decode(ids.tolist(), skip_special_tokens=skip)
    if not any(mark in text for mark in ("<|", "\ufffd")):
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_tokens_stream_to_their_decoding(tokenizer: Any, data: st.DataObject, skip: bool) -> None:
    """Also those that are no valid UTF-8: replacement characters come where the whole decoding has them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    table = TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=skip)
    decoder = ByteDecoder(table)
    pieces = []
    for token in ids:
        pieces.append(decoder.feed(token))
        assert len(decoder.pending) <= 3
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + decoder.flush() == whole
    assert ByteDecoder(table).feed_all(ids) + "" == "".join(pieces)


def test_a_code_point_is_never_cut(tokenizer: Any) -> None:
    [ids] = tokenizer.encode_batch(["\U0001f9ff"], add_special_tokens=False)
    assert len(ids) > 1
    decoder = ByteDecoder(TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=True))
    pieces = [decoder.feed(token) for token in ids.tolist()]
    assert pieces == [""] * (len(ids) - 1) + ["\U0001f9ff"]
    assert decoder.flush() == ""
    decoder.feed(int(ids[0]))
    assert decoder.flush() == "\ufffd"


def test_added_tokens_keep_their_text(tokenizer: Any) -> None:
    call = tokenizer._fast.token_to_id("<tool call>")
    assert tokenizer.token_bytes(call) == b"<tool call>"
    assert tokenizer.is_byte_exact()
    end = tokenizer.eos_ids[0]
    assert TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=True).texts[end] == ""
    assert TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=False).texts[end] == "<|im_end|>"


def test_padding_rows_of_the_vocabulary_have_no_text(tokenizer: Any) -> None:
    table = TokenTable.of(tokenizer, tokenizer.vocab_size + 5, skip_special=False)
    assert ByteDecoder(table).feed(tokenizer.vocab_size + 4) == ""


@pytest.mark.parametrize("text", ["the water", "water at the water", "é water", "the 🙂 at", "a  b   c"])
def test_sentencepiece_chains_are_byte_exact_after_a_prompt(spm: Any, text: str) -> None:
    """Prompt and output are one text: the output keeps the space that it begins with, and byte tokens make code points."""
    assert spm.is_byte_exact()
    [prompt] = spm.encode_batch(["at"], add_special_tokens=False)
    [ids] = spm.encode_batch([text], add_special_tokens=False)
    table = TokenTable.of(spm, spm.vocab_size, skip_special=True)
    pieces = stream(ByteDecoder(table), ids.tolist())
    both = spm.decode([*prompt.tolist(), *ids.tolist()], skip_special_tokens=True)
    assert "at" + "".join(pieces) == both
    assert "".join(pieces) == " " + text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_windows_give_the_whole_decoding(pieces: Any, data: st.DataObject) -> None:
    """Word pieces depend on their neighbours; a window of a few tokens is enough to say what each adds."""
    assert not pieces.is_byte_exact()
    ids = data.draw(st.lists(st.integers(3, pieces.vocab_size - 1), min_size=2, max_size=40))
    cut = data.draw(st.integers(1, len(ids) - 1))
    decoder = WindowDecoder(pieces, ids[:cut], skip_special=True)
    streamed = "".join(stream(decoder, ids[cut:]))
    prompt = pieces.decode(ids[:cut], skip_special_tokens=True)
    assert prompt + streamed == pieces.decode(ids, skip_special_tokens=True)


def test_a_token_costs_the_same_however_long_the_output_is(tokenizer: Any, pieces: Any) -> None:
    """Counted in bytes and tokens touched, not in time."""

    class CountingBytes(list[bytes]):
        touched = 0

        def __getitem__(self, index: Any) -> Any:
            CountingBytes.touched += 1
            return super().__getitem__(index)

    table = TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=True)
    table.data = CountingBytes(table.data)
    decoder = ByteDecoder(table)
    ids = [(7 * i) % tokenizer.vocab_size for i in range(65536)]
    for token in ids:
        decoder.feed(token)
    assert CountingBytes.touched == len(ids)

    class CountingTokenizer:
        decoded = 0

        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            CountingTokenizer.decoded += len(ids)
            return str(pieces.decode(ids, skip_special_tokens=skip_special_tokens))

    window = WindowDecoder(CountingTokenizer(), ids[:6], skip_special=True)  # type: ignore[arg-type]
    most = 0
    for index in range(4096):
        before = CountingTokenizer.decoded
        window.feed(ids[index] % pieces.vocab_size)
        most = max(most, CountingTokenizer.decoded - before)
    assert most <= 2 * (WindowDecoder.CONTEXT + 2 * WindowDecoder.PATIENCE)
