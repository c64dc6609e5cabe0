"""The request schema: what is understood, what is refused and under which name, what is ignored."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.contract.layouts import Chain, Obey, Tag, Tags, Text, encode
from penstock.core.protocol import config as configuration
from penstock.core.protocol.errors import InvalidRequest, PenstockError, RequestTooLarge, UnsupportedFeature
from penstock.core.protocol.messages import Grammar
from penstock.core.protocol.wording import squash
from penstock.transports import openai_schema
from penstock.transports.openai import Call, parse_chat, parse_completion
from penstock.transports.openai_schema import (
    REFUSED,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    DetokenizeRequest,
    FunctionCall,
    FunctionSpec,
    JsonSchema,
    MetadataRequest,
    ResponseFormat,
    StreamOptions,
    Structure,
    StructuredOutputs,
    TokenizeRequest,
    Tool,
    ToolCall,
    decode,
)
from penstock.transports.refused import GENERATION, MESSAGE_FIELDS, PROMPT
from penstock.transports.request import ignored_header

CONFIG = configuration.build()
CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "brook", "prompt": "hi"}

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]}
TEXT_OF_SCHEMA = msgspec.json.encode(SCHEMA).decode()
TAG: dict[str, Any] = {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}
XTAG: dict[str, Any] = {"begin": "<x>", "content": {"type": "regex", "pattern": "a"}, "end": "!"}


def chat(**fields: Any) -> Call:
    return parse_chat(msgspec.json.encode(CHAT | fields), CONFIG)


def completion(**fields: Any) -> Call:
    return parse_completion(msgspec.json.encode(TEXT | fields), CONFIG)


def refusal(parse: Any, body: Any) -> PenstockError:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    with pytest.raises(PenstockError) as caught:
        parse(data, CONFIG)
    return caught.value


def test_defaults() -> None:
    call = chat()
    assert call.sampling.max_tokens is None
    assert call.explicit == []
    assert msgspec.json.decode(call.prompts[0]["messages"]) == CHAT["messages"]
    assert (call.prompts[0]["add_generation_prompt"], call.add_special_tokens) == (True, False)
    assert completion().sampling.max_tokens == 16
    assert completion().explicit == []
    assert completion().add_special_tokens is True


def test_nulls_mean_not_given() -> None:
    call = chat(temperature=None, stop=None, seed=None, tools=None, logit_bias=None, n=None, response_format=None, stream_options=None)
    assert call.explicit == []


WHOLE: dict[type[msgspec.Struct], dict[str, Any]] = {
    ChatMessage: {"role": "assistant", "content": "a"},
    ContentPart: {"type": "text", "text": "a"},
    ToolCall: {"function": {"name": "f"}},
    FunctionCall: {"name": "f"},
    Tool: {"function": {"name": "f"}},
    FunctionSpec: {"name": "f"},
    StreamOptions: {},
    ChatRequest: CHAT,
    CompletionRequest: TEXT,
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
    MetadataRequest: {"metadata": {}},
    ResponseFormat: {"type": "text"},
    Structure: {"begin": "a", "end": "b"},
    JsonSchema: {},
    StructuredOutputs: {},
}


@pytest.mark.parametrize("kind", list(WHOLE))
def test_null_is_taken_wherever_a_field_may_be_left_out(kind: Any) -> None:
    for field in msgspec.structs.fields(kind):
        if not field.required:
            msgspec.convert(WHOLE[kind] | {field.name: None}, kind)


def test_every_struct_of_requests_is_among_those() -> None:
    of_requests = {one for one in vars(openai_schema).values() if isinstance(one, type) and issubclass(one, msgspec.Struct)}
    assert {one for one in of_requests if one.__module__ == openai_schema.__name__} - {openai_schema.GenerationRequest} == WHOLE.keys()


def test_nulls_of_a_call_are_not_given() -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": None}}
    assert chat(messages=[*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]).kind == "chat"
    tools = [{"type": None, "function": {"name": "f", "description": None, "parameters": None, "strict": None}}]
    assert chat(tools=tools, tool_choice="none").kind == "chat"


def test_explicit_names_what_the_client_gave() -> None:
    call = chat(temperature=0.0, top_p=0.5, top_k=4, stop="x", max_completion_tokens=5, logit_bias={"7": 2.5})
    assert call.explicit == ["logit_bias", "max_tokens", "stop", "temperature", "top_k", "top_p"]
    assert call.names == {"max_tokens": "max_completion_tokens"}
    assert call.sampling.stop == ["x"]
    assert call.sampling.logit_bias == {7: 2.5}
    assert call.sampling.max_tokens == 5


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=9, max_completion_tokens=5).sampling.max_tokens == 5


def test_vllm_extras() -> None:
    call = chat(
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        max_tokens=8,
        stop_token_ids=[5],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        prompt_logprobs=3,
        allowed_token_ids=[1, 2],
        bad_words=["no"],
        truncate_prompt_tokens=-1,
        priority=-3,
        cache_salt="s",
        return_token_ids=True,
        add_special_tokens=True,
    )
    sampling = call.sampling
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens, sampling.prompt_logprobs) == (0.1, 1.1, 2, 3)
    assert (sampling.stop_token_ids, sampling.allowed_token_ids, sampling.bad_words) == ([5], [1, 2], ["no"])
    assert sampling.include_stop_str_in_output
    assert sampling.ignore_eos
    assert not sampling.skip_special_tokens
    assert call.truncate_prompt_tokens == -1
    assert (call.priority, call.cache_salt, call.want_ids) == (-3, "s", True)
    assert call.add_special_tokens is True


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a", [{"prompt": "a"}]),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
        ([1, 2], [{"prompt_ids": [1, 2]}]),
        ([[1], [2, 3]], [{"prompt_ids": [1]}, {"prompt_ids": [2, 3]}]),
    ],
)
def test_prompt_forms(prompt: Any, want: list[dict[str, Any]]) -> None:
    got = completion(prompt=prompt).prompts
    names = [p.pop("prompt_name", "") for p in got]
    assert names == [f"prompt[{i}]" if isinstance(prompt, list) and not isinstance(prompt[0], int) else "" for i in range(len(got))]
    plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in p.items()} for p in got]
    assert plain == want
    assert all(v.dtype == np.int32 for p in got for v in p.values() if isinstance(v, np.ndarray))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [7, 2**31]}, "prompt[1]"),
        ({"prompt": [[1], [5, 2**40]]}, "prompt[1][1]"),
        ({"stop_token_ids": [1, -7]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [10**25]}, "stop_token_ids[0]"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids[0]"),
        ({"allowed_token_ids": [3, 2**31]}, "allowed_token_ids[1]"),
        ({"logit_bias": {str(10**40): 1}}, f"logit_bias.{10**39}"),
        ({"logit_bias": {str(10**15): 1}}, f"logit_bias.{10**15}"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"bad_words": [5]}, "bad_words[0]"),
        ({"bad_words": ["a"] * 1025}, "bad_words"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"7": 1, "50256": "-100"}}, "logit_bias.50256"),
        ({"logit_bias": {"7": True}}, "logit_bias.7"),
        ({"logit_bias": {"7": None}}, "logit_bias.7"),
        ({"logit_bias": [[7, 1]]}, "logit_bias"),
        ({"response_format": {"type": "text", "schema": {"type": "object"}}}, "response_format"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"priority": 2**31}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        *(({f"guided_{name}": ""}, f"guided_{name}") for name in ("json", "regex", "grammar")),
        *(({"structured_outputs": {name: ""}}, f"structured_outputs.{name}") for name in ("json", "regex", "grammar", "structural_tag")),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag.structures"),
        *(
            ({"structured_outputs": empty}, "structured_outputs")
            for empty in ({}, {"regex": None}, {"json_object": False}, {"disable_any_whitespace": True})
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "response_format.structures"),
        ({"response_format": {"type": "structural_tag", "structures": [TAG]}}, "response_format.triggers"),
        ({"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<g"]}}, "response_format.structures[0].begin"),
        ({"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f"], "stop": 1}}, "response_format"),
        (
            {"response_format": {"type": "structural_tag", "structures": [{**TAG, "more": 1}], "triggers": ["<f"]}},
            "response_format.structures[0].more",
        ),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}, "response_format.format.type"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": ""}}}, "response_format.format.pattern"),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "format": {"type": "triggered_tags", "tags": [XTAG], "triggers": ["<"], "at_least_one": True},
                }
            },
            "response_format.format.at_least_one",
        ),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
    ],
)
def test_wrong_completion_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(parse_completion, TEXT | fields)
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert error.message.endswith(".")
    assert "`" not in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].refusal"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "function_call": {"arguments": "{}"}}]}, "messages[0].function_call.name"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": 5}}]}, "messages[0].function_call.arguments"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [*CHAT["messages"], {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[1].content[0].type",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "a", "prefix": True}]}, "messages[1].prefix"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_wrong_chat_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(parse_chat, CHAT | fields)
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [{"role": "zzz", "content": "x"}]},
            "messages[0].role must be one of 'system', 'developer', 'user', 'assistant', 'tool', 'function', but is 'zzz'.",
        ),
        (
            {"tools": [{"type": "web", "function": {"name": "f"}}]},
            "tools[0].type: tools of type 'web' are not supported here: only functions may be called.",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].type must be 'function', but is 'x'.",
        ),
    ],
)
def test_a_wrong_choice_is_told_the_right_ones(fields: dict[str, Any], message: str) -> None:
    assert refusal(parse_chat, CHAT | fields).message == message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}']
)
def test_what_is_no_json_object(body: bytes) -> None:
    error = refusal(parse_chat, body)
    assert (error.status, error.param) == (400, None)


def test_required_fields() -> None:
    assert refusal(parse_chat, {"model": "m"}).param == "messages"
    assert refusal(parse_completion, {"model": "m"}).param == "prompt"


@pytest.mark.parametrize("name", sorted(GENERATION))
def test_fields_that_would_change_the_answer(name: str) -> None:
    """With what asks for nothing they are taken in silence, with anything else they are refused by name."""
    known = {kind: set(kind.__struct_fields__) for kind in (ChatRequest, CompletionRequest)}
    assert any(name not in fields for fields in known.values()), "a field that works everywhere stands in no such table"
    for parse, base, kind in ((parse_chat, CHAT, ChatRequest), (parse_completion, TEXT, CompletionRequest)):
        if name in known[kind]:
            continue
        for neutral in REFUSED[kind][name].neutral:
            assert parse(msgspec.json.encode(base | {name: neutral}), CONFIG).ignored == []
        for other in ({"x": 1}, 7, "yes"):
            error = refusal(parse, base | {name: other})
            assert (error.status, error.code, error.param) == (400, "unsupported_feature", name)
            assert name in error.message


def test_what_asks_for_nothing_is_told_from_what_looks_like_it() -> None:
    assert refusal(parse_chat, CHAT | {"use_beam_search": 0}).param == "use_beam_search"
    assert refusal(parse_chat, CHAT | {"typical_p": True}).param == "typical_p"
    assert refusal(parse_chat, CHAT | {"grammar": [[]]}).param == "grammar"
    assert refusal(parse_completion, TEXT | {"n_predict": 0}).message == "n_predict is not supported here. Use max_tokens."


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thinking", {"type": "enabled", "budget_tokens": 100}),  # Anthropic, DeepSeek
        ("thinking", {"type": "disabled"}),  # a template may think unless it is told not to
        ("think", False),  # Ollama
        ("enable_thinking", False),  # Qwen
        ("format", {"type": "object"}),  # Ollama
        ("options", {"temperature": 0}),
        ("raw", True),
        ("extra_body", {"guided_json": {}}),  # the SDK's argument, sent as it is
        ("generationConfig", {"responseMimeType": "application/json"}),  # Google
        ("text", {"format": {"type": "json_schema"}}),  # OpenAI's Responses
        ("instructions", "Be brief."),
        ("output_format", {"type": "json_schema"}),  # Anthropic
        ("stop_regex", "[0-9]"),  # SGLang
        ("sampling_params", {"json_schema": "{}"}),
        ("truncation_side", "right"),  # vLLM
        ("watermarking", True),
        ("banned_strings", ["a"]),  # TabbyAPI
        ("negative_prompt", "a"),
        ("guidance_scale", 1.5),
        ("num_return_sequences", 2),  # transformers
        ("suppress_tokens", [5]),
    ],
)
def test_what_other_servers_know(field: str, value: Any) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
        error = refusal(parse, base | {field: value})
        assert (error.status, error.code, error.param) == (400, "unsupported_feature", field)


@pytest.mark.parametrize(
    ("name", "apart", "whole"),
    [("separate_reasoning", True, False), ("parse_reasoning", True, False), ("reasoning_format", "parsed", "none")],
)
def test_reasoning_comes_apart_on_chat_and_never_on_completions(name: str, apart: Any, whole: Any) -> None:
    assert parse_chat(msgspec.json.encode(CHAT | {name: apart}), CONFIG).ignored == []
    assert parse_completion(msgspec.json.encode(TEXT | {name: whole}), CONFIG).ignored == []
    for error in (refusal(parse_chat, CHAT | {name: whole}), refusal(parse_completion, TEXT | {name: apart})):
        assert (error.code, error.param) == ("unsupported_feature", name)


@pytest.mark.parametrize(
    "names",
    [
        "toolConfig tool_config Tools tool_resources tool-config",
        "jsonSchema JSON_SCHEMA output_schema structured_output structuredOutput json json_object_schema constraint",
        "guided_options_request guided_regexp guidedJson Guided-Choice",
        "grammar_lazy preserved_tokens grammar_root GRAMMAR Grammar lark outlines",
        "sampling_seed samplingSeed n_keep num_keep ignore_eos_token bos_token_id adapter adapterId",
        "generationConfig systemInstruction stopSequences candidateCount maxOutputTokens safetySettings thinkingConfig responseSchema",
        "Best_Of repeatPenalty typicalP",
    ],
)
def test_other_spellings_of_what_does_not_exist_are_the_same(names: str) -> None:
    for name in names.split():
        for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
            for other in ({"x": 1}, 7, "yes", True):
                error = refusal(parse, base | {name: other})
                assert (error.status, error.code, error.param) == (400, "unsupported_feature", name)
            assert parse(msgspec.json.encode(base | {name: None}), CONFIG).ignored == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("MAX_TOKENS", "max_tokens"),
        ("topP", "top_p"),
        ("topK", "top_k"),
        ("Temperature", "temperature"),
        ("responseFormat", "response_format"),
        ("response-format", "response_format"),
        ("Stream", "stream"),
        ("streamOptions", "stream_options"),
        ("presencePenalty", "presence_penalty"),
        ("Stop", "stop"),
        ("logitBias", "logit_bias"),
        ("N", "n"),
    ],
)
def test_a_known_field_in_another_spelling_is_told_its_name(wrong: str, right: str) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
        error = refusal(parse, base | {wrong: 1})
        assert (error.status, error.code, error.param) == (400, "unsupported_feature", wrong)
        assert error.message == f"{wrong} is not supported here. Its name here is {right}."
        assert parse(msgspec.json.encode(base | {wrong: None}), CONFIG).ignored == []


def test_other_spellings_of_one_endpoints_fields() -> None:
    assert "Its name here is tool_choice" in refusal(parse_chat, CHAT | {"toolChoice": "auto"}).message
    assert refusal(parse_completion, TEXT | {"toolChoice": "required"}).param == "toolChoice"
    error = refusal(parse_chat, CHAT | {"stream": True, "stream_options": {"includeUsage": True}})
    assert (error.param, error.message) == (
        "stream_options.includeUsage",
        "stream_options.includeUsage is not supported here. Its name here is include_usage.",
    )
    for name, kind, base in (
        ("addSpecialTokens", TokenizeRequest, {"prompt": "a"}),
        ("chatTemplate", TokenizeRequest, {"prompt": "a"}),
        ("Model", DetokenizeRequest, {"tokens": [1]}),
    ):
        with pytest.raises(PenstockError) as caught:
            decode(msgspec.json.encode(base | {name: "x"}), kind)
        assert caught.value.param == name
    assert decode(msgspec.json.encode({"prompt": "a", "maxTokens": 5, "toolConfig": {}}), TokenizeRequest)[2] == ["maxTokens", "toolConfig"]


def test_no_two_fields_are_one_but_for_their_spelling() -> None:
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        names = set(kind.__struct_fields__) | set(REFUSED[kind])
        assert len({squash(name) for name in names}) == len(names)


def test_hints_in_another_spelling_are_only_named() -> None:
    assert chat(User="a", serviceTier="b", PromptCacheKey="c").ignored == ["PromptCacheKey", "User", "serviceTier"]


def test_what_clients_of_other_servers_send_by_default_is_taken() -> None:
    """With each server's neutral values; what only tunes something that is off is named as ignored."""
    llama_cpp = {
        "dynatemp_range": 0,
        "xtc_probability": 0,
        "typ_p": 1,
        "mirostat": 0,
        "dry_multiplier": 0,
        "repeat_last_n": 64,
        "n_probs": 0,
    }
    tuning = {"dynatemp_exponent": 1, "xtc_threshold": 0.1, "mirostat_tau": 5, "dry_base": 1.75, "timings_per_token": True}
    others = {
        "do_sample": True,
        "best_of": 1,
        "return_full_text": False,
        "num_beams": 1,
        "reasoning": {"effort": None},
        "grammar": "",
        "format": "",
    }
    assert chat(**llama_cpp, **tuning, **others, store=False).ignored == sorted(tuning)


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_object", "schema": {"type": "object"}},  # llama.cpp
        {"type": "json", "value": {"type": "object"}},  # TGI
        {"type": "regex", "value": "a*"},
        {"type": "grammar", "grammar": "root ::= 'a'"},  # Fireworks
        {"type": "text", "schema": {"type": "object"}},
        {"type": "text", "json_schema": {"name": "a"}},
        {"type": "text", "grammar": "root ::= 'a'"},
    ],
)
def test_response_formats(given: dict[str, Any]) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
        error = refusal(parse, base | {"response_format": given})
        assert (error.status, error.code, error.param) == (400, "unsupported_feature", "response_format")


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json", source='{"type":"object"}', field="response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
            Grammar(kind="json", source=TEXT_OF_SCHEMA, field="response_format.json_schema.schema"),
        ),
        ({"guided_json": SCHEMA}, Grammar(kind="json", source=TEXT_OF_SCHEMA, field="guided_json")),
        ({"guided_json": "{}"}, Grammar(kind="json", source="{}", field="guided_json")),
        ({"guided_regex": "a+"}, Grammar(kind="regex", source="a+", field="guided_regex")),
        ({"guided_choice": ["a", "b"]}, Grammar(kind="choice", source='["a","b"]', field="guided_choice")),
        ({"guided_grammar": "start: A"}, Grammar(kind="grammar", source="start: A", field="guided_grammar")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(kind="json", source=TEXT_OF_SCHEMA, field="structured_outputs.json")),
        ({"structured_outputs": {"regex": "a"}}, Grammar(kind="regex", source="a", field="structured_outputs.regex")),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": None}},
            Grammar(kind="json", source='{"type":"object"}', field="structured_outputs.json_object"),
        ),
        (
            {"structured_outputs": {"json": "{}", "disable_any_whitespace": True}},
            Grammar(kind="json", source="{}", field="structured_outputs.json", compact=True),
        ),
        ({"response_format": {"type": "text"}, "guided_regex": None, "structured_outputs": None}, None),
        (
            {"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f", "<f>"]}},
            Grammar(
                kind="layout",
                source=encode(Tags(["<f"], [Tag("<f>", Obey("json", TEXT_OF_SCHEMA, "response_format.structures[0].schema"), "</f>")])),
                field="response_format",
            ),
        ),
        (
            {
                "structured_outputs": {
                    "structural_tag": json.dumps(
                        {"type": "structural_tag", "format": {"type": "triggered_tags", "tags": [XTAG], "triggers": ["<"]}}
                    )
                }
            },
            Grammar(
                kind="layout",
                source=encode(
                    Tags(["<"], [Tag("<x>", Obey("regex", "a", "structured_outputs.structural_tag.format.tags[0].content.pattern"), "!")])
                ),
                field="structured_outputs.structural_tag",
            ),
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": SCHEMA}}},
            Grammar(kind="json", source=TEXT_OF_SCHEMA, field="response_format.format.json_schema"),
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "tag", **XTAG}}},
            Grammar(
                kind="layout",
                source=encode(Chain([Text("<x>"), Obey("regex", "a", "response_format.format.content.pattern"), Text("!")])),
                field="response_format",
            ),
        ),
    ],
)
def test_what_an_answer_must_obey(given: dict[str, Any], grammar: Grammar | None) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
        assert parse(msgspec.json.encode(base | given), CONFIG).grammar == grammar


