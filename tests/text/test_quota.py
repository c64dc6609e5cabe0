"""Tenants' limits in text: counted in whole numbers on a clock that tests move, whichever edge a request comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.actors.text.quota import MINUTE, Account, Bucket, Charge, Moment, _period_left_s
from penstock.core.actors.text.tenants import REVOKED
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import Message, Spending, Spent, Tables
from penstock.core.protocol.errors import RateLimited
from penstock.core.protocol.messages import LENGTH, RUNNING, Abort, Admit, Cancel, Counted, PeerDown, Rejected, TextReady, Tick, seq_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.standing import Standing, Window
from penstock.core.protocol.tenants import PICO, Price, SloClass, Tenant, TenantTable

S = 10**9


FAST = SloClass(ttft_ms=15, itl_ms=10)


def tables(generation: int = 1, *, spent: list[Spent] | None = None, prices: dict[str, Price] | None = None, **tenants: Tenant) -> Tables:
    """Each tenant has the key whose mark is its name."""
    table = TenantTable(tenants=tenants, marks={name: name for name in tenants}, prices=prices or {}, classes={"fast": FAST})
    return Tables(generation=generation, body=msgspec.msgpack.encode(table), spent=spent or [])


@pytest.fixture
def limited(make_bench: Any) -> Callable[..., Any]:
    """A text with these tenants, an engine, and a way to submit for one of them: `ask(bench, key, tenant="acme", ...)`."""

    def make(spent: list[Spent] | None = None, prices: dict[str, Price] | None = None, **tenants: Tenant) -> Any:
        bench = make_bench(Config(tables="tables.toml"))
        bench.send(tables(spent=spent, prices=prices, **tenants))
        return bench

    return make


def ask(bench: Any, key: int, tenant: str = "acme", *, tokens: int = 10, most: int = 0, n: int = 1, **changes: Any) -> list[Message]:
    """A prompt of so many tokens, whose answer may have `most` (0: nothing is said)."""
    sampling = SamplingParams(n=n, max_tokens=most) if most else SamplingParams(n=n)
    values = {"tenant": tenant, "key_mark": tenant, "tables": 1, "explicit": ["max_tokens"] if most else [], **changes}
    found: list[Message] = bench.submit(key, prompt_ids=i32([7] * tokens), sampling=sampling, **values)
    return found


def answer(bench: Any, key: int, tokens: int) -> None:
    """So many come, and it is over."""
    bench.scripts[seq_of(key, 0)] = [9] * tokens
    while key not in bench.finished:
        bench.step(lambda seq: seq == seq_of(key, 0))


def standing(found: list[Message]) -> Standing:
    [counted] = [message for message in found if isinstance(message, Counted)]
    return counted.standing


# ------------------------------------------------------------------ the bucket


def test_a_bucket_is_full_at_first_and_fills_steadily() -> None:
    bucket = Bucket(60, now_ns=5)
    for _ in range(60):
        assert bucket.wait_s(1) == 0
        bucket.take(1)
    assert bucket.wait_s(1) == 1.0
    assert bucket.window() == Window(limit=60, remaining=0, reset_s=60.0)
    bucket.fill(5 + S - 1)
    assert bucket.wait_s(1) == 1e-9
    bucket.fill(5 + S)
    assert bucket.wait_s(1) == 0
    bucket.fill(5 + 200 * S)
    assert bucket.window() == Window(limit=60, remaining=60, reset_s=0.0)


def test_a_debt_is_paid_before_anything_is_left() -> None:
    bucket = Bucket(100, now_ns=0)
    bucket.take(100)
    bucket.give(-50)
    assert bucket.window() == Window(limit=100, remaining=0, reset_s=90.0)
    bucket.fill(30 * S)
    assert bucket.wait_s(1) == 0.6


def test_another_size_keeps_how_full_it_is() -> None:
    bucket = Bucket(100, now_ns=0)
    bucket.take(75)
    bucket.resize(1000)
    assert bucket.window().remaining == 250
    bucket.resize(4)
    assert bucket.window().remaining == 1


@given(st.integers(1, 10**6), st.lists(st.tuples(st.integers(0, 3 * MINUTE), st.integers(1, 50)), max_size=60))
def test_no_window_of_any_length_gives_more_than_a_bucketful_and_what_flows_in(per_minute: int, asked: list[tuple[int, int]]) -> None:
    bucket, now, taken = Bucket(per_minute, 0), 0, []
    for wait, count in asked:
        now += wait
        bucket.fill(now)
        count = min(count, per_minute)
        if bucket.wait_s(count) == 0:
            bucket.take(count)
            taken.append((now, count))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            total = sum(count for _, count in taken[first : last + 1])
            assert total * MINUTE <= per_minute * (MINUTE + taken[last][0] - taken[first][0])


@pytest.mark.parametrize(
    ("kind", "wall_s", "left"),
    [
        ("day", 0, 86_400.0),
        ("day", 86_399, 1.0),
        ("month", 0, 31 * 86_400.0),
        ("month", 951_782_400, 86_400.0),  # 29 February 2000
        ("month", 946_684_799, 1.0),  # the last second of 1999
        ("total", 0, None),
    ],
)
def test_when_a_budget_begins_anew(kind: str, wall_s: int, left: float | None) -> None:
    assert _period_left_s(kind, wall_s * S) == left


PRICE = Price(input=3, output=7, cached=1)
STEPS = st.tuples(st.sampled_from(["in", "measure", "refuse", "end", "wait", "resize"]), st.integers(0, 10**6), st.integers(0, 300))


@given(st.lists(STEPS, max_size=80))
def test_whatever_happens_everything_held_comes_back_and_all_that_was_used_is_counted(steps: list[tuple[str, int, int]]) -> None:
    account, at = Account("acme"), Moment(0, 0)
    limits = Tenant(
        requests_per_minute=20, tokens_per_minute=2000, concurrency=4, budget_tokens=10**9, budget_pusd=10**15, budget_period="total"
    )
    account.take(limits, at)
    inside: list[tuple[Charge, int]] = []
    spent = [0, 0]

    def end(charge: Charge, prompt: int, output: int, refused: bool) -> None:
        cached = prompt // 2
        account.settle(charge, refused=refused, prompt=prompt, cached=cached, output=output, at=at)
        if not refused:
            spent[0] += prompt + output
            spent[1] += (prompt - cached) * 3 + cached + output * 7

    for group, (what, pick, size) in enumerate(steps):
        if what == "in":
            try:
                account.check(group, first=True, at=at)
            except RateLimited:
                continue
            inside.append((account.enter(group, PRICE, first=True), 0))
        elif what == "wait":
            at = Moment(at.now_ns + pick * 10**5, at.wall_ns)
        elif what == "resize":
            account.take(msgspec.structs.replace(limits, tokens_per_minute=pick % 5 * 1000, requests_per_minute=pick % 3 * 20), at)
        elif inside:
            charge, prompt = inside.pop(pick % len(inside))
            if what == "measure" and not prompt:
                try:
                    account.measure(charge, size + 1, size, at)
                except RateLimited:
                    end(charge, 0, 0, refused=True)
                else:
                    inside.append((charge, size + 1))
            else:
                end(charge, prompt, size if prompt else 0, refused=what == "refuse")
        assert account.running == len(inside) <= 4
    for charge, prompt in inside:
        end(charge, prompt, 5, refused=False)
    assert account.running == account._held_tokens == account._held_pusd == 0
    assert [account.spent().tokens, account.spent().pusd] == spent
    account.take(limits, at)
    account.check(0, first=False, at=Moment(at.now_ns + 10**6 * MINUTE, 0))
    found = account.standing()
    assert found is not None
    assert found.requests == Window(limit=20, remaining=20, reset_s=0.0)
    assert found.tokens == Window(limit=2000, remaining=2000, reset_s=0.0)


# ------------------------------------------------------------------ requests a minute


def test_two_edges_share_one_count_of_requests(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=3), other=Tenant(requests_per_minute=3))
    for key in range(1, 6):
        ask(bench, key, edge=key % 2)
    assert [bench.rejected.keys(), [m.key for m in bench.engine]] == [{4, 5}, [1, 2, 3]]
    refused = bench.rejected[4]
    assert (refused.status, refused.type, refused.code, refused.retry_after_s) == (429, "requests", "rate_limit_exceeded", 20.0)
    assert "3 requests a minute (requests_per_minute)" in refused.message
    assert refused.standing == Standing(requests=Window(limit=3, remaining=0, reset_s=60.0))
    bench.clock.advance(19.999)
    ask(bench, 6)
    bench.clock.advance(0.001)
    ask(bench, 7)
    assert (6 in bench.rejected, 7 in bench.rejected) == (True, False)
    ask(bench, 8, "other")
    assert 8 not in bench.rejected
    assert bench.actor.metrics.value("requests_rejected", "rate_limit_exceeded") == 3


def test_each_request_is_told_where_its_tenant_stands(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=60, tokens_per_minute=6000), free=Tenant(concurrency=5))
    found = standing(ask(bench, 1, tokens=100, most=200))
    assert found.requests == Window(limit=60, remaining=59, reset_s=1.0)
    assert found.tokens == Window(limit=6000, remaining=5700, reset_s=3.0)
    assert not [message for message in ask(bench, 2, "free") if isinstance(message, Counted)]
    assert not [message for message in ask(bench, 3, "stranger", key_mark="") if isinstance(message, Counted)]


def test_prompts_of_one_request_are_one(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=1, concurrency=1))
    for key in (1, 2, 3):
        ask(bench, key, group=1)
    ask(bench, 4)
    assert bench.rejected.keys() == {4}


def test_what_is_refused_costs_nothing(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=2, tokens_per_minute=1000))
    ask(bench, 1, tokens=5000)  # longer than the context
    ask(bench, 2, tokens=600, most=600)  # a full bucket: it is tried, and takes all
    ask(bench, 3, tokens=10)
    assert [bench.rejected[key].code for key in (1, 3)] == ["context_length_exceeded", "rate_limit_exceeded"]
    assert bench.rejected[3].standing.requests.remaining == 1
    bench.send(Cancel(key=2))
    assert standing(ask(bench, 4, tokens=10)).tokens.remaining == 1000 - 600 - 10  # its prompt was on its way


def test_a_request_may_not_be_refused_by_a_full_queue_and_be_counted(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=5))
    bench.actor.admission.max_requests = 1
    ask(bench, 1)
    ask(bench, 2)
    assert bench.rejected[2].code == "queue_full"
    bench.actor.admission.max_requests = 9
    assert standing(ask(bench, 3)).requests.remaining == 3


# ------------------------------------------------------------------ tokens a minute


def test_tokens_are_held_as_asked_and_settled_as_used(limited: Any) -> None:
    bench = limited(acme=Tenant(tokens_per_minute=1000))
    assert standing(ask(bench, 1, tokens=100, most=400)).tokens.remaining == 500
    ask(bench, 2, tokens=101, most=400)
    refused = bench.rejected[2]
    assert (refused.type, refused.code) == ("tokens", "rate_limit_exceeded")
    assert refused.retry_after_s == 0.06
    assert "needs 501: 101 of its prompt and 400 for its answer" in refused.message
    answer(bench, 1, 50)
    found = standing(ask(bench, 3, tokens=10)).tokens
    assert found.remaining == 1000 - 150 - 10 + int(1000 * 0.01 * bench.step_number / 60)


def test_every_answer_is_held_for(limited: Any) -> None:
    bench = limited(acme=Tenant(tokens_per_minute=1000))
    assert standing(ask(bench, 1, tokens=100, most=100, n=3)).tokens.remaining == 600


def test_what_nobody_asked_for_is_owed(limited: Any) -> None:
    bench = limited(acme=Tenant(tokens_per_minute=60))
    assert standing(ask(bench, 1, tokens=10)).tokens.remaining == 50
    answer(bench, 1, 120)
    ask(bench, 2, tokens=10)
    waited = 0.01 * bench.step_number
    assert bench.rejected[2].retry_after_s == pytest.approx(70 + 10 - waited)
    bench.clock.advance(80)
    ask(bench, 3, tokens=10)
    assert 3 not in bench.rejected


def test_a_prompt_of_more_tokens_than_a_minute_has_need_not_be_sent_again(limited: Any) -> None:
    bench = limited(acme=Tenant(tokens_per_minute=100, requests_per_minute=1))
    ask(bench, 1, tokens=101)
    refused = bench.rejected[1]
    assert (refused.status, refused.type, refused.code, refused.retry_after_s) == (429, "tokens", "rate_limit_exceeded", None)
    assert "101 tokens" in refused.message
    ask(bench, 2, tokens=100, most=3000)
    assert 2 not in bench.rejected


# ------------------------------------------------------------------ at once, context, models, class


def test_so_many_requests_run_at_once(limited: Any) -> None:
    bench = limited(acme=Tenant(concurrency=2))
    for key in (1, 2, 3):
        ask(bench, key, edge=key)
    refused = bench.rejected[3]
    assert (refused.status, refused.type, refused.code, refused.retry_after_s) == (429, "rate_limit_error", "rate_limit_exceeded", 1.0)
    assert refused.standing is None
    answer(bench, 1, 3)
    ask(bench, 4)
    ask(bench, 5)
    assert bench.rejected.keys() == {3, 5}
    bench.send(PeerDown(role="edge", id=2, epoch=1))
    ask(bench, 6)
    assert bench.rejected.keys() == {3, 5}


def test_a_place_is_held_while_the_prompt_is_with_the_tokenizer(limited: Any) -> None:
    bench = limited(acme=Tenant(concurrency=1))
    bench.hold_encodes = True
    ask(bench, 1)
    ask(bench, 2)
    assert bench.rejected.keys() == {2}
    bench.send(Cancel(key=1))
    ask(bench, 3)
    assert bench.rejected.keys() == {2}


def test_a_tenants_context_is_a_context(limited: Any) -> None:
    bench = limited(acme=Tenant(context=100), wide=Tenant(context=10**6))
    ask(bench, 1, tokens=60)
    ask(bench, 2, tokens=60, most=41)
    ask(bench, 3, tokens=100)
    ask(bench, 4, "wide", tokens=3000)
    ask(bench, 5, tokens=300, truncate_prompt_tokens=-1)
    assert [(m.key, len(m.prompt), m.max_tokens) for m in bench.engine] == [(1, 60, 40), (4, 3000, 1096), (5, 99, 1)]
    for key in (2, 3):
        assert (bench.rejected[key].status, bench.rejected[key].code) == (400, "context_length_exceeded")
        assert "acme's maximum context length is 100 tokens" in bench.rejected[key].message


def test_other_models_do_not_exist(limited: Any) -> None:
    bench = limited(acme=Tenant(models=["alias"]), own=Tenant(models=["trained"]))
    ask(bench, 1)
    ask(bench, 2, model="alias")
    ask(bench, 3, model="")
    ask(bench, 4, "own", model="")
    assert {key: (one.status, one.code, one.param) for key, one in bench.rejected.items()} == {
        1: (404, "model_not_found", "model"),
        3: (404, "model_not_found", "model"),
    }
    assert "Known: alias." in bench.rejected[1].message


def test_a_class_decides_who_goes_first_and_a_request_can_only_let_others_go(limited: Any) -> None:
    bench = limited(acme=Tenant(klass="fast", priority=-5), plain=Tenant(concurrency=9))
    for key, (tenant, asked) in enumerate([("acme", 0), ("acme", -100), ("acme", 3), ("plain", -7)]):
        ask(bench, key, tenant, priority=asked)
    assert [m.priority for m in bench.engine if isinstance(m, Admit)] == [-5, -5, -2, -7]


def test_each_class_has_its_figures_and_what_it_was_to_get_is_compared(limited: Any) -> None:
    bench = limited(acme=Tenant(klass="fast"), plain=Tenant(concurrency=9))
    ask(bench, 1)
    answer(bench, 1, 5)  # a token each 10 ms
    ask(bench, 2)
    bench.clock.advance(0.01)
    answer(bench, 2, 1)
    ask(bench, 3, "plain")
    answer(bench, 3, 2)
    value = bench.actor.metrics.value
    assert [value("slo_requests", "fast", "ttft", met) for met in ("true", "false")] == [1, 1]
    assert [value("slo_requests", "fast", "itl", met) for met in ("true", "false")] == [1, 0]
    assert [value("slo_target_seconds", "fast", objective) for objective in ("ttft", "itl")] == [0.015, 0.01]
    page = bench.query("metrics").body.decode()
    for of, count in (("fast", 2), ("standard", 1)):
        assert f'penstock_time_to_first_token_seconds_count{{model="trained",class="{of}"}} {count}' in page
    assert 'penstock_requests_finished_total{reason="length"} 3' in page
    bench.send(Tables(generation=2, body=msgspec.msgpack.encode(TenantTable(tenants={}, marks={}))))
    assert "penstock_slo_target_seconds{" not in bench.query("metrics").body.decode()


# ------------------------------------------------------------------ budgets


def test_a_budget_of_tokens_lets_nothing_in_once_it_is_spent(limited: Any) -> None:
    bench = limited(acme=Tenant(budget_tokens=100))
    ask(bench, 1, tokens=60)
    answer(bench, 1, 39)
    ask(bench, 2, tokens=10)
    assert 2 not in bench.rejected
    ask(bench, 3)  # what is left is held
    assert (bench.rejected[3].code, bench.rejected[3].retry_after_s) == ("budget_exceeded", 1.0)
    answer(bench, 2, 1)
    ask(bench, 4)
    refused = bench.rejected[4]
    assert (refused.status, refused.type, refused.code) == (429, "insufficient_quota", "budget_exceeded")
    assert "100 tokens (budget_tokens)" in refused.message
    assert "month" in refused.message
    left = refused.retry_after_s
    assert 0 < left <= 31 * 86_400
    bench.clock.advance(left - 1)
    ask(bench, 5)
    bench.clock.advance(1)
    ask(bench, 6)
    assert (5 in bench.rejected, 6 in bench.rejected) == (True, False)


def test_money_is_counted_to_the_last_token(limited: Any) -> None:
    price = Price(input=150_000, output=600_000, cached=75_000)  # 0.15, 0.6 and 0.075 dollars a million
    bench = limited(prices={"trained": price}, acme=Tenant(budget_pusd=PICO, budget_period="total"))
    ask(bench, 1, tokens=32, model="alias")
    for offset in range(5):
        row = (seq_of(1, 0), 0, offset, 9, RUNNING if offset < 4 else LENGTH)
        bench.rows([row], started=[] if offset else [(seq_of(1, 0), 16)])
    [spending] = [m for m in bench.send(Tick(now_ns=bench.clock.now_ns())) if isinstance(m, Spending)]
    assert spending.rows == [Spent(tenant="acme", period="", tokens=37, pusd=16 * 150_000 + 16 * 75_000 + 5 * 600_000)]
    assert not [m for m in bench.send(Tick(now_ns=bench.clock.now_ns())) if isinstance(m, Spending)]


def test_a_budget_in_dollars_holds_what_answers_may_cost(limited: Any) -> None:
    bench = limited(
        prices={"trained": Price(input=PICO // 100, output=PICO // 10, cached=0)}, acme=Tenant(budget_pusd=2 * PICO, budget_period="total")
    )
    ask(bench, 1, tokens=10, most=19)  # 10 cents and 1.90 dollars
    ask(bench, 2)
    assert bench.rejected[2].retry_after_s == 1.0
    answer(bench, 1, 19)
    ask(bench, 3)
    assert (bench.rejected[3].code, bench.rejected[3].retry_after_s) == ("budget_exceeded", None)
    assert "2 dollars (budget_usd)" in bench.rejected[3].message


def test_what_was_spent_before_counts_if_it_was_in_this_period(limited: Any) -> None:
    month = "2023-11"  # where the fake clock stands
    rows = [Spent(tenant="acme", period=month, tokens=100, pusd=0), Spent(tenant="old", period="2023-10", tokens=100, pusd=0)]
    bench = limited(spent=rows, acme=Tenant(budget_tokens=100), old=Tenant(budget_tokens=100))
    ask(bench, 1)
    ask(bench, 2, "old")
    assert bench.rejected.keys() == {1}


def test_later_tables_forget_nothing_that_was_used(limited: Any) -> None:
    bench = limited(acme=Tenant(requests_per_minute=2, budget_tokens=1000))
    ask(bench, 1, tokens=500)
    answer(bench, 1, 10)
    bench.send(tables(2, acme=Tenant()))
    ask(bench, 2, tables=2)
    bench.send(tables(3, spent=[Spent(tenant="acme", period="2023-11", tokens=1, pusd=0)], acme=Tenant(budget_tokens=510)))
    ask(bench, 3, tables=3)
    assert bench.rejected[3].code == "budget_exceeded"


# ------------------------------------------------------------------ reloads and revocation


def test_what_runs_with_a_revoked_key_ends_honestly_in_every_stage_at_every_edge(limited: Any) -> None:
    bench = limited(acme=Tenant(concurrency=9), kept=Tenant())
    ask(bench, 1, edge=0)
    ask(bench, 2, "kept", edge=1)
    bench.scripts |= {seq_of(1, 0): [9] * 40, seq_of(2, 0): [9] * 4}
    bench.step()
    bench.hold_encodes = True
    ask(bench, 3, edge=1)
    bench.send(tables(2, kept=Tenant()))
    row = bench.received[1, 0]
    assert (row.reason, len(row.tokens)) == ("error", 1)
    [extra] = [extra for extra in row.extras if extra.error]
    assert (extra.error, extra.error_code) == (REVOKED, "invalid_api_key")
    assert bench.finished[1].output_tokens == 1
    assert [seq for m in bench.engine if isinstance(m, Abort) for seq in m.seqs.tolist()] == [seq_of(1, 0)]
    assert (bench.rejected[3].status, bench.rejected[3].code) == (401, "invalid_api_key")
    bench.hold_encodes = False
    bench.release()
    ask(bench, 4)  # an edge that has not heard of it yet
    assert bench.rejected[4].status == 401
    while 2 not in bench.finished:
        bench.step()
    assert len(bench.received[2, 0].tokens) == 4
    assert not bench.actor.ledger.requests
    ask(bench, 5, "acme", key_mark="")  # of no key: a batch's
    assert 5 not in bench.rejected


def test_a_request_whose_edge_was_faster_waits_for_the_tables(limited: Any) -> None:
    bench = limited(acme=Tenant())
    assert all(isinstance(message, TextReady) for message in ask(bench, 1, "new", tables=2))
    ask(bench, 2, "new", tables=2)
    ask(bench, 3, "new", tables=2, edge=4)
    bench.send(Cancel(key=2))
    bench.send(PeerDown(role="edge", id=4, epoch=1))
    found = bench.send(tables(2, new=Tenant(requests_per_minute=5)))
    assert [m.key for m in found if isinstance(m, Counted)] == [1]
    assert [m.key for m in bench.engine] == [1]
    assert bench.send(tables(1, acme=Tenant())) == []  # late
    ask(bench, 4, "new", tables=2)
    assert 4 not in bench.rejected


def test_without_tables_nobody_counts(bench: Any) -> None:
    assert bench.actor._desk.tenants is None
    bench.submit(1, tenant="acme")
    [request] = bench.actor.ledger.requests.values()
    assert request.charge is None
    assert not [m for m in bench.rejected.values() if isinstance(m, Rejected)]
