"""The text actor's flow: what goes in, what the engine is told, what an edge gets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.detokenizer import Tables
from penstock.core.actors.text.stops import cut
from penstock.core.protocol.columns import f32, i32, i64
from penstock.core.protocol.hashing import chain
from penstock.core.protocol.messages import (
    FAILED,
    LENGTH,
    RUNNING,
    STOP,
    Abort,
    Admit,
    Answer,
    Cancel,
    Drain,
    Drained,
    LogprobColumns,
    Park,
    PeerDown,
    PeerUp,
    Query,
    Rejected,
    TextDelta,
    TextReady,
    Tick,
    Unpark,
    Vital,
    Vitals,
    seq_of,
)
from penstock.core.protocol.sampling import SamplingParams


def ids_of(bench: Any, text: str) -> list[int]:
    return bench.tokenizer.encode_batch([text], add_special_tokens=False)[0].tolist()  # type: ignore[no-any-return]


def only(bench: Any, kind: type) -> Any:
    [found] = [m for m in bench.engine if isinstance(m, kind)]
    return found


def chat(*turns: str) -> bytes:
    return json.dumps([{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]).encode()


# ------------------------------------------------------------------ what the engine is told


def test_a_prompt_becomes_an_admit(bench: Any) -> None:
    bench.submit(5, "the water runs down the penstock to the wheel, one two three four five", sampling=SamplingParams(n=3, max_tokens=9))
    admit = only(bench, Admit)
    prompt = ids_of(bench, "the water runs down the penstock to the wheel, one two three four five")
    assert admit.prompt.tolist() == prompt
    assert admit.choices.tolist() == [0, 1, 2]
    assert admit.max_tokens == 9
    assert admit.incarnation == 0
    assert not admit.replay
    assert admit.hashes == chain(admit.root_hash, np.array(prompt, np.int32), 16)
    assert len(admit.hashes) == 16 * (len(prompt) // 16) > 0
    assert sorted(admit.eos.tolist()) == sorted(bench.tokenizer.eos_ids)
    assert admit.sampling.seed is not None


def test_chat_goes_through_the_template(bench: Any) -> None:
    bench.submit(5, kind="chat", messages=chat("the gate"), add_special_tokens=False)
    assert only(bench, Admit).prompt.tolist() == ids_of(bench, "<|im_start|>user\nthe gate<|im_end|>\n<|im_start|>assistant\n")


def test_chat_goes_through_the_requests_own_template(bench: Any) -> None:
    bench.submit(
        5, kind="chat", messages=chat("the gate"), add_special_tokens=False, chat_template="<{{ messages[0].content }}>{{ eos_token }}"
    )
    assert only(bench, Admit).prompt.tolist() == ids_of(bench, "<the gate><|eos|>")


def test_token_ids_are_taken_as_they_are(bench: Any) -> None:
    bench.submit(5, prompt_ids=i32([9, 8, 7] * 10))
    admit = only(bench, Admit)
    assert admit.prompt.tolist() == [9, 8, 7] * 10
    assert admit.hashes == chain(admit.root_hash, admit.prompt, 16)


def test_max_tokens_reach_as_far_as_the_context(bench: Any) -> None:
    length = len(ids_of(bench, "the water"))
    bench.submit(1)
    bench.submit(2, sampling=SamplingParams(max_tokens=10**6, min_tokens=10**5))
    first, second = (m for m in bench.engine if isinstance(m, Admit))
    assert first.max_tokens == second.max_tokens == 4096 - length
    assert second.sampling.min_tokens == second.max_tokens


def test_what_a_client_asks_for_must_fit_and_the_error_says_how(bench: Any) -> None:
    for key, (prompt, asked) in enumerate([(90, 4006), (90, 4007), (4095, 1), (4096, 0)]):
        bench.submit(key, prompt_ids=i32([1] * prompt), sampling=SamplingParams(max_tokens=asked), explicit=["max_tokens"])
    assert [(m.key, m.max_tokens) for m in bench.engine] == [(0, 4006), (2, 1), (3, 0)]
    message = bench.rejected[1].message
    for number in ("4096", "4097", "90 in the prompt", "4007 by max_tokens", "at most 4006"):
        assert number in message


def test_truncating_to_what_fits_leaves_room_for_what_was_asked(bench: Any) -> None:
    for key, asked in enumerate([0, 1, 100]):
        bench.submit(
            key,
            prompt_ids=i32([3] * 5000),
            truncate_prompt_tokens=-1,
            sampling=SamplingParams(max_tokens=asked),
            explicit=["max_tokens"],
        )
    assert [(len(m.prompt), m.max_tokens) for m in bench.engine] == [(4096, 0), (4095, 1), (3996, 100)]


def test_scoring_ends_with_the_prompts_logprobs_and_no_token(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([5, 6, 7]), sampling=SamplingParams(max_tokens=0, prompt_logprobs=0), echo=True)
    columns = LogprobColumns(
        rows=i32([0, 0]), positions=i32([1, 2]), counts=i32([1, 1]), ranks=i32([1, 2]), ids=i32([6, 7]), values=f32([-0.5, -1.0])
    )
    seq = seq_of(1, 0)
    bench.rows([(seq, 0, 0, -1, LENGTH)], prompt_seqs=i64([seq]), prompt_logprobs=columns, started=[(seq, 0)])
    got = bench.received[1, 0]
    assert (got.tokens, got.text, got.reason) == ([], "", "length")
    assert [p and p.logprobs for p in got.extras[0].prompt_logprobs] == [None, [-0.5], [-1.0]]
    done = bench.finished[1]
    assert (done.prompt_tokens, done.output_tokens, done.first_token_ns) == (3, 0, 0)
    assert (bench.actor.admission.requests, bench.actor.admission.tokens) == (0, 0)


def test_a_kv_pool_smaller_than_the_context_bounds_the_answer(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(num_blocks=4)
    bench.submit(1)
    assert only(bench, Admit).max_tokens == 64 - len(ids_of(bench, "the water"))
    bench.submit(3, sampling=SamplingParams(max_tokens=64), explicit=["max_tokens"])
    assert (bench.rejected[3].code, bench.rejected[3].param) == ("context_length_exceeded", "max_tokens")
    assert "KV cache holds 64 tokens" in bench.rejected[3].message
    bench.submit(2, prompt_ids=i32([1] * 64))
    refused = bench.rejected[2]
    assert (refused.status, refused.param, refused.code) == (400, "prompt", "invalid_value")
    assert "5 KV blocks" in refused.message
    assert "4 blocks" in refused.message


def test_a_seed_is_drawn_once_and_a_given_one_kept(bench: Any) -> None:
    bench.submit(1)
    bench.submit(2)
    bench.submit(3, sampling=SamplingParams(seed=-5))
    seeds = [m.sampling.seed for m in bench.engine]
    assert len(set(seeds)) == 3
    assert seeds[2] == -5
    assert all(0 <= s < 2**63 for s in seeds[:2])


def test_model_defaults_fill_what_the_client_left_open(make_bench: Any) -> None:
    bench = make_bench(defaults={"temperature": 0.3, "top_k": 5, "max_tokens": 50})
    bench.submit(1, sampling=SamplingParams(temperature=1.0, top_p=0.5), explicit=["temperature", "top_p"])
    sampling = only(bench, Admit).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (1.0, 5, 0.5, 50)


def test_ignore_eos_sends_no_end_tokens(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(ignore_eos=True))
    assert len(only(bench, Admit).eos) == 0


def test_bad_words_become_token_sequences(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(bad_words=["water"]))
    banned = only(bench, Admit).sampling.bad_words_token_ids
    assert ids_of(bench, "water") in banned
    assert ids_of(bench, " water") in banned


def test_tenants_and_salts_never_share_a_root(bench: Any) -> None:
    for key, (tenant, salt) in enumerate([("", ""), ("", ""), ("a", ""), ("", "a"), ("a", "a"), ("b", "")]):
        bench.submit(key, tenant=tenant, cache_salt=salt)
    roots = [m.root_hash for m in bench.engine]
    assert roots[0] == roots[1]
    assert len(set(roots)) == 5


def test_prompts_are_truncated_from_the_left(bench: Any) -> None:
    bench.submit(1, "the water runs down", truncate_prompt_tokens=3)
    assert only(bench, Admit).prompt.tolist() == ids_of(bench, "the water runs down")[-3:]
    bench.submit(2, prompt_ids=i32([3] * 5000), truncate_prompt_tokens=-1, sampling=SamplingParams(max_tokens=100))
    admit = bench.engine[-1]
    assert len(admit.prompt) == 3996
    assert admit.max_tokens == 100


def test_no_hashes_without_a_prefix_cache(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(enable_prefix_caching=False)
    bench.submit(1, prompt_ids=i32([1] * 40))
    assert only(bench, Admit).hashes == b""


# ------------------------------------------------------------------ what an edge gets


def test_tokens_come_as_text(bench: Any) -> None:
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = ids_of(bench, "runs down the penstock 🙃 to the wheel.")
    bench.run()
    got = bench.received[1, 0]
    assert got.text == "runs down the penstock 🙃 to the wheel."
    assert got.tokens == bench.scripts[seq_of(1, 0)]
    assert got.reason == "length"
    assert not any("\ufffd" in piece for piece in got.pieces)
    finished = bench.finished[1]
    assert finished.output_tokens == len(got.tokens)
    assert finished.prompt_tokens == len(ids_of(bench, "the water"))
    assert finished.queue_ns > 0
    assert finished.prefill_ns > 0
    assert finished.decode_ns > 0
    assert bench.actor.ledger.requests == {}
    assert bench.actor.ledger.choices == {}
    assert bench.actor.ledger.free_slots == bench.actor.ledger.slots


def test_one_delta_a_step_and_edge(bench: Any) -> None:
    for key, edge in ((1, 0), (2, 0), (3, 4), (4, -1)):
        bench.submit(key, edge=edge)
        bench.scripts[seq_of(key, 0)] = ids_of(bench, "the gate opens")
    while True:
        before = len(bench.out)
        if not bench.step():
            break
        deltas = [(index, m) for index, m in bench.out[before:] if isinstance(m, TextDelta)]
        assert sorted(index for index, _ in deltas) == [-1, 0, 4]
        rows = {index: [int(k) for k in m.keys] for index, m in deltas}
        assert rows == {0: [1, 2], 4: [3], -1: [4]}
    assert [bench.received[key, 0].text for key in (1, 2, 3, 4)] == ["the gate opens"] * 4


def test_without_streaming_everything_comes_at_the_end(bench: Any) -> None:
    bench.submit(1, stream=False, sampling=SamplingParams(n=2))
    bench.submit(2, stream=False, sampling=SamplingParams(stop=["zzz"]))
    for seq, text in ((seq_of(1, 0), "the gate"), (seq_of(1, 1), "Grüße 🙃 naïve"), (seq_of(2, 0), "one two three")):
        bench.scripts[seq] = ids_of(bench, text)
    bench.run()
    for (key, choice), text in {(1, 0): "the gate", (1, 1): "Grüße 🙃 naïve", (2, 0): "one two three"}.items():
        got = bench.received[key, choice]
        assert got.pieces == [text]
        assert got.tokens == bench.scripts[seq_of(key, choice)]
        assert got.reason == "length"
    assert set(bench.finished) == {1, 2}


def test_an_end_token_is_counted_but_is_no_text(bench: Any) -> None:
    end = bench.tokenizer.eos_ids[0]
    stop = ids_of(bench, "!")[0]
    for key, params, last in (
        (1, SamplingParams(), end),
        (2, SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), end),
        (3, SamplingParams(stop_token_ids=[stop]), stop),
        (4, SamplingParams(stop_token_ids=[stop], include_stop_str_in_output=True), stop),
    ):
        bench.submit(key, sampling=params)
        bench.scripts[seq_of(key, 0)] = [*ids_of(bench, "the gate"), last]
    bench.final = STOP
    bench.run()
    assert [bench.received[k, 0].text for k in (1, 2, 3, 4)] == ["the gate", "the gate<|im_end|>", "the gate", "the gate!"]
    assert [bench.received[k, 0].stop_reason for k in (1, 2, 3, 4)] == [None, None, stop, stop]
    assert all(bench.received[k, 0].reason == "stop" for k in (1, 2, 3, 4))
    assert bench.finished[1].output_tokens == len(bench.scripts[seq_of(1, 0)])


def test_a_cut_code_point_at_the_end_is_a_replacement(bench: Any) -> None:
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = ids_of(bench, "ab\U0001f9ff")[:-1]
    bench.run()
    assert bench.received[1, 0].text == "ab\ufffd"


@settings(max_examples=120, deadline=None)
@given(
    text=st.text(alphabet="abST OP\n🙃é", max_size=30),
    stops=st.lists(st.text(alphabet="abSTOP \n🙃", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    stream=st.booleans(),
    include=st.booleans(),
)
def test_stop_strings_cut_like_the_reference(make_bench: Any, text: str, stops: list[str], stream: bool, include: bool) -> None:
    bench = make_bench()
    bench.submit(1, stream=stream, sampling=SamplingParams(stop=stops, include_stop_str_in_output=include))
    script = ids_of(bench, text) or ids_of(bench, "x")
    bench.scripts[seq_of(1, 0)] = script
    bench.run()
    whole = bench.tokenizer.decode(script, skip_special_tokens=True)
    expected, hit = cut(whole, stops)
    got = bench.received[1, 0]
    assert got.text == expected + (hit if hit and include else "")
    assert got.reason == ("stop" if hit else "length")
    assert got.stop_reason == hit
    assert got.tokens == script[: len(got.tokens)]
    aborted = [m for m in bench.engine if isinstance(m, Abort)]
    if hit and len(got.tokens) < len(script):
        assert [m.seqs.tolist() for m in aborted] == [[seq_of(1, 0)]]
    else:
        assert not aborted
    assert 1 in bench.finished


def test_a_stop_string_waits_for_min_tokens(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(stop=["a"], min_tokens=3))
    one = ids_of(bench, "a")
    bench.scripts[seq_of(1, 0)] = one * 6
    bench.run()
    assert bench.received[1, 0].text == "aaa"
    assert bench.received[1, 0].tokens == one * 4


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_begin_before_min_tokens(bench: Any, stream: bool, include: bool) -> None:
    settings_ = SamplingParams(stop=["xxxx"], min_tokens=9, n=2, include_stop_str_in_output=include)
    bench.submit(1, stream=stream, sampling=settings_)
    (one,) = ids_of(bench, "x")
    for choice in (0, 1):
        bench.scripts[seq_of(1, choice)] = [one] * 20
    bench.run()
    for choice in (0, 1):
        got = bench.received[1, choice]
        assert (got.text, len(got.tokens)) == ("x" * (10 if include else 6), 10)
        assert (got.reason, got.stop_reason) == ("stop", "xxxx")


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "b", "ab", "the", " ", "water", "🙃"]), min_size=1, max_size=14),
    stops=st.lists(st.text(alphabet="abthe 🙃", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    wait=st.integers(0, 12),
    include=st.booleans(),
    deaths=st.sets(st.integers(0, 12), max_size=2),
)
def test_min_tokens_and_stop_strings_like_the_reference(
    make_bench: Any, words: list[str], stops: list[str], wait: int, include: bool, deaths: set[int]
) -> None:
    """Streamed or not, and whatever engines die in between, the answer is the same."""
    bench = make_bench(max_strikes=1000)
    script = [token for word in words for token in ids_of(bench, word)]
    for key, stream in ((1, True), (2, False)):
        bench.submit(key, stream=stream, sampling=SamplingParams(stop=stops, min_tokens=wait, include_stop_str_in_output=include))
        bench.scripts[seq_of(key, 0)] = script
    at = 0
    while bench.step():
        if at in deaths:
            bench.up()
        at += 1
    # A token's text is what it makes certain: an emoji's comes with its last byte.
    whole = bench.tokenizer.decode(script, skip_special_tokens=True)
    waiting = bench.tokenizer.decode(script[:wait], skip_special_tokens=True).rstrip("\ufffd")
    expected, hit = cut(whole, stops, len(waiting))
    for key in (1, 2):
        got = bench.received[key, 0]
        assert got.text == expected + (hit if hit and include else "")
        assert (got.reason, got.stop_reason) == ("stop" if hit else "length", hit)
    assert bench.received[1, 0].tokens == bench.received[2, 0].tokens


def test_later_tokens_of_a_stopped_sequence_are_nothing(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(stop=["!"]))
    seq = seq_of(1, 0)
    bang = ids_of(bench, "!")[0]
    bench.rows([(seq, 0, 0, bang, RUNNING)], started=[(seq, 0)])
    before = len(bench.out)
    bench.rows([(seq, 0, 1, bang, LENGTH)])
    assert len(bench.out) == before


def test_echo_and_ids_come_with_the_first_row(bench: Any) -> None:
    bench.submit(1, "the water", echo=True)
    bench.submit(2, "the water", want_ids=True)
    bench.submit(3, echo=True, prompt_ids=i32(ids_of(bench, "the gate")))
    for key in (1, 2, 3):
        bench.scripts[seq_of(key, 0)] = ids_of(bench, "the gate")
    bench.run()
    extras = [bench.received[key, 0].extras for key in (1, 2, 3)]
    assert [len(e) for e in extras] == [1, 1, 1]
    assert [e[0].prompt_text for e in extras] == ["the water", None, "the gate"]
    assert extras[1][0].prompt_token_ids.tolist() == ids_of(bench, "the water")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("stop", "stop_ids"),
    [
        ([], False),
        ([], True),
        (["end of"], False),
        (["of text", "nothing"], False),
        ([" stop here"], False),
        (["\U0001f9ff"], False),
        (["never"], False),
    ],
)
def test_the_tokens_of_logprobs_joined_are_the_text(bench: Any, stop: list[str], stop_ids: bool, kept: bool, stream: bool) -> None:
    """Neither the end token is among them, nor those of the stop string; each comes once it is known that its text does."""
    text = "The end of text -- \U0001f9ff stop here."
    ids = [*ids_of(bench, text), bench.tokenizer.eos_ids[0]]
    ends = [ids.pop(), ids.pop()][1:] if stop_ids else []
    ids += ends
    sampling = SamplingParams(logprobs=0, stop=stop, stop_token_ids=ends, include_stop_str_in_output=kept)
    bench.submit(1, sampling=sampling, stream=stream)
    seq = seq_of(1, 0)
    out: list[str] = []
    for offset, token in enumerate(ids):
        if bench.received.get((1, 0)) and bench.received[1, 0].reason:
            break
        columns = LogprobColumns(
            rows=i32([0]), positions=i32([offset]), counts=i32([1]), ranks=i32([1]), ids=i32([token]), values=f32([-1.0])
        )
        last = STOP if offset == len(ids) - 1 else RUNNING
        bench.rows([(seq, 0, offset, token, last)], started=[(seq, 0)] if not offset else [], logprobs=columns)
        got = bench.received.get((1, 0))
        if got is not None:
            out = [entry.bytes_[0].decode("utf-8", "surrogateescape") for entry in got.logprobs if not entry.silent]
            so_far = "".join(out).encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
            assert kept or not stream or got.text.startswith(so_far) or so_far.startswith(got.text)
    got = bench.received[1, 0]
    joined = b"".join(entry.bytes_[0] for entry in got.logprobs if not entry.silent).decode()
    assert got.reason == "stop"
    assert joined.startswith(got.text)
    over = joined.removeprefix(got.text)  # a token that is text up to the stop string is there whole
    assert not over or (not kept and len(over) < len(stop[0]) and stop[0].startswith(over))
    assert len(got.logprobs) == len(got.tokens)


def test_logprobs_are_aligned_with_their_tokens(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(logprobs=2))
    bench.submit(2)
    seqs = [seq_of(1, 0), seq_of(2, 0)]
    a, b = ids_of(bench, "a")[0], ids_of(bench, "b")[0]
    part = ids_of(bench, "\U0001f9ff")[0]
    columns = LogprobColumns(
        rows=i32([1]), positions=i32([2]), counts=i32([3]), ranks=i32([7]), ids=i32([part, a, b]), values=f32([-3.0, -0.5, -1.5])
    )
    bench.rows([(seqs[1], 0, 0, a, RUNNING), (seqs[0], 0, 0, part, RUNNING)], started=[(s, 0) for s in seqs], logprobs=columns)
    [entry] = bench.received[1, 0].logprobs
    assert entry.ids == [part, a, b]
    assert entry.logprobs == [-3.0, -0.5, -1.5]
    assert entry.ranks == [7, 1, 2]
    assert entry.texts == ["\ufffd", "a", "b"]
    assert entry.bytes_[1:] == [b"a", b"b"]
    assert entry.bytes_[0] == bench.tokenizer.token_bytes(part)
    assert not bench.received[2, 0].logprobs


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_where_tokens_are_all_that_is_wanted_no_text_is_made(
    make_bench: Any, pieces: Any, monkeypatch: pytest.MonkeyPatch, exact: bool, stream: bool
) -> None:
    bench = make_bench(with_tokenizer=None if exact else pieces)
    assert bench.tokenizer.is_byte_exact() is exact
    monkeypatch.setattr(Tables, "decoder", lambda *_: pytest.fail("a decoder"))
    bench.submit(1, prompt_ids=i32([5, 6]), want_ids=True, detokenize=False, stream=stream, sampling=SamplingParams(max_tokens=4))
    bench.scripts[seq_of(1, 0)] = [7, 8, 9, 10]
    bench.run()
    got = bench.received[1, 0]
    assert (got.tokens, got.text, got.reason) == ([7, 8, 9, 10], "", "length")
    assert [extra.prompt_token_ids.tolist() for extra in got.extras if extra.prompt_token_ids is not None] == [[5, 6]]


def test_where_no_text_is_wanted_log_probabilities_have_no_spellings(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([5, 6]), detokenize=False, sampling=SamplingParams(logprobs=1, prompt_logprobs=0))
    seq = seq_of(1, 0)
    prompt = LogprobColumns(rows=i32([0]), positions=i32([1]), counts=i32([1]), ranks=i32([4]), ids=i32([6]), values=f32([-2.0]))
    drawn = LogprobColumns(rows=i32([0]), positions=i32([2]), counts=i32([2]), ranks=i32([3]), ids=i32([9, 8]), values=f32([-1.0, -0.5]))
    bench.rows([], started=[(seq, 0)], prompt_seqs=i64([seq]), prompt_logprobs=prompt)
    bench.rows([(seq, 0, 0, 9, LENGTH)], logprobs=drawn)
    [extra] = bench.received[1, 0].extras
    [entry], [_, before] = extra.logprobs, extra.prompt_logprobs
    assert (entry.ids, entry.logprobs, entry.ranks, entry.texts, entry.bytes_) == ([9, 8], [-1.0, -0.5], [3, 1], [], [])
    assert (before.ids, before.logprobs, before.ranks, before.texts, before.bytes_) == ([6], [-2.0], [4], [], [])


def test_stop_strings_need_text(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([5, 6]), detokenize=False, sampling=SamplingParams(stop=["x"]), names={"stop": "its.stop"})
    rejected = bench.rejected[1]
    assert (rejected.status, rejected.code, rejected.param) == (400, "unsupported_feature", "its.stop")


def test_prompt_logprobs_gather_over_chunks_and_keep_what_came_first(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([5, 6, 7, 8]), sampling=SamplingParams(prompt_logprobs=0))
    seq = seq_of(1, 0)

    def chunk(positions: list[int], value: float) -> LogprobColumns:
        n = len(positions)
        return LogprobColumns(
            rows=i32([0] * n), positions=i32(positions), counts=i32([1] * n), ranks=i32([1] * n), ids=i32([5] * n), values=f32([value] * n)
        )

    bench.rows([], started=[(seq, 0)], prompt_seqs=i64([seq]), prompt_logprobs=chunk([1, 2], -1.0))
    bench.rows([], prompt_seqs=i64([seq]), prompt_logprobs=chunk([2, 3], -2.0))
    bench.rows([(seq, 0, 0, 9, LENGTH)])
    [extra] = bench.received[1, 0].extras
    assert [None if e is None else e.logprobs for e in extra.prompt_logprobs] == [None, [-1.0], [-1.0], [-2.0]]


def test_cached_tokens_are_reported(bench: Any) -> None:
    bench.submit(1)
    seq = seq_of(1, 0)
    bench.rows([(seq, 0, 0, 9, RUNNING)], started=[(seq, 1)])
    bench.rows([(seq, 0, 1, 9, LENGTH)], started=[(seq, 0)])
    deltas = [m for _, m in bench.out if isinstance(m, TextDelta)]
    assert [d.cached_tokens.tolist() for d in deltas] == [[1], [1]]
    assert bench.finished[1].cached_tokens == 1


def test_a_failed_row_fails_only_its_choice(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(n=2))
    first, second = seq_of(1, 0), seq_of(1, 1)
    a = ids_of(bench, "a")[0]
    bench.rows([(first, 0, 0, a, RUNNING), (second, 0, 0, a, RUNNING)], started=[(first, 0), (second, 0)])
    bench.rows([(first, 0, 1, -1, FAILED), (second, 0, 1, a, LENGTH)])
    assert bench.received[1, 0].reason == "error"
    assert bench.received[1, 0].extras[-1].error_code == "engine_failure"
    assert (bench.received[1, 1].reason, bench.received[1, 1].text) == ("length", "aa")
    assert bench.finished[1].output_tokens == 3


def test_the_engine_may_say_why_and_may_refuse_a_replay(bench: Any) -> None:
    bench.submit(1)
    bench.submit(2)
    first, second = seq_of(1, 0), seq_of(2, 0)
    a = ids_of(bench, "a")[0]
    bench.rows([(first, 0, 0, a, RUNNING), (second, 0, 0, a, RUNNING)], started=[(first, 0), (second, 0)])
    bench.scripts.update({first: [a, a], second: [a, a]})
    bench.up()
    bench.rows([(second, 1, 0, -1, FAILED), (first, 1, 0, -1, FAILED)], errors=["no room", "not a number"])
    assert [bench.received[key, 0].extras[-1].error for key in (1, 2)] == ["not a number", "no room"]
    assert [bench.received[key, 0].text for key in (1, 2)] == ["a", "a"]
    assert set(bench.finished) == {1, 2}


def test_rows_that_do_not_continue_the_ledger_are_not_accepted(bench: Any) -> None:
    bench.submit(1)
    seq = seq_of(1, 0)
    a = ids_of(bench, "a")[0]
    bench.rows([(seq, 0, 0, a, RUNNING)], started=[(seq, 0)])
    bench.rows([(seq, 0, 0, a, RUNNING)])  # again
    bench.rows([(seq, 1, 1, a, RUNNING)])  # another incarnation
    bench.rows([(seq, 0, 1, a, RUNNING)], epoch=bench.epoch - 1)  # a dead engine
    bench.rows([(seq_of(99, 0), 0, 0, a, RUNNING)])  # nobody's
    assert bench.received[1, 0].text == "a"
    metrics = bench.actor.metrics
    assert metrics.value("dropped_rows", "duplicate") == 1
    assert metrics.value("dropped_rows", "stale") == 2
    bench.rows([(seq, 0, 3, a, RUNNING)])  # a hole can never be filled
    assert bench.received[1, 0].reason == "error"
    assert bench.received[1, 0].text == "a"
    assert isinstance(bench.engine[-1], Abort)
    assert 1 in bench.finished


# ------------------------------------------------------------------ cancel, park, drain, edges


def test_cancel_is_idempotent_whenever_it_comes(make_bench: Any) -> None:
    bench = make_bench()
    bench.hold_encodes = True
    bench.submit(1)
    bench.send(Cancel(key=1, cause="client"))
    bench.send(Cancel(key=1, cause="client"))
    bench.release()
    assert bench.engine == []
    bench.hold_encodes = False
    bench.submit(2, sampling=SamplingParams(n=2))
    for _ in range(3):
        bench.send(Cancel(key=2))
    assert [m.seqs.tolist() for m in bench.engine if isinstance(m, Abort)] == [[seq_of(2, 0), seq_of(2, 1)]]
    bench.send(Cancel(key=77))
    bench.submit(3)
    bench.scripts[seq_of(3, 0)] = ids_of(bench, "ab")
    bench.run()
    bench.send(Cancel(key=3))
    assert len([m for m in bench.engine if isinstance(m, Abort)]) == 1
    assert bench.actor.metrics.value("cancellations", "client") == 1
    assert bench.actor.metrics.value("cancellations", "disconnect") == 1
    assert set(bench.finished) == {1, 2, 3}
    assert (bench.actor.admission.requests, bench.actor.admission.tokens) == (0, 0)


def test_a_request_is_cancelled_by_its_id_at_every_stage(make_bench: Any) -> None:
    """Whoever waits for it is told, and nothing of it stays."""
    bench = make_bench()
    bench.submit(3)
    bench.hold_encodes = True
    bench.submit(1, rid="early")
    bench.send(Query(id=1, edge=5, what="cancel", body=b'{"rid":"early"}'))
    bench.release()
    bench.hold_encodes = False
    bench.submit(2, rid="late", sampling=SamplingParams(n=2))
    bench.submit(4, rid="late")
    bench.scripts[seq_of(2, 0)] = ids_of(bench, "ab")
    sent = bench.send(Query(id=2, edge=5, what="cancel", body=b'{"rid":"late","tenant":""}'))
    assert [m.body for m in sent if isinstance(m, Answer)] == [b'{"prompts":2}']
    ends = [(key, reason) for m in sent if isinstance(m, TextDelta) for key, reason in zip(m.keys.tolist(), m.reasons, strict=True)]
    assert sorted(ends) == [(2, "abort"), (2, "abort"), (4, "abort")]
    assert {extra.error_code for m in sent if isinstance(m, TextDelta) for extra in m.extras} == {"cancelled"}
    assert [m.seqs.tolist() for m in bench.engine if isinstance(m, Abort)] == [[seq_of(2, 0), seq_of(2, 1)], [seq_of(4, 0)]]
    (refused,) = bench.rejected.values()
    assert (refused.status, refused.code) == (499, "cancelled")
    assert bench.actor.metrics.value("cancellations", "client") == 3
    assert set(bench.actor.ledger.requests) == {3}
    assert bench.query("cancel", {"rid": "late"}).status == 404


def test_a_request_of_another_tenant_does_not_exist(bench: Any) -> None:
    bench.submit(1, rid="mine", tenant="a")
    assert bench.query("cancel", {"rid": "mine", "tenant": "b"}).status == 404
    assert bench.query("cancel", {"rid": "mine", "tenant": ""}).status == 404
    assert bench.query("cancel", {"rid": "other", "tenant": "a"}).status == 404
    assert bench.query("cancel", {"tenant": "a"}).status == 400
    assert set(bench.actor.ledger.requests) == {1}
    assert bench.query("cancel", {"rid": "mine", "tenant": None}).status == 200
    assert not bench.actor.ledger.requests


def test_park_travels_once_and_survives_the_engine(bench: Any) -> None:
    bench.submit(1)
    bench.send(Park(key=1))
    bench.send(Park(key=1))
    assert [type(m) for m in bench.engine] == [Admit, Park]
    bench.up()
    assert [type(m) for m in bench.engine[2:]] == [Admit, Park]
    bench.send(Unpark(key=1))
    bench.send(Unpark(key=1))
    assert [type(m) for m in bench.engine[4:]] == [Unpark]
    bench.send(Park(key=5))
    assert len(bench.engine) == 5


def test_drain_finishes_what_runs(bench: Any) -> None:
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = ids_of(bench, "ab")
    out = bench.send(Drain(deadline_s=5.0))
    [word] = [m for m in out if isinstance(m, TextReady)]
    assert (word.ready, word.waits, word.reason, word.epoch) == (False, False, "draining", 1)
    bench.submit(2)
    assert (bench.rejected[2].status, bench.rejected[2].code) == (503, "draining")
    bench.run()
    assert bench.received[1, 0].text == "ab"
    assert [m for _, m in bench.out if isinstance(m, Drained)] == [Drained(role="text", id=0)]


def test_a_drain_that_takes_too_long_ends_the_rest(bench: Any) -> None:
    bench.submit(1)
    bench.hold_encodes = True
    bench.submit(2)
    bench.send(Drain(deadline_s=5.0))
    bench.send(Tick(now_ns=bench.clock.now_ns() + 4_000_000_000))
    assert 1 not in bench.finished
    bench.send(Tick(now_ns=bench.clock.now_ns() + 5_000_000_000))
    assert bench.received[1, 0].reason == "abort"
    assert bench.received[1, 0].extras[-1].error_code == "draining", "or an edge would take it for the engine's failure"
    assert bench.rejected[2].code == "draining"
    assert [m for _, m in bench.out if isinstance(m, Drained)] == [Drained(role="text", id=0)]
    assert bench.actor.admission.requests == 0


def test_an_edge_that_dies_takes_its_streams_along(bench: Any) -> None:
    bench.send(PeerUp(role="edge", id=3, epoch=1))
    bench.submit(1, edge=3)
    bench.submit(2, edge=0)
    before = len(bench.out)
    bench.send(PeerDown(role="edge", id=3, epoch=1))
    assert [type(m) for _, m in bench.out[before:]] == [Abort]
    assert set(bench.actor.ledger.requests) == {2}


def test_readiness_is_told_on_connect_and_on_change(make_bench: Any) -> None:
    bench = make_bench(up=False)
    assert bench.send(PeerUp(role="edge", id=0, epoch=1)) == [TextReady(ready=False, reason="the engine is starting")]
    bench.submit(1)
    assert (bench.rejected[1].status, bench.rejected[1].code) == (503, "engine_unavailable")
    assert bench.rejected[1].retry_after_s
    bench.up()
    edge, word = bench.out[-1]
    assert edge == 0
    assert isinstance(word, TextReady)
    assert (word.ready, word.waits, word.reason, word.epoch) == (True, False, "", 1)
    assert word.limits is not None
    assert word.limits.max_model_len == 4096
    before = len(bench.out)
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert [(edge, type(m)) for edge, m in bench.out[before:]] == [(0, TextReady)], "a sign of life every second"


def test_an_engine_that_stands_still_is_not_ready(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.send(PeerUp(role="edge", id=0, epoch=1))
    bench.up(bounded_steps=True)

    def word(age_s: float, stalled_s: float = 0.0, up: bool = True) -> TextReady:
        bench.clock.advance(60)
        bench.send(Vitals(rows=[Vital("edge", 0, True, 99.0, 1, 0, 0.0), Vital("engine", 0, up, age_s, 5, 1, stalled_s)]))
        bench.send(Tick(now_ns=bench.clock.now_ns()))
        found = bench.out[-1][1]
        assert isinstance(found, TextReady)
        return found

    assert word(0.9).ready
    assert word(0.9).ages == {"engine-0": 0.9}
    silent = word(5.0)
    assert (silent.ready, silent.waits) == (False, True)
    assert "not been heard of for 5 s" in silent.reason
    assert word(1.0).ready
    assert "finished no step for 9 s" in word(0.5, stalled_s=9.0).reason
    assert word(0.5, stalled_s=5.0).ready
    bench.up(bounded_steps=False)
    assert word(0.5, stalled_s=1000.0).ready, "on a CPU a step may take any time"


def test_steps_are_signs_of_life(bench: Any) -> None:
    bench.send(PeerUp(role="edge", id=0, epoch=1))
    bench.submit(1)
    bench.scripts[seq_of(1, 0)] = [4, 5, 6]
    bench.clock.advance(60)
    bench.step()
    bench.send(Vitals(rows=[Vital("engine", 0, True, 30.0, 5, 1, 0.0)]))
    bench.send(Tick(now_ns=bench.clock.now_ns()))
    assert bench.out[-1][1].ready, "root may be slow, but tokens came a moment ago"


# ------------------------------------------------------------------ refusals

CHAT = {"kind": "chat", "messages": b'[{"role":"user","content":"x"}]'}


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"sampling": SamplingParams(temperature=-1)}, 400, "invalid_value", "temperature"),
        ({"sampling": SamplingParams(logprobs=99)}, 400, "invalid_value", "logprobs"),
        ({"sampling": SamplingParams(stop=["x"] * 99)}, 400, "invalid_value", "stop"),
        ({"sampling": SamplingParams(stop=["x" * 5000])}, 400, "invalid_value", "stop"),
        ({"sampling": SamplingParams(allowed_token_ids=[100000])}, 400, "invalid_value", "allowed_token_ids[0]"),
        ({"sampling": SamplingParams(bad_words=[""])}, 400, "invalid_value", "bad_words"),
        ({"prompt_ids": i32([1, 512])}, 400, "invalid_value", "prompt[1]"),
        ({"prompt_ids": i32([-1])}, 400, "invalid_value", "prompt[0]"),
        ({"prompt_ids": i32([5, -1]), "prompt_name": "prompt[3]"}, 400, "invalid_value", "prompt[3][1]"),
        ({"prompt_ids": i32([])}, 400, "invalid_value", "prompt"),
        ({"text": ""}, 400, "invalid_value", "prompt"),
        ({"text": None}, 400, "invalid_value", "prompt"),
        ({"prompt_ids": i32([1] * 4096)}, 400, "context_length_exceeded", "prompt"),
        ({"text": "a" * 200000}, 400, "context_length_exceeded", "prompt"),
        ({"prompt_ids": i32([1] * 4097), "sampling": SamplingParams(max_tokens=0)}, 400, "context_length_exceeded", "prompt"),
        (
            {"prompt_ids": i32([1] * 90), "sampling": SamplingParams(max_tokens=4007), "explicit": ["max_tokens"]},
            400,
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            {
                **CHAT,
                "sampling": SamplingParams(max_tokens=4096),
                "explicit": ["max_tokens"],
                "names": {"max_tokens": "max_completion_tokens"},
            },
            400,
            "context_length_exceeded",
            "max_completion_tokens",
        ),
        ({"truncate_prompt_tokens": 0}, 400, "invalid_value", "truncate_prompt_tokens"),
        ({"kind": "chat"}, 400, "invalid_value", "messages"),
        ({"kind": "chat", "messages": b"[]"}, 400, "invalid_value", "messages"),
        ({"kind": "chat", "messages": b"{"}, 400, "invalid_value", "messages"),
        ({"kind": "chat", "messages": b'[{"content":"x"}]'}, 400, "invalid_value", "messages"),
        ({"kind": "chat", "messages": b'[{"role":"user","content":[{"type":"image_url"}]}]'}, 400, "unsupported_feature", "messages"),
        ({**CHAT, "tools": b'{"a":1}'}, 400, "invalid_value", "tools"),
        ({**CHAT, "template_kwargs": b"[]"}, 400, "invalid_value", "chat_template_kwargs"),
        ({**CHAT, "continue_final_message": True}, 400, "invalid_value", "continue_final_message"),
    ],
)
def test_every_refusal_names_its_field(bench: Any, changes: dict[str, Any], status: int, code: str, param: str) -> None:
    text = changes.pop("text", "the water")
    bench.submit(1, text, **changes)
    refused = bench.rejected[1]
    assert (refused.status, refused.code, refused.param) == (status, code, param)
    assert refused.type == "invalid_request_error"
    assert len(refused.message) > 10
    assert bench.engine == []
    assert bench.actor.ledger.requests == {}
    assert (bench.actor.admission.requests, bench.actor.admission.tokens) == (0, 0)
    assert bench.actor.metrics.value("requests_rejected", code) == 1


def test_context_errors_hold_the_numbers(bench: Any) -> None:
    bench.submit(1, prompt_ids=i32([1] * 5000))
    assert "4096" in bench.rejected[1].message
    assert "5000" in bench.rejected[1].message


def test_a_key_in_use_is_refused_and_its_owner_lives(bench: Any) -> None:
    bench.submit(1)
    out = bench.submit(1)
    assert [type(m) for m in out] == [Rejected]
    bench.scripts[seq_of(1, 0)] = ids_of(bench, "ab")
    bench.run()
    assert bench.received[1, 0].text == "ab"


def test_an_error_of_our_own_fails_one_request(bench: Any) -> None:
    from penstock.core.protocol.messages import Submit

    submit = Submit(key=9, edge=0, rid="r", kind="completion", model="trained", sampling=SamplingParams(), prompt="x")
    [out] = bench.actor.failed(submit, RuntimeError("boom"))
    assert (out.message.status, out.message.code, out.index) == (500, "internal_error", 0)
    with pytest.raises(RuntimeError):
        list(bench.actor.failed(Tick(now_ns=0), RuntimeError("boom")))


# ------------------------------------------------------------------ cost


def test_the_work_of_a_step_does_not_grow_with_the_output(bench: Any) -> None:
    """Python-level calls and lines of one step, at 100 tokens and at 64k."""
    import gc
    import sys

    for key, stream in ((1, True), (2, False)):
        bench.submit(key, stream=stream, sampling=SamplingParams(ignore_eos=True))
    bench.submit(3, sampling=SamplingParams(stop=["zq", "qz"], ignore_eos=True))
    seqs = [seq_of(key, 0) for key in (1, 2, 3)]
    token = ids_of(bench, "a")[0]
    ledger = bench.actor.ledger
    bench.rows([(s, 0, 0, token, RUNNING) for s in seqs], started=[(s, 0) for s in seqs])

    def events(offset: int) -> int:
        count = 0

        def tracer(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            count += 1
            return tracer

        gc.disable()  # what others left behind is finalised another time
        sys.settrace(tracer)
        try:
            bench.rows([(s, 0, offset, token, RUNNING) for s in seqs])
        finally:
            sys.settrace(None)
            gc.enable()
        return count

    early = events(1)
    for choice in ledger.choices.values():
        grown = 65536 - len(choice.outputs)
        choice.outputs.extend([token] * grown)
        if choice.request.stream:
            choice.sent = choice.undecoded = len(choice.outputs)
    for key in (1, 3):
        bench.received[key, 0].tokens = [token] * 65536
    assert events(65536) == early
