"""The error families of Penstock.

What it is: every error that may reach a user is a `PenstockError`. It knows the OpenAI error shape (type, code, the name of the
offending field, HTTP status) and whether trying again can help. What it does not know: HTTP, sockets, or who raised it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

ErrorCode = Literal[
    "invalid_value",
    "unknown_field",
    "context_length_exceeded",
    "model_not_found",
    "invalid_api_key",
    "insufficient_scope",
    "unsupported_feature",
    "rate_limit_exceeded",
    "queue_full",
    "request_too_large",
    "too_many_streams",
    "store_full",
    "store_unavailable",
    "batch_over",
    "not_found",
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


class PenstockError(Exception):
    """An error with a place in the OpenAI error body.

    `message` says what is wrong and what to do next; `param` names the request field or flag; `retry_after_s` is seconds.
    """

    retryable: ClassVar[bool] = False
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None) -> None:
        message = message.encode("utf-8", "replace").decode()  # a template or a tokenizer may put half a surrogate pair into it
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s


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
