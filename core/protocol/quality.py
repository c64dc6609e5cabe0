"""What a quantised model costs, as it was measured: quality.json beside the weights, and the gate that asks for it.

What it is: the record that `penstock quant report` writes; its seal, which covers the record and samples of the weights' files (size, beginning and end),
so that a changed record, or one beside other weights, is none; which checkpoints have 4 bits; what `--quality-gate` says of one; and what a server tells of the
quality of what it serves.
What it does not know: how the figures are measured, what the weights mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.core.protocol.config import Config
from penstock.core.protocol.control import Quality
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.model_files import read_object

NAME = "quality.json"
SEAL = "record_sha256"
FIGURES = ("scheme", "kl_mean", "kl_p99", "top1", "ppl", "ppl_full", "tokens", "text_sha256", "layers")
"""Keys of a record, beside its seal."""
SAMPLE = 1 << 16
LONGEST = 120
"""Characters of a scheme that a server tells of: it becomes a metric's label."""
FOUR = ("int4", "nf4", "mxfp4")
"""Words of --quantization that round to 4 bits."""
FIELDS = ("num_bits", "bits", "w_bit", "wbits")
"""Of a quantization_config, wherever in it: bits of a weight."""
FLAGS = ("load_in_4bit", "_load_in_4bit")
NAMED_FOUR = re.compile(r"nvfp4|mxfp4|.*int[1-4](?!\d).*", re.IGNORECASE)
"""Words of a quantization_config, wherever in it, that name at most 4 bits: formats, and torchao's classes and types (`Int4WeightOnlyConfig`, `int4`)."""


def record_file(model: Path) -> Path:
    """Where the record of a folder, or of a GGUF file, lies."""
    return model / NAME if model.is_dir() else model.with_name(f"{model.name}.{NAME}")


def sealed(record: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """The record with its seal. Raises OSError."""
    figures = {name: record[name] for name in FIGURES}
    return {**figures, SEAL: _seal(figures, model)}


def read_record(model: Path) -> tuple[dict[str, Any] | None, str]:
    """(the record, ""), or (None, why there is none that counts)."""
    file = record_file(model)
    try:
        record = read_object(file)
    except FileNotFoundError:
        return None, f"there is no {file.name}"
    except (CheckpointError, OSError):
        return None, f"{file.name} cannot be read"
    if set(record) != {*FIGURES, SEAL}:
        return None, f"{file.name} does not have the keys of a record"
    try:
        seal = _seal({name: record[name] for name in FIGURES}, model)
    except (OSError, ValueError) as error:
        return None, f"what {file.name} speaks of cannot be read ({type(error).__name__})"
    if seal != record[SEAL]:
        return None, f"{file.name} was changed, or lies beside other weights than it was measured with"
    if not (isinstance(record["kl_mean"], int | float) and math.isfinite(record["kl_mean"])):
        return None, f"{file.name} holds no kl_mean"
    return record, ""


def _seal(figures: Mapping[str, Any], model: Path) -> str:
    digest = hashlib.sha256(json.dumps(figures, sort_keys=True, allow_nan=False).encode())
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    for file in [*files, *([model / "config.json"] if model.is_dir() else [])]:
        size = file.stat().st_size
        digest.update(f"{file.name if model.is_dir() else ''} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def quality_of(config: Config, kv_dtype: str = "") -> Quality | None:
    """Of what is served. A record counts for the files as they are: what is rounded while it is loaded, or while it runs, has none. `kv_dtype`: what the KV cache holds, if
    that is not what the model computes in; a record was measured with the cache that the checkpoint itself asks for."""
    if config.model is None or not (model := Path(config.model)).exists():
        return None
    own, kv = _stored(model), kv_dtype if config.kv_cache_dtype != "auto" else ""
    rounded = config.quantization if _rounds(model, config.quantization) else None
    head = f"lm_head {config.lm_head_quantization}" if config.lm_head_quantization else ""
    besides = [part for part in (head, f"KV cache {kv}" if kv else "") if part]
    if own and not rounded and not besides:
        record, _ = read_record(model)
        if record is not None:
            top1 = record["top1"] if isinstance(record["top1"], int | float) and math.isfinite(record["top1"]) else None
            scheme = str(record["scheme"])[:LONGEST]
            return Quality(scheme=scheme, status="measured", kl_mean=float(record["kl_mean"]), top1=top1, record=str(record[SEAL]))
        return Quality(scheme=own, status="unmeasured")
    if not own and not rounded and not besides:
        return Quality(scheme="wide", status="wide")
    weights = rounded or own or ("" if head else "wide")
    return Quality(scheme=", ".join(filter(None, (weights, *besides))), status="unmeasured")


def _rounds(model: Path, quantization: str | None) -> bool:
    """Whether --quantization rounds a wide model while it loads. A file's can be wide, too: then the word is another one than what such files are called."""
    if not quantization:
        return False
    return quantization.lower() != _stored(model) if model.is_file() else not _stored(model)


def _stored(model: Path) -> str:
    """How a checkpoint says that it is quantised; "": it does not."""
    if model.is_file():
        return model.suffix.removeprefix(".") or "file"
    try:
        config = read_object(model / "config.json")
    except (CheckpointError, OSError):  # said where the configuration is read
        return ""
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, Mapping):
        return ""
    return str(said.get("quant_method") or "compressed-tensors")[:LONGEST]


def four_bits(model: Path, quantization: str | None) -> bool:
    """Whether some of its weights have 4 bits, or may (a GGUF file's)."""
    if quantization in FOUR or model.is_file():
        return True
    try:
        config = read_object(model / "config.json")
    except (CheckpointError, OSError):  # said where the configuration is read
        return False
    return _says_four(config.get("quantization_config") or config.get("compression_config"))


def _says_four(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_says_four, value))
    if not isinstance(value, Mapping):
        return isinstance(value, str) and NAMED_FOUR.fullmatch(value) is not None
    named = any(value.get(name) == 4 for name in FIELDS) or any(value.get(name) is True for name in FLAGS)
    return named or any(map(_says_four, value.values()))


