"""The OpenAI request schema, checked, and its mapping to Submit.

What it is: structs of the two generation requests (OpenAI's fields and vLLM's extras that SamplingParams covers), strict decoding whose
errors name the field, the rules for fields of later capabilities (neutral values are accepted, others are 400 `unsupported_feature`), and
`parse_chat` / `parse_completion`, which give a `Call`: everything that a reply needs to know, and Submit's fields.
Unknown fields are ignored and named, so that the reply can warn.
What it does not know: HTTP, streams, keys, the chat template.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import numpy as np

from penstock.core.columns import I32
from penstock.core.config import Config
from penstock.core.errors import InvalidRequest, UnsupportedFeature
from penstock.core.sampling import SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat runs as far as the context reaches."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. Fields that are not named here reach the chat template unseen."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    function: FunctionSpec
    type: Literal["function"] = "function"


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both requests share. null means "not given"."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt` is a text, a list of texts, a list of token ids, or a list of such lists."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a `prompt`, or `messages` (then the chat template is applied first)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


# Fields that OpenAI clients send as hints: nothing of the answer depends on them here, so they are taken in silence.
HINTS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

# Known fields that do not exist here yet, with their neutral values. Anything else is refused: ignoring it would change the answer.
_OFF: tuple[Any, ...] = (None, False)
_EMPTY: tuple[Any, ...] = (None, [], {}, "")
LATER: dict[str, tuple[Any, ...]] = {
    "audio": _EMPTY,
    "modalities": (None, ["text"], []),
    "prediction": _EMPTY,
    "web_search_options": (None,),
    "functions": _EMPTY,
    "function_call": (None, "none"),
    "suffix": (None, ""),
    "use_beam_search": _OFF,
    "length_penalty": (None, 1, 1.0),
    "early_stopping": _OFF,
    "best_of": (None, 1),
    "structured_outputs": _EMPTY,
    "guided_json": _EMPTY,
    "guided_regex": _EMPTY,
    "guided_choice": _EMPTY,
    "guided_grammar": _EMPTY,
    "guided_decoding_backend": _EMPTY,
    "guided_whitespace_pattern": _EMPTY,
    "regex": _EMPTY,
    "ebnf": _EMPTY,
    "json_schema": _EMPTY,
    "structural_tag": _EMPTY,
    "logits_processors": _EMPTY,
    "custom_logit_processor": _EMPTY,
    "chat_template": (None, ""),
    "mm_processor_kwargs": _EMPTY,
    "kv_transfer_params": _EMPTY,
    "vllm_xargs": _EMPTY,
    "lora_path": _EMPTY,
    "session_params": _EMPTY,
    "return_hidden_states": _OFF,
    "prompt_embeds": _EMPTY,
    "thinking_token_budget": (None,),
}

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "stop_token_ids",
    "logit_bias",
    "seed",
    "n",
)


class Call(msgspec.Struct, kw_only=True):
    """One understood request. `fields` are Submit's, the same for every prompt; `prompts` has one dict of Submit fields a prompt."""

    kind: Literal["chat", "completion"]
    model: str | None
    sampling: SamplingParams
    explicit: list[str]
    fields: dict[str, Any]
    prompts: list[dict[str, Any]]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    top_logprobs: int | None
    """None: no logprobs in the reply; else how many alternatives."""
    prompt_logprobs: bool
    echo: bool
    echo_only: bool
    """max_tokens=0 with echo: one token is computed and dropped."""
    return_token_ids: bool
    tokens_as_ids: bool
    request_id: str | None
    ignored: list[str]


_raw_fields: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {
    t: msgspec.json.Decoder(t) for t in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
}
_known: dict[type[msgspec.Struct], frozenset[str]] = {t: frozenset(t.__struct_fields__) for t in _decoders}
_AT = re.compile(r" - at (?:`key` in )?`\$?\.?([^`]*)`$")


