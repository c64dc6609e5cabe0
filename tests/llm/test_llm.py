"""The Python API on the demo model: batches, chats, streams, errors, cancellation."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import LLM, GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from penstock.core.contract.hookspecs import WeightSourceSpec, hookimpl
from penstock.core.protocol.errors import ConfigError, ContextLengthExceeded, EngineFailure, InvalidRequest
from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.devices.cpu import CpuDevice

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_cache_memory_bytes=64 << 20, deterministic=True) as model:
        yield model


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_answers_one_and_many_in_order(llm: LLM) -> None:
    (one,) = llm.chat(question("What is 17 + 25?"), GREEDY)
    assert "42" in one.outputs[0].text
    assert one.finished
    assert one.outputs[0].finish_reason == "stop"
    many = llm.chat([question(f"What is {a} + 11?") for a in range(10, 50, 5)], GREEDY, use_tqdm=True)
    assert [str(a + 11) in o.outputs[0].text for a, o in zip(range(10, 50, 5), many, strict=True)] == [True] * 8


def test_generate_by_text_and_ids_with_own_params(llm: LLM) -> None:
    prompts = ["Penstock is", "Hello"]
    params = [
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=9, n=2, ignore_eos=True),
    ]
    a, b = llm.generate(prompts, params)
    assert (len(a.outputs[0].token_ids), [len(o.token_ids) for o in b.outputs]) == (5, [9, 9])
    again = llm.generate(prompt_token_ids=[a.prompt_token_ids, b.prompt_token_ids], sampling_params=params)
    assert [[o.text for o in r.outputs] for r in again] == [[o.text for o in r.outputs] for r in (a, b)]
    assert a.prompt == "Penstock is"


def test_streams_concatenate_to_the_batch_result(llm: LLM) -> None:
    (whole,) = llm.chat(question("Count from 2 to 9."), GREEDY)

    async def collect() -> tuple[str, list[int], list[str | None]]:
        text, ids, reasons = "", [], []
        async for delta in llm.stream(question("Count from 2 to 9."), GREEDY):
            text += delta.text
            ids += delta.token_ids
            reasons.append(delta.finish_reason)
        return text, ids, reasons

    text, ids, reasons = asyncio.run(collect())
    assert (text, ids) == (whole.outputs[0].text, whole.outputs[0].token_ids)
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) <= {None}
    assert "".join(d.text for d in llm.stream_sync(question("Count from 2 to 9."), GREEDY)) == text


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.stream_sync("Once", SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm._calls == {}
    assert "42" in llm.chat(question("What is 17 + 25?"), GREEDY)[0].outputs[0].text


def test_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    (out,) = llm.generate("Hello there", SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True))
    assert out.outputs[0].logprobs is not None
    assert len(out.outputs[0].logprobs) == 4
    assert all(next(iter(p)) == t for p, t in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True))
    assert out.prompt_logprobs is not None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    assert out.prompt_logprobs[0] is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-1), "temperature"),
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(stop_token_ids=[1, 10**6]), "stop_token_ids[1]"),
        (SamplingParams(bad_words_token_ids=[[1], [2, 10**30]]), "bad_words_token_ids[1][1]"),
        (SamplingParams(max_tokens=5000), "max_tokens"),
        (SamplingParams(logprobs=1000), "logprobs"),
    ],
)
def test_wrong_params_name_the_field(llm: LLM, params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate("x", params)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("ids", "field"),
    [
        ([[1], [2, 10**30]], "prompt_token_ids[1][1]"),
        ([[1], [2, 10**6]], "prompt_token_ids[1][1]"),
        ([[-1]], "prompt_token_ids[0][0]"),
        ([[1, "x"]], "prompt_token_ids[0][1]"),
    ],
)
def test_wrong_token_ids_are_named(llm: LLM, ids: list[list[Any]], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompt_token_ids=ids)
    assert caught.value.param == field


def test_every_shape_of_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    ids = llm.generate("Penstock is", GREEDY)[0].prompt_token_ids
    shapes: list[Any] = ["Penstock is", ids, tuple(ids), np.array(ids), {"prompt": "Penstock is"}, {"prompt_token_ids": ids}]
    shapes.append({"prompt": "Penstock is", "cache_salt": "of one's own"})
    alone = [llm.generate(shape, GREEDY) for shape in shapes]
    assert {len(outputs) for outputs in alone} == {1}
    together = llm.generate(shapes, GREEDY)
    outputs = [
        *(o for (o,) in alone),
        *together,
        *llm.generate(prompt_token_ids=ids, sampling_params=GREEDY),
        *llm.generate(np.array([ids]), GREEDY),
    ]
    assert {tuple(o.prompt_token_ids) for o in outputs} == {tuple(ids)}
    assert len({o.outputs[0].text for o in outputs}) == 1
    assert [o.prompt for o in together] == ["Penstock is", None, None, None, "Penstock is", None, "Penstock is"]
    assert "".join(d.text for d in llm.stream_sync({"prompt_token_ids": ids}, GREEDY)) == outputs[0].outputs[0].text
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        (b"bytes", "prompts"),
        (5, "prompts"),
        (["x", b"bytes"], "prompts[1]"),
        (["x", 5], "prompts[1]"),
        (["x", None], "prompts[1]"),
        ([5, "x"], "prompts[1]"),
        ([5, True], "prompts[1]"),
        ([5, 1.5], "prompts[1]"),
        ([[5, 6], []], "prompts[1]"),
        ([[5, 6], [7, "x"]], "prompts[1][1]"),
        ([[5, 6], [7, 10**6]], "prompts[1][1]"),
        ({"prompt_token_ids": [5, "x"]}, "prompts.prompt_token_ids[1]"),
        ({"prompt_token_ids": "x"}, "prompts.prompt_token_ids"),
        ({"prompt": [5]}, "prompts.prompt"),
        ({"promt": "x"}, "prompts"),
        ({"prompt": "x", "multi_modal_data": {}}, "prompts"),
        ({"prompt": "x", "cache_salt": ""}, "prompts.cache_salt"),
        ([{"prompt": "x", "cache_salt": 5}], "prompts[0].cache_salt"),
        ({"cache_salt": "x"}, "prompts"),
        (["x", {}], "prompts[1]"),
        ("half \ud800", "prompts"),
        (["x", "half \ud800"], "prompts[1]"),
        (["x", {"prompt": "half \udfff"}], "prompts[1].prompt"),
        (["x", ""], "prompts[1]"),
        (["x", "word " * 9000], "prompts[1]"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_prompts_are_named(llm: LLM, prompts: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompts, SamplingParams(max_tokens=1))
    assert caught.value.param == field
    assert field in caught.value.message or "prompt is empty" in caught.value.message or "characters" in caught.value.message
    assert "TextEncodeInput" not in caught.value.message


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": "x"}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ["\ud800"]}, "stop[0]"),
        ({"n": 1.5}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"bad_words": "word"}, "bad_words"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]"),
    ],
    ids=str,
)
def test_params_of_a_wrong_type_name_the_field(llm: LLM, params: dict[str, Any], field: str) -> None:
    given = SamplingParams(**params)
    for call in (lambda: llm.generate("x", given), lambda: llm.chat(question("x"), [given]), lambda: list(llm.stream_sync("x", given))):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.param == field
        assert field in caught.value.message
    with pytest.raises(InvalidRequest):
        llm.generate("x", {"temperature": 0})  # type: ignore[arg-type]


def test_params_may_be_written_as_for_vllm(llm: LLM) -> None:
    loose: Any = {"temperature": np.float32(0), "max_tokens": np.int64(24), "stop": "zzz", "stop_token_ids": None, "logit_bias": None}
    (got,) = llm.generate("Penstock is", SamplingParams(**loose))
    (want,) = llm.generate("Penstock is", SamplingParams(temperature=0, max_tokens=24, stop=["zzz"]))
    assert got.outputs[0].text == want.outputs[0].text


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1000.0},
        {"temperature": 1e-5},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"min_p": 1e-300},
        {"min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"frequency_penalty": 1e-300, "presence_penalty": -1e-300},
        {"frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"logit_bias": {5: 1e-300, 6: 100.0, 7: -100.0}},
        {"temperature": 1e-4, "repetition_penalty": 0.01, "frequency_penalty": 2.0, "logit_bias": {9: 100.0}},
    ],
    ids=str,
)
def test_settings_at_their_bounds_are_computed_without_a_warning(llm: LLM, extreme: dict[str, Any]) -> None:
    """Warnings are errors in these tests, and one in the engine would end it."""
    (got,) = llm.generate("The water", SamplingParams(max_tokens=8, ignore_eos=True, seed=1, **extreme))
    assert got.outputs[0].finish_reason == "length"
    assert len(got.outputs[0].token_ids) == 8


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "zzz", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([question("x"), [{"role": "zzz", "content": "x"}]], "messages[1][0].role"),
        ([{"role": "user", "content": "half \ud800"}], "messages"),
        ([question("x"), "text"], "messages[1]"),
        ([{"role": "user", "content": object()}], "messages"),
        ("text", "messages"),
        ([*question("x"), "y"], "messages[1]"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_conversations_are_named(llm: LLM, messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.chat(messages, GREEDY)
    assert caught.value.param == field
    if isinstance(messages[0], dict):
        with pytest.raises(InvalidRequest):
            next(llm.stream_sync(messages, GREEDY))


def test_histories_with_tool_calls_are_taken_as_clients_have_them(llm: LLM) -> None:
    short = SamplingParams(temperature=0, max_tokens=4)

    def prompt(*messages: dict[str, Any]) -> list[int]:
        (got,) = llm.chat([*question("Look."), *messages, *question("And?")], short)
        return got.prompt_token_ids

    def calls(arguments: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": arguments}}],
        }

    result = {"role": "tool", "content": "42", "tool_call_id": "c"}
    whole = prompt(calls('{"x": 1}'), result)
    assert whole == prompt(calls({"x": 1}), result)
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"x": 1}'}}
    assert whole == prompt(legacy, {"role": "function", "name": "look", "content": [{"type": "text", "text": "42"}]})
    cut = prompt(calls('{"x": "cut of'), result)
    assert cut not in (whole, prompt(calls("{}"), result))
    silent = prompt({"role": "assistant", "content": ""})
    assert silent == prompt({"role": "assistant", "content": None, "tool_calls": []})
    assert silent != prompt({"role": "assistant", "content": None, "refusal": "No."})
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content is required"):
        prompt({"role": "assistant"})


def test_a_stop_string_may_begin_before_min_tokens(llm: LLM) -> None:
    """The stop string is what the answer says around its sixth token, which is the first that may end it."""
    prompt, most = "Penstock is", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    pieces = [delta.text for delta in llm.stream_sync(prompt, most)]
    text, stop = "".join(pieces), (pieces[4] + pieces[5])[1:]
    assert text.find(stop) == text.rfind(stop) == len("".join(pieces[:4])) + 1
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop], min_tokens=5)
    (whole,) = llm.generate(prompt, params)
    assert (whole.outputs[0].text, whole.outputs[0].stop_reason) == (text[: text.find(stop)], stop)
    assert len(whole.outputs[0].token_ids) == 6
    assert "".join(delta.text for delta in llm.stream_sync(prompt, params)) == whole.outputs[0].text


@pytest.mark.parametrize("option", [{"port": 5}, {"api_key": ["x"]}, {"max_streams": 2}, {"max_num_queued_reqs": 4}])
def test_options_of_the_server_alone_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(**option)
    assert caught.value.param == next(iter(option))


def test_more_than_the_context_is_the_error_that_the_server_gives(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        llm.generate(prompt_token_ids=[[20] * 10], sampling_params=SamplingParams(max_tokens=4087))
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    assert "4096" in caught.value.message
    assert "4086" in caught.value.message


def test_prompt_logprobs_have_no_bound_in_python(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of replies over HTTP, which a server's other clients pay for."""
    monkeypatch.setattr("penstock.core.actors.text.told.MOST_PROMPT_LOGPROBS", 3)
    outs = llm.generate(["Hello there", "The water"], SamplingParams(temperature=0, max_tokens=1, n=2, prompt_logprobs=2))
    for out in outs:
        assert out.prompt_logprobs is not None
        assert len(out.prompt_logprobs) == len(out.prompt_token_ids)


