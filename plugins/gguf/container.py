"""The container of a GGUF file, read: its fields, and where its tensors lie.

What it is: version 2 and 3, little-endian. The file is mapped; every length in it is checked against the file's own before anything is made of it, so that
a wrong file costs no more than its size and is one clear error. Lists of texts (a vocabulary) are walked over and decoded when they are asked for.
What it does not know: what fields and tensors mean, how blocks of numbers are read.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature, spelled
from penstock.core.protocol.model_files import unreadable
from penstock.plugins.gguf.types import FORMS, OTHERS, Form

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 24
MOST_KEY_BYTES = 65535
MOST_NAME_BYTES = 65535
MOST_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of a field's value -> how `struct` reads it."""
TEXT, ARRAY, FLAG, FLOAT32 = 8, 9, 7, 6
ALIGNMENT = "general.alignment"
SPLIT = "split.count"


class Place(NamedTuple):
    """Where a tensor lies and how it is stored."""

    form: Form
    shape: tuple[int, ...]
    """Rows first, as in torch (the file has it the other way round)."""
    start: int
    """In the file."""
    nbytes: int


class Texts:
    """A list of texts in the file, checked and not yet read."""

    def __init__(self, data: mmap.mmap, start: int, count: int) -> None:
        self._data, self._start, self._count = data, start, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        place, data = self._start, self._data
        length = struct.Struct("<Q").unpack_from
        for _ in range(self._count):
            end = place + 8 + length(data, place)[0]
            yield data[place + 8 : end]
            place = end


class _Cursor:
    """Reads on from a place. Raises CheckpointError where the file is too short for what it says."""

    def __init__(self, data: mmap.mmap, path: str, place: int) -> None:
        self.data, self.place, self.size = data, place, len(data)
        self.path = path
        self.what = "its header"

    def wrong(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}. Copy the file again from where it came from.", param="model")

    def skip(self, count: int) -> int:
        """Step over so many bytes: where they begin."""
        if count > self.size - self.place:
            raise self.wrong(f"the file is cut off or damaged: {self.what} reaches beyond its {self.size} bytes")
        start, self.place = self.place, self.place + count
        return start

    def number(self, code: str) -> Any:
        form = struct.Struct("<" + code)
        return form.unpack_from(self.data, self.skip(form.size))[0]

    def text(self, most: int | None = None) -> bytes:
        length = self.number("Q")
        if most is not None and length > most:
            raise self.wrong(f"the file is damaged: a name in {self.what} has {length} bytes")
        start = self.skip(length)
        return self.data[start : start + length]

    def name(self, most: int) -> str:
        return decoded(self.text(most), f"{self.path}: a name in {self.what}")


