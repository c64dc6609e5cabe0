"""The tokenizer of a model for Python code, with the names that Hugging Face's have.

What it is: `LLMTokenizer`: what `LLM.get_tokenizer()` returns, a thin front for the tokenizer and the chat renderer that serve the model, so that ids are
the ones that requests get. Differences to transformers: `vocab_size` counts added tokens too, and plain lists are returned.
What it does not know: files, Jinja, requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.core.actors.text.prompts import conversation_json, need
from penstock.core.contract.text import ChatRenderer, Tokenizer
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.sampling import check_text, check_tokens


class Encoding(dict[str, Any]):
    """What calling the tokenizer gives: "input_ids" and "attention_mask", as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _refuse(others: Mapping[str, Any]) -> None:
    """Arguments of transformers that ask for nothing may be there."""
    asked = sorted(name for name, value in others.items() if value not in (None, False))
    if asked:
        raise UnsupportedFeature(
            f"{', '.join(asked)}: not supported here, plain lists of all ids are returned. Leave it out.", param=asked[0]
        )


class LLMTokenizer:
    """May be used from any thread, also after the LLM was closed."""

    is_fast = True

    def __init__(self, tokenizer: Tokenizer, renderer: ChatRenderer) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
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

    def _named(self, name: str) -> int | None:
        """The id of a special token that the tokenizer's configuration names."""
        value = self._info.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self.get_vocab().get(text) if isinstance(text, str) else None

    # --- texts and ids

    def encode(self, text: str, text_pair: None = None, *, add_special_tokens: bool = True, **others: Any) -> list[int]:
        """Raises UnsupportedFeature naming an argument that transformers has and this has not (truncation, padding, return_tensors...)."""
        need(isinstance(text, str), f"text must be a text, but is {text!a:.80}.", "text")
        _refuse({"text_pair": text_pair, **others})
        return self.batch_encode([text], add_special_tokens=add_special_tokens)[0]

    def batch_encode(self, texts: Sequence[str], *, add_special_tokens: bool = True, **others: Any) -> list[list[int]]:
        _refuse(others)
        need(isinstance(texts, Sequence), "texts must be a list of texts.", "texts")
        for i, text in enumerate(texts):
            name = "text" if len(texts) == 1 else f"texts[{i}]"
            need(isinstance(text, str), f"{name} must be a text, but is {text!a:.80}.", name)
            check_text(text, name)
        some = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens) if texts else []
        return [[int(token) for token in ids] for ids in some]

    def __call__(self, text: str | Sequence[str], text_pair: None = None, *, add_special_tokens: bool = True, **others: Any) -> Encoding:
        _refuse({"text_pair": text_pair, **others})
        if isinstance(text, str):
            ids: Any = self.encode(text, add_special_tokens=add_special_tokens)
            return Encoding(input_ids=ids, attention_mask=[1] * len(ids))
        ids = self.batch_encode(text, add_special_tokens=add_special_tokens)
        return Encoding(input_ids=ids, attention_mask=[[1] * len(one) for one in ids])

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        return [self._tokenizer.token_text(token) for token in self.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        ids = self._ids([token_ids] if isinstance(token_ids, int) else token_ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

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
        if isinstance(ids, int):
            return self._tokenizer.token_text(*self._ids([ids]))
        left_out = self._tokenizer.special_ids if skip_special_tokens else ()
        return [self._tokenizer.token_text(token) for token in self._ids(ids) if token not in left_out]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of a list of spellings, or of one; None (or the unknown token's) for what is no token."""
        vocab = self.get_vocab()
        return vocab.get(tokens, self.unk_token_id) if isinstance(tokens, str) else [vocab.get(one, self.unk_token_id) for one in tokens]

    def get_vocab(self) -> dict[str, int]:
        if self._vocab is None:
            self._vocab = {text: token for token in range(self.vocab_size) if (text := self._tokenizer.token_text(token))}
        return self._vocab

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def all_special_tokens(self) -> list[str]:
        return [self._tokenizer.token_text(token) for token in self.all_special_ids]

    @property
    def bos_token(self) -> str | None:
        return self._text(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self._text(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._text(self.pad_token_id)

    @property
    def unk_token(self) -> str | None:
        return self._text(self.unk_token_id)

    def _text(self, token: int | None) -> str | None:
        return None if token is None else self._tokenizer.token_text(token)

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
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation as ids, or with `tokenize=False` as text; a list of those for a list of conversations. Further
        arguments go to the template. Raises InvalidRequest as a request would."""
        if chat_template is not None:
            raise UnsupportedFeature("The template is the model's own. Give another one to LLM(chat_template=...).", param="chat_template")
        if kwargs.pop("return_dict", False) or kwargs.pop("return_tensors", None):
            raise UnsupportedFeature("Plain lists are returned. Leave return_dict and return_tensors out.", param="return_dict")
        many = isinstance(conversation, Sequence) and len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if many else [conversation]
        texts = []
        for i, messages in enumerate(conversations):
            name = f"conversation[{i}]" if many else "conversation"
            need(isinstance(messages, Sequence) and len(messages) > 0, f"{name} must hold at least one message.", name)
            conversation_json(messages, name)
            texts.append(
                self._renderer.render(
                    [dict(message) for message in messages],
                    tools=tools or None,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    kwargs=kwargs,
                )
            )
        out: list[Any] = self.batch_encode(texts, add_special_tokens=False) if tokenize else texts
        return out if many else out[0]
