"""The structs of the OpenAI request bodies, and their strict decoding.

What it is: OpenAI's fields and vLLM's extras as msgspec structs; `decode`, whose errors name the field. Fields that would change what the answer
is and do not exist here are 400 `unsupported_feature` (refused.py); other unknown ones are ignored and named, so that the reply can warn.
What it does not know: what the fields mean together (openai.py), HTTP.
It is long because both requests have many fields.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from penstock.core.actors.text.bounds import ALL_FIELDS, FIELDS, SMALL, check_body, check_depth, check_fields, check_raw
from penstock.core.protocol.errors import InvalidRequest, ModelNotFound, RequestTooLarge
from penstock.core.protocol.messages import Limits
from penstock.core.protocol.wording import LONGEST_NAME, plain, type_words
from penstock.transports import refused


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    tool_calls_done: bool | None = None
    events: list[str] | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. Fields that are not named here reach the chat template unseen."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | msgspec.UnsetType | None = msgspec.UNSET
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None
    # Those of other servers that are refused (refused.MESSAGE_FIELDS)
    prefix: Any = None
    partial: Any = None
    audio: Any = None
    images: Any = None
    videos: Any = None
    attachments: Any = None
    tools: Any = None


class FunctionSpec(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    function: FunctionSpec
    type: Literal["function"] | None = "function"


class JsonSchema(msgspec.Struct, frozen=True):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class Structure(msgspec.Struct, frozen=True):
    """vLLM's: a tag and the schema of what stands in it."""

    begin: str
    end: str
    schema_: dict[str, Any] | bool | None = msgspec.field(default=None, name="schema")


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str
    json_schema: JsonSchema | None = None
    structures: list[Structure] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's: one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None


