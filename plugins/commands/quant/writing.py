"""A quantised copy of a Hugging Face folder, written one layer at a time.

What it is: which tensors are linear layers, the shards (what lies outside the layers, then each layer), and the folder beside the wanted one
(OUT.partial) where finished shards wait: a run that was ended goes on with the first that is missing, and the folder gets its name when
all is there.
What it does not know: how a weight is rounded (its caller gives that), formats (forms.py), the terminal.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.model_files import read_object
from penstock.kernels.linear.scheme import Quantised, Scheme, quantise
from penstock.plugins.commands.quant.forms import NF4_WORD, bitsandbytes, configuration, scale_dtype_of, scheme_of, tensors_of
from penstock.plugins.models.tied import HEAD, TABLE
from penstock.plugins.weights.checkpoint import EXPLICIT, FLOATS, INDEX, files_of, opened, sample_of

Round = Callable[[str, torch.Tensor, Scheme], Quantised]
"""(layer, its wide weight, scheme): called once a layer."""
NOTHING: Mapping[str, torch.Tensor] = {}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
SETTINGS = "penstock-run.json"
"""In the unfinished folder: what the run was asked for."""
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
NOT_COPIED = ("config.json", "quality.json", SETTINGS)
LM_HEAD = HEAD.removesuffix(".weight")
ROUTERS = (".gate", "_gate", ".router")
"""Ends of routers' names: small layers that decide much."""


class Source(NamedTuple):
    """A wide checkpoint: where its tensors are, and their shapes."""

    folder: Path
    config: dict[str, Any]
    where: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    identity: str


class Plan(NamedTuple):
    """What will be written."""

    source: Source
    word: str
    schemes: Mapping[str, Scheme]
    """Of the layers that are quantised."""
    wide: Sequence[str]
    """Linear layers that are not."""
    shards: Sequence[Sequence[str]]
    """Names of the source's tensors, a file each."""
    head: str | None = None
    """How the output head is stored, a word as `word`; None: wide."""

    def word_of(self, layer: str) -> str:
        """How a quantised layer is stored."""
        return self.head if layer == LM_HEAD and self.head is not None else self.word

    def configuration(self) -> dict[str, Any]:
        """`quantization_config`."""
        if self.word == NF4_WORD:
            return bitsandbytes(self.wide, str(self.source.config.get("dtype") or self.source.config.get("torch_dtype") or "bfloat16"))
        return configuration({layer: (self.word_of(layer), scheme) for layer, scheme in self.schemes.items()}, self.wide)


def open_source(folder: Path) -> Source:
    """Raises CheckpointError for what cannot be read, ConfigError for what is quantised already."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json: give the folder of a wide Hugging Face checkpoint.", param="model")
    config = read_object(folder / "config.json")
    if config.get("quantization_config") or config.get("compression_config"):
        raise ConfigError(f"{folder} is quantised already (config.json says so). Give the wide checkpoint.", param="model")
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    files = files_of(folder)
    for file in files:
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                where[name], shapes[name] = file, tuple(handle.get_slice(name).get_shape())
    digest = hashlib.sha256((folder / "config.json").read_bytes() + b"".join(sample_of(file) for file in files))
    return Source(folder, config, where, shapes, digest.hexdigest())


def nearest(plan: Plan) -> Round:
    """Rounding to the nearest."""
    return lambda layer, wide, scheme: quantise(wide, scheme, scale_dtype_of(plan.word_of(layer), wide.dtype))


def plan(source: Source, word: str, ignore: Sequence[str] = (), head: str | None = None) -> Plan:
    """Every linear layer within the model's layers; embeddings stay wide, and so does the output head without `head`, a word as `word`. Raises ConfigError where
    nothing is left to quantise, or where the head cannot be stored so."""
    if head is not None and (head == NF4_WORD) != (word == NF4_WORD):
        raise ConfigError(
            f"--lm-head {head} beside --scheme {word}: nf4 is bitsandbytes' format, the others are compressed-tensors', and a checkpoint has one. Take nf4 for"
            " both or for none.",
            param="lm_head",
        )
    schemes: dict[str, Scheme] = {}
    wide = []
    for name in sorted(source.shapes, key=_order):
        layer, shape = name.removesuffix(".weight"), source.shapes[name]
        if layer == name or len(shape) != 2 or "embed" in name:
            continue
        scheme = scheme_of(word, *shape) if LAYER.search(name) else None
        if scheme is None or layer.endswith(ROUTERS) or any(fnmatch.fnmatchcase(layer, pattern) for pattern in ignore):
            wide.append(layer)
        else:
            schemes[layer] = scheme
    if not schemes:
        raise ConfigError(
            f"--scheme {word}: {source.folder} has no linear layer that it could quantise. Look at --ignore, or take another scheme.",
            param="scheme",
        )
    if head is not None:
        wide = [layer for layer in wide if layer != LM_HEAD]
        schemes[LM_HEAD] = _head(source, head)
    elif LM_HEAD not in wide:
        wide.append(LM_HEAD)  # a tied one has no tensor, but other programs make a layer of it
    shards: dict[int, list[str]] = {}
    for name in sorted(source.shapes, key=_order):
        shards.setdefault(_order(name)[0], []).append(name)
    return Plan(source, word, schemes, wide, list(shards.values()), head)


def _head(source: Source, word: str) -> Scheme:
    """Of the output head, which is the embedding table where it has no tensor."""
    shape = next((source.shapes[name] for name in (HEAD, TABLE) if name in source.shapes), ())
    scheme = scheme_of(word, *shape) if len(shape) == 2 else None
    if scheme is None:
        raise ConfigError(
            f"--lm-head {word}: {source.folder} has no output head that it fits ({' x '.join(map(str, shape)) or 'neither ' + HEAD + ' nor ' + TABLE}). Try int8.",
            param="lm_head",
        )
    return scheme


def _order(name: str) -> tuple[int, str]:
    found = LAYER.search(name)
    return (int(found[1]) if found else -1, name)


def start(plan: Plan, out: Path, settings: Mapping[str, Any]) -> Path:
    """The folder to write in, new or an unfinished one of the same settings. Raises ConfigError where something else is in the way."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} holds something already, and nothing is overwritten. Name a new folder.", param="out")
    if not out.name:  # "." or "/"
        raise ConfigError(f"--out {out}: a new folder gets this name when all is there. Name one that is not there yet.", param="out")
    partial = out.with_name(out.name + ".partial")
    asked = json.dumps({**settings, "scheme": plan.word, "source": plan.source.identity}, sort_keys=True)
    note = partial / SETTINGS
    if partial.exists():
        if not note.is_file() or note.read_text(encoding="utf-8") != asked:
            raise ConfigError(
                f"{partial} is there already, and not the unfinished part of this very run. Take it away, or give another --out.",
                param="out",
            )
        return partial
    try:
        partial.mkdir(parents=True)
        note.write_text(asked, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {partial} cannot be made ({error.strerror}). Name a folder where you may write.", param="out"
        ) from None
    return partial


