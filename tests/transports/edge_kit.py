"""A real edge on a loopback port, and a fake text service at the other end of its link.

What it is: both run on one uvloop in a thread; tests are plain synchronous code with the official clients. `FakeText` speaks the real frames
over a unix socket, answers each Submit from `script`, and keeps everything that it received.
What it does not know: the text actor.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import uvloop

from penstock.core.contract.transports import Transport
from penstock.core.protocol import config as configuration
from penstock.core.protocol.columns import i32, i64
from penstock.core.protocol.config import further_ports
from penstock.core.protocol.control import Tables
from penstock.core.protocol.messages import (
    Answer,
    Attach,
    Attached,
    Extension,
    Finished,
    Message,
    Query,
    RowExtra,
    Submit,
    TextDelta,
    TextReady,
    TokenLogprobs,
    union_of,
)
from penstock.core.protocol.pools import pools_of
from penstock.core.protocol.tables import KeyTable, Principal, digest_of
from penstock.core.runtime.frames import make_hello
from penstock.transports.builtin import register_transports
from penstock.transports.edge import Server
from penstock.transports.gateway import Gateway
from penstock.transports.link import Link
from penstock.transports.tracing import NO_TRACING, Tracing

MODEL = "brook"
SERVER_INFO = b'{"version":"0","model":"brook","models":["brook"],"fingerprint":"fp_test","engine":null,"epoch":0,"limits":{"max_n":64}}'


def delta(*rows: dict[str, Any]) -> TextDelta:
    """Rows are dicts: key, and optionally choice, text, tokens, reason, prompt, cached, output, extra (fields of RowExtra)."""
    return TextDelta(
        keys=i64([r["key"] for r in rows]),
        choices=i32([r.get("choice", 0) for r in rows]),
        texts=[r.get("text", "") for r in rows],
        counts=i32([len(r.get("tokens", [1])) for r in rows]),
        tokens=i32([t for r in rows for t in r.get("tokens", [1])]),
        prompt_tokens=i32([r.get("prompt", 3) for r in rows]),
        cached_tokens=i32([r.get("cached", 0) for r in rows]),
        output_tokens=i32([r.get("output", 1) for r in rows]),
        reasons=[r.get("reason", "") for r in rows],
        extras=[RowExtra(row=i, **r["extra"]) for i, r in enumerate(rows) if "extra" in r],
    )


def finished(key: int, prompt: int = 3, output: int = 2, cached: int = 0) -> Finished:
    return Finished(
        key=key,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=cached,
        queue_ns=1_000_000,
        prefill_ns=2_000_000,
        decode_ns=3_000_000,
        first_token_ns=1,
    )


def hello_script(submit: Submit) -> list[Message]:
    """Every choice says "Hello", " world" and stops."""
    rows = [{"key": submit.key, "choice": c} for c in range(submit.sampling.n)]
    return [
        delta(*[{**r, "text": "Hello", "tokens": [10], "output": 1} for r in rows]),
        delta(*[{**r, "text": " world", "tokens": [11], "output": 2} for r in rows]),
        delta(*[{**r, "tokens": [], "output": 2, "reason": "stop"} for r in rows]),
        finished(submit.key, output=2 * submit.sampling.n),
    ]


def full_script(submit: Submit) -> list[Message]:
    """An answer that holds all that was asked for."""
    sampling = submit.sampling
    position = TokenLogprobs(ids=[10, 11], logprobs=[-0.5, -1.0], ranks=[1, 2], texts=["A", "B"], bytes_=[b"A", b"B"])
    extra: dict[str, Any] = {"logprobs": [position]} if sampling.logprobs is not None else {}
    once: dict[str, Any] = {}  # about the prompt: with the first row alone
    if submit.want_ids or submit.echo:
        once = {"prompt_token_ids": i32([1, 2, 3]), "prompt_text": "hi!" if submit.echo else None}
    if sampling.prompt_logprobs is not None:
        once |= {"prompt_logprobs": [None, position, position], "prompt_offsets": [0, 1, 2] if submit.echo else [], "prompt_first": b"h"}
    rows = [
        {"key": submit.key, "choice": choice, "tokens": [10], "extra": extra | (once if choice == 0 else {})}
        for choice in range(sampling.n)
    ]
    return [
        delta(*[{**row, "text": "A"} for row in rows]),
        delta(*[{**row, "tokens": [], "reason": "stop", "extra": {}} for row in rows]),
        finished(submit.key, output=sampling.n),
    ]


def silent(_: Submit) -> list[Message]:
    """Nothing: the test speaks itself."""
    return []


class FakeText:
    """The text process, as an edge sees it. `script(submit)` gives the frames to answer with; `answers` those to queries."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.script: Callable[[Submit], list[Message]] = hello_script
        self.ready: bool | None = True
        """None: says nothing by itself."""
        self.beats = True
        self.answers: dict[str, Callable[[bytes], tuple[int, bytes]]] = {
            "server_info": lambda _: (200, SERVER_INFO),
            "control": lambda _: (
                404,
                b'{"message":"No request of that id is running.","type":"invalid_request_error","code":"not_found"}',
            ),
            "stream": lambda _: (404, b'{"message":"There is no such stream.","type":"invalid_request_error","code":"stream_not_found"}'),
            "models": lambda _: (200, b'{"object":"list","data":[{"id":"brook","object":"model","created":1,"owned_by":"penstock"}]}'),
            "metrics": lambda _: (200, b"penstock_up 1\n"),
            "health": lambda _: (200, b'{"status":"ok"}'),
            "tokenize": lambda body: (200, b'{"count":1,"max_model_len":64,"tokens":[1],"echo":' + body + b"}"),
            "detokenize": lambda body: (200, b'{"prompt":"x","echo":' + body + b"}"),
            "tokenizer_info": lambda _: (200, b'{"tokenizer_class":"Fake"}'),
        }
        self.late: list[Message] = []
        """What is under way to the reader before when another one comes."""
        self.received: list[Message] = []
        self._changed = threading.Condition()
        self._links: list[Link] = []
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def listen(self) -> None:
        self._loop = asyncio.get_running_loop()

        def link() -> Link:
            holder: list[Link] = []
            made = Link(
                union_of("edge>text"),
                make_hello("text", 0, 1),
                on_open=lambda _: self._opened(holder[0]),
                on_message=lambda message: self._on_message(holder[0], message),
                on_close=lambda _: self._closed(holder[0]),
            )
            holder.append(made)
            return made

        self._server = await self._loop.create_unix_server(link, self.path)

    def _opened(self, link: Link) -> None:
        self._links.append(link)
        if self.ready is not None:
            link.send(TextReady(ready=self.ready, reason="" if self.ready else "the engine is loading"))
        self._beat(link)

    def _beat(self, link: Link) -> None:
        """A sign of life every second, which says nothing new."""
        if link in self._links and self.beats:
            link.send(Extension(kind="beat", data=b""))
            assert self._loop is not None
            self._loop.call_later(1.0, self._beat, link)

    def _closed(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)

    def _on_message(self, link: Link, message: Message) -> None:
        with self._changed:
            self.received.append(message)
            self._changed.notify_all()
        if isinstance(message, Submit):
            for frame in self.script(message):
                link.send(frame)
        elif isinstance(message, Attach):
            for frame in (*self.late, Attached(mark=message.mark)):
                link.send(frame)
        elif isinstance(message, Query) and message.what in self.answers:
            status, body = self.answers[message.what](message.body)
            link.send(Answer(id=message.id, status=status, body=body))

    # --- from the test's thread

    def call(self, function: Callable[[], Any]) -> Any:
        """Run on the loop, wait for the result."""
        assert self._loop is not None

        async def inside() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(inside(), self._loop).result(20)

    def send(self, *messages: Message) -> None:
        self.call(lambda: [link.send(m) for link in self._links for m in messages])

    def drop_links(self) -> None:
        self.call(lambda: [link.close("killed") for link in list(self._links)])

    def close_door(self) -> None:
        assert self._server is not None
        self.call(self._server.close)

    def open_door(self) -> None:
        self.call(self.listen)

    def wait_for(self, kind: type[Any], count: int = 1, timeout: float = 10) -> list[Any]:
        """The messages of a kind, once there are `count`."""
        with self._changed:
            ok = self._changed.wait_for(lambda: sum(isinstance(m, kind) for m in self.received) >= count, timeout)
            found = [m for m in self.received if isinstance(m, kind)]
        assert ok, f"only {len(found)} {kind.__name__} came, not {count}; all: {[type(m).__name__ for m in self.received]}"
        return found


