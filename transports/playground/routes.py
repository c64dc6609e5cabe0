"""The routes of the page.

What it is: the transport "playground": `/` for browsers, and the files beside it as they lie in this folder, each with a hash of its contents, so that a browser asks once
and is told "unchanged" ever after. Addresses in them are relative: the page works below any path of a proxy's. It holds no secret, so that none of them needs a key; what the
page asks for does.
What it does not know: what the page does (app.js), the APIs that it speaks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from litestar import Request, get
from litestar.exceptions import MethodNotAllowedException
from litestar.types import ASGIApp

from penstock.transports.frame import weights
from penstock.transports.gateway import Gateway
from penstock.transports.request import Header, Receive, Scope, Send, context_of
from penstock.transports.server_routes import OPEN, SCOPE

FOLDER = Path(__file__).parent
PAGE = "index.html"
KINDS = {".html": b"text/html", ".css": b"text/css", ".js": b"text/javascript", ".svg": b"image/svg+xml"}

POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    b" frame-ancestors 'none'"
)
"""The page runs its own files and talks to its own server; whatever a model says cannot change that."""
GUARDS: tuple[Header, ...] = (
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Document(NamedTuple):
    """One file, as it is sent."""

    body: bytes
    kind: bytes
    tag: bytes

    @classmethod
    def read(cls, path: Path) -> Document:
        body = path.read_bytes()
        return cls(body, KINDS[path.suffix] + b"; charset=utf-8", b'"%b"' % hashlib.sha256(body).hexdigest()[:32].encode())


class Sent:
    """A reply: a document, or that the browser's copy of it is still good."""

    def __init__(self, document: Document, known: bytes | None, more: tuple[Header, ...] = ()) -> None:
        tags = {tag.strip().removeprefix(b"W/") for tag in (known or b"").split(b",")}  # a proxy that compresses weakens them
        fresh = document.tag in tags or b"*" in tags
        what: tuple[Header, ...] = ((b"content-type", document.kind), (b"content-length", b"%d" % len(document.body)))
        self.status = 304 if fresh else 200
        self.headers = [*(() if fresh else what), (b"etag", document.tag), (b"cache-control", b"no-cache"), *GUARDS, *more]
        self.body = b"" if fresh else document.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class Beside:
    """The reply at the server's own path without its last slash, from where relative addresses would lead elsewhere."""

    def __init__(self, path: bytes) -> None:
        self.location = path.rpartition(b"/")[2] + b"/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"location", self.location), (b"content-length", b"0"), *GUARDS]
        await send({"type": "http.response.start", "status": 308, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def reads_pages(accept: bytes | None) -> bool:
    """Does Accept name HTML? Anything (`*/*`) is no wish for a page: programs say that."""
    return weights(accept or b"").get(b"text/html", 0.0) > 0


def playground_routes(gateway: Gateway) -> list[Any]:
    """TransportSpec.factory."""
    if not gateway.config.enable_playground:
        return []
    page = Document.read(FOLDER / PAGE)
    files = {
        f"/playground/{path.name}": Document.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS and path.name != PAGE
    }

    @get("/", opt={SCOPE: None, OPEN: True}, include_in_schema=False)
    async def index(request: Request[Any, Any, Any]) -> ASGIApp:
        headers = context_of(request.scope).headers
        if not reads_pages(headers.get(b"accept")):
            raise MethodNotAllowedException
        path: bytes = request.scope["raw_path"]
        if not path.endswith(b"/"):
            return Beside(path)
        return Sent(page, headers.get(b"if-none-match"), ((b"vary", b"accept"),))

    @get(list(files), opt={SCOPE: None, OPEN: True}, include_in_schema=False)
    async def file(request: Request[Any, Any, Any]) -> ASGIApp:
        return Sent(files[request.scope["path"].rstrip("/")], context_of(request.scope).headers.get(b"if-none-match"))

    return [index, file]
