"""The page for HTTP clients: endpoints, fields, replies, streams, errors, limits.

What it is: `page()`, made from the routes, the request and reply structs, the error classes, the options and the tables beside them, so that it
cannot be out of date; docs/generate.py writes it. The texts about streams and times stand here; tests hold that every field, code and endpoint has
its line, and that what the lines say is so.
What it does not know: how anything is answered.
Long: every section of the one page stands here, in its order.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import msgspec
from make_http_apis import apis

from penstock.core.actors.text import admission, bounds, health, lane, obedience
from penstock.core.actors.text.actor import REPLAY_TIMEOUT_S
from penstock.core.actors.text.answers import MOST_CALLS
from penstock.core.processes import grammars as compiling
from penstock.core.protocol import errors
from penstock.core.protocol.config import OPTIONS, Config
from penstock.plugins.formats import BUILT_IN
from penstock.plugins.grammars import bounds as bounded
from penstock.plugins.grammars import keywords, numbers, trial
from penstock.transports import batches, cors, decoding, gateway, http, link, logprobs, openapi_replies, protocol, request, store
from penstock.transports.abilities import ABILITIES
from penstock.transports.builtin import register_transports
from penstock.transports.elsewhere import KNOWN
from penstock.transports.fields import about, about_reply
from penstock.transports.http import make_app
from penstock.transports.openai_schema import (
    HINTS,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from penstock.transports.openapi import BODY
from penstock.transports.openapi_replies import OWN_ERRORS, REPLIES, errors_of, every_answer, replies_at
from penstock.transports.refused import FAMILIES, MESSAGE_FIELDS, Refused
from penstock.transports.responses_schema import ResponsesRequest
from penstock.transports.statuses import NAMED, status_of
from penstock.transports.store import open_store

NOTE = "<!-- Made by docs/generate.py; edit the code, then run it. -->\n"

WHEN: dict[str, str] = {
    "invalid_value": "A field is wrong, or its settings leave no token to draw; `param` names it. Or the body is no JSON, the request no HTTP/1.1."
    " 415: content type or content encoding. 501: a transfer coding that is not chunked.",
    "context_length_exceeded": "The prompt, or it and the answer that was asked for, do not fit the context. The message has the numbers.",
    "unsupported_feature": "A field, or a value of one, that would change the answer and does not exist here.",
    "invalid_api_key": "No valid key was sent, or it was revoked meanwhile: a stream ends with this error then.",
    "insufficient_scope": "The key's scopes ([tables](tables.md)) do not hold this endpoint.",
    "model_not_found": "No such model; the message lists those that there are.",
    "not_found": "Nothing at this path.",
    "method_not_allowed": "The header `allow` says what is.",
    "request_timeout": "The request did not arrive within --receive-timeout-s.",
    "request_too_large": "The body, or a field of it, is beyond a limit (below). 431: the headers are. The message has the numbers.",
    "queue_full": f"--max-num-queued-reqs or --max-num-queued-tokens wait already. Retry-After tells when half of them will have started, as things go:"
    f" {admission.MIN_RETRY_S:g} to {admission.MAX_RETRY_S:g} s. Or too many tokenizer questions at once. `--queue-full-status 503` makes it a 503, and it is one where the text process does not keep up.",
    "rate_limit_exceeded": "The tenant has used its requests or tokens a minute, or its requests at once ([tables](tables.md#limits)). The type is `requests`, `tokens` or"
    " `rate_limit_error`. Without Retry-After (and with `x-should-retry: false`) the prompt has more tokens than a minute has.",
    "budget_exceeded": "The tenant has spent its budget ([tables](tables.md#budgets)). Retry-After tells when the next period begins; a budget that is not renewed has `x-should-retry: false` instead.",
    "too_many_streams": "--max-streams are in progress at this HTTP process.",
    "store_full": "The server keeps as much as it may (--store-max-bytes, --store-max-rows, --max-files, --max-files-bytes) and nothing of that may be dropped.",
    "store_unavailable": "What the server keeps cannot be read or written: a full disk, a server that ends.",
    "batch_over": "The batch is over and cannot be cancelled.",
    "stream_not_found": "There is no such [retained stream](streams.md).",
    "stream_exists": "A retained stream has this x-request-id already.",
    "slow_client": "The last event of a stream whose client did not read it: nothing for `--stream-stall-s`, or too little. See [Streams](streams.md#slow-readers).",
    "stream_taken": "Another connection resumed this stream: it goes on there.",
    "stream_too_long": "The stream outgrew --retained-stream-bytes, or there were too many of them (--retained-bytes).",
    "cancelled": "Somebody cancelled it: `DELETE /v1/requests/{request_id}`. A stream ends with this error.",
    "internal_error": "The server's mistake; it is logged with the request id.",
    "engine_failure": "The engine failed on this very request, so that trying again would not help.",
    "engine_unavailable": "The server starts, or lost a process that the request needed.",
    "draining": "The server shuts down: another instance may take the request.",
}
"""When an error comes. Every code of core/protocol/errors.py that some error class has."""

NOT_HTTP = (errors.ConfigError, errors.PluginError, errors.PluginFault, errors.CheckpointError, errors.ProtocolError)
"""Errors of the start, of plugins and of links: no client gets them under this name."""

DEFINE = (errors, batches, decoding, gateway, http, link, protocol, request, store)
"""Modules that define errors which clients get."""


def flags(text: str) -> str:
    """Options in code, with their defaults. Raises KeyError for one that does not exist."""

    def shown(found: re.Match[str]) -> str:
        option = OPTIONS[found.group(1).replace("-", "_")]
        number = isinstance(option.default, (int, float)) and not isinstance(option.default, bool)
        return f"`--{found.group(1)}`{f' ({_count(option.default, option.is_size)})' if number else ''}"

    return re.sub(r"(?<![\w`-])--([a-z][a-z-]*[a-z])", shown, text)


def _count(number: float, size: bool) -> str:
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if size and number >= unit and number % unit == 0:
            return f"{number // unit} {name}"
    return f"{number:g}" if number < 1e6 or number != int(number) else str(int(number))


# ------------------------------------------------------------------ types


def options_of(hint: Any) -> tuple[Any, ...]:
    """What a declared type may be, without null and "not given"."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(one for some in get_args(hint) for one in options_of(some) if one not in (type(None), msgspec.UnsetType))
    return options_of(get_args(hint)[0]) if hasattr(hint, "__metadata__") else (hint,)


