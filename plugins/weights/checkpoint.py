"""Tensors of a Hugging Face folder's safetensors files, taken one by one.

What it is: memory-mapped reading of the file that config.json's `transformers_weights` names, else of `model.safetensors` or, where there is
none, of the shards that `model.safetensors.index.json` names, with checks that name the tensor and the file. Which files are read, and which of two tensors of one name, is as in transformers; what lies there
unread is said. A tensor is converted to the wanted dtype when it is taken, so that beside the packed weights only one layer's tensors exist
at a time.
What it does not know: what the names mean, but for the prefix of a base model (BASE).
"""

from __future__ import annotations

import hashlib
import logging
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.core.protocol.model_files import read_object, unreadable

log = logging.getLogger("penstock.weights")
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = "model" + INDEX_SUFFIX
EXPLICIT = "transformers_weights"
"""A field of config.json: the file, or the index, that counts before SINGLE and INDEX."""
ADAPTER = "adapter_config.json"
BASE = "model."
"""What names begin with if a whole model was saved, but not if its base model alone was. As in transformers each name is found with it or without."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of dtypes -> config.json's."""


def files_of(path: str | Path) -> list[Path]:
    """The files that hold the checkpoint: what config.json names, the whole one if it is there, else the shards of the index. Raises
    CheckpointError."""
    folder = Path(path)
    named = _explicit(folder)
    if named is not None and not named.endswith(INDEX_SUFFIX):
        return [folder / named]
    if named is None and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if named is not None or (folder / INDEX).is_file():
        return _shards(folder, folder / (named or INDEX))
    for name in (SINGLE, INDEX):
        if (folder / name).is_symlink() or (folder / name).exists():  # and it is no file
            gone = IsADirectoryError() if (folder / name).is_dir() else FileNotFoundError()
            raise unreadable(folder / name, gone)
    beside = unread(folder, [])
    others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
    resave = "only safetensors are, as other files may run code: load the model with the library that wrote it, and save it as safetensors"
    hint = f" ({_list(others)} cannot be read; {resave})" if others else f" (only {_list(beside)})" if beside else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}.", param="model")


def _explicit(folder: Path) -> str | None:
    """The name in config.json, checked. Raises CheckpointError."""
    try:
        config = read_object(folder / "config.json")
    except (CheckpointError, FileNotFoundError):  # said where the configuration is read
        return None
    named = config.get(EXPLICIT)
    if named is None:
        return None
    where = f"{folder / 'config.json'}: {EXPLICIT}"
    if not isinstance(named, str) or not named.endswith((".safetensors", INDEX_SUFFIX)):
        raise CheckpointError(f"{where} must name a safetensors file or its index, but is {named!r:.80}.", param=EXPLICIT)
    if not Path(os.path.normpath(folder / named)).is_relative_to(os.path.normpath(folder)):
        raise CheckpointError(f"{where} names {named}, which lies outside the folder.", param=EXPLICIT)
    if not (folder / named).is_file():
        raise CheckpointError(f"{where} names {named}, which does not exist.", param=EXPLICIT)
    return named


def _shards(folder: Path, index: Path) -> list[Path]:
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) and file for file in table.values()):
        wrong = (
            "it is empty" if table == {} else "it is missing" if table is None else "it must be an object: tensors' names and their files"
        )
        raise CheckpointError(
            f"{index} has no usable 'weight_map' ({wrong}). Copy the index again from where the model came from.", param="weight_map"
        )
    named = sorted({os.path.normpath(folder / file) for file in table.values()})
    files = [Path(file) for file in named]
    for file in files:
        if not file.is_relative_to(os.path.normpath(folder)):
            raise CheckpointError(f"{index} names {file}, which lies outside the folder.", param="weight_map")
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        more = f" (nor do {len(gone) - 1} more of its {len(files)} files)" if len(gone) > 1 else ""
        raise CheckpointError(f"{index} names {gone[0]}, which does not exist{more}.", param="weight_map")
    return files


def unread(path: str | Path, files: Sequence[Path]) -> list[str]:
    """Names in the folder that look like a part of the checkpoint, but are none."""
    folder, read = Path(path), {os.path.normpath(file) for file in files}
    named = _explicit(folder)
    followed = named == INDEX or (named is None and os.path.normpath(folder / SINGLE) not in read)
    beside = sorted(file.name for file in folder.glob("*.safetensors") if os.path.normpath(file) not in read)
    return ([INDEX] if files and not followed and (folder / INDEX).exists() else []) + beside


def stored_dtype(path: str | Path) -> str | None:
    """The dtype of the first floating tensor of 16 bits or more, as config.json would call it: what a configuration without a dtype means. None: another one."""
    with opened(files_of(path)[0]) as handle:
        kinds = (str(handle.get_slice(name).get_dtype()) for name in handle.keys())  # noqa: SIM118 (not a dict)
        return STORED.get(next((kind for kind in kinds if "F" in kind and "F8" not in kind), ""))