def test_a_text_format_is_none() -> None:
    for given in ({"type": "text"}, {"type": "text", "json_schema": None}, {"type": "text", "schema": {}}, None):
        assert chat(response_format=given).ignored == []


@pytest.mark.parametrize("name", sorted(MESSAGE_FIELDS))
def test_fields_of_messages_that_would_change_the_answer(name: str) -> None:
    def message(value: Any) -> dict[str, Any]:
        return {"messages": [*CHAT["messages"], {"role": "assistant", "content": "a", name: value}]}

    for neutral in MESSAGE_FIELDS[name].neutral:
        chat(**message(neutral))
    for other in (True, 1, "yes", [{}]):
        error = refusal(parse_chat, CHAT | message(other))
        assert (error.status, error.code, error.param) == (400, "unsupported_feature", f"messages[1].{name}")


def test_stream_options_that_nobody_knows_are_named() -> None:
    assert chat(stream=True, stream_options={"include_usage": True, "chunk_size": 5, "a": 1}, zz=1).ignored == [
        "zz",
        "stream_options.a",
        "stream_options.chunk_size",
    ]


@pytest.mark.parametrize(
    ("choice", "code"),
    [
        ("banana", "invalid_value"),
        ("", "invalid_value"),
        ({"type": "function"}, "invalid_value"),
        ({"type": "function", "function": {"name": "g"}}, "invalid_value"),
        ({"type": "custom", "custom": {"name": "f"}}, "unsupported_feature"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "f"}]}}, "invalid_value"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "invalid_value"),
    ],
)
def test_tool_choices(choice: Any, code: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    error = refusal(parse_chat, CHAT | {"tools": tools, "tool_choice": choice})
    assert (error.status, error.code, error.param) == (400, code, "tool_choice")
    assert refusal(parse_chat, CHAT | {"tool_choice": choice}).code == "invalid_value"


PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function(name) for name in names]}}


