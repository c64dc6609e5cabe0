"""Chat templates of requests: rendered in processes of their own.

What it is: `FencedRenderer`, a chat renderer in front of the model's, whose `with_template` renders in a child (core/processes/template_child.py) that
has the same plugins. A template that takes too long has its child killed, one that takes too much memory fails there; either is that
request's 400, and it waits until another child is there in its place. Children are started when they are needed, and kept.
What it does not know: templates, threads (as many renderings at once as there are children; whoever comes later waits).
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from typing import Any

import msgspec

from penstock.core.contract.text import ChatRenderer
from penstock.core.processes.fenced import Child, TooSlow
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature

log = logging.getLogger("penstock.text")
CHILD = "penstock.core.processes.template_child"
MOST_CHILDREN = 2
LIMIT_S = 5.0
"""For one template: compiling it, finding out what it takes, and rendering."""
MOST_CHARS = 8 << 20
"""Of a rendered prompt."""


class TemplateSetup(msgspec.Struct):
    """What a child is told first: the plugins, and what the model's renderer was made from."""

    extra: list[str]
    skip_broken: bool
    renderer: str
    source: str
    chat_template: str | None = None


class Rendering(msgspec.Struct):
    """As JSON, whose numbers may be larger than msgpack's, and whose texts may hold half a surrogate pair."""

    template: bytes
    arguments: bytes
    """Of ChatRenderer.render, by name."""


class Rendered(msgspec.Struct):
    """`text` as UTF-8, which may hold lone surrogates. `error` "": it went well."""

    text: bytes = b""
    error: str = ""
    param: str | None = None
    unsupported: bool = False


class FencedRenderer:
    """See TemplatedRenderer. Call `close()` at the end: what is being rendered for requests breaks off."""

    def __init__(self, own: ChatRenderer, setup: TemplateSetup, *, limit_s: float = LIMIT_S) -> None:
        self._own = own
        self._setup = setup
        self._limit_s = limit_s
        self._places: queue.LifoQueue[_Place] = queue.LifoQueue()
        self._all = [_Place() for _ in range(MOST_CHILDREN)]
        self._closed = False
        self._threads = threading.local()
        for place in self._all:
            self._places.put(place)

    def render(self, messages: list[dict[str, Any]], **how: Any) -> str:
        return self._own.render(messages, **how)

    def __getattr__(self, name: str) -> Any:  # what the model's renderer has besides
        return getattr(self._own, name)

    def with_template(self, template: str) -> ChatRenderer:
        return _Theirs(self, template)

    def ask(self, rendering: Rendering) -> str:
        """Blocks. Raises what the child's renderer did, and InvalidRequest (param "chat_template") if the child does not survive."""
        place = self._places.get()
        try:
            done = self._rendered(place, rendering)
        finally:
            self._places.put(place)
        if not done.error:
            return done.text.decode("utf-8", "surrogatepass")
        raise (UnsupportedFeature if done.unsupported else InvalidRequest)(done.error, param=done.param)

    def starting_s(self) -> float:
        """Seconds that this thread's renderings waited for a child that nobody had needed before, since this was last asked: no template's fault."""
        seconds: float = getattr(self._threads, "starting_s", 0.0)
        self._threads.starting_s = 0.0
        return seconds

    def _start(self, place: _Place) -> None:
        if not self._closed:
            place.child = Child(CHILD, Rendered)
        if not self._closed and place.child is not None:
            place.child.start(self._setup)

    def _rendered(self, place: _Place, rendering: Rendering) -> Rendered:
        try:
            if place.child is None:
                began = time.monotonic()
                self._start(place)
                self._threads.starting_s = time.monotonic() - began
            if place.child is None or self._closed:
                raise EOFError
            return place.child.ask(rendering, self._limit_s)
        except TooSlow:
            why = f"it takes more than {self._limit_s:g} seconds to render"
        except (EOFError, OSError, msgspec.MsgspecError):
            why = "the process that rendered it ended: it may take too much memory"
        if not self._closed:
            log.warning("the process for a request's chat template is given up: %s", why)
        self._bury(place)
        try:
            self._start(place)  # now, so that the next one does not wait for what this one did
        except (TooSlow, EOFError, OSError):
            self._bury(place)
        return Rendered(error=f"chat_template cannot be used: {why}.", param="chat_template")

    @staticmethod
    def _bury(place: _Place) -> None:
        if place.child is not None:
            place.child.bury()
            place.child = None

    def close(self) -> None:
        self._closed = True
        for place in self._all:
            if (child := place.child) is not None:
                child.kill()
        for _ in self._all:
            self._bury(self._places.get())
        for place in self._all:
            self._places.put(place)


class _Place:
    """Where a child is, or will be: one that is asked, or waits."""

    child: Child[Rendered] | None = None


class _Theirs:
    """The renderer of one request's template."""

    def __init__(self, fenced: FencedRenderer, template: str) -> None:
        self._fenced = fenced
        self._template = template

    def render(self, messages: list[dict[str, Any]], **how: Any) -> str:
        return self._fenced.ask(Rendering(json.dumps(self._template).encode(), json.dumps({"messages": messages, **how}).encode()))
