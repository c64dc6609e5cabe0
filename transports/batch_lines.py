"""The lines of a batch's file: reading them in windows, checking them, and the lines of what comes out.

What it is: `Reader` (a file is never whole in memory), `Check` (what must hold of the lines together, with OpenAI's error codes), `finished_lines` (what an
earlier life of the server had written already), and the shapes of output lines.
What it does not know: who runs the requests, what a request's body means. Everything here is asked in threads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.transports.folder import new_id
from penstock.transports.storage_schema import BatchError, BatchUsage

WINDOW = 1 << 18
MOST_ERRORS = 100
"""Errors of a file that are told; the rest is likely more of the same."""
LONGEST_ID = 512
"""Characters of a custom_id."""

_json = msgspec.json.Encoder().encode


class Line(msgspec.Struct, frozen=True):
    """One request."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Model(msgspec.Struct, frozen=True):
    model: str | None = None


class _CustomId(msgspec.Struct, frozen=True):
    custom_id: str


_lines = msgspec.json.Decoder(Line)
_models = msgspec.json.Decoder(_Model)
_ids = msgspec.json.Decoder(_CustomId)


class Reader:
    """The lines of a file that are not blank, window by window, with their numbers from 1. A line beyond `longest` bytes comes as None."""

    def __init__(self, path: Path, longest: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._longest = longest
        self._rest = b""
        self._number = 0
        self._skipping = False
        self.over = False

    def window(self) -> list[tuple[int, bytes | None]]:
        """The next lines; may be none before the file is `over`."""
        data = os.read(self._descriptor, WINDOW)
        self.over = not data
        parts = (self._rest + data).split(b"\n")
        self._rest = parts.pop() if data else b""
        out: list[tuple[int, bytes | None]] = []
        for part in parts:
            self._number += 1
            if self._skipping:
                self._skipping = False
                continue
            line = part.removeprefix(b"\xef\xbb\xbf") if self._number == 1 else part
            if len(line) > self._longest:
                out.append((self._number, None))
            elif line.strip():
                out.append((self._number, line))
        if len(self._rest) > self._longest:
            if not self._skipping:
                out.append((self._number + 1, None))
            self._skipping, self._rest = True, b""
        return out

    def close(self) -> None:
        os.close(self._descriptor)


class Check:
    """What must hold of all lines together. `take` window after window, then `end`."""

    def __init__(self, endpoint: str, most: int, longest: int) -> None:
        self._endpoint = endpoint
        self._most = most
        self._longest = longest
        self._ids: set[str] = set()
        self.errors: list[BatchError] = []
        self.total = 0
        self.model: str | None = None
        self._model_line = 0

    @property
    def hopeless(self) -> bool:
        """More lines would say nothing new."""
        return len(self.errors) >= MOST_ERRORS or self.total > self._most

    def wrong(self, code: str, message: str, param: str | None = None, line: int | None = None) -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(BatchError(code=code, message=message, param=param, line=line))

    def take(self, lines: list[tuple[int, bytes | None]]) -> None:
        for number, raw in lines:
            self.total += 1
            if self.total > self._most:
                self.wrong("too_many_tasks", f"A batch may have at most {self._most} requests (--max-batch-lines).")
                return
            if raw is None:
                self.wrong("line_too_long", f"This line is longer than {self._longest} bytes (--max-body-bytes).", line=number)
            else:
                self._line(number, raw)
            if self.hopeless:
                return

    def _line(self, number: int, raw: bytes) -> None:
        try:
            line = _lines.decode(raw)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return self._no_line(number, raw, error)
        if not 1 <= len(line.custom_id) <= LONGEST_ID:
            return self.wrong("invalid_custom_id", f"custom_id must have 1 to {LONGEST_ID} characters.", "custom_id", number)
        if line.custom_id in self._ids:
            return self.wrong("duplicate_custom_id", f"The custom_id {line.custom_id[:100]!r} was given before.", "custom_id", number)
        self._ids.add(line.custom_id)
        if line.url != self._endpoint:
            return self.wrong(
                "mismatched_url", f"url must be the batch's endpoint {self._endpoint}, but is {line.url[:100]!r}.", "url", number
            )
        try:
            model = _models.decode(line.body).model
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self.wrong("invalid_body", "body must be an object, and its model a text.", "body", number)
        if not self._model_line:
            self.model, self._model_line = model, number
        elif model != self.model:
            said = (
                f"All requests of a batch name one model: this one is for {model!r:.100}, line {self._model_line} for {self.model!r:.100}."
            )
            self.wrong("mismatched_model", said, "body.model", number)
        return None

    def _no_line(self, number: int, raw: bytes, error: Exception) -> None:
        """Which code that is."""
        try:
            fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            return self.wrong("invalid_json_line", "This line is no JSON object.", None, number)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self.wrong("invalid_json_line", f"This line is not valid JSON: {error}.", None, number)
        for name in Line.__struct_fields__:
            if name not in fields:
                return self.wrong("missing_required_parameter", f"{name} is required.", name, number)
        if bytes(fields["method"]) != b'"POST"':
            return self.wrong("invalid_method", "method must be POST.", "method", number)
        name = "url" if bytes(fields["url"])[:1] != b'"' else "custom_id"
        return self.wrong("invalid_json_line", f"{name} must be a text.", name, number)

    def end(self) -> None:
        if not self.total:
            self.wrong("empty_file", "The file has no requests.")


def read_line(raw: bytes) -> Line:
    """Of one that `Check` found good."""
    return _lines.decode(raw)


def id_of(raw: bytes) -> str:
    return _ids.decode(raw).custom_id


def finished_lines(path: Path) -> set[str]:
    """The custom_ids of the lines that are written there. A last one that is not whole is cut off, as if it had never been begun."""
    done: set[str] = set()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return done
    try:
        rest, whole = b"", 0
        while data := os.read(descriptor, WINDOW):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                whole += len(line) + 1
                done.add(id_of(line))
        os.ftruncate(descriptor, whole)
    finally:
        os.close(descriptor)
    return done


def answered(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a request that the server answered, well or not."""
    if b"\n" in body:
        body = msgspec.json.format(body, indent=-1)
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _json({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": None}) + b"\n"


def not_run(custom_id: str, code: str, message: str) -> bytes:
    """The line of a request that was never answered."""
    error: dict[str, Any] = {"code": code, "message": message}
    return _json({"id": new_id("batch_req_"), "custom_id": custom_id, "response": None, "error": error}) + b"\n"


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """Of a reply of whichever API."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _UsageBody(msgspec.Struct):
    usage: _Usage | None = None


class _UsageResponse(msgspec.Struct):
    body: _UsageBody


class _UsageLine(msgspec.Struct):
    response: _UsageResponse


_usages = msgspec.json.Decoder(_UsageLine)


def usage_of(path: Path) -> BatchUsage:
    """Of all answers that are written there. Waits for the disk."""
    total = BatchUsage()
    rest = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while data := os.read(descriptor, WINDOW):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                usage = _usages.decode(line).response.body.usage
                if usage is not None:
                    total.input_tokens += usage.prompt_tokens + usage.input_tokens
                    total.output_tokens += usage.completion_tokens + usage.output_tokens
                    read = usage.prompt_tokens_details or usage.input_tokens_details
                    drawn = usage.completion_tokens_details or usage.output_tokens_details
                    total.input_tokens_details.cached_tokens += read.cached_tokens if read is not None else 0
                    total.output_tokens_details.reasoning_tokens += drawn.reasoning_tokens if drawn is not None else 0
    finally:
        os.close(descriptor)
    total.total_tokens = total.input_tokens + total.output_tokens
    return total