def gate(config: Config) -> str | None:
    """What to warn of, or None. Raises ConfigError where the gate is strict and the model (a path) has 4 bits and no record, or one past the bound."""
    word, most_kl, quantization = config.quality_gate, config.quality_max_kl, config.quantization
    head = config.lm_head_quantization
    if word == "off" or config.model is None or not (four_bits(model := Path(config.model), quantization) or head in FOUR):
        return None
    if head in FOUR or (quantization in FOUR and _rounds(model, quantization)):
        option = f"--lm-head-quantization {head}" if head in FOUR else f"--quantization {quantization}"
        write = f"Write the quantised model with `penstock quantize {model} --scheme w4a16 --out FOLDER`"
        if model.is_file():  # which quantize does not read
            write = "Make a FOLDER, or a GGUF file, of 4 bits with the program that made the file"
        why = (
            f"{option} rounds to 4 bits while loading, of which no record is kept. {write}, measure it with"
            f" `penstock quant report FOLDER --against {model} --text FILE` and serve FOLDER"
        )
        return _judged(word, why)
    record, missing = read_record(model)
    if record is None:
        why = (
            f"{model} has 4-bit weights, and nobody has recorded what they cost ({missing}). Run `penstock quant report {model} --against FULL --text FILE`"
            " with FULL the wide model and FILE texts like your own"
        )
        return _judged(word, why)
    if most_kl is not None and record["kl_mean"] > most_kl:
        why = (
            f"{model} has a mean KL divergence of {record['kl_mean']:.4g} a token from the wide model, more than --quality-max-kl {most_kl:g}. Take more"
            f" bits or another method (`penstock quantize --help`), raise the bound, or measure again with `penstock quant report {model} --against FULL"
            " --text FILE`"
        )
        return _judged(word, why)
    return None


def _judged(word: str, why: str) -> str:
    if word == "strict":
        raise ConfigError(f"--quality-gate strict: {why}. --quality-gate warn starts anyway.", param="quality_gate")
    return f"--quality-gate warn: {why}."
