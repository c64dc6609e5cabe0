"""A pool: one model, as text knows it.

What it is: the model's names, tokenizer, sampling defaults and cache secret, the receiver that turns its tokens into text, and what the engines
that serve it have said about themselves (vocabulary, end tokens, limits).
What it does not know: which engines there are (lane.py), requests' stages.
"""

from __future__ import annotations

import secrets
from typing import Any

from penstock.core.actors.text import bounds, resolve
from penstock.core.actors.text.desk import Desk
from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.ledger import Request
from penstock.core.actors.text.obedience import Obedience
from penstock.core.actors.text.receive import Receiver
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.hashing import chain


class Pool:
    """`names`: what requests may call the model, the reported one first; `defaults`: sampling defaults (resolve.generation_defaults);
    `secret` salts cache keys; `grammars` names the backend that text itself has."""

    def __init__(
        self,
        desk: Desk,
        tokenizer: Tokenizer,
        *,
        names: list[str],
        model_path: str = "",
        defaults: dict[str, Any] | None = None,
        secret: bytes | None = None,
        grammars: str = "",
        formats: Formats | None = None,
    ) -> None:
        self._desk = desk
        self.obedience = Obedience(grammars)
        self.tokenizer = tokenizer
        self.names = names
        self.model_path = model_path or names[0]
        self.defaults = defaults or {}
        self._secret = secret or secrets.token_bytes(32)
        self.formats = formats or Formats()
        self.receiver = Receiver(tokenizer, desk.ledger, desk.metrics, self.formats)
        self.series = desk.metrics.of(names[0])
        """Where its requests are counted that have no class."""
        self.facts: EngineFacts | None = None
        """What the last engine said that came up; None before the first."""
        self.limits = bounds.limits_of(0, 0, desk.config.max_prompt_chars)
        """Of one prompt; an engine's context decides what the configuration leaves open."""
        self._warned_of_ends = False

    def take(self, facts: EngineFacts) -> None:
        """An engine for this model is up."""
        self.facts = facts
        self.receiver.widen(facts.vocab_size)
        self.limits = bounds.limits_of(facts.max_model_len, self.tokenizer.max_chars_per_token, self._desk.config.max_prompt_chars)
        self._find_ends(facts.vocab_size)

    def _find_ends(self, vocab_size: int) -> None:
        """Checkpoints' files name end tokens that their models do not have (added tokens, -1); such an id must reach no engine."""
        self.receiver.ends, unknown = resolve.drawable(self.tokenizer.eos_ids, vocab_size)
        log = self._desk.log
        if unknown and not self._warned_of_ends and log is not None:
            left = "answers end at the others" if len(self.receiver.ends) else "no end token is left: answers run to their limit"
            log.warning(f"end tokens that the model does not have are ignored; {left}", ids=unknown, vocab_size=vocab_size)
        self._warned_of_ends = True

    def root_hash(self, request: Request, facts: EngineFacts) -> bytes:
        return resolve.root_hash(facts, self._secret, request.submit.tenant, request.submit.cache_salt)

    def rehash(self, request: Request, facts: EngineFacts) -> None:
        """A new engine's cache key may differ from the one that the request was hashed for."""
        root = self.root_hash(request, facts)
        blocks = len(request.prompt) // facts.block_size if facts.enable_prefix_caching else 0
        if root != request.root_hash or len(request.hashes) != 16 * blocks:
            request.root_hash = root
            request.hashes = chain(root, request.prompt, facts.block_size) if blocks else b""