def opened(file: Path) -> Any:
    try:
        with file.open("rb"):  # says why better than what follows
            pass
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file ({error}).", param="model") from None


class Checkpoint:
    """See plugins/models/api.py: Weights. `dtype` is what taken tensors are converted to."""

    def __init__(self, path: str | Path, dtype: torch.dtype) -> None:
        self._folder = Path(path)
        self._dtype = dtype
        self._files = files_of(path)
        self._open = {file: opened(file) for file in self._files}
        self._where: dict[str, Path] = {}
        self._notes: dict[str, str] = {}
        twice: list[str] = []
        for file, handle in self._open.items():  # of one name, the last file's counts
            names = list(handle.keys())
            twice += [name for name in names if name in self._where]
            self._where |= dict.fromkeys(names, file)
            self._notes |= handle.metadata() or {}
        self._unread = unread(path, self._files)
        if self._unread:
            log.warning("%s: weights are read from %s; ignored: %s", path, _list([f.name for f in self._files]), _list(self._unread))
        if (self._folder / ADAPTER).is_file():
            log.warning(
                "%s: the adapter that lies beside the weights is not applied: merge it into them, or take it away.", self._folder / ADAPTER
            )
        if twice:
            log.warning("%s: several files hold %s; the last one's counts", path, _list(sorted(set(twice))))
        self._left = set(self._where)
        self._ignored: set[str] = set()
        self._renamed: set[str] = set()

    def names(self) -> list[str]:
        """Of all its tensors, as the files have them."""
        return list(self._where)

    def has(self, name: str) -> bool:
        """See Weights."""
        return self._stored(name) is not None

    def _stored(self, name: str) -> str | None:
        """The file's name of a tensor."""
        return next((one for one in (name, BASE + name, name.removeprefix(BASE)) if one in self._where), None)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """See Weights.take."""
        file, value = self._read(name, f"; the configuration asks for one of shape {list(shape)}")
        if list(value.shape) != list(shape):
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {list(value.shape)}, the configuration says {list(shape)}.", param=name
            )
        if value.dtype not in FLOATS:
            raise UnsupportedFeature(
                f"{file}: tensor {name!r} is {value.dtype}, and config.json has no quantization_config that says what it means.", param=name
            )
        return value.to(self._dtype).contiguous()

    def raw(self, name: str) -> torch.Tensor:
        """See Weights."""
        return self._read(name, "")[1]

    def _read(self, name: str, wanted: str) -> tuple[Path, torch.Tensor]:
        stored = self._stored(name)
        if stored is None:
            beside = f" (These files are there, but not read: {_list(self._unread)}.)" if self._unread else ""
            raise CheckpointError(f"{self._folder}: tensor {name!r} is missing{wanted}.{beside}", param=name)
        if stored != name:
            self._renamed.add(stored)
        file = self._where[stored]
        self._left.discard(stored)
        try:
            return file, self._open[file].get_tensor(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: tensor {stored!r} cannot be read ({error}).", param=stored) from None

    def note(self, name: str) -> str | None:
        """What the header of a file says under this name, or with or without BASE, whether there is a tensor of that name or not."""
        return next((self._notes[one] for one in (name, BASE + name, name.removeprefix(BASE)) if one in self._notes), None)

    def ignore(self, *names: str) -> None:
        """See Weights.ignore."""
        self._ignored.update(names)

    def finish(self) -> None:
        """See Weights.finish."""
        self._open.clear()
        if self._renamed:
            log.warning(
                "%s: names of %d tensors are read as if the prefix %r was there, or was not (%s)",
                self._folder,
                len(self._renamed),
                BASE,
                _list(sorted(self._renamed)),
            )
        left = sorted(name for name in self._left if not self._ignored & {name, BASE + name, name.removeprefix(BASE)})
        if left:
            raise CheckpointError(
                f"{self._folder} holds tensors that this architecture does not use: {_list(left)}."
                " Serving without them would give wrong answers.",
                param=left[0],
            )

    def identity(self) -> str:
        """See Weights."""
        return " ".join(sample_of(file).hex() for file in self._files)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def sample_of(file: Path) -> bytes:
    """A digest of a file's size, header and both ends (not of every byte: reading a large checkpoint twice would double the start)."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        header = stream.read(min(size, 8))
        digest.update(header + stream.read(min(int.from_bytes(header, "little"), size, 1 << 24)) + stream.read(1 << 16))
        stream.seek(max(0, size - (1 << 16)))
        digest.update(stream.read() + str(size).encode())
    return digest.digest()
