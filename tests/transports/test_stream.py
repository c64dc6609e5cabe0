"""Event streams against golden transcripts, and the equality of streamed and whole replies."""

from __future__ import annotations

import re
import socket
import threading
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished, silent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Cancel, EdgeStats, Message, Rejected, Submit, TokenLogprobs
from penstock.transports import openai_voice, replies
from penstock.transports.openai_voice import CompletionVoice

CHAT = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}


def normal(text: str) -> str:
    """A transcript without what differs from run to run."""
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}0"', r'"id":"\1-ID"', text)
    return re.sub(r'"created":\d+', '"created":0', text)


def head(kind: str) -> str:
    prefix, name = {"chat": ("chatcmpl", "chat.completion.chunk"), "completion": ("cmpl", "text_completion")}[kind]
    return f'data: {{"id":"{prefix}-ID","object":"{name}","created":0,"model":"brook","system_fingerprint":"fp_test"'


def test_golden_chat(shared_edge: Edge) -> None:
    with shared_edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    h = head("chat")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert int(reply.headers["openai-processing-ms"]) >= 0
    assert normal(reply.text) == (
        h + ',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        + h + ',"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}\n\n'
        + h + ',"choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null}]}\n\n'
        + h + ',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null,"matched_stop":null}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


def test_golden_chat_with_usage(shared_edge: Edge) -> None:
    with shared_edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    chunks = events(reply.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert normal(reply.text).splitlines()[2] == (
        head("chat") + ',"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}],"usage":null}'
    )


def test_golden_completion_of_two_prompts(shared_edge: Edge) -> None:
    with shared_edge.http() as http:
        reply = http.post("/v1/completions", json={"model": "brook", "prompt": ["a", "b"], "stream": True})
    h = head("completion")
    lines = [line for line in normal(reply.text).split("\n\n") if line]
    assert sorted(lines[:-1]) == sorted(
        h + f',"choices":[{{"index":{i},"text":"{text}","logprobs":null,"finish_reason":{reason},"stop_reason":null{more}}}]}}'
        for i in (0, 1)
        for text, reason, more in (("Hello", "null", ""), (" world", "null", ""), ("", '"stop"', ',"matched_stop":null'))
    )
    assert lines[-1] == "data: [DONE]"


def test_continuous_usage(shared_edge: Edge) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with shared_edge.http() as http:
        chunks = events(http.post("/v1/chat/completions", json=CHAT | {"stream": True, "stream_options": options}).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]] == [0, 1, 2, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks[:-1]} == {3}


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "hi"})])
def test_obfuscated_events_have_one_size_and_say_the_same(make_edge: MakeEdge, path: str, body: dict[str, Any]) -> None:
    texts = ["", "a", "fourteen words", '\n\t"', "größer", "x" * 64]

    def script(submit: Submit) -> list[Message]:
        rows = [delta({"key": submit.key, "text": text, "tokens": [1]}) for text in texts]
        return [*rows, delta({"key": submit.key, "tokens": [], "reason": "stop"}), finished(submit.key)]

    edge = make_edge(text=lambda t: setattr(t, "script", script))

    def ask(**options: Any) -> list[Any]:
        reply = edge.kept.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True, **options}})
        assert reply.status_code == 200
        sizes.append({len(line.encode()) for line in reply.text.split("\n\n") if '"choices":[{' in line})
        return events(reply.text)

    sizes: list[set[int]] = []
    plain, padded = ask(include_obfuscation=False), ask(include_obfuscation=True)
    assert len(sizes[0]) > 3
    assert {size % 64 for size in sizes[1]} == {min(sizes[1]) % 64}
    assert len(sizes[1]) <= 3, "nothing tells the first five pieces apart"
    assert "obfuscation" not in padded[-2], "the usage is no secret"
    said = [{**chunk, "id": "", "created": 0} for chunk in padded[:-1]]
    assert all(chunk.pop("obfuscation", "") is not None for chunk in said)
    assert said == [{**chunk, "id": "", "created": 0} for chunk in plain[:-1]]


def test_several_choices_each_have_one_role_and_one_end(shared_edge: Edge) -> None:
    with shared_edge.client() as client:
        chunks = list(client.chat.completions.create(**CHAT, n=3, stream=True))  # type: ignore[call-overload]
    for index in range(3):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert [c.delta.role for c in mine] == ["assistant", None, None, None]
        assert "".join(c.delta.content or "" for c in mine) == "Hello world"
        assert [c.finish_reason for c in mine] == [None, None, None, "stop"]
        assert not mine[-1].delta.content