@pytest.mark.parametrize(
    ("fields", "must", "named", "functions", "field"),
    [
        ({"tool_choice": "required"}, True, False, ["f", "g"], "tool_choice"),
        ({"tool_choice": function("g")}, True, True, ["g"], "tool_choice"),
        ({"tool_choice": allowed("required", "f")}, True, False, ["f"], "tool_choice"),
        ({"tool_choice": allowed("auto", "f")}, False, False, ["f"], "tool_choice"),
        ({"tools": [function("f"), function("g", strict=True)]}, False, False, ["f", "g"], "tools[1].function.strict"),
        ({"guided_regex": "a"}, False, False, ["f", "g"], "guided_regex"),
    ],
)
def test_calls_that_are_asked_for(fields: dict[str, Any], must: bool, named: bool, functions: list[str], field: str) -> None:
    tools = [function("f", parameters=PARAMETERS), function("g")]
    call = chat(**{"tools": tools, **fields})
    assert call.calling is not None
    assert (call.calling.must, call.calling.named, call.calling.field) == (must, named, field)
    assert [one.name for one in call.calling.functions] == functions
    schemas = {one.name: json.loads(one.schema) for one in call.calling.functions}
    if must and "f" in schemas:
        assert schemas["f"] == PARAMETERS
    if must and "g" in schemas:
        assert schemas["g"] == {"type": "object", "properties": {}, "additionalProperties": False}
    if not must and "f" in schemas:
        assert schemas["f"] == {"type": "object"}
    assert json.loads(call.prompts[0]["tools"]) == fields.get("tools", tools)  # the template sees them all


