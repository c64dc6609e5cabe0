"""What root knows of plugins without loading any.

What it is: the names that come with Penstock, by the option that takes them, and `check_names`, which refuses a name that nobody here can bring before any process starts.
What it does not know: plugins, specs (host.py has them).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata

from penstock.core.contract.families import Role
from penstock.core.protocol.config import Config, further_ports, nearest
from penstock.core.protocol.errors import ConfigError

BUILT_IN = "penstock"
"""The package of what comes with Penstock."""

BUILT_IN_NAMES: dict[str, tuple[Role, tuple[str, ...]]] = {
    "device": ("engine", ("auto", "cpu", "cuda")),
    "attention_backend": ("engine", ("native", "torch", "triton")),
    "grammar_backend": ("text", ("llguidance", "xgrammar")),
    "scheduling_policy": ("engine", ("fcfs", "priority")),
    "transports": ("edge", ("openai", "anthropic", "responses", "tgi", "tokens", "websocket", "grpc", "playground")),
}
"""option -> the process that loads such plugins, and the names that come with Penstock (a test compares). Root knows them without an import."""

EXTRAS = {"grammar_backend": {"xgrammar": "xgrammar"}}
"""option -> names of these that a library brings which is installed only when it is asked for: the extra that does."""

PORTS = {"grpc": "grpclib"}
"""Transports that listen on a port of their own: the library that such a one needs, which comes with the extra of the transport's name."""

BUILT_IN_WORDS: dict[str, tuple[Role, tuple[str, ...]]] = {
    "load_format": ("engine", ("auto", "safetensors", "gguf", "dummy")),
    "dtype": ("engine", ("auto", "bfloat16", "float16", "half", "float32", "float")),
}
"""The same for words that are no plugin's name, but that plugins bring: a weight source's formats, a device's dtypes."""


def check_names(config: Config, extra: Sequence[str] = ()) -> None:
    """Refuse a name that no installed plugin can bring, and a port of a transport whose library is not there, before any process starts. Imports no plugin:
    where other packages' plugins are installed their names are unknown here, and the process that loads them says no. Raises ConfigError with the known names."""
    for port, number in further_ports(config):
        library = PORTS.get(port.listener)
        if library is not None and importlib.util.find_spec(library) is None:
            told = f"{port.flag} {number}: {library} is not installed. It comes with pip install 'penstock[{port.listener}]'."
            raise ConfigError(told, param=port.name)
    for option, (role, known) in {**BUILT_IN_NAMES, **BUILT_IN_WORDS}.items():
        given = getattr(config, option)
        wrong = [name for name in (given if isinstance(given, list) else [given]) if name is not None and name not in known]
        lacking = EXTRAS.get(option, {}).get(given) if isinstance(given, str) else None
        if lacking is not None and importlib.util.find_spec(lacking) is None:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} {given}: {lacking} is not installed. It comes with pip install 'penstock[{lacking}]'.", param=option)
        if wrong and not extra and all(package_of(entry) == BUILT_IN for entry in metadata.entry_points(group=f"penstock.{role}")):
            flag = "--" + option.replace("_", "-")
            lack = "no such plugin" if option in BUILT_IN_NAMES else "not known, and no plugin is installed that could bring it"
            raise ConfigError(f"{flag} {wrong[0]}: {lack}.{nearest(wrong[0], known)} Known: {', '.join(known)}.", param=option)


def package_of(entry: metadata.EntryPoint) -> str:
    """The name of the package that brings it."""
    return entry.dist.name if entry.dist is not None else "?"
