"""Files that clients hand in and fetch: /v1/files.

What it is: the routes, and `Files`, what they and the batch runner share: a row of the store for what a file is, its contents in the folder beside the store.
What it does not know: what is in a file (batch_lines.py), forms (form.py), the folder's names.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from litestar import Request, delete, get, post
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from litestar.types import ASGIApp

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, NotFound, UnsupportedFeature
from penstock.transports import listing
from penstock.transports.anthropic_models import ANTHROPICS, speaks_anthropic
from penstock.transports.folder import Folder, new_id, write
from penstock.transports.form import read_form
from penstock.transports.gateway import Gateway
from penstock.transports.openapi import FORM
from penstock.transports.request import JsonReply, Receive, Scope, Send, context_of
from penstock.transports.storage_schema import FileObject, FileUpload
from penstock.transports.store import Store, StoreFull, StoreUnavailable
from penstock.transports.voice import VOICES

KIND = "file"
BATCH, OUTPUT = "batch", "batch_output"
OTHERS = ("assistants", "fine-tune", "vision", "user_data", "evals")
"""Purposes that others know, and of which nothing here would make use."""
WRITE_BYTES = 1 << 20
READ_BYTES = 1 << 18
LONGEST_NAME = 255
SHORTEST_S, LONGEST_S = 3600, 30 * 86400
"""Of expires_after."""

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]


def clean_name(given: str) -> str:
    """A client's name for a file as it is shown: the last part of a path, without what no name should have. It is never a path here."""
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", given)[-1]).strip()
    return name[:LONGEST_NAME] if name not in ("", ".", "..") else "file"


def seconds_of(seconds: Any, anchor: Any, param: str) -> float:
    """expires_after. Raises InvalidRequest."""
    if anchor != "created_at":
        raise InvalidRequest(f"{param}.anchor must be created_at.", param=f"{param}.anchor")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not SHORTEST_S <= seconds <= LONGEST_S:
        raise InvalidRequest(f"{param}.seconds must be from {SHORTEST_S} to {LONGEST_S}.", param=f"{param}.seconds")
    return float(seconds)


class Files:
    """What is kept of files. Coroutines of the edge's loop."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store = store
        self.folder = Folder(store.place.folder)
        self._config = config

    async def disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Something that waits for the disk. Raises StoreUnavailable."""
        try:
            return await asyncio.to_thread(work, *arguments)
        except OSError as error:
            raise StoreUnavailable(f"Files cannot be kept: {error.strerror or error}.", retry_after_s=1.0) from None

    async def check_room(self, tenant: str) -> None:
        """May this tenant hand in one more? Raises StoreFull."""
        most = self._config.max_files
        if await self.store.count(KIND, tenant) >= most:
            raise StoreFull(f"There are {most} files already (--max-files). Delete some first.")
        await self.check_bytes()

    async def check_bytes(self) -> None:
        """May more come into the folder? Raises StoreFull."""
        if await self.disk(self.folder.used) >= self._config.max_files_bytes:
            raise StoreFull(f"Files take {self._config.max_files_bytes} bytes already (--max-files-bytes). Delete some first.")

    async def put(self, tenant: str, id: str, name: str, purpose: str, size: int, ttl_s: float | None) -> FileObject:
        """The contents are whole in the folder: from now on the file is there. Again it changes nothing."""
        old = await self.find(tenant, id)
        if old is not None:
            return old
        ttl_s = self.store.ttl_s if ttl_s is None else ttl_s
        now = int(time.time())
        file = FileObject(
            id=id,
            object="file",
            bytes=size,
            created_at=now,
            filename=name,
            purpose=purpose,
            status="processed",
            expires_at=int(now + ttl_s) if ttl_s > 0 else None,
        )
        await self.store.put(KIND, tenant, id, msgspec.json.encode(file), meta={"purpose": purpose}, ttl_s=ttl_s, keep=True)
        return file

    async def find(self, tenant: str, id: str) -> FileObject | None:
        body = await self.store.get(KIND, tenant, id)
        return None if body is None else msgspec.json.decode(body, type=FileObject)

    async def remove(self, tenant: str, id: str) -> bool:
        """Was it there?"""
        if not await self.store.delete(KIND, tenant, id):
            return False
        await self.disk(self.folder.remove, id)
        return True


