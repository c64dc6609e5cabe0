"""The tables of --tables FILE: who may use the server, and for what.

What it is: what a key stands for (`Principal`), and the reading of the file: `[keys.NAME]`, `[tenants.NAME]`, `[classes.NAME]` and `[prices."MODEL"]`. What comes
out holds digests of keys, never a key: a table of keys, which root sends to edges, and one of tenants' limits (tenants.py), which it sends to text.
What it does not know: requests, when the file is read again, who checks a key, how limits are counted.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.keys import read_keys
from penstock.core.protocol.tenants import (
    CLASS_FIELDS,
    PRICE_FIELDS,
    TENANT_LIMITS,
    Price,
    SloClass,
    Tenant,
    TenantTable,
    mark_of,
    read_class,
    read_price,
    read_tenant,
)

INFERENCE, METRICS, ADMIN = "inference", "metrics", "admin"
SCOPES = (INFERENCE, METRICS, ADMIN)
"""What a key may be good for: generating and what belongs to it; /metrics; everything."""
TABLES = ("keys", "tenants", "classes", "prices")
LATER = ("pools", "routes")
"""Tables that will be, and are refused until they do something."""
FIELDS = {
    "keys": ("sha256", "file", "tenant", "tier", "scopes"),
    "tenants": ("tier", "scopes", "keys_sha256", *TENANT_LIMITS),
    "classes": CLASS_FIELDS,
    "prices": PRICE_FIELDS,
}
NO_EFFECT_YET = (("tenants", "weight"),)
"""Fields that are checked, and of which the log says at each reading that nothing depends on them yet."""
DEFAULT_SCOPES = frozenset({INFERENCE})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of keys, tenants and tiers: they go into logs and traces as they are."""
STANDARD = "standard"
"""The class of tenants that have none, in metrics."""
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
    mark: str = ""
    """What stands for the key itself (mark_of); "": it is not one of the tables."""
    generation: int = 0
    """Of the tables that said all this."""
    models: list[str] = []
    """The only ones that exist for it; none: all do."""

    def may(self, scope: str) -> bool:
        """Is the key good for endpoints of that scope?"""
        return scope in self.scopes or ADMIN in self.scopes


class KeyTable(msgspec.Struct, frozen=True):
    """The body of a Tables message: whose key it is, by the SHA-256 of the key's UTF-8 in hexadecimal."""

    keys: dict[str, Principal]


def digest_of(key: bytes) -> str:
    """Under which a key is kept."""
    return hashlib.sha256(key).hexdigest()


class Read(NamedTuple):
    """What a reading brought."""

    keys: KeyTable
    tenants: TenantTable


def read_tables(path: str, note: Callable[[str], None], *, served: Sequence[str] = (), policy: str = "priority") -> Read:
    """Raises ConfigError naming file, table and field. `note` gets what the user should know besides. `served` are the names of the served model, if they are
    known; `policy` is the scheduling policy, which may not look at priorities."""
    return _Reader(path, note, served, policy).read()


