"""The error families of Penstock.

What it is: every error that may reach a user is a `PenstockError`. It knows the OpenAI error shape (type, code, the name of the
offending field, HTTP status) and whether trying again can help. `described` and `tamed`: strangers' exceptions, made safe to speak of and to pass on.
What it does not know: HTTP, sockets, or who raised it.
"""

from __future__ import annotations

import signal
import threading
from typing import Any, ClassVar, Literal

from penstock.core.protocol.standing import Standing

ErrorCode = Literal[
    "invalid_value",
    "unknown_field",
    "context_length_exceeded",
    "model_not_found",
    "invalid_api_key",
    "insufficient_scope",
    "unsupported_feature",
    "rate_limit_exceeded",
    "budget_exceeded",
    "queue_full",
    "request_too_large",
    "too_many_streams",
    "store_full",
    "store_unavailable",
    "batch_over",
    "not_found",
    "stream_not_found",
    "stream_exists",
    "stream_taken",
    "stream_too_long",
    "method_not_allowed",
    "engine_unavailable",
    "engine_failure",
    "draining",
    "slow_client",
    "request_timeout",
    "internal_error",
    "cancelled",
]


QueueLimit = Literal["queue_requests", "queue_tokens"]
"""What a queue is full of; a label of metrics."""


def sendable(text: str) -> str:
    """`text` as UTF-8 can carry it: a template or a tokenizer may put half a surrogate pair into it, which becomes a question mark."""
    plain = str.__str__(text)  # of a subclass, too
    return plain if plain.isascii() else plain.encode("utf-8", "replace").decode()


def spelled(text: str) -> str:
    """`text` for people, as UTF-8 can carry it: a name of the file system that is no UTF-8 shows its bytes (`m\\xff`)."""
    plain = str.__str__(text)
    try:
        return plain.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return sendable(plain)


def described(error: BaseException, most: int = 500) -> str:
    """ "ValueError: no such thing", cut after `most` characters. Whatever a stranger's exception does when it is asked for its text, this raises
    nothing, and what it returns can be sent."""
    try:
        said = str(error)
    except BaseException as second:  # it may be a panic of the same library
        said = f"(no text: asking for it raised {type(second).__name__})"
    return spelled(f"{type(error).__name__}: {said}".rstrip(": ")[:most])


def shown(value: object, most: int = 80) -> str:
    """The beginning of its repr; as safe as `described`."""
    try:
        return sendable(repr(value)[:most])
    except BaseException:
        return f"a {type(value).__name__} that cannot be shown"


class Wild(Exception):
    """A plugin raised what is no Exception: SystemExit, a library's panic (pyo3's PanicException is a BaseException)."""


def tamed(error: BaseException) -> Exception:
    """What a plugin's code raised, as an Exception: nothing that a plugin raises may end a thread or a process. Raises it again if it is Ctrl-C, which
    comes to the main thread alone, and only where nobody ignores it. For plain calls: what a loop raises to cancel a task is not the plugin's."""
    if isinstance(error, Exception):
        return error
    at_main = threading.current_thread() is threading.main_thread()
    if isinstance(error, KeyboardInterrupt) and at_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        raise error
    return Wild(described(error))


class PenstockError(Exception):
    """An error with a place in the OpenAI error body.

    `message` says what is wrong and what to do next; `param` names the request field or flag; `retry_after_s` is seconds.
    """

    retryable: ClassVar[bool] = False
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    message: str = "It failed, and does not say why."  # of a plugin's class whose __init__ does not call this one
    param: str | None = None
    code: str = "internal_error"
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None) -> None:
        message = _text(message) or type(self).__name__  # none would look like success
        super().__init__(message)
        self.message = message
        self.param = None if param is None else _text(param)
        self.code = _text(code or self.default_code)
        self.retry_after_s = retry_after_s


def _text(value: Any) -> str:
    """A plugin may give anything: `InvalidRequest(KeyError("x"))`."""
    return spelled(value if isinstance(value, str) else described(value) if isinstance(value, BaseException) else shown(value, 500))


class FinalError(PenstockError):
    """Trying the same call again cannot help."""


class RetryableError(PenstockError):
    """The same call may succeed later, here or elsewhere."""

    retryable = True
    status = 503
    default_code = "engine_unavailable"


class InvalidRequest(FinalError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class UnsupportedFeature(InvalidRequest):
    default_code = "unsupported_feature"


class ContextLengthExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class ModelNotFound(FinalError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class NotFound(FinalError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class StreamNotFound(NotFound):
    default_code = "stream_not_found"

    def __init__(self, stream: str) -> None:
        super().__init__(f"There is no stream {stream[:200]!r} here: it was not retained (retain_s), or its time is over.", param="stream")


class StreamExists(FinalError):
    status = 409
    type = "invalid_request_error"
    default_code = "stream_exists"

    def __init__(self, stream: str) -> None:
        super().__init__(
            f"There is a stream of the id {stream!r} already. Read it at GET /v1/streams/{stream}, or send another x-request-id.",
            param="x-request-id",
        )


class StreamTaken(FinalError):
    status = 409
    type = "invalid_request_error"
    default_code = "stream_taken"

    def __init__(self) -> None:
        super().__init__("Another connection has taken this stream over.")


class StreamTooLong(FinalError):
    status = 410
    type = "invalid_request_error"
    default_code = "stream_too_long"

    def __init__(self) -> None:
        super().__init__(
            "This stream grew too long to be kept (--retained-stream-bytes, --retained-bytes). Send the request again.", param="stream"
        )


class SlowClient(FinalError):
    """A stream's last event, where its client took nothing for too long, or left too much."""

    status = 408
    type = "invalid_request_error"
    default_code = "slow_client"


class Unauthorized(FinalError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(FinalError):
    status = 403
    type = "permission_error"
    default_code = "insufficient_scope"


class RequestTooLarge(FinalError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class QueueFull(RetryableError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        reason: QueueLimit = "queue_requests",
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.reason: QueueLimit = reason


class RateLimited(RetryableError):
    """A tenant's limit. Without `retry_after_s` waiting does not help."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    standing: Standing | None = None
    """Where the tenant stands, if that is worth telling."""


class RequestsExceeded(RateLimited):
    """The types are those that OpenAI's clients know for it."""

    type = "requests"


class TokensExceeded(RateLimited):
    type = "tokens"


class BudgetExceeded(RateLimited):
    type = "insufficient_quota"
    default_code = "budget_exceeded"


class Draining(RetryableError):
    default_code = "draining"


class EngineUnavailable(RetryableError):
    default_code = "engine_unavailable"


class EngineFailure(FinalError):
    status = 500
    default_code = "engine_failure"


class Cancelled(FinalError):
    """Somebody asked for its end, who need not be the one that waits for it."""

    status = 499
    type = "cancelled_error"
    default_code = "cancelled"


class ConfigError(FinalError):
    """A flag, environment variable or file entry is wrong. `param` is its name as the user wrote it."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class PluginError(FinalError):
    """A plugin cannot be loaded or broke its contract; names the package."""


class PluginFault(PenstockError):
    """A plugin's own code failed, or returned what it must not; names plugin and package. Not final: it may have been the moment."""

    default_code = "engine_failure"


class CheckpointError(FinalError):
    """A model folder cannot be read; names the file and the field."""


class ProtocolError(FinalError):
    """A frame on a link is malformed, or the other side speaks another protocol level."""
