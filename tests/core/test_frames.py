"""The frame codec, the handshake and the two lanes."""

from __future__ import annotations

import itertools
import random
import struct
import typing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol import columns
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import (
    Abort,
    Admit,
    Cancel,
    EdgeToText,
    EngineStats,
    EngineToText,
    Hello,
    Message,
    StepTokens,
    Submit,
    TextReady,
    TextToEngine,
    message_types,
    union_of,
)
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.frames import CONTROL_NAMES, FrameDecoder, Outbox, check_hello, encode, make_hello, schema_fingerprint, schema_of


def step_tokens(rows: int = 3) -> StepTokens:
    return StepTokens(
        engine=0,
        epoch=1,
        step=7,
        seqs=columns.i64(range(rows)),
        incarnations=columns.i32([1] * rows),
        offsets=columns.i32(range(rows)),
        tokens=columns.i32([5] * rows),
        reasons=columns.u8([0] * rows),
        stats=EngineStats(running=rows),
    )


def admit(key: int = 1, tokens: int = 4) -> Admit:
    return Admit(
        key=key,
        incarnation=1,
        prompt=columns.i32(range(tokens)),
        hashes=b"",
        root_hash=b"0" * 16,
        choices=columns.i32([0]),
        sampling=SamplingParams(seed=3),
        max_tokens=5,
        eos=columns.i32([0]),
    )


