"""Tokens in, tokens out: /inference/v1/generate, as vLLM has it.

What it is: `parse_tokens`, which checks the request and gives `Tokens`, and the route. Its defaults are SamplingParams' own, not the model's, as there; only
max_tokens is what the model's settings or else the context leave. Nothing is rendered, tokenised or detokenised.
What it does not know: replies (tokens_voice.py), how requests run.
"""

from __future__ import annotations

from typing import Any

from litestar import Request, post
from litestar.types import ASGIApp

from penstock.core.actors.text.structured import only
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Limits
from penstock.core.protocol.sampling import INT_LIMIT, SamplingParams, shorten
from penstock.transports.frame import Sse
from penstock.transports.gateway import Gateway
from penstock.transports.generation import drafts_of, idle
from penstock.transports.grammars import outputs_of
from penstock.transports.openai import ids_of, logit_bias_of
from penstock.transports.openai_schema import check_unknown
from penstock.transports.openapi import BODY
from penstock.transports.stream_events import smoothing_of
from penstock.transports.surface import Surface
from penstock.transports.tokens_schema import TokensRequest, TokensSampling, decode_tokens
from penstock.transports.tokens_voice import Tokens, TokensVoice
from penstock.transports.voice import VOICE

_AS_THEY_ARE = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "seed",
]
_OURS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens")
"""Settings whose default is not the model's."""


def _need(ok: bool, param: str, what: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} {what}.", param=param)


def parse_tokens(body: bytes, config: Config, limits: Limits | None = None) -> Tokens:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, raw, unknown = decode_tokens(body, limits)
    _check(request)
    asked = request.sampling_params or TokensSampling()
    sampling, explicit = _sampling(asked, config)
    grammar = None if asked.structured_outputs is None else only(outputs_of(asked.structured_outputs, raw["structured_outputs"]))
    options = request.stream_options
    return Tokens(
        kind="completion",
        prompts=[{"prompt_ids": ids_of(request.token_ids, "token_ids"), "prompt_name": "token_ids"}],
        sampling=sampling,
        explicit=explicit,
        model=request.model or None,
        priority=request.priority or 0,
        spec_decode=drafts_of(request.spec_decode),
        cache_salt=request.cache_salt or "",
        want_ids=True,
        detokenize=False,
        grammar=grammar,
        stream=bool(request.stream),
        stream_interval=config.stream_interval,
        smoothing_ms=smoothing_of(request.stream_smoothing_ms, config),
        request_id=request.request_id,
        ignored=[*check_unknown(unknown, strict=config.strict_fields), *idle(request.priority or 0, config)],
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
    )


def _check(request: TokensRequest) -> None:
    """Of the fields beside sampling_params."""
    for name in ("features", "kv_transfer_params"):
        if getattr(request, name) not in (None, {}, []):
            raise UnsupportedFeature(f"{name} is not supported here. Leave it out.", param=name)
    _need(request.stream_options is None or bool(request.stream), "stream_options", "is only allowed when stream is true")
    for name in ("include_obfuscation", "tool_calls_done", "events"):
        if request.stream_options is not None and getattr(request.stream_options, name):
            param = f"stream_options.{name}"
            raise UnsupportedFeature(f"{param} is about text, of which there is none here. Leave it out.", param=param)
    priority = request.priority or 0
    _need(-(2**31) <= priority < 2**31, "priority", "must fit 32 bits")
    asked = request.sampling_params
    if request.stream and asked is not None:
        _need(asked.prompt_logprobs is None, "prompt_logprobs", "is not available when stream is true")


def _sampling(asked: TokensSampling, config: Config) -> tuple[SamplingParams, list[str]]:
    """Settings, and which of them do not give way to the model's."""
    if asked.stop:
        raise UnsupportedFeature("stop needs the answer's text, and none is made here. Use stop_token_ids.", param="stop")
    values: dict[str, Any] = {name: value for name in _AS_THEY_ARE if (value := getattr(asked, name)) is not None}
    if asked.logit_bias:
        values["logit_bias"] = logit_bias_of(asked.logit_bias)
    least = 0 if asked.prompt_logprobs is not None else 1  # 0 is scoring: the prompt is computed and nothing drawn
    most = asked.max_tokens
    if most is not None:
        _need(least <= most < INT_LIMIT, "max_tokens", f"must be from {least} to {INT_LIMIT - 1}, but is {shorten(most)}")
        values["max_tokens"] = most
    n, seed = values.get("n", 1), asked.seed
    _need(1 <= n <= config.max_n, "n", f"must be between 1 and {config.max_n} (--max-n), but is {shorten(n)}")
    _need(seed is None or -(2**63) <= seed < 2**63, "seed", "must fit 64 bits")
    explicit = sorted({*values, *_OURS})
    sampling = SamplingParams(**values)
    return sampling.validate(max_logprobs=config.max_logprobs, max_stop=config.max_stop), explicit


def tokens_routes(gateway: Gateway) -> list[Any]:
    """Litestar handlers that share one gateway."""
    config = gateway.config
    surface = Surface(gateway, Sse())

    @post(
        "/inference/v1/generate",
        summary="Continue token ids, with token ids (vLLM)",
        tags=["generate"],
        status_code=200,
        opt={BODY: TokensRequest, VOICE: TokensVoice},
    )
    async def generate(request: Request[Any, Any, Any]) -> ASGIApp:
        asked = await surface.understood(await surface.body(request), parse_tokens, config, gateway.limits)
        return surface.answer(request, asked, TokensVoice(asked))

    return [generate]
