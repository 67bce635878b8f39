"""The errors DeepFlow raises on purpose: one small tree, a code for the bus and a status for HTTP.

An error is raised anywhere, carried over the bus as `messages.Failure`, and shown to an HTTP client in the OpenAI
error body. This module must not know how either of the two is encoded.
"""

from __future__ import annotations

from typing import ClassVar


class DeepFlowError(Exception):
    """Base of all deliberate errors.

    `message` is for the caller's eyes and never holds secrets or internals. `param` names the field at fault, if one
    is. `retry_after_s` tells when trying again makes sense.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # the `type` of OpenAI's error body

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(DeepFlowError):
    """The request can never succeed as it stands."""

    code = "invalid_request"
    status = 400
    kind = "invalid_request_error"


class Unauthorized(DeepFlowError):
    """No key, or a key nobody knows."""

    code = "invalid_api_key"
    status = 401
    kind = "invalid_request_error"


class Forbidden(DeepFlowError):
    """The key is known, but may not do this."""

    code = "forbidden"
    status = 403
    kind = "invalid_request_error"


class NotFound(DeepFlowError):
    """The thing named does not exist here (for a TE: it no longer knows the request)."""

    code = "not_found"
    status = 404
    kind = "invalid_request_error"


class ModelNotFound(NotFound):
    """No model of that name is in the catalogue."""

    code = "model_not_found"


class TooLarge(DeepFlowError):
    """The body or the message is larger than the limit."""

    code = "too_large"
    status = 413
    kind = "invalid_request_error"


class Overloaded(DeepFlowError):
    """There is capacity, but it is taken: try again after `retry_after_s`."""

    code = "overloaded"
    status = 429
    kind = "rate_limit_error"


class Unavailable(DeepFlowError):
    """There is no capacity at all, or nobody listens on the subject."""

    code = "unavailable"
    status = 503
    kind = "server_error"


class NotReady(Unavailable):
    """No replica of the model is up, and none will be within the time that the request may wait without one."""

    code = "model_not_ready"


class DeadlineExceeded(DeepFlowError):
    """The answer did not come in time."""

    code = "deadline_exceeded"
    status = 504
    kind = "server_error"


class Internal(DeepFlowError):
    """A fault of ours; the cause is in the log under the request's id."""


_BY_CODE: dict[str, type[DeepFlowError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        ModelNotFound,
        TooLarge,
        Overloaded,
        Unavailable,
        NotReady,
        DeadlineExceeded,
        Internal,
    )
}


def from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> DeepFlowError:
    """The error that a `Failure` with this code stands for; an unknown code is `Internal`."""
    return _BY_CODE.get(code, Internal)(message, param=param, retry_after_s=retry_after_s)
