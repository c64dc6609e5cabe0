"""What a client may ask of a stream that outlives its connection.

What it is: `retention`, which reads retain_s and on_disconnect, from the body or from the headers x-penstock-retain and x-penstock-on-disconnect, which any surface has.
What it does not know: how streams are kept and resumed (retained.py).
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import OnDisconnect
from penstock.transports.generation import Generation
from penstock.transports.request import sane_id

RETAIN, ON_DISCONNECT = b"x-penstock-retain", b"x-penstock-on-disconnect"
IMPLIED_S = 60.0
"""How long a stream is kept whose client says what is to happen when it leaves, but not for how long."""
MODES: tuple[OnDisconnect, ...] = ("cancel", "continue", "park")


class Retention(NamedTuple):
    """`seconds`: kept so long after its end, or after its last reader left."""

    seconds: float
    on_disconnect: OnDisconnect


def check_seconds(seconds: float, name: str, config: Config) -> None:
    """Raises InvalidRequest naming the field."""
    if not 0 <= seconds <= config.max_retain_s:  # what is no number fails too
        raise InvalidRequest(
            f"{name} must be between 0 and {config.max_retain_s:g} seconds (--max-retain-s), but is {seconds:g}.", param=name
        )


def retention(generation: Generation, headers: dict[bytes, bytes], config: Config) -> Retention | None:
    """What the client asks for; the body goes before the headers. Raises InvalidRequest."""
    seconds, name = generation.retain_s, generation.names.get("retain_s", "retain_s")
    if seconds is None and (text := headers.get(RETAIN)) is not None:
        name = RETAIN.decode()
        try:
            seconds = float(text)
        except ValueError:
            raise InvalidRequest(f"{name} must be a number of seconds.", param=name) from None
    mode, how = generation.on_disconnect, "on_disconnect"
    if mode is None and (said := headers.get(ON_DISCONNECT)) is not None:
        mode, how = said.decode("latin-1"), ON_DISCONNECT.decode()
    if mode is not None and mode not in MODES:
        raise InvalidRequest(f"{how} must be one of {', '.join(MODES)}.", param=how)
    if seconds is None:
        if mode is None or mode == "cancel":
            return None
        seconds, name = min(IMPLIED_S, config.max_retain_s), how
    check_seconds(seconds, name, config)
    if not seconds and mode not in (None, "cancel"):
        raise InvalidRequest(f"{how} {mode} needs {name} above 0: the stream is to be kept for whoever comes back.", param=name)
    if not seconds:
        return None
    named = headers.get(b"x-request-id")
    if named and sane_id(named.decode("latin-1")) is None:
        raise InvalidRequest(
            "x-request-id is the name of a stream that is kept: letters, digits and . _ : - alone, at most 128 of them.",
            param="x-request-id",
        )
    if not generation.stream:
        raise InvalidRequest(f"{name} is for streams alone: send stream: true with it.", param=name)
    return Retention(seconds, mode or "continue")
