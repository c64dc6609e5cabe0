"""What text needs of a tokenizer and of a chat renderer.

What it is: two Protocols for plugins of the text process.
What it does not know: Hugging Face files, Jinja, actors.
"""

from __future__ import annotations

from typing import Any, Protocol

from penstock.core.protocol.columns import I32


class Tokenizer(Protocol):
    """Ids are int32. All methods may be called from several threads at once. `encode_batch` should release the GIL for its work: it runs on
    worker threads, while the text loop streams. Any exception while a prompt is encoded fails that request alone (400), whatever its class; so does a result
    of another type, or an id that is not below `vocab_size`."""

    vocab_size: int
    """The largest id + 1, added tokens included. The model's may be larger or smaller."""
    bos_id: int | None
    """The token that begins a text. Where a chat prompt begins with its spelling already, `add_special_tokens` is False."""
    eos_ids: list[int]
    """End tokens of the model: generation_config.json first, then config.json, then the tokenizer's own. Drawing one ends an answer; those that
    the model does not have are left out."""
    special_ids: frozenset[int]
    """Tokens that are not part of the text (`skip_special_tokens` leaves them out)."""
    name: str
    """For people: the folder's name, say."""
    max_chars_per_token: int
    """No token stands for more characters of a text than this: a text that cannot fit is refused unread. 0: no such bound is known."""

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]:
        """One array of ids a text, in order; spellings of special tokens in a text become these tokens. With `add_special_tokens`, what the
        model expects around a text (a begin token, say). Raises InvalidRequest for a text that it cannot take."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The raw bytes that a token adds to the output (special tokens: their text); b"" for an id that is no token. Asked for every id at
        start, in a loop."""
        ...

    def token_text(self, token: int) -> str:
        """The token's own spelling, as `/tokenize` shows it; "" for an id that is no token."""
        ...

    def is_byte_exact(self) -> bool:
        """Is the text of a sequence the concatenation of its tokens' bytes (byte-level BPE)? Then detokenising needs no window, and `decode` is
        not called for each token."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of a sequence; U+FFFD for bytes that are no UTF-8 (an incomplete character at the end, too: streaming waits for more then). Without
        `is_byte_exact` it is called on the text loop twice a token, with at most some 20 ids."""
        ...

    def info(self) -> dict[str, Any]:
        """What /tokenizer_info answers, as JSON can have it: class, vocabulary size, special tokens. `LLM.get_tokenizer()` looks for the spellings
        of "eos_token", "pad_token" and "unk_token" here (a text, or an object with "content"); none of them has to be there."""
        ...


class ChatRenderer(Protocol):
    """`render` may be called from several threads at once. One that has `templates`, a dictionary of their sources by name, lets the model's output
    formats be found from them; without it --tool-call-parser and --reasoning-parser name them."""

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        """The prompt text, which is then tokenised.

        `messages` are the client's, at least one: objects as the OpenAI API has them, of whose fields nothing is checked before (`content` may be
        a text, a list of parts, or missing; `tool_calls` hold their arguments as JSON text). `tools` are the client's, or None.
        `add_generation_prompt`: end with what begins an answer. `continue_final_message`: end within the last message, which the model is to
        go on with; both together are an error. `kwargs` are the request's chat_template_kwargs over --default-chat-template-kwargs.
        Raises InvalidRequest (param "messages", or the field's name) when it refuses the conversation; any other exception becomes one (400).
        It must end within bounded time and size whatever a client sends."""
        ...


class TemplatedRenderer(ChatRenderer, Protocol):
    """A ChatRenderer that also takes a request's own template, which it may if the server trusts requests so far (--trust-request-chat-template)."""

    def with_template(self, template: str) -> ChatRenderer:
        """One that renders with `template`, a text of at most 65536 characters, instead of the model's. Called for each such request: it should
        remember a few. Raises InvalidRequest (param "chat_template") for one that is not valid. It is called in a process that was made for it,
        by the same factory, and is ended if this and `render` take more than 5 s together, or half a gigabyte."""
        ...
