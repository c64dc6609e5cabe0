"""What a stream says of its prompt: in pieces that make the whole, made once, and not before the client takes them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.protocol import config as configuration
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Cancel, Message, Submit, TokenLogprobs
from penstock.transports import echo
from penstock.transports.logprobs import completion_logprobs
from penstock.transports.openai_voice import CompletionVoice
from penstock.transports.outbox import Outbox

TOKENS, TOP = 1500, 20


def position(at: int) -> TokenLogprobs:
    texts = [f"w{at} ", *(f"<{at}:{k}>" for k in range(TOP))]
    return TokenLogprobs(
        ids=list(range(TOP + 1)), logprobs=[-0.25 * k for k in range(TOP + 1)], ranks=[1, *range(1, TOP + 1)], texts=texts,
        bytes_=[text.encode() for text in texts],
    )  # fmt: skip


POSITIONS = [None, *(position(at) for at in range(1, TOKENS))]
WORDS = ["w0 ", *(p.texts[0] for p in POSITIONS if p is not None)]
OFFSETS = [sum(map(len, WORDS[:at])) for at in range(TOKENS)]


def script(submit: Submit) -> list[Message]:
    prompt: dict[str, Any] = {"prompt_token_ids": i32(range(TOKENS)), "prompt_text": "".join(WORDS)}
    if submit.sampling.prompt_logprobs is not None:
        prompt |= {"prompt_logprobs": POSITIONS, "prompt_offsets": OFFSETS, "prompt_first": b"w0 "}
    answer = {} if submit.sampling.logprobs is None else {"logprobs": [position(7)]}
    choices = range(submit.sampling.n)
    first = [{"key": submit.key, "choice": c, "text": f"A{c}", "extra": answer | (prompt if c == 0 else {})} for c in choices]
    last = [{"key": submit.key, "choice": c, "tokens": [], "reason": "length"} for c in choices]
    return [delta(*first), delta(*last), finished(submit.key)]


BODY = {"model": "brook", "prompt": "p", "max_tokens": 1, "echo": True}


@pytest.mark.parametrize(("logprobs", "n"), [(TOP, 4), (0, 2), (None, 3)])
@pytest.mark.parametrize("ids", [False, True])
def test_streams_of_long_echoes_are_the_whole_and_are_not_cut(make_edge: MakeEdge, logprobs: int | None, n: int, ids: bool) -> None:
    """With bounds that one choice's echo alone exceeds."""
    edge = make_edge(text=lambda t: setattr(t, "script", script), stream_park_bytes=32 << 10, stream_max_bytes=64 << 10)
    body = BODY | {"n": n, "logprobs": logprobs, "return_token_ids": ids}
    with edge.http() as http:
        whole = http.post("/v1/completions", json=body).json()["choices"]
        reply = http.post("/v1/completions", json=body | {"stream": True})
    chunks = events(reply.text)
    assert chunks[-1] == "[DONE]"
    for index, choice in enumerate(whole):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "length"
        if logprobs is not None:
            told = [c["logprobs"] for c in mine if c["logprobs"]]
            for name, values in choice["logprobs"].items():
                assert [value for part in told for value in part[name]] == values
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == ([list(range(TOKENS))] if ids else [])
    assert max(map(len, reply.text.split("\n\n"))) < 160_000
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = completion_logprobs

    def counting(positions: Any, *rest: Any) -> Any:
        made.append(len(positions))
        return real(positions, *rest)

    monkeypatch.setattr(echo, "completion_logprobs", counting)
    return made


