"""The engine under the built-in output formats: a scanner for marks, driven by tables.

What it is: `State` and `table`, in which a format is written down, and `TableSplitter`, which follows a table through a text that comes in any pieces.
It holds back what may become a mark, and white space beside marks, which goes out only if text of the same channel follows. A call's beginning is kept
until its name is certain; if it turns out to be no call, the text goes out as content, as it was.
What it does not know: any model's marks; JSON's and Python's values (values.py, pythonic.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from penstock.core.contract.formats import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Fragment
from penstock.plugins.formats.schemas import names_of

MAX_SPACE = 64
"""A longer run of white space is text."""
MAX_HEAD = 512
"""Characters of a call's name, or of what else is collected before its arguments."""
FUNCTION = re.compile(r"[^\s\"'{}()\[\]<>|,;\ud800-\udfff]{1,256}")
"""What a function may be called."""


class State(NamedTuple):
    """A place in a format. `reader` makes of the text at a position what it can, and returns the position after it."""

    reader: Callable[[TableSplitter, str, int, list[Fragment]], int]
    on: Mapping[str, str] = {}
    """Marks, and the state that follows each."""
    channel: int = CONTENT
    after: str = "content"
    """Of a value: the state that follows it. Of a probe: that of any text that is neither mark nor in `chars` nor in `skip`."""
    skip: str = ""
    chars: Mapping[str, str] = {}
    """Characters that decide like marks, but belong to what follows."""
    decide: Callable[[str], tuple[str, str] | None] | None = None
    """Of collected text: the state that follows, and the name of the call that begins ("" none); or None, if it is none of this format's."""
    bare: bool = False
    """An object that no mark announces: it is a call only if it has arguments."""
    named: str = "name"
    """Of an object that is a call: the member that names the function."""
    keep: frozenset[str] = frozenset()
    """Marks that end this text, but belong to what follows."""
    silent: bool = False
    """What led here is a mark whatever follows, and so is what is skipped or collected here if the answer ends in it."""


class Place(NamedTuple):
    """A State with what its marks make."""

    state: State
    trigger: re.Pattern[str] | None
    """What a mark (or one of `chars`) may begin with."""
    marker: re.Pattern[str] | None
    prefixes: frozenset[str]
    """Of marks, without the marks themselves."""
    longest: int
    nested: re.Pattern[str]
    """Within a JSON list or object: what may matter outside of strings."""
    scalar: re.Pattern[str]
    """What may end a number or word of JSON."""


Table = Mapping[str, Place]
"""By name; "content" is the state to fall back to."""


def table(**states: State) -> Table:
    return {name: _place(state) for name, state in states.items()}


def _place(state: State) -> Place:
    marks = sorted(state.on, key=len, reverse=True)
    begins = "".join(re.escape(char) for char in sorted({mark[0] for mark in marks} | set(state.chars)))
    return Place(
        state,
        re.compile(f"[{begins}]") if begins else None,
        re.compile("|".join(map(re.escape, marks))) if marks else None,
        frozenset(mark[:size] for mark in marks for size in range(1, len(mark))),
        max(map(len, marks), default=0),
        re.compile(rf'["{{}}\[\]{begins}]'),
        re.compile(rf"[,}}\]\s{begins}]"),
    )


