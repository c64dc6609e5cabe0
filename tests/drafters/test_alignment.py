"""Tokens of one vocabulary in another: the pieces of each token spell it, wherever a text is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from vocabularies import renumbered

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.demo_model import brook_path
from penstock.plugins.drafters.alignment import Alignment
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

TEXTS = ["The river ran past the mill.", " past", "Zoë says: 3 × 12 = 36 \N{SNOWMAN}\n", "  two blanks", "penstocks' pressures"]
WORDS = ["▁", "▁the", "the", "▁river", "▁past", "▁mill", "ill", "m", ".", "e", "t", "h", "T", "p", "a", "s", "▁s", "r", "i", "v", "n", "36"]


@pytest.fixture(scope="module")
def brook() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.load(str(brook_path()))


@pytest.fixture(scope="module")
def pieces() -> HuggingFaceTokenizer:
    """As SentencePiece has them: blanks are a sign, bytes have tokens of their own, a text begins with a blank."""
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {text: at for at, text in enumerate(named)} | {"th": len(named)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return HuggingFaceTokenizer(fast, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.load(str(renumbered(brook_path(), tmp_path_factory.mktemp("brook") / "half", merges=0.5)))


def between(model: HuggingFaceTokenizer, draft: HuggingFaceTokenizer) -> Alignment:
    return Alignment(model, draft, model.vocab_size, draft.vocab_size, "/a/folder")


@pytest.mark.parametrize("way", ["brook to half", "half to brook", "brook to pieces", "pieces to brook"])
def test_pieces_spell_their_tokens(way: str, request: pytest.FixtureRequest) -> None:
    names = {"half": "halved"}
    model, draft = (request.getfixturevalue(names.get(name, name)) for name in way.split(" to "))
    table = between(model, draft)
    for token in range(model.vocab_size):
        said = table.translated(i32([token])).tolist()
        twin = int(table.to_draft[token])
        if token in model.special_ids:
            assert said == ([twin] if twin >= 0 else [])
            continue
        assert b"".join(map(draft.token_bytes, said)) == model.token_bytes(token)
        if twin >= 0:
            assert said == [twin]
            assert model.token_bytes(int(table.to_model[twin])) == model.token_bytes(token)
        else:
            assert len(said) != 1
    texts = [{one.token_bytes(token) for token in range(one.vocab_size) if token not in one.special_ids} for one in (model, draft)]
    assert table.common == len(texts[0] & texts[1])


def test_texts_in_pieces_say_the_same(brook: HuggingFaceTokenizer, pieces: HuggingFaceTokenizer, halved: HuggingFaceTokenizer) -> None:
    for draft in (pieces, halved):
        table = between(brook, draft)
        for text in TEXTS:
            tokens = brook.encode_batch([text], add_special_tokens=False)[0]
            said = table.translated(tokens)
            assert b"".join(map(draft.token_bytes, said.tolist())).decode() == text
            for cut in range(len(tokens)):
                parts = table.translated(tokens[:cut]), table.translated(tokens[cut:])
                assert np.concatenate(parts).tolist() == said.tolist()


def test_where_the_words_are_there_they_are_taken(brook: HuggingFaceTokenizer, halved: HuggingFaceTokenizer) -> None:
    """Words that are missing are split as the draft's own tokenizer splits them, which here is what it makes of whole texts."""
    table = between(brook, halved)
    shorter = 0
    for text in TEXTS:
        own = halved.encode_batch([text], add_special_tokens=False)[0].tolist()
        tokens = brook.encode_batch([text], add_special_tokens=False)[0]
        assert table.translated(tokens).tolist() == own
        shorter += len(own) > len(tokens)
    assert shorter


def test_blanks_are_blanks_in_both_and_words_are_no_bytes(brook: HuggingFaceTokenizer, pieces: HuggingFaceTokenizer) -> None:
    table = between(pieces, brook)
    the = int(brook.encode_batch([" the"], add_special_tokens=False)[0][0])
    ids = {pieces.token_text(token): token for token in range(pieces.vocab_size)}
    assert int(table.to_draft[ids["▁the"]]) == the
    assert int(table.to_model[the]) == ids["▁the"]
    letter = int(table.to_draft[ids["T"]])
    assert int(table.to_draft[ids["<0x54>"]]) == letter, "a byte that is a letter, too"
    assert int(table.to_model[letter]) == ids["T"]


