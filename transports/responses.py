"""From a request of OpenAI's Responses API to what text is told.

What it is: `parse`, which checks the fields of a request, and has a Call of chat made of them, so that what is true of chat is true here; `Asked`, what came of it. Errors name the fields of this API.
What it does not know: conversations (responses_prompt.py), replies (responses_voice.py), routes, where responses are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.actors.text.bounds import TRANSLATED_FIELDS
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Limits
from penstock.transports.generation import idle
from penstock.transports.metadata import check_metadata
from penstock.transports.openai import Call
from penstock.transports.openai_messages import TIERS
from penstock.transports.openai_schema import check_unknown, decode
from penstock.transports.responses_items import Item, tool_echo
from penstock.transports.responses_nested import unknown_within
from penstock.transports.responses_prompt import LOGPROBS, Length, Prompt, Work, need, question, renamed
from penstock.transports.responses_schema import LIKE_CHAT, InputTokensRequest, ResponsesRequest
from penstock.transports.responses_store import Records
from penstock.transports.responses_voice import Shown

SEALED = "reasoning.encrypted_content"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        SEALED,
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
"""Those of tools and images find nothing to include here."""
ID_CHARS = 512
"""Most characters of identifiers that are shown again."""


class Asked(msgspec.Struct, kw_only=True):
    """One understood request."""

    call: Call
    shown: Shown
    places: list[str]
    """Where each message came from."""
    input: list[Item]
    """As it is kept."""
    rid: str
    """Unguessable; the response's id is made of it."""
    previous: str | None = None
    store: bool = False
    background: bool = False
    stream: bool = False

    @property
    def id(self) -> str:
        return self.shown.id

    def renamed(self, error: PenstockError) -> PenstockError:
        return renamed(error, self.places)


def decoded(
    body: bytes, kind: type[InputTokensRequest], config: Config, limits: Limits | None
) -> tuple[InputTokensRequest, dict[str, msgspec.Raw], list[str]]:
    """The request, its raw fields, and the names of fields that nobody knows. Raises InvalidRequest, UnsupportedFeature or RequestTooLarge."""
    request, raw, ignored = decode(body, kind, limits, TRANSLATED_FIELDS)  # of the client's own, before anything is made of them
    assert isinstance(request, InputTokensRequest)
    return request, raw, [*ignored, *unknown_within(request, raw)]


# ------------------------------------------------------------------ /v1/responses


async def parse(
    body: bytes,
    config: Config,
    limits: Limits | None,
    *,
    rid: str,
    core: Callable[[str], str],
    tenant: str,
    records: Records | None,
    length: Length,
    work: Work,
) -> Asked:
    """The response's id is `resp_CORE`, of which `core` makes CORE from the model's name. Raises InvalidRequest (or UnsupportedFeature) naming the field."""

    def begin() -> _Reading:
        reading = _Reading(body, config, limits, core, kept=records is not None)
        if reading.prompt.whole:
            reading.gather()
            reading.finish(rid)
        return reading

    reading: _Reading = await work(len(body), begin)
    if reading.asked is None:
        prompt = reading.prompt
        await prompt.fetch(records, tenant)
        size = len(body) + prompt.fetched
        await work(size, reading.gather)
        if reading.request.truncation == "auto":
            await prompt.fit(limits, length, reading.request.max_output_tokens or 1, work, size)
        await work(size, lambda: reading.finish(rid))
    assert reading.asked is not None
    return reading.asked


