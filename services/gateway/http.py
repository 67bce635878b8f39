"""HTTP's rim around every route: request ids, keys, the loopback guard, errors in OpenAI's shape, bounded bodies.

Nothing is answered by default: a path without a route still needs the key. This module must not know any route.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any, ClassVar, Final

import orjson
from aiohttp import ClientPayloadError, web
from aiohttp.typedefs import Handler, Middleware

from services.gateway import auth
from services.gateway.budget import BodyBudget, Held
from services.gateway.calls import Caller
from services.gateway.counts import Counts
from services.gateway.openai.bodies import error_body
from services.gateway.settings import GatewaySettings
from shared.errors import (
    DeepFlowError,
    Forbidden,
    Internal,
    InvalidRequest,
    NotFound,
    TooLarge,
    Unauthorized,
)
from shared.log import Logger

PROBES: Final = ("/health", "/ready")
TENANT: Final = web.RequestKey("tenant", str)
REQUEST_ID: Final = web.RequestKey("request_id", str)
HELD: Final = web.RequestKey("held", Held)  # the body's share of the budget
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[ -~]{1,256}")


class MethodNotAllowed(InvalidRequest):
    """The path exists, for another method."""

    code: ClassVar[str] = "method_not_allowed"
    status: ClassVar[int] = 405


class UnsupportedMedia(InvalidRequest):
    """The body is not said to be of the kind that is read here."""

    code: ClassVar[str] = "unsupported_media_type"
    status: ClassVar[int] = 415


class BodyTimeout(InvalidRequest):
    """The body did not arrive in time."""

    code: ClassVar[str] = "request_timeout"
    status: ClassVar[int] = 408


def middleware(settings: GatewaySettings, counts: Counts, log: Logger) -> Middleware:
    """The one middleware: names the request, checks who asks, and turns every error into OpenAI's body."""

    budget = BodyBudget(settings.body_budget_bytes)

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        start = time.monotonic()
        try:
            request[TENANT] = _admit(request, settings)
            with budget.take(_body_bytes(request, settings)) as request[HELD]:
                response = await handler(request)
        except DeepFlowError as error:
            response = error_response(error)
        except web.HTTPException as error:
            response = _translated(error)
        except Exception:
            log.exception("handler_failed", path=request.path, request_id=request[REQUEST_ID])
            response = error_response(Internal("something went wrong here; see the server's log"))
        if not response.prepared:
            response.headers["X-Request-Id"] = request[REQUEST_ID]
        counts.responses.labels(f"{response.status // 100}xx").inc()
        log.debug(
            "request_answered",
            method=request.method,
            path=request.path,
            status=response.status,
            request_id=request[REQUEST_ID],
            seconds=round(time.monotonic() - start, 4),
        )
        return response

    return handle


def _admit(request: web.Request, settings: GatewaySettings) -> str:
    """The tenant. Raises Unauthorized or Forbidden."""
    if settings.keys:
        if request.path in PROBES:
            return ""
        return settings.keys.tenant(request.headers.get("Authorization"))
    auth.guard_loopback(request.headers.get("Host"), request.headers.get("Origin"))
    return auth.LOCAL


def _translated(error: web.HTTPException) -> web.Response:
    """aiohttp's own errors in OpenAI's body."""
    ours: DeepFlowError
    match error:
        case web.HTTPNotFound():
            ours = NotFound("there is nothing at this path")
        case web.HTTPMethodNotAllowed():
            ours = MethodNotAllowed(f"{error.method} is not allowed here")
            response = error_response(ours)
            response.headers["Allow"] = error.headers["Allow"]
            return response
        case web.HTTPRequestEntityTooLarge():
            ours = TooLarge("the body is larger than this server takes")
        case _ if error.status < 500:
            ours = InvalidRequest(error.reason)
        case _:
            ours = Internal(error.reason)
    return error_response(ours)


def error_response(error: DeepFlowError) -> web.Response:
    """An error as an HTTP answer."""
    response = json_response(error_body(error), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """An answer of plain values."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


async def read_json(request: web.Request, settings: GatewaySettings) -> Any:
    """The body's values. Raises InvalidRequest (400, 408, 415) or TooLarge."""
    try:
        auth.require_json(request.headers.get("Content-Type", ""))
    except InvalidRequest as error:
        raise UnsupportedMedia(error.message) from error
    limit = settings.max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(f"the body has {request.content_length} bytes; at most {limit} are taken")
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            raw = await request.read()
    except TimeoutError as error:
        raise BodyTimeout("the body did not arrive in time") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(f"the body is larger than {limit} bytes") from error
    except (ClientPayloadError, web.RequestPayloadError, ValueError) as error:
        raise InvalidRequest("the body cannot be read") from error
    request[HELD].resize(len(raw))
    return parse_json(raw)


def _body_bytes(request: web.Request, settings: GatewaySettings) -> int:
    """How long the body may be, as far as its head tells; one that is too long is not going to be read."""
    if not request.body_exists:
        return 0
    length = request.content_length
    return min(settings.max_body_bytes, settings.max_body_bytes if length is None else length)


def parse_json(raw: bytes) -> Any:
    """Values from JSON text of any origin. Raises InvalidRequest."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def caller_of(request: web.Request) -> Caller:
    """Who sent this request. Raises InvalidRequest for an unusable Idempotency-Key."""
    key = request.headers.get("Idempotency-Key", "")
    if key and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 256 printable ASCII characters", param="Idempotency-Key"
        )
    trace = request.headers.get("traceparent", "")
    return Caller(
        tenant=request[TENANT],
        idempotency_key=key,
        request_id=request[REQUEST_ID],
        traceparent=trace if _TRACEPARENT.fullmatch(trace) else "",
    )


def require_operator(request: web.Request, settings: GatewaySettings) -> None:
    """Raises Forbidden unless the caller may look into the platform."""
    if request[TENANT] != auth.OPERATOR and settings.keys:
        raise Forbidden(f"only tenant {auth.OPERATOR!r} may do this")