def json_type(hint: Any) -> str:
    """A declared type in JSON's words."""
    words: list[str] = []
    for one in options_of(hint):
        origin, args = typing.get_origin(one), get_args(one)
        if origin is list:
            inner = json_type(args[0])
            words.append(f"array of ({inner})" if " or " in inner else f"array of {inner}")
        elif origin is typing.Literal:
            words.append(" or ".join(f'"{value}"' for value in args))
        elif origin is dict or one is dict:
            words.append("object")
        elif isinstance(one, type) and issubclass(one, msgspec.Struct):
            words.append(f"[{one.__name__}](#{one.__name__.lower()})")
        else:
            words.append({str: "string", int: "integer", float: "number", bool: "boolean", Any: "any", msgspec.Raw: "object"}[one])
    return " or ".join(words)


def structs_in(kinds: Iterable[type[msgspec.Struct]]) -> list[type[msgspec.Struct]]:
    """The structs that fields of these are made of, at any depth."""
    found: dict[type[msgspec.Struct], None] = {}

    def look(hint: Any) -> None:
        for one in options_of(hint):
            for inner in get_args(one):
                look(inner)
            if isinstance(one, type) and issubclass(one, msgspec.Struct) and one not in found:
                found[one] = None
                for field in typing.get_type_hints(one).values():
                    look(field)

    for kind in kinds:
        for hint in typing.get_type_hints(kind).values():
            look(hint)
    return list(found)