LogitBias = Annotated[
    dict[str, Any], msgspec.Meta(extra_json_schema={"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}})
]
"""Token ids as JSON's keys; checked in openai.py, so that an error can name key and value."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both requests share. null means "not given"."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: LogitBias | None = None
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
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    best_of: int | None = None
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
    retain_s: float | None = None
    on_disconnect: str | None = None
    stream_interval: int | None = None
    stream_smoothing_ms: float | None = None
    spec_decode: bool | str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # SGLang's
    rid: str | None = None
    no_stop_trim: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


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
    chat_template: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None


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


class MetadataRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/chat/completions/{completion_id}: `metadata` takes the place of what is there."""

    metadata: dict[str, Any] | None


HINTS: dict[str, str] = {
    "user": "Whoever asks is told by the API key.",
    "metadata": "Nothing is stored that it could be found by.",
    "safety_identifier": "Whoever asks is told by the API key.",
    "prompt_cache_key": "Equal prefixes are found without it; cache_salt keeps them apart.",
    "prompt_cache_retention": "Prefixes stay as long as there is room.",
    "prompt_cache_options": "Equal prefixes are found without it, wherever they end.",
    "service_tier": "There is one; see priority.",
    "prediction": "It lets a server guess ahead and leaves the answer as it is.",
}
"""Fields that clients send as hints: nothing of the answer depends on them here, so they are taken in silence. Why, of each."""

# Fields that hold prompts, and how many texts of a prompt's length each may hold.
PROMPTS = {
    "prompt": 128,
    "messages": 1,
    "documents": 1,
    "tokens": 1,
    "system": 1,
    "inputs": 1,
    "input": 1,
    "instructions": 1,
    "token_ids": 1,
}

# Known fields that are objects whose fields are looked at one by one, and the fewest bytes of a field.
OBJECTS = frozenset({"stream_options", "response_format", "structured_outputs", "chat_template_kwargs", "parameters"})
LEAST_FIELD = 6

MOST_NAMED = 8
"""Unknown fields that an error names."""

_raw_fields: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
REQUESTS: tuple[type[msgspec.Struct], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, MetadataRequest)

_decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {t: msgspec.json.Decoder(t) for t in REQUESTS}
_known: dict[type[msgspec.Struct], frozenset[str]] = {t: frozenset(t.__struct_fields__) for t in _decoders}
REFUSED: dict[type[msgspec.Struct], Mapping[str, refused.Refused]] = {
    ChatRequest: refused.APART,
    CompletionRequest: refused.GENERATION,
    TokenizeRequest: refused.PROMPT,  # what only the answer would depend on may be there: people send what they would ask with
    DetokenizeRequest: {},
    MetadataRequest: {},
}
_tables = {
    kind: refused.Table(rows, _known[kind] - HINTS.keys(), refused.FAMILIES if kind in (ChatRequest, CompletionRequest) else ())
    for kind, rows in REFUSED.items()
}


def declare(kind: type[msgspec.Struct], rows: Mapping[str, refused.Refused], families: tuple[str, ...] = ()) -> None:
    """Have `decode` understand a request of another API, which refuses `rows`, names of `families`, and its own fields in another spelling."""
    _decoders[kind] = msgspec.json.Decoder(kind)
    _known[kind] = frozenset(kind.__struct_fields__)
    _tables[kind] = refused.Table(rows, _known[kind], families)


_options = refused.Table({}, StreamOptions.__struct_fields__)
_AT = re.compile(r" - at (?:`key` in )?`\$?\.?([^`]*)`$")


def decode(
    body: bytes, kind: type[msgspec.Struct], limits: Limits | None = None, most: int = ALL_FIELDS
) -> tuple[Any, dict[str, msgspec.Raw], list[str]]:
    """The request, its raw top-level fields, and the names of unknown ones. Raises InvalidRequest or UnsupportedFeature; ModelNotFound for
    a model without a name; RequestTooLarge for what `limits` forbid, and for more than `most` fields in all, before it is parsed."""
    try:
        return _decode(body, kind, limits, most)
    except RecursionError:  # the parser's own bound, which also holds for what it skips
        raise InvalidRequest("The request body is nested too deeply: fewer levels of lists and objects are needed.") from None


def _decode(body: bytes, kind: type[msgspec.Struct], limits: Limits | None, most: int) -> tuple[Any, dict[str, msgspec.Raw], list[str]]:
    try:
        check_body(body, most)
    except RequestTooLarge:
        _blame(body, kind, limits)
        raise
    try:
        check_depth(body)
        raw = _raw_fields.decode(body)
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    check_fields(len(raw))
    if len(body) > SMALL:
        _check_raw(raw, kind, limits)
        # What is parsed is what was checked: of a field that is there many times, the last.
        body = msgspec.json.encode({name: value for name, value in raw.items() if name in _known[kind]})
    for name in OBJECTS & raw.keys():
        if len(bytes(raw[name])) > LEAST_FIELD * FIELDS and bytes(raw[name])[:1] == b"{":
            check_fields(len(fields_of(raw[name], name)), name)
    unknown: list[str] = []
    if not raw.keys() <= _known[kind]:
        for name in raw.keys() - _known[kind]:
            if not refused.check(_tables[kind], name, raw[name]) and name not in HINTS:
                unknown.append(name)
    try:
        request = _decoders[kind].decode(body)
        if getattr(request, "model", None) == "":
            raise ModelNotFound("The model '' does not exist here: name one of /v1/models, or leave model out.", param="model")
        return request, raw, sorted(unknown)
    except msgspec.ValidationError as error:
        raise _bad_field(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None


def fields_of(raw: msgspec.Raw, name: str) -> dict[str, msgspec.Raw]:
    """Those of the object `name`. Raises InvalidRequest."""
    try:
        return _raw_fields.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{name} cannot be read: {error}."[:300], param=name) from None


def check_options(raw: msgspec.Raw) -> list[str]:
    """The unknown fields of stream_options, as paths. Raises UnsupportedFeature for a known one in another spelling."""
    given = fields_of(raw, "stream_options")
    unknown = given.keys() - set(StreamOptions.__struct_fields__)
    return sorted(f"stream_options.{name}" for name in unknown if not refused.check(_options, name, given[name], "stream_options."))


def check_unknown(names: list[str], *, strict: bool) -> list[str]:
    """Of unknown fields, with --strict-fields: raises InvalidRequest naming them."""
    if names and strict:
        shown = ", ".join(name[:LONGEST_NAME] for name in names[:MOST_NAMED])
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise InvalidRequest(
            f"Fields that nobody knows here are refused (--strict-fields): {shown}{more}. Leave them out.", param=names[0][:LONGEST_NAME]
        )
    return names


def _check_raw(raw: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct], limits: Limits | None) -> None:
    if limits is not None:
        check_raw({name: bytes(raw[name]) for name in _known[kind] & raw.keys()}, limits, known=_known[kind], texts=PROMPTS)


def _blame(body: bytes, kind: type[msgspec.Struct], limits: Limits | None) -> None:
    """Raises RequestTooLarge naming the field that has too much in it, if it is a known one. The others are skipped, which is cheap."""
    sketch = msgspec.defstruct("Sketch", [(name, msgspec.Raw, msgspec.Raw()) for name in sorted(_known[kind])])
    try:
        found = msgspec.json.decode(body, type=sketch)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    _check_raw({name: value for name, value in msgspec.structs.asdict(found).items() if bytes(value)}, kind, limits)


def _bad_field(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> InvalidRequest:
    text = str(error)
    found = _AT.search(text)
    what = text[: found.start()] if found else text
    param = found.group(1) if found else None
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return InvalidRequest(f"{param} is required.", param=param)
    choice = re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL)
    if choice and param:
        return InvalidRequest(f"{param} must be {type_words(_type_at(kind, param))}, but is {choice.group(1):.100}.", param=param)
    said = plain(what)
    text = f"{param} {said}." if said != what else f"{param}: {what}."
    return InvalidRequest(text if param else f"The request body {said}." if said != what else f"{what}.", param=param or None)


def _type_at(kind: Any, path: str) -> Any:
    """The declared type of a field as msgspec's errors name it: `messages[...].role`."""
    for name in path.split("."):
        kind = typing.get_type_hints(kind)[name.partition("[")[0]]
        for _ in range(1 + name.count("[")):
            if typing.get_origin(kind) in (types.UnionType, typing.Union):  # of those with fields or items there is at most one
                kind = next(one for one in typing.get_args(kind) if one not in (str, int, type(None)))
            if typing.get_origin(kind) is list:
                (kind,) = typing.get_args(kind)
    return kind
