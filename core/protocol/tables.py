"""The tables of --tables FILE: who may use the server, and for what.

What it is: what a key stands for (`Principal`), and the reading of the file: `[keys.NAME]` and `[tenants.NAME]`, in which only what has an effect may
stand. What comes out holds digests of keys, never a key, and is what root sends to edges.
What it does not know: requests, when the file is read again, who checks a key.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.keys import read_keys

INFERENCE, METRICS, ADMIN = "inference", "metrics", "admin"
SCOPES = (INFERENCE, METRICS, ADMIN)
"""What a key may be good for: generating and what belongs to it; /metrics; everything."""
TABLES = ("keys", "tenants")
LATER = ("pools", "routes", "classes", "prices")
"""Tables that will be, and are refused until they do something."""
KEY_FIELDS = ("sha256", "file", "tenant", "tier", "scopes")
TENANT_FIELDS = ("tier", "scopes")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of keys, tenants and tiers: they go into logs and traces as they are."""
SHA256 = re.compile(r"[0-9a-f]{64}")


class Principal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """In whose name a request comes: what its key stands for. Without keys everybody is nobody in particular, and may do everything."""

    tenant: str = ""
    """Who shares prefixes with whom (Submit.tenant)."""
    key_id: str = ""
    """The key's name in the tables."""
    tier: str = ""
    """A word of the operator's, for traces."""
    scopes: frozenset[str] = frozenset({ADMIN})

    def may(self, scope: str) -> bool:
        """Is the key good for endpoints of that scope?"""
        return scope in self.scopes or ADMIN in self.scopes


class KeyTable(msgspec.Struct, frozen=True):
    """The body of a Tables message: whose key it is, by the SHA-256 of the key's UTF-8 in hexadecimal."""

    keys: dict[str, Principal]


def digest_of(key: bytes) -> str:
    """Under which a key is kept."""
    return hashlib.sha256(key).hexdigest()


def read_tables(path: str, note: Callable[[str], None]) -> KeyTable:
    """Raises ConfigError naming file, table and field. `note` gets what the user should know besides."""
    reader = _Reader(path, note)
    return KeyTable(keys=reader.read())


class _Reader:
    def __init__(self, path: str, note: Callable[[str], None]) -> None:
        self._path = Path(os.path.expanduser(path))
        self._where = f"--tables {path}"
        self._note = note

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._where}: {what}", param="tables")

    def read(self) -> dict[str, Principal]:
        raw = self._load()
        for name in raw:
            if name in LATER:
                raise self._wrong(f"the table [{name}] is not supported yet. Leave it out.")
            if name not in TABLES:
                raise self._wrong(f"{name!r} is not a known table.{nearest(name, TABLES)}")
        tenants = {name: self._tenant(name, table) for name, table in self._tables(raw, "tenants")}
        out: dict[str, Principal] = {}
        owners: dict[str, str] = {}
        for name, table in self._tables(raw, "keys"):
            digests, principal = self._key(name, table, tenants)
            for digest in digests:
                if digest in owners:
                    raise self._wrong(f"[keys.{name}] and [keys.{owners[digest]}] are the same key.")
                owners[digest], out[digest] = name, principal
        if not out:
            raise self._wrong("it holds no [keys.NAME], and nobody could use the server.")
        return out

    def _load(self) -> dict[str, Any]:
        try:
            if not self._path.is_file():  # a pipe could be read once only, and might never end
                raise self._wrong(_no_file(self._path))
            return tomllib.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, OSError):
                raise self._wrong(f"the file cannot be read ({error.strerror or error}).") from None
            if isinstance(error, UnicodeDecodeError):
                raise self._wrong(f"byte {error.start + 1} is not UTF-8, as TOML must be. Save the file as UTF-8.") from None
            raise self._wrong(f"it is not valid TOML: {error}.") from None

    def _tables(self, raw: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
        tables = raw.get(kind, {})
        if not isinstance(tables, dict):
            raise self._wrong(f"{kind!r} must be tables [{kind}.NAME].")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise self._wrong(f"[{kind}]: {name!r} stands outside of a table [{kind}.NAME].")
            self._name(name, f"[{kind}.{name}]: the name")
            known = KEY_FIELDS if kind == "keys" else TENANT_FIELDS
            for field in table:
                if field not in known:
                    raise self._wrong(f"[{kind}.{name}]: {field!r} is not a known field.{nearest(field, known)}")
        return list(tables.items())

    def _name(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise self._wrong(f"{what} must be letters, digits, and - _ . after the first, at most 64, but is {value!r:.100}.")
        return value

    def _tenant(self, name: str, table: dict[str, Any]) -> dict[str, Any]:
        """What its keys have unless they say otherwise."""
        return self._rights(f"[tenants.{name}]", table)

    def _rights(self, at: str, table: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if "tier" in table:
            out["tier"] = self._name(table["tier"], f"{at}: tier")
        if "scopes" in table:
            scopes = table["scopes"]
            if not isinstance(scopes, list) or not scopes or not all(isinstance(scope, str) for scope in scopes):
                raise self._wrong(f"{at}: scopes must be a list of at least one of {', '.join(SCOPES)}.")
            for scope in scopes:
                if scope not in SCOPES:
                    raise self._wrong(f"{at}: scopes: {scope!r} is not one of {', '.join(SCOPES)}.{nearest(scope, SCOPES)}")
            out["scopes"] = frozenset(scopes)
        return out

    def _key(self, name: str, table: dict[str, Any], tenants: dict[str, dict[str, Any]]) -> tuple[list[str], Principal]:
        at = f"[keys.{name}]"
        tenant = self._name(table["tenant"], f"{at}: tenant") if "tenant" in table else name
        rights = {"scopes": frozenset({INFERENCE}), **tenants.get(tenant, {}), **self._rights(at, table)}
        return self._digests(at, table), Principal(tenant=tenant, key_id=name, **rights)

    def _digests(self, at: str, table: dict[str, Any]) -> list[str]:
        if ("sha256" in table) == ("file" in table):
            raise self._wrong(f"{at}: give either sha256 (of the key, in hexadecimal) or file (with the key in it).")
        if "file" in table:
            if not isinstance(table["file"], str):
                raise self._wrong(f"{at}: file must be a path.")
            file = self._path.parent / os.path.expanduser(table["file"])
            if not file.is_file():
                raise self._wrong(f"{at}: file {table['file']}: {_no_file(file)}")
            try:
                return [digest_of(key.encode()) for key in dict.fromkeys(read_keys(str(file), self._note, name=f"{at}: file"))]
            except ConfigError as error:
                raise self._wrong(error.message) from None
        digest = table["sha256"]
        if not isinstance(digest, str) or not SHA256.fullmatch(digest.lower()):
            raise self._wrong(f"{at}: sha256 must be 64 hexadecimal digits.")
        if digest.lower() == digest_of(b""):
            raise self._wrong(f"{at}: sha256 is that of nothing: no key was given to the command that made it.")
        return [digest.lower()]


def _no_file(path: Path) -> str:
    """Why it is none."""
    if path.is_dir():
        return "that is a folder. Name the file in it."
    return "that is no regular file." if path.exists() else "there is no such file."
