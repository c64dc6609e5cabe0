"""What must never reach an engine, and what must never stay behind: ids that the model does not have, settings that leave nothing to draw,
tokenizers that fail."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.actors.text.resolve import drawable, nothing_left
from penstock.core.actors.text.told import Tellers
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import FAILED, RUNNING, Abort, Admit, Drain, Drained, Submit, seq_of
from penstock.core.protocol.sampling import MOST_PROMPT_LOGPROBS, SamplingParams
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

ADDED = "<tool call>"
"""The tokenizer's last token."""


class Log:
    """structlog's face, remembering warnings."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.warnings.append((event, fields))

    def info(self, event: str, **fields: Any) -> None: ...

    def debug(self, event: str, **fields: Any) -> None: ...


class Other:
    """A tokenizer with some attributes of its own."""

    def __init__(self, real: Any, **changes: Any) -> None:
        self._real = real
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def nothing_stays(bench: Any) -> None:
    """Neither in the ledger nor in admission; and a drain ends."""
    assert not bench.actor.ledger.requests
    assert not bench.actor.ledger.choices
    assert (bench.actor.admission.requests, bench.actor.admission.tokens) == (0, 0)
    bench.send(Drain(deadline_s=60))
    assert any(isinstance(m, Drained) for _, m in bench.out)


# ------------------------------------------------------------------ ids that the model does not have


def test_end_tokens_that_cannot_be_drawn_are_dropped_with_one_warning(make_bench: Any, tokenizer: Any) -> None:
    log = Log()
    bench = make_bench(with_tokenizer=Other(tokenizer, eos_ids=[3, 512, -1, 2**40, 1, 3]), log=log)
    bench.up()
    bench.submit(1, sampling=SamplingParams(min_tokens=1))
    [admit] = [m for m in bench.engine if isinstance(m, Admit)]
    assert admit.eos.tolist() == [3, 1]
    [(event, fields)] = log.warnings
    assert "end tokens" in event
    assert fields == {"ids": [512, -1, 2**40], "vocab_size": 512}


def test_no_warning_where_nothing_is_wrong(make_bench: Any) -> None:
    log = Log()
    make_bench(log=log)
    assert log.warnings == []


@given(st.lists(st.integers(-(2**70), 2**70)), st.integers(1, 600))
def test_drawable_splits_without_loss(ids: list[int], vocab_size: int) -> None:
    known, unknown = drawable(ids, vocab_size)
    assert known.dtype == np.int32
    assert sorted([*known.tolist(), *unknown]) == sorted(set(ids))
    assert all(0 <= token < vocab_size for token in known.tolist())
    assert not any(0 <= token < vocab_size for token in unknown)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"text": f"x {ADDED} y"}, "prompt"),
        ({"text": ADDED, "prompt_name": "prompt[3]"}, "prompt[3]"),
        ({"kind": "chat", "messages": json.dumps([{"role": "user", "content": ADDED}]).encode()}, "messages"),
        ({"sampling": SamplingParams(bad_words=["x", ADDED])}, "bad_words"),
        ({"sampling": SamplingParams(stop_token_ids=[-1])}, "stop_token_ids[0]"),
        ({"sampling": SamplingParams(logit_bias={420: 1.0})}, "logit_bias"),
        ({"prompt_ids": i32([3, 420])}, "prompt[1]"),
    ],
)
def test_a_token_that_the_model_does_not_have_is_the_clients_error(
    make_bench: Any, tokenizer: Any, changes: dict[str, Any], param: str
) -> None:
    assert tokenizer.vocab_size == 421
    bench = make_bench(up=False)
    bench.up(vocab_size=420)
    bench.submit(1, **changes)
    error = bench.rejected[1]
    assert (error.status, error.code) == (400, "invalid_value")
    assert error.param is not None
    assert error.param.startswith(param)
    assert not bench.engine
    nothing_stays(bench)


def test_the_error_names_the_token_as_the_client_spelled_it(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(vocab_size=420)
    bench.submit(1, f"x {ADDED} y")
    assert ADDED in bench.rejected[1].message
    assert "420" in bench.rejected[1].message


@pytest.mark.parametrize("value", [True, "2", 2.0, [1, None], {"id": 2}])
def test_an_end_token_in_a_file_must_be_an_id(tmp_path: Any, tokenizer: Any, value: Any) -> None:
    from penstock.core.protocol.errors import CheckpointError

    tokenizer._fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        HuggingFaceTokenizer.load(str(tmp_path))


# ------------------------------------------------------------------ settings that leave nothing to draw


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        (SamplingParams(allowed_token_ids=[3], min_tokens=1), ["allowed_token_ids", "min_tokens"]),
        (SamplingParams(allowed_token_ids=[1, 3], min_tokens=2), ["allowed_token_ids", "min_tokens"]),
        (SamplingParams(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=1, ignore_eos=True), ["allowed_token_ids", "min_tokens"]),
        (SamplingParams(allowed_token_ids=[7, 9], bad_words_token_ids=[[7], [9]]), ["allowed_token_ids", "bad_words"]),
        (
            SamplingParams(allowed_token_ids=[7, 3], bad_words_token_ids=[[7]], min_tokens=1),
            ["allowed_token_ids", "bad_words", "min_tokens"],
        ),
        (SamplingParams(bad_words_token_ids=[[token] for token in range(512)]), ["bad_words"]),
    ],
)
def test_settings_that_leave_no_token_are_refused_by_name(bench: Any, sampling: SamplingParams, names: list[str]) -> None:
    bench.submit(1, sampling=sampling)
    error = bench.rejected[1]
    assert (error.status, error.code, error.param) == (400, "invalid_value", names[0])
    assert all(name in error.message for name in names)
    assert not bench.engine
    nothing_stays(bench)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(allowed_token_ids=[3]),
        SamplingParams(allowed_token_ids=[3], min_tokens=1, ignore_eos=True),
        SamplingParams(allowed_token_ids=[3, 7], min_tokens=1),
        SamplingParams(allowed_token_ids=[7], bad_words_token_ids=[[7, 7]]),
        SamplingParams(allowed_token_ids=[3], min_tokens=0, max_tokens=0),
    ],
)
def test_settings_that_leave_a_token_are_not(bench: Any, sampling: SamplingParams) -> None:
    bench.submit(1, sampling=sampling)
    assert not bench.rejected
    assert len(bench.engine) == 1


def test_settings_that_leave_nothing_later_are_blamed_and_neighbours_go_on(bench: Any) -> None:
    """Two 7s in a row are forbidden and nothing else is allowed: the second draw has nothing to take."""
    bench.submit(1, "the water", sampling=SamplingParams(allowed_token_ids=[7], bad_words_token_ids=[[7, 7]], n=2))
    bench.submit(2)
    first, second, other = seq_of(1, 0), seq_of(1, 1), seq_of(2, 0)
    bench.rows([(first, 0, 0, 7, RUNNING), (second, 0, 0, 7, RUNNING), (other, 0, 0, 9, RUNNING)])
    bench.rows([(first, 0, 1, -1, FAILED), (other, 0, 1, 9, RUNNING)], errors=["The model's output for this sequence is not a number."])
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error_code) == ("error", "invalid_value")
    assert "allowed_token_ids and bad_words leave no token" in got.extras[-1].error
    assert "after 1 tokens" in got.extras[-1].error
    assert not bench.received[1, 1].reason
    assert bench.received[2, 0].tokens == [9, 9]


def test_what_is_not_a_number_is_the_models_fault(bench: Any) -> None:
    bench.submit(1, "the water", sampling=SamplingParams(allowed_token_ids=[7, 8], bad_words_token_ids=[[7, 7]]))
    bench.rows([(seq_of(1, 0), 0, 0, -1, FAILED)], errors=["The model's output for this sequence is not a number."])
    assert bench.received[1, 0].extras[-1].error_code == "engine_failure"


@given(data=st.data())
def test_nothing_left_agrees_with_the_masks_themselves(data: st.DataObject) -> None:
    """Against the sampler's own steps on a row of logits (kernels' reference), over small vocabularies."""
    from penstock.kernels.sampling.reference import bad_word_ends

    vocab = data.draw(st.integers(1, 5))
    token = st.integers(0, vocab - 1)
    params = SamplingParams(
        allowed_token_ids=data.draw(st.none() | st.lists(token, min_size=1, max_size=3)),
        bad_words_token_ids=data.draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4)),
        stop_token_ids=data.draw(st.lists(token, max_size=3)),
        min_tokens=data.draw(st.integers(0, 2)),
        ignore_eos=data.draw(st.booleans()),
    )
    eos = data.draw(st.lists(token, max_size=2, unique=True))
    history = data.draw(st.lists(token, min_size=1, max_size=5))
    outputs = data.draw(st.integers(0, len(history) - 1))
    left = set(range(vocab)) if params.allowed_token_ids is None else set(params.allowed_token_ids)
    left -= set(bad_word_ends(history, params.bad_words_token_ids))
    if outputs < params.min_tokens:
        left -= {*params.stop_token_ids, *([] if params.ignore_eos else eos)}
    assert bool(nothing_left(params, i32(eos), vocab, i32(history), outputs)) is not bool(left)


# ------------------------------------------------------------------ tokenizers that fail


def test_a_tokenizer_that_fails_at_admission_leaves_nothing(make_bench: Any, tokenizer: Any) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise AttributeError("no such thing")

    bench = make_bench(with_tokenizer=Other(tokenizer, token_text=broken), up=False)
    bench.up(vocab_size=420)
    bench.submit(1, ADDED)
    assert (bench.rejected[1].status, bench.rejected[1].code) == (500, "internal_error")
    bench.submit(2, "the water")
    assert 2 not in bench.rejected
    bench.scripts[seq_of(2, 0)] = [4]
    bench.run()
    nothing_stays(bench)


def test_a_submit_that_fails_after_it_was_entered_leaves_nothing(bench: Any) -> None:
    """As the host does it: the handler raised somewhere, `failed` has the rest."""
    from penstock.core.protocol.messages import Submit

    submits: list[Submit] = []
    real = bench.actor.handle

    def handle(message: Any) -> Any:
        if isinstance(message, Submit):
            submits.append(message)
        return real(message)

    bench.actor.handle = handle
    bench.hold_encodes = True
    bench.submit(1)
    bench.hold_encodes = False
    bench.submit(2)
    bench.scripts[seq_of(2, 0)] = [4, 5]
    bench.step()
    for submit in submits:
        for out in bench.actor.failed(submit, RuntimeError("x")):
            bench._take(out.message if hasattr(out, "message") else out)
    assert bench.rejected[1].status == 500, "still with the tokenizer"
    assert bench.received[2, 0].reason == "error", "already running"
    assert any(isinstance(m, Abort) and m.seqs.tolist() == [seq_of(2, 0)] for m in bench.engine)
    bench.release()
    nothing_stays(bench)


def test_a_decoder_that_fails_ends_its_own_answer(make_bench: Any, pieces: Any) -> None:
    def decode(ids: list[int], *, skip_special_tokens: bool) -> str:
        if 13 in ids:
            raise ValueError("13 is unlucky")
        return str(pieces.decode(ids, skip_special_tokens=skip_special_tokens))

    bench = make_bench(with_tokenizer=Other(pieces, decode=decode))
    bench.submit(1)
    bench.submit(2)
    bench.scripts[seq_of(1, 0)] = [20, 13, 21, 22]
    bench.scripts[seq_of(2, 0)] = [20, 21, 22, 23]
    bench.run()
    got = bench.received[1, 0]
    assert (got.reason, got.extras[-1].error_code) == ("error", "internal_error")
    assert "13 is unlucky" in got.extras[-1].error
    assert bench.received[2, 0].tokens == [20, 21, 22, 23]
    assert any(isinstance(m, Abort) and m.seqs.tolist() == [seq_of(1, 0)] for m in bench.engine)
    nothing_stays(bench)


@pytest.mark.parametrize(
    ("kind", "n", "names", "param"),
    [
        ("completion", 64, {}, "prompt_logprobs"),
        ("completion", 64, {"prompt_logprobs": "logprobs"}, "logprobs"),
        ("completion", 1, {}, None),
    ],
)
def test_more_log_probabilities_of_a_prompt_than_can_be_told(
    make_bench: Any, kind: str, n: int, names: dict[str, str], param: str | None
) -> None:
    """A reply of hundreds of megabytes, by a small request."""
    bench = make_bench(up=False)
    bench.up(max_model_len=2048, num_blocks=4096)
    ids = i32([1] * 1000)
    bench.submit(1, None, kind=kind, prompt_ids=ids, sampling=SamplingParams(n=n, max_tokens=1, prompt_logprobs=20), names=names)
    if param is None:
        assert not bench.rejected
    else:
        refused = bench.rejected[1]
        assert (refused.status, refused.param) == (400, param)
        assert f"{1000 * 21 * 64}" in refused.message


def _asks(bench: Any, key: int, tokens: int, n: int = 1, **changes: Any) -> None:
    sampling = SamplingParams(n=n, max_tokens=1, prompt_logprobs=20)
    bench.submit(key, None, prompt_ids=i32([1] * tokens), sampling=sampling, prompt_name=f"prompt[{key}]", **changes)


def test_prompts_of_one_reply_share_the_bound_of_what_is_told(make_bench: Any) -> None:
    """Each is fair; the third is one too many, by name. Other requests have bounds of their own."""
    bench = make_bench(up=False)
    bench.up(max_model_len=2048, num_blocks=4096)
    for key in (1, 2, 3):
        _asks(bench, key, 1500, n=12, group=1)
    _asks(bench, 4, 1500, n=12, group=4)
    _asks(bench, 5, 1500, n=12)
    assert list(bench.rejected) == [3]
    refused = bench.rejected[3]
    assert (refused.status, refused.param) == (400, "prompt_logprobs")
    assert f"of 3 prompts of 4500 tokens together for 12 answers are {4500 * 21 * 12} log-probabilities" in refused.message
    assert "send fewer prompts" in refused.message


def test_texts_are_counted_in_tokens_once_they_are_tokens(make_bench: Any) -> None:
    """Letters of many bytes and few tokens: counted by bytes they would be too many."""
    bench = make_bench(up=False)
    bench.up(max_model_len=2048, num_blocks=4096)
    text = "the water " * 100
    assert len(text) * 8 * 21 * 8 > MOST_PROMPT_LOGPROBS
    for key in range(1, 9):
        bench.submit(key, text, sampling=SamplingParams(n=8, max_tokens=1, prompt_logprobs=20), group=1)
    assert not bench.rejected


def test_what_is_told_once_counts_once_and_what_is_not_told_has_no_bound(make_bench: Any) -> None:
    bench = make_bench(up=False)
    bench.up(max_model_len=2048, num_blocks=4096)
    _asks(bench, 1, 1500, n=64, tells=1)
    _asks(bench, 2, 1500, n=64, tells=0)
    assert not bench.rejected
    _asks(bench, 3, 1500, n=64, tells=40)
    assert list(bench.rejected) == [3]


def test_the_count_of_a_reply_goes_with_its_prompts() -> None:
    tellers = Tellers()
    submit = Submit(key=7, edge=0, rid="r", kind="completion", model="", sampling=SamplingParams(), group=7)
    told = tellers.of(submit)
    assert tellers.of(msgspec.structs.replace(submit, key=8)) is told
    assert tellers.of(msgspec.structs.replace(submit, edge=1)) is not told
    del told
    assert not tellers._told
