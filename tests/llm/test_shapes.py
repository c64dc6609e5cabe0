"""The Python API's shapes are vLLM's: log-probabilities and ranks as transformers computes them, and the tokenizer as transformers' is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock import LLM, SamplingParams
from penstock.core.protocol.errors import ConfigError, InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import TokenLogprobs
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.outputs import CompletionOutput, Logprob, by_token, prompt_positions

TEXTS = ["Hello there, what is 17 + 25?", "", " two  spaces\n", "Grüß Gott, 日本 🎉", "<|im_end|> inside"]
CONVERSATION: list[dict[str, str]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_cache_memory_bytes=64 << 20, deterministic=True, dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(str(demo_folder()))


# --- log-probabilities


@pytest.fixture(scope="module")
def truth() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(demo_folder()), dtype=torch.float32).eval()


def check(got: dict[int, Logprob], row: torch.Tensor, chosen: int, top: int) -> None:
    """`got` has the chosen token first, then the `top` most likely; all with the values and ranks of `row`."""
    best = row.topk(top).indices.tolist() if top else []
    assert list(got) == list(dict.fromkeys([chosen, *best]))
    for token, entry in got.items():
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert entry.rank == int((row > row[token]).sum()) + 1


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_and_ranks_are_those_of_transformers(llm: LLM, truth: Any, theirs: Any, top: int) -> None:
    params = SamplingParams(temperature=1.3, seed=5, max_tokens=12, logprobs=top, prompt_logprobs=top, ignore_eos=True, n=2)
    (out,) = llm.generate("The water flows", params)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    unlikely = 0
    for answer in out.outputs:
        ids = [*out.prompt_token_ids, *answer.token_ids]
        with torch.no_grad():
            rows = truth(torch.tensor([ids])).logits[0].log_softmax(-1)
        for i in range(1, len(out.prompt_token_ids)):
            position = out.prompt_logprobs[i]
            assert position is not None
            check(position, rows[i - 1], ids[i], top)
        assert answer.logprobs is not None
        for i, position in enumerate(answer.logprobs):
            check(position, rows[len(out.prompt_token_ids) + i - 1], answer.token_ids[i], top)
            drawn = position[answer.token_ids[i]]
            unlikely += drawn.rank != 1
            assert drawn.decoded_token == theirs.decode([answer.token_ids[i]])
        total = sum(position[token].logprob for position, token in zip(answer.logprobs, answer.token_ids, strict=True))
        assert answer.cumulative_logprob == pytest.approx(total)
    assert unlikely, "a test in which only the likeliest tokens are drawn shows no rank"


def test_without_asking_there_are_none(llm: LLM) -> None:
    (out,) = llm.generate("Hello", SamplingParams(max_tokens=2, temperature=0))
    assert (out.prompt_logprobs, out.outputs[0].logprobs, out.outputs[0].cumulative_logprob) == (None, None, None)


def test_positions_become_dictionaries_by_token() -> None:
    position = TokenLogprobs(ids=[7, 3, 7], logprobs=[-2.0, -0.5, -2.0], ranks=[2, 1, 2], texts=["b", "a", "b"], bytes_=[b"b", b"a", b"b"])
    assert by_token(position) == {7: Logprob(-2.0, 2, "b"), 3: Logprob(-0.5, 1, "a")}
    assert list(by_token(position)) == [7, 3]
    assert prompt_positions([None, position]) == [None, by_token(position)]
    output = CompletionOutput(index=0)
    output.add_logprobs([position])
    output.add_logprobs([TokenLogprobs(ids=[1], logprobs=[-math.inf], ranks=[9], texts=["c"], bytes_=[b"c"])])
    assert output.logprobs == [by_token(position), {1: Logprob(-math.inf, 9, "c")}]
    assert output.cumulative_logprob == -math.inf


# --- the tokenizer


def test_ids_and_texts_are_those_of_transformers(llm: LLM, theirs: Any) -> None:
    mine = llm.get_tokenizer()
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert mine.encode(text, add_special_tokens=special) == ids
            assert mine(text, add_special_tokens=special).input_ids == ids
        for skip in (True, False):
            assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert mine.tokenize(text) == theirs.tokenize(text)
    assert mine(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert mine(TEXTS)["attention_mask"] == theirs(TEXTS)["attention_mask"]
    assert mine.batch_decode(mine(TEXTS).input_ids) == TEXTS
    assert mine.decode(mine.encode("H")[-1]) == "H"
    assert llm.generate(TEXTS[0], SamplingParams(max_tokens=1))[0].prompt_token_ids == mine.encode(TEXTS[0])


def test_special_tokens_and_vocabulary_are_those_of_transformers(llm: LLM, theirs: Any) -> None:
    mine = llm.get_tokenizer()
    for name in ("eos_token", "bos_token", "pad_token", "unk_token"):
        assert (name, getattr(mine, name), getattr(mine, f"{name}_id")) == (name, getattr(theirs, name), getattr(theirs, f"{name}_id"))
    assert mine.get_vocab() == theirs.get_vocab()
    assert len(mine) == len(theirs)
    assert set(mine.all_special_ids) >= set(theirs.all_special_ids)
    tokens = theirs.convert_ids_to_tokens([5, 300, theirs.eos_token_id])
    assert mine.convert_ids_to_tokens([5, 300, theirs.eos_token_id]) == tokens
    assert mine.convert_tokens_to_ids(tokens) == [5, 300, theirs.eos_token_id]
    assert mine.convert_ids_to_tokens(5) == tokens[0]
    assert mine.convert_tokens_to_ids(tokens[0]) == 5
    assert mine.convert_tokens_to_ids("no such token at all") == theirs.convert_tokens_to_ids("no such token at all")


def test_chat_templates_are_applied_as_by_transformers(llm: LLM, theirs: Any) -> None:
    mine = llm.get_tokenizer()
    for generation in (True, False):
        text = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=generation)
        assert mine.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=generation) == text
        ids = theirs.encode(text, add_special_tokens=False)
        assert mine.apply_chat_template(CONVERSATION, add_generation_prompt=generation) == ids
        two = [CONVERSATION, CONVERSATION[:2]]
        assert mine.apply_chat_template(two, add_generation_prompt=generation)[0] == ids
    (out,) = llm.chat([CONVERSATION], SamplingParams(max_tokens=1))
    assert out.prompt_token_ids == mine.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    open_end = [*CONVERSATION, {"role": "assistant", "content": "It is"}]
    assert mine.apply_chat_template(open_end, tokenize=False, continue_final_message=True).endswith("It is")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda t: t.encode(5), "text"),
        (lambda t: t.encode("\ud800"), "text"),
        (lambda t: t(["x", 5]), "text[1]"),
        (lambda t: t(5), "text"),
        (lambda t: t.decode([1, 10**9]), "token_ids[1]"),
        (lambda t: t.decode(-1), "token_ids[0]"),
        (lambda t: t.decode(["x"]), "token_ids"),
        (lambda t: t.apply_chat_template([]), "conversation"),
        (lambda t: t.apply_chat_template([{"role": "zzz", "content": ""}]), "conversation[0].role"),
        (lambda t: t.apply_chat_template(CONVERSATION, chat_template="x"), "chat_template"),
        (lambda t: t.apply_chat_template(CONVERSATION, return_tensors="pt"), "return_tensors"),
    ],
)
def test_wrong_arguments_are_named(llm: LLM, call: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call(llm.get_tokenizer())
    assert caught.value.param == field


def test_encode_gives_ids_and_says_that_it_cannot_pool(llm: LLM, theirs: Any) -> None:
    assert llm.encode(TEXTS[0]) == theirs.encode(TEXTS[0])
    assert llm.encode(TEXTS) == theirs(TEXTS)["input_ids"]
    assert llm.encode(TEXTS[0], add_special_tokens=False) == theirs.encode(TEXTS[0], add_special_tokens=False)
    for more in ({"pooling_params": object()}, {"pooling_task": "embed"}):
        with pytest.raises(UnsupportedFeature, match="Pooling") as caught:
            llm.encode("x", **more)
        assert caught.value.param == next(iter(more))


# --- options that vLLM's scripts give


def test_options_of_vllm_are_taken_or_refused_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {
        "override_generation_config": {"temperature": 0.0, "max_new_tokens": 3},
        "default_chat_template_kwargs": {"enable_thinking": False},
        "tensor_parallel_size": 1,
        "tokenizer_mode": "auto",
        "disable_log_stats": True,
        "disable_custom_all_reduce": True,
        "compilation_config": {"mode": 3},
        "limit_mm_per_prompt": None,
    }
    with LLM(kv_cache_memory_bytes=64 << 20, **options) as model:
        assert model.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
        (mine,) = model.chat(CONVERSATION, SamplingParams(temperature=0.0, max_tokens=20))  # what is given in Python counts as a whole
        answers = {model.chat(CONVERSATION)[0].outputs[0].text for _ in range(4)}
        (out,) = model.chat(CONVERSATION)
    assert ["--compilation-config has no effect" in record.message for record in caplog.records if record.name == "penstock.config"] == [
        True
    ]
    assert answers == {out.outputs[0].text}
    assert (len(out.outputs[0].token_ids), out.outputs[0].finish_reason) == (3, "length")
    assert len(mine.outputs[0].token_ids) > 3
    with pytest.raises(ConfigError, match="tokenizer-mode slow is not supported"):
        LLM(tokenizer_mode="slow")