def test_calls_that_nobody_asks_for_have_no_grammar() -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": "none", "guided_regex": "a"}):
        assert chat(tools=[function("f")], **fields).calling is None
    assert chat(tools=[function("f", strict=True)], tool_choice="none").calling is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [function("f"), function("f")], "tool_choice": "required"}, "tools[1].function.name"),
        ({"tools": [function("f", parameters={"type": "string"})], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [function("f")], "tool_choice": allowed("none", "f")}, "tool_choice.allowed_tools.mode"),
        ({"tools": [function("f")], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
    ],
)
def test_calls_that_cannot_be_asked_for(fields: dict[str, Any], param: str) -> None:
    error = refusal(parse_chat, CHAT | fields)
    assert (error.status, error.param) == (400, param)


def test_tokenize_refuses_only_what_would_change_the_tokens() -> None:
    body = {"prompt": "a", "max_completion_tokens": 5, "typical_p": 0.3, "response_format": {"type": "json_object"}}
    assert decode(msgspec.json.encode(body), TokenizeRequest)[2] == sorted(body.keys() - {"prompt"})
    for name in ("chat_template", "system", "images"):
        with pytest.raises(PenstockError) as caught:
            decode(msgspec.json.encode({"prompt": "a", name: "x"}), TokenizeRequest)
        assert (caught.value.status, caught.value.param) == (400, name)
    assert set(PROMPT) < set(GENERATION)


