"""The page for HTTP clients: endpoints, fields, streams, errors, limits.

What it is: `page()`, made from the routes, the request structs and the tables beside them, so that it cannot be out of date; docs/generate.py writes
it. The texts about streams and errors stand here; tests hold that every field, code and endpoint has its line.
What it does not know: how anything is answered.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import msgspec

from penstock.core.actors.text import bounds
from penstock.core.protocol.config import Config
from penstock.transports.builtin import openai_routes
from penstock.transports.fields import FIELDS
from penstock.transports.gateway import Gateway
from penstock.transports.http import make_app
from penstock.transports.openai_schema import HINTS, ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest
from penstock.transports.openapi import BODY
from penstock.transports.openapi_replies import REPLIES
from penstock.transports.refused import GENERATION, MESSAGE_FIELDS

NOTE = "<!-- Made by docs/generate.py; edit the code, then run it. -->\n"
REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

CODES: dict[str, tuple[str, str]] = {
    "invalid_value": (
        "400",
        "A field is wrong, or its settings leave no token to draw; `param` names it. 415: content type or content encoding.",
    ),
    "unknown_field": ("400", "Kept for a strict mode that does not exist yet."),
    "context_length_exceeded": (
        "400",
        "The prompt, or the prompt and the answer that was asked for, do not fit the context. The message has the numbers.",
    ),
    "unsupported_feature": ("400", "A field that would change the answer and does not exist here (see below)."),
    "invalid_api_key": ("401", "No valid key: `Authorization: Bearer KEY` or `x-api-key: KEY`."),
    "model_not_found": ("404", "No such model; the message lists those that there are."),
    "not_found": ("404", "Nothing at this path."),
    "method_not_allowed": ("405", "`Allow` says what is."),
    "request_timeout": ("408", "The request did not arrive within --receive-timeout-s."),
    "request_too_large": (
        "413",
        "Body, text, list or conversation beyond a limit; 431: the headers. The message has the numbers and the option.",
    ),
    "rate_limit_exceeded": ("429", "Kept for quotas that do not exist yet."),
    "queue_full": ("429", "--max-num-queued-reqs or --max-num-queued-tokens wait already (503 with --queue-full-status 503)."),
    "too_many_streams": ("429", "--max-streams are in progress at this edge."),
    "internal_error": ("500", "The server's mistake; it is logged with the request id."),
    "engine_failure": ("500", "The engine failed on this very request, so that trying again would not help."),
    "engine_unavailable": ("503", "The server starts, or lost a process in the middle of a stream. Try again."),
    "draining": ("503", "The server shuts down. Try again: another instance may take it."),
    "slow_client": ("-", "A stream whose client does not read is parked, and cut after --stream-stall-s; it gets no answer any more."),
}
"""code -> (status, when). Every code of core/protocol/errors.py."""


def _type(kind: Any) -> str:
    hint = re.sub(r"typing\.|penstock\.[\w.]+\.|msgspec\.|\s\|\sNone|UnsetType \| ", "", str(kind))
    hint = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", hint)
    hint = re.sub(r"^Optional\[(.*)\]$", r"\1", hint)
    return "object" if "Annotated" in hint else hint.replace("|", "\\|")


def _rows(kind: type[msgspec.Struct], *, without: tuple[str, ...] = ()) -> list[str]:
    hints = typing.get_type_hints(kind)
    return [
        f"| `{field.encode_name}`{' (required)' if field.required else ''} | {_type(hints[field.name])} | {FIELDS[field.name]} |"
        for field in msgspec.structs.fields(kind)
        if field.name not in without
    ]


def _table(kind: type[msgspec.Struct], *, without: tuple[str, ...] = ()) -> list[str]:
    return ["| field | type | what it does |", "|---|---|---|", *_rows(kind, without=without), ""]


def _endpoints() -> list[str]:
    app = make_app(Gateway(Config(), 0), [openai_routes]).app
    out = ["| endpoint | what it does | body |", "|---|---|---|"]
    for route in sorted(app.routes, key=lambda route: route.path_format):
        for handler in getattr(route, "route_handlers", []):
            for method in sorted(str(m) for m in handler.http_methods if str(m) != "OPTIONS"):
                if route.path_format.startswith("/schema"):
                    continue
                body = handler.opt.get(BODY)
                out.append(f"| `{method} {route.path_format}` | {handler.summary} | {body.__name__ if body else ''} |")
    return [*out, "| `GET /schema` and `/schema/openapi.json` | This API as a page and as OpenAPI |  |", ""]


def page() -> str:
    shared = GenerationRequest.__struct_fields__
    refused: dict[str, list[str]] = {}
    for name, entry in GENERATION.items():
        refused.setdefault(entry.instead, []).append(f"`{name}`")
    out = [
        "# HTTP",
        NOTE,
        "OpenAI's chat completions and completions, with vLLM's further fields. `make run` serves on 127.0.0.1:8000; `/schema` is the same in OpenAPI.",
        "",
        "## Endpoints",
        "",
        *_endpoints(),
        "HEAD works wherever GET does. With keys (`--api-key-file FILE`, or `PENSTOCK_API_KEY`) every path but `/health`, `/health/live`, `/health/ready`"
        " and `/health/decode` needs one, as `Authorization: Bearer KEY` or `x-api-key: KEY`; OPTIONS never does. Prefixes are cached a key: nobody can"
        " find out by timing what another key asked.",
        "",
        "## Fields of both generation requests",
        "",
        *_table(GenerationRequest),
        "Numbers without a default above take the model's generation_config.json, or OpenAI's. null means \"not given\".",
        "",
        "## POST /v1/chat/completions",
        "",
        *_table(ChatRequest, without=shared),
        "## POST /v1/completions",
        "",
        *_table(CompletionRequest, without=shared),
        "## POST /tokenize",
        "",
        *_table(TokenizeRequest),
        "## POST /detokenize",
        "",
        *_table(DetokenizeRequest),
        "## Other fields",
        "",
        f"Hints, taken without effect: {', '.join(f'`{name}`' for name in sorted(HINTS))}.",
        "",
        "Refused by name (400 `unsupported_feature`), unless their value asks for nothing, since ignoring them would give another answer than was asked for:",
        "",
        "| fields | instead |",
        "|---|---|",
        *(f"| {', '.join(names)} | {instead or 'Leave it out.'} |" for instead, names in refused.items()),
        f"| in a message: {', '.join(f'`{name}`' for name in MESSAGE_FIELDS)} | {MESSAGE_FIELDS['prefix'].instead} |",
        "",
        "Any other field is ignored, and named in the reply's header `x-penstock-ignored-fields`.",
        "",
        "## Replies and streams",
        "",
        "A reply has `id`, `object`, `created`, `model`, `choices`, `usage` and `system_fingerprint` (it changes whenever numerics may). `finish_reason` is"
        " `stop` (`stop_reason` names the stop string or token), `length`, or `error`: then this one choice could not go on for reasons of the request's own"
        " settings, its `error` says why, and the others are whole. If every choice failed, the request did.",
        "",
        "With `stream: true` the reply is `text/event-stream`. Per choice: a chunk with the role (chat), chunks with text, one chunk with an empty delta and"
        " the finish_reason; then, if asked for, a chunk without choices and with the usage; then `data: [DONE]`. The deltas' concatenation is the text"
        ' that the reply without stream has. A stream that fails ends with `data: {"error": ...}` and without [DONE]; one that fails before its first'
        " byte is a plain error. A comment every --keep-alive-s keeps proxies awake. Whoever closes the connection cancels the request.",
        "",
        "## Errors",
        "",
        'Always `{"error": {"message", "type", "param", "code"}}`. 429 and 503 carry `Retry-After` (seconds). No client\'s mistake is a 5xx.',
        "",
        "| code | status | when |",
        "|---|---|---|",
        *(f"| `{code}` | {status} | {when} |" for code, (status, when) in CODES.items()),
        "",
        "While an engine is being restarted, running streams pause and new requests wait (within the queue's bounds, at most five minutes); nothing is lost.",
        "",
        "## Limits",
        "",
        "| what | limit |",
        "|---|---|",
        "| a body, decoded | --max-body-bytes (413) |",
        f"| the text of one prompt | what the context can hold, and --max-prompt-chars (default {bounds.CHARS_PER_TOKEN} characters a token of the context, at least {bounds.LEAST_CHARS}) |",
        f"| token ids of one request | the context a prompt; {bounds.IDS} together |",
        "| ids of /detokenize, or that truncate_prompt_tokens cuts | a quarter of --max-prompt-chars |",
        f"| any other field | {bounds.FIELD_BYTES} bytes and {bounds.ITEMS} items |",
        "| messages | --max-messages |",
        "| requests in progress, waiting | --max-streams; --max-num-queued-reqs, --max-num-queued-tokens |",
        "| time to send a request | --receive-timeout-s (408) |",
        "",
        "They hold before any work is done, so that one client's giant does not make another wait. Long texts that are legal are tokenised beside short ones.",
        "",
        "## Headers",
        "",
        "In: `x-request-id` (kept if it is plain; else one is made), `traceparent` and `tracestate` (W3C), `x-include-metrics: 1` (adds `metrics`: this"
        " request's own times), `content-encoding` (gzip, deflate, br, zstd; else 415 with `accept-encoding`). Out: `x-request-id`, `openai-processing-ms`,"
        " `traceparent`, `retry-after`, `x-penstock-ignored-fields`. For web pages of other origins: `--allowed-origins` (off by default), with"
        " --allowed-methods, --allowed-headers and --allow-credentials.",
        "",
        "## Health",
        "",
        "| path | 200 means |",
        "|---|---|",
        "| `/health`, `/health/ready` | everything is up that an answer needs. `ages_s` has the seconds since each process was last heard of; a process that stands still is 503 within ten seconds |",
        "| `/health/live` | this HTTP process runs its loop |",
        "| `/health/decode` | running requests make progress (503 when none had a step for a minute) |",
        "",
        "Ready for a load balancer, live for a restarter. `/metrics` has Prometheus text; [metrics](metrics.md) names everything.",
        "",
    ]
    assert set(REPLIES) <= {word for line in out for word in re.findall(r"(/[\w/{}]+)`", line)}, "an endpoint has no line"
    return "\n".join(out)