class GgufFile:
    """Raises CheckpointError for a file that cannot be read or is damaged, UnsupportedFeature for one of another version or form."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = spelled(str(path))
        with _opened(self.path) as stream:
            self._mark = _mark(stream)
            if self._mark[0] == 0:
                raise CheckpointError(f"{self.name} is empty: it is no GGUF file.", param="model")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.fields: dict[str, Any] = {}
        """Numbers, flags, texts, arrays of numbers, and `Texts`."""
        self.tensors: dict[str, Place] = {}
        tensors, fields, cursor = self._header()
        for _ in range(fields):
            self._field(cursor)
        if self.fields.get(SPLIT, 1) not in (0, 1):
            raise UnsupportedFeature(
                f"{self.name}: '{SPLIT}' says that the model lies in {self.fields[SPLIT]} files, which is not supported yet. Merge them into one"
                " (llama-gguf-split --merge).",
                param=SPLIT,
            )
        listed: list[tuple[str, Form, tuple[int, ...], int]] = []
        cursor.what = "the list of tensors"
        for _ in range(tensors):
            listed.append(self._tensor(cursor))
        align = self.fields.get(ALIGNMENT, 32)
        if type(align) is not int or align < 8 or align & (align - 1):
            raise CheckpointError(
                f"{self.name}: '{ALIGNMENT}' must be a power of two of at least 8, but is {shown(align)}.", param=ALIGNMENT
            )
        self.start = -(-cursor.place // align) * align
        """Of the tensors' data."""
        for name, form, shape, offset in listed:
            self._place(name, form, shape, offset, align)

    def array(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, mapped: [rows, bytes of a row] of a matrix, [bytes] of a vector. What is written to them (by mistake) stays in this
        process; so the kernel counts them as memory, and each tensor is mapped by itself. Raises CheckpointError if the file is another one by now."""
        place = self.tensors[name]
        before = place.start % mmap.ALLOCATIONGRANULARITY
        with _opened(self.path) as stream:
            if _mark(stream) != self._mark:
                raise CheckpointError(f"{self.name} changed while it was read: tensor {shown(name)} would be another model's.", param=name)
            mapped = mmap.mmap(stream.fileno(), before + place.nbytes, access=mmap.ACCESS_COPY, offset=place.start - before)
        flat = np.frombuffer(mapped, np.uint8, place.nbytes, before)
        return flat if len(place.shape) < 2 else flat.reshape(math.prod(place.shape[:-1]), -1)

    def _header(self) -> tuple[int, int, _Cursor]:
        if len(self.data) < HEADER_BYTES or self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.name} is no GGUF file: it does not begin as one.", param="model")
        self.version, tensors, fields = struct.unpack_from("<IQQ", self.data, 4)
        if self.version not in VERSIONS:
            swapped = struct.unpack_from(">I", self.data, 4)[0]
            if swapped in VERSIONS:
                raise UnsupportedFeature(
                    f"{self.name} is a big-endian GGUF file, which is not supported, only little-endian.", param="model"
                )
            raise UnsupportedFeature(
                f"{self.name} is of GGUF version {self.version}, which is not supported, only {' and '.join(map(str, VERSIONS))}.",
                param="model",
            )
        return tensors, fields, _Cursor(self.data, self.name, HEADER_BYTES)

    def _field(self, cursor: _Cursor) -> None:
        cursor.what = "the list of fields"
        key = cursor.name(MOST_KEY_BYTES)
        cursor.what = f"the field {shown(key)}"
        if key in self.fields:
            raise cursor.wrong(f"the file is damaged: {cursor.what} is there twice")
        self.fields[key] = self._value(cursor, cursor.number("I"), key)

    def _value(self, cursor: _Cursor, kind: int, key: str) -> Any:
        if kind == TEXT:
            return decoded(cursor.text(), f"{self.name}: the field {shown(key)}")
        if kind == ARRAY:
            return self._array(cursor)
        if kind == FLAG:
            return cursor.number("B") != 0
        if kind not in SCALARS:
            raise cursor.wrong(f"the file is damaged: {cursor.what} is of the kind {kind}, which GGUF does not have")
        value = cursor.number(SCALARS[kind])
        return _decimal(value) if kind == FLOAT32 else value

    def _array(self, cursor: _Cursor) -> Any:
        kind, count = cursor.number("I"), cursor.number("Q")
        if kind == TEXT:
            return _texts(cursor, count)
        if kind not in SCALARS:
            raise cursor.wrong(f"{cursor.what} is a list of the kind {kind}, which no model's is")
        dtype = np.dtype("<" + SCALARS[kind]) if kind != FLAG else np.dtype(np.uint8)
        start = cursor.skip(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start)

    def _tensor(self, cursor: _Cursor) -> tuple[str, Form, tuple[int, ...], int]:
        name = cursor.name(MOST_NAME_BYTES)
        dimensions = cursor.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise cursor.wrong(f"the file is damaged: tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number = cursor.number("I")
        form, offset = FORMS.get(number), cursor.number("Q")
        if form is None:
            raise UnsupportedFeature(
                f"{self.name}: tensor {shown(name)} is stored as {OTHERS.get(number, f'form {number}')}, which is not supported yet, only"
                f" {', '.join(one.name for one in FORMS.values())}.",
                param=name,
            )
        return name, form, shape, offset

    def _place(self, name: str, form: Form, shape: tuple[int, ...], offset: int, align: int) -> None:
        what = f"{self.name}: tensor {shown(name)}"
        if name in self.tensors:
            raise CheckpointError(f"{what} is there twice: the file is damaged.", param=name)
        if not shape or math.prod(shape) == 0 or shape[-1] % form.values:
            raise CheckpointError(
                f"{what} has shape {list(shape)}, which cannot be stored as {form.name}: the file is damaged.", param=name
            )
        if offset % align:
            raise CheckpointError(f"{what} lies at {offset}, which is no multiple of {align}: the file is damaged.", param=name)
        nbytes, start = form.row_bytes(math.prod(shape)), self.start + offset
        if start + nbytes > len(self.data):
            raise CheckpointError(
                f"{what} ends at byte {start + nbytes} of a file of {len(self.data)}: it is cut off. Copy it again from where it came from.",
                param=name,
            )
        self.tensors[name] = Place(form, shape, start, nbytes)


def _opened(path: Path) -> BinaryIO:
    """Raises CheckpointError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def _mark(stream: BinaryIO) -> tuple[int, int, int]:
    """(size, number, time of its last change) of an open file."""
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_ino, found.st_mtime_ns


def _texts(cursor: _Cursor, count: int) -> Texts:
    """Over so many texts."""
    start = place = cursor.place
    size, data = cursor.size, cursor.data
    length = struct.Struct("<Q").unpack_from
    for _ in range(count):
        if place + 8 > size:
            place = size + 1
            break
        place += 8 + length(data, place)[0]
    cursor.skip(place - start)
    return Texts(data, start, count)


def _decimal(value: float) -> float:
    """The shortest number that is stored so: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def decoded(raw: bytes, what: str) -> str:
    """Raises CheckpointError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{what} is no UTF-8: the file is damaged.", param="model") from None


def shown(value: object) -> str:
    """For a message: short, however long the file made it."""
    return f"{value!r:.80}"