def transport_of(factory: Any) -> Callable[[Gateway], Transport]:
    """A TransportSpec's factory; of a function that gives routes alone, too."""

    def made(gateway: Gateway) -> Transport:
        found = factory(gateway)
        return found if isinstance(found, Transport) else Transport(found)

    return made


class Edge:
    """A running edge with its fake text."""

    def __init__(self, folder: Path, options: dict[str, Any], tracing: Tracing = NO_TRACING) -> None:
        self.config = configuration.build(options)
        self.folder = folder
        self.pools = pools_of(self.config)
        self.text = FakeText(str(folder / "text-0.sock"))
        self._tracing = tracing
        self.factories: list[Any] = [spec.factory for spec in register_transports()]
        self._thread = threading.Thread(target=self._main, name="edge", daemon=True)
        self._up = threading.Event()
        self.starting = threading.Event()
        self._error: BaseException | None = None
        self.port = 0
        self.ports: dict[str, int] = {}
        """Of listeners beside HTTP."""

    def start(self) -> Edge:
        self._thread.start()
        assert self._up.wait(20)
        if self._error is not None:
            raise self._error
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Until the edge has heard TextReady and knows the fingerprint."""

        async def until() -> None:
            while self.server.gateway.fingerprint is None:
                await asyncio.sleep(0.002)

        if self.text.ready:
            asyncio.run_coroutine_threadsafe(until(), self.loop).result(10)

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        try:
            await self.text.listen()
            listener = socket.create_server(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
            factories = [transport_of(factory) for factory in self.factories]
            self.server = Server(self.config, pools=self.pools, run_dir=str(self.folder), factories=factories, tracing=self._tracing)
            self.starting.set()
            further = {option.listener: socket.create_server(("127.0.0.1", port)) for option, port in further_ports(self.config)}
            self.ports = {name: sock.getsockname()[1] for name, sock in further.items()}
            await self.server.start([listener], further)
        except BaseException as error:
            self._error = error
            self._up.set()
            raise
        self._up.set()
        await self._over.wait()
        await self.server.stop()
        self.text._server.close()  # type: ignore[union-attr]
        for link in list(self.text._links):
            link.close()

    @functools.cached_property
    def kept(self) -> httpx.Client:
        """One client for many small requests."""
        return self.http()

    def stop(self) -> None:
        if "kept" in self.__dict__:
            self.kept.close()
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=httpx.Client(verify=False, trust_env=False), **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=False, **options)

    def counters(self) -> dict[str, float]:
        return self.text.call(self.server.gateway.counters.read)

    def wait(self, condition: Callable[[], bool], what: str = "the condition", timeout: float = 10) -> None:
        """Until `condition()` holds on the edge's loop."""

        async def until() -> None:
            async with asyncio.timeout(timeout):
                while not condition():
                    await asyncio.sleep(0.002)

        try:
            asyncio.run_coroutine_threadsafe(until(), self.loop).result(timeout + 1)
        except TimeoutError:
            raise AssertionError(f"{what} did not come true") from None


MakeEdge = Callable[..., Edge]


def tables(keys: dict[bytes, Principal], generation: int) -> Tables:
    body = KeyTable(keys={digest_of(key): principal for key, principal in keys.items()})
    return Tables(generation=generation, body=msgspec.msgpack.encode(body))


def take(edge: Edge, keys: dict[bytes, Principal], generation: int) -> None:
    """Have the edge use these keys of --tables."""
    edge.text.call(lambda: edge.server.app.keyring.take(tables(keys, generation)))


def events(text: str) -> list[Any]:
    """The data of an event stream: parsed JSON, or the bare text of [DONE]. Comments are left out."""
    out: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            out.append(data if data == "[DONE]" else msgspec.json.decode(data))
        else:
            assert not block or block.startswith(":"), block
    return out
