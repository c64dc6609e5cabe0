"""Answers to an edge's questions.

What it is: the JSON bodies of /v1/models, /tokenize, /detokenize, /tokenizer_info, the health of decoding, and server_info, as functions
of the text actor's state. An answer that is no success carries the fields of Rejected.
What it does not know: HTTP paths, links.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.core.columns import Column
from penstock.core.config import Config
from penstock.core.control import EngineFacts
from penstock.core.errors import InvalidRequest, PenstockError
from penstock.core.messages import Answer, Encode, Encoded, Query
from penstock.core.text.resolve import as_ids
from penstock.core.text_api import Tokenizer
from penstock.version import __version__


class TokenizeArgs(msgspec.Struct, kw_only=True):
    """Body of "tokenize": a prompt, or messages with the chat fields of a request."""

    prompt: str | None = None
    messages: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeArgs(msgspec.Struct, kw_only=True):
    tokens: list[int]


Status = Literal["starting", "engine_down", "draining", "stalled", "busy", "idle"]


def failure(query: Query, error: PenstockError) -> Answer:
    body = {
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "retry_after_s": error.retry_after_s,
    }
    return Answer(id=query.id, body=msgspec.json.encode(body), status=error.status)


def _arguments(query: Query, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(query.body or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{query.what}: {error}.") from None
    except RecursionError:
        raise InvalidRequest(f"{query.what}: the request is nested too deeply.") from None


def tokenize(query: Query, job: int) -> Encode:
    """The worker's job for a "tokenize" query. Raises InvalidRequest."""
    args: TokenizeArgs = _arguments(query, TokenizeArgs)
    messages = _raw(args.messages)
    if (args.prompt is None) == (not messages):
        raise InvalidRequest("Give either prompt or messages.", param="prompt")
    if not messages:
        return Encode(job=job, kind="completion", prompt=args.prompt or "", add_special_tokens=args.add_special_tokens is not False)
    continues = bool(args.continue_final_message)
    return Encode(
        job=job,
        kind="chat",
        messages=messages,
        tools=_raw(args.tools),
        template_kwargs=_raw(args.chat_template_kwargs),
        add_generation_prompt=not continues if args.add_generation_prompt is None else args.add_generation_prompt,
        continue_final_message=continues,
        add_special_tokens=bool(args.add_special_tokens),
    )


def _raw(value: msgspec.Raw) -> bytes:
    """b"" for what is missing or null."""
    raw = bytes(value)
    return b"" if raw == b"null" else raw


def tokenized(query: Query, encoded: Encoded, tokenizer: Tokenizer, facts: EngineFacts | None) -> Answer:
    """As vLLM's /tokenize answers."""
    args: TokenizeArgs = _arguments(query, TokenizeArgs)
    tokens = encoded.ids.tolist()
    body = {
        "count": len(tokens),
        "max_model_len": facts.max_model_len if facts else None,
        "tokens": tokens,
        "token_strs": [tokenizer.token_text(token) for token in tokens] if args.return_token_strs else None,
    }
    return Answer(id=query.id, body=msgspec.json.encode(body))


def detokenize(query: Query, tokenizer: Tokenizer, vocab_size: int) -> Answer:
    args: DetokenizeArgs = _arguments(query, DetokenizeArgs)
    ids: Column = as_ids(args.tokens, vocab_size, "tokens")
    return Answer(id=query.id, body=msgspec.json.encode({"prompt": tokenizer.decode(ids.tolist(), skip_special_tokens=False)}))


def models(query: Query, names: list[str], root: str, created_s: int, facts: EngineFacts | None) -> Answer:
    """OpenAI's list, with max_model_len as in vLLM."""
    data = [
        {
            "id": name,
            "object": "model",
            "created": created_s,
            "owned_by": "penstock",
            "root": name,
            "parent": None,
            "max_model_len": facts.max_model_len if facts else None,
        }
        for name in names
    ]
    return Answer(id=query.id, body=msgspec.json.encode({"object": "list", "data": data}))


def server_info(query: Query, names: list[str], config: Config, facts: EngineFacts | None, epoch: int) -> Answer:
    body = {
        "version": __version__,
        "model": names[0],
        "models": names,
        "fingerprint": facts.fingerprint if facts else "",
        "engine": msgspec.to_builtins(facts) if facts else None,
        "epoch": epoch,
        "limits": {
            "max_num_queued_reqs": config.max_num_queued_reqs,
            "max_num_queued_tokens": config.max_num_queued_tokens,
            "max_n": config.max_n,
            "max_stop": config.max_stop,
            "max_logprobs": config.max_logprobs,
        },
    }
    return Answer(id=query.id, body=msgspec.json.encode(body))


def health(query: Query, status: Status, details: dict[str, Any]) -> Answer:
    """200 while decoding is all right: idle, busy, or draining with progress. `live`, `ready` and `decode` say which probes pass."""
    passes = status in ("idle", "busy", "draining")
    body = {"status": status, "live": True, "ready": status in ("idle", "busy", "stalled"), "decode": passes, **details}
    return Answer(id=query.id, body=msgspec.json.encode(body), status=200 if passes else 503)
