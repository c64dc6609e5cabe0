"""An output format that somebody else wrote, made safe for the process that serves everybody.

What it is: `CarefulSplitter`: whatever a splitter raises comes with the plugin's name, and so does a fragment that cannot be sent or does not follow
those before it. So whatever a format makes of one answer, only that answer feels it. Built-in formats go without: their tests check the same.
What it does not know: requests, which format it is, whether arguments are valid JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.core.contract.formats import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Fragment, Splitter
from penstock.core.protocol.errors import PluginFault, shown, tamed

Blame = Callable[[str, Exception | str], PluginFault]
"""From a call and what is wrong with it (see core/contract/guard.py: fault)."""


class CarefulSplitter:
    """See core/contract/formats.py: Splitter. All that it raises is a PluginFault."""

    def __init__(self, own: Splitter, blame: Blame) -> None:
        self._own = own
        self._blame = blame
        self._begun = 0
        """Calls that have a name."""
        self._open: set[int] = set()
        """Those of them that are not complete."""
        if hasattr(own, "call_id"):
            self.call_id = own.call_id

    @property
    def channel(self) -> int:
        """See Splitter."""
        try:
            return self._own.channel
        except BaseException as error:
            raise self._blame("channel", tamed(error)) from error

    def feed(self, text: str) -> list[Fragment]:
        """See Splitter."""
        try:
            found = self._own.feed(text)
        except BaseException as error:
            raise self._blame("feed", tamed(error)) from error
        return self._checked("feed", found) if found or type(found) is not list else found

    def flush(self, cut: bool) -> list[Fragment]:
        """See Splitter."""
        try:
            found = self._own.flush(cut)
        except BaseException as error:
            raise self._blame("flush", tamed(error)) from error
        return self._checked("flush", found)

    def _checked(self, call: str, found: Any) -> list[Fragment]:
        if not isinstance(found, list):
            raise self._blame(call, f"gave {shown(found)}, which is no list of Fragments")
        for fragment in found:
            wrong = self._wrong(fragment)
            if wrong:
                raise self._blame(call, f"gave {shown(fragment)}: {wrong}")
        return found

    def _wrong(self, fragment: Any) -> str:
        """What is wrong with it, or ""; it is taken to have been said."""
        if not isinstance(fragment, tuple) or len(fragment) != 3:
            return "this is no Fragment"
        channel, call, text = fragment
        if type(text) is not str:
            return "its text must be a str"
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return "its text has half a surrogate pair in it, which UTF-8 cannot carry"
        if type(channel) is not int or type(call) is not int:
            return "its channel and call must be int"
        if channel in (CONTENT, REASONING):
            return "" if call == -1 else "CONTENT and REASONING belong to no call (-1)"
        if channel == NAME:
            if call != self._begun or not text:
                return f"a NAME must begin call {self._begun}, the next one" if text else "a NAME must be a function's"
            self._begun += 1
            self._open.add(call)
            return ""
        if channel not in (ARGUMENTS, DONE):
            return "there is no such channel"
        if call not in self._open:
            return f"call {call} has {'had its DONE' if 0 <= call < self._begun else 'no NAME yet'}"
        if channel == DONE:
            self._open.remove(call)
            return "a DONE has no text" if text else ""
        return ""
