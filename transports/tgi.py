"""TGI's API: /generate, /generate_stream, / and /info.

What it is: `parse_generate`, which checks TGI's parameters as TGI does and gives a `Telling`, and the routes. Its defaults are TGI's, not the model's:
greedy unless a parameter asks for sampling, and a stop text stays in the answer.
What it does not know: replies (tgi_voice.py), how requests run.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp

from penstock.core.actors.text.structured import json_text
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Grammar, Limits
from penstock.core.protocol.sampling import INT_LIMIT, SamplingParams, shorten
from penstock.transports.frame import Sse
from penstock.transports.gateway import Gateway
from penstock.transports.openai_schema import check_unknown
from penstock.transports.openapi import BODY
from penstock.transports.questions import failure_of
from penstock.transports.request import JsonReply
from penstock.transports.stream_events import smoothing_of
from penstock.transports.surface import Surface
from penstock.transports.tgi_schema import GenerateParameters, GenerateRequest, RootRequest, decode_generate
from penstock.transports.tgi_voice import GenerateVoice, Telling
from penstock.transports.voice import VOICE
from penstock.version import __version__

MAX_NEW_TOKENS = 100
"""TGI's default."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "watermark": (None, False),
    "adapter_id": (None, ""),
}
"""Parameters that ask for what does not exist here, with the values that ask for nothing."""
_OURS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
"""Settings whose default is TGI's."""


def _need(ok: bool, name: str, what: str) -> None:
    if not ok:
        raise InvalidRequest(f"parameters.{name} {what}.", param=f"parameters.{name}")