def shard_file(plan: Plan, partial: Path, index: int) -> Path:
    """Where shard `index` lies; the file is there if, and only if, the shard is finished."""
    return partial / f"model-{index + 1:05d}-of-{len(plan.shards):05d}.safetensors"


def write(plan: Plan, partial: Path, rounded: Round, tell: Callable[[int, int, str], None] = lambda done, all, what: None) -> int:
    """Write the shards that are missing: the number of those that were there already. `tell(done, all, what)` after each. Raises CheckpointError naming
    a tensor that cannot be quantised."""
    kept = 0
    for index, names in enumerate(plan.shards):
        if shard_file(plan, partial, index).is_file():
            kept += 1
        else:
            write_shard(plan, partial, index, rounded)
        tell(index + 1, len(plan.shards), names[0].rpartition(".")[0])
    return kept


def write_shard(plan: Plan, partial: Path, index: int, rounded: Round, other: Mapping[str, torch.Tensor] = NOTHING) -> None:
    """One shard, whole or not at all; `other` tensors take the place of those of their name. Raises CheckpointError."""
    file = shard_file(plan, partial, index)
    written = file.with_suffix(".tmp")
    tensors = _shard(plan, plan.shards[index], rounded, other)
    try:
        save_file(tensors, written, {"format": "pt"})
        os.replace(written, file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{written} cannot be written ({error}). Make room, then run the same command again: it goes on here.", param="out"
        ) from None


def finish(plan: Plan, partial: Path, out: Path) -> None:
    """When all shards are there: index, configuration and tokenizer, then the folder's name."""
    weight_map: dict[str, str] = {}
    size = 0
    for index in range(len(plan.shards)):
        file = shard_file(plan, partial, index)
        with safe_open(str(file), framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), file.name)
        size += file.stat().st_size
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)
    (partial / INDEX).write_text(index_text, encoding="utf-8")
    for file in sorted(plan.source.folder.iterdir()):
        told = file.name.endswith(".index.json") or file.name in NOT_COPIED
        if file.is_file() and not told and (file.suffix in COPIED or file.name.upper().startswith("LICENSE")):
            shutil.copyfile(file, partial / file.name)
    config = {key: value for key, value in plan.source.config.items() if key != EXPLICIT}
    config["quantization_config"] = plan.configuration()
    if plan.head is not None and config.get("tie_word_embeddings") is not False:
        config["tie_word_embeddings"] = False  # the table stays wide, the head is another tensor now
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (partial / SETTINGS).unlink()
    if out.is_dir():
        out.rmdir()  # it is empty
    os.replace(partial, out)


def _shard(plan: Plan, names: Sequence[str], rounded: Round, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for name in names:
        with safe_open(str(plan.source.where[name]), framework="pt") as handle:
            wide = handle.get_tensor(name)
        layer = name.removesuffix(".weight")
        scheme = plan.schemes.get(layer) if layer != name else None
        if name == TABLE and LM_HEAD in plan.schemes and HEAD not in plan.source.shapes:
            made |= _stored(plan, name, LM_HEAD, wide, plan.schemes[LM_HEAD], rounded)
        if scheme is None:
            made[name] = other.get(name, wide)
            continue
        made |= _stored(plan, name, layer, wide, scheme, rounded)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _stored(plan: Plan, name: str, layer: str, wide: torch.Tensor, scheme: Scheme, rounded: Round) -> dict[str, torch.Tensor]:
    if wide.dtype not in FLOATS:
        raise CheckpointError(f"tensor {name!r} is {wide.dtype}, not a wide one.", param=name)
    try:
        return tensors_of(plan.word_of(layer), layer, rounded(layer, wide, scheme), wide.dtype)
    except ValueError as error:
        raise CheckpointError(f"tensor {name!r} cannot be quantised: {error}.", param=name) from None