def test_rows_that_arrive_together_leave_in_one_write(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        k = submit.key
        return [delta({"key": k, "text": "a"}, {"key": k, "text": "b"}, {"key": k, "tokens": [], "reason": "stop"}), finished(k)]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    body = msgspec.json.encode(CHAT | {"stream": True})
    with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        answer = b"".join(iter(lambda: raw.recv(1 << 16), b""))
    chunk = answer.split(b"\r\n\r\n", 1)[1]
    size, _, rest = chunk.partition(b"\r\n")
    assert rest[: int(size, 16)].count(b"data: ") == 5
    assert rest[int(size, 16) :] == b"\r\n0\r\n\r\n"


def test_stop_reason_and_unicode(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        k = submit.key
        return [
            delta({"key": k, "text": 'é"\n\u2028😀'}),
            delta({"key": k, "tokens": [], "reason": "stop", "extra": {"stop_reason": "END"}}),
            finished(k),
        ]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        chunks = events(http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text)
        whole = http.post("/v1/chat/completions", json=CHAT).json()
    assert chunks[1]["choices"][0]["delta"]["content"] == 'é"\n\u2028😀'
    for choice in (chunks[2]["choices"][0], whole["choices"][0]):
        assert (choice["stop_reason"], choice["matched_stop"]) == ("END", "END")


def test_keep_alive_comments(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent), keep_alive_s=0.05)
    with edge.http() as http, http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        assert next(lines) == ": keep-alive"
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(delta({"key": key, "text": "x", "reason": "stop"}), finished(key))
        rest = "\n".join(lines)
    assert [line for line in rest.splitlines() if line.startswith("data: ")][-1] == "data: [DONE]"


def test_a_refusal_that_comes_after_a_comment_is_an_error_event(make_edge: MakeEdge) -> None:
    """As docs/http.md has it: the status is 200 from the first comment on."""
    edge = make_edge(text=lambda t: setattr(t, "script", silent), keep_alive_s=0.05)
    with edge.http() as http, http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
        lines = reply.iter_lines()
        assert (reply.status_code, next(lines)) == (200, ": keep-alive")
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(Rejected(key=key, status=400, type="invalid_request_error", code="invalid_value", message="No.", param="prompt"))
        data = [msgspec.json.decode(line[6:]) for line in lines if line.startswith("data: ")]
    assert data == [{"error": {"message": "No.", "type": "invalid_request_error", "param": "prompt", "code": "invalid_value"}}]


# ------------------------------------------------------------------ streamed = whole


def chunked(data: st.DataObject, texts: list[str]) -> list[list[tuple[int, str]]]:
    """Random frames of (choice, piece), in order within a choice."""
    rest = list(texts)
    frames: list[list[tuple[int, str]]] = []
    while any(rest):
        frame = []
        for choice in data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=4)):
            size = data.draw(st.integers(0, max(1, len(rest[choice]))))
            piece, rest[choice] = rest[choice][:size], rest[choice][size:]
            frame.append((choice, piece))
        frames.append(frame)
    return frames


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), texts=st.lists(st.text(max_size=12), min_size=1, max_size=3), kind=st.sampled_from(["chat", "completion"]))
def test_stream_equals_whole(shared_edge: Edge, data: st.DataObject, texts: list[str], kind: str) -> None:
    reasons = [data.draw(st.sampled_from(["stop", "length"])) for _ in texts]
    frames = chunked(data, texts)
    together = data.draw(st.booleans())

    def script(submit: Submit) -> list[Message]:
        rows = [[{"key": submit.key, "choice": c, "text": t} for c, t in frame] for frame in frames]
        ends = [{"key": submit.key, "choice": c, "tokens": [], "reason": reason} for c, reason in enumerate(reasons)]
        if together:
            rows = [[row for frame in rows for row in frame]] if rows else []
        return [*[delta(*frame) for frame in rows], *[delta(end) for end in ends], finished(submit.key, output=7)]

    shared_edge.text.script, before = script, shared_edge.text.script
    body: dict[str, Any] = {"model": "brook", "n": len(texts)}
    body |= {"messages": CHAT["messages"]} if kind == "chat" else {"prompt": "p"}
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    try:
        http = shared_edge.kept
        whole = http.post(path, json=body).json()
        stream = events(http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    finally:
        shared_edge.text.script = before
    assert stream[-1] == "[DONE]"
    assert stream[-2]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in stream[:-2] if c["choices"][0]["index"] == choice["index"]]
        if kind == "chat":
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"] == texts[choice["index"]]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"] == texts[choice["index"]]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]] == [reasons[choice["index"]]]


# ------------------------------------------------------------------ log-probabilities, ids, echo


