"""Where each token of a prompt begins in the prompt's text.

What it is: `prompt_offsets` walks tokens and text side by side, for replies that echo a prompt with its log-probabilities. Bytes decide, so
that a character of several tokens counts once: each of them begins where the character does.
What it does not know: requests, tokenizers, how the text came about.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

SLACK = 8
"""Characters that may be passed over to find a token that a normaliser moved."""


def prompt_offsets(tokens: Sequence[int], text: str, data: Sequence[bytes], special: frozenset[int]) -> list[int]:
    """One offset a token, in characters: not decreasing, at most len(text). `data` has the bytes of every token id.

    A token that has no place in the text (a begin token that the client did not write, a special token that decoding leaves out) begins where
    the next one does.
    """
    plain = b"".join([data[token] for token in tokens if token not in special])
    # Decoded ids leave special tokens out; a client's own text may spell them.
    absent = special if plain.decode("utf-8", "replace") == text else frozenset()
    offsets: list[int] = []
    at, pending = 0, b""
    for token in tokens:
        offsets.append(at)
        if token in absent:
            continue
        new, used = utf_8_decode(pending + data[token], "replace", False)
        if text.startswith(new, at):
            at += len(new)
            pending = (pending + data[token])[used:]
            continue
        if token in special:
            continue
        bare = new.strip()  # "▁Hello" at the beginning of a text is "Hello"
        found = text.find(bare, at, at + len(new) + SLACK) if bare else -1
        if found >= 0:
            offsets[-1] = found
            at, pending = found + len(bare), b""
    return offsets