class _Reading:
    """A request that is being understood, in steps that wait for nothing."""

    def __init__(self, body: bytes, config: Config, limits: Limits | None, core: Callable[[str], str], *, kept: bool) -> None:
        request, _, ignored = decoded(body, ResponsesRequest, config, limits)
        assert isinstance(request, ResponsesRequest)
        _check(request, kept=kept)
        self.request = request
        self.asked: Asked | None = None
        self._config = config
        self._limits = limits
        self._core = core(request.model or "")
        self._ignored = ignored
        self._kept = kept
        self.prompt = Prompt(request, self._core, ignored, config, kept=kept)

    def gather(self) -> None:
        """Make chat's fields of it. What it speaks of has been fetched."""
        request = self.request
        self.prompt.gather()
        fields = self.prompt.fields
        fields |= {name: value for name in LIKE_CHAT if (value := getattr(request, name)) is not None}
        if request.max_output_tokens is not None:
            fields["max_completion_tokens"] = request.max_output_tokens
        if LOGPROBS in (request.include or ()):
            fields["logprobs"] = True
        if request.top_logprobs is not None:
            fields["top_logprobs"] = request.top_logprobs
        if request.stream or request.background:  # of one in the background it is known how far it is
            fields["stream"] = True

    def finish(self, rid: str) -> None:
        """Find out what is asked. It has been gathered."""
        request = self.request
        call = self.prompt.call(self._limits)
        call.names = {**call.names, "max_tokens": "max_output_tokens"}
        call.ignored = [
            *check_unknown(sorted(self._ignored), strict=self._config.strict_fields),
            *idle(call.priority, self._config),
        ]
        if call.grammar is not None:
            call.grammar = msgspec.structs.replace(
                call.grammar,
                field=call.grammar.field.replace("response_format.json_schema", "text.format").replace("response_format", "text.format"),
            )
        store = self._kept and request.store is not False
        options = request.stream_options
        include = frozenset(request.include or ())
        shown = Shown(
            id=f"resp_{self._core}",
            echo=_echo(request, store),
            logprobs=LOGPROBS in include,
            sealed=SEALED in include,
            obfuscate=bool(options and options.include_obfuscation),
        )
        self.asked = Asked(
            call=call,
            shown=shown,
            places=self.prompt.places,
            input=self.prompt.input,
            rid=rid,
            previous=request.previous_response_id or None,
            store=store,
            background=bool(request.background),
            stream=bool(request.stream),
        )


def _check(request: ResponsesRequest, *, kept: bool) -> None:
    """Fields that chat has not, or that only this API bounds."""
    for name in request.include or ():
        need(name in INCLUDABLE, f"include: {name[:80]!r} is none of {', '.join(sorted(INCLUDABLE))}.", "include")
    check_metadata(request.metadata)
    for name in ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "previous_response_id"):
        value = getattr(request, name)
        need(value is None or len(value) <= ID_CHARS, f"{name} may have at most {ID_CHARS} characters.", name)
    need(
        request.service_tier is None or request.service_tier in TIERS,
        f"service_tier must be one of {', '.join(sorted(TIERS))}.",
        "service_tier",
    )
    need(request.max_tool_calls is None or request.max_tool_calls >= 1, "max_tool_calls must be at least 1.", "max_tool_calls")
    need(request.stream_options is None or bool(request.stream), "stream_options is only allowed when stream is true.", "stream_options")
    if request.background:
        need(kept, "background needs a store, and this server has none (--no-store). Leave it out.", "background")
        need(request.store is not False, "background needs store to be true: what becomes of it can only be kept.", "background")


def _echo(request: ResponsesRequest, store: bool) -> dict[str, Any]:
    """What the reply repeats of the request, as OpenAI's does. What was left out and is the model's to say is null."""
    text = request.text
    shape: dict[str, Any] = {"type": "text"}
    if text is not None and text.format is not None:
        given = text.format
        shape = {"type": given.type}
        if given.type == "json_schema":
            shape |= {
                "name": given.name or "",
                "description": given.description,
                "schema": given.schema_,
                "strict": given.strict is not False,
            }
    reasoning = request.reasoning
    return {
        "background": bool(request.background),
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id or None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": store,
        "temperature": request.temperature,
        "text": {"format": shape, "verbosity": "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": [tool_echo(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


# ------------------------------------------------------------------ /v1/responses/input_tokens


async def parse_count(
    body: bytes, config: Config, limits: Limits | None, *, tenant: str, records: Records | None, length: Length, work: Work
) -> tuple[int, list[str]]:
    """How many tokens the prompt has, and the ignored fields. Raises as `parse`, and what `length` raises."""
    ignored: list[str] = []

    def begin() -> tuple[Prompt, bytes]:
        request, _, unknown = decoded(body, InputTokensRequest, config, limits)
        prompt = Prompt(request, "0", unknown, config, kept=records is not None)
        ignored.extend(check_unknown(sorted(unknown), strict=config.strict_fields))
        return prompt, finish(prompt) if prompt.whole else b""

    def finish(prompt: Prompt) -> bytes:
        if prompt.whole:
            prompt.gather()
        return question(prompt.call(limits))

    prompt, asked = await work(len(body), begin)
    if not prompt.whole:
        await prompt.fetch(records, tenant)
        size = len(body) + prompt.fetched
        await work(size, prompt.gather)
        if prompt.request.truncation == "auto":
            await prompt.fit(limits, length, 1, work, size)
        asked = await work(size, lambda: finish(prompt))
    try:
        count, _ = await length(asked, prompt.request.model or "")
    except PenstockError as error:
        raise renamed(error, prompt.places) from None
    return count, ignored
