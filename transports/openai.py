"""From a request body to what text is told.

What it is: `parse_chat` and `parse_completion` check what the fields of a request mean together and give a `Call`: a Generation, and what its reply
is to show.
What it does not know: JSON decoding (openai_schema.py), HTTP, replies (openai_voice.py), keys, the chat template.
It is long because what fields mean together is checked in one place.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np

from penstock.core.actors.text.bounds import ALL_FIELDS
from penstock.core.protocol.calling import Calling, Offered, calling_of
from penstock.core.protocol.columns import I32
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar, Limits
from penstock.core.protocol.sampling import INT_LIMIT, SamplingParams, check_tokens, shorten
from penstock.transports.beams import beam_names, beam_of, check_best_of
from penstock.transports.generation import Generation, drafts_of, idle
from penstock.transports.grammars import grammar_of
from penstock.transports.kept import Kept, kept_of
from penstock.transports.openai_messages import LONGEST_NAME, check_effort, check_hints, check_kinds, check_messages, check_tools
from penstock.transports.openai_messages import need as _need
from penstock.transports.openai_nested import unknown_within
from penstock.transports.openai_schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    check_options,
    check_unknown,
    decode,
)
from penstock.transports.retention import check_seconds
from penstock.transports.stream_events import ARGUMENTS_DONE, JSON_VALUE, events_of, interval_of, smoothing_of

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat runs as far as the context reaches."""

MAX_TEMPLATE_CHARS = 1 << 16

_TOKEN = re.compile(r"[0-9]{1,19}")

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
    "seed",
    "n",
)


class Call(Generation, kw_only=True):
    """One understood request of OpenAI's API. Its own fields say what the reply is to show; only the voices read them."""

    include_usage: bool
    continuous_usage: bool
    obfuscate: bool
    """Events of a stream are to have sizes that tell nothing of their text."""
    top_logprobs: int | None
    """None: no logprobs in the reply; else how many alternatives."""
    prompt_logprobs: bool
    tokens_as_ids: bool
    shown: int | None = None
    """Of the answers to a prompt, reply with so many, the likeliest; None: with all. Never with stream."""
    kept: Kept | None = None
    """The answer goes into the store."""
    calls_done: bool = False
    """A stream says when a call's arguments are complete."""
    values: bool = False
    """A stream says when a value within the answer, which is JSON, is complete."""