def position(token: int, text: str, logprob: float, *others: tuple[int, str, float]) -> TokenLogprobs:
    all_ = [(token, text, logprob), *others]
    return TokenLogprobs(
        ids=[i for i, _, _ in all_],
        logprobs=[p for _, _, p in all_],
        ranks=[2, *range(1, len(all_))],
        texts=[t for _, t, _ in all_],
        bytes_=[t.encode() for _, t, _ in all_],
    )


def logprob_script(submit: Submit) -> list[Message]:
    k = submit.key
    first = position(10, "Hé", -0.5, (12, "Ho", -0.1), (10, "Hé", -0.5))
    second = position(11, "llo", float("-inf"), (13, "y", -0.2), (11, "llo", float("-inf")))
    prompt: dict[str, Any] = {}
    if submit.want_ids:
        prompt["prompt_token_ids"] = i32([1, 2, 3])
    if submit.echo:
        prompt["prompt_text"] = "A bc"
    if submit.sampling.prompt_logprobs is not None:
        prompt["prompt_logprobs"] = [None, position(2, " b", -1.0, (2, " b", -1.0)), position(3, "c", -2.0, (4, "d", -0.3))]
        if submit.echo:
            prompt |= {"prompt_offsets": [0, 1, 3], "prompt_first": b"A"}
    if submit.sampling.max_tokens == 0:
        return [delta({"key": k, "tokens": [], "reason": "length", "output": 0, "extra": prompt}), finished(k, output=0)]
    mine = {} if submit.sampling.logprobs is None else {"logprobs": [first]}
    then = {} if submit.sampling.logprobs is None else {"logprobs": [second]}
    return [
        delta({"key": k, "text": "Hé", "tokens": [10], "extra": prompt | mine}),
        delta({"key": k, "text": "llo", "tokens": [11], "reason": "length", "output": 2, "extra": then}),
        finished(k),
    ]


@pytest.fixture(scope="module")
def logprob_edge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    edge = Edge(tmp_path_factory.mktemp("lp"), {})
    edge.text.script = logprob_script
    edge.start()
    yield edge
    edge.stop()


def test_chat_logprobs(logprob_edge: Edge) -> None:
    with logprob_edge.client() as client:
        whole = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
        stream = list(client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=True))  # type: ignore[call-overload]
    content = whole.choices[0].logprobs.content
    assert [(c.token, c.logprob, bytes(c.bytes)) for c in content] == [("Hé", -0.5, "Hé".encode()), ("llo", -9999.0, b"llo")]
    assert [[(t.token, t.logprob) for t in c.top_logprobs] for c in content] == [
        [("Ho", -0.1), ("Hé", -0.5)],
        [("y", -0.2), ("llo", -9999.0)],
    ]
    streamed = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_completion_logprobs(logprob_edge: Edge) -> None:
    body = {"model": "brook", "prompt": "p", "logprobs": 2}
    with logprob_edge.http() as http:
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        stream = events(http.post("/v1/completions", json=body | {"stream": True}).text)
        named = http.post("/v1/completions", json=body | {"return_tokens_as_token_ids": True}).json()["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["Hé", "llo"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"Ho": -0.1, "Hé": -0.5}, {"y": -0.2, "llo": -9999.0}],
        "text_offset": [0, 2],
    }
    parts = [c["choices"][0]["logprobs"] for c in stream[:-1] if c["choices"][0]["logprobs"]]
    assert {name: [x for part in parts for x in part[name]] for name in whole} == whole
    assert named["tokens"] == ["token_id:10", "token_id:11"]


def test_tokens_of_one_character_share_its_offset_and_none_is_beyond_the_text(make_edge: MakeEdge) -> None:
    pieces = [b"a", *(bytes([byte]) for byte in "中".encode()), b"<special>", b"b", b"<stop>"]

    def script(submit: Submit) -> list[Message]:
        at = [
            TokenLogprobs(ids=[i], logprobs=[-1.0], ranks=[1], texts=[piece.decode("utf-8", "replace")], bytes_=[piece], silent=i == 4)
            for i, piece in enumerate(pieces)
        ]
        rows = [("a", at[:1]), ("", at[1:3]), ("中b", at[3:])]
        return [
            *(delta({"key": submit.key, "text": text, "tokens": [], "extra": {"logprobs": some}}) for text, some in rows),
            delta({"key": submit.key, "tokens": [], "reason": "stop"}),
            finished(submit.key),
        ]

    edge = make_edge()
    edge.text.script = script
    body = {"model": "brook", "prompt": "p", "logprobs": 0}
    with edge.http() as http:
        whole = http.post("/v1/completions", json=body).json()["choices"][0]
        stream = events(http.post("/v1/completions", json=body | {"stream": True}).text)
    assert whole["text"] == "a中b"
    assert whole["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 3]
    parts = [c["choices"][0]["logprobs"] for c in stream[:-1] if c["choices"][0]["logprobs"]]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 1, 1, 2, 3]


