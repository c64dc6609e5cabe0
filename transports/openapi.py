"""The OpenAPI document and page.

What it is: a Litestar render plugin that adds the request bodies (routes read their bodies themselves, and name the struct in
`opt={"body": Struct}`) and shows the document as JSON, or as one HTML page that loads nothing from anywhere else.
What it does not know: the routes.
"""

from __future__ import annotations

import html
from typing import Any, Literal

import msgspec
from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

BODY = "body"
"""The key in a handler's `opt` that names its request struct."""

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

    def __init__(self, kind: Literal["json", "html"]) -> None:
        super().__init__(path="/openapi.json" if kind == "json" else "/", media_type="application/json" if kind == "json" else "text/html")  # type: ignore[arg-type]
        self._kind = kind

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        document = with_bodies(request.app, openapi_schema)
        if self._kind == "json":
            return msgspec.json.encode(document)
        parts = []
        for path, item in sorted(document["paths"].items()):
            for method, operation in item.items():
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


def with_bodies(app: Any, document: dict[str, Any]) -> dict[str, Any]:
    """The document with a requestBody for every handler whose opt names a struct."""
    document = msgspec.json.decode(msgspec.json.encode(document))
    found: list[tuple[str, str, type]] = []
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            if BODY in handler.opt:
                found += [
                    (route.path_format, str(method).lower(), handler.opt[BODY]) for method in handler.http_methods if method != "OPTIONS"
                ]
    schemas, components = msgspec.json.schema_components([kind for _, _, kind in found], ref_template="#/components/schemas/{name}")
    for (path, method, _), schema in zip(found, schemas, strict=True):
        operation = document["paths"].get(path, {}).get(method)
        if operation is not None:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    return document
