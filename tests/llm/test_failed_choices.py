"""How a request ends in Python when choices of it failed, or it never started: whose fault it was decides the error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from penstock import LLM, SamplingParams
from penstock.core.protocol.columns import i32, i64
from penstock.core.protocol.errors import ContextLengthExceeded, EngineFailure, InvalidRequest, PenstockError
from penstock.core.protocol.messages import Finished, Rejected, RowExtra, Submit, TextDelta
from penstock.core.protocol.model_folder import demo_folder

SETTINGS = ("No token is left to draw: allowed_token_ids and min_tokens exclude each other.", "invalid_value")
ENGINE = ("The model's output for this sequence is not a number.", "engine_failure")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_cache_memory_bytes=64 << 20) as model:
        yield model


Answer = Callable[..., None]


@pytest.fixture
def answer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """The next request's choices end like this: with an (error, code), or well (None)."""

    def end_with(*ends: tuple[str, str | None] | None) -> None:
        def submit(message: Submit) -> None:
            zeros = i32([0] * len(ends))
            llm._deliver(
                TextDelta(
                    keys=i64([message.key] * len(ends)),
                    choices=i32(range(len(ends))),
                    texts=["fine" if end is None else "" for end in ends],
                    counts=i32([1 if end is None else 0 for end in ends]),
                    tokens=i32([5 for end in ends if end is None]),
                    prompt_tokens=zeros,
                    cached_tokens=zeros,
                    output_tokens=zeros,
                    reasons=["stop" if end is None else "error" for end in ends],
                    extras=[RowExtra(row=row, error=end[0], error_code=end[1]) for row, end in enumerate(ends) if end is not None],
                )
            )
            llm._deliver(Finished(key=message.key, prompt_tokens=1, output_tokens=1, cached_tokens=0))

        monkeypatch.setattr(llm._server, "submit", submit)

    return end_with


@pytest.mark.parametrize("n", [1, 3])
def test_settings_that_failed_every_choice_are_the_callers_mistake(llm: LLM, answer: Answer, n: int) -> None:
    answer(*[SETTINGS] * n)
    for call in (lambda: llm.generate("x", SamplingParams(n=n)), lambda: list(llm.stream_sync("x", SamplingParams(n=n)))):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert (caught.value.message, caught.value.code) == SETTINGS


def test_the_choices_that_went_well_are_kept(llm: LLM, answer: Answer) -> None:
    answer(None, SETTINGS)
    (out,) = llm.generate("x", SamplingParams(n=2))
    assert out.finished
    assert [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in out.outputs] == [
        ("fine", [5], "stop", None),
        ("", [], "error", SETTINGS[0]),
    ]


@pytest.mark.parametrize("ends", [[ENGINE], [None, ENGINE], [SETTINGS, ENGINE], [("The engine failed.", None)]])
def test_a_failure_of_the_engine_is_no_mistake_of_the_caller(llm: LLM, answer: Answer, ends: list[Any]) -> None:
    answer(*ends)
    with pytest.raises(EngineFailure) as caught:
        llm.generate("x", SamplingParams(n=len(ends)))
    assert ends[-1][0] in caught.value.message
    assert not caught.value.message.endswith("..")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_value", InvalidRequest),
        (400, "context_length_exceeded", ContextLengthExceeded),
        (404, "model_not_found", InvalidRequest),
        (413, "request_too_large", InvalidRequest),
        (429, "queue_full", EngineFailure),
        (503, "engine_unavailable", EngineFailure),
    ],
)
def test_a_refusal_is_the_callers_where_http_says_so(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind: type[PenstockError]
) -> None:
    def submit(message: Submit) -> None:
        llm._deliver(Rejected(key=message.key, status=status, type="t", code=code, message="No.", param="prompt"))

    monkeypatch.setattr(llm._server, "submit", submit)
    with pytest.raises(kind) as caught:
        llm.generate("x")
    if kind is not EngineFailure:
        assert (caught.value.code, caught.value.param) == (code, "prompt")


def test_a_conversation_gets_no_tokens_that_its_template_does_not_write(tmp_path: Path) -> None:
    """As over HTTP, and as `apply_chat_template` says: the tokenizer's own begin token is for plain texts."""
    folder = tmp_path / "begins"
    shutil.copytree(demo_folder(), folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}
    path.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast.save(str(folder / "tokenizer.json"))
    conversation = [{"role": "user", "content": "What is 2 + 2?"}]
    want = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(conversation, tokenize=True, return_dict=False)
    with LLM(str(folder), kv_cache_memory_bytes=64 << 20) as model:
        tokenizer = model.get_tokenizer()
        (out,) = model.chat(conversation, SamplingParams(max_tokens=1))
        (text,) = model.generate("What is 2 + 2?", SamplingParams(max_tokens=1))
        assert tokenizer.apply_chat_template(conversation) == want
    assert out.prompt_token_ids == want
    assert text.prompt_token_ids == [tokenizer.bos_token_id, *want]