def test_logit_bias_errors_name_key_and_value() -> None:
    error = refusal(parse_completion, TEXT | {"logit_bias": {"50256": -500}})
    assert error.message == "logit_bias.50256 must be a number from -100 to 100, but is -500."
    error = refusal(parse_completion, TEXT | {"logit_bias": {"hello": 1}})
    assert error.message == "logit_bias.hello: the key must be a token id, but is 'hello'."


def test_best_of_equal_to_n_changes_nothing() -> None:
    for call in (completion(best_of=3, n=3), completion(best_of=3, n=3, stream=True), chat(best_of=3, n=3)):
        assert (call.sampling.n, call.sampling.logprobs, call.shown) == (3, None, None)
    assert refusal(parse_chat, CHAT | {"best_of": 3, "n": 2}).code == "unsupported_feature"


def test_best_of_draws_more_than_are_shown() -> None:
    call = completion(best_of=3, n=2)
    assert (call.sampling.n, call.sampling.logprobs, call.shown, call.top_logprobs) == (3, 0, 2, None)
    assert completion(best_of=3, logprobs=2).sampling.logprobs == 2
    for fields, what in (
        ({"best_of": 1, "n": 2}, "between n (2) and 64 (--max-n), but is 1"),
        ({"best_of": 65}, "but is 65"),
        ({"best_of": 10**30}, "but is"),
        ({"best_of": 2, "stream": True}, "not available when stream is true"),
        ({"best_of": 64, "prompt": ["a"] * 9}, "prompts times best_of may be at most 512 (--max-choices), but is 576"),
    ):
        error = refusal(parse_completion, TEXT | fields)
        assert (error.status, error.param) == (400, "best_of")
        assert what in error.message


