"""Frames between processes.

What it is: the loop-free frame codec (u32 little-endian length, then one msgpack message), the Hello handshake with protocol level and schema
fingerprint, and `Link`, the trio adapter: one reader, one writer task that sends all small frames that wait in one call, and a control lane,
so that control never queues behind data. (transports/link.py is the asyncio adapter of the same codec.)
What it does not know: what messages mean, who takes them, which processes exist.

Order on a link: frames of one lane keep their order. A control frame overtakes waiting data frames, except those that concern the same
request: a Cancel must not reach the other side before its Submit.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import typing
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import trio

from penstock.core.control import PROTOCOL_LEVEL, Hello, Message
from penstock.core.errors import ProtocolError

MAX_FRAME = 256 << 20
"""Largest frame in bytes, either way."""
HIGH_WATER = 1 << 20
"""Bytes waiting on a link from which on `Link.room` holds producers back."""
MAX_QUEUED = 256 << 20
"""Bytes waiting on a link at which the peer counts as hung and the link is given up."""
SEND_BYTES = 256 << 10
"""The writer joins waiting frames up to about this size."""
GREETING_S = 10.0

_HEADER = struct.Struct("<I")


# ------------------------------------------------------------------ codec


@functools.cache
def _columns() -> Any:
    from penstock.core import columns  # late: root's links carry no columns, and root imports no numpy

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
        from penstock.core.messages import message_types

        types = message_types()
    return hashlib.blake2b("\n".join(schema_of(types)).encode(), digest_size=8).hexdigest()


def make_hello(role: Any, id: int, epoch: int, types: Iterable[Any] | None = None) -> Hello:
    return Hello(role=role, id=id, epoch=epoch, protocol_level=PROTOCOL_LEVEL, schema_fingerprint=schema_fingerprint(types))


def check_hello(mine: Hello, theirs: Any) -> Hello:
    """The peer's Hello, or ProtocolError saying what differs."""
    if not isinstance(theirs, Hello):
        raise ProtocolError(f"The first frame of a link must be Hello, not {type(theirs).__name__}.")
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
    """The request keys that a frame concerns (see core/messages.py on identity); () if it concerns none."""
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


# ------------------------------------------------------------------ trio adapter


class Link:
    """One connection to another process. `greet` first, then `run` until the link ends; `send` from anywhere on the trio thread."""

    def __init__(self, stream: trio.abc.Stream, receives: Any, hello: Hello, *, max_queued: int = MAX_QUEUED) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(receives)
        self._hello = hello
        self._outbox = Outbox()
        self._early: list[Any] = []
        self._max_queued = max_queued
        self._work = trio.Event()
        self._room = trio.Event()
        self._scope: trio.CancelScope | None = None
        self._closed = False
        self.peer: Hello | None = None

    @property
    def open(self) -> bool:
        return self.peer is not None and not self._closed

    @property
    def queued_bytes(self) -> int:
        return self._outbox.bytes

    async def greet(self) -> Hello:
        """Exchange Hellos. Raises ProtocolError (also on silence, or when the peer leaves)."""
        with trio.move_on_after(GREETING_S):
            try:
                await self._stream.send_all(encode(self._hello))
                while not self._early:
                    data = await self._stream.receive_some(1 << 16)
                    if not data:
                        raise ProtocolError("The other side closed the link instead of greeting.")
                    self._early = self._decoder.feed(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ProtocolError(f"The link broke while greeting: {error or type(error).__name__}.") from None
            self.peer = check_hello(self._hello, self._early.pop(0))
            return self.peer
        raise ProtocolError(f"The other side of a link did not greet within {GREETING_S:g} s.")

    def send(self, message: Message) -> None:
        """Queue a frame; a closed link drops it (what was on its way is void, PeerDown says so). A peer that hangs loses the link."""
        if self._closed:
            return
        self._outbox.put(message)
        if self._outbox.bytes > self._max_queued:
            self.close()
            return
        self._work.set()

    async def room(self) -> None:
        """Wait until fewer than HIGH_WATER bytes wait here (or the link is closed)."""
        while not self._closed and self._outbox.bytes > HIGH_WATER:
            await self._room.wait()

    async def flush(self) -> None:
        """Wait until everything was handed to the socket (or the link is closed)."""
        while not self._closed and self._outbox:
            await self._room.wait()

    async def run(self, deliver: Callable[[list[Any]], Any], hold: Callable[[], Any] | None = None) -> None:
        """Read and write until either side closes. `deliver(messages)` is a plain call; before reading on, `await hold()`: that is how a
        full consumer holds back this peer. Raises ProtocolError on malformed frames."""
        try:
            with trio.CancelScope() as self._scope:
                if self._closed:
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(deliver, hold)
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* ProtocolError as group:
            raise _first(group) from None
        finally:
            self.close()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _read(self, deliver: Callable[[list[Any]], Any], hold: Callable[[], Any] | None) -> None:
        early, self._early = self._early, []
        if early:
            deliver(early)
        while True:
            data = await self._stream.receive_some(1 << 18)
            if not data:
                return
            messages = self._decoder.feed(data)
            if messages:
                deliver(messages)
            if hold is not None:
                await hold()

    async def _write(self) -> None:
        outbox = self._outbox
        while True:
            if not outbox:
                self._room.set()
                self._room = trio.Event()
                await self._work.wait()
                self._work = trio.Event()
                continue
            await self._stream.send_all(outbox.take())
            if outbox.bytes <= HIGH_WATER:
                self._room.set()
                self._room = trio.Event()

    def close(self) -> None:
        """Drop the link at once. What waits is lost."""
        if not self._closed:
            self._closed = True
            self._outbox.clear()
            self._room.set()
            if self._scope is not None:
                self._scope.cancel()


def _first(group: BaseExceptionGroup[ProtocolError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