def decode(body: bytes, kind: type[msgspec.Struct]) -> tuple[Any, dict[str, msgspec.Raw], list[str]]:
    """The request, its raw top-level fields, and the names of unknown ones. Raises InvalidRequest or UnsupportedFeature."""
    try:
        raw = _raw_fields.decode(body)
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    unknown: list[str] = []
    if not raw.keys() <= _known[kind]:
        for name in raw.keys() - _known[kind]:
            if name in LATER:
                _refuse_later(name, raw[name], raw)
            elif name not in HINTS:
                unknown.append(name)
    try:
        return _decoders[kind].decode(body), raw, sorted(unknown)
    except msgspec.ValidationError as error:
        raise _bad_field(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None


def _refuse_later(name: str, raw: msgspec.Raw, fields: dict[str, msgspec.Raw]) -> None:
    value = msgspec.json.decode(raw)
    if any(value == neutral and type(value) is type(neutral) for neutral in LATER[name]):
        return
    if name == "best_of" and bytes(fields.get("n", b"")).strip() == bytes(raw).strip():
        return
    raise UnsupportedFeature(f"{name} is not supported yet. Leave it out.", param=name)


def _bad_field(error: msgspec.ValidationError) -> InvalidRequest:
    text = str(error)
    found = _AT.search(text)
    what = text[: found.start()] if found else text
    param = found.group(1) if found else None
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return InvalidRequest(f"{param} is required.", param=param)
    return InvalidRequest(f"{param}: {what}." if param else f"{what}.", param=param or None)


def _need(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise InvalidRequest(message, param=param)


def _sampling(request: GenerationRequest, config: Config, max_tokens: int | None, logprobs: int | None) -> tuple[SamplingParams, list[str]]:
    values: dict[str, Any] = {}
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    if request.stop is not None:
        values["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    if max_tokens is not None:
        values["max_tokens"] = max_tokens
    explicit = sorted(values)
    if logprobs is not None:
        values["logprobs"] = logprobs
    n = values.get("n", 1)
    _need(1 <= n <= config.max_n, f"n must be between 1 and {config.max_n} (--max-n), but is {n}.", "n")
    seed = request.seed
    _need(seed is None or -(2**63) <= seed < 2**63, "seed must fit 64 bits.", "seed")
    sampling = SamplingParams(**values)
    sampling.validate(max_logprobs=config.max_logprobs, max_stop=config.max_stop)
    return sampling, explicit


def _shared(request: GenerationRequest, config: Config) -> dict[str, Any]:
    """Checks that both requests share; Submit's fields that they share."""
    if request.response_format is not None and request.response_format.type != "text":
        raise UnsupportedFeature(
            f"response_format of type {request.response_format.type!r} is not supported yet. Leave it out, or use {{'type': 'text'}}.",
            param="response_format",
        )
    if request.spaces_between_special_tokens is False:
        raise UnsupportedFeature(
            "spaces_between_special_tokens false is not supported. Leave it out.", param="spaces_between_special_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available when stream is true.", param="prompt_logprobs")
    cut = request.truncate_prompt_tokens
    _need(cut is None or cut == -1 or cut >= 1, "truncate_prompt_tokens must be -1 or at least 1.", "truncate_prompt_tokens")
    priority = request.priority or 0
    _need(-(2**31) <= priority < 2**31, "priority must fit 32 bits.", "priority")
    return {
        "truncate_prompt_tokens": cut,
        "priority": priority,
        "cache_salt": request.cache_salt or "",
        "want_ids": bool(request.return_token_ids),
        "stream": bool(request.stream),
    }


def _call(kind: Literal["chat", "completion"], request: GenerationRequest, **rest: Any) -> Call:
    options = request.stream_options
    return Call(
        kind=kind,
        model=request.model or None,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        return_token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        request_id=request.request_id,
        prompt_logprobs=request.prompt_logprobs is not None,
        **rest,
    )


def _check_max_tokens(value: int | None, param: str) -> None:
    _need(value is None or value >= 1, f"{param} must be at least 1, but is {value}.", param)


# ------------------------------------------------------------------ chat


def parse_chat(body: bytes, config: Config) -> Call:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, raw, ignored = decode(body, ChatRequest)
    assert isinstance(request, ChatRequest)
    fields = _shared(request, config)
    check_messages(request.messages)
    _check_tools(request)
    if request.max_completion_tokens is not None:
        _check_max_tokens(request.max_completion_tokens, "max_completion_tokens")
        max_tokens: int | None = request.max_completion_tokens
    else:
        _check_max_tokens(request.max_tokens, "max_tokens")
        max_tokens = request.max_tokens
    top = request.top_logprobs
    if top is not None:
        _need(0 <= top <= config.max_logprobs, f"top_logprobs must be between 0 and {config.max_logprobs}, but is {top}.", "top_logprobs")
        _need(bool(request.logprobs) or top == 0, "top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (top or 0) if request.logprobs else None
    sampling, explicit = _sampling(request, config, max_tokens, logprobs)
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    if request.documents is not None:
        kwargs.setdefault("documents", request.documents)
    for name in ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"):
        _need(name not in kwargs, f"chat_template_kwargs must not hold {name!r}: it is a field of its own.", "chat_template_kwargs")
    continues = bool(request.continue_final_message)
    generate = request.add_generation_prompt if request.add_generation_prompt is not None else not continues
    _need(
        not (continues and generate),
        "continue_final_message and add_generation_prompt cannot both be true.",
        "continue_final_message",
    )
    fields.update(
        messages=bytes(raw["messages"]),
        tools=bytes(raw["tools"]) if request.tools and request.tool_choice != "none" else b"",
        template_kwargs=msgspec.json.encode(kwargs) if kwargs else b"",
        add_generation_prompt=generate,
        continue_final_message=continues,
        add_special_tokens=bool(request.add_special_tokens),
    )
    return _call(
        "chat",
        request,
        sampling=sampling,
        explicit=explicit,
        fields=fields,
        prompts=[{}],
        n=sampling.n,
        top_logprobs=logprobs,
        echo=False,
        echo_only=False,
        ignored=ignored,
    )


def _check_tools(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice not in (None, "none", "auto"):
        raise UnsupportedFeature("Forcing a tool call (tool_choice other than 'none' or 'auto') is not supported yet.", param="tool_choice")
    if choice == "auto" and not request.tools:
        raise InvalidRequest("tool_choice is only allowed when tools are given.", param="tool_choice")
    if request.parallel_tool_calls is False and request.tools:
        raise UnsupportedFeature("parallel_tool_calls false is not supported yet.", param="parallel_tool_calls")


def check_messages(messages: list[ChatMessage]) -> None:
    """What can be said about messages without a template. Raises InvalidRequest or UnsupportedFeature naming the part."""
    _need(bool(messages), "messages must not be empty.", "messages")
    for i, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            for j, part in enumerate(content):
                if part.type not in ("text", "input_text", "output_text"):
                    raise UnsupportedFeature(
                        f"Content of type {part.type!r} is not supported: this server takes text only.",
                        param=f"messages[{i}].content[{j}].type",
                    )
                _need(part.text is not None, "A text part needs its text.", f"messages[{i}].content[{j}].text")
        elif content is None and message.role != "function" and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequest(f"messages[{i}].content is required.", param=f"messages[{i}].content")


# ------------------------------------------------------------------ completions


def parse_completion(body: bytes, config: Config) -> Call:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, _, ignored = decode(body, CompletionRequest)
    assert isinstance(request, CompletionRequest)
    fields = _shared(request, config)
    echo = bool(request.echo)
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    echo_only = echo and max_tokens == 0
    if echo_only:
        max_tokens = 1
    _check_max_tokens(max_tokens, "max_tokens")
    if request.logprobs is not None:
        _need(
            0 <= request.logprobs <= config.max_logprobs,
            f"logprobs must be between 0 and {config.max_logprobs}, but is {request.logprobs}.",
            "logprobs",
        )
    sampling, explicit = _sampling(request, config, max_tokens, request.logprobs)
    if request.max_tokens is None:
        explicit.remove("max_tokens")
    if echo and request.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=request.logprobs)
    fields.update(echo=echo, add_special_tokens=request.add_special_tokens is not False)
    return _call(
        "completion",
        request,
        sampling=sampling,
        explicit=explicit,
        fields=fields,
        prompts=_prompts(request.prompt, config),
        n=sampling.n,
        top_logprobs=request.logprobs,
        echo=echo,
        echo_only=echo_only,
        ignored=ignored,
    )


def _prompts(prompt: str | list[str | int | list[int]], config: Config) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    _need(bool(prompt), "prompt must not be an empty list.", "prompt")
    if isinstance(prompt[0], int):
        return [{"prompt_ids": _ids(prompt, "prompt")}]
    _need(
        len(prompt) <= config.max_prompts,
        f"prompt may hold at most {config.max_prompts} prompts (--max-prompts), but holds {len(prompt)}.",
        "prompt",
    )
    first = type(prompt[0])
    _need(all(type(p) is first for p in prompt), "prompt must hold only texts, only token ids, or only lists of token ids.", "prompt")
    if first is str:
        return [{"prompt": p} for p in prompt]
    return [{"prompt_ids": _ids(p, f"prompt[{i}]")} for i, p in enumerate(prompt)]


def _ids(values: Any, param: str) -> I32:
    _need(bool(values), f"{param} must not be empty.", param)
    _need(all(type(v) is int for v in values), f"{param} must hold only token ids.", param)
    wrong = next((v for v in (min(values), max(values)) if not 0 <= v < 2**31), None)
    _need(wrong is None, f"{param} holds {wrong}, which is no token id.", param)
    return np.array(values, np.int32)
