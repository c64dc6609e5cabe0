"""Answers to edges' questions."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from penstock.core.actors.text.careful import CarefulTokenizer
from penstock.core.protocol.columns import PIECE, i32_by_pieces
from penstock.core.protocol.messages import Drain, EngineDown, Vital, Vitals, seq_of


def body(answer: Any) -> Any:
    return json.loads(answer.body)


def test_models(bench: Any) -> None:
    answer = body(bench.query("models"))
    assert answer["object"] == "list"
    assert [m["id"] for m in answer["data"]] == ["trained", "alias"]
    assert answer["data"][0]["max_model_len"] == 4096
    assert answer["data"][0]["object"] == "model"


def test_tokenize_and_detokenize_are_inverse(bench: Any) -> None:
    answer = body(bench.query("tokenize", {"prompt": "the water 🙃", "return_token_strs": True}))
    ids = bench.tokenizer.encode_batch(["the water 🙃"], add_special_tokens=True)[0].tolist()
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == 4096
    assert answer["token_strs"][0] == bench.tokenizer.token_text(ids[0])
    assert body(bench.query("detokenize", {"tokens": ids})) == {"prompt": "the water 🙃"}
    assert body(bench.query("tokenize", {"prompt": "x"}))["token_strs"] is None


@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_long_answers_are_made_in_pieces(bench: Any, count: int) -> None:
    """Whatever falls on an edge between two."""
    text = "🙃".join("abc"[i % 3] for i in range(count // 4))
    ids = bench.tokenizer.encode_batch([text], add_special_tokens=True)[0].tolist()
    answer = body(bench.query("tokenize", {"prompt": text, "return_token_strs": True}))
    assert (answer["count"], answer["tokens"]) == (len(ids), ids)
    assert answer["token_strs"] == [bench.tokenizer.token_text(token) for token in ids]
    assert i32_by_pieces(list(range(count))).tolist() == list(range(count))
    assert i32_by_pieces([]).dtype == "int32"


def test_tokenize_messages(bench: Any) -> None:
    answer = body(bench.query("tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}))
    text = body(bench.query("detokenize", {"tokens": answer["tokens"]}))["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_wrong_questions(bench: Any) -> None:
    for what, question, status, param in (
        ("tokenize", {}, 400, "prompt"),
        ("tokenize", {"prompt": 5}, 400, None),
        ("tokenize", {"messages": [{"role": 1}]}, 400, "messages"),
        ("detokenize", {"tokens": [5, 99999]}, 400, "tokens[1]"),
        ("detokenize", {"tokens": [2**70]}, 400, "tokens[0]"),
        ("detokenize", {"tokens": [1, 2, -1]}, 400, "tokens[2]"),
        ("detokenize", {}, 400, None),
        ("weather", {}, 404, None),
    ):
        answer = bench.query(what, question)
        assert answer.status == status
        failure = body(answer)
        assert failure["type"] == "invalid_request_error"
        assert failure["message"]
        assert failure["code"]
        assert failure["param"] == param, what


def test_tokenizer_info(bench: Any) -> None:
    info = body(bench.query("tokenizer_info"))
    assert info["vocab_size"] == bench.tokenizer.vocab_size
    assert "<|eos|>" in info["special_tokens"]
    assert info["chat_template"]
    assert info["tokenizer_class"]


@pytest.mark.parametrize("info", [lambda: {"a": object()}, lambda: 1 / 0, lambda: [].append], ids=["no JSON", "raises", "no dictionary"])
def test_a_tokenizer_that_cannot_say_what_it_is_fails_that_question_alone(make_bench: Any, tokenizer: Any, info: Any) -> None:
    class Odd:
        def __getattr__(self, name: str) -> Any:
            return info if name == "info" else getattr(tokenizer, name)

    bench = make_bench(with_tokenizer=CarefulTokenizer(Odd()))  # type: ignore[arg-type]
    answer = bench.query("tokenizer_info")
    assert (answer.status, body(answer)["type"]) == (500, "server_error")
    assert bench.query("server_info").status == 200


def test_server_info(bench: Any) -> None:
    info = body(bench.query("server_info"))
    assert info["model"] == "trained"
    assert info["fingerprint"] == "fp_1"
    assert info["engine"]["max_model_len"] == 4096


def test_questions_are_answered_before_an_engine_is_there(make_bench: Any) -> None:
    bench = make_bench(up=False)
    assert body(bench.query("tokenize", {"prompt": "x"}))["max_model_len"] is None
    assert body(bench.query("models"))["data"][0]["max_model_len"] is None
    assert body(bench.query("server_info"))["fingerprint"] == ""


def test_health_tells_idle_busy_and_stalled_apart(make_bench: Any) -> None:
    bench = make_bench(up=False)
    answer = bench.query("health")
    assert (answer.status, body(answer)["status"], body(answer)["ready"]) == (503, "starting", False)
    bench.up()
    bench.clock.advance(3600)
    answer = bench.query("health")
    assert (answer.status, body(answer)["status"]) == (200, "idle")
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = [5, 6, 7]
    assert body(bench.query("health"))["status"] == "busy", "an hour of idleness is no stall"
    bench.clock.advance(59)
    assert bench.query("health").status == 200
    bench.clock.advance(2)
    answer = bench.query("health")
    assert (answer.status, body(answer)["status"]) == (503, "stalled")
    assert body(answer)["quiet_s"] >= 60
    assert body(answer)["ready"] is True
    bench.step()
    answer = body(bench.query("health"))
    assert answer["status"] == "busy"
    assert answer["token_age_s"] < 1
    bench.send(Drain(deadline_s=100))
    assert body(bench.query("health"))["status"] == "draining"
    bench.send(EngineDown(engine=0, epoch=1))
    answer = bench.query("health")
    assert (answer.status, body(answer)["status"]) == (503, "engine_down")
    bench.send(Vitals(rows=[Vital("engine", 0, False, 1.0, 5, 0, 0.0)]))
    assert body(bench.query("health"))["processes"] == [{"role": "engine", "id": 0, "up": False, "age_s": 1.0, "stalled_s": 0.0}]


def test_parked_requests_are_no_stall(bench: Any) -> None:
    from penstock.core.protocol.messages import Park

    bench.submit(1)
    bench.send(Park(key=1))
    bench.clock.advance(1000)
    assert body(bench.query("health"))["status"] == "busy"


def test_answers_go_back_to_who_asked(bench: Any) -> None:
    bench.query("models", edge=6)
    assert bench.out[-1][0] == 6
    assert msgspec.json.decode(bench.out[-1][1].body)


def test_a_count_that_is_for_a_request_refuses_what_the_request_would(make_bench: Any) -> None:
    """The tokenizer knows a token for which the model has no row: /tokenize tells it, who counts for a request hears what the request would."""
    bench = make_bench(up=False)
    last = bench.tokenizer.vocab_size - 1
    bench.up(vocab_size=last)
    text = bench.tokenizer.token_text(last)
    assert body(bench.query("tokenize", {"prompt": text}))["tokens"] == [last]
    answer = bench.query("tokenize", {"prompt": text, "model_has": "input"})
    assert (answer.status, body(answer)["param"]) == (400, "input")
    assert str(last) in body(answer)["message"]
    assert body(bench.query("tokenize", {"prompt": "the water", "model_has": "input"}))["count"] > 0


def test_tokenizer_info_names_the_end_tokens_that_the_model_can_draw(make_bench: Any, tokenizer: Any) -> None:
    bench = make_bench(up=False)
    ends = tokenizer.info()["eos_token_ids"]
    assert len(ends) > 1
    bench.up(vocab_size=max(ends))
    assert body(bench.query("tokenizer_info"))["eos_token_ids"] == [token for token in ends if token < max(ends)]