def asked(kind: type[msgspec.Struct], *, without: Sequence[str] = (), only: Sequence[str] = ()) -> list[str]:
    """The table of a request's fields."""
    hints = typing.get_type_hints(kind)
    out = ["| field | type | what it does | values | default | spelling |", "|---|---|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        if field.name not in without and (not only or field.name in only):
            says = about(kind.__name__, field.encode_name)
            default = "required" if field.required else says.default
            cells = f"`{field.encode_name}`", json_type(hints[field.name]), says.does, says.allowed, default, says.of
            out.append(f"| {' | '.join(map(flags, cells))} |")
    return [*out, ""]


def told(kind: type[msgspec.Struct]) -> list[str]:
    """The table of a reply's fields."""
    hints = typing.get_type_hints(kind)
    out = [
        *([" ".join((kind.__doc__ or "").split()), ""] if _has_own_doc(kind) else []),
        "| field | type | what it says |",
        "|---|---|---|",
    ]
    for field in msgspec.structs.fields(kind):
        out.append(f"| `{field.encode_name}` | {json_type(hints[field.name])} | {about_reply(kind.__name__, field.name)} |")
    return [*out, ""]


def _has_own_doc(kind: type[msgspec.Struct]) -> bool:
    return bool(vars(kind).get("__doc__"))


# ------------------------------------------------------------------ tables


def endpoints() -> list[str]:
    gate = gateway.Gateway(Config(), 0, store=open_store(Config(), "unused"))
    app = make_app(gate, [route for spec in register_transports() for route in spec.factory(gate).routes]).app
    out = ["| endpoint | what it does | body | reply | errors |", "|---|---|---|---|---|"]
    for route in sorted(app.routes, key=lambda route: route.path_format):
        handlers = getattr(route, "route_handlers", [])
        for handler in sorted(handlers, key=lambda handler: sorted(map(str, handler.http_methods))):
            for method in sorted(str(m) for m in handler.http_methods if str(m) != "OPTIONS"):
                if route.path_format.startswith("/schema") or handler.include_in_schema is False:
                    continue
                body, (answers, _) = handler.opt.get(BODY), replies_at(route.path_format, method)
                wrong = errors_of(route.path_format, method)
                replies = [
                    f"{answer.status} {' or '.join(_medium(media, kind) for media, kind in [*answer.content.items(), *also(answer)])}"
                    for answer in answers
                ]
                asks = f"[{body.__name__}](#{body.__name__.lower()})" if body else ""
                out.append(
                    f"| `{method} {route.path_format}` | {handler.summary} | {asks} | {'; '.join(replies)} | {', '.join(map(str, wrong))} |"
                )
    for path, summary in openapi_replies.SUMMARIES.items():
        media = ", ".join(f"`{kind}`" for answer in REPLIES[path][0] for kind in answer.content)
        out.append(f"| `GET {path}` | {summary} |  | 200 {media} | {', '.join(map(str, errors_of(path)))} |")
    return [*out, ""]


def also(answer: openapi_replies.Answer) -> list[tuple[str, Any]]:
    return [] if answer.also is None else [(openapi_replies.JSON, answer.also)]


def _medium(media: str, kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return f"[list of one]({_medium(media, get_args(kind)[0]).partition('](')[2]}"
    named = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return f"[{kind.__name__}](#{kind.__name__.lower()}){' as events' if media == openapi_replies.SSE else ''}" if named else f"`{media}`"


def error_classes() -> list[type[errors.PenstockError]]:
    """Every error that a client may get."""
    known = {module.__name__ for module in DEFINE}
    found = [errors.PenstockError]
    for kind in found:
        found += [one for one in kind.__subclasses__() if one not in found and one not in NOT_HTTP and one.__module__ in known]
    return found


def codes() -> list[str]:
    kinds = error_classes()
    out = ["| code | status | type | Retry-After | when |", "|---|---|---|---|---|"]
    for code in get_args(errors.ErrorCode):
        mine = [kind for kind in kinds if kind.default_code == code and kind not in (errors.FinalError, errors.RetryableError)]
        if not mine:
            continue
        statuses = sorted({kind.status for kind in mine})
        named = sorted({kind.type for kind in mine})
        waits = "yes" if any(status in (429, 503) for status in statuses) else ""
        cells = f"`{code}`", ", ".join(map(str, statuses)), ", ".join(f"`{name}`" for name in named), waits, flags(WHEN[code])
        out.append(f"| {' | '.join(cells)} |")
    return [*out, ""]


def unused() -> list[str]:
    """Codes that no error class has: kept for what does not exist yet."""
    used = {kind.default_code for kind in error_classes()}
    return [code for code in get_args(errors.ErrorCode) if code not in used]


def statuses() -> list[str]:
    """Of every field that clients know, at each of OpenAI's endpoints."""
    out = ["| field | spelling | chat | completions | Responses | which values, why, or what instead |", "|---|---|---|---|---|---|"]
    for name, whose in sorted(NAMED.items()):
        each = [status_of(kind, name) for kind in (ChatRequest, CompletionRequest, ResponsesRequest)]
        whys = dict.fromkeys(one.why for one in each if one.why)
        out.append(f"| `{name}` | {whose} | {' | '.join(one.word for one in each)} | {flags(' '.join(whys))} |")
    return [*out, ""]


def elsewhere(rows: list[str]) -> list[str]:
    """Of every endpoint that clients know: is it there? `rows` is the table of those that are."""
    there = {cell.strip(" `") for row in rows for cell in row.split("|")[1:2]}
    out = ["| endpoint | is there | else |", "|---|---|---|"]
    for known, instead in KNOWN.items():
        has = known in there
        assert has or instead, f"{known} is not there, and nothing says what to use"
        out.append(f"| `{known}` | {'yes' if has else 'no'} | {'' if has else instead} |")
    return [*out, ""]


def refusals(table: Mapping[str, Refused]) -> list[str]:
    rows: dict[tuple[str, str], list[str]] = {}
    for name, entry in table.items():
        neutral = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in entry.neutral if value is not None)
        rows.setdefault((entry.instead or "Leave it out.", neutral), []).append(f"`{name}`")
    return [
        "| fields | may be (besides null) | instead |",
        "|---|---|---|",
        *(f"| {', '.join(names)} | {neutral} | {instead} |" for (instead, neutral), names in rows.items()),
        "",
    ]


def limits() -> list[str]:
    rows = [
        ("the header block", "--max-header-bytes", "431"),
        ("a body, as sent and as decoded", "--max-body-bytes", "413"),
        ("the text of one prompt", "as many characters as the context's tokens can have", "400 `context_length_exceeded`"),
        (
            "the same, and texts for /tokenize",
            f"--max-prompt-chars; by default {bounds.CHARS_PER_TOKEN} for each token of the context, at least {bounds.LEAST_CHARS}",
            "413",
        ),
        ("tokens of a prompt and its answer", "--max-model-len (by default the model's), or what the KV cache holds", "400"),
        (
            "token ids of several prompts together (of one: see the context)",
            f"{bounds.IDS + bounds.ITEMS}, or more where the context is larger",
            "413",
        ),
        (
            "ids of /detokenize, and of a prompt that truncate_prompt_tokens cuts",
            f"one for {bounds.CHARS_PER_ID} of --max-prompt-chars",
            "413",
        ),
        ("fields of a request", str(bounds.FIELDS), "413"),
        ("the same and those of the objects in it", f"{bounds.ALL_FIELDS} (asked of bodies above {bounds.SMALL} bytes)", "413"),
        (
            "fields of a request of Anthropic's API or of Responses, which becomes one of chat, with those of the objects in it, as the client wrote them",
            f"{bounds.TRANSLATED_FIELDS} (asked of bodies above {bounds.SMALL} bytes)",
            "413",
        ),
        ("fields of the items that previous_response_id stands for", str(bounds.ALL_FIELDS), "413"),
        (
            "any other field",
            f"{bounds.FIELD_BYTES} bytes; {bounds.ITEMS} values and keys (asked of bodies above {bounds.SMALL} bytes)",
            "413",
        ),
        ("messages of a conversation", "--max-messages", "400"),
        ("prompts of a request", "--max-prompts", "400"),
        ("n, and prompts times n", "--max-n, --max-choices", "400"),
        ("stop strings, alternatives of logprobs", "--max-stop, --max-logprobs", "400"),
        ("encodings of a body on top of each other", str(decoding.MOST), "415"),
        ("gzip members or zstd frames of a body, the window of zstd", f"{decoding.MEMBERS}, {decoding.ZSTD_WINDOW} bytes", "400"),
        ("a file, files of a tenant, all files' bytes", "--max-file-bytes; --max-files, --max-files-bytes", "413; 429 `store_full`"),
        ("requests of a batch", "--max-batch-lines", "the batch fails with `too_many_tasks`"),
        ("requests in progress at one HTTP process", "--max-streams", "429 `too_many_streams`"),
        ("requests and prompt tokens that wait", "--max-num-queued-reqs, --max-num-queued-tokens", "429 `queue_full`"),
        (
            "requests with a chat_template of their own that wait for it to be rendered: of everybody, and of one key or address",
            f"{admission.MAX_TEMPLATES}, {admission.MAX_TEMPLATES_EACH}",
            "429 `queue_full`",
        ),
        (
            "unsent bytes of a stream",
            "--stream-park-bytes: its request is parked; --stream-max-bytes: it is cut",
            "the connection is reset",
        ),
    ]
    return ["| what | most | beyond it |", "|---|---|---|", *(f"| {what} | {flags(most)} | {then} |" for what, most, then in rows), ""]


def times() -> list[str]:
    idle = protocol.server_options(0, 0)["timeout_keep_alive"]
    rows = [
        (
            "the head of a request, and a pause in its body",
            "--receive-timeout-s",
            f"408; a body must come at {protocol.SLOWEST_BODY} bytes a second",
        ),
        ("a connection without a request", f"{idle} s", "closed"),
        ("a generation", "none", "it runs to its end; whoever closes the connection cancels it"),
        ("a stream without an event", "--keep-alive-s", "the comment `: keep-alive`"),
        (
            "a stream whose client reads nothing",
            "--stream-stall-s",
            "it is cut: `slow_client` is its last event, for as long again; then the connection is reset (see [Streams](streams.md#slow-readers))",
        ),
        ("questions (/v1/models, /tokenize, /detokenize, /tokenizer_info)", f"{gateway.QUERY_TIMEOUT_S:g} s", "503 `engine_unavailable`"),
        ("a server that starts", f"{gateway.SOON_S:g} s", "503 `engine_unavailable`"),
        (
            "an engine that is started again",
            f"{REPLAY_TIMEOUT_S:g} s",
            "running streams pause and go on, new requests wait within the queue's bounds; then 503 `engine_unavailable`",
        ),
        ("a shutdown", "--shutdown-timeout", "what still runs ends with `draining`; new requests have that at once"),
    ]
    return ["| what | time | then |", "|---|---|---|", *(f"| {what} | {flags(time)} | {then} |" for what, time, then in rows), ""]


def beams() -> list[str]:
    return [
        "## Beam search",
        "",
        "With use_beam_search the n answers are the likeliest that a search with `best_of` beams (n without it) finds, best first: the hypotheses of"
        " transformers' `generate` with `num_beams`, `length_penalty` and `early_stopping`. An answer's score is the sum of its tokens' log-probabilities divided"
        " by its number of tokens, the end token included, to the power of length_penalty. Beams share their KV blocks as far as they agree."
        " `temperature` and `seed` have no effect, and the model's sampling defaults do not count. min_tokens, stop_token_ids, ignore_eos and log-probabilities"
        " work, and so does what answers obey ([grammars](#grammars), calls of tools): of each beam the likeliest tokens that may follow are looked at, as with"
        " transformers' `prefix_allowed_tokens_fn`, and the likeliest that `logprobs` tells are among these. Answers differ in their tokens, which may spell the same"
        " text; where the search finds fewer than n that obey, the others end as errors that say so. What would else change which tokens may be drawn (top_p, top_k, min_p, penalties,"
        " logit_bias, allowed_token_ids, bad_words) and `stop` are a 400 that names the field, as is a search for which the KV cache may be too small. No answer is known before the search is over: with stream, each"
        " comes in one piece at the end. usage counts the tokens of the n answers. Each beam counts against --max-choices and --max-num-seqs.",
        "",
    ]


def grammars() -> list[str]:
    words = sorted(keywords.PLAIN | keywords.ONE | keywords.MANY | keywords.NAMED)
    return [
        "## Grammars",
        "",
        "One of response_format, structured_outputs and guided_* may say what every answer of a request obeys (with n, streams, log-probabilities, stop"
        " strings too): tokens that would break it are never drawn, and the answer can end only where it is whole. `min_tokens` gives way where a grammar"
        " allows nothing but the end; with `ignore_eos` it is a 400. Before finish_reason `stop` is told the answer is verified (JSON by a second"
        " implementation of JSON schema, formats included, and no name twice in an object); if it does not obey, it ends as an error, never silently: with `n` that"
        " choice alone, and a request of one answer is a 400. A schema and the beginning of the answer (`continue_final_message`, or a last message of the assistant's to `/v1/messages`) cannot both be given. One that a stop string cuts"
        " short is such an error, too (one that stays in the answer, with include_stop_str_in_output or from TGI, is judged with it), and one that max_tokens cuts ends with `length`: it may be a part.",
        "",
        "What is governed is the answer's content. A reasoning model reasons as it likes before it, up to its format's end of reasoning; only where a plugin's format does not"
        " say how reasoning is written, there is none. Beside `tools` an answer is content that obeys, or calls; where a call could not be told from such an answer it is a 400 that names the field and says why:"
        " beside structural tags always (the text between them is free, and what a tag holds may be spelt like a call); in formats whose calls begin with no mark"
        " (`llama3_json`, `pythonic`, `xlam`) for whatever is no JSON schema, in `xlam` for every answer, and in `llama3_json`, whose calls are bare objects, where the"
        " schema leaves open which members an object has (`additionalProperties: false` closes it) or has `name` beside `parameters` or `arguments`.",
        "",
        "`--grammar-backend xgrammar` (or `--structured-outputs-config.backend`, `--guided-decoding-backend`; it comes with `pip install 'penstock[xgrammar]'`) has xgrammar"
        " obey what it expresses exactly: choices, expressions, GBNF and Lark of rules, texts, sets and repetitions, and schemas of types, properties, items, lengths,"
        " bounds of integers, enum, anyOf and `$ref`. All else, patterns and formats among it, llguidance obeys as it does without the option, under the same list of"
        " keywords; what is not on the list is the same 400.",
        "",
        "Structural tags are free text in which each of `triggers` begins one of the tags: its `begin`, JSON that obeys its `schema`, its `end`. xgrammar's `format` may be"
        " `triggered_tags` (without `at_least_one` and `stop_after_first`), `tag`, `json_schema`, `regex` or `grammar`, and a tag's `content` one of the last three; others"
        " are a 400 `unsupported_feature` that names them. Tags are plain text: they are not spelt in special tokens.",
        "",
        f"JSON schemas may hold {', '.join(f'`{word}`' for word in words)}, and what only describes:"
        f" {', '.join(f'`{word}`' for word in sorted(keywords.NOTES))}. Of `format`: {', '.join(f'`{word}`' for word in sorted(keywords.FORMATS))}."
        " No date, host or other format is drawn that is none, or that types of clients refuse: no year 0, no leap second, durations of at most four digits a number, mail"
        " without quotes and to hosts with a dot, URIs of http and https. `$ref` stays within the schema. `oneOf` needs parts that exclude each other plainly. Any other keyword"
        " or format is a 400 `unsupported_feature` that names it: nothing is ignored. So is what cannot be drawn exactly: an integer of `const`, `enum` or a bound that no double"
        f" holds (bounds of at least 2^63 are as if they were {numbers.MOST}, of numbers that are no integers {numbers.MOST_FRACTION}), a `multipleOf` of more than"
        f" {numbers.LARGEST_STEP} without its point, `minProperties` and `maxProperties` with names that need not be there beside names that are free. `multipleOf` counts as"
        " decimal numbers do: 0.07 is a multiple of 0.01, though what divides doubles may say no. `pattern` and `patternProperties` are ECMA-262's with the flag `u`, without"
        " looking around, references and `\\b`. Where a schema leaves them open, numbers have at most"
        f" {bounded.LONGEST_NUMBER} characters and no exponent, strings {bounded.LONGEST_STRING} bytes, as far as"
        f" tokens allow. White space is at most one space, after a comma or a colon; with structured_outputs' `disable_any_whitespace` there is none. A schema has at most {keywords.MOST_PROPERTIES} properties, and one object at most"
        f" {keywords.MOST_OPTIONAL} that are not required.",
        "",
        "Regular expressions are Rust's, for the whole answer; they have no look-around. Grammars are GBNF (rules with `::=`) or Lark without"
        f" directives but `%ignore`, `%regex` and `%import`. A source has at most {obedience.MOST_CHARS} characters. It is compiled in a process of its"
        f" own: what takes more than {compiling.COMPILE_S:g} s or 1 GiB is a 400. So is"
        f" what would hold up other requests: {trial.PREPARE_S:g} s to be prepared, or {trial.STEP_S:g} s for a token in the first {trial.TRIED}. One"
        " that becomes too much only later ends its answer with an error that names it.",
        "",
    ]


EVENTS = """```
data: {"id":"chatcmpl-7f…","object":"chat.completion.chunk",…,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}

data: {…,"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}

data: {…,"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null,"matched_stop":null}]}

data: [DONE]
```"""


def page() -> str:
    shared = GenerationRequest.__struct_fields__
    bodies = ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest
    parts = structs_in(bodies)
    answers = [kind for one in every_answer() for kind in one.kinds]
    answers += OWN_ERRORS.values()
    whole = [kind for kind in dict.fromkeys(answers) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    replies = list(dict.fromkeys([*whole, *structs_in(whole), openapi_replies.ErrorReply, openapi_replies.ErrorFields]))
    public = ", ".join(f"`{path}`" for path in sorted(http.PUBLIC))
    tokenizing = [name for name in REFUSED[TokenizeRequest] if name not in TokenizeRequest.__struct_fields__]
    out = [
        "# HTTP",
        NOTE,
        "OpenAI's chat completions and completions, with vLLM's further fields, [Anthropic's messages](#anthropics-messages), [OpenAI's Responses](#openais-responses), [TGI's generate](#tgis-generate) and vLLM's [tokens in, tokens out](#tokens-in-tokens-out). `make run` serves on 127.0.0.1:8000; `/schema` is the same as OpenAPI."
        " Numbers in parentheses are an option's default ([configuration](configuration.md); Ki and Mi are 1024 and 1024 times that).",
        "",
        "## Endpoints",
        "",
        *endpoints(),
        "Of the endpoints that clients of other servers know:",
        "",
        *elsewhere(endpoints()),
        "HEAD works wherever GET does, OPTIONS at every path above: 204 with `allow`, or what CORS allows. Another method of HTTP (TRACE, say) is a 405, without a key too; a word that is"
        " none, and whatever else is no valid HTTP/1.1, is a 400 (in the same shape as other errors). Any other path is a 404. Bodies are JSON; a `content-type` that says"
        " otherwise is a 415, none at all is taken as JSON.",
        "",
        "## Keys",
        "",
        flags(
            "With --api-key-file (or `PENSTOCK_API_KEY`), a request brings a key as `Authorization: Bearer KEY` or `x-api-key: KEY`; else it is a 401 with"
            f" `www-authenticate: Bearer`. Free are {public}, and OPTIONS, which a browser sends without credentials. Prefixes are cached for each key by"
            " itself: nobody can find out by timing what another key asked. With --tables keys have tenants, which share prefixes, and scopes: an endpoint"
            " outside of them is a 403 ([tables](tables.md))."
        ),
        "",
        "## Fields of both generation requests",
        "",
        'null means "not given", for every field that may be left out, those of messages and other objects too. A number in quotes is no number, 3.0 is no integer: errors name the field. "The model\'s" defaults are those of'
        " its generation_config.json (or `--override-generation-config`). Spelling says whose name it is.",
        "",
        *asked(GenerationRequest),
        "### ChatRequest",
        "",
        "`POST /v1/chat/completions`; also all of the above.",
        "",
        *asked(ChatRequest, without=shared),
        "### CompletionRequest",
        "",
        "`POST /v1/completions`; also all of the above.",
        "",
        *asked(CompletionRequest, without=shared),
        "### TokenizeRequest",
        "",
        "`POST /tokenize`: a prompt, or messages. A text that is too long for the context is counted all the same.",
        "",
        *asked(TokenizeRequest),
        "### DetokenizeRequest",
        "",
        "`POST /detokenize`.",
        "",
        *asked(DetokenizeRequest),
    ]
    for kind in parts:
        out += [f"### {kind.__name__}", "", *asked(kind)]
    out += grammars() + beams()
    out += [
        "Further fields of a message reach the chat template as they are. One of these in another spelling (`toolCalls`) is refused.",
        "",
        "## Other fields",
        "",
        "What becomes of each field that clients of OpenAI, vLLM and SGLang know: it works; it works in part, and other values are refused by name (or it needs an option); it is"
        " taken without effect; or it is refused by name.",
        "",
        *statuses(),
        "And what a request may ask for at all, whatever the field is called:",
        "",
        "| what | status | |",
        "|---|---|---|",
        *(flags(f"| {one.what} | {one.status.word} | {one.status.why} |") for one in ABILITIES),
        "",
        f"Hints, taken without effect: {', '.join(f'`{name}`' for name in sorted(HINTS))}.",
        "",
        "Refused by name (400 `unsupported_feature`), unless their value asks for nothing, since ignoring them would give another answer than was asked"
        " for. Some are fields of the other endpoint, where they are not refused. In both generation requests:",
        "",
        *refusals(REFUSED[CompletionRequest]),
        "On chat, where reasoning is taken apart, these differ:",
        "",
        *refusals({name: entry for name, entry in REFUSED[ChatRequest].items() if entry != REFUSED[CompletionRequest][name]}),
        f"So is any other field whose name begins with {', '.join(f'`{name}`' for name in FAMILIES)}. Names are compared without case, hyphens and"
        " underscores, those of known fields too: `maxTokens` is refused and told that it is `max_tokens` here.",
        "",
        f"/tokenize refuses what would change its tokens: {', '.join(f'`{name}`' for name in tokenizing)}. /detokenize refuses none.",
        "",
        "In a message:",
        "",
        *refusals(MESSAGE_FIELDS),
        "Any other field is ignored, and named in the reply's header `x-penstock-warning` (the first 32, at most 1024 bytes; `?` for a name that is no plain word; within objects the path, `tools[0].function.foo`, where a known name in another spelling, `Strict`, is refused, too);"
        " with `--strict-fields` it is a 400 that names it. Fields of messages that nobody here knows go to the chat template either way.",
        "",
        "## Requests from outside",
        "",
        "`DELETE /v1/requests/{id}` ends a running request, at whichever HTTP process it came in; `{id}` is its reply's id, or its own (`x-request-id`). Whoever"
        " waits for it gets the error `cancelled`: a stream as its last event, anything else with status 499. It is a 404 where nothing of that id runs, and for a"
        " request of another tenant, unless the key has the scope `admin`, as those of `--api-key` have. `GET /server_info` needs the scope `metrics`.",
        "",
        *apis(asked),
        "## Replies",
        "",
    ]
    for kind in replies:
        out += [f"### {kind.__name__}", "", *told(kind)]
    out += [
        "### Log-probabilities",
        "",
        "Of raw logits: before penalties, filters and temperature. Of the tokens that are text: those of the stop string and the end token are left out (with"
        " include_stop_str_in_output they are text), so that the tokens joined are the answer (but for a character of several tokens: of each the text is `\ufffd`; in chat their `bytes` joined are the character); one that is text up to the stop string is there whole. Chat: `logprobs.content` has for each token `token`, `logprob`, `bytes` (of its UTF-8,"
        " which may be a part of a character) and `top_logprobs`, a list of the same. Completions: the lists `tokens`, `token_logprobs`, `top_logprobs`"
        " (token to number, the drawn one among them; alternatives of one text, as two parts of characters, are one member: return_tokens_as_token_ids keeps them"
        " apart) and `text_offset` (characters from the beginning of `text`; all tokens of a character are where that begins); with echo the prompt's tokens come"
        f" first, the very first with null. JSON has no minus infinity: the least is {logprobs.LOWEST_LOGPROB:g}.",
        "",
        "### Token ids",
        "",
        "[/inference/v1/generate](#tokens-in-tokens-out) knows nothing else. `/v1/completions` with `prompt` as a list of ids computes exactly these (add_special_tokens adds none to ids), and `return_token_ids` shows the prompt's"
        " and the answer's, the end token too; with `logprobs` and `return_tokens_as_token_ids` log-probabilities name ids. Chat shows the ids of its rendered prompt.",
        "",
        "### A choice that fails alone",
        "",
        "If a request's own settings leave one choice no token to draw, that choice ends with finish_reason `error` and an `error`"
        " ([ErrorFields](#errorfields)) that names them; the others are whole, and the status is 200. If every choice fails so, the request does, with 400.",
        "",
        "## Streams",
        "",
        "With `stream: true` the reply is `text/event-stream`, or with `accept: application/x-ndjson` [lines](streams.md#in-lines). In this order, for each choice (those of several choices interleave):",
        "",
        "1. chat: a chunk with the role; completions: with return_token_ids a chunk with the prompt's ids, with echo a chunk with the prompt;",
        "2. chunks with text (where log-probabilities or ids were asked for, also with those alone), with reasoning, or with calls;",
        "3. one chunk with an empty delta (or text) and the finish_reason;",
        "",
        "and after all of them, with `include_usage` or the header `x-include-metrics`, a chunk without choices and with the usage, or the metrics; then `data: [DONE]`.",
        "",
        EVENTS,
        "",
        "The deltas put together are the text that the same request has without stream. What fails before anything was sent, be it"
        ' a comment (after `--keep-alive-s`: the status is 200 from then on), is a plain error with its status. What fails later ends with `data: {"error": …}` ([ErrorReply](#errorreply)) and without `[DONE]`.',
        "",
        "## Tools and reasoning",
        "",
        "How the model writes them is found from its chat template, or named by --tool-call-parser and --reasoning-parser ([formats](configuration.md#output-formats)); calls are only looked for in answers to"
        " requests with tools. A call's first chunk has its `index`, `id`, `type` and `function.name`, the following ones pieces of `function.arguments`; in one piece they are"
        " `message.tool_calls`. Arguments are the model's own text (where it writes them in tags, the JSON of that, with the types of the tool's schema): with tool_choice `auto` JSON that nothing makes obey a schema, and not valid where the answer was cut off"
        " (finish_reason `length`, too where a stop string or the model itself ended it within a call: with `tool_calls` and `stop` arguments are JSON). What looks like a call and is none, one of a function"
        " that is not among `tools` too, stays content, to the letter. Where there must be a call there is no content: of one that is cut off before its name is known there is nothing. White space beside calls and reasoning is left out.",
        "",
        "A grammar ([Grammars](#grammars)) governs calls that are asked for: with tool_choice `required`, a named function or allowed_tools, and where a function is `strict`. Only functions that are allowed are"
        " called, and with `required`, a named function and `strict` their arguments obey `parameters` (an object; without `parameters` an empty one); a keyword that cannot be obeyed is a 400 that names"
        " `tools[i].function.parameters` and the keyword. Reasoning before the calls is free. Before the finish_reason is told, the calls are verified; if they do not obey, the answer ends as"
        " an error. With a named function it is `stop`, as OpenAI has it, else `tool_calls`. Formats that can be asked for: "
        + ", ".join(f"`{spec.name}`" for spec in sorted(BUILT_IN, key=lambda spec: spec.name) if spec.spelling is not None)
        + f"; with others these requests are a 400 that names tool_choice and the parser. An answer has at most {MOST_CALLS} calls, gpt-oss's one"
        " (its model ends its turn with a call); `parallel_tool_calls: false` makes it one everywhere.",
        "",
        "Where a format spells each argument for itself (keyword arguments of Python, tags), `parameters` must be properties by name: beside `properties`, `required` and"
        " `additionalProperties` (of which none are drawn) only `$defs` that the properties refer to; any other keyword is named in a 400. In tags the arguments come in the order of"
        " `properties`, a string is text as it is up to its end tag"
        f" (at most {bounded.LONGEST_STRING} bytes; it cannot hold the tag), and anything else is JSON. An argument that may be a string or something else is a string only if it"
        " could not be read as the other: `12` is the number. `enum`, `const`, `pattern`, `minLength`, `maxLength` and of `format` date, time, date-time, email, hostname, ipv4 and uuid hold for"
        " such text, too; what it cannot obey exactly is a 400 that names it: a value of `enum` that holds the end tag or would be read as another, a pattern with look-around,"
        " `^` or `$` of one choice alone, `\\b` or `\\p`, other formats, `oneOf` with several ways to be a string. In `deepseek_v32`, whose end tag has a special token within it, a string whose length, values or end the schema bounds cannot hold `</`.",
        "",
        "With `arguments_done` in `stream_options.events` (or `stream_options.tool_calls_done`) a chunk tells when a call's arguments are complete and valid, so that the tool can start while the answer goes on:",
        "",
        "```",
        'data: {..., "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ""}, "done": true}]}, "logprobs": null, "finish_reason": null}]}',
        "```",
        "",
        "Send the assistant's message back as it came, and the results as messages of role `tool` with its `tool_call_id`.",
        "",
        "## Errors",
        "",
        '`{"error": {"message", "type", "param", "code"}}`, but where another API has its own shape. No client\'s mistake is a 5xx. What 408, 429 and 503 answer may be sent again, after the'
        " seconds of `retry-after` where there is one.",
        "",
        *codes(),
        f"Codes that no reply has: {', '.join(f'`{code}`' for code in unused())} (they are kept)."
        " A client that went away is counted as 499 in the metrics.",
        "",
        "## Limits",
        "",
        "They hold before any work is done, so that one client's giant does not make another wait. Long texts that are legal are tokenised beside short ones.",
        "",
        *limits(),
        "## Times",
        "",
        *times(),
        "## Headers",
        "",
        "| in | what it does |",
        "|---|---|",
        "| `authorization`, `x-api-key` | the key |",
        "| `content-type` | `application/json`, or none |",
        f"| `content-encoding` | {decoding.ACCEPTED.decode()}; another is a 415 with `accept-encoding` |",
        "| `x-request-id` | the id of reply, logs and traces, if it is plain (as [request_id](#fields-of-both-generation-requests)); else one is made |",
        "| `x-penstock-retain`, `x-penstock-on-disconnect`, `last-event-id` | [streams](streams.md) that outlive their connection |",
        "| `accept` | `application/x-ndjson`: a stream comes [in lines](streams.md#in-lines) |",
        "| `traceparent`, `tracestate` | W3C trace context: spans go on from it |",
        "| `x-include-metrics` | `1` or `true`: the reply has `metrics`, in milliseconds (a stream in its last chunk, which has no choices) |",
        "| `x-penstock-trace-chunks` | `1` or `true`: an event stream says when each write left, in comments (`: sent SECONDS`, counted from the request's arrival), and its header of that name in which version of HTTP the request arrived; [`penstock doctor stream`](streams.md#what-lies-between) reads it |",
        "| `origin` and a preflight's | CORS, below |",
        "",
        "| out | when |",
        "|---|---|",
        "| `x-request-id`, `request-id` (the same, for Anthropic's clients), `openai-processing-ms` | always, but for requests that were no HTTP or came too slowly |",
        "| `traceparent` | where there is a trace: the request's, or with tracing the server's span |",
        "| `x-penstock-ignored-fields`, `x-penstock-warning` | fields were ignored: their names alone, and as a sentence |",
        "| `retry-after` | 429, 503 |",
        "| `x-should-retry: false` | a 429 that waiting does not help (OpenAI's and Anthropic's clients obey it) |",
        "| `x-ratelimit-limit-requests`, `x-ratelimit-remaining-requests`, `x-ratelimit-reset-requests`, and the same of `tokens` | replies to tenants with such [limits](tables.md#limits), and their 429 |",
        "| `allow` | 405, OPTIONS |",
        "| `www-authenticate` | 401 |",
        "| `accept-encoding` | 415 for an encoding |",
        "| `cache-control: no-cache`, `x-accel-buffering: no` | streams |",
        "| `connection: close` | 413, 431, 408 |",
        "",
        flags(
            "For web pages of other origins: --allowed-origins (none by default), with --allowed-methods, --allowed-headers and --allow-credentials. A preflight"
            f" is answered with 204 and may be kept {cors.PREFLIGHT_S} s. Pages may read {', '.join(f'`{n}`' for n in cors.EXPOSED.decode().split(', '))}."
        ),
        "",
        "Replies are never compressed; a proxy in front may do that ([deployment](deployment.md)).",
        "",
        "## Health",
        "",
        "| path | 200 means | for |",
        "|---|---|---|",
        "| `/health`, `/health/ready` | Everything is up that an answer needs. `ages_s` says how long ago each process was last heard of; 503 once that is more"
        f" than {lane.SILENT_S:g} s (or a device whose steps are short has had work and finished none for {lane.STUCK_S:g} s), while an engine starts, and in a"
        " drain. | load balancers |",
        "| `/health/live` | This HTTP process runs its loop. | whoever restarts |",
        f"| `/health/decode` | `status` is idle, busy or draining. 503: starting, engine_down, or stalled (work and no step for {health.STALL_S:g} s). The body has"
        " `requests`, `pending`, `step_age_s`, `token_age_s`, `quiet_s`, `uptime_s` and each process. | people, alarms |",
        "",
        "Requests that come while `/health` is 503 because an engine restarts are not refused: they wait. `/metrics` is Prometheus text;"
        " [metrics](metrics.md) names everything in it.",
        "",
    ]
    assert set(REPLIES) <= {word for line in out for word in re.findall(r"(/[\w/{}.]*)`", line)}, "an endpoint has no line"
    return "\n".join(out)
