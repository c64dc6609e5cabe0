"""From tokens to text, a token at a time, byte for byte.

What it is: incremental decoders. `ByteDecoder` is for tokenizers whose text is the concatenation of their tokens' bytes (byte-level
BPE; sentencepiece with byte fallback, once a prompt stands in front): a table look-up, and an incremental UTF-8 decoder for tokens that
hold part of a code point. `WindowDecoder` is for all others: it decodes a short window of tokens twice and takes the difference
(the way of Hugging Face's text-generation-inference), bounded, so that a token costs O(1) whatever the length of the output.
Neither lets out part of a code point: U+FFFD stands for bytes that can no longer become one, or that the sequence ended in.
What it does not know: stop strings, requests, how a tokenizer works.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Any, Protocol

from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import I32

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def feed(self, token: int) -> str:
        """The text that this token makes certain ("" if it only begins a code point)."""
        ...

    def flush(self) -> str:
        """What the sequence's end makes certain."""
        ...


class TokenTable:
    """Bytes and, where they are whole code points, text of every token id; shared by all sequences.

    `data[i]` bytes; `texts[i]` str, or None if the bytes alone are not valid UTF-8. With `skip_special` special tokens are empty.
    """

    __slots__ = ("data", "texts")

    def __init__(self, data: list[bytes]) -> None:
        self.data = data
        self.texts: list[str | None] = [_text_or_none(piece) for piece in data]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, *, skip_special: bool) -> TokenTable:
        """`size` ids; those beyond the tokenizer's vocabulary (padding rows of the model's) have no text."""
        known = min(size, tokenizer.vocab_size)
        data = [tokenizer.token_bytes(token) for token in range(known)]
        data.extend(b"" for _ in range(size - known))
        if skip_special:
            for token in tokenizer.special_ids:
                if token < size:
                    data[token] = b""
        return cls(data)

    def without(self, tokens: frozenset[int]) -> TokenTable:
        """A copy in which the given tokens have no text."""
        other = TokenTable.__new__(TokenTable)
        other.data = list(self.data)
        other.texts = list(self.texts)
        for token in tokens:
            if token < len(other.data):
                other.data[token] = b""
                other.texts[token] = ""
        return other

    def __len__(self) -> int:
        return len(self.data)


def _text_or_none(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class ByteDecoder:
    """`texts` and `pending` are public for the actor's common path: while nothing is pending and texts[token] is not None, that is it."""

    __slots__ = ("_data", "pending", "texts")

    def __init__(self, table: TokenTable) -> None:
        self._data = table.data
        self.texts = table.texts
        self.pending = b""
        """At most 3 bytes: the start of a code point."""

    def feed(self, token: int) -> str:
        data = self.pending + self._data[token]
        text, used = utf_8_decode(data, "replace", False)
        self.pending = data[used:]
        return text

    def feed_all(self, tokens: Sequence[int]) -> str:
        """As `feed` for each, joined."""
        table = self._data
        data = self.pending + b"".join([table[token] for token in tokens])
        text, used = utf_8_decode(data, "replace", False)
        self.pending = data[used:]
        return text

    def flush(self) -> str:
        text, self.pending = self.pending.decode("utf-8", "replace"), b""
        return text


class _NoTexts(list[str | None]):
    """ "" of every token."""

    def __getitem__(self, token: Any) -> Any:
        return ""


class SilentDecoder(ByteDecoder):
    """For answers of which nobody wants the text: it makes none."""

    __slots__ = ()

    _NONE = TokenTable([])
    _NONE.texts = _NoTexts()

    def __init__(self) -> None:
        super().__init__(self._NONE)

    def feed(self, token: int) -> str:
        return ""

    def feed_all(self, tokens: Sequence[int]) -> str:
        return ""


class WindowDecoder:
    """For tokenizers whose decoder looks at neighbours (word pieces, prefix spaces).

    `context` are the last tokens of the prompt: they decide whether the first token begins with a space.
    """

    CONTEXT = 6
    """Tokens in front that a decoder may look at."""
    PATIENCE = 8
    """An unfinished code point has at most 4 bytes; after so many tokens without one it never comes, and U+FFFD goes out."""

    __slots__ = ("_decode", "_read", "_skip", "_window")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], *, skip_special: bool) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special
        self._window = list(context[-self.CONTEXT :])
        self._read = len(self._window)

    def feed(self, token: int) -> str:
        self._window.append(token)
        return self._advance(final=False)

    def feed_all(self, tokens: Sequence[int]) -> str:
        return "".join([self.feed(token) for token in tokens])

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        window, read = self._window, self._read
        if len(window) == read:
            return ""
        before = self._decode(window[:read], skip_special_tokens=self._skip)
        after = self._decode(window, skip_special_tokens=self._skip)
        new = after[len(before) :]
        if not final and len(window) - read < self.PATIENCE and (not new or new.endswith(REPLACEMENT)):
            return ""
        # What was new becomes the context; never less than CONTEXT tokens of it, never more than CONTEXT + PATIENCE.
        self._window = window[max(0, len(window) - max(self.CONTEXT, len(window) - read)) :]
        self._read = len(self._window)
        return new


class Tables:
    """One tokenizer's, by what an answer shows. `marks`: the special tokens that an answer which is taken apart must show."""

    def __init__(self, tokenizer: Tokenizer, marks: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self._exact = tokenizer.is_byte_exact()
        self.whole = TokenTable.of(tokenizer, tokenizer.vocab_size, skip_special=False)
        """Every token has its text."""
        special, texts = tokenizer.special_ids, self.whole.texts
        shown = frozenset(token for token in special if token < len(texts) and texts[token] in marks)
        self._plain = self.whole.without(special)
        self._marked = self.whole.without(special - shown) if shown else self._plain

    def widen(self, vocab_size: int) -> None:
        """The model's vocabulary is padded beyond the tokenizer's: those ids have no text."""
        for table in {id(table): table for table in (self.whole, self._plain, self._marked)}.values():
            missing = vocab_size - len(table)
            table.data.extend([b""] * missing)
            table.texts.extend([""] * missing)

    def decoder(self, prompt: I32, skip_special: bool, marked: bool) -> Decoder:
        """For one answer to `prompt`; `marked`: it is taken apart."""
        if self._exact:
            return ByteDecoder(self.whole if not skip_special else self._marked if marked else self._plain)
        context = prompt[-WindowDecoder.CONTEXT :].tolist()
        return WindowDecoder(self._tokenizer, context, skip_special=skip_special and not marked)