def test_echo_with_logprobs_as_evaluation_harnesses_use_it(logprob_edge: Edge) -> None:
    body = {"model": "brook", "prompt": [1, 2, 3], "logprobs": 1, "echo": True, "max_tokens": 1}
    with logprob_edge.http() as http:
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        stream = events(http.post("/v1/completions", json=body | {"stream": True}).text)
        only = http.post("/v1/completions", json=body | {"max_tokens": 0}).json()
        streamed = events(http.post("/v1/completions", json=body | {"max_tokens": 0, "stream": True}).text)
    assert choice["text"] == "A bcHéllo"
    assert choice["logprobs"]["tokens"] == ["A", " b", "c", "Hé", "llo"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.5, -9999.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 3, 4, 6]
    assert "".join(c["choices"][0]["text"] for c in stream[:-1]) == "A bcHéllo"
    offsets = [o for c in stream[:-1] if c["choices"][0]["logprobs"] for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 3, 4, 6]
    assert only["choices"][0]["text"] == "A bc"
    assert only["choices"][0]["logprobs"]["tokens"] == ["A", " b", "c"]
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0
    assert [c["choices"][0]["text"] for c in streamed[:-1]] == ["A bc", ""]
    assert [c["choices"][0]["finish_reason"] for c in streamed[:-1]] == [None, "length"]
    assert streamed[0]["choices"][0]["logprobs"] == only["choices"][0]["logprobs"]


def test_prompt_logprobs_as_vllm_gives_them(logprob_edge: Edge) -> None:
    with logprob_edge.http() as http:
        chat = http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1}).json()
        completion = http.post("/v1/completions", json={"model": "brook", "prompt": "p", "prompt_logprobs": 1}).json()
    want = [
        None,
        {"2": {"logprob": -1.0, "rank": 1, "decoded_token": " b"}},
        {"3": {"logprob": -2.0, "rank": 2, "decoded_token": "c"}, "4": {"logprob": -0.3, "rank": 1, "decoded_token": "d"}},
    ]
    assert chat["prompt_logprobs"] == want
    assert completion["choices"][0]["prompt_logprobs"] == want


