"""Frames between processes, free of any loop.

What it is: the codec (u32 little-endian length, then one msgpack message), the Hello handshake with protocol level and schema fingerprint, and
`Outbox`, the two lanes in which frames wait, so that control never queues behind data. core/runtime/links.py (trio) and transports/link.py (asyncio)
move the bytes.
What it does not know: what messages mean, sockets, loops.

Order on a link: frames of one lane keep their order. A control frame overtakes waiting data frames, except those that concern the same
request: a Cancel must not reach the other side before its Submit.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import typing
from collections import Counter, deque
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from penstock.core.protocol.control import PROTOCOL_LEVEL, Hello, Message
from penstock.core.protocol.errors import ProtocolError

MAX_FRAME = 256 << 20
"""Largest frame in bytes, either way."""
SEND_BYTES = 256 << 10
"""The writer joins waiting frames up to about this size."""

_HEADER = struct.Struct("<I")


# ------------------------------------------------------------------ codec


@functools.cache
def _columns() -> Any:
    from penstock.core.protocol import columns  # late: root's links carry no columns, and root imports no numpy

    return columns


def _enc_hook(value: Any) -> Any:
    return _columns().enc_hook(value)


def _ext_hook(code: int, data: memoryview) -> Any:
    return _columns().ext_hook(code, data)


def _dec_hook(kind: type, value: Any) -> Any:
    return _columns().dec_hook(kind, value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)


def encode(message: Message) -> bytes:
    """One frame. Raises ProtocolError when it would be larger than MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"A {type(message).__name__} of {len(body)} bytes does not fit a frame ({MAX_FRAME}).")
    return _HEADER.pack(len(body)) + body


class FrameDecoder:
    """Bytes in any portions -> messages of `union`. After a ProtocolError the stream is lost: close it."""

    def __init__(self, union: Any, max_frame: int = MAX_FRAME) -> None:
        self._decode = msgspec.msgpack.Decoder(union, ext_hook=_ext_hook, dec_hook=_dec_hook).decode
        self._max = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Any]:
        """Messages completed by `data`, in order. Raises ProtocolError (too large, not msgpack, not of this link)."""
        buffer = self._buffer
        buffer += data
        out: list[Any] = []
        at, end = 0, len(buffer)
        with memoryview(buffer) as view:
            while end - at >= 4:
                (size,) = _HEADER.unpack_from(buffer, at)
                if size > self._max:
                    raise ProtocolError(f"A frame announces {size} bytes; at most {self._max} are allowed.")
                if end - at - 4 < size:
                    break
                try:
                    with view[at + 4 : at + 4 + size] as body:
                        out.append(self._decode(body))
                except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
                    raise ProtocolError(f"A frame of {size} bytes cannot be decoded: {error}") from error
                at += 4 + size
        if at:
            del buffer[:at]
        return out

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)


# ------------------------------------------------------------------ handshake


def _structs_in(kind: Any, found: dict[str, type]) -> None:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind.__qualname__ not in found:
            found[kind.__qualname__] = kind
            for hint in typing.get_type_hints(kind).values():
                _structs_in(hint, found)
        return
    for inner in typing.get_args(kind):
        _structs_in(inner, found)


def schema_of(types: Iterable[Any]) -> list[str]:
    """One line a struct that is reachable from `types`: its name and its fields with their types as written, in order."""
    found: dict[str, type] = {}
    for kind in types:
        _structs_in(kind, found)
    lines = []
    for name, kind in sorted(found.items()):
        hints = {field: note for base in reversed(kind.__mro__) for field, note in vars(base).get("__annotations__", {}).items()}
        lines.append(f"{name}({', '.join(f'{field}: {hints[field]}' for field in kind.__struct_fields__)})")  # type: ignore[attr-defined]
    return lines


def schema_fingerprint(types: Iterable[Any] | None = None) -> str:
    """A digest over names, fields and types of all messages (or of `types`); equal in every process of one build."""
    if types is None:
        from penstock.core.protocol.messages import message_types

        types = message_types()
    return hashlib.blake2b("\n".join(schema_of(types)).encode(), digest_size=8).hexdigest()


def make_hello(role: str, id: int, epoch: int, types: Iterable[Any] | None = None) -> Hello:
    return Hello(role=role, id=id, epoch=epoch, protocol_level=PROTOCOL_LEVEL, schema_fingerprint=schema_fingerprint(types))


def check_hello(mine: Hello, theirs: Any, roles: Collection[str] | None = None) -> Hello:
    """The peer's Hello, or ProtocolError saying what differs. `roles`: who may be at the other side of this link (None: anybody)."""
    if not isinstance(theirs, Hello):
        raise ProtocolError(f"The first frame of a link must be Hello, not {type(theirs).__name__}.")
    if roles is not None and theirs.role not in roles:
        raise ProtocolError(f"A process of the role {theirs.role!r} spoke on a link for {' or '.join(sorted(roles))}.")
    if theirs.protocol_level != mine.protocol_level or theirs.schema_fingerprint != mine.schema_fingerprint:
        raise ProtocolError(
            f"The {theirs.role} process speaks protocol {theirs.protocol_level} ({theirs.schema_fingerprint}), this {mine.role} process"
            f" {mine.protocol_level} ({mine.schema_fingerprint}). Restart the whole server with one version."
        )
    return theirs


# ------------------------------------------------------------------ lanes

CONTROL_NAMES = frozenset({"Hello", "Cancel", "Park", "Unpark", "Abort", "Drain", "Stop", "EngineUp", "EngineDown", "TextReady"})


def is_control(message: Message) -> bool:
    return type(message).__name__ in CONTROL_NAMES


def keys_of(message: Message) -> tuple[int, ...]:
    """The request keys that a frame concerns (see core/protocol/messages.py on identity); () if it concerns none."""
    key = getattr(message, "key", None)
    if key is not None:
        return (key,)
    seqs = getattr(message, "seqs", None) if type(message).__name__ == "Abort" else None
    return () if seqs is None else tuple(int(seq) >> 7 for seq in seqs)


class Outbox:
    """Frames that wait to be sent: a control lane and a data lane, with the rule of this module's docstring. No loop in here."""

    def __init__(self) -> None:
        self._control: deque[bytes] = deque()
        self._data: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._keys: Counter[int] = Counter()
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._control or self._data)

    def put(self, message: Message) -> None:
        frame = encode(message)
        self.bytes += len(frame)
        if is_control(message):
            keys = keys_of(message) if self._data else ()
            if not any(key in self._keys for key in keys):
                self._control.append(frame)
                return
        else:
            keys = keys_of(message)
        self._data.append((frame, keys))
        for key in keys:
            self._keys[key] += 1

    def take(self, limit: int = SEND_BYTES) -> bytes:
        """The next bytes to send: whole frames, control first, at least one frame, then up to `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while self._control and (size < limit or not parts):
            parts.append(self._control.popleft())
            size += len(parts[-1])
        while self._data and size < limit and not self._control:
            frame, keys = self._data.popleft()
            for key in keys:
                self._keys[key] -= 1
                if not self._keys[key]:
                    del self._keys[key]
            parts.append(frame)
            size += len(frame)
        self.bytes -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def clear(self) -> None:
        self._control.clear()
        self._data.clear()
        self._keys.clear()
        self.bytes = 0
