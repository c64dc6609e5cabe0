"""What the tokens of one vocabulary are in another: tables between a model's tokenizer and its drafter's.

What it is: `Alignment`, made once of two tokenizers. Two tokens whose bytes are the same are *twins*. A token without one is the pieces that its bytes
make in the other vocabulary: as the other tokenizer splits its text, or the fewest pieces where that says other bytes. Special tokens have twins by spelling and by
office (begin, end); others say nothing. Each token is looked up by itself, so that the pieces of a text follow from its tokens one after the other, wherever it is cut.
What it does not know: models, devices, drafts.
"""

from __future__ import annotations

import re

import numpy as np

from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import I32, i32
from penstock.core.protocol.errors import CheckpointError, PenstockError, spelled

LEAST_COMMON = 0.02
"""Of the model's tokens: with fewer twins hardly a draft could be right."""
MOST_PIECES = 8
"""Of a token on a device, where every token has room for as many: of longer ones the last."""
USUAL = 0.99
"""Tokens that have room there with all their pieces."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNREADABLE = "\ufffd".encode()


class Alignment:
    """`model` and `draft` are tokenizers, the sizes those of the models' vocabularies. Raises CheckpointError where too little is common; `folder` is the draft's, for
    its text."""

    def __init__(self, model: Tokenizer, draft: Tokenizer, model_size: int, draft_size: int, folder: str) -> None:
        theirs, mine = _Texts(model, model_size), _Texts(draft, draft_size)
        self.to_draft: I32 = np.full(model_size, -1, np.int32)
        """The twin of each of the model's tokens, -1 where it has none."""
        self.to_model: I32 = np.full(draft_size, -1, np.int32)
        """And of each of the draft's."""
        self.common = len(theirs.ids.keys() & mine.ids.keys())
        """Tokens of the draft with a twin, special ones aside."""
        for token, text in theirs.spelled.items():
            self.to_draft[token] = mine.ids.get(text, -1)
        for token, text in mine.spelled.items():
            self.to_model[token] = theirs.ids.get(text, -1)
        words = sum(1 for text in theirs.spelled.values() if text)
        if self.common < max(1, LEAST_COMMON * words):
            raise CheckpointError(
                f"--speculative-model {spelled(folder)}: its tokenizer is another one than the model's, and only {self.common} of its {draft_size} tokens stand for texts"
                f" that are tokens of the model, too, which has {words}. Drafts are tokens that both have, so hardly one could be right. Give a draft model whose"
                " tokenizer has more in common with the model's, or a drafter that needs none: the method ngram or suffix.",
                param="speculative_config",
            )
        _pair_special(model, draft, self.to_draft, self.to_model)
        pieces = _all_pieces(theirs, mine, draft, self.to_draft)
        self._counts: I32 = i32([len(one) for one in pieces])
        self._bounds: I32 = np.zeros(model_size + 1, np.int32)
        np.cumsum(self._counts, out=self._bounds[1:])
        self._pieces: I32 = i32([piece for one in pieces for piece in one])
        begin = draft.bos_id
        begins = begin is not None and begin < draft_size and draft.encode_batch([""], add_special_tokens=True)[0][:1].tolist() == [begin]
        self.lead: I32 = i32([begin] if begins and begin is not None else [])
        """What the draft model expects in front of a text."""

    def translated(self, tokens: I32) -> I32:
        """The pieces of the model's tokens."""
        counts = self._counts[tokens]
        ends = np.cumsum(counts)
        at = np.repeat(self._bounds[:-1][tokens] - (ends - counts), counts) + np.arange(int(counts.sum()))
        found: I32 = self._pieces[at]
        return found

    def context(self, tokens: I32, most: int, kept: int) -> I32:
        """As what a draft model begins with: at least one token; of more than `most` the last ones, `kept` in all."""
        found = self.translated(tokens)
        lead = self.lead
        found = found if not lead.size or found[:1].tolist() == lead.tolist() else np.concatenate([lead, found])
        if found.size > most:
            found = np.concatenate([lead, found[found.size - (kept - lead.size) :]])
        return found if found.size else np.zeros(1, np.int32)

    def room(self) -> int:
        """Pieces a token that USUAL of the tokens need, at most MOST_PIECES."""
        real = self._counts[self._counts > 0]
        return int(min(MOST_PIECES, max(1, np.ceil(np.quantile(real, USUAL)))))

    def table(self, room: int) -> tuple[I32, I32]:
        """([tokens, room], how many of them count): each token's pieces, the last ones where there are more."""
        counts: I32 = np.minimum(self._counts, room)
        place = np.arange(room)
        at = (self._bounds[1:] - counts)[:, None] + np.minimum(place, np.maximum(counts - 1, 0)[:, None])
        found = self._pieces[np.clip(at, 0, max(0, self._pieces.size - 1))]
        return np.where(place < counts[:, None], found, 0).astype(np.int32), counts


