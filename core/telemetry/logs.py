"""Logging: structlog over the standard library, to the console or as JSON.

What it is: one call that sets structlog up for a process: JSON lines or coloured console lines on stderr, a least level, the process's name on every
line; the standard library's loggers come out in the same shape. (Spans and metrics: core/telemetry/.)
What it does not know: what is logged. Nothing is logged in the step loop.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure_logging(level: str, format: Literal["auto", "console", "json"] | str, role: str) -> Any:
    """Set up this process's logging and return its logger, bound to `process=role`. `format` auto: console on a terminal, else JSON."""
    terminal = sys.stderr.isatty()
    console = format == "console" or (format == "auto" and terminal)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _named(role),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
    ]
    tail: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for chatty in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(chatty).setLevel(max(LEVELS[level], logging.WARNING))
    return structlog.get_logger()


def _named(role: str) -> Any:
    def add(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        event.setdefault("process", role)
        if "_record" in event:
            event.setdefault("logger", event["_record"].name)
        return event

    return add
