"""API keys that stand in no command line.

What it is: `with_keys` adds the keys of --api-key-file to the configuration, and tells what others on this machine can read: a file with loose
permissions, keys in the command line.
What it does not know: who checks a key.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import ConfigError

IN_COMMAND_LINE = (
    "--api-key stands in the command line, which other users of this machine can read. Use --api-key-file FILE, or PENSTOCK_API_KEY (or"
    " VLLM_API_KEY) in the environment."
)


def with_keys(config: Config, note: Callable[[str], None], *, typed: bool = False) -> Config:
    """`config` with all its keys. `typed`: some came by the command line. Raises ConfigError naming the file."""
    if typed:
        note(IN_COMMAND_LINE)
    if not config.api_key_file:
        return config
    keys = list(dict.fromkeys([*config.api_key, *(key for path in config.api_key_file for key in read_keys(path, note))]))
    return msgspec.structs.replace(config, api_key=keys)


def read_keys(path: str, note: Callable[[str], None], *, name: str = "--api-key-file") -> list[str]:
    """One key a line; `#` at the beginning of a line, or behind a space, begins a comment. `name`: who named the file, for messages."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{name} {path}: {what}", param="api_key_file")

    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read()
    except (OSError, ValueError) as error:
        raise wrong(f"the file cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise wrong(f"byte {error.start + 1} is not UTF-8.") from None
    keys = []
    for number, line in enumerate(lines, 1):
        key = re.sub(r"(^|\s)#.*", "", line).strip()
        if re.search(r"\s|[\x00-\x1f\x7f]", key):
            raise wrong(f"line {number} holds more than one word. A key stands alone in its line; a comment begins with #.")
        if key:
            keys.append(key)
    if not keys:
        raise wrong("it holds no key, and without one the server would be open to everybody.")
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        note(f"{name} {path} can be read by every user of this machine (chmod 600 would change that).")
    return keys