def submit(key: int = 1, prompt: str = "hi") -> Submit:
    return Submit(key=key, edge=0, rid="r", kind="completion", model="m", sampling=SamplingParams(), prompt=prompt)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and np.array_equal(a, b))
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def value_for(kind: Any, rng: random.Random) -> Any:
    """Some value of an annotated type: every message can be made, so every message can be sent."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is np.ndarray:
        return columns.i32([rng.randrange(-(2**31), 2**31) for _ in range(rng.randrange(4))])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return kind(**{name: value_for(hints[name], rng) for name in kind.__struct_fields__})
    if origin is typing.Literal:
        return rng.choice(args)
    if origin is typing.Annotated:
        return value_for(args[0], rng)
    if origin is list:
        return [value_for(args[0], rng) for _ in range(2)]
    if origin is tuple:
        return tuple(value_for(arg, rng) for arg in args)
    if origin is dict:
        return {value_for(args[0], rng): value_for(args[1], rng)}
    if (args and type(None) in args) or origin is typing.Union:
        return value_for(rng.choice([arg for arg in args if arg is not type(None)]), rng)
    plain = {int: 3, float: 0.5, str: "é", bytes: b"\x00\xff", bool: True}
    if kind in plain:
        return plain[kind]
    if kind is typing.Any:
        return "anything"
    return value_for(args[0], rng)  # a union


@pytest.mark.parametrize("kind", message_types(), ids=lambda kind: kind.__name__)
def test_every_message_survives_a_frame(kind: type[Message]) -> None:
    rng = random.Random(7)
    decoder = FrameDecoder(kind)
    for _ in range(3):
        message = value_for(kind, rng)
        (back,) = decoder.feed(encode(message))
        assert same(message, back)


@given(cuts=st.lists(st.integers(0, 3000), max_size=8), rows=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_frames_arrive_in_any_portions(cuts: list[int], rows: int) -> None:
    sent = [step_tokens(rows), step_tokens(1), step_tokens(0)]
    data = b"".join(map(encode, sent))
    decoder = FrameDecoder(EngineToText)
    got: list[Any] = []
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(bounds):
        got += decoder.feed(data[start:end])
    assert same(got, sent)
    assert decoder.pending == 0


def test_received_columns_own_their_bytes() -> None:
    """The decoder's buffer is reused: what it gave must not change with it."""
    decoder = FrameDecoder(EngineToText)
    (first,) = decoder.feed(encode(step_tokens(5)))
    decoder.feed(encode(step_tokens(64)))
    assert first.seqs.tolist() == list(range(5))
    assert not first.seqs.flags.writeable


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_garbage_never_gets_past_the_decoder(data: bytes) -> None:
    decoder = FrameDecoder(EdgeToText, max_frame=1 << 16)
    try:
        messages = decoder.feed(data)
    except ProtocolError:
        return
    assert all(isinstance(message, Message) for message in messages)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_flipped_bytes_are_an_error_or_another_valid_message(data: st.DataObject) -> None:
    frame = bytearray(encode(submit()))
    at = data.draw(st.integers(4, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        messages = FrameDecoder(EdgeToText, max_frame=1 << 16).feed(frame)
    except ProtocolError:
        return
    assert all(isinstance(message, Message) for message in messages)


def test_too_large_a_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most 1000"):
        FrameDecoder(EdgeToText, max_frame=1000).feed(struct.pack("<I", 1001))


def test_a_message_of_another_link_is_refused() -> None:
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        FrameDecoder(TextToEngine).feed(encode(submit()))


def test_columns_of_other_shapes_do_not_travel() -> None:
    with pytest.raises(TypeError, match="1-D"):
        encode(Abort(seqs=np.zeros((2, 2), np.int64)))
    with pytest.raises(TypeError, match="float64"):
        encode(Abort(seqs=np.zeros(2)))


def test_hello_must_agree() -> None:
    mine = make_hello("text", 0, 1)
    assert check_hello(mine, make_hello("edge", 3, 2)).id == 3
    with pytest.raises(ProtocolError, match="Restart the whole server"):
        check_hello(mine, msgspec.structs.replace(mine, schema_fingerprint="other"))
    with pytest.raises(ProtocolError, match="protocol 2"):
        check_hello(mine, msgspec.structs.replace(mine, protocol_level=2))
    with pytest.raises(ProtocolError, match="must be Hello"):
        check_hello(mine, submit())


def test_the_fingerprint_sees_names_fields_and_types() -> None:
    class A(msgspec.Struct):
        x: int

    before = schema_fingerprint([A])

    class Inner(msgspec.Struct):
        deep: str

    class B(msgspec.Struct):
        x: int
        y: str = ""

    class C(msgspec.Struct):
        x: float

    assert len({before, schema_fingerprint([B]), schema_fingerprint([C]), schema_fingerprint([Inner])}) == 4
    lines = "\n".join(schema_of([Submit]))
    assert "SamplingParams(" in lines
    assert schema_fingerprint() == schema_fingerprint()


def test_control_overtakes_data_but_never_its_own_request() -> None:
    box = Outbox()
    box.put(admit(key=1))
    box.put(admit(key=2))
    box.put(Cancel(key=9))  # nobody waits with key 9: goes first
    box.put(Abort(seqs=columns.i64([1 << 7 | 3])))  # its Admit still waits: goes behind it
    box.put(TextReady(ready=True))
    decoder = FrameDecoder(Admit | Cancel | Abort | TextReady)
    order = [type(m).__name__ for m in decoder.feed(box.take(1 << 20) + box.take(1 << 20))]
    assert order == ["Cancel", "TextReady", "Admit", "Admit", "Abort"]
    assert not box
    assert box.bytes == 0
    box.put(admit(key=1))
    box.take()
    box.put(admit(key=5))
    box.put(Abort(seqs=columns.i64([1 << 7])))  # that Admit has left: no need to wait
    (first,) = decoder.feed(box.take(1))
    assert isinstance(first, Abort)


def test_small_frames_leave_together_and_large_ones_alone() -> None:
    box = Outbox()
    for key in range(100):
        box.put(admit(key=key))
    total = box.bytes
    assert len(box.take(1 << 20)) == total
    box.put(admit(tokens=100_000))
    box.put(admit(tokens=100_000))
    assert 400_000 < len(box.take(1000)) < 500_000
    assert box


def test_control_types_exist_and_travel() -> None:
    known = {kind.__name__ for kind in message_types()}
    assert known >= CONTROL_NAMES
    travelling = {
        kind.__name__
        for link in ("edge>text", "text>edge", "text>engine", "engine>text", "root>child", "child>root")
        for kind in typing.get_args(union_of(link))  # type: ignore[arg-type]
    }
    assert travelling >= CONTROL_NAMES
    assert Hello.__name__ in travelling