class _Texts:
    """The texts of a vocabulary, special tokens aside."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        self.spelled: dict[int, bytes] = {}
        self.ids: dict[bytes, int] = {}
        """The token of each text; of several the first that is no mere byte."""
        exact = tokenizer.is_byte_exact()
        bare: dict[bytes, int] = {}
        for token in range(min(size, tokenizer.vocab_size)):
            text = b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
            if not text or (not exact and _UNREADABLE in text):
                continue
            self.spelled[token] = text
            (bare if len(text) == 1 and _BYTE.fullmatch(tokenizer.token_text(token)) else self.ids).setdefault(text, token)
        self.ids = bare | self.ids
        self.longest = max(map(len, self.ids), default=0)


def _pair_special(model: Tokenizer, draft: Tokenizer, to_draft: I32, to_model: I32) -> None:
    """By spelling; then begin with begin and end with end."""
    sizes = len(to_draft), len(to_model)
    theirs, mine = (
        {tokenizer.token_text(token): token for token in sorted(tokenizer.special_ids) if token < size}
        for tokenizer, size in zip((model, draft), sizes, strict=True)
    )
    pairs = [(theirs[text], mine[text]) for text in theirs.keys() & mine.keys()]
    if model.bos_id is not None and draft.bos_id is not None:
        pairs.append((model.bos_id, draft.bos_id))
    if model.eos_ids and draft.eos_ids:
        pairs += [(token, draft.eos_ids[0]) for token in model.eos_ids] + [(model.eos_ids[0], token) for token in draft.eos_ids]
    for one, other in pairs:
        if one < sizes[0] and other < sizes[1]:
            if to_draft[one] < 0:
                to_draft[one] = other
            if to_model[other] < 0:
                to_model[other] = one


def _all_pieces(theirs: _Texts, mine: _Texts, draft: Tokenizer, to_draft: I32) -> list[list[int]]:
    """Of each of the model's tokens."""
    pieces = [[int(twin)] if twin >= 0 else [] for twin in to_draft]
    lonely = [token for token in theirs.spelled if not pieces[token]]
    split = _as_split([theirs.spelled[token] for token in lonely], draft)
    for token, said in zip(lonely, split, strict=True):
        text = theirs.spelled[token]
        fits = bool(said) and all(one in mine.spelled for one in said) and b"".join(mine.spelled[one] for one in said) == text
        pieces[token] = said if fits else _fewest(text, mine)
    return pieces


def _as_split(texts: list[bytes], draft: Tokenizer) -> list[list[int]]:
    """By the draft's own tokenizer; [] for what is no text by itself."""
    readable = [at for at, text in enumerate(texts) if _readable(text)]
    found: list[list[int]] = [[] for _ in texts]
    try:
        encoded = draft.encode_batch([texts[at].decode() for at in readable], add_special_tokens=False)
    except PenstockError:  # it takes none such
        return found
    for at, ids in zip(readable, encoded, strict=True):
        found[at] = ids.tolist()
    return found


def _readable(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fewest(text: bytes, mine: _Texts) -> list[int]:
    """The fewest tokens that make it, [] where none do."""
    came: list[tuple[int, int, int] | None] = [(0, -1, -1)] + [None] * len(text)
    """For each end: how many tokens, where the last one begins, which it is."""
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - mine.longest), end):
            before, token = came[start], mine.ids.get(text[start:end])
            best = came[end]
            if before is not None and token is not None and (best is None or before[0] + 1 < best[0]):
                came[end] = before[0] + 1, start, token
    found: list[int] = []
    at = len(text)
    while at > 0:
        last = came[at]
        if last is None:
            return []
        found.append(last[2])
        at = last[1]
    return found[::-1]
