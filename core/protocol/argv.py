"""A command line of `penstock serve` as vLLM's users write it, made plain for click.

What it is: `tidy` takes the words apart by the table of options: underscores for dashes, every alias and short form (`-tp 2`, `-O3`), `--no-x` and
`--x=true` of any switch, a value that is missing, dotted parts of a JSON option (`--hf-overrides.rope_theta 1e6`), options of theirs that
only core/protocol/foreign.py knows, and words that stand alone. What it does not know is left for click to complain about.
What it does not know: what an option means, which values it may have, files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import msgspec

from penstock.core.protocol.config import OPTIONS, Option
from penstock.core.protocol.foreign import FOREIGN, Foreign

OWN_VALUES = frozenset({"--config"})
"""Flags of the command itself that take a value."""
_NUMBER = re.compile(r"-?\d")


class Line(msgspec.Struct, kw_only=True):
    """`args` for click: canonical flags, each value behind its `=`. `model`: the word that stood alone. `foreign`: options of theirs."""

    args: list[str] = []
    model: str | None = None
    foreign: dict[str, Any] = {}


class _Word(msgspec.Struct, frozen=True):
    """One that stands alone; `option` and `value`: of the list option right before it."""

    text: str
    option: Option | None = None
    value: str = ""


class _Spelling(msgspec.Struct, frozen=True):
    """What a flag stands for. `sense`: what a switch says when it stands there; None: it takes a value."""

    option: Option | Foreign
    sense: bool | None


def _spellings() -> dict[str, _Spelling]:
    out: dict[str, _Spelling] = {}

    def switch(option: Option | Foreign, name: str, sense: bool) -> None:
        out.setdefault(f"--{name}", _Spelling(option, sense))
        out.setdefault(f"--no-{name}", _Spelling(option, not sense))

    for option in OPTIONS.values():
        for name in (option.flag[2:], *option.aliases):
            if option.is_bool:
                switch(option, name, True)
            else:
                out[f"--{name}"] = _Spelling(option, None)
        if option.is_bool and option.extra.get("no"):
            switch(option, option.extra["no"], False)
        if "short" in option.extra:
            out[option.extra["short"]] = _Spelling(option, True if option.is_bool else None)
    for row in FOREIGN.values():
        if row.kind == "switch":
            switch(row, row.flag[2:], True)
        for flag in (row.flag, *row.shorts):
            out.setdefault(flag, _Spelling(row, True if row.kind == "switch" else None))
    return out


SPELLINGS = _spellings()


def tidy(args: list[str]) -> Line:
    """Raises click.UsageError for what only this reading can explain."""
    return _Reader(args).read()


class _Reader:
    def __init__(self, args: list[str]) -> None:
        self._left = list(reversed(args))
        self._line = Line()
        self._words: list[_Word] = []
        self._unclear = False
        """There is something that click will explain better than whatever else may be wrong."""
        self._json: dict[str, tuple[Option | Foreign, str | None, dict[str, Any]]] = {}
        """JSON options: as a whole, and their dotted parts."""

    def read(self) -> Line:
        behind: tuple[Option | None, str] = (None, "")
        while self._left:
            word = self._left.pop()
            if word == "--":
                self._words += [_Word(word) for word in reversed(self._left)]
                break
            if not word.startswith("-") or word == "-" or _NUMBER.match(word):
                self._words.append(_Word(word, *behind))
            else:
                behind = self._flag(word)
        self._finish_json()
        if self._unclear:
            return self._line
        self._line.model = _model_of(self._words, "--model" in {arg.partition("=")[0] for arg in self._line.args})
        return self._line

    def _flag(self, word: str) -> tuple[Option | None, str]:
        """Take one flag with what belongs to it; a list option and its value are returned, for what may follow them."""
        nothing = None, ""
        name, equals, text = word.partition("=")
        given = text if equals else None
        base, dot, rest = name.partition(".")
        flag = base.replace("_", "-") if base.startswith("--") else base
        spelling = SPELLINGS.get(flag)
        if spelling is None and len(flag) > 2 and flag[1] != "-" and flag[:2] in SPELLINGS and not dot:
            spelling, given = SPELLINGS[flag[:2]], word[2:]  # -O3, -qfp8
        if spelling is None or (dot and not _has_parts(spelling.option)):
            if flag in OWN_VALUES and not dot:
                self._line.args.append(f"{flag}={self._value(flag, given)}")
            else:
                self._line.args.append(flag if flag == "--help" else word)  # --help=all is vLLM's
                self._unclear = True
            return nothing
        option = spelling.option
        if dot:
            self._part(option, name, rest, self._value(name, given))
        elif spelling.sense is not None:
            self._switch(option, flag, spelling.sense, given)
        elif isinstance(option, Foreign):
            self._line.foreign[option.name] = value = self._value(flag, given)
            while option.kind == "numbers" and self._left and _NUMBER.match(self._left[-1]):
                self._left.pop()
            if value.lstrip().startswith("{"):
                self._json[option.name] = (option, value, self._json.get(option.name, (option, None, {}))[2])
        elif option.is_json:
            self._json[option.name] = (option, self._value(flag, given), self._json.get(option.name, (option, None, {}))[2])
        else:
            value = self._value(flag, given)
            self._line.args.append(f"{option.flag}={value}")
            return (option, value) if option.is_list else nothing
        return nothing

    def _value(self, flag: str, given: str | None) -> str:
        """Behind the `=`, or the next word if that is none of our flags."""
        if given is not None:
            return given
        if not self._left:
            raise click.UsageError(f"{flag} needs a value.")
        following = self._left[-1].partition("=")[0]
        if following.replace("_", "-") in SPELLINGS.keys() | OWN_VALUES | {"--help", "--"}:
            raise click.UsageError(f"{flag} needs a value, but {following} follows. (If that is the value: {flag}={following})")
        return self._left.pop()

    def _switch(self, option: Option | Foreign, flag: str, sense: bool, given: str | None) -> None:
        if given is None and self._left and self._left[-1].lower() in ("true", "false"):
            given = self._left.pop()
        if given is not None:
            low = given.strip().lower()
            if low not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
                raise click.UsageError(f"{flag} is a switch: it takes true or false, not {given!r}.")
            sense = sense == (low in ("true", "1", "yes", "on"))
        if isinstance(option, Foreign):
            self._line.foreign[option.name] = sense
        else:
            self._line.args.append(option.flag if sense else f"--no-{option.flag[2:]}")

    # --- JSON

    def _part(self, option: Option | Foreign, flag: str, path: str, text: str) -> None:
        """`--x.a.b 1` is {"a": {"b": 1}}; `--x.a+ 1` appends to a list."""
        _, _, parts = self._json.setdefault(option.name, (option, None, {}))
        at = parts
        *outer, last = path.replace("-", "_").split(".")
        for key in outer:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise click.UsageError(f"{flag}: {key} has a value already, so it can have no parts.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if last.endswith("+"):
            items = at.setdefault(last[:-1], [])
            if not isinstance(items, list):
                raise click.UsageError(f"{flag}: {last[:-1]} is no list.")
            items.append(value)
        else:
            at[last] = value

    def _finish_json(self) -> None:
        for option, whole, parts in self._json.values():
            text = whole if whole is not None else "{}"
            if parts:
                try:
                    merged = json.loads(text)
                except ValueError as error:
                    raise click.UsageError(f"{option.flag} is not valid JSON: {error}.") from None
                if not isinstance(merged, dict):
                    raise click.UsageError(f"{option.flag} must be a JSON object.")
                text = json.dumps(_merged(merged, parts))
            if isinstance(option, Foreign):
                self._line.foreign[option.name] = text
            else:
                self._line.args.append(f"{option.flag}={text}")


def _has_parts(option: Option | Foreign) -> bool:
    return option.kind == "value" if isinstance(option, Foreign) else option.is_json


def _merged(whole: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    out = dict(whole)
    for key, value in parts.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def _model_of(words: list[_Word], named: bool) -> str | None:
    """The one word that may stand alone is the model's folder. Raises click.UsageError that says what else it may have been meant as."""
    for word in words:
        option = word.option
        if option is None or (len(words) == 1 and not named and Path(word.text).is_dir()):
            continue
        secret = "secret" in option.extra
        shown, both = ("a word", "KEY1,KEY2") if secret else (repr(word.text), f"{word.value},{word.text}")
        raise click.UsageError(
            f"{option.flag} takes one value a time, but {shown} stands behind its value and is not a model folder that could be served."
            f" For several values write {option.flag} {both}, or give {option.flag} again for each."
        )
    if len(words) > 1:
        shown = ", ".join(repr(word.text) for word in words)
        raise click.UsageError(
            f"Penstock serves one model folder, but {len(words)} were given: {shown}. More names for it are given by --served-model-name A,B."
        )
    if words and named:
        raise click.UsageError("MODEL is given twice: as an argument and by --model.")
    return words[0].text if words else None