class _Reader:
    def __init__(self, path: str, note: Callable[[str], None], served: Sequence[str], policy: str) -> None:
        self._path = Path(os.path.expanduser(path))
        self._where = f"--tables {path}"
        self._note = note
        self._served = served
        self._policy = policy
        self._owners: dict[str, str] = {}
        """Digest -> the table that it stands in."""

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._where}: {what}", param="tables")

    def read(self) -> Read:
        raw = self._load()
        for name in raw:
            if name in LATER:
                raise self._wrong(f"the table [{name}] is not supported yet. Leave it out.")
            if name not in TABLES:
                raise self._wrong(f"{name!r} is not a known table.{nearest(name, TABLES)}")
        classes = {name: read_class(f"[classes.{name}]", table, self._wrong) for name, table in self._tables(raw, "classes")}
        if STANDARD in classes:
            raise self._wrong(f"[classes.{STANDARD}]: that is what metrics call the class of those that have none. Choose another name.")
        prices = {name: read_price(f'[prices."{name}"]', table, self._wrong) for name, table in self._tables(raw, "prices")}
        rights: dict[str, dict[str, Any]] = {}
        tenants: dict[str, Tenant] = {}
        listed: dict[str, list[str]] = {}
        for name, table in self._tables(raw, "tenants"):
            at = f"[tenants.{name}]"
            rights[name] = self._rights(at, table)
            listed[name] = self._listed(at, table)
            tenants[name] = read_tenant(at, table, classes, self._wrong)
        keys: dict[str, Principal] = {}
        for name, table in self._tables(raw, "keys"):
            digests, principal = self._key(name, table, rights)
            for digest in digests:
                self._own(digest, f"[keys.{name}]")
                keys[digest] = principal
        for name, digests in listed.items():
            for digest in digests:
                keys[digest] = Principal(tenant=name, key_id=f"{name[:55]}-{digest[:8]}", **{"scopes": DEFAULT_SCOPES, **rights[name]})
        if not keys:
            raise self._wrong("it holds no [keys.NAME] and no keys_sha256, and nobody could use the server.")
        keys = {digest: self._finished(digest, principal, tenants) for digest, principal in keys.items()}
        marks = {principal.mark: principal.tenant for principal in keys.values() if principal.may(INFERENCE)}
        self._check_money(tenants, prices)
        self._tell(raw, classes, tenants, prices)
        return Read(KeyTable(keys=keys), TenantTable(tenants=tenants, marks=marks, prices=prices, classes=classes))

    def _own(self, digest: str, at: str) -> None:
        if digest in self._owners:
            raise self._wrong(f"{at} and {self._owners[digest]} are the same key.")
        self._owners[digest] = at

    @staticmethod
    def _finished(digest: str, principal: Principal, tenants: dict[str, Tenant]) -> Principal:
        tenant = tenants.get(principal.tenant)
        return msgspec.structs.replace(principal, mark=mark_of(digest), models=tenant.models if tenant is not None else [])

    def _check_money(self, tenants: dict[str, Tenant], prices: dict[str, Price]) -> None:
        for name, tenant in tenants.items():
            if tenant.budget_pusd and not (any(model in prices for model in self._served) if self._served else prices):
                model = self._served[0] if self._served else "MODEL"
                raise self._wrong(f'[tenants.{name}]: budget_usd needs what tokens cost: [prices."{model}"] with input and output.')

    def _tell(self, raw: dict[str, Any], classes: dict[str, SloClass], tenants: dict[str, Tenant], prices: dict[str, Price]) -> None:
        """What is right and does nothing."""
        for kind, field in NO_EFFECT_YET:
            having = [f"[{kind}.{name}]" for name, table in raw.get(kind, {}).items() if field in table]
            if having:
                self._note(f"{self._where}: {field} of {', '.join(having[:5])} has no effect yet")
        if self._policy == "fcfs" and any(one.priority for one in classes.values()):
            self._note(f"{self._where}: priority of classes has no effect without --scheduling-policy priority")
        if self._served:
            unknown = sorted({model for tenant in tenants.values() for model in tenant.models} | set(prices) - set(self._served))
            if unknown := [model for model in unknown if model not in self._served]:
                self._note(f"{self._where}: names models that are not served: {', '.join(unknown[:5])}")

    def _load(self) -> dict[str, Any]:
        try:
            if not self._path.is_file():  # a pipe could be read once only, and might never end
                raise self._wrong(_no_file(self._path))
            return tomllib.loads(self._path.read_text(encoding="utf-8"), parse_float=Decimal)
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
            if kind != "prices":
                self._name(name, f"[{kind}.{name}]: the name")
            known = FIELDS[kind]
            for field in table:
                if field not in known:
                    raise self._wrong(f"[{kind}.{name}]: {field!r} is not a known field.{nearest(field, known)}")
        return list(tables.items())

    def _name(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise self._wrong(f"{what} must be letters, digits, and - _ . after the first, at most 64, but is {value!r:.100}.")
        return value

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
        rights = {"scopes": DEFAULT_SCOPES, **tenants.get(tenant, {}), **self._rights(at, table)}
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
        return [self._digest(f"{at}: sha256", table["sha256"])]

    def _listed(self, at: str, table: dict[str, Any]) -> list[str]:
        """A tenant's own keys, which have no names."""
        given = table.get("keys_sha256", [])
        if not isinstance(given, list) or ("keys_sha256" in table and not given):
            raise self._wrong(f"{at}: keys_sha256 must be a list of at least one SHA-256 of a key, in hexadecimal.")
        digests = [self._digest(f"{at}: keys_sha256[{index}]", digest) for index, digest in enumerate(given)]
        for index, digest in enumerate(digests):
            self._own(digest, f"{at} keys_sha256[{index}]")
        return digests

    def _digest(self, what: str, digest: Any) -> str:
        if not isinstance(digest, str) or not SHA256.fullmatch(digest.lower()):
            raise self._wrong(f"{what} must be 64 hexadecimal digits.")
        if digest.lower() == digest_of(b""):
            raise self._wrong(f"{what} is that of nothing: no key was given to the command that made it.")
        return digest.lower()


def _no_file(path: Path) -> str:
    """Why it is none."""
    if path.is_dir():
        return "that is a folder. Name the file in it."
    return "that is no regular file." if path.exists() else "there is no such file."
