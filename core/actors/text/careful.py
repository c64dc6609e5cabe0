"""A tokenizer that somebody else wrote, made safe for the process that serves everybody.

What it is: `CarefulTokenizer`: the attributes are read once, at start, and checked; what a method raises is an ordinary exception (a library's panic is
none: pyo3's PanicException is a BaseException, and would end the thread it is raised on); what it returns has the promised type. So whatever a
tokenizer does with one text, only that request feels it.
What it does not know: requests, files, which tokenizer it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import PluginFault

T = TypeVar("T")


class TokenizerFailed(Exception):
    """A tokenizer raised, or gave what it must not."""


def ordinary(call: Callable[[], T]) -> T:
    """What `call` returns. Whatever it raises comes as an Exception, but for the signs that this process itself is to end."""
    try:
        return call()
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerFailed(f"{type(error).__name__}: {error}"[:300]) from error


class CarefulTokenizer:
    """See core/contract/text.py: Tokenizer. Raises PluginFault for attributes that cannot be used."""

    def __init__(self, own: Tokenizer) -> None:
        self._own = own
        self.vocab_size: int = self._read("vocab_size", lambda value: type(value) is int and value >= 0, "a number")
        self.bos_id: int | None = self._read("bos_id", lambda value: value is None or type(value) is int, "an id or None")
        self.eos_ids: list[int] = list(self._read("eos_ids", _ids, "a list of ids"))
        self.special_ids: frozenset[int] = frozenset(self._read("special_ids", _ids, "a set of ids"))
        self.name: str = self._read("name", lambda value: isinstance(value, str), "a text")
        self.max_chars_per_token: int = self._read("max_chars_per_token", lambda value: type(value) is int and value >= 0, "a number")

    def _read(self, name: str, good: Callable[[Any], bool], what: str) -> Any:
        try:
            value = ordinary(lambda: getattr(self._own, name))
        except Exception as error:
            raise PluginFault(f"The tokenizer is broken: its {name!r} cannot be read ({type(error).__name__}: {error}).") from error
        if not good(value):
            raise PluginFault(f"The tokenizer is broken: its {name!r} must be {what}, not {value!r:.80}.")
        return value

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]:
        """See Tokenizer. Raises TokenizerFailed for a result that is not one array of ids a text."""
        found = ordinary(lambda: list(self._own.encode_batch(texts, add_special_tokens=add_special_tokens)))
        if len(found) != len(texts):
            raise TokenizerFailed(f"{len(texts)} texts became {len(found)} arrays")
        return [_checked(ids) for ids in found]

    def token_bytes(self, token: int) -> bytes:
        """See Tokenizer."""
        return ordinary(lambda: self._own.token_bytes(token))

    def token_text(self, token: int) -> str:
        """See Tokenizer."""
        return ordinary(lambda: self._own.token_text(token))

    def is_byte_exact(self) -> bool:
        """See Tokenizer."""
        return ordinary(self._own.is_byte_exact)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """See Tokenizer. Raises TokenizerFailed for what is no text."""
        text = ordinary(lambda: self._own.decode(ids, skip_special_tokens=skip_special_tokens))
        if not isinstance(text, str):
            raise TokenizerFailed(f"decode() gave {type(text).__name__}, not a text")
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    def info(self) -> dict[str, Any]:
        """See Tokenizer."""
        return ordinary(self._own.info)


def _ids(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(type(one) is int for one in value)


def _checked(ids: Any) -> I32:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TokenizerFailed(f"encode_batch() gave an array of {array.ndim} dimensions of {array.dtype}, not a row of ids")
    if array.dtype == np.int32:
        return array
    if array.size and not (int(array.min()) >= -(2**31) and int(array.max()) < 2**31):
        raise TokenizerFailed("encode_batch() gave an id beyond 32 bits")
    return array.astype(np.int32)