def test_a_long_reply_is_made_beside_the_loop(logprob_edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its prompt's log-probabilities once for all choices."""
    threads, made = [], []
    whole, shown = CompletionVoice.whole, openai_voice.prompt_logprobs_json
    monkeypatch.setattr(CompletionVoice, "whole", lambda *given: (threads.append(threading.current_thread()), whole(*given))[1])
    monkeypatch.setattr(openai_voice, "prompt_logprobs_json", lambda positions: (made.append(1), shown(positions))[1])
    monkeypatch.setattr(replies, "LONG", 3)
    ask = {"model": "brook", "prompt": "p", "prompt_logprobs": 1, "n": 3}
    with logprob_edge.http() as http:
        beside = http.post("/v1/completions", json=ask).json()["choices"]
        monkeypatch.setattr(replies, "LONG", 1000)
        at_once = http.post("/v1/completions", json=ask).json()["choices"]
    assert [choice["prompt_logprobs"] for choice in beside] == [choice["prompt_logprobs"] for choice in at_once]
    assert beside[0]["prompt_logprobs"] == beside[2]["prompt_logprobs"] != []
    assert len(set(threads)) == 2
    assert len(made) == 2


def test_return_token_ids(logprob_edge: Edge) -> None:
    completion = {"model": "brook", "prompt": "p", "return_token_ids": True}
    with logprob_edge.http() as http:
        chat = http.post("/v1/chat/completions", json=CHAT | {"return_token_ids": True}).json()
        chat_stream = events(http.post("/v1/chat/completions", json=CHAT | {"return_token_ids": True, "stream": True}).text)
        whole = http.post("/v1/completions", json=completion).json()["choices"][0]
        stream = events(http.post("/v1/completions", json=completion | {"stream": True}).text)
    assert chat["prompt_token_ids"] == [1, 2, 3]
    assert chat["choices"][0]["token_ids"] == [10, 11]
    assert chat_stream[0]["prompt_token_ids"] == [1, 2, 3]
    assert [t for c in chat_stream[:-1] for t in c["choices"][0].get("token_ids", [])] == [10, 11]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == ([1, 2, 3], [10, 11])
    assert stream[0]["choices"][0]["prompt_token_ids"] == [1, 2, 3]
    assert [t for c in stream[:-1] for t in c["choices"][0].get("token_ids", [])] == [10, 11]


# ------------------------------------------------------------------ failures


def test_rejected_before_the_first_byte_is_an_http_error(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        return [
            Rejected(
                key=submit.key,
                status=400,
                type="invalid_request_error",
                code="context_length_exceeded",
                message="The prompt has 9 tokens, the context 8.",
                param="messages",
            )
        ]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        for stream in (True, False):
            reply = http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert reply.status_code == 400
            assert reply.json() == {
                "error": {
                    "message": "The prompt has 9 tokens, the context 8.",
                    "type": "invalid_request_error",
                    "param": "messages",
                    "code": "context_length_exceeded",
                }
            }
    assert edge.server.gateway.active == 0


def test_queue_full_carries_retry_after(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        return [Rejected(key=submit.key, status=429, type="rate_limit_error", code="queue_full", message="Full.", retry_after_s=2.4)]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")


def test_one_rejected_prompt_fails_the_request_and_cancels_the_others(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        if submit.prompt == "bad":
            return [Rejected(key=submit.key, status=400, type="invalid_request_error", code="invalid_value", message="No.", param="prompt")]
        return []

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        reply = http.post("/v1/completions", json={"model": "brook", "prompt": ["good", "bad", "fine"]})
    assert reply.status_code == 400
    submits = {s.prompt: s.key for s in edge.text.wait_for(Submit, 3)}
    assert {c.key for c in edge.text.wait_for(Cancel, 2)} == {submits["good"], submits["fine"]}


@pytest.mark.parametrize("stream", [True, False])
def test_engine_failure(make_edge: MakeEdge, stream: bool) -> None:
    def script(submit: Submit) -> list[Message]:
        row = {"key": submit.key, "tokens": [], "reason": "error", "extra": {"error": "The logits were not finite."}}
        return [delta(row), finished(submit.key)]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "The logits were not finite.",
        "type": "server_error",
        "param": None,
        "code": "engine_failure",
    }


def say_a(submit: Submit) -> list[Message]:
    return [delta({"key": submit.key, "text": "a"})]


def test_failure_in_mid_stream_is_an_event_without_done(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a))
    with edge.http() as http, http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
        key = edge.text.wait_for(Submit)[0].key
        lines = reply.iter_lines()
        seen = [next(lines) for _ in range(3)]
        edge.text.send(delta({"key": key, "tokens": [], "reason": "error", "extra": {"error": "Broken."}}))
        rest = [line for line in lines if line]
    assert '"content":"a"' in seen[2]
    assert [msgspec.json.decode(line.removeprefix("data: "))["error"]["message"] for line in rest] == ["Broken."]


def test_link_loss_in_mid_stream_then_recovery(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a))
    with edge.http() as http, http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
        lines = reply.iter_lines()
        for _ in range(3):
            next(lines)
        edge.text.drop_links()
        rest = [line for line in lines if line]
    error = msgspec.json.decode(rest[0].removeprefix("data: "))["error"]
    assert (len(rest), error["code"], error["type"]) == (1, "engine_unavailable", "server_error")
    edge.wait(lambda: edge.server.gateway.readiness()[0], "the link to come back")
    edge.text.script = lambda s: [delta({"key": s.key, "text": "b", "reason": "stop"}), finished(s.key)]
    with edge.client() as client:
        assert client.chat.completions.create(**CHAT).choices[0].message.content == "b"  # type: ignore[call-overload]
    assert edge.server.gateway.active == 0
    edge.text.wait_for(EdgeStats)


def test_a_row_that_cannot_be_delivered_fails_its_request_only(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    def script(submit: Submit) -> list[Message]:
        impossible = {"key": submit.key, "choice": 5} if submit.stream else {"key": submit.key}
        return [delta(impossible, {"key": submit.key, "text": "fine", "reason": "stop"}), finished(submit.key)]

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        assert http.post("/v1/chat/completions", json=CHAT | {"stream": True}).json()["error"]["code"] == "internal_error"
        assert http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == "fine"
    assert len(edge.text.wait_for(Cancel)) == 1
    assert "could not be delivered" in caplog.text
    assert edge.server.gateway.active == 0


@pytest.mark.parametrize("stream", [True, False])
def test_link_loss_before_the_first_byte_is_503(make_edge: MakeEdge, stream: bool) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    edge.text.script = lambda _: (edge.loop.call_soon(lambda: [link.close() for link in list(edge.text._links)]), [])[1]
    with edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "engine_unavailable"
