"""Small files of a model folder, read.

What it is: texts and JSON objects of a Hugging Face folder (or of what an option names), and the one sentence about a file that cannot be used: which it is,
what is wrong, what to do. A file that may be missing is then as if it was empty; a link to nothing is missing too, but said.
What it does not know: what is in them, weights.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from penstock.core.protocol.errors import CheckpointError, spelled

log = logging.getLogger("penstock.models")

GGUF = ".gguf"
"""How the name of a model that is one file ends."""


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """For a file, or a folder on the way to it."""
    if isinstance(error, PermissionError):
        what = "permission denied. Let the user that Penstock runs as read it, and the folders above it"
    elif isinstance(error, FileNotFoundError) and path.is_symlink():
        what = f"it is a link to {spelled(str(path.readlink()))}, which does not exist. Put the file there, or copy it"
    elif isinstance(error, FileNotFoundError):
        what = "it does not exist"
    elif isinstance(error, IsADirectoryError):
        what = "it is a folder, and should be a file"
    else:
        what = error.strerror or type(error).__name__
    return CheckpointError(f"{spelled(str(path))} cannot be read: {what}.", param="model")


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises CheckpointError, but FileNotFoundError for what is not there (a link to nothing is)."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise
        if isinstance(error, NotADirectoryError) and path.parent.is_file():  # a model of one file has none beside it
            raise FileNotFoundError(2, "No such file", str(path)) from None
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{spelled(str(path))} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}). Save it as UTF-8.", param="model"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises as `read_text`."""
    text = read_text(path)
    name = spelled(str(path))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}. Copy it again from where the model came from.", param="model") from None
    except RecursionError:
        raise CheckpointError(
            f"{name} is nested too deeply: no model's file is. Copy it again from where it came from.", param="model"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must hold a JSON object, not {_KINDS.get(type(value).__name__, 'null')}.", param="model")
    return value


def optional_object(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file. Raises CheckpointError."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except CheckpointError as error:
        if path.exists() or not path.is_symlink():
            raise
        log.warning("%s It is left out.", error.message)
        return {}


_KINDS = {"list": "a list", "str": "a text", "int": "a number", "float": "a number", "bool": "true or false"}
