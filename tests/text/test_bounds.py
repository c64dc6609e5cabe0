"""What is too large is refused before anybody works on it; what is long but legal is overtaken by what is short."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.actors.text import bounds
from penstock.core.actors.text.bounds import ALL_FIELDS, FIELDS, check_body, check_chars, check_fields, check_raw, items, limits_of
from penstock.core.actors.text.worker import LONG, TokenizerWorker
from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import ContextLengthExceeded, InvalidRequest, PenstockError, RequestTooLarge
from penstock.core.protocol.messages import Encode, Encoded, Limits

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='a,{}[]"\\:\n é', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a,{"\\', max_size=4), inner, max_size=4),
    max_leaves=30,
)


def count(value: Any) -> int:
    """Values (and pairs) in a piece of JSON."""
    if isinstance(value, dict):
        return 1 + sum(count(inner) for inner in value.values())
    if isinstance(value, list):
        return 1 + sum(count(inner) for inner in value)
    return 1


@given(json_values, st.integers(1, 40))
def test_items_is_a_bound_and_close_where_it_matters(value: Any, most: int) -> None:
    for ascii_only in (True, False):
        raw = json.dumps(value, ensure_ascii=ascii_only).encode()
        found = items(raw, most)
        truth = count(value)
        if truth > most:
            assert found > most, "never too few"
        if found > most:  # then strings were looked through: what is in them does not count
            bare = json.dumps(value, ensure_ascii=ascii_only)
            for text in sorted(_texts(value), key=len, reverse=True):
                bare = bare.replace(json.dumps(text, ensure_ascii=ascii_only), "")
            assert found <= 2 * truth + 1


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *_texts(inner))]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def test_limits_follow_the_context() -> None:
    small = limits_of(4096, 20, None)
    assert (small.max_chars, small.context_chars, small.max_ids) == (1 << 20, 81920, 262144)
    large = limits_of(1 << 20, 128, None)
    assert (large.max_chars, large.max_ids) == (16 << 20, 4 << 20)
    assert limits_of(4096, 0, 1000).max_chars == 1000
    assert limits_of(4096, 0, 1000).max_ids == 4096, "what fits the context may always come as ids"


def test_texts_by_length() -> None:
    limits = Limits(max_model_len=10, max_chars=100, context_chars=50, max_ids=25)
    check_chars(50, limits, "prompt", whole=True)
    check_chars(100, limits, "prompt", whole=False)
    with pytest.raises(ContextLengthExceeded, match=r"51 characters.*10 tokens.*50 characters"):
        check_chars(51, limits, "prompt", whole=True)
    with pytest.raises(RequestTooLarge, match=r"101 characters.*at most 100") as caught:
        check_chars(101, limits, "prompt[1]", whole=False)
    assert caught.value.param == "prompt[1]"


LIMITS = limits_of(4096, 20, None)
KNOWN = ("prompt", "messages", "stop", "logit_bias", "tools", "allowed_token_ids")
TEXTS = {"prompt": 128, "messages": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [list(range(10)) * 130_000, [1]]),
        ("prompt", [[1, 2]] * 1_300_000),
        ("prompt", ["a"] * 250_000),
        ("messages", [{"role": "user", "content": "a"}] * 90_000),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 90_000}]),
        ("messages", [{"role": "user", "content": "a" * (15 << 20)}]),
        ("messages", [{"role": "user", "content": "a", "x": [[]] * 400_000}]),
        ("stop", ["a"] * 250_000),
        ("logit_bias", {str(token): 1 for token in range(250_000)}),
        ("tools", [{"description": "x" * (3 << 20)}]),
        ("allowed_token_ids", [1] * 1_000_000),
    ],
)
def test_what_would_cost_is_refused_by_name(field: str, value: Any) -> None:
    raw = msgspec.json.encode(value)
    with pytest.raises(RequestTooLarge) as caught:
        check_raw({field: raw}, LIMITS, known=KNOWN, texts=TEXTS)
    assert caught.value.param == field
    assert any(char.isdigit() for char in caught.value.message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "a{,[" * 1_000_000),
        ("prompt", ['{"a": [1, 2]}' * 5000] * 10),
        ("prompt", list(range(4096))),
        ("prompt", [[1] * 4000] * 100),
        ("messages", [{"role": "user", "content": '{"a": [1, 2, "x"]},' * 50_000}]),
        ("messages", [{"role": "user", "content": "é" * 1_000_000}]),
        ("messages", [{"role": "user", "content": "a"}] * 8192),
        ("unknown", [1] * 3_000_000),
        ("allowed_token_ids", list(range(150_000))),
    ],
)
def test_what_is_long_and_legal_is_not(field: str, value: Any) -> None:
    check_raw({field: msgspec.json.encode(value)}, LIMITS, known=KNOWN, texts=TEXTS)


@pytest.mark.parametrize("count", [LIMITS.max_ids + 1, 1_200_000, 5_000_000])
def test_one_list_of_ids_has_one_limit(bench: Any, count: int) -> None:
    """Whoever finds that it is too long, an edge or text."""
    most = LIMITS.max_ids
    raw = msgspec.json.encode([4] * count)
    for field, more in (("tokens", {}), ("prompt", {"truncate_prompt_tokens": b"8"})):
        with pytest.raises(RequestTooLarge, match=rf"{field} has {count} token ids; this server takes at most {most}\."):
            check_raw({field: raw, **more}, LIMITS, known=("tokens", "prompt"), texts={"tokens": 1, "prompt": 128})
    answer = bench.query("detokenize", {"tokens": [4] * count})
    assert f"at most {most}." in json.loads(answer.body)["message"]
    bench.submit(1, prompt_ids=i32([4] * count), truncate_prompt_tokens=8)
    assert f"at most {most}." in bench.rejected[1].message
    said = rf"maximum context length is 4096 tokens\. However, your prompt resulted in {count} tokens"
    bench.submit(2, prompt_ids=i32([4] * count))
    assert re.search(said, bench.rejected[2].message)
    if count > 1 << 20:  # an edge does not look for less
        with pytest.raises(ContextLengthExceeded, match=said):
            check_raw({"prompt": raw, "truncate_prompt_tokens": b"null"}, LIMITS, known=("prompt",), texts={"prompt": 128})
    with pytest.raises(RequestTooLarge, match=r"prompt has .* token ids"):
        check_raw({"prompt": msgspec.json.encode([[4] * 100] * 50_000)}, LIMITS, known=("prompt",), texts={"prompt": 128})


def test_fields_are_counted_before_any_is_looked_at() -> None:
    check_fields(FIELDS)
    with pytest.raises(RequestTooLarge, match=r"257 fields.*at most 256"):
        check_fields(FIELDS + 1)
    within = {"a": {f"z{i}": 1 for i in range(ALL_FIELDS - 1)}}
    check_body(msgspec.json.encode(within))
    with pytest.raises(RequestTooLarge, match=r"10000\d fields.*at most 100000"):
        check_body(json.dumps({"a": {f"z{i}": 1 for i in range(ALL_FIELDS)}}).encode())


@pytest.mark.parametrize("body", [{"prompt": "a:" * 1_000_000}, {"prompt": list(range(1_000_000))}, {"prompt": ['"b\\":'] * 50_000}])
def test_what_looks_like_fields_within_texts_is_none(body: Any) -> None:
    check_body(msgspec.json.encode(body))


def test_the_actor_refuses_before_the_tokenizer_is_asked(bench: Any) -> None:
    longest = bench.tokenizer.max_chars_per_token
    for key, changes in enumerate(
        [
            {"text": "a" * (4096 * longest + 1)},
            {"prompt_ids": i32([4] * 5000)},
            {"text": "a" * ((1 << 20) + 1), "truncate_prompt_tokens": 8},
            {"prompt_ids": i32([4] * 300_000), "truncate_prompt_tokens": 8},
        ],
        1,
    ):
        out = bench.submit(key, **changes)
        assert not any(isinstance(m, Encode) for m in out)
    assert [(bench.rejected[key].status, bench.rejected[key].code) for key in (1, 2, 3, 4)] == [
        (400, "context_length_exceeded"),
        (400, "context_length_exceeded"),
        (413, "request_too_large"),
        (413, "request_too_large"),
    ]


def test_questions_are_bounded_too(bench: Any) -> None:
    answer = bench.query("tokenize", {"prompt": "a" * ((1 << 20) + 1)})
    assert answer.status == 413
    assert json.loads(answer.body)["param"] == "prompt"
    assert bench.query("tokenize", {"prompt": "a " * 100_000}).status == 200, "a text longer than the context may be counted"
    answer = bench.query("detokenize", {"tokens": [4] * (LIMITS.max_ids + 1)})
    assert (answer.status, json.loads(answer.body)["param"]) == (413, "tokens")
    assert bench.query("detokenize", {"tokens": [4] * 10_000}).status == 200


def test_only_so_many_questions_wait_at_a_time(bench: Any) -> None:
    from penstock.core.actors.text.intake import MAX_QUERIES
    from penstock.core.protocol.messages import Query

    bench.hold_encodes = True
    for number in range(MAX_QUERIES + 1):
        bench.send(Query(id=number, edge=0, what="tokenize", body=b'{"prompt":"x"}'))
    assert list(bench.answers) == [MAX_QUERIES]
    assert bench.answers[MAX_QUERIES].status == 429
    bench.release()
    assert all(bench.answers[number].status == 200 for number in range(MAX_QUERIES))
    bench.hold_encodes = False
    assert bench.query("detokenize", {"tokens": [4]}).status == 200


class Gate:
    """A tokenizer that stands at long texts until it is let through."""

    bos_id = None

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        if any(len(text) >= LONG for text in texts):
            self.entered.set()
            assert self.open.wait(20)
        return [i32([len(text)]) for text in texts]


def test_a_short_job_overtakes_long_ones() -> None:
    gate = Gate()
    done: list[int] = []
    arrived = threading.Semaphore(0)

    def deliver(encoded: Encoded) -> None:
        done.append(encoded.job)
        arrived.release()

    worker = TokenizerWorker(gate, None, deliver)  # type: ignore[arg-type]
    try:
        for job in (1, 2):
            worker.submit(Encode(job=job, kind="completion", prompt="x" * LONG))
        assert gate.entered.wait(20)
        for job in (3, 4):
            worker.submit(Encode(job=job, kind="completion", prompt="short"))
        for _ in range(2):
            assert arrived.acquire(timeout=20)
        assert sorted(done) == [3, 4]
        gate.open.set()
        for _ in range(2):
            assert arrived.acquire(timeout=20)
        assert done[2:] == [1, 2]
    finally:
        gate.open.set()
        worker.close()


def test_the_largest_json_of_a_text_is_what_escapes_make_of_it() -> None:
    worst = max(len(json.dumps(char)) - 2 for char in ("a", '"', "\\", "é", "\n", "\x00", "\U0001f642"))
    assert worst == bounds.ESCAPED


def test_errors_are_the_clients() -> None:
    for error in (RequestTooLarge("x"), ContextLengthExceeded("x"), InvalidRequest("x")):
        assert isinstance(error, PenstockError)
        assert 400 <= error.status < 500
