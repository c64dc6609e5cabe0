"""The tokenizer of a model for Python code, with the names that Hugging Face's have.

What it is: `LLMTokenizer`: what `LLM.get_tokenizer()` returns, a thin front for the tokenizer and the chat renderer that serve the model, so that ids are
the ones that requests get. Differences to transformers: `vocab_size` counts added tokens too, plain lists are returned, and arguments that are not here are
refused by their names.
What it does not know: files, Jinja, requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from penstock.core.actors.text.padding import SIDES, UNBOUNDED, Encoding, Shape, cut, encoding, filled, refuse, shape_of
from penstock.core.actors.text.prompts import conversation_json, need
from penstock.core.contract.text import ChatRenderer, Tokenizer
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature, described
from penstock.core.protocol.sampling import check_text, check_tokens


@contextlib.contextmanager
def _public(param: str) -> Iterator[None]:
    """What a tokenizer or a template raises within comes as the error that a request would get."""
    try:
        yield
    except PenstockError:
        raise
    except Exception as error:
        raise InvalidRequest(f"{param} cannot be taken: {described(error)}.", param=param) from error


class LLMTokenizer:
    """May be used from any thread, also after the LLM was closed."""

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, tokenizer: Tokenizer, renderer: ChatRenderer) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        with _public("tokenizer"):
            self._info = tokenizer.info()
        self._vocab: dict[str, int] | None = None
        self.name_or_path = tokenizer.name
        self.vocab_size = tokenizer.vocab_size
        self.all_special_ids = sorted(tokenizer.special_ids)
        self.bos_token_id = tokenizer.bos_id
        own_end = self._named("eos_token")
        self.eos_token_id = own_end if own_end is not None else next(iter(tokenizer.eos_ids), None)
        """The tokenizer's own; `eos_token_ids` are all that end an answer, generation_config.json's first."""
        self.eos_token_ids = list(tokenizer.eos_ids)
        self.pad_token_id = self._named("pad_token")
        self.unk_token_id = self._named("unk_token")
        longest = self._info.get("model_max_length")
        self.model_max_length = int(longest) if isinstance(longest, (int, float)) and 0 < longest < UNBOUNDED else UNBOUNDED
        """The tokenizer's own, as its configuration has it; what the server takes is `max_model_len`, which may be less."""
        sides = {name: side if (side := self._info.get(name)) in SIDES else SIDES[0] for name in ("padding_side", "truncation_side")}
        self.padding_side = str(sides["padding_side"])
        self.truncation_side = str(sides["truncation_side"])
        self.chat_template: str | None = getattr(renderer, "templates", {}).get("default")

    def _named(self, name: str) -> int | None:
        """The id of a special token that the tokenizer's configuration names."""
        value = self._info.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self.get_vocab().get(text) if isinstance(text, str) else None

    # --- texts and ids

    def encode(self, text: Any, text_pair: None = None, *, add_special_tokens: bool = True, **options: Any) -> Any:
        """Token ids of a text, or of each of a list. `options`: truncation, max_length, padding and their like; UnsupportedFeature names what
        transformers has and this has not."""
        return self._encoded(text, {"text_pair": text_pair, **options}, add_special_tokens)["input_ids"]

    def batch_encode(self, texts: Sequence[str], *, add_special_tokens: bool = True, **options: Any) -> list[list[int]]:
        need(not isinstance(texts, str), "texts must be a list of texts.", "texts")
        found: list[list[int]] = self._encoded(texts, options, add_special_tokens)["input_ids"]
        return found

    def __call__(self, text: Any, text_pair: None = None, *, add_special_tokens: bool = True, **options: Any) -> Encoding:
        return self._encoded(text, {"text_pair": text_pair, **options}, add_special_tokens)

    def encode_plus(self, text: str, text_pair: None = None, **options: Any) -> Encoding:
        need(isinstance(text, str), f"text must be a text, but is {text!a:.80}.", "text")
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[str], **options: Any) -> Encoding:
        need(not isinstance(batch_text_or_text_pairs, str), "batch_text_or_text_pairs must be a list of texts.", "batch_text_or_text_pairs")
        return self(batch_text_or_text_pairs, **options)

    def _encoded(self, given: Any, options: Mapping[str, Any], special: bool, *, cuts_alone: bool = True) -> Encoding:
        shape = self._shape(options, cuts_alone)
        many = not isinstance(given, str)
        texts = self._texts(given, many)
        rows = self._rows(texts, special)
        if shape.most is not None and any(len(row) > shape.most for row in rows):
            contents = self._rows(texts, False) if special else rows
            rows = [cut(row, content, shape) for row, content in zip(rows, contents, strict=True)]
        return encoding(rows, shape, self.pad_token_id, many=many)

    def _shape(self, options: Mapping[str, Any], cuts_alone: bool) -> Shape:
        return shape_of(
            options,
            longest=self.model_max_length,
            fill_side=self.padding_side,
            cut_side=self.truncation_side,
            cuts_alone=cuts_alone,
        )

    def _texts(self, given: Any, many: bool) -> list[str]:
        if not many:
            check_text(given, "text")
            return [given]
        if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
            raise InvalidRequest(f"text must be a text or a list of texts, but is {given!a:.80}.", param="text")
        for i, text in enumerate(given):
            need(isinstance(text, str), f"text[{i}] must be a text, but is {text!a:.80}.", f"text[{i}]")
            check_text(text, f"text[{i}]")
        return list(given)

    def _rows(self, texts: list[str], special: bool) -> list[list[int]]:
        with _public("text"):
            return [ids.tolist() for ids in self._tokenizer.encode_batch(texts, add_special_tokens=special)] if texts else []

    def pad(self, encoded_inputs: Any, padding: bool | str = True, *, max_length: int | None = None, **options: Any) -> Encoding:
        """An encoding (of one text or of many), or a list of encodings, filled up to one length."""
        shape = self._shape({"padding": padding, "max_length": max_length, **options}, False)
        listed = not isinstance(encoded_inputs, Mapping)
        rows = _columns(encoded_inputs) if listed else {name: _plain(value) for name, value in encoded_inputs.items()}
        need("input_ids" in rows, "encoded_inputs must have input_ids.", "encoded_inputs")
        many = listed or not rows["input_ids"] or not isinstance(rows["input_ids"][0], int)
        if not many:
            rows = {name: [value] for name, value in rows.items()}
        if shape.mask and "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
        found = filled(rows, shape, self.pad_token_id)
        return Encoding(found if many else {name: value[0] for name, value in found.items()})

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        refuse({"pair": pair})
        return len(self._rows([""], True)[0])

    def tokenize(self, text: str, *, add_special_tokens: bool = False, **options: Any) -> list[str]:
        need(isinstance(text, str), f"text must be a text, but is {text!a:.80}.", "text")
        return self._spellings(self.encode(text, add_special_tokens=add_special_tokens, **options))

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool | None = None, **others: Any
    ) -> Any:
        """The text of ids, or a list of texts for a list of lists."""
        refuse(others)
        if clean_up_tokenization_spaces and not self._tokenizer.is_byte_exact():  # for the others transformers passes over it too
            refuse({"clean_up_tokenization_spaces": True})
        given = _plain(token_ids)
        if isinstance(given, list) and given and isinstance(given[0], (list, tuple)):
            return [self.decode(ids, skip_special_tokens) for ids in given]
        ids = self._ids([given] if isinstance(given, int) else given)
        with _public("token_ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **options: Any) -> list[str]:
        return [self.decode(ids, skip_special_tokens, **options) for ids in sequences]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of spellings. Raises InvalidRequest for what is no token."""
        vocab = self.get_vocab()
        wrong = next((i for i, token in enumerate(tokens) if token not in vocab), None)
        if wrong is not None:
            raise InvalidRequest(f"tokens[{wrong}] is {tokens[wrong]!a:.80}, which is no token.", param=f"tokens[{wrong}]")
        return str(self.decode([vocab[token] for token in tokens])) if tokens else ""

    def _ids(self, given: Any) -> list[int]:
        try:
            ids = [token.__index__() for token in given]
        except (TypeError, AttributeError):
            raise InvalidRequest(f"token_ids must be a token id or a list of them, but is {given!a:.80}.", param="token_ids") from None
        check_tokens(ids, "token_ids", self.vocab_size)
        return ids

    # --- single tokens

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Spellings of a list of ids, or of one."""
        given = _plain(ids)
        if isinstance(given, int):
            return self._spellings(self._ids([given]))[0]
        left_out = self._tokenizer.special_ids if skip_special_tokens else ()
        return self._spellings(token for token in self._ids(given) if token not in left_out)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of a list of spellings, or of one; None (or the unknown token's) for what is no token."""
        vocab = self.get_vocab()
        return vocab.get(tokens, self.unk_token_id) if isinstance(tokens, str) else [vocab.get(one, self.unk_token_id) for one in tokens]

    def _spellings(self, ids: Iterable[int]) -> list[str]:
        with _public("token_ids"):
            return [self._tokenizer.token_text(token) for token in ids]

    def get_vocab(self) -> dict[str, int]:
        if self._vocab is None:
            self._vocab = {text: token for token, text in enumerate(self._spellings(range(self.vocab_size))) if text}
        return self._vocab

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def all_special_tokens(self) -> list[str]:
        return self._spellings(self.all_special_ids)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: text for name in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := getattr(self, name)) is not None}

    @property
    def bos_token(self) -> str | None:
        return self._text(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self._text(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._text(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, text: str | None) -> None:
        """Which token fills up: many models name none, and their users set the end token."""
        token = None if text is None else self.get_vocab().get(text)
        need(text is None or token is not None, f"pad_token must be one of the tokenizer's tokens, but is {text!a:.80}.", "pad_token")
        self.pad_token_id = token

    @property
    def unk_token(self) -> str | None:
        return self._text(self.unk_token_id)

    def _text(self, token: int | None) -> str | None:
        return None if token is None else self._spellings([token])[0]

    # --- conversations

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: list[dict[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation as ids, with `return_dict` as an encoding, or with `tokenize=False` as text; a list of those for a list of
        conversations. Of the further arguments those that `encode` has cut and fill up, the others go to the template. Raises InvalidRequest as a
        request would."""
        if chat_template is not None:
            raise UnsupportedFeature("The template is the model's own. Give another one to LLM(chat_template=...).", param="chat_template")
        refuse({"return_assistant_tokens_mask": return_assistant_tokens_mask, "sanitize_control_tokens": sanitize_control_tokens})
        options = {name: kwargs.pop(name) for name in ENCODING if name in kwargs} | dict(tokenizer_kwargs or {})
        if not tokenize:
            refuse({**options, "return_dict": return_dict})
        for i, tool in enumerate(tools or ()):
            need(isinstance(tool, Mapping), f"tools[{i}] must be an object (JSON schema), but is {tool!a:.80}.", f"tools[{i}]")
        many = isinstance(conversation, Sequence) and len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        texts = []
        for i, messages in enumerate(conversation if many else [conversation]):
            name = f"conversation[{i}]" if many else "conversation"
            need(isinstance(messages, Sequence) and len(messages) > 0, f"{name} must hold at least one message.", name)
            conversation_json(messages, name)
            with _public(name):
                rendered = self._renderer.render(
                    [dict(message) for message in messages],
                    tools=tools or None,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    kwargs=kwargs,
                )
            texts.append(rendered)
        if not tokenize:
            return texts if many else texts[0]
        found = self._encoded(texts if many else texts[0], options, False, cuts_alone=False)
        return found if return_dict else found["input_ids"]


ENCODING = (
    *("padding", "truncation", "max_length", "padding_side", "truncation_side", "stride", "pad_to_multiple_of", "return_tensors"),
    *("return_attention_mask", "return_token_type_ids", "return_length", "return_offsets_mapping", "return_special_tokens_mask"),
    *("return_overflowing_tokens", "is_split_into_words", "split_special_tokens", "text_pair"),
)
"""Arguments of `apply_chat_template` that never were a template's."""


def _plain(value: Any) -> Any:
    """An array as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _columns(encodings: Any) -> dict[str, list[Any]]:
    """A list of encodings as lists under their names."""
    good = isinstance(encodings, Sequence) and encodings and all(isinstance(one, Mapping) for one in encodings)
    need(bool(good), "encoded_inputs must be an encoding, or a list of them.", "encoded_inputs")
    names = list(encodings[0])
    for i, one in enumerate(encodings):
        need(list(one) == names, f"encoded_inputs[{i}] has {', '.join(one)}, and the first one {', '.join(names)}.", f"encoded_inputs[{i}]")
    return {name: [_plain(one[name]) for one in encodings] for name in names}
