"""gRPC in tests: a foreign client (grpcio) with stubs of its own, made of the .proto file as any client makes them, and a client that speaks bare HTTP/2."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
from edge_kit import Edge
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "transports" / "grpc" / "penstock_v1.proto"
CHATS = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
METHOD = "/penstock.v1.Penstock/Stream"


@functools.cache
def stubs() -> tuple[Any, Any]:
    """(messages, stubs), generated."""
    with tempfile.TemporaryDirectory() as folder:
        assert not protoc.main(["protoc", f"-I{PROTO.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", PROTO.name])
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("penstock_v1_pb2"), importlib.import_module("penstock_v1_pb2_grpc")
        finally:
            sys.path.remove(folder)


@contextlib.contextmanager
def lent(edge: Edge) -> Iterator[Edge]:
    """A running edge for one test, whose text is itself again afterwards."""
    text = edge.text
    before = text.script, dict(text.answers), text._on_message
    text.received.clear()
    yield edge
    text.script, text.answers, text._on_message = before  # type: ignore[method-assign]
    edge.server.gateway.draining = False
    edge.wait(lambda: edge.server.gateway.active == 0, "the end of all requests")


class Client:
    """A channel and what is asked on it."""

    def __init__(self, port: int, key: str | None = None, **options: Any) -> None:
        self.pb, made = stubs()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0), *options.items()])
        self.stub = made.PenstockStub(self.channel)
        self._key = [("authorization", f"Bearer {key}")] if key else []

    def stream(self, path: str, body: dict[str, Any] | bytes, timeout: float = 20, id: str = "", **metadata: str) -> Any:
        asked = self.pb.StreamRequest(path=path, body=body if isinstance(body, bytes) else json.dumps(body).encode(), id=id)
        return self.stub.Stream(asked, timeout=timeout, metadata=self._metadata(metadata))

    def generate(self, text: str = "", ids: list[int] | None = None, id: str = "", **sampling: Any) -> Any:
        prompt = {"token_ids": self.pb.TokenIds(ids=ids)} if ids is not None else {"text": text} if text else {}
        asked = self.pb.GenerateRequest(**prompt, id=id, sampling=self.pb.SamplingParams(**sampling))
        return self.stub.Generate(asked, timeout=20, metadata=self._key)

    def attach(self, id: str, after: int = 0) -> Any:
        return self.stub.Attach(self.pb.AttachRequest(id=id, after=after), timeout=20, metadata=self._key)

    def control(self, id: str, action: str) -> Any:
        return self.stub.Control(self.pb.ControlRequest(id=id, action=action), timeout=20, metadata=self._key)

    def call(self, path: str, body: Any = None, method: str = "", **metadata: str) -> Any:
        raw = b"" if body is None else json.dumps(body).encode()
        return self.stub.Call(self.pb.CallRequest(path=path, body=raw, method=method), timeout=20, metadata=self._metadata(metadata))

    def _metadata(self, more: dict[str, str]) -> list[tuple[str, str]]:
        return [*self._key, *((name.replace("_", "-"), value) for name, value in more.items())]


@contextlib.contextmanager
def dial(edge: Edge, key: str | None = None, **options: Any) -> Iterator[Client]:
    client = Client(edge.ports["grpc"], key, **options)
    with client.channel:
        yield client


def payloads(call: Any) -> list[Any]:
    """To the end."""
    return [json.loads(event.data) for event in call]


def failed(call: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """How a stream failed: its status, its error object and the rest of its trailing metadata."""
    try:
        list(call)
    except grpc.RpcError as error:
        return told(error)
    raise AssertionError("it did not fail")


def told(error: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    metadata = dict(error.trailing_metadata())
    body = json.loads(metadata.pop("penstock-error-bin", b"{}"))
    return error.code(), body, metadata


def call() -> dict[str, str]:
    """Headers that every call has."""
    pseudo = {":method": "POST", ":path": METHOD, ":scheme": "http", ":authority": "x"}
    return pseudo | {"te": "trailers", "content-type": "application/grpc"}


class Bare:
    """HTTP/2 by hand."""

    def __init__(self, edge: Edge) -> None:
        self.sock = socket.create_connection(("127.0.0.1", edge.ports["grpc"]), timeout=10)
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def ask(self, data: bytes, *, id: int = 1, end: bool = True, drop: str = "", **headers: str) -> None:
        """A call whose DATA are these bytes."""
        named = call() | {name.replace("_", "-"): value for name, value in headers.items()}
        named.pop(drop, None)
        self.h2.send_headers(id, list(named.items()))
        if data or end:
            self.h2.send_data(id, data, end_stream=end)
        self.flush()

    def events(self) -> Iterator[h2.events.Event]:
        """Until the connection closes."""
        while data := self.sock.recv(65536):
            yield from self.h2.receive_data(data)

    def trailers(self) -> dict[str, str]:
        """The last headers of the call."""
        for event in self.events():
            if isinstance(event, (h2.events.TrailersReceived, h2.events.ResponseReceived)):
                found = {name.decode(): value.decode() for name, value in event.headers}
                if "grpc-status" in found or found.get(":status") not in (None, "200"):
                    return found
        raise AssertionError("it closed without a word")
