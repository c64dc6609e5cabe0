"""The AsyncAPI document of the WebSocket.

What it is: `ASYNCAPI`, `penstock.v1` as AsyncAPI 3.0 says such things, which /schema/asyncapi.json shows.
What it does not know: what endpoints take and answer: /schema/openapi.json has that.
"""

from __future__ import annotations

from typing import Any

from penstock.transports.socket_messages import CONTROLS, LONGEST_ID, PATH, PROTOCOL
from penstock.version import __version__

_ID = {"type": "string", "minLength": 1, "maxLength": LONGEST_ID}
_SEQ = {"type": "integer", "minimum": 1, "description": "Grows from 1: the event's number, for `after`."}
_ERROR = {"type": "object", "description": "The error object of the API that was asked."}
_STATUS = {"type": "integer", "description": "What HTTP would have said."}


def _message(about: str, required: list[str], **properties: Any) -> dict[str, Any]:
    payload = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    return {"summary": about, "contentType": "application/json", "payload": payload}


def _const(value: Any) -> dict[str, Any]:
    return {"const": value}


CLIENT = {
    "start": _message(
        "Ask a POST endpoint.",
        ["op", "id", "path", "body"],
        op=_const("start"),
        id=_ID,
        path={"type": "string", "examples": ["/v1/chat/completions"]},
        body={"description": "As the endpoint takes it."},
        headers={"type": "object", "additionalProperties": {"type": "string", "maxLength": 4096}},
    ),
    "attach": _message(
        "Go on with a stream that is kept.",
        ["op", "id", "stream"],
        op=_const("attach"),
        id=_ID,
        stream={"type": "string", "minLength": 1},
        after={"type": "integer", "minimum": 0, "default": 0},
    ),
    "steer": _message("Cancel, pause, resume or stop a stream.", ["op", "id"], op={"enum": list(CONTROLS)}, id=_ID),
    "auth": _message(
        "Where a key is needed and none was given: the first message.", ["op", "key"], op=_const("auth"), key={"type": "string"}
    ),
}
SERVER = {
    "begun": _message("The request runs.", ["id", "stream"], id=_ID, stream={"type": "string", "description": "Its x-request-id."}),
    "ignored": _message(
        "Fields of the body that nobody knows.", ["id", "ignored"], id=_ID, ignored={"type": "array", "items": {"type": "string"}}
    ),
    "data": _message("A payload of the API.", ["id", "seq", "data"], id=_ID, seq=_SEQ, data={}),
    "done": _message("The end.", ["id", "done"], id=_ID, done=_const(True)),
    "failed": _message(
        "The end: it failed.",
        ["id", "error", "status"],
        id=_ID,
        error=_ERROR,
        status=_STATUS,
        retry_after_s={"type": "integer", "minimum": 1},
    ),
    "obeyed": _message("What was asked is done.", ["op", "ok"], id=_ID, op={"enum": [*CONTROLS, "auth"]}, ok=_const(True)),
    "refused": _message(
        "What was asked cannot be done, or is not understood. No stream ends by this.",
        ["id", "op", "error", "status"],
        id={"anyOf": [_ID, {"type": "null"}]},
        op={"type": "string"},
        error=_ERROR,
        status=_STATUS,
    ),
}


def _operation(action: str, about: str, names: list[str]) -> dict[str, Any]:
    return {
        "action": action,
        "summary": about,
        "channel": {"$ref": "#/channels/stream"},
        "messages": [{"$ref": f"#/channels/stream/messages/{name}"} for name in names],
    }


ASYNCAPI: dict[str, Any] = {
    "asyncapi": "3.0.0",
    "info": {"title": "Penstock's WebSocket", "version": __version__, "description": f"Subprotocol {PROTOCOL}; docs/streams.md."},
    "defaultContentType": "application/json",
    "channels": {
        "stream": {
            "address": PATH,
            "messages": {name: {"name": name, **message} for name, message in (CLIENT | SERVER).items()},
            "bindings": {
                "ws": {
                    "method": "GET",
                    "headers": {"type": "object", "properties": {"sec-websocket-protocol": {"type": "string", "examples": [PROTOCOL]}}},
                }
            },
        }
    },
    "operations": {
        "ask": _operation("receive", "What clients say.", list(CLIENT)),
        "answer": _operation("send", "What the server says.", list(SERVER)),
    },
}
