"""What the parts of the text actor share.

What it is: the ledger, admission, metrics, clock and log that pool, lanes, intake and ending all work on, and the ways to refuse a client and to
call plugins' hooks.
What it does not know: tokenizers, engines, what a stage does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.core.actors.text.admission import Admission
from penstock.core.actors.text.ledger import Ledger
from penstock.core.actors.text.retained import Streams
from penstock.core.actors.text.tenants import Tenants
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import PenstockError, QueueFull, RateLimited, described, tamed
from penstock.core.protocol.messages import Message, Rejected
from penstock.core.runtime.actor import To
from penstock.core.runtime.clock import Clock
from penstock.core.telemetry.metrics import Metrics
from penstock.core.telemetry.traces import Traces

Outbound = Message | To


def rejected(key: int, error: PenstockError) -> Rejected:
    return Rejected(
        key=key,
        status=error.status,
        type=error.type,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        standing=error.standing if isinstance(error, RateLimited) else None,
    )


class Desk:
    """`hooks` is a pluggy relay (request_finished, engine_ready, engine_lost) or None; `log` a structlog logger or None."""

    def __init__(self, config: Config, *, clock: Clock, metrics: Metrics, traces: Traces, hooks: Any = None, log: Any = None) -> None:
        self.config = config
        self.clock = clock
        self.metrics = metrics
        self.traces = traces
        self.log = log
        self._hooks = hooks
        self.ledger = Ledger()
        self.streams = Streams(config)
        self.admission = Admission(
            max_requests=config.max_num_queued_reqs, max_tokens=config.max_num_queued_tokens, status=config.queue_full_status
        )
        self.tenants: Tenants | None = None
        """Who may use how much; None: there are no tables."""
        self.drain_at_ns: int | None = None
        """When a drain's time is over; None: nobody asked for one."""

    @property
    def hears(self) -> bool:
        """Does any plugin's hook exist, so that a summary is worth making?"""
        return self._hooks is not None

    def hook(self, name: str, **arguments: Any) -> None:
        """Call a plugin's hook; its mistake is its own."""
        if self._hooks is None:
            return
        try:
            getattr(self._hooks, name)(**arguments)
        except BaseException as raised:
            error = tamed(raised)
            self.metrics.count("hook_errors", name)
            if self.log is not None:
                self.log.warning("a plugin's hook failed", hook=name, error=described(error))

    def refuse(self, key: int, edge: int, error: PenstockError) -> Iterator[To]:
        """Tell an edge that a request never started."""
        yield To(self.refusal(key, error), edge)

    def refusal(self, key: int, error: PenstockError) -> Rejected:
        """The word for it; it counts."""
        if isinstance(error, QueueFull):
            self.metrics.count("admission_rejections", error.reason)
        self.metrics.count("requests_rejected", error.code)
        return rejected(key, error)
