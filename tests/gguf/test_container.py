"""The container: what is read, and that no file is too wrong for one clear sentence."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_kit import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.errors import CheckpointError, PenstockError, UnsupportedFeature
from penstock.plugins.gguf.config import config_of
from penstock.plugins.gguf.container import GgufFile, Texts
from penstock.plugins.gguf.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with a field of every kind and two tensors."""
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 4000000000), ("int32", -70000)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_uint64("a.uint64", 1 << 40)
    writer.add_int64("a.int64", -(1 << 40))
    writer.add_float32("a.float32", 1e-6)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Grüße ☃")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ß"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 0.25])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_tensor("v", np.arange(5, dtype=np.float32))
    writer.add_tensor("m", np.arange(12, dtype=np.float16).reshape(3, 4))
    write(writer)
    return path.read_bytes()


def opened(folder: Path, data: bytes) -> GgufFile:
    path = folder / "y.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_every_kind_of_field_and_tensor(small: bytes, tmp_path: Path) -> None:
    file = opened(tmp_path, small)
    got = {key.removeprefix("a."): value for key, value in file.fields.items() if key.startswith("a.")}
    numbers, floats = got.pop("numbers"), got.pop("floats")
    assert got == {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4000000000, "int32": -70000, "uint64": 1 << 40,
        "int64": -(1 << 40), "float32": 1e-6, "float64": 0.1, "bool": True, "text": "Grüße ☃",
    }  # fmt: skip
    assert (numbers.tolist(), floats.tolist()) == ([1, -2, 3], [0.5, 0.25])
    texts = file.fields["tokenizer.ggml.tokens"]
    assert isinstance(texts, Texts)
    assert (len(texts), list(texts)) == (3, [b"a", b"", "ß".encode()])
    assert (file.tensors["m"].shape, file.tensors["m"].form.name) == ((3, 4), "F16")
    assert np.array_equal(file.array("m").view(np.float16), np.arange(12).reshape(3, 4))
    assert np.array_equal(file.array("v").view(np.float32), np.arange(5))


def test_version_2_is_read_alike(small: bytes, tmp_path: Path) -> None:
    older = small[:4] + struct.pack("<I", 2) + small[8:]
    assert opened(tmp_path, older).tensors == opened(tmp_path, small).tensors


def test_a_file_that_is_replaced_while_it_is_read_is_said(small: bytes, tmp_path: Path) -> None:
    file = opened(tmp_path, small)
    first = file.array("v")
    first[:] = 7  # stays here
    assert np.array_equal(file.array("v").view(np.float32), np.arange(5))
    (tmp_path / "new").write_bytes(small)
    (tmp_path / "new").replace(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match="changed while it was read: tensor 'v'"):
        file.array("v")


def refusal(folder: Path, data: bytes) -> str:
    """What is said against a file; "" where it is read."""
    try:
        opened(folder, data)
    except PenstockError as error:
        return error.message
    return ""