def test_unknown_fields_are_ignored_and_named_hints_are_not() -> None:
    assert chat(temprature=0.5, zz=1, user="u", metadata={"a": "b"}, prompt_cache_key="k").ignored == ["temprature", "zz"]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_too_many_fields_are_refused_whatever_they_are_named(kind: Any) -> None:
    needed: dict[str, Any] = {"messages": CHAT["messages"], "prompt": "a", "tokens": [1]}
    base = {name: value for name, value in needed.items() if name in kind.__struct_fields__}
    for name in ("z", "guided_", "max_tokens_"):
        with pytest.raises(RequestTooLarge, match=r" \d{3} fields; .* at most 256"):
            decode(msgspec.json.encode(base | {f"{name}{i}": 1 for i in range(300)}), kind)
        with pytest.raises(RequestTooLarge, match=r" 1\d{5} fields; .* at most 100000"):
            decode(msgspec.json.encode(base | {f"{name}{i}": 1 for i in range(150_000)}), kind)


@pytest.mark.parametrize("name", ["stream_options", "response_format", "chat_template_kwargs"])
def test_objects_of_too_many_fields_are_refused_by_name(name: str) -> None:
    for count in (300, 90_000):
        error = refusal(parse_chat, CHAT | {"stream": True, name: {"type": "text"} | {f"z{i}": 1 for i in range(count)}})
        assert (error.status, error.param) == (413, name)
        assert f"has {count + 1} fields" in error.message


