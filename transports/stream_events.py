"""What a request says about the events of its stream.

What it is: `events_of`, the further events that stream_options.events asks for; `interval_of`, how many tokens an event is; and `smoothing_of`, how long a token may wait so
that they come evenly.
What it does not know: how such events come about (json_values.py, merging.py, smoothing.py), what they look like.
"""

from __future__ import annotations

from penstock.core.protocol.config import MOST_INTERVAL, MOST_SMOOTHING_MS, Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Grammar
from penstock.core.protocol.sampling import shorten
from penstock.transports.openai_schema import StreamOptions

ARGUMENTS_DONE = "arguments_done"
"""The arguments of a call are complete and valid."""
JSON_VALUE = "json_value"
"""A value within an answer that is JSON is complete."""
EVENTS = (ARGUMENTS_DONE, JSON_VALUE)


def events_of(options: StreamOptions | None, grammar: Grammar | None) -> frozenset[str]:
    """Raises InvalidRequest naming `stream_options.events[i]`. `grammar` is what the answer must obey."""
    asked = options.events if options is not None else None
    for index, name in enumerate(asked or ()):
        param = f"stream_options.events[{index}]"
        if name not in EVENTS:
            raise InvalidRequest(f"{param} must be one of {', '.join(EVENTS)}, but is {name[:40]!r}.", param=param)
        if name == JSON_VALUE and (grammar is None or grammar.kind != "json"):
            raise InvalidRequest(
                f"{param}: {JSON_VALUE} is of answers that are JSON: ask for one with response_format json_schema or json_object.",
                param=param,
            )
    return frozenset(asked or ())


def interval_of(asked: int | None, config: Config) -> int:
    """Tokens an event. Raises InvalidRequest."""
    if asked is None:
        return config.stream_interval
    if not 1 <= asked <= MOST_INTERVAL:
        raise InvalidRequest(f"stream_interval must be between 1 and {MOST_INTERVAL}, but is {shorten(asked)}.", param="stream_interval")
    return asked


def smoothing_of(asked: float | None, config: Config, param: str = "stream_smoothing_ms") -> float:
    """Milliseconds that a token waits at most; 0: no smoothing. Raises InvalidRequest."""
    if asked is None:
        return config.stream_smoothing_ms
    if not 0 <= asked <= MOST_SMOOTHING_MS:  # what is no number fails too
        raise InvalidRequest(f"{param} must be between 0 and {MOST_SMOOTHING_MS} milliseconds, but is {asked:g}.", param=param)
    return asked
