"""Admission: the limits, and what a refused client is told."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.actors.text.admission import MAX_TEMPLATES, MAX_TEMPLATES_EACH, Admission
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import QueueFull
from penstock.core.protocol.messages import Cancel, seq_of

S = 1_000_000_000


def test_a_refusal_knows_its_reason_whatever_its_words() -> None:
    full = Admission(max_requests=0, max_tokens=0)
    full.tokens = 1
    for check, reason in ((lambda: full.check_request(S), "queue_requests"), (lambda: full.check_tokens(5, S), "queue_tokens")):
        with pytest.raises(QueueFull) as raised:
            check()
        assert raised.value.reason == reason


def test_requests_wait_only_up_to_the_limit(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_reqs=2))
    for key in (1, 2, 3):
        bench.submit(key)
    refused = bench.rejected[3]
    assert (refused.status, refused.type, refused.code, refused.param) == (429, "rate_limit_error", "queue_full", None)
    assert refused.retry_after_s >= 1
    assert "--max-num-queued-reqs 2" in refused.message
    for key in (1, 2):
        bench.scripts[seq_of(key, 0)] = [5, 6, 7]
    bench.step()  # both have started: they wait no more
    bench.submit(4)
    assert 4 not in bench.rejected
    assert bench.actor.metrics.value("admission_rejections", "queue_requests") == 1


def test_those_with_the_worker_count_too(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_reqs=1))
    bench.hold_encodes = True
    bench.submit(1)
    bench.submit(2)
    assert 2 in bench.rejected
    bench.send(Cancel(key=1))
    bench.submit(3)
    assert 3 not in bench.rejected


def test_prompt_tokens_wait_only_up_to_the_limit(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_tokens=100))
    bench.submit(1, prompt_ids=i32([1] * 300))  # alone it fits whatever its length
    bench.submit(2, prompt_ids=i32([1] * 2))
    assert 1 not in bench.rejected
    refused = bench.rejected[2]
    assert refused.code == "queue_full"
    assert "--max-num-queued-tokens 100" in refused.message
    bench.send(Cancel(key=1))
    for key in (3, 4):
        bench.submit(key, prompt_ids=i32([1] * 50))
        assert key not in bench.rejected
    bench.submit(5, prompt_ids=i32([1]))
    assert 5 in bench.rejected
    assert bench.actor.admission.tokens == 100
    assert bench.actor.metrics.value("admission_rejections", "queue_tokens") == 2


def test_the_operator_may_prefer_503(make_bench: Any) -> None:
    bench = make_bench(Config(max_num_queued_reqs=1, queue_full_status=503))
    bench.submit(1)
    bench.submit(2)
    assert (bench.rejected[2].status, bench.rejected[2].type) == (503, "server_error")
    assert QueueFull.status == 429


def test_retry_after_follows_the_drain_rate() -> None:
    admission = Admission(max_requests=40, max_tokens=10**6)
    for _ in range(40):
        admission.enter()
        admission.measured(10)
    with pytest.raises(QueueFull) as unknown:
        admission.check_request(0)
    assert unknown.value.retry_after_s == 5
    now = 0
    for _ in range(600):  # two a second for five minutes
        now += S // 2
        admission.start(10, now)
        admission.enter()
        admission.measured(10)
    assert admission.rate(now)[0] == pytest.approx(2, rel=0.05)
    assert admission.rate(now)[1] == pytest.approx(20, rel=0.05)
    with pytest.raises(QueueFull) as known:
        admission.check_request(now)
    assert 9 <= known.value.retry_after_s <= 12  # half of 40 at 2/s
    with pytest.raises(QueueFull) as stuck:
        admission.check_request(now + 3600 * S)
    assert stuck.value.retry_after_s <= 120


def test_templates_of_requests_wait_only_up_to_the_limit(make_bench: Any) -> None:
    """Of one owner, and of all; owners are tenants, or addresses where there are none."""
    bench = make_bench(Config(trust_request_chat_template=True))
    bench.hold_encodes = True
    messages = b'[{"role":"user","content":"a"}]'
    asked: dict[str, Any] = {"kind": "chat", "prompt": None, "messages": messages, "chat_template": "{{ messages[0].content }}"}
    key = 0

    def ask(**owner: str) -> Any:
        nonlocal key
        key += 1
        bench.submit(key, **asked, **owner)
        return bench.rejected.get(key)

    for _ in range(MAX_TEMPLATES_EACH):
        assert ask(tenant="a") is None
    refused = ask(tenant="a", peer="10.0.0.1")
    assert (refused.status, refused.type, refused.code) == (429, "rate_limit_error", "queue_full")
    assert refused.retry_after_s >= 1
    assert "chat_template" in refused.message
    for _ in range(MAX_TEMPLATES - MAX_TEMPLATES_EACH):
        assert ask(peer="10.0.0.1") is None
    assert ask(peer="10.0.0.1") is not None
    assert ask(peer="10.0.0.2") is not None
    bench.submit(key := key + 1, prompt_ids=i32([1]))
    assert key not in bench.rejected, "without a template of its own it waits for nothing of that"
    assert {encode.owner for encode in bench.held if encode.chat_template} == {"a", "10.0.0.1"}
    bench.send(Cancel(key=1))
    assert ask(tenant="a") is not None, "the worker still has it"
    bench.release()
    assert ask(tenant="a") is None
    assert ask(peer="10.0.0.2") is None