def test_of_a_field_that_is_there_twice_only_what_was_checked_is_parsed() -> None:
    wrong = b'"stop": [' + b"1," * 50_000 + b"1]"
    request, _, ignored = decode(b'{"prompt": "a", ' + wrong + b', "zz": 1, "stop": "b"}', CompletionRequest)
    assert (request.stop, ignored) == ("b", ["zz"])


UNREADABLE = [
    b"1e999",
    b"1" * 1000,
    b'"\xff"',
    b'"\\ud800"',
    b"[1e999]",
    b'{"\xff":1}',
    b'{"a":1e999}',
    b'{"type":"text","a":1e999}',
    b'{"type":"text","\xff":1}',
    b'{"include_usage":true,"\xff":1}',
    b'{"include_usage":true,"includeUsage":"\xff"}',
    b"[" * 900 + b"]" * 900,
    b"nul",
    b"{" + b",".join(b'"\xff%d":1' % i for i in range(400)) + b"}",
]


@pytest.mark.parametrize("value", UNREADABLE, ids=range(len(UNREADABLE)))
def test_no_value_of_any_field_is_a_fault_of_the_server(value: bytes) -> None:
    known = {name for kind in REFUSED for name in kind.__struct_fields__}
    parses: list[tuple[bytes, Any]] = [
        (b'"stream":true,"messages":[{"role":"user","content":"a"}]', lambda body: parse_chat(body, CONFIG)),
        (b'"prompt":"a"', lambda body: parse_completion(body, CONFIG)),
        (b'"prompt":"a"', lambda body: decode(body, TokenizeRequest)),
        (b'"tokens":[1]', lambda body: decode(body, DetokenizeRequest)),
    ]
    for name in sorted(known | GENERATION.keys() | {"zz", "maxTokens", "guided_x", "metadata"}):
        for base, parse in parses:
            with contextlib.suppress(InvalidRequest, UnsupportedFeature, RequestTooLarge):
                parse(b'{%s,"%s":%s}' % (base, name.encode(), value))
    for name in ChatMessage.__struct_fields__:
        with contextlib.suppress(PenstockError):
            parse_chat(b'{"messages":[{"role":"assistant","content":"a","%s":%s}]}' % (name.encode(), value), CONFIG)


