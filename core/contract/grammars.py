"""What makes answers obey a grammar.

What it is: two Protocols for plugins: `Grammars`, which compiles what a request brings, and `Matcher`, a sequence's place in it; and what they may offer
besides: `Together` a Grammars, `Forks` a Matcher.
What it does not know: tokenizers, requests, devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from penstock.core.protocol.columns import I32


class Matcher(Protocol):
    """One sequence. After an exception, or a `consume` that says no, it is used no more. InvalidRequest: the grammar is too much for the backend here, which
    ends the answer as the client's error; any other exception is the backend's own."""

    def consume(self, token: int) -> bool:
        """The sequence goes on with this token, which is no end token. False: the grammar does not allow it."""
        ...

    def mask(self, out: I32) -> None:
        """Fill all ceil(vocabulary / 32) words: bit t % 32 of word t // 32 is 1 where token t may follow. What it says of end tokens does not count. Should
        release the GIL."""
        ...

    def may_end(self) -> bool:
        """Is what there is so far a whole answer?"""
        ...


class Grammars(Protocol):
    """Of one vocabulary. `compile` is called in a process of its own, which is killed if it takes too long or too much memory, `matcher` in an engine."""

    def compile(self, kind: str, source: str) -> bytes:
        """What `matcher` needs. Raises InvalidRequest for a source that is wrong, UnsupportedFeature naming the part that it cannot express
        exactly: what is not certain must be refused. Whatever else it raises, or gives, is taken for the plugin's own mistake (500)."""
        ...

    def matcher(self, compiled: bytes) -> Matcher:
        """At the beginning of an answer. Takes milliseconds; the same bytes come again."""
        ...


@runtime_checkable
class Forks(Protocol):
    """A Matcher that can be copied. Beams branch by it; those of other matchers walk their tokens again."""

    def fork(self) -> Matcher:
        """Another sequence that has come as far. Neither feels what becomes of the other."""
        ...


@runtime_checkable
class Together(Protocol):
    """A Grammars that works for many sequences at once, on threads of its own and without the GIL: a step then waits for the slowest mask and not for the
    sum of all. Matchers are its own, each at most once in a call."""

    def masks(self, matchers: Sequence[Any], out: I32) -> Mapping[int, Exception]:
        """Matcher.mask of matchers[i] into out[i] ([n, words], contiguous). Returns what those that failed would have raised."""
        ...