def _sampling(request: GenerationRequest, config: Config, max_tokens: int | None, logprobs: int | None) -> tuple[SamplingParams, list[str]]:
    values: dict[str, Any] = {}
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    if request.no_stop_trim:
        values["include_stop_str_in_output"] = True
    if request.stop is not None:
        values["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    if max_tokens is not None:
        values["max_tokens"] = max_tokens
    if request.logit_bias:
        values["logit_bias"] = logit_bias_of(request.logit_bias)
    explicit = sorted(values)
    if logprobs is not None:
        values["logprobs"] = logprobs
    n = values.get("n", 1)
    _need(1 <= n <= config.max_n, f"n must be between 1 and {config.max_n} (--max-n), but is {n}.", "n")
    seed = request.seed
    _need(seed is None or -(2**63) <= seed < 2**63, "seed must fit 64 bits.", "seed")
    values["beam"] = beam_of(request, n, config)
    sampling = SamplingParams(**values)
    sampling.validate(max_logprobs=config.max_logprobs, max_stop=config.max_stop)
    return sampling, explicit


def logit_bias_of(given: dict[str, Any]) -> dict[int, float]:
    """`given` is the field logit_bias. Raises InvalidRequest naming key and value."""
    bias: dict[int, float] = {}
    for key, value in given.items():
        if type(value) in (int, float) and -100 <= value <= 100 and key.isascii() and key.isdecimal() and len(key) < 10:
            bias[int(key)] = float(value)
            continue
        name = f"logit_bias.{key[:40]}"
        _need(_TOKEN.fullmatch(key) is not None, f"{name}: the key must be a token id, but is {key[:40]!r}.", name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _need(
            number and -100 <= value <= 100,
            f"{name} must be a number from -100 to 100, but is {msgspec.json.encode(value).decode()[:40]}.",
            name,
        )
        _need(int(key) < INT_LIMIT, f"{name}: token ids are from 0 to {INT_LIMIT - 1}.", name)
        bias[int(key)] = float(value)
    return bias


def _shared(request: GenerationRequest, raw: dict[str, msgspec.Raw], ignored: list[str], config: Config) -> dict[str, Any]:
    """Checks that both requests share; Call's fields that they share."""
    if request.spaces_between_special_tokens is False:
        raise UnsupportedFeature(
            "spaces_between_special_tokens false is not supported. Leave it out.", param="spaces_between_special_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available when stream is true.", param="prompt_logprobs")
    cut = request.truncate_prompt_tokens
    _need(
        cut is None or cut == -1 or 1 <= cut < 2**31,
        "truncate_prompt_tokens must be -1, or from 1 to 2147483647.",
        "truncate_prompt_tokens",
    )
    if request.retain_s is not None:
        check_seconds(request.retain_s, "retain_s", config)
    priority = request.priority or 0
    _need(-(2**31) <= priority < 2**31, "priority must fit 32 bits.", "priority")
    check_hints(raw)
    ignored = [*ignored, *unknown_within(raw)]
    options = request.stream_options
    if options is not None:
        ignored = [*ignored, *check_options(raw["stream_options"])]
    grammar = grammar_of(request, raw)
    events = events_of(options, grammar)
    return {
        "model": request.model or None,
        "priority": priority,
        "spec_decode": drafts_of(request.spec_decode),
        "cache_salt": request.cache_salt or "",
        "truncate_prompt_tokens": cut,
        "want_ids": bool(request.return_token_ids),
        "stream": bool(request.stream),
        "retain_s": request.retain_s,
        "on_disconnect": request.on_disconnect,
        "stream_interval": interval_of(request.stream_interval, config),
        "smoothing_ms": smoothing_of(request.stream_smoothing_ms, config),
        "request_id": request.request_id or request.rid,
        "ignored": [*check_unknown(ignored, strict=config.strict_fields), *idle(priority, config)],
        "include_usage": bool(options and options.include_usage),
        "continuous_usage": bool(options and options.include_usage and options.continuous_usage_stats),
        "obfuscate": bool(options and options.include_obfuscation),
        "prompt_logprobs": request.prompt_logprobs is not None,
        "tokens_as_ids": bool(request.return_tokens_as_token_ids),
        "grammar": grammar,
        "calls_done": ARGUMENTS_DONE in events or bool(options and options.tool_calls_done),
        "values": JSON_VALUE in events,
    }


def _check_max_tokens(value: int | None, param: str) -> None:
    _need(value is None or 1 <= value < INT_LIMIT, f"{param} must be from 1 to {INT_LIMIT - 1}, but is {shorten(value or 0)}.", param)


# ------------------------------------------------------------------ chat


def parse_chat(
    body: bytes, config: Config, limits: Limits | None = None, *, most: int = ALL_FIELDS, longest_name: int = LONGEST_NAME
) -> Call:
    """`most`: fields in all. `longest_name`: of a function, in characters. Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    try:
        request, raw, ignored = decode(body, ChatRequest, limits, most)
    except InvalidRequest as error:
        if (error.param or "").startswith("tools["):
            check_kinds(body)
        raise
    assert isinstance(request, ChatRequest)
    fields = _shared(request, raw, ignored, config)
    check_messages(request.messages, config.max_messages)
    check_tools(request.tools or (), longest_name)
    check_effort(request.reasoning_effort)
    calling = _calling(request, fields["grammar"])
    if request.max_completion_tokens is not None:
        _check_max_tokens(request.max_completion_tokens, "max_completion_tokens")
        max_tokens: int | None = request.max_completion_tokens
        names = {"max_tokens": "max_completion_tokens"}
    else:
        _check_max_tokens(request.max_tokens, "max_tokens")
        max_tokens = request.max_tokens
        names = {}
    top = request.top_logprobs
    if top is not None:
        _need(0 <= top <= config.max_logprobs, f"top_logprobs must be between 0 and {config.max_logprobs}, but is {top}.", "top_logprobs")
        _need(bool(request.logprobs) or top == 0, "top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (top or 0) if request.logprobs else None
    sampling, explicit = _sampling(request, config, max_tokens, logprobs)
    if request.best_of not in (None, 1, sampling.n) and sampling.beam is None:
        raise UnsupportedFeature("best_of is taken here with use_beam_search only. Use n.", param="best_of")
    names |= beam_names(request)
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
    prompt: dict[str, Any] = {
        "messages": bytes(raw["messages"]),
        "template_kwargs": msgspec.json.encode(kwargs) if kwargs else b"",
        "add_generation_prompt": generate,
        "continue_final_message": continues,
        **({"chat_template": _template(request.chat_template, config)} if request.chat_template else {}),
    }
    if request.tools and request.tool_choice != "none":
        prompt["tools"] = bytes(raw["tools"])
    return Call(
        kind="chat",
        prompts=[prompt],
        sampling=sampling,
        explicit=explicit,
        names=names,
        add_special_tokens=bool(request.add_special_tokens),
        top_logprobs=logprobs,
        split=True,
        calling=calling,
        parallel_calls=request.parallel_tool_calls is not False,
        kept=kept_of(request, raw) if request.store else None,
        **fields,
    )


def _template(template: str, config: Config) -> str:
    if not config.trust_request_chat_template:
        raise UnsupportedFeature(
            "chat_template is not taken from requests here. Leave it out, or start the server with --trust-request-chat-template.",
            param="chat_template",
        )
    _need(
        len(template) <= MAX_TEMPLATE_CHARS,
        f"chat_template may have at most {MAX_TEMPLATE_CHARS} characters, but has {len(template)}.",
        "chat_template",
    )
    return template


def _calling(request: ChatRequest, grammar: Grammar | None) -> Calling | None:
    """Whether the model's calls can be asked for, and taken apart, text knows. Raises InvalidRequest."""
    offered = [Offered(tool.function.name, tool.function.parameters, bool(tool.function.strict)) for tool in request.tools or ()]
    return calling_of(offered, request.tool_choice, grammar.field if grammar is not None else "")


# ------------------------------------------------------------------ completions


def parse_completion(body: bytes, config: Config, limits: Limits | None = None) -> Call:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, raw, ignored = decode(body, CompletionRequest, limits)
    assert isinstance(request, CompletionRequest)
    fields = _shared(request, raw, ignored, config)
    echo = bool(request.echo)
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if not (echo and max_tokens == 0):  # with echo, 0 is scoring: the prompt is computed and nothing drawn
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
    names = beam_names(request)
    if echo and request.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=request.logprobs)
        names = {**names, "prompt_logprobs": "logprobs"}
    shown = None
    if request.best_of is not None and request.best_of != sampling.n and sampling.beam is None:
        sampling, shown = _best_of(request, request.best_of, sampling, config), sampling.n
    prompts = _prompts(request.prompt, config)
    sequences = len(prompts) * (sampling.n if sampling.beam is None else sampling.beam.width)
    many = "n" if shown is None and (sampling.beam is None or request.best_of is None) else "best_of"
    _need(
        sequences <= config.max_choices,
        f"prompts times {many} may be at most {config.max_choices} (--max-choices), but is {sequences}.",
        many,
    )
    return Call(
        kind="completion",
        prompts=prompts,
        sampling=sampling,
        explicit=explicit,
        names=names,
        add_special_tokens=request.add_special_tokens is not False,
        echo=echo,
        top_logprobs=request.logprobs,
        shown=shown,
        tells=-1 if shown is None else shown,
        **fields,
    )


def _best_of(request: CompletionRequest, best_of: int, sampling: SamplingParams, config: Config) -> SamplingParams:
    """To draw more answers than are shown, with what is needed to compare them. Raises InvalidRequest."""
    check_best_of(best_of, sampling.n, config)
    _need(
        not request.stream, "best_of above n is not available when stream is true: which answers are shown is known at the end.", "best_of"
    )
    return msgspec.structs.replace(sampling, n=best_of, logprobs=request.logprobs or 0)


def _prompts(prompt: str | list[str | int | list[int]], config: Config) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    _need(bool(prompt), "prompt must not be an empty list.", "prompt")
    if isinstance(prompt[0], int):
        return [{"prompt_ids": ids_of(prompt, "prompt")}]
    _need(
        len(prompt) <= config.max_prompts,
        f"prompt may hold at most {config.max_prompts} prompts (--max-prompts), but holds {len(prompt)}.",
        "prompt",
    )
    first = type(prompt[0])
    _need(all(type(p) is first for p in prompt), "prompt must hold only texts, only token ids, or only lists of token ids.", "prompt")
    if first is str:
        return [{"prompt": p, "prompt_name": f"prompt[{i}]"} for i, p in enumerate(prompt)]
    return [{"prompt_ids": ids_of(p, f"prompt[{i}]"), "prompt_name": f"prompt[{i}]"} for i, p in enumerate(prompt)]


def ids_of(values: Any, param: str) -> I32:
    """A list of token ids that a client sent as `param`. Raises InvalidRequest."""
    _need(bool(values), f"{param} must not be empty.", param)
    if set(map(type, values)) != {int}:
        other = next(i for i, v in enumerate(values) if type(v) is not int)
        raise InvalidRequest(f"{param}[{other}] must be a token id like the others.", param=f"{param}[{other}]")
    check_tokens(values, param, None)
    return np.array(values, np.int32)