def test_a_large_value_of_a_refused_field_asks_for_something_unread() -> None:
    for value in (b"null" + b" " * 5000, b"[" * 5000 + b"]" * 5000, msgspec.json.encode({f"a{i}": None for i in range(90_000)})):
        body = b'{"prompt": "a", "grammar": ' + value + b"}"
        if value.startswith(b"null"):
            assert parse_completion(body, CONFIG).ignored == []
        elif value.startswith(b"{"):
            assert refusal(parse_completion, body).code == "unsupported_feature"
        else:
            assert refusal(parse_completion, body).status == 400


def test_the_header_of_ignored_fields_is_bounded() -> None:
    [(_, short), (_, said)] = ignored_header([f"a{i}" for i in range(100)])
    assert short.count(b", ") == 31
    assert said.endswith(b": " + short)
    [(_, long), (_, said)] = ignored_header([f"{i:03}" + "x" * 120 for i in range(100)])
    assert len(long) <= 1024
    assert long.endswith(b"x, ...")
    assert len(said) <= 1100


def test_tools_reach_the_template_unless_no_call_is_wanted() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}, "extra": 1}]
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}, {"parallel_tool_calls": False}):
        call = chat(tools=tools, **choice)
        assert msgspec.json.decode(call.prompts[0]["tools"]) == tools
        assert (call.split, call.parallel_calls) == (True, "parallel_tool_calls" not in choice)
    assert "tools" not in chat(tools=tools, tool_choice="none").prompts[0]
    for none in ([], None):
        assert "tools" not in chat(tools=none).prompts[0]


def test_messages_of_a_tool_conversation_pass_unchanged() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2", "odd": True},
    ]
    assert msgspec.json.decode(chat(messages=messages).prompts[0]["messages"]) == messages


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": []},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": "cut of'}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": None}}, {"function": {"name": "f"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{"}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "function", "name": "f", "content": None},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}]},
    ],
)
def test_messages_that_clients_send_back_pass_unchanged(message: dict[str, Any]) -> None:
    messages = [*CHAT["messages"], message]
    assert msgspec.json.decode(chat(messages=messages).prompts[0]["messages"]) == messages


def test_template_kwargs() -> None:
    call = chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low", documents=[{"text": "d"}])
    assert msgspec.json.decode(call.prompts[0]["template_kwargs"]) == {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "documents": [{"text": "d"}],
    }


def test_a_template_of_a_request_needs_trust() -> None:
    error = refusal(parse_chat, CHAT | {"chat_template": "{{ messages }}"})
    assert (error.code, error.param) == ("unsupported_feature", "chat_template")
    assert "--trust-request-chat-template" in error.message
    trusting = configuration.build({"trust_request_chat_template": True})

    def ask(template: str | None) -> dict[str, Any]:
        return parse_chat(msgspec.json.encode(CHAT | {"chat_template": template}), trusting).prompts[0]

    assert ask("{{ messages }}")["chat_template"] == "{{ messages }}"
    assert "chat_template" not in ask(None) | ask("")
    assert ask("x" * 65536)
    with pytest.raises(InvalidRequest, match="at most 65536 characters, but has 65537"):
        ask("x" * 65537)


def test_continue_final_message_turns_the_generation_prompt_off() -> None:
    call = chat(continue_final_message=True)
    assert (call.prompts[0]["continue_final_message"], call.prompts[0]["add_generation_prompt"]) == (True, False)


def test_echo_asks_for_the_prompts_logprobs() -> None:
    assert completion(echo=True, logprobs=2).sampling.prompt_logprobs == 2
    assert completion(echo=True).sampling.prompt_logprobs is None
    only = completion(echo=True, max_tokens=0)
    assert (only.echo, only.sampling.max_tokens) == (True, 0)


def test_text_is_told_how_many_answers_tell_the_prompts_logprobs() -> None:
    """And bounds them, since only it knows the tokens: letters of four bytes are not four tokens."""
    assert completion(prompt=["\U0001f9e9" * 900] * 8, n=12, prompt_logprobs=20).tells == -1
    assert completion(echo=True, logprobs=20, n=1, best_of=20).tells == 1
    assert chat(prompt_logprobs=2).tells == -1


def test_limits_come_from_the_configuration() -> None:
    narrow = configuration.build({"max_n": 2, "max_stop": 1, "max_logprobs": 3, "max_prompts": 1})
    for fields, param in (
        ({"n": 3}, "n"),
        ({"stop": ["a", "b"]}, "stop"),
        ({"logprobs": 4}, "logprobs"),
        ({"prompt": ["a", "b"]}, "prompt"),
    ):
        with pytest.raises(PenstockError) as caught:
            parse_completion(msgspec.json.encode(TEXT | fields), narrow)
        assert caught.value.param == param
