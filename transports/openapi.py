"""The OpenAPI document and page.

What it is: a Litestar render plugin that completes the document (routes read their bodies themselves, and name the struct in
`opt={"body": Struct}`; openapi_replies.py has the replies) and shows it as JSON, or as one HTML page that loads nothing from anywhere else.
What it does not know: the routes.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec
from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

from penstock.core.protocol.config import Config
from penstock.transports import (
    anthropic_replies,
    openapi_replies,
    responses_replies,
    storage_replies,
    storage_schema,
    tgi_replies,
    tokens_replies,
)
from penstock.transports.fields import OWN, about, about_reply
from penstock.transports.listing import QUERY
from penstock.transports.openai_schema import REQUESTS
from penstock.transports.openapi_bounds import bounded
from penstock.transports.openapi_replies import (
    ERRORS,
    NDJSON,
    OWN_ERRORS,
    OWN_STATUSES,
    REPLIES,
    SSE,
    SUMMARIES,
    Answer,
    ErrorReply,
    error_bodies,
    errors_of,
    every_answer,
    replies_at,
)

BODY = "body"
"""The key in a handler's `opt` that names its request struct."""
FORM = "form"
"""The same of a request that is a form (multipart/form-data)."""

ASKED = {kind.__name__ for kind in REQUESTS} | OWN.keys()
TOLD = {
    kind.__name__
    for module in (openapi_replies, anthropic_replies, responses_replies, storage_replies, storage_schema, tgi_replies, tokens_replies)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
}
"""Names of the structs of requests, and of replies."""

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Penstock API</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2a33;background:#fff}}
code,pre{{font:14px/1.45 ui-monospace,monospace}} pre{{background:#f3f6f7;padding:1rem;overflow:auto}}
summary{{cursor:pointer;padding:.3rem 0}} b{{display:inline-block;min-width:4rem;color:#0b6a88}}
@media(prefers-color-scheme:dark){{body{{background:#11181c;color:#dde6ea}}pre{{background:#1a242a}}b{{color:#63c7e6}}}}
</style></head><body><h1>Penstock {version}</h1><p>{description} The document as JSON: <a href="{base}/openapi.json">openapi.json</a>.</p>
{operations}</body></html>"""


class SchemaPage(OpenAPIRenderPlugin):
    """`json` at /schema/openapi.json; `html` at /schema itself."""

    def __init__(
        self, kind: Literal["json", "html"], *, config: Config | None = None, public: Collection[str] = (), locked: bool = False
    ) -> None:
        super().__init__(path="/openapi.json" if kind == "json" else "/", media_type="application/json" if kind == "json" else "text/html")  # type: ignore[arg-type]
        self._kind = kind
        self._config = config or Config()
        self._public = public
        self._locked = locked

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        document = complete(request.app, openapi_schema, self._config, public=self._public, locked=self._locked)
        if self._kind == "json":
            return msgspec.json.encode(document)
        parts = []
        for path, item in sorted(document["paths"].items()):
            for method in [one for one in item if one not in SILENT]:
                operation = item[method]
                detail = html.escape(msgspec.json.format(msgspec.json.encode(operation), indent=2).decode())
                parts.append(
                    f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code>"
                    f" {html.escape(operation.get('summary') or '')}</summary><pre>{detail}</pre></details>"
                )
        info = document["info"]
        return _PAGE.format(
            version=html.escape(info["version"]),
            description=html.escape(info.get("description", "")),
            base=html.escape(document["servers"][0]["url"].rstrip("/"))  # --root-path
            + ((request.app.openapi_config.path or "") if request.app.openapi_config else ""),
            operations="\n".join(parts),
        ).encode()


def complete(app: Any, document: dict[str, Any], config: Config, *, public: Collection[str], locked: bool) -> dict[str, Any]:
    """The document with what routes that read and write bytes themselves cannot tell: request bodies (of handlers whose opt names a struct), replies
    (openapi_replies.py), and, if keys are needed (`locked`), where. `public` are the paths that need none."""
    document = msgspec.json.decode(msgspec.json.encode(document))
    bodies = {
        (route.path_format, str(method).lower()): (media, handler.opt[key])
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        for key, media in ((BODY, "application/json"), (FORM, "multipart/form-data"))
        if key in handler.opt
        for method in handler.http_methods
        if method != "OPTIONS"
    }
    queries = {
        (route.path_format, str(method).lower()): handler.opt[QUERY]
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        if QUERY in handler.opt
        for method in handler.http_methods
    }
    replies = [kind for answer in every_answer() for kind in answer.kinds]
    kinds = list(dict.fromkeys([*(kind for _, kind in bodies.values()), *replies, ErrorReply, *OWN_ERRORS.values()]))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    described(components)
    bounded(components, ASKED, config)
    schema_of = dict(zip(kinds, schemas, strict=True))
    for path, summary in SUMMARIES.items():
        document["paths"][path] = {"get": {"summary": summary, "tags": ["server"], "operationId": summary.replace(" ", "")}}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            answers = replies_at(path, method)[0] if path in REPLIES else []
            body = bodies.get((path, method))
            if body is not None:
                operation["requestBody"] = {"required": True, "content": {body[0]: {"schema": schema_of[body[1]]}}}
            if answers:
                operation["responses"] = _responses(path, method, answers, schema_of)
            if (path, method) in queries:
                operation.setdefault("parameters", []).extend(_query(queries[path, method]))
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":  # Litestar calls a path that may hold slashes a URI
                    parameter["schema"] = {"type": "string"}
            if locked and path not in public:
                operation["security"] = [{"bearer": []}, {"key": []}]
        if path in REPLIES:
            item |= _without_bodies(item)
    parts = document.setdefault("components", {})
    parts.setdefault("schemas", {}).update(components)
    if locked:
        parts["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return document


def described(components: dict[str, Any]) -> None:
    """Give the fields of requests and replies their lines (fields.py). Structs of plugins have none there."""
    for kind, component in components.items():
        for name, schema in component.get("properties", {}).items():
            if kind in ASKED:
                schema["description"] = about(kind, name).line
            elif kind in TOLD:
                schema["description"] = about_reply(kind, name)


SILENT = ("head", "options")
"""Methods of every endpoint, or of every one that has GET, whose replies have no body that says anything."""


def _without_bodies(item: dict[str, Any]) -> dict[str, Any]:
    """HEAD, where there is GET, and OPTIONS, of an endpoint's other operations."""
    first = next(iter(item.values()))
    of_path = [parameter for parameter in first.get("parameters", []) if parameter["in"] == "path"]
    parameters = {"parameters": of_path} if of_path else {}
    added = {}
    if "get" in item:
        get = item["get"]
        bare = {status: {"description": answer["description"]} for status, answer in get["responses"].items()}
        added["head"] = {
            **get,
            "summary": f"{get['summary']} (without the body)",
            "operationId": f"{get['operationId']}Head",
            "responses": bare,
        }
    allow = {"allow": {"schema": {"type": "string"}, "description": "The methods."}}
    wrong = {status: answer for status, answer in first["responses"].items() if status in ("400", "408", "431", "501")}
    added["options"] = {
        "summary": "Which methods there are; of a web page of another origin: what it may send",
        "tags": first.get("tags", []),
        "operationId": f"{first['operationId']}Options",
        **parameters,
        "responses": {**wrong, "204": {"description": "The methods, or (see --allowed-origins) what CORS allows.", "headers": allow}},
    }
    return added


def _query(fields: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameters that a query may have."""
    out: list[dict[str, Any]] = []
    for name, schema in fields.items():
        how = {"style": "deepObject", "explode": True} if schema.get("type") == "object" else {}
        schema = {key: value for key, value in schema.items() if key != "description"}
        out.append({"name": name, "in": "query", "required": False, "description": fields[name]["description"], "schema": schema, **how})
    return out


def _responses(path: str, method: str, answers: Sequence[Answer], schema_of: dict[Any, Any]) -> dict[str, Any]:
    text = {"schema": {"type": "string"}}
    own = {
        str(answer.status): {
            "description": answer.what,
            "content": {
                media: text if kind is None else {"schema": _schema(path, media, _shape(answer, kind, schema_of), schema_of)}
                for media, kind in _with_lines(answer.content).items()
            },
        }
        for answer in answers
    }
    wrong = {}
    for status in errors_of(path, method):
        shapes = [schema_of[kind] for kind in error_bodies(path, status)]
        shape = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
        said = ERRORS.get(status) or OWN_STATUSES[status]
        wrong[str(status)] = {"description": said, "content": {"application/json": {"schema": shape}}}
    return {**wrong, **own}


def _shape(answer: Answer, kind: Any, schema_of: dict[Any, Any]) -> Any:
    return schema_of[kind] if answer.also is None else {"anyOf": [schema_of[kind], schema_of[answer.also]]}


def _with_lines(content: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever streams, streams in lines, too."""
    return {**content, NDJSON: content[SSE]} if SSE in content else dict(content)


def _schema(path: str, media: str, payload: Any, schema_of: dict[Any, Any]) -> Any:
    """Of a body; that of a stream is that of one event or line. (OpenAI's last event is no JSON, so there the payload stands for it.)"""
    if media not in (SSE, NDJSON) or path not in OWN_ERRORS:
        return payload
    either = {"anyOf": [payload, schema_of[OWN_ERRORS[path]]]}
    if media == NDJSON:
        return either
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": either}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