class TableSplitter:
    """A Splitter. Readers use what has no underscore."""

    __slots__ = (
        "_calls",
        "_drop",
        "_given",
        "_long",
        "_open",
        "_place",
        "_said",
        "_space",
        "_table",
        "_tools",
        "channel",
        "held",
        "memory",
        "pending",
        "raw",
        "taken",
    )

    def __init__(self, states: Table, start: str, tools: bytes = b"") -> None:
        """`tools` as in Opening."""
        self._table = states
        self._tools = tools
        self._place = states[start]
        self.channel = self._place.state.channel
        self.held = ""
        """Text that a reader wants to see again, with what follows it."""
        self.raw: list[str] = []
        """What has been read of a call that may not be one."""
        self.taken: list[str] = []
        """What a probe skipped, or a collector collected."""
        self.memory: Any = None
        """The present reader's own; None when its state is entered."""
        self.pending: list[str] = []
        """Arguments that a reader still has to make something of."""
        self._calls = 0
        self._open = False
        """The last call may still get arguments."""
        self._given: list[str] = []
        """Its arguments so far."""
        self._said = False
        """Has there been content?"""
        self._space = ""
        self._long = False
        self._drop = self.channel == REASONING
        """White space that comes next is none of the text's."""

    @property
    def place(self) -> Place:
        return self._place

    @property
    def open(self) -> bool:
        return self._open

    def feed(self, text: str) -> list[Fragment]:
        out: list[Fragment] = []
        if self.held:
            text, self.held = self.held + text, ""
        at, size = 0, len(text)
        while at < size:
            at = self._place.state.reader(self, text, at, out)
        return out

    def flush(self, cut: bool) -> list[Fragment]:
        out: list[Fragment] = []
        held, self.held = self.held, ""
        if self._open:
            if cut and held in self._place.prefixes:  # half a mark
                held = ""
            rest = "".join([*self.pending, held])
            self.pending.clear()
            if rest:
                self.argue(rest, out)
            if not cut and not self._given:
                self.argue("{}", out)
            self.close(out, complete=not cut)
        elif (self.raw or held or not self._calls) and not self._place.state.silent:
            self.fail(held, out)
        if self._space and not self._calls and not self._drop:
            out.append(Fragment(self._place.state.channel, -1, self._space))
            self._space = ""
        return out

    # --- for readers

    def say(self, text: str, out: list[Fragment]) -> None:
        """Text of the present state's channel."""
        if self._drop:
            text = text.lstrip()
        if not text:
            return
        self._drop = False
        body = text.rstrip()
        channel = self._place.state.channel
        if not body:
            self._space += text
        else:
            self._said = self._said or channel == CONTENT
            if self._space:
                out.append(Fragment(channel, -1, self._space + body))
            else:
                out.append(Fragment(channel, -1, body))
            self._space, self._long = text[len(body) :], False
        if self._space and (self._long or len(self._space) > MAX_SPACE):
            out.append(Fragment(channel, -1, self._space))
            self._space, self._long = "", True

    def enter(self, name: str, mark: str = "") -> None:
        """Go on in another state; `mark` led there."""
        before = self._place.state
        place = self._place = self._table[name]
        self.memory = None
        if place.state.channel != before.channel:
            self._space, self._long, self._drop = "", False, True
        if place.state.reader is read_text or place.state.silent:
            self.raw.clear()
        elif mark:
            self.raw += [*self.taken, mark]
        else:
            self.raw += self.taken
        self.taken.clear()
        self.channel = place.state.channel

    def callable(self, name: str) -> bool:
        """Is there a function of this name? Else it is no call."""
        if FUNCTION.fullmatch(name) is None:
            return False
        known = names_of(self._tools) if self._tools else None
        return not known or name in known

    def begin(self, name: str, out: list[Fragment]) -> None:
        """It is a call."""
        if not self._said:
            self._space = ""
        self.raw.clear()
        self.taken.clear()
        self._open = True
        self._given = []
        out.append(Fragment(NAME, self._calls, name))
        self._calls += 1

    def argue(self, text: str, out: list[Fragment]) -> None:
        """More of the open call's arguments."""
        self._given.append(text)
        out.append(Fragment(ARGUMENTS, self._calls - 1, text))

    def close(self, out: list[Fragment], *, complete: bool) -> None:
        """The open call gets no more arguments. `complete`: as far as the text goes, they are all."""
        self._open = False
        if complete and _is_json("".join(self._given)):
            out.append(Fragment(DONE, self._calls - 1, ""))
        self._given = []
        self._drop = not self._said

    def fail(self, text: str, out: list[Fragment]) -> None:
        """It was no call: what was read of it, and `text`, are content (or go on being what they were, in a state of text)."""
        back = "".join([*self.raw, *self.taken, text])
        self.raw.clear()
        self.taken.clear()
        if self._open:
            self.close(out, complete=False)
        if self._place.state.reader is not read_text:
            self.enter("content" if self._place.state.channel == CONTENT else self._place.state.after)
        self.say(back, out)

    def mark_at(self, buf: str, at: int) -> str | None:
        """The mark that stands at a position; "" if the text ends before that is certain; None: there is none."""
        place = self._place
        if place.marker is None:
            return None
        found = place.marker.match(buf, at)
        if found is not None:
            return found.group()
        return "" if len(buf) - at < place.longest and buf[at:] in place.prefixes else None

    def find(self, buf: str, at: int) -> tuple[int, str | None]:
        """Where the next mark (or one of `chars`) is, or what may become one, and as `mark_at`; the text's end and None if there is none."""
        place = self._place
        hit = place.trigger.search(buf, at) if place.trigger is not None else None
        while hit is not None:
            start = hit.start()
            mark = self.mark_at(buf, start)
            if mark is not None or buf[start] in place.state.chars:
                return start, mark
            hit = place.trigger.search(buf, start + 1)  # type: ignore[union-attr]
        return len(buf), None

    def find_near(self, buf: str, at: int) -> tuple[int, str | None, bool]:
        """As `find`, for what is collected, and False; or, if no mark comes within MAX_HEAD characters, the place after them, which are taken,
        and True."""
        room = MAX_HEAD - sum(map(len, self.taken))
        end = at + room + self.place.longest
        start, mark = self.find(buf, at) if len(buf) <= end else self.find(buf[:end], at)
        if start - at <= room:
            return start, mark, False
        self.taken.append(buf[at : at + room])
        return at + room, None, True

    def wait(self, buf: str, at: int) -> int:
        """See this again with what follows."""
        self.held = buf[at:]
        return len(buf)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------ readers


