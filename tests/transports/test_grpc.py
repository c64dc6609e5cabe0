"""gRPC, asked by grpcio: what comes is what comes over HTTP, and can be steered, resumed and refused as there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, full_script, hello_script, silent
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_kit import CHATS, HI, PROTO, Client, dial, failed, lent, payloads, stubs, told
from grpc_tools import protoc
from test_retained import Stream, stream  # noqa: F401
from test_socket import SURFACES, payloads_of, plain

from penstock.core.protocol.messages import Attach, Cancel, Detach, Query, Rejected, Submit
from penstock.transports.grpc.calls import EventFrame
from penstock.transports.grpc.statuses import _STATUSES, status_of

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = Edge(tmp_path_factory.mktemp("edge"), {"grpc_port": 0}).start()
    yield edge
    edge.stop()


@pytest.fixture
def edge(one: Edge) -> Iterator[Edge]:
    with lent(one) as edge:
        yield edge


@pytest.fixture
def client(edge: Edge) -> Iterator[Client]:
    with dial(edge) as client:
        yield client


# ------------------------------------------------------------------ what comes


@pytest.mark.parametrize(("path", "body"), SURFACES)
def test_payloads_are_those_of_events(edge: Edge, client: Client, path: str, body: dict[str, Any]) -> None:
    events = list(client.stream(path, body))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert plain([json.loads(event.data) for event in events]) == plain(payloads_of(edge, path, body))
    assert edge.server.gateway.active == 0


def test_the_id_comes_first_and_what_was_ignored_last(edge: Edge, client: Client) -> None:
    edge.text.script = silent
    call = client.stream(CHATS, HI | {"surprise": 1}, id="mine")
    assert dict(call.initial_metadata())["x-request-id"] == "mine"  # before there is a token
    [submit] = edge.text.wait_for(Submit)
    assert submit.rid == "mine"
    edge.text.send(*hello_script(submit))
    assert [payload["choices"][0]["delta"].get("content") for payload in payloads(call)] == ["", "Hello", " world", None]
    assert call.code() is Code.OK
    assert dict(call.trailing_metadata())["x-penstock-ignored-fields"] == "surprise"


def test_metadata_are_headers(edge: Edge, client: Client) -> None:
    asked = {"x_request_id": "told", "x_penstock_retain": "7", "content_length": "3", "host": "elsewhere", "accept": "application/x-ndjson"}
    call = client.stream(CHATS, HI, **asked)
    assert len(payloads(call)) == 4
    [submit] = edge.text.wait_for(Submit)
    assert (submit.rid, submit.retain_s) == ("told", 7.0)


def test_a_reply_that_is_no_stream(edge: Edge, client: Client) -> None:
    [event] = client.stream(CHATS, HI | {"stream": False})
    whole = client.call(CHATS, HI | {"stream": False})
    assert (event.seq, whole.status, whole.headers["content-type"]) == (1, 200, "application/json")
    assert plain(json.loads(event.data)) == plain(json.loads(whole.body))
    assert json.loads(whole.body)["choices"][0]["message"]["content"] == "Hello world"
    assert json.loads(client.call("/v1/models").body)["data"][0]["id"] == "brook"
    assert b"penstock_up" in client.call("/metrics").body
    made = json.loads(client.call(CHATS, HI | {"stream": False, "store": True}).body)["id"]
    listed = json.loads(client.call("/v1/chat/completions?limit=1").body)
    assert [one["id"] for one in listed["data"]] == [made]
    assert json.loads(client.call(f"{CHATS}/{made}", method="DELETE").body)["deleted"]


def test_large_beginnings_and_responses_in_the_background(edge: Edge, client: Client) -> None:
    edge.text.script = full_script
    asked = {"prompt": "hi!", "stream": True, "echo": True, "logprobs": 1}
    events = list(client.stream("/v1/completions", asked))
    assert plain([json.loads(event.data) for event in events]) == plain(payloads_of(edge, "/v1/completions", asked))
    numbers = [event.seq for event in events]
    assert numbers == sorted(set(numbers))
    edge.text.script = hello_script
    body = {"input": "hi", "stream": True, "background": True, "store": True}
    said = [payload["type"] for payload in payloads(client.stream("/v1/responses", body))]
    assert said == [event["type"] for event in payloads_of(edge, "/v1/responses", body)]


@pytest.mark.parametrize("number", [1, 127, 128, 300, 16383, 16384, 1 << 40])
@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, 3_000_000])
def test_events_are_written_as_protobuf_writes_them(number: int, size: int) -> None:
    payload = b"x" * size
    body = stubs()[0].Event(seq=number, data=payload).SerializeToString()
    assert EventFrame().numbered(number, payload) == b"\0" + len(body).to_bytes(4, "big") + body


def test_generate_is_completions_without_json(edge: Edge, client: Client) -> None:
    call = client.generate("Once", n=2, temperature=0.5, seed=1 << 40, stop=["x", "y"], stop_token_ids=[7], min_tokens=1, id="mine")
    said = list(call)
    [submit] = edge.text.wait_for(Submit)
    sampling = submit.sampling
    assert (submit.rid, submit.prompt, sampling.n, sampling.temperature, sampling.seed) == ("mine", "Once", 2, 0.5, 1 << 40)
    assert (sampling.stop, sampling.stop_token_ids, sampling.min_tokens) == (["x", "y"], [7], 1)
    pieces = [(reply.index, reply.text, list(reply.token_ids), reply.finish_reason) for reply in said[:-1]]
    one = [("Hello", [10], ""), (" world", [11], ""), ("", [], "stop")]
    assert pieces == [(index, *piece) for piece in one for index in (0, 1)]
    assert (said[-1].usage.prompt_tokens, said[-1].usage.completion_tokens) == (3, 4)
    list(client.generate(ids=[5, 6]))
    assert list(edge.text.wait_for(Submit, 2)[1].prompt_ids) == [5, 6]


@pytest.mark.parametrize(
    ("asked", "param"), [({}, "prompt"), ({"text": "x", "temperature": -1}, "temperature"), ({"text": "x", "max_tokens": -1}, "max_tokens")]
)
def test_what_generate_cannot_do_is_named(client: Client, asked: dict[str, Any], param: str) -> None:
    code, error, _ = failed(client.generate(**asked))
    assert (code, error["param"]) == (Code.INVALID_ARGUMENT, param)


def test_an_answer_of_generate_that_fails_says_why(edge: Edge, client: Client) -> None:
    wrong = {"error": "It cannot go on.", "error_code": "invalid_value"}
    edge.text.script = lambda submit: [
        delta(
            {"key": submit.key, "tokens": [], "reason": "error", "extra": wrong},
            {"key": submit.key, "choice": 1, "text": "A", "reason": "stop"},
        ),
        finished(submit.key),
    ]
    replies = [(reply.index, reply.text, reply.finish_reason, reply.error) for reply in client.generate("x", n=2)]
    assert sorted(replies[:-1]) == [(0, "", "error", "It cannot go on."), (1, "", "stop", ""), (1, "A", "", "")]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHATS, {"messages": []}, 400, Code.INVALID_ARGUMENT),
        (CHATS, HI | {"model": 3}, 400, Code.INVALID_ARGUMENT),
        ("/v1/messages", {"stream": True}, 400, Code.INVALID_ARGUMENT),
        ("/generate_stream", {"x": 1}, 422, Code.INVALID_ARGUMENT),
        ("/nowhere", {"x": 1}, 404, Code.NOT_FOUND),
        ("/v1/stream", {"x": 1}, 405, Code.UNIMPLEMENTED),
        ("/v1/chat/completions/../../health", {"x": 1}, 404, Code.NOT_FOUND),
    ],
)
def test_errors_are_the_surface_s_own(edge: Edge, client: Client, path: str, body: Any, status: int, code: grpc.StatusCode) -> None:
    call = client.stream(path, body)
    said, error, metadata = failed(call)
    over_http = edge.kept.post(path.replace("/..", "/%2e%2e"), json=body).json()
    own = over_http["error"] if isinstance(over_http["error"], dict) else over_http
    assert (said, error, metadata["penstock-status"]) == (code, own, str(status))
    assert len(metadata["x-request-id"]) == 32
    assert call.details() == (own.get("message") or own.get("error"))
    with pytest.raises(grpc.RpcError) as refused:
        client.call(path, body)
    assert told(refused.value)[:2] == (code, own)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"path": "v1", "body": b"{}"}, "path"),
        ({"path": "/a b", "body": b"{}"}, "path"),
        ({"path": "/ä", "body": b"{}"}, "path"),
        ({"body": b"{}"}, "path"),
        ({"path": CHATS}, "body"),
        ({"path": CHATS, "body": b"{}", "id": "-"}, "id"),
        ({"path": CHATS, "body": b"{}", "id": "x" * 129}, "id"),
    ],
)
def test_what_a_request_lacks_is_named(client: Client, fields: dict[str, Any], param: str) -> None:
    code, error, metadata = failed(client.stub.Stream(client.pb.StreamRequest(**fields), timeout=20))
    assert (code, error["param"], metadata["penstock-status"]) == (Code.INVALID_ARGUMENT, param, "400")


@pytest.mark.parametrize(
    ("ask", "code", "param"),
    [
        (lambda client: client.call("x"), Code.INVALID_ARGUMENT, "path"),
        (lambda client: client.call("/v1/models", method="BREW"), Code.INVALID_ARGUMENT, "method"),
        (lambda client: client.call("/v1/models", method="POST"), Code.UNIMPLEMENTED, None),
        (lambda client: client.call(CHATS, HI), Code.INVALID_ARGUMENT, "stream"),
        (lambda client: client.control("", "PAUSE"), Code.INVALID_ARGUMENT, "id"),
        (lambda client: client.control("r", "ACTION_UNSPECIFIED"), Code.INVALID_ARGUMENT, "action"),
        (lambda client: client.control("r", "PAUSE"), Code.NOT_FOUND, "id"),
        (lambda client: client.control("r", "CANCEL"), Code.NOT_FOUND, "id"),
        (lambda client: list(client.attach("")), Code.INVALID_ARGUMENT, "id"),
        (lambda client: list(client.attach("x", 1 << 63)), Code.INVALID_ARGUMENT, "after"),
        (lambda client: list(client.attach("x")), Code.NOT_FOUND, "stream"),
    ],
)
def test_calls_that_cannot_be_answered(edge: Edge, client: Client, ask: Any, code: grpc.StatusCode, param: str | None) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        ask(client)
    said, error, _ = told(refused.value)
    assert (said, error["param"]) == (code, param)
    edge.wait(lambda: edge.server.gateway.active == 0)


def test_an_error_in_the_middle_and_one_to_try_again_after(edge: Edge, client: Client) -> None:
    edge.text.script = silent
    call = client.stream(CHATS, HI)
    key = edge.text.wait_for(Submit)[0].key
    edge.text.send(delta({"key": key, "text": "Hello"}))
    assert [next(call).seq, next(call).seq] == [1, 2]
    edge.text.send(delta({"key": key, "reason": "error", "extra": {"error": "Es ging schief: ü.", "error_code": "engine_failure"}}))
    code, error, _ = failed(call)
    assert (code, call.details(), error["code"]) == (Code.INTERNAL, "Es ging schief: ü.", "engine_failure")
    call = client.stream(CHATS, HI)
    key = edge.text.wait_for(Submit, 2)[1].key
    edge.text.send(Rejected(key=key, status=429, type="rate_limit_error", code="queue_full", message="Later.", retry_after_s=3.0))
    code, error, metadata = failed(call)
    assert (code, error["code"], metadata["retry-after"]) == (Code.RESOURCE_EXHAUSTED, "queue_full", "3")


def test_every_status_has_its_own() -> None:
    wanted = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 413: 8, 418: 3, 429: 8, 499: 1, 500: 13, 502: 13, 503: 14, 504: 4}
    assert {status: status_of(status).value for status in wanted} == wanted
    assert status_of(409, "stream_taken").value == Code.ABORTED.value[0]


def test_a_long_error_leaves_room_for_its_status(edge: Edge, client: Client) -> None:
    edge.text.script = lambda submit: [
        Rejected(key=submit.key, status=400, type="invalid_request_error", code="invalid_value", message="ü" * 9000)
    ]
    code, error, _ = failed(call := client.stream(CHATS, HI))
    assert (code, error, call.details()) == (Code.INVALID_ARGUMENT, {}, "ü" * 512)


# ------------------------------------------------------------------ who leaves, and who comes back


@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
@pytest.mark.parametrize("unary", [False, True])
def test_who_leaves_cancels(edge: Edge, how: str, unary: bool) -> None:
    edge.text.script = silent
    with dial(edge) as client:
        ask = client.pb.CallRequest(path=CHATS, body=json.dumps(HI | {"stream": False}).encode())
        timeout = 1.0 if how == "deadline" else 20
        call = client.stub.Call.future(ask, timeout=timeout) if unary else client.stream(CHATS, HI, timeout=timeout)
        edge.text.wait_for(Submit)
        if how == "cancel":
            call.cancel()
        elif how == "deadline":
            assert call.code() is Code.DEADLINE_EXCEEDED
        else:
            client.channel.close()
        assert edge.text.wait_for(Cancel)[0].cause == "disconnect"
    edge.wait(lambda: edge.server.gateway.active == 0)


@pytest.mark.parametrize(("action", "do"), [("PAUSE", "pause"), ("RESUME", "resume"), ("STOP", "stop"), ("CANCEL", "cancel")])
def test_steering_asks_text_in_its_name(edge: Edge, client: Client, action: str, do: str) -> None:
    edge.text.script = silent
    edge.text.answers["control"] = lambda _: (200, b"{}")
    call = client.stream(CHATS, HI)
    rid = dict(call.initial_metadata())["x-request-id"]
    client.control(rid, action)
    asked = [message for message in edge.text.received if isinstance(message, Query) and message.what == "control"]
    assert json.loads(asked[-1].body) == {"rid": rid, "tenant": None, "own": "", "do": do}
    call.cancel()


def test_who_leaves_a_retained_stream_detaches_and_attaches_again(edge: Edge, client: Client, stream: Stream) -> None:  # noqa: F811
    edge.text.script = silent
    call = client.stream(CHATS, HI | {"retain_s": 30}, id="mine")
    submit = edge.text.wait_for(Submit)[0]
    edge.text.send(delta({"key": submit.key, "text": "Hello", "tokens": [10]}))
    got = [next(call), next(call)]
    call.cancel()
    edge.text.wait_for(Detach)
    assert not [message for message in edge.text.received if isinstance(message, Cancel)]
    again = client.attach("mine", 2)
    events = got + list(again)
    assert dict(again.initial_metadata())["x-request-id"] == "mine"
    said = [(event.seq, json.loads(event.data)) for event in events]
    blocks = [block for block in edge.kept.get("/v1/streams/mine").text.split("\n\n") if block and "[DONE]" not in block]
    assert said == [(int(block.split("\n")[0][4:]), json.loads(block.split("\ndata: ")[1])) for block in blocks]
    assert list(client.attach("mine", 99)) == []
    with pytest.raises(grpc.RpcError) as unknown:
        list(client.attach("other"))
    assert told(unknown.value)[1]["code"] == "stream_not_found"


def test_who_takes_a_stream_over_ends_the_other_call(edge: Edge, client: Client) -> None:
    held = Stream(edge)
    edge.text.script = silent
    first = client.stream(CHATS, HI | {"retain_s": 30}, id="r")
    key = edge.text.wait_for(Submit)[0].key
    edge.text.send(delta({"key": key, "text": "Hel"}))
    assert [next(first).seq, next(first).seq] == [1, 2]
    second = client.attach("r", 2)
    edge.text.wait_for(Attach)
    edge.text.send(delta({"key": key, "text": "Hel"}), delta({"key": key, "text": "lo", "reason": "stop"}), finished(key))
    assert [event.seq for event in second] == [3, 4]
    code, error, _ = failed(first)
    assert (code, error["code"]) == (Code.ABORTED, "stream_taken")
    assert held.submits


# ------------------------------------------------------------------ keys, health, reflection


def health(channel: grpc.Channel, service: str = "", *, watch: bool = False) -> Any:
    """As grpcio-health-checking asks it: `service` and `status` are field 1 of their messages, the status a byte."""
    path = f"/grpc.health.v1.Health/{'Watch' if watch else 'Check'}"
    method = channel.unary_stream(path) if watch else channel.unary_unary(path)
    return method(b"\x0a" + bytes([len(service)]) + service.encode() if service else b"", timeout=20)


SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


def reflected(channel: grpc.Channel, version: str, *, key: str | None = None) -> bytes:
    """The file of the service, as field 4 of the request asks for it and field 4.1 of the answer gives it."""
    symbol = b"penstock.v1.Penstock"
    method = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    [answer] = method(iter([b"\x22" + bytes([len(symbol)]) + symbol]), timeout=20, metadata=metadata)
    return bytes(answer)


def test_keys_are_those_of_http(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, api_key=["secret"])
    for key in (None, "wrong"):
        with dial(edge, key) as client:
            code, error, _ = failed(client.stream(CHATS, HI))
            assert (code, error["code"]) == (Code.UNAUTHENTICATED, "invalid_api_key")
            for ask in (
                lambda client=client: client.call("/v1/models"),
                lambda client=client: client.control("r", "CANCEL"),
                lambda client=client: list(client.attach("r")),
                lambda client=client: reflected(client.channel, "v1"),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    ask()
                assert refused.value.code() is Code.UNAUTHENTICATED
            assert health(client.channel) == SERVING  # as /health
    with dial(edge, "secret") as client:
        assert len(payloads(client.stream(CHATS, HI))) == 4
        assert client.call("/v1/models").status == 200
        assert reflected(client.channel, "v1", key="secret")
    with dial(edge) as client:
        assert len(payloads(client.stream(CHATS, HI, x_api_key="secret"))) == 4
    with pytest.raises(AssertionError):
        edge.text.wait_for(Submit, 3, timeout=0.1)


def test_health_is_readiness(edge: Edge, client: Client) -> None:
    assert health(client.channel) == health(client.channel, "penstock.v1.Penstock") == SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health(client.channel, "other")
    assert unknown.value.code() is Code.NOT_FOUND
    assert next(health(client.channel, "other", watch=True)) == SERVICE_UNKNOWN
    watch = health(client.channel, watch=True)
    assert next(watch) == SERVING
    edge.text.call(lambda: setattr(edge.server.gateway, "draining", True))
    assert next(watch) == NOT_SERVING == health(client.channel)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_shows_the_service(client: Client, version: str) -> None:
    answer = reflected(client.channel, version)
    descriptor = FileDescriptorProto()
    client.pb.DESCRIPTOR.CopyToProto(descriptor)
    assert descriptor.SerializeToString() in answer


# ------------------------------------------------------------------ beginning and end


def test_the_end_of_the_server_comes_behind_the_streams(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0)
    edge.text.script = silent
    with dial(edge) as client, dial(edge) as idle:
        assert health(idle.channel) == SERVING
        call = client.stream(CHATS, HI)
        edge.text.wait_for(Submit)
        edge.text.call(lambda: setattr(edge.server.gateway, "draining", True))
        code, error, _ = failed(client.stream(CHATS, HI))
        assert (code, error["code"]) == (Code.UNAVAILABLE, "draining")
        edge.text.call(edge.server.stop)
        code, error, _ = failed(call)
        assert (code, error["code"]) == (Code.UNAVAILABLE, "draining")
        assert failed(client.stream(CHATS, HI))[0] is Code.UNAVAILABLE


def test_without_the_option_nothing_is_imported(make_edge: MakeEdge) -> None:
    edge = make_edge()
    assert edge.server._listeners == []
    code = (
        "import sys\nfrom penstock.core.protocol.config import build\nfrom penstock.transports.builtin import register_transports\n"
        "from penstock.transports.gateway import Gateway\nimport penstock.transports.edge\n"
        "gateway = Gateway(build({}), 0)\n"
        "[spec] = [spec for spec in register_transports() if spec.name == 'grpc']\nassert spec.factory(gateway) == ((), ())\n"
        "assert not {'grpclib', 'h2', 'google.protobuf'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_page_s_example(edge: Edge, client: Client) -> None:
    page = (PROTO.parents[2] / "docs" / "grpc.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    said: list[str] = []
    exec(
        compile(code.replace("127.0.0.1:50051", f"127.0.0.1:{edge.ports['grpc']}"), "grpc.md", "exec"),
        {"print": lambda *words, **_: said.append(words[0])},
    )
    assert "".join(said) == "Hello worldHello world"
    rows = dict(re.findall(r"^\| ([\d, ]+?)(?:, other \dxx)? \| `(\w+)`", page, re.M))
    told = {int(status): name for statuses, name in rows.items() for status in statuses.split(", ")}
    assert told == {status: status_of(status).name for status in told}
    assert told.keys() >= _STATUSES.keys()


def test_the_generated_file_is_fresh() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert not protoc.main(["protoc", f"-I{PROTO.parent}", f"--python_out={folder}", f"--pyi_out={folder}", PROTO.name])
        for made in Path(folder).iterdir():
            assert (PROTO.parent / made.name).read_text() == made.read_text(), "run: make proto"
