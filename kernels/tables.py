"""Tables of tiles: those that are shipped, by the card's name (tuned.json), and one of the user's own for a card, as `penstock tune` writes it.

What it is: a card's identity, which no driver changes; the user's table as a file in the cache, read so that nothing in it can stop a start, and written by
an atomic rename. $PENSTOCK_TILES names another file, or says "shipped": no table of the user's.
What it does not know: kernels, which table a kernel asks first (gpu.py), how tiles are measured (tuning/).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.kernels import cache

Tile = dict[str, int]
TUNED = Path(__file__).with_name("tuned.json")
FORMAT = 1
VARIABLE, SHIPPED = "PENSTOCK_TILES", "shipped"
FOLDER = "tiles"
MOST = 1 << 20
"""No number of a tile is larger."""
REMEDY = "Make it anew with `penstock tune`, or delete it."


class Identity(NamedTuple):
    """A card: its name alone does not say how much of it there is (slices of one card, cards of one name with other memory)."""

    name: str
    processors: int
    memory_gb_s: int
    """Of the memory's clock and width, two digits; 0 where nobody says."""

    @property
    def key(self) -> str:
        """For file names."""
        return f"{slug(self.name)}-{self.processors}-{self.memory_gb_s}"


class Table(NamedTuple):
    """The user's own table of a card."""

    path: Path
    tiles: dict[str, Tile]
    facts: dict[str, Any]
    """What stands beside the tiles in the file: device, versions, date, what was measured."""


class Unusable(Exception):
    """A file is no table for this card; the text names it and says what to do."""


def slug(name: str) -> str:
    """A card's name as tuned.json and files have it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@functools.cache
def shipped() -> dict[str, dict[str, Tile]]:
    """All tables of tuned.json."""
    tables: dict[str, dict[str, Tile]] = json.loads(TUNED.read_text())
    return tables


@functools.cache
def names_in(section: str) -> frozenset[str]:
    """Numbers that a tile of this section may have."""
    return frozenset(name for table in shipped().values() for name in table.get(section, {}))


def identity(device: int | None = None) -> Identity | None:
    """The current device's, or of the one with that index; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    facts: Any = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    rate = getattr(facts, "memory_clock_rate", 0) * getattr(facts, "memory_bus_width", 0) * 2 / 8e6  # kHz, bits, two a clock
    return Identity(str(facts.name), int(facts.multi_processor_count), two_digits(rate))


def two_digits(value: float) -> int:
    """A class of memory: 3352 is 3400, and so is what another firmware's clock makes of it."""
    if value < 1:
        return 0
    step: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return round(value / step) * step


def own_path(card: Identity) -> Path:
    """Where a card's own table is, if there is one."""
    return cache.root() / FOLDER / f"{card.key}.json"


def read(path: Path, card: Identity) -> Table:
    """Raises Unusable, or OSError where the file cannot be read at all."""
    found = parse(path, path.read_bytes())
    device = found.facts.get("device")
    if device != card._asdict():
        name = device.get("name") if isinstance(device, dict) else None
        raise Unusable(f"{path} was measured on another card ({name}, this is {card.name}, {card.processors} processors). {REMEDY}")
    return found


def parse(path: Path, data: bytes) -> Table:
    """A table, of whatever card. Raises Unusable."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise Unusable(f"{path} is damaged: no JSON. {REMEDY}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        version = facts.get("format") if isinstance(facts, dict) else None
        raise Unusable(f"{path} is no table of tiles that this version reads (format {version!r}, not {FORMAT}). {REMEDY}")
    tiles = facts.pop("tiles", None)
    if not isinstance(tiles, dict):
        raise Unusable(f"{path} is damaged: it has no tiles. {REMEDY}")
    for section, tile in tiles.items():
        wrong = wrong_tile(section, tile)
        if wrong:
            raise Unusable(f"{path}: {section}: {wrong}. {REMEDY}")
    return Table(path, tiles, facts)


def wrong_tile(section: str, tile: object) -> str | None:
    """What is wrong with it, as far as can be seen without launching anything."""
    known = names_in(section)
    if not known:
        return "no kernel of this version has that name"
    if not isinstance(tile, dict) or not tile:
        return "a tile is a table of numbers"
    for name, value in tile.items():
        if name not in known:
            return f"{name!r} is no number of its tiles ({', '.join(sorted(known))})"
        if type(value) is not int or not 0 <= value <= MOST:
            return f"{name} must be a whole number from 0 to {MOST}"
        if name == "num_warps" and value not in (1, 2, 4, 8, 16, 32):
            return "num_warps must be a power of two up to 32"
        if (name.startswith("BLOCK") or name in ("BM", "BN")) and (value < 1 or value & (value - 1)):
            return f"{name} must be a power of two"
    return None


class Own(NamedTuple):
    """What was found where a table of the user's may be."""

    table: Table | None = None
    problem: str | None = None
    """Why there is none although there is a file."""

    @property
    def tiles(self) -> dict[str, Tile]:
        """By section; empty without a table."""
        return {} if self.table is None else self.table.tiles


@functools.cache
def own() -> Own:
    """The user's table for the current device. Never raises."""
    asked = os.environ.get(VARIABLE, "")
    card = None if asked == SHIPPED else identity()
    if card is None:
        return Own()
    path = Path(asked) if asked else own_path(card)
    try:
        return Own(read(path, card))
    except Unusable as error:
        return Own(problem=str(error))
    except FileNotFoundError:
        return Own(problem=f"{VARIABLE}={asked}: there is no such file. Name one, or leave it out." if asked else None)
    except OSError as error:
        return Own(problem=f"{path} cannot be read ({error.strerror}). {REMEDY}")


def write(path: Path, card: Identity, tiles: Mapping[str, Tile], facts: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises OSError."""
    text = json.dumps({"format": FORMAT, "device": card._asdict(), **facts, "tiles": tiles}, indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def triton_version() -> str:
    """Of the Triton that compiles here; "" without one."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