def parse_generate(body: bytes, config: Config, limits: Limits | None = None, *, stream: bool | None = False) -> Telling:
    """`stream` None: the body says (POST /). Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, ignored = decode_generate(body, GenerateRequest if stream is not None else RootRequest, limits)
    listed = isinstance(request, RootRequest)
    streams = bool(request.stream) if isinstance(request, RootRequest) else bool(stream)
    given = request.parameters or GenerateParameters()
    if not request.inputs:
        raise InvalidRequest("inputs must not be empty.", param="inputs")
    for name, neutral in _NEUTRAL.items():
        if getattr(given, name) not in neutral:
            raise UnsupportedFeature(f"parameters.{name} is not supported here. Leave it out.", param=f"parameters.{name}")
    if streams and given.decoder_input_details:
        raise InvalidRequest("parameters.decoder_input_details is not available in a stream.", param="parameters.decoder_input_details")
    if streams and given.best_of not in (None, 1):
        raise InvalidRequest("parameters.best_of is not available in a stream.", param="parameters.best_of")
    details = bool(given.details or given.decoder_input_details)
    prefill = bool(given.decoder_input_details)
    return Telling(
        kind="completion",
        prompts=[{"prompt": request.inputs, "prompt_name": "inputs"}],
        sampling=_sampling(given, config, logprobs=details or streams, prefill=prefill),
        explicit=list(_OURS),
        names={
            "max_tokens": "max_new_tokens",
            "truncate_prompt_tokens": "truncate",
            **({"n": "parameters.best_of"} if given.best_of not in (None, 1) else {}),
        },
        truncate_prompt_tokens=given.truncate,
        echo=prefill,
        want_ids=streams or prefill,
        stream=streams,
        smoothing_ms=smoothing_of(given.stream_smoothing_ms, config, "parameters.stream_smoothing_ms"),
        ignored=check_unknown(ignored, strict=config.strict_fields),
        details=details,
        prefill=prefill,
        before=request.inputs if given.return_full_text else "",
        listed=listed,
        top=given.top_n_tokens or 0,
        grammar=_grammar(given.grammar),
    )


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    value: Any


def _grammar(given: Any) -> Grammar | None:
    """Raises InvalidRequest."""
    field = "parameters.grammar"
    if given is None:
        return None
    try:
        asked = msgspec.convert(given, _Asked)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{field} must be an object of a type and a value: {error}."[:300], param=field) from None
    value = asked.value
    if asked.type == "regex":
        if not isinstance(value, str):
            raise InvalidRequest(f"{field}.value must be a text.", param=f"{field}.value")
        return Grammar(kind="regex", source=value, field=field)
    if asked.type not in ("json", "json_schema"):
        raise InvalidRequest(f"{field}.type must be json, json_schema or regex, but is {asked.type[:80]!r}.", param=f"{field}.type")
    if asked.type == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else None
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise InvalidRequest(f"{field}.value is not valid JSON: {error}.", param=f"{field}.value") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field}.value must be a JSON schema.", param=f"{field}.value")
    return Grammar(kind="json", source=json_text(value), field=field)


def _sampling(given: GenerateParameters, config: Config, *, logprobs: bool, prefill: bool) -> SamplingParams:
    most = MAX_NEW_TOKENS if given.max_new_tokens is None else given.max_new_tokens
    _need(1 <= most < INT_LIMIT, "max_new_tokens", f"must be from 1 to {INT_LIMIT - 1}, but is {shorten(most)}")
    _need(given.temperature is None or given.temperature > 0, "temperature", "must be above 0; leave it out for a greedy answer")
    _need(given.top_k is None or 0 < given.top_k < INT_LIMIT, "top_k", "must be above 0; leave it out to keep all tokens")
    _need(given.top_p is None or 0 < given.top_p <= 1, "top_p", "must be above 0 and at most 1")
    _need(given.repetition_penalty is None or given.repetition_penalty > 0, "repetition_penalty", "must be above 0")
    _need(given.truncate is None or 1 <= given.truncate < INT_LIMIT, "truncate", f"must be from 1 to {INT_LIMIT - 1}")
    _need(given.seed is None or 0 <= given.seed < 2**63, "seed", "must be from 0 to 2^63-1")
    stop = given.stop or []
    _need(len(stop) <= config.max_stop and all(stop), "stop", f"may hold at most {config.max_stop} texts (--max-stop), none of them empty")
    best, top = given.best_of or 1, given.top_n_tokens or 0
    _need(
        1 <= best <= config.max_n and given.best_of != 0,
        "best_of",
        f"must be from 1 to {config.max_n} (--max-n), but is {shorten(given.best_of or 0)}",
    )
    _need(
        0 <= top <= config.max_logprobs, "top_n_tokens", f"must be from 0 to {config.max_logprobs} (--max-logprobs), but is {shorten(top)}"
    )
    draws = bool(given.do_sample) or given.temperature not in (None, 1.0) or given.top_k is not None or given.top_p not in (None, 1.0)
    _need(best == 1 or draws, "best_of", "needs an answer that is drawn: give do_sample true")
    values: dict[str, Any] = {
        "n": best,
        "temperature": (1.0 if given.temperature is None else given.temperature) if draws else 0.0,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "repetition_penalty": given.repetition_penalty,
        "frequency_penalty": given.frequency_penalty,
        "seed": given.seed,
        "max_tokens": most,
        "stop": stop,
        "include_stop_str_in_output": True,
        "logprobs": top if logprobs or best > 1 else None,
        "prompt_logprobs": 0 if prefill else None,
    }
    sampling = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    try:
        return sampling.validate(max_stop=config.max_stop)
    except InvalidRequest as error:
        raise InvalidRequest(f"parameters.{error.message}", param=f"parameters.{error.param}") from None


class _Engine(msgspec.Struct):
    dtype: str
    device: str
    max_model_len: int


class _ServerInfo(msgspec.Struct):
    model: str
    engine: _Engine | None = None


def tgi_routes(gateway: Gateway) -> list[Any]:
    """Litestar handlers that share one gateway."""
    config = gateway.config
    surface = Surface(gateway, Sse())

    async def answer(request: Request[Any, Any, Any], stream: bool | None) -> ASGIApp:
        asked = await surface.understood(await surface.body(request), parse_generate, config, gateway.limits, stream=stream)
        return surface.answer(request, asked, GenerateVoice(asked))

    @post(
        "/generate",
        summary="Continue a text (TGI)",
        tags=["generate"],
        status_code=200,
        opt={BODY: GenerateRequest, VOICE: GenerateVoice},
    )
    async def generate(request: Request[Any, Any, Any]) -> ASGIApp:
        return await answer(request, False)

    @post(
        "/generate_stream",
        summary="Continue a text, as events (TGI)",
        tags=["generate"],
        status_code=200,
        opt={BODY: GenerateRequest, VOICE: GenerateVoice},
    )
    async def generate_stream(request: Request[Any, Any, Any]) -> ASGIApp:
        return await answer(request, True)

    @post("/", summary="Either, by stream (TGI)", tags=["generate"], status_code=200, opt={BODY: RootRequest, VOICE: GenerateVoice})
    async def root(request: Request[Any, Any, Any]) -> ASGIApp:
        return await answer(request, None)

    @get("/info", summary="Model and limits (TGI)", tags=["models"], opt={VOICE: GenerateVoice})
    async def info() -> ASGIApp:
        told = await gateway.query("server_info")
        if told.status != 200:
            raise failure_of(told)
        server = msgspec.json.decode(told.body, type=_ServerInfo)
        engine = server.engine
        body = {
            "model_id": server.model,
            "model_dtype": engine and engine.dtype,
            "model_device_type": engine and engine.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": config.max_streams,
            "max_best_of": config.max_n,
            "max_stop_sequences": config.max_stop,
            "max_input_tokens": engine and engine.max_model_len - 1,
            "max_total_tokens": engine and engine.max_model_len,
            "router": "penstock",
            "version": __version__,
        }
        return JsonReply(msgspec.json.encode(body))

    return [generate, generate_stream, root, info]
