"""The only place that says no to a client.

What it is: counts of what is accepted and has not started, the two limits on them, and the rate at which they drain, from which a refused
client learns when to come back.
What it does not know: requests themselves, KV blocks, HTTP.
"""

from __future__ import annotations

import math
from collections import Counter

from penstock.core.protocol.errors import QueueFull, QueueLimit

RATE_TAU_S = 20.0
"""Memory of the drain rate."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 120.0
UNKNOWN_RETRY_S = 5.0
"""While nothing has started yet there is no rate."""
MAX_TEMPLATES = 256
"""Requests with a template of their own that may wait for it to be rendered at a time: a few at once are, and each may take seconds (turns.py)."""
MAX_TEMPLATES_EACH = 128
"""The same, of one owner: there is room for others."""


class Admission:
    """Bounds over requests between acceptance and their first step. Replays never come here."""

    def __init__(self, *, max_requests: int, max_tokens: int, status: int = 429) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.status = status
        self.requests = 0
        self.tokens = 0
        self._templates: Counter[str] = Counter()
        """Requests with a template of their own that is not rendered yet, by owner."""
        self._rate = 0.0
        """Requests started per second, exponentially decayed."""
        self._tokens_rate = 0.0
        self._at_ns = 0

    def check_request(self, now_ns: int) -> None:
        """Raises QueueFull if one more waiting request is too many."""
        if self.requests >= self.max_requests:
            raise self._full(
                "queue_requests",
                f"{self.requests} requests are already waiting (--max-num-queued-reqs {self.max_requests})",
                self.requests / 2,
                self.rate(now_ns)[0],
            )

    def check_tokens(self, tokens: int, now_ns: int) -> None:
        """Raises QueueFull if `tokens` more waiting prompt tokens are too many. A prompt alone in the queue always fits."""
        if self.tokens and self.tokens + tokens > self.max_tokens:
            raise self._full(
                "queue_tokens",
                f"{self.tokens} prompt tokens are already waiting and this prompt has {tokens} (--max-num-queued-tokens {self.max_tokens})",
                min(self.tokens, self.tokens + tokens - self.max_tokens),
                self.rate(now_ns)[1],
            )

    def check_template(self, owner: str) -> None:
        """Raises QueueFull if one more request with its own template is too many: for everybody, or for this owner."""
        waiting, own = self._templates.total(), self._templates[owner]
        if own >= MAX_TEMPLATES_EACH:
            raise self._full("queue_requests", f"{own} requests of yours wait for their own chat_template to be rendered", 0, 0)
        if waiting >= MAX_TEMPLATES:
            raise self._full("queue_requests", f"{waiting} requests wait for their own chat_template to be rendered", 0, 0)

    def template_enters(self, owner: str) -> None:
        self._templates[owner] += 1

    def template_leaves(self, owner: str) -> None:
        self._templates[owner] -= 1
        if not self._templates[owner]:
            del self._templates[owner]

    def enter(self) -> None:
        self.requests += 1

    def measured(self, tokens: int) -> None:
        """The prompt's length is known now."""
        self.tokens += tokens

    def leave(self, tokens: int) -> None:
        """A request that never started is gone."""
        self.requests -= 1
        self.tokens -= tokens

    def start(self, tokens: int, now_ns: int) -> None:
        """A request had its first step."""
        self.leave(tokens)
        self._decay(now_ns)
        self._rate += 1 / RATE_TAU_S
        self._tokens_rate += tokens / RATE_TAU_S

    def rate(self, now_ns: int) -> tuple[float, float]:
        """Requests and prompt tokens started per second, lately."""
        self._decay(now_ns)
        return self._rate, self._tokens_rate

    def _decay(self, now_ns: int) -> None:
        if now_ns > self._at_ns:
            factor = math.exp(-(now_ns - self._at_ns) / 1e9 / RATE_TAU_S)
            self._rate *= factor
            self._tokens_rate *= factor
            self._at_ns = now_ns

    def _full(self, reason: QueueLimit, why: str, excess: float, rate: float) -> QueueFull:
        """`excess` over `rate` is when there will be room: half the queue for requests (others come back too), what is over for tokens."""
        wait = float(math.ceil(min(MAX_RETRY_S, max(MIN_RETRY_S, excess / rate)))) if rate > 1e-6 else UNKNOWN_RETRY_S
        error = QueueFull(f"The server is busy: {why}. Try again in {wait:g} s.", reason=reason, retry_after_s=wait)
        error.status = self.status  # type: ignore[misc]  # the operator's choice: 429 or 503
        if self.status == 503:
            error.type = "server_error"  # type: ignore[misc]
        return error