def test_special_tokens_go_by_office_and_spelling(
    brook: HuggingFaceTokenizer, pieces: HuggingFaceTokenizer, halved: HuggingFaceTokenizer
) -> None:
    table = between(brook, pieces)
    begin, end = (pieces.bos_id, pieces.eos_ids[0])
    assert [int(table.to_draft[one]) for one in (brook.bos_id or 0, *brook.eos_ids)] == [begin, end, end]
    assert int(table.to_model[end]) == brook.eos_ids[0]
    other = between(brook, halved)
    for token in brook.special_ids:
        assert halved.token_text(int(other.to_draft[token])) == brook.token_text(token)
        assert brook.token_text(int(other.to_model[other.to_draft[token]])) == brook.token_text(token)


class Begun(HuggingFaceTokenizer):
    """A tokenizer that writes its begin token."""

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        found = super().encode_batch(texts, add_special_tokens=add_special_tokens)
        return [i32([self.bos_id, *one.tolist()]) if add_special_tokens else one for one in found]


def test_a_context_begins_as_the_draft_model_expects_and_keeps_its_end(brook: HuggingFaceTokenizer, halved: HuggingFaceTokenizer) -> None:
    begun = Begun.load(str(brook_path()))
    table = between(halved, begun)
    tokens = halved.encode_batch([TEXTS[0]], add_special_tokens=False)[0]
    said = table.translated(tokens).tolist()
    assert table.context(tokens, 100, 50).tolist() == [begun.bos_id, *said]
    assert table.context(i32([halved.bos_id, *tokens.tolist()]), 100, 50).tolist() == [begun.bos_id, *said], "once is enough"
    assert table.context(tokens, 6, 4).tolist() == [begun.bos_id, *said[-3:]]
    plain = between(halved, brook)
    assert plain.context(tokens, 100, 50).tolist() == said
    assert plain.context(tokens, 6, 4).tolist() == said[-4:]
    assert plain.context(i32([]), 6, 4).size == 1, "a model reads one token at least"


def test_a_table_has_room_for_nearly_all_and_the_end_of_the_others(brook: HuggingFaceTokenizer, pieces: HuggingFaceTokenizer) -> None:
    table = between(brook, pieces)
    room = table.room()
    found, counts = table.table(room)
    assert found.shape == (brook.vocab_size, room)
    whole = [table.translated(i32([token])).tolist() for token in range(brook.vocab_size)]
    assert max(map(len, whole)) > room > 1
    for token, said in enumerate(whole):
        assert found[token, : counts[token]].tolist() == said[-room:]
    assert (counts == [len(said) for said in whole]).mean() > 0.7


def test_vocabularies_without_common_tokens_are_refused(brook: HuggingFaceTokenizer) -> None:
    fast = Tokenizer(models.WordLevel(vocab={"Ω" * (at + 1): at for at in range(50)}, unk_token="Ω"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    words = HuggingFaceTokenizer(fast)
    with pytest.raises(
        CheckpointError, match=r"'?/a/folder'?.*only 0 of its 50 tokens.*Give a draft model whose tokenizer.*ngram or suffix"
    ):
        between(brook, words)


def test_tokens_beyond_the_models_are_left_out(brook: HuggingFaceTokenizer, tmp_path: Path) -> None:
    """A tokenizer may know more tokens than a model has rows."""
    other = HuggingFaceTokenizer.load(str(renumbered(brook_path(), tmp_path / "all")))
    table = Alignment(brook, other, 3000, 2000, "")
    assert (len(table.to_draft), len(table.to_model)) == (3000, 2000)
    assert max(table.translated(np.arange(3000, dtype=np.int32)).max(), table.to_draft.max()) < 2000
    assert table.to_model.max() < 3000