class Upload:
    """A file that is coming in: gathered, so that the disk is asked once a megabyte."""

    def __init__(self, files: Files) -> None:
        self.id = new_id("file-")
        self._files = files
        self._parts: list[bytes] = []
        self._size = 0
        self._descriptor = -1

    async def take(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= WRITE_BYTES:
            await self._write()

    async def _write(self) -> None:
        data, self._parts, self._size = b"".join(self._parts), [], 0
        await self._files.disk(self._append, data)

    def _append(self, data: bytes) -> None:
        if self._descriptor < 0:
            self._descriptor = self._files.folder.create(self.id)
        write(self._descriptor, data)

    async def finish(self) -> None:
        await self._write()
        await self._files.disk(self._files.folder.finish, self.id)

    def close(self, *, keep: bool) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not keep:
            self._files.folder.remove(self.id)


class FileReply:
    """The contents of a file, read as they are sent. An ASGI application."""

    def __init__(self, files: Files, file: FileObject) -> None:
        self._files = files
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            descriptor = await asyncio.to_thread(os.open, self._files.folder.of(self._file.id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise missing(self._file.id) from None
        try:
            plain = re.sub(r"[^ !#-\[\]-~]", "_", self._file.filename)
            named = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(self._file.filename, safe='')}"
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"content-length", b"%d" % self._file.bytes),
                (b"content-disposition", named.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            left = self._file.bytes
            while left:
                data = await asyncio.to_thread(os.read, descriptor, min(READ_BYTES, left))
                if not data:  # shorter than it was: the connection must end without the rest
                    raise RuntimeError(f"the file {self._file.id} has lost its last {left} bytes")
                left -= len(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            os.close(descriptor)


def missing(id: str) -> NotFound:
    return NotFound(f"There is no file {id[:200]!r}.", param="file_id")


def read_upload(fields: dict[str, str]) -> tuple[str, float | None]:
    """Purpose and expires_after of a form. Raises InvalidRequest or UnsupportedFeature naming the field."""
    known = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"{name[:100]!r} is not known here. The form may have file, {', '.join(sorted(known))}.", param=name[:100])
    purpose = fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("purpose is required.", param="purpose")
    if purpose in OTHERS:
        raise UnsupportedFeature(f"purpose {purpose!r} is not supported: files are for batches here. Use batch.", param="purpose")
    if purpose != BATCH:
        raise InvalidRequest(f"purpose must be batch, but is {purpose[:40]!r}.", param="purpose")
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, None
    number = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10 else None
    return purpose, seconds_of(number, anchor, "expires_after")


def for_openai_alone(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A Litestar guard: Anthropic's clients have a Files API of another kind at these paths. Raises NotFound."""
    if speaks_anthropic(context_of(connection.scope).headers):
        raise NotFound("The Files API of Anthropic is not served here: files are OpenAI's, for batches. Send text in messages.")


def file_routes(gateway: Gateway) -> list[Any]:
    """Handlers that share one gateway. Without a store there are none."""
    if gateway.store is None:
        return []
    config = gateway.config
    files = Files(gateway.store, config)
    both: dict[str, Any] = {VOICES: ANTHROPICS}
    guards = [for_openai_alone]
    listed = listing.fields(limit=10_000, most=10_000, order="desc", filters=("purpose",))

    async def find(request: AnyRequest) -> tuple[str, FileObject]:
        tenant, id = context_of(request.scope).tenant, str(request.path_params["file_id"])
        file = await files.find(tenant, id)
        if file is None:
            raise missing(id)
        return tenant, file

    @post("/v1/files", summary="Hand a file in", tags=["storage"], status_code=200, opt={FORM: FileUpload, **both}, guards=guards)
    async def upload(request: AnyRequest) -> ASGIApp:
        tenant = context_of(request.scope).tenant
        await files.check_room(tenant)
        coming = Upload(files)
        kept = False
        try:
            form = await read_form(request.scope, request.receive, config.max_file_bytes, coming.take, flag="--max-file-bytes")
            purpose, ttl_s = read_upload(form.fields)
            if form.filename is None:
                raise InvalidRequest("file is required.", param="file")
            await coming.finish()
            file = await files.put(tenant, coming.id, clean_name(form.filename), purpose, form.size, ttl_s)
            kept = True
            gateway.batch_news.set()  # it has an end, which somebody must see to
        finally:
            coming.close(keep=kept)
        return JsonReply(msgspec.json.encode(file))

    @get("/v1/files", summary="The files that are kept", tags=["storage"], opt={listing.QUERY: listed, **both}, guards=guards)
    async def all_files(request: AnyRequest) -> ASGIApp:
        page = listing.read_page(request.scope, limit=10_000, most=10_000, order="desc", filters=("purpose",))
        tenant = context_of(request.scope).tenant
        rows = await files.store.list(KIND, tenant, after=page.after, limit=page.limit + 1, order=page.order, where=page.where)
        return JsonReply(listing.page_body([row.body for row in rows], [row.id for row in rows], page.limit))

    @get("/v1/files/{file_id:str}", summary="What a file is", tags=["storage"], opt=both, guards=guards)
    async def one(request: AnyRequest) -> ASGIApp:
        _, file = await find(request)
        return JsonReply(msgspec.json.encode(file))

    @get("/v1/files/{file_id:str}/content", summary="What is in it", tags=["storage"], opt=both, guards=guards)
    async def content(request: AnyRequest) -> ASGIApp:
        _, file = await find(request)
        return FileReply(files, file)

    @delete("/v1/files/{file_id:str}", summary="Forget it", tags=["storage"], status_code=200, opt=both, guards=guards)
    async def forget(request: AnyRequest) -> ASGIApp:
        id = str(request.path_params["file_id"])
        if not await files.remove(context_of(request.scope).tenant, id):
            raise missing(id)
        return JsonReply(msgspec.json.encode({"id": id, "object": "file", "deleted": True}))

    return [upload, all_files, one, content, forget]
