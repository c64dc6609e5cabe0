"""How results of batches look, by API.

What it is: `Form`, what a batch's Work asks for the lines that it writes; `FORMS`, those of OpenAI's batches, whose lines are files of the client's, and of
Anthropic's message batches, whose lines are the results of that batch.
What it does not know: what runs when, where the lines go.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.transports import batch_lines
from penstock.transports.anthropic_voice import error_payload
from penstock.transports.batches import KIND, MESSAGES
from penstock.transports.request import error_body

SUCCEEDED, ERRORED, CANCELED, EXPIRED = "succeeded", "errored", "canceled", "expired"
"""Types of Anthropic's results."""

_json = msgspec.json.Encoder().encode


class Form(Protocol):
    files: bool
    """What is written becomes files of the client's."""
    tells_cancelled: bool
    """Requests that a cancel left without an answer have a line, too."""

    def answered(self, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
        """The line of a request that the server answered, well (status 200) or not."""
        ...

    def left(self, custom_id: str, end: str) -> bytes:
        """That of one that has no answer as the batch ends ("cancelled", "expired"); b"": it has none."""
        ...

    def failed(self, custom_id: str, message: str) -> bytes:
        """That of one on which the server made an error."""
        ...

    def error(self, error: PenstockError) -> bytes:
        """The body of a reply that says so."""
        ...

    def tally(self, path: Path) -> dict[str, int]:
        """How many lines of what was written there say what. Waits for the disk."""
        ...


class OpenAIForm:
    files = True
    tells_cancelled = False

    def answered(self, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
        return batch_lines.answered(custom_id, status, request_id, body)

    def left(self, custom_id: str, end: str) -> bytes:
        if end != "expired":
            return b""
        return batch_lines.not_run(custom_id, "batch_expired", "This request could not be answered before the batch's time was over.")

    def failed(self, custom_id: str, message: str) -> bytes:
        return batch_lines.not_run(custom_id, "internal_error", message)

    def error(self, error: PenstockError) -> bytes:
        return error_body(error)

    def tally(self, path: Path) -> dict[str, int]:
        return {}


class _Type(msgspec.Struct):
    type: str


class _Result(msgspec.Struct):
    result: _Type


_results = msgspec.json.Decoder(_Result)


class MessagesForm:
    files = False
    tells_cancelled = True

    def answered(self, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
        if status == 200:
            return self._line(custom_id, SUCCEEDED, message=msgspec.Raw(body))
        return self._line(custom_id, ERRORED, error={**msgspec.json.decode(body), **({"request_id": request_id} if request_id else {})})

    def left(self, custom_id: str, end: str) -> bytes:
        return self._line(custom_id, EXPIRED if end == "expired" else CANCELED)

    def failed(self, custom_id: str, message: str) -> bytes:
        return self._line(custom_id, ERRORED, error=msgspec.Raw(error_payload(PenstockError(message))))

    def error(self, error: PenstockError) -> bytes:
        return error_payload(error)

    def tally(self, path: Path) -> dict[str, int]:
        found: Counter[str] = Counter()
        rest = b""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while data := os.read(descriptor, batch_lines.WINDOW):
                *lines, rest = (rest + data).split(b"\n")
                found.update(_results.decode(line).result.type for line in lines)
        finally:
            os.close(descriptor)
        return dict(found)

    def _line(self, custom_id: str, kind: str, **more: Any) -> bytes:
        line: bytes = _json({"custom_id": custom_id, "result": {"type": kind, **more}})
        if b"\n" in line:
            line = msgspec.json.format(line, indent=-1)
        return line + b"\n"


FORMS: dict[str, Form] = {KIND: OpenAIForm(), MESSAGES: MessagesForm()}
"""By the kind of a batch's row."""
