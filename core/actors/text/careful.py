"""A tokenizer that somebody else wrote, made safe for the process that serves everybody.

What it is: `CarefulTokenizer`: the attributes are read once, at start, and checked; whatever a method raises comes as an ordinary exception (a library's
panic is none: pyo3's PanicException is a BaseException, and would end the thread it is raised on); what it returns has the promised type, can be sent,
and names no token beyond the vocabulary. So whatever a tokenizer does with one text, only that request feels it.
What it does not know: requests, files, which tokenizer it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np

from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import PluginFault, described, sendable, shown, tamed

T = TypeVar("T")


class TokenizerFailed(Exception):
    """A tokenizer raised, or gave what it must not."""


def ordinary(call: Callable[[], T]) -> T:
    """What `call` returns. Whatever it raises comes as an Exception, but for the user's own Ctrl-C (see `tamed`)."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        raise TokenizerFailed(f"{tamed(error)}"[:300]) from error


class CarefulTokenizer:
    """See core/contract/text.py: Tokenizer. Raises PluginFault for attributes that cannot be used."""

    def __init__(self, own: Tokenizer, who: str = "The tokenizer") -> None:
        """`who` begins what is said of it."""
        self._own = own
        self._who = who
        self.vocab_size: int = self._read("vocab_size", lambda value: type(value) is int and value >= 0, "a number")
        self.bos_id: int | None = self._read(
            "bos_id", lambda value: value is None or self._known([value]), "an id of its vocabulary or None"
        )
        self.eos_ids: list[int] = list(self._read("eos_ids", _ids, "a list of ids"))
        self.special_ids: frozenset[int] = frozenset(self._read("special_ids", self._known, "a set of ids of its vocabulary"))
        self.name: str = self._read("name", lambda value: isinstance(value, str), "a text")
        self.max_chars_per_token: int = self._read("max_chars_per_token", lambda value: type(value) is int and value >= 0, "a number")

    def _known(self, value: Any) -> bool:
        return _ids(value) and all(0 <= one < self.vocab_size for one in value)

    def _read(self, name: str, good: Callable[[Any], bool], what: str) -> Any:
        try:
            value = ordinary(lambda: getattr(self._own, name))
        except Exception as error:
            raise PluginFault(f"{self._who} is broken: its {name!r} cannot be read ({described(error)}).") from error
        if not good(value):
            raise PluginFault(f"{self._who} is broken: its {name!r} must be {what}, not {shown(value)}.")
        return value

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[I32]:
        """See Tokenizer. Raises TokenizerFailed for a result that is not one array of ids a text."""
        found = ordinary(lambda: list(self._own.encode_batch(texts, add_special_tokens=add_special_tokens)))
        if len(found) != len(texts):
            raise TokenizerFailed(f"{len(texts)} texts became {len(found)} arrays")
        return [self._checked(ids) for ids in found]

    def token_bytes(self, token: int) -> bytes:
        """See Tokenizer. Raises TokenizerFailed for what is no bytes."""
        return bytes(_must(ordinary(lambda: self._own.token_bytes(token)), (bytes, bytearray), "token_bytes", "bytes"))

    def token_text(self, token: int) -> str:
        """See Tokenizer. Raises TokenizerFailed for what is no text."""
        return sendable(_must(ordinary(lambda: self._own.token_text(token)), str, "token_text", "a text"))

    def is_byte_exact(self) -> bool:
        """See Tokenizer. Raises TokenizerFailed for what is neither True nor False: which of them is meant decides how answers become text."""
        return bool(_must(ordinary(self._own.is_byte_exact), (bool, np.bool_), "is_byte_exact", "True or False"))

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """See Tokenizer. Raises TokenizerFailed for what is no text."""
        text = ordinary(lambda: self._own.decode(ids, skip_special_tokens=skip_special_tokens))
        return sendable(_must(text, str, "decode", "a text"))

    def info(self) -> dict[str, Any]:
        """See Tokenizer. Raises TokenizerFailed for what JSON cannot hold."""
        found: dict[str, Any] = _must(ordinary(self._own.info), dict, "info", "a dictionary")
        try:
            ordinary(lambda: msgspec.json.encode(found))
        except UnicodeEncodeError:  # a file of the model may spell half a surrogate pair
            found = json.loads(sendable(json.dumps(found, ensure_ascii=False)))
        except Exception as error:
            raise TokenizerFailed(f"info() gave what is no JSON ({described(error, 200)})") from error
        return found

    def _checked(self, ids: Any) -> I32:
        array = ordinary(lambda: np.asarray(ids))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TokenizerFailed(f"encode_batch() gave an array of {array.ndim} dimensions of {array.dtype}, not a row of ids")
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < self.vocab_size):
            wrong = int(array[(array < 0) | (array >= self.vocab_size)][0])
            raise TokenizerFailed(f"encode_batch() gave the id {wrong}, and its vocabulary has ids from 0 to {self.vocab_size - 1}")
        return array if array.dtype == np.int32 else array.astype(np.int32)


def _ids(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(type(one) is int for one in value)


def _must(value: Any, kind: type | tuple[type, ...], call: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise TokenizerFailed(f"{call}() gave {type(value).__name__}, not {what}")
    return value
