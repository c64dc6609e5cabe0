"""What text needs of a tokenizer and of a chat renderer.

What it is: two Protocols for plugins of the text process.
What it does not know: Hugging Face files, Jinja, actors.
"""

from __future__ import annotations

from typing import Any, Protocol

from penstock.core.protocol.columns import I32


class Tokenizer(Protocol):
    """Ids are int32. `encode_batch` must release the GIL for its work (it runs on a worker thread)."""

    vocab_size: int
    bos_id: int | None
    eos_ids: list[int]
    """End tokens of the model: generation_config.json first, then the tokenizer's own."""
    special_ids: frozenset[int]
    name: str
    max_chars_per_token: int

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]: ...

    def token_bytes(self, token: int) -> bytes:
        """The raw bytes that a token adds to the output (special tokens: their text)."""
        ...

    def token_text(self, token: int) -> str:
        """The token's own spelling, as `/tokenize` shows it."""
        ...

    def is_byte_exact(self) -> bool:
        """Is the text of a sequence the concatenation of its tokens' bytes (byte-level BPE)? Then detokenising needs no window."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str: ...

    def info(self) -> dict[str, Any]:
        """JSON for /tokenizer_info: class, vocabulary size, special tokens, chat template."""
        ...


class ChatRenderer(Protocol):
    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        """The prompt text. Raises InvalidRequest (param "messages") when the template refuses or fails."""
        ...
