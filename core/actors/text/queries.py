"""Answers to an edge's questions.

What it is: the JSON bodies of /v1/models, /tokenizer_info, the health of decoding, and server_info, as functions of the text actor's state;
those of /tokenize and /detokenize, which the tokenizer worker makes (LABOUR). An answer that is no success carries the fields of Rejected.
What it does not know: HTTP paths, links.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from penstock.core.actors.text.bounds import check_count
from penstock.core.actors.text.resolve import as_ids, check_prompt, drawable
from penstock.core.actors.text.retained import Streams
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.columns import PIECE, Column
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.errors import InvalidRequest, PenstockError, StreamNotFound, StreamTooLong
from penstock.core.protocol.messages import Answer, Encode, Encoded, GrammarChecked, Query
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
    model_has: str | None = None
    """Refuse tokens that the model does not have, as a request would, and say that they are in this field."""


class DetokenizeArgs(msgspec.Struct, kw_only=True):
    tokens: list[int]


class StreamArgs(msgspec.Struct, kw_only=True):
    """Body of "stream": whose id it is, and in whose name it is asked."""

    rid: str
    tenant: str = ""


class ControlArgs(msgspec.Struct, kw_only=True):
    """Body of "cancel" and "control": whose id it is, in whose name it is asked (null: an administrator's, whose `own` goes first), and what is to happen to it. "stop": end
    with what there is."""

    rid: str
    tenant: str | None = None
    own: str = ""
    do: Literal["cancel", "stop", "pause", "resume"] = "cancel"


class StreamFound(msgspec.Struct, kw_only=True):
    """The answer to "stream": what an edge needs to attach to it, and to answer its client."""

    rid: str
    tenant: str
    model: str
    keys: list[int]
    context: bytes
    ended: bool


LABOUR: dict[str, Literal["tokenize", "detokenize"]] = {"tokenize": "tokenize", "detokenize": "detokenize"}
"""Questions whose answer costs work, and the kind of Encode that does it."""

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


def error_of(encoded: Encoded | GrammarChecked) -> PenstockError:
    """The error that a worker's answer carries."""
    kind = InvalidRequest if encoded.error_status < PenstockError.status else PenstockError
    error = kind(encoded.error, param=encoded.error_param, code=encoded.error_code or None)
    error.status = encoded.error_status  # type: ignore[misc]  # the class says the usual one
    return error


def _arguments(what: str, body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{what}: {error}.") from None
    except RecursionError:
        raise InvalidRequest(f"{what}: the request is nested too deeply.") from None


class Tokenize:
    """A "tokenize" question at work: `encode` is the job to render and tokenise, `answer` the body for what came of it."""

    def __init__(self, question: Encode) -> None:
        args: TokenizeArgs = _arguments("tokenize", question.body, TokenizeArgs)
        messages = _raw(args.messages)
        if (args.prompt is None) == (not messages):
            raise InvalidRequest("Give either prompt or messages.", param="prompt")
        self._strings = bool(args.return_token_strs)
        self._model_has = args.model_has
        self._vocab_size = question.vocab_size
        self._limits = question.limits
        continues = bool(args.continue_final_message)
        self.encode = Encode(
            job=question.job,
            kind="chat" if messages else "completion",
            prompt=args.prompt or "",
            messages=messages,
            tools=_raw(args.tools),
            template_kwargs=_raw(args.chat_template_kwargs),
            add_generation_prompt=not continues if args.add_generation_prompt is None else args.add_generation_prompt,
            continue_final_message=continues,
            add_special_tokens=bool(args.add_special_tokens) if messages else args.add_special_tokens is not False,
            # It is asked whether a text fits: that it does not is an answer, and no error.
            limits=None if question.limits is None else msgspec.structs.replace(question.limits, context_chars=0),
        )

    def answer(self, ids: Column, tokenizer: Tokenizer) -> bytes:
        """As vLLM's /tokenize answers. Raises InvalidRequest."""
        if self._model_has is not None:
            check_prompt(ids, self._vocab_size, tokenizer.token_text, self._model_has)
        body = {
            "count": len(ids),
            "max_model_len": (self._limits.max_model_len or None) if self._limits else None,
            "tokens": _json_list(ids, list),
            "token_strs": _json_list(ids, lambda some: [tokenizer.token_text(token) for token in some]) if self._strings else None,
        }
        return msgspec.json.encode(body)


def _json_list(ids: Column, values: Callable[[list[int]], list[Any]]) -> msgspec.Raw:
    """What `values` makes of the ids, as JSON, in pieces between which other threads go on."""
    pieces = (msgspec.json.encode(values(ids[start : start + PIECE].tolist()))[1:-1] for start in range(0, len(ids), PIECE))
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def _raw(value: msgspec.Raw) -> bytes:
    """b"" for what is missing or null."""
    raw = bytes(value)
    return b"" if raw == b"null" else raw


def detokenize(question: Encode, tokenizer: Tokenizer) -> bytes:
    """The body of the answer. Raises InvalidRequest or RequestTooLarge."""
    args: DetokenizeArgs = _arguments("detokenize", question.body, DetokenizeArgs)
    if question.limits is not None:
        check_count(len(args.tokens), question.limits, "tokens")
    ids: Column = as_ids(args.tokens, question.vocab_size, "tokens")
    return msgspec.json.encode({"prompt": tokenizer.decode(ids.tolist(), skip_special_tokens=False)})


def control_args(query: Query) -> ControlArgs:
    """Raises InvalidRequest."""
    found: ControlArgs = _arguments(query.what, query.body, ControlArgs)
    return found


def controlled(query: Query, prompts: int) -> Answer:
    return Answer(id=query.id, body=msgspec.json.encode({"prompts": prompts}))


def stream(query: Query, streams: Streams) -> Answer:
    """Raises StreamNotFound, or StreamTooLong."""
    asked: StreamArgs = _arguments("stream", query.body, StreamArgs)
    kept = streams.find(asked.rid, asked.tenant)
    if kept is None:
        raise StreamNotFound(asked.rid)
    if kept.log is None:
        raise StreamTooLong
    found = StreamFound(rid=kept.rid, tenant=kept.tenant, model=kept.model, keys=kept.keys, context=kept.context, ended=kept.ended)
    return Answer(id=query.id, body=msgspec.json.encode(found))


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


def tokenizer_info(tokenizer: Tokenizer, facts: EngineFacts | None) -> dict[str, Any]:
    """The tokenizer's own word; of its end tokens those that the model can draw."""
    info = dict(tokenizer.info())
    if facts is not None and isinstance(ends := info.get("eos_token_ids"), list):
        info["eos_token_ids"] = drawable(ends, facts.vocab_size)[0].tolist()
    return info


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


def health(query: Query, status: Status, ready: bool, details: dict[str, Any]) -> Answer:
    """200 while decoding is all right: idle, busy, or draining with progress. `live`, `ready` and `decode` say which probes pass."""
    passes = status in ("idle", "busy", "draining")
    body = {"status": status, "live": True, "ready": ready and status in ("idle", "busy", "stalled"), "decode": passes, **details}
    return Answer(id=query.id, body=msgspec.json.encode(body), status=200 if passes else 503)