def test_a_prompt_that_fills_the_context_can_be_scored(llm: LLM) -> None:
    ids = [20 + 7 * i % 300 for i in range(48)]
    (want,) = llm.generate(prompt_token_ids=[ids], sampling_params=SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1, n=2)
    with LLM(kv_cache_memory_bytes=64 << 20, deterministic=True, max_model_len=48) as short:
        (out,) = short.generate(prompt_token_ids=[ids], sampling_params=scoring)
        with pytest.raises(ContextLengthExceeded):
            short.generate(prompt_token_ids=[[*ids, 1]], sampling_params=scoring)
    assert [(o.text, o.token_ids, o.finish_reason) for o in out.outputs] == [("", [], "length")] * 2
    assert out.prompt_token_ids == ids
    assert out.prompt_logprobs == want.prompt_logprobs
    assert out.prompt_logprobs is not None
    assert [p is None for p in out.prompt_logprobs] == [True] + [False] * 47


def test_a_bad_prompt_cancels_the_rest_and_the_engine_lives(llm: LLM) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(["fine", "word " * 9000, "fine too"], GREEDY)
    with pytest.raises(InvalidRequest):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(InvalidRequest):
        llm.generate()
    assert len(llm.generate(["fine"], GREEDY)) == 1


def test_threads_share_one_engine(llm: LLM) -> None:
    want = {a: llm.chat(question(f"What is {a} + 9?"), GREEDY)[0].outputs[0].text for a in (12, 45, 70)}
    got: dict[int, str] = {}

    def ask(a: int) -> None:
        got[a] = llm.chat(question(f"What is {a} + 9?"), GREEDY)[0].outputs[0].text

    threads = [threading.Thread(target=ask, args=(a,)) for a in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_a_start_that_fails_raises_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        LLM("no-such-folder")
    with pytest.raises(ConfigError, match="max_num_seqz"):
        LLM(max_num_seqz=3)


def test_closing_ends_what_runs() -> None:
    model = LLM(kv_cache_memory_bytes=64 << 20)
    stream = model.stream_sync("Once", SamplingParams(max_tokens=3000, ignore_eos=True))
    next(stream)
    model.close()
    with pytest.raises(EngineFailure):
        list(stream)
    with pytest.raises(EngineFailure):
        model.generate("x", GREEDY)


@pytest.mark.slow
def test_both_wirings_and_both_modes_give_the_same_tokens() -> None:
    """A cell, a task for each actor, deterministic or not: greedy and seeded, batched, bit for bit (log-probabilities too)."""
    prompts = [f"Item {i}: " + "water " * (i * 7 % 40) for i in range(12)]
    params = [SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=20, logprobs=1, ignore_eos=True) for i in range(12)]

    def run(wiring: str, deterministic: bool, at_once: bool) -> list[object]:
        with LLM(kv_cache_memory_bytes=64 << 20, wiring=wiring, deterministic=deterministic) as model:
            if at_once:
                outputs = model.generate(prompts, params)
            else:
                outputs = [model.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
        return [
            (o.outputs[0].token_ids, [p[t].logprob for p, t in zip(o.outputs[0].logprobs or [], o.outputs[0].token_ids, strict=True)])
            for o in outputs
        ]

    want = run("cell", True, False)
    assert run("cell", True, True) == want
    assert run("tasks", True, True) == want
    assert run("cell", False, True) == want


def test_a_closed_engine_lets_go_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the closed one is still a variable when the next is loaded."""
    alive: list[weakref.ref[Any]] = []
    load = CpuDevice.load

    def seen(self: CpuDevice, *args: Any) -> Any:
        runner = load(self, *args)
        alive.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(CpuDevice, "load", seen)
    with LLM(device="cpu", max_model_len=64) as llm:
        llm.generate("1 + 1 =", SamplingParams(max_tokens=2, temperature=0.0))
        assert alive[0]() is not None
    gc.collect()
    assert alive[0]() is None
    llm.close()


def test_a_plugins_load_format(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model with its weights in another file, which only a plugin reads."""
    shutil.copytree(demo_folder(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.mine")
    module = types.ModuleType("reader_of_mine")

    @hookimpl
    def register_weight_sources() -> list[WeightSourceSpec]:
        return [WeightSourceSpec(name="mine", api_level=1, load_formats=["mine"], factory=Mine)]

    vars(module)["register_weight_sources"] = register_weight_sources
    monkeypatch.setitem(sys.modules, module.__name__, module)
    right = [o.outputs[0].token_ids for o in llm.generate("Penstock is", GREEDY)]
    with LLM(str(tmp_path), load_format="mine", extra_plugins=[module.__name__], kv_cache_memory_bytes=64 << 20) as other:
        assert [o.outputs[0].token_ids for o in other.generate("Penstock is", GREEDY)] == right
    with pytest.raises(ConfigError, match="--load-format mine: no plugin serves it"):
        LLM(str(tmp_path), load_format="mine")


class Mine:
    """See plugins/models/api.py: Weights."""

    def __init__(self, path: str, load_format: str, *, dtype: Any, **_: Any) -> None:
        from safetensors.torch import load_file

        assert load_format == "mine"
        self.named, self.dtype = load_file(Path(path) / "model.mine"), dtype

    def take(self, name: str, shape: Any) -> Any:
        return self.named.pop(name).to(self.dtype).reshape(shape)

    def ignore(self, *names: str) -> None:
        pass

    def finish(self) -> None:
        assert not self.named


# ------------------------------------------------------------------ tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_calls_are_text_unless_they_are_split(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    talk = question("What is the weather in Oslo?")
    (plain,) = llm.chat(talk, params, tools=[WEATHER])
    assert "<tool_call>" in plain.outputs[0].text
    assert (plain.outputs[0].tool_calls, plain.outputs[0].finish_reason) == ([], "stop")
    (split,) = llm.chat(talk, params, tools=[WEATHER], split=True)
    (call,) = split.outputs[0].tool_calls
    assert (call.name, json.loads(call.arguments), split.outputs[0].text) == ("get_weather", {"city": "Oslo"}, "")
    assert split.outputs[0].finish_reason == "tool_calls"
    assert split.outputs[0].token_ids == plain.outputs[0].token_ids
    deltas = list(llm.stream_sync(talk, params, tools=[WEATHER], split=True))
    assert "".join(delta.text for delta in deltas if delta.channel == "arguments") == call.arguments
    assert [delta.text for delta in deltas if delta.channel == "name"] == ["get_weather"]
    assert {delta.call for delta in deltas if delta.text} == {0}
    assert sum(delta.channel == "done" for delta in deltas) == 1
    assert [token for delta in deltas for token in delta.token_ids] == split.outputs[0].token_ids


def test_tools_of_a_model_whose_format_is_off_are_refused_only_where_they_are_to_be_split() -> None:
    with LLM(kv_cache_memory_bytes=64 << 20, tool_call_parser="none") as other:
        with pytest.raises(InvalidRequest, match="--tool-call-parser"):
            other.chat(question("x"), GREEDY, tools=[WEATHER], split=True)
        (plain,) = other.chat(question("What is the weather in Oslo?"), GREEDY, tools=[WEATHER])
        assert "get_weather" in plain.outputs[0].text


# ------------------------------------------------------------------ what an answer obeys

TIME: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["CET", "UTC"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        (StructuredOutputsParams(choice=["left", "right"]), "left|right"),
        (StructuredOutputsParams(regex="[0-9]{3}"), "[0-9]{3}"),
        (StructuredOutputsParams(json={"type": "boolean"}), "true|false"),
        (StructuredOutputsParams(grammar='root ::= "x" [0-9]'), "x[0-9]"),
        ({"json": '{"enum": [1, 2]}'}, "1|2"),
    ],
)
def test_answers_obey(llm: LLM, params: Any, pattern: str) -> None:
    for name in ("structured_outputs", "guided_decoding"):
        asked = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=30, **{name: params})
        for output in (llm.generate("Go", asked)[0], llm.chat(question("Hello!"), asked)[0]):
            for choice in output.outputs:
                assert re.fullmatch(pattern, choice.text)
                assert choice.finish_reason == "stop"
    assert GuidedDecodingParams is StructuredOutputsParams


def test_calls_that_are_asked_for(llm: LLM) -> None:
    asked = SamplingParams(temperature=0, max_tokens=80)
    for choice, reason in (("required", "tool_calls"), ({"type": "function", "function": {"name": "get_time"}}, "stop")):
        (output,) = llm.chat(question("Hello!"), asked, tools=[TIME], tool_choice=choice, parallel_tool_calls=False)
        (call,) = output.outputs[0].tool_calls
        assert (call.name, output.outputs[0].text, output.outputs[0].finish_reason) == ("get_time", "", reason)
        assert json.loads(call.arguments)["zone"] in ("CET", "UTC")
        deltas = list(llm.stream_sync(question("Hello!"), asked, tools=[TIME], tool_choice=choice))
        assert "".join(delta.text for delta in deltas if delta.channel == "arguments").startswith(call.arguments)
    (none,) = llm.chat(question("Hello!"), asked, tools=[TIME], tool_choice="none")
    assert (none.prompt_token_ids, none.outputs[0].tool_calls) == (llm.chat(question("Hello!"), asked)[0].prompt_token_ids, [])
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {"type": "boolean"}, "end": "</f>"}]}
    free = SamplingParams(temperature=0, max_tokens=80, structured_outputs=StructuredOutputsParams(structural_tag=tag))
    assert llm.chat(question("Hello!"), free)[0].outputs[0].text == llm.chat(question("Hello!"), asked)[0].outputs[0].text


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        ({"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))}, "structured_outputs.regex"),
        ({"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams(regex="a", json={}))}, "structured_outputs.regex"),
        ({"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams())}, "structured_outputs"),
        ({"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams(regex=""))}, "structured_outputs.regex"),
        ({"sampling_params": SamplingParams(structured_outputs=StructuredOutputsParams(choice=[]))}, "structured_outputs.choice"),
        ({"sampling_params": SamplingParams(guided_decoding=StructuredOutputsParams(json={"not": {}}))}, "guided_decoding.json"),
        ({"sampling_params": SamplingParams(structured_outputs=5)}, "structured_outputs"),  # type: ignore[arg-type]
        ({"sampling_params": SamplingParams(structured_outputs={"whitespace": 1})}, "structured_outputs"),  # type: ignore[arg-type]
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"name": "f"}], "tool_choice": "required"}, "tools"),
    ],
)
def test_what_cannot_be_obeyed_is_told(llm: LLM, ask: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        llm.chat(question("Hello!"), **ask)
    assert raised.value.param == param
