"""A server without processes and without HTTP, for the Python API, notebooks and tests.

What it is: `LocalServer`: the text actor and an engine, the same ones as in the processes, on one background thread that runs trio; instead of links there are plain
calls. Submit, Cancel and Query go in from any thread; everything that an edge would get comes out through one callback.
What it does not know: prompts, progress bars, asyncio (core/llm.py stands on this).

The engine starts first and text beside it; there are no restarts: an engine that fails ends the server, and `failure` says why.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import trio

from penstock.core.contract.devices import Device
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.processes.spawn import root_cause
from penstock.core.processes.text_side import TextSide, no_engine
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts, EngineUp, Message, PeerUp
from penstock.core.protocol.errors import EngineFailure, PenstockError, described
from penstock.core.protocol.messages import Cancel, Extension, Query, StepTokens, Submit
from penstock.core.protocol.model_folder import with_model
from penstock.core.protocol.quality import gate
from penstock.core.runtime.wiring import Dropped
from penstock.core.telemetry.traces import NO_TRACES, Traces

log = logging.getLogger("penstock.config")
LOCAL_EDGE = -1
"""The `edge` of requests from the same process."""

FromText = Callable[[Message], None]
"""Gets TextDelta, Finished, Rejected, Answer, TextReady on the server's thread; must not block. A failure of the server is `on_failure`'s."""


class LocalServer:
    """`start()` blocks until the model is loaded and raises PenstockError if it cannot be; `close()` ends everything (also on leaving a `with`)."""

    def __init__(
        self,
        config: Config,
        deliver: FromText,
        *,
        on_failure: Callable[[PenstockError], None] | None = None,
        on_phase: Callable[[str, float], None] | None = None,
        extra_plugins: Sequence[str] = (),
        device: Device | None = None,
        traces: Traces = NO_TRACES,
    ) -> None:
        self.config = with_model(config)
        note = gate(self.config)
        if note is not None:
            log.warning("%s", note)
        self._deliver = deliver
        self._on_failure = on_failure
        self._on_phase = on_phase
        self._extra = tuple(extra_plugins)
        self._device = device
        self._traces = traces
        self._token: trio.lowlevel.TrioToken | None = None
        self._lost = Dropped()
        self._started = threading.Event()
        self._closing = trio.Event()
        self._side: TextSide | None = None
        self._engine: Engine | None = None
        self.facts: EngineFacts | None = None
        self.failure: PenstockError | None = None
        self._thread = threading.Thread(target=self._run, name="penstock", daemon=True)

    # --- any thread

    def start(self) -> EngineFacts:
        self._thread.start()
        self._started.wait()
        if self.failure is not None:
            self._thread.join()
            raise self.failure
        assert self.facts is not None
        return self.facts

    def submit(self, message: Submit) -> None:
        """Its deltas come to `deliver`. `edge` must be LOCAL_EDGE. Raises what ended the server, if it is over."""
        self._post(message)

    def cancel(self, key: int, cause: Literal["disconnect", "slow_client", "timeout", "drain", "client"] = "client") -> None:
        self._post(Cancel(key=key, cause=cause))

    def query(self, message: Query) -> None:
        """The Answer comes to `deliver`."""
        self._post(message)

    @property
    def side(self) -> TextSide:
        """Once started; its tokenizer and renderer may be used from any thread."""
        assert self._side is not None
        return self._side

    def close(self) -> None:
        """Idempotent. Requests that run are dropped without a word."""
        token, self._token = self._token, None
        if token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._closing.set)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _post(self, *messages: Message) -> None:
        token = self._token
        if token is None:
            raise self.failure or EngineFailure("The server is closed.")
        try:
            token.run_sync_soon(self._to_text, messages)
        except trio.RunFinishedError:
            raise self.failure or EngineFailure("The server is closed.") from None

    # --- the server's thread

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # this thread's end must be known to whoever waits for it
            cause = root_cause(error)
            self.failure = cause if isinstance(cause, PenstockError) else EngineFailure(f"The server failed: {described(cause)}")
            self.failure.__cause__ = cause if self.failure is not cause else None
        finally:
            self._token = None
            waited = self._started.is_set()
            self._started.set()
            if waited and self.failure is not None and self._on_failure is not None:
                self._on_failure(self.failure)

    async def _main(self) -> None:
        plugins = {role: PluginHost(role, extra=self._extra, skip_broken=self.config.skip_broken_plugins).load() for role in _ROLES}
        self._engine = engine = Engine(
            self.config, output=self._from_engine, device=self._device, plugins=plugins["engine"], progress=self._on_phase
        )
        side: TextSide | None = None
        try:
            async with trio.open_nursery() as nursery:
                facts = await engine.start(nursery)
                # Not inline: the engine's plan must not wait until the last step's tokens became text.
                self._side = side = TextSide(
                    self.config,
                    plugins["text"],
                    to_edges=lambda message, index: self._deliver(message),
                    to_engines=self._to_engine,
                    to_root=None,
                    traces=self._traces,
                    inline=False,
                )
                await nursery.start(side.run)
                side.post([PeerUp(role="edge", id=LOCAL_EDGE, epoch=1), EngineUp(engine=0, epoch=1, facts=facts)])
                self.facts = facts
                self._token = trio.lowlevel.current_trio_token()
                self._started.set()
                await self._closing.wait()
                nursery.cancel_scope.cancel()
        finally:
            engine.close()
            if side is not None:
                side.close()

    def _to_engine(self, message: Message, index: int | None) -> None:
        if index:  # there is only number 0
            assert isinstance(message, Extension)
            no_engine(self._lost, message.kind, index)
        elif self._engine is not None:
            self._engine.post(message)

    def _from_engine(self, message: Message) -> None:
        if self._side is not None and isinstance(message, StepTokens | Extension):
            self._side.post([message])

    def _to_text(self, messages: tuple[Message, ...]) -> None:
        if self._side is not None:
            self._side.post(messages)


_ROLES: tuple[Literal["engine", "text"], ...] = ("engine", "text")