def test_wherever_a_file_is_cut_off_it_is_said(small: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, small) == ""
    for end in range(0, len(small) - 8, 3):  # the last tensor is 24 bytes and 8 of padding
        said = refusal(tmp_path, small[:end])
        assert any(word in said for word in ("cut off", "no GGUF file", "empty")), (end, said)
        assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: b"GGML" + d[4:], "is no GGUF file"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "GGUF version 1, which is not supported, only 2 and 3"),
        (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "the file is damaged: tensor .. has 16256 dimensions"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "damaged"),
        (lambda d: d[:24] + struct.pack("<Q", 1 << 62) + d[32:], "a name in the list of fields has"),
        (lambda d: d.replace(b"a.int16", b"a.int32"), "the field 'a.int32' is there twice"),
        (lambda d: d.replace(b"a.text", b"a.\xff\xfext"), "no UTF-8"),
        (lambda d: d.replace("☃".encode(), b"\xff\xff\xff"), "the field 'a.text' is no UTF-8"),
        (lambda d: d.replace(b"a.uint8" + struct.pack("<I", 0), b"a.uint8" + struct.pack("<I", 77)), "of the kind 77"),
        (lambda d: d.replace(b"a.numbers" + struct.pack("<II", 9, 5), b"a.numbers" + struct.pack("<II", 9, 9)), "a list of the kind 9"),
        (lambda d: d.replace(b"a.floats" + struct.pack("<IIQ", 9, 6, 2), b"a.floats" + struct.pack("<IIQ", 9, 6, 1 << 61)), "reaches beyond"),
        (lambda d: d.replace(b"tokens" + struct.pack("<IIQ", 9, 8, 3), b"tokens" + struct.pack("<IIQ", 9, 8, 1 << 61)), "reaches beyond"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_sentence(small: bytes, tmp_path: Path, change: Any, said: str) -> None:
    data = change(small)
    assert data != small
    with pytest.raises((CheckpointError, UnsupportedFeature), match=said) as caught:
        opened(tmp_path, data)
    assert "y.gguf" in caught.value.message


def _tensor(name: bytes, dims: list[int], form: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, form, offset)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([(b"t", [4], 0, 64)], r"tensor 't' ends at byte \d+ of a file of \d+: it is cut off"),
        ([(b"t", [1 << 40, 1 << 40], 0, 0)], "is cut off"),
        ([(b"t", [(1 << 63) + 1, 2], 8, 0)], "cannot be stored as Q8_0"),
        ([(b"t", [33], 8, 0)], r"shape \[33\], which cannot be stored as Q8_0"),
        ([(b"t", [0], 0, 0)], r"shape \[0\]"),
        ([(b"t", [], 0, 0)], r"shape \[\]"),
        ([(b"t", [1] * 5, 0, 0)], "has 5 dimensions"),
        ([(b"t", [4], 0, 7)], "no multiple of 32"),
        ([(b"t", [4], 0, 0), (b"t", [4], 0, 0)], "'t' is there twice"),
        ([(b"t", [256], 16, 0)], "tensor 't' is stored as IQ2_XXS, which is not supported yet, only F32, "),
        ([(b"t", [256], 4711, 0)], "form 4711"),
    ],
)
def test_what_is_wrong_with_a_tensor_names_it(tmp_path: Path, tensors: list[tuple[bytes, list[int], int, int]], said: str) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(_tensor(*one) for one in tensors)
    data = head + bytes(-len(head) % 32) + bytes(32)
    with pytest.raises((CheckpointError, UnsupportedFeature), match=said):
        opened(tmp_path, data)


@pytest.mark.parametrize("align", [0, 3, 48, 4])
def test_alignments_are_powers_of_two(tmp_path: Path, align: int) -> None:
    key = b"general.alignment"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<II", 4, align)
    with pytest.raises(CheckpointError, match=r"'general\.alignment' must be a power of two") as caught:
        opened(tmp_path, head)
    assert caught.value.param == "general.alignment"


def test_a_model_in_several_files_is_refused(tmp_path: Path) -> None:
    key = b"split.count"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IH", 2, 3)
    with pytest.raises(UnsupportedFeature, match=r"in 3 files, .* Merge them") as caught:
        opened(tmp_path, head)
    assert caught.value.param == "split.count"


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        GgufFile(tmp_path / "gone.gguf")
    with pytest.raises(CheckpointError, match="is empty"):
        opened(tmp_path, b"")


def everything(path: Path) -> None:
    """What a start reads, but for weights."""
    file = GgufFile(path)
    for name in file.tensors:
        file.array(name)
    for value in file.fields.values():
        if isinstance(value, Texts):
            list(value)
    for read in (lambda: config_of(str(path)), lambda: Vocabulary(file).merges()):
        with contextlib.suppress(PenstockError):
            read()


def complaint(path: Path) -> str:
    """What a client could be told of it."""
    try:
        everything(path)
    except PenstockError as error:
        return error.message.encode().decode()
    return ""


EDGE = st.sampled_from([0, 1, 8, 9, 0xFF, 0xFFFF, 1 << 31, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_are_more_than_an_error(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(4, len(changed) - 9))
        if data.draw(st.booleans()):
            changed[place] = data.draw(st.integers(0, 255))
        else:
            changed[place : place + 8] = struct.pack("<Q", data.draw(EDGE))
    path = tmp_path / "z.gguf"
    path.write_bytes(bytes(changed[: data.draw(st.integers(24, len(changed)))]))
    assert len(complaint(path)) < 1000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=200), tensors=EDGE, fields=EDGE)
def test_no_made_up_file_is_more_than_an_error(tmp_path: Path, rest: bytes, tensors: int, fields: int) -> None:
    path = tmp_path / "z.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest)
    assert len(complaint(path)) < 1000