def read_text(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """Text of a channel, up to a mark."""
    start, mark = splitter.find(buf, at)
    if start > at:
        splitter.say(buf[at:start], out)
    if start == len(buf):
        return start
    if not mark:
        return splitter.wait(buf, start)
    state = splitter.place.state
    splitter.enter(state.on[mark], mark)
    return start if mark in state.keep else start + len(mark)


def probe(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """Decides by what comes next, after `skip`."""
    state = splitter.place.state
    while at < len(buf):
        char = buf[at]
        if char in state.skip:
            splitter.taken.append(char)
            at += 1
            continue
        mark = splitter.mark_at(buf, at)
        if mark:
            splitter.enter(state.on[mark], mark)
            return at + len(mark)
        if mark == "":
            return splitter.wait(buf, at)
        following = state.chars.get(char)
        if following is None and (state.channel == REASONING or state.after == "content"):
            splitter.fail("", out)
        else:
            splitter.enter(following or state.after)
        return at
    return at


def collect(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """A name, or a head, up to a mark."""
    state = splitter.place.state
    start, mark, far = splitter.find_near(buf, at)
    if far:
        splitter.fail("", out)
        return start
    splitter.taken.append(buf[at:start])
    if start == len(buf) or (mark == "" and buf[start] not in state.chars):
        return splitter.wait(buf, start) if start < len(buf) else start
    assert state.decide is not None
    head = "".join(splitter.taken)
    decided = state.decide(head)
    if decided is None or (decided[1] and not splitter.callable(decided[1])):
        splitter.fail("", out)
        return start
    following, name = decided
    if name:
        splitter.begin(name, out)
    splitter.enter(state.on.get(mark or "", "") or following, mark or "")
    if name:
        splitter.raw.clear()
    return start + len(mark or "")