def test_an_echo_is_made_once_for_all_choices(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.http() as http:
        http.post("/v1/completions", json=BODY | {"n": 5, "logprobs": TOP, "stream": True})
    assert sum(made) == TOKENS
    assert max(made) * (TOP + 1) < echo.PIECE_LOGPROBS + 2 * (TOP + 1)


def test_pieces_are_not_made_before_the_client_takes_them(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    edge = make_edge(text=lambda t: setattr(t, "script", script), stream_max_bytes=256 << 10)
    monkeypatch.setattr(echo, "PIECE_LOGPROBS", 1)  # a position a piece: more of them than the sockets between take
    body = msgspec.json.encode(BODY | {"n": 2, "logprobs": TOP, "stream": True})
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", edge.port))
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        assert sock.recv(1024)
        outboxes = [sink._job.outbox for sink in edge.server.gateway.door()._sinks.values()]  # type: ignore[attr-defined]
        assert all(box.unsent < 64 << 10 for box in outboxes)
        data = bytearray()
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(1 << 20)
    assert b"[DONE]" in data
    assert sum(made) == TOKENS
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]


def test_a_mistake_in_a_piece_ends_its_stream_alone(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", script))
    before = CompletionVoice._before

    def failing(self: CompletionVoice, *given: Any) -> Iterator[bytes]:
        made = before(self, *given)
        yield next(made)
        raise ValueError("no ink")

    with edge.http() as http:
        monkeypatch.setattr(CompletionVoice, "_before", failing)
        broken = http.post("/v1/completions", json=BODY | {"logprobs": TOP, "stream": True}).text
        monkeypatch.setattr(CompletionVoice, "_before", before)
        fine = http.post("/v1/completions", json=BODY | {"logprobs": TOP, "stream": True}).text
    assert "[DONE]" not in broken
    assert "A0" not in broken, "nothing follows a hole"
    assert events(fine)[-1] == "[DONE]"
    edge.wait(lambda: edge.server.gateway.active == 0, "the places to be given back")


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(1, 4)), min_size=1, max_size=30), st.integers(1, 9), st.booleans())
def test_pieces_make_the_whole(tokens: list[tuple[str, int]], most: int, offsets_known: bool) -> None:
    text = "".join(word for word, _ in tokens)
    offsets = [sum(len(word) for word, _ in tokens[:at]) for at in range(len(tokens))] if offsets_known else []
    positions: list[TokenLogprobs | None] = [
        TokenLogprobs(ids=list(range(k)), logprobs=[-1.0] * k, ranks=[1] * k, texts=[word, *"abc"][:k], bytes_=[b""] * k)
        for word, k in tokens
    ]
    positions[0] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo, "PIECE_LOGPROBS", most)
        patch.setattr(echo, "PIECE_CHARS", most)
        pieces = [msgspec.json.decode(b"{" + made) for made in echo.echo_pieces(text, positions, offsets, as_ids=False)]
        plain = [msgspec.json.decode(b"{" + made) for made in echo.echo_pieces(text, None, (), as_ids=False)]
    assert "".join(piece["text"] for piece in pieces) == "".join(piece["text"] for piece in plain) == text
    whole = completion_logprobs(positions, False, offsets)
    assert {name: [value for piece in pieces for value in piece["logprobs"][name]] for name in whole} == whole
    assert all(len(piece["text"]) <= most for piece in plain)


def test_text_hears_which_prompts_one_reply_answers(shared_edge: Edge) -> None:
    seen = len([m for m in shared_edge.text.received if isinstance(m, Submit)])
    with shared_edge.http() as http:
        http.post("/v1/completions", json={"model": "brook", "prompt": ["a", "b", "c"], "max_tokens": 1})
        http.post("/v1/completions", json={"model": "brook", "prompt": "d", "max_tokens": 1, "best_of": 3, "logprobs": 1, "echo": True})
    several, alone = (found := [m for m in shared_edge.text.received if isinstance(m, Submit)][seen:])[:3], found[3]
    assert [m.group for m in several] == [several[0].key] * 3
    assert [m.tells for m in found] == [-1, -1, -1, 1]
    assert alone.group == 0


def test_an_outbox_keeps_the_order_and_counts_only_what_was_pushed() -> None:
    async def run() -> None:
        cuts: list[str] = []
        config = configuration.build({"stream_park_bytes": 10, "stream_max_bytes": 20})
        box = Outbox(config, lambda: None, lambda: None, lambda _: cuts.append("cut"), keep_alive=b"")
        made = [iter([b"2" * 50, b"3" * 50]), iter([b"5" * 50])]
        box.push(b"1")
        box.push_later(made[0])
        box.push(b"4")
        box.push_later(made[1])
        box.push(b"6")
        box.close()
        out = b""
        while not box.last:
            later = box.later
            if later is None:
                data = box.take()
                box.sent(len(data))
            else:
                data = next(later, b"")
                if not data:
                    box.no_more(later)
            out += data
        assert out == b"1" + b"2" * 50 + b"3" * 50 + b"4" + b"5" * 50 + b"6"
        assert (box.unsent, cuts) == (0, [])

    asyncio.run(run())


def test_a_reader_who_takes_no_piece_is_cut_in_time_and_one_who_does_is_not() -> None:
    async def run() -> None:
        cuts: list[str] = []
        box = Outbox(configuration.build({}), lambda: None, lambda: None, lambda _: cuts.append("cut"), keep_alive=b"alive")
        box.push_later(iter([b"a", b"b"]))
        box.close()
        begun = box.moved
        box.tick(begun + 9, 1, 10)
        assert cuts == []
        assert box.later is not None, "no sign of life comes between"
        box.sent(0)
        box.tick(box.moved + 9, 1, 10)
        assert cuts == []
        box.tick(box.moved + 11, 1, 10)
        assert cuts == ["cut"]

    asyncio.run(run())
