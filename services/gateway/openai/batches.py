"""Bodies of `/v1/batches`. This module must not know the bus, HTTP, or how batches are run."""

from __future__ import annotations

import re
from typing import Any, Final

from services.gateway.openai.fields import (
    Field,
    integer,
    mapping,
    one_of,
    out_of_range,
    read,
    text,
    wrong_type,
)
from services.gateway.openai.files import MAX_TTL_S, MIN_TTL_S
from shared import wire
from shared.errors import InvalidRequest
from shared.job_messages import BatchArguments, BatchResult, JobRow, JobStatus

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")
MAX_WINDOW_S: Final = 86_400
MAX_METADATA: Final = 16
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([smh])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600}


def _metadata(value: Any, name: str) -> dict[str, str]:
    pairs = mapping(value, name)
    if len(pairs) > MAX_METADATA:
        raise out_of_range(name, f"must have at most {MAX_METADATA} pairs")
    check_key, check_value = text(64), text(512)
    return {
        check_key(key, f"{name}.{key[:64]}"): check_value(one, f"{name}.{key[:64]}")
        for key, one in pairs.items()
    }


def _window(value: Any, name: str) -> str:
    window: str = text(16)(value, name)
    if not _WINDOW.fullmatch(window) or window_s(window) > MAX_WINDOW_S:
        raise out_of_range(name, "must be '24h', or shorter: a number of h, m or s")
    return window


def _ttl(value: Any, name: str) -> int:
    fields = {
        "anchor": Field(one_of("created_at")),
        "seconds": Field(integer(MIN_TTL_S, MAX_TTL_S)),
    }
    values = read(mapping(value, name), fields)
    if values["anchor"] is None or values["seconds"] is None:
        raise out_of_range(name, "must have 'anchor' and 'seconds'")
    ttl_s: int = values["seconds"]
    return ttl_s


_MAKE: Final[dict[str, Field]] = {
    "input_file_id": Field(text(256, empty=False)),
    "endpoint": Field(one_of(*ENDPOINTS)),
    "completion_window": Field(_window),
    "metadata": Field(_metadata, {}),
    "output_expires_after": Field(_ttl, 0),
}


def window_s(window: str) -> int:
    """A completion window in seconds."""
    return int(window[:-1]) * _UNITS[window[-1]]


def read_batch(body: Any) -> BatchArguments:
    """The body of POST /v1/batches. Raises InvalidRequest naming the field."""
    if type(body) is not dict:
        raise wrong_type("body", "an object", body)
    values = read(body, _MAKE)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if values[name] is None:
            raise InvalidRequest(f"you must provide '{name}'", param=name)
    return BatchArguments(
        input_file=values["input_file_id"],
        endpoint=values["endpoint"],
        window=values["completion_window"],
        metadata=values["metadata"],
        output_ttl_s=values["output_expires_after"],
    )


def batch_body(row: JobRow) -> dict[str, Any]:
    """One batch."""
    arguments = wire.from_json(row.arguments.encode(), BatchArguments)
    result = wire.from_json(row.result.encode(), BatchResult) if row.result else BatchResult()
    errors = [
        {"code": one.code, "message": one.message, "param": one.param, "line": one.line}
        for one in result.errors
    ] + [
        {"code": one.code, "message": one.message, "param": one.param, "line": None}
        for one in row.failures
    ]
    used = result.prompt_tokens + result.output_tokens
    stamps = (
        *(JobStatus.IN_PROGRESS, JobStatus.FINALIZING, JobStatus.COMPLETED, JobStatus.FAILED),
        *(JobStatus.EXPIRED, JobStatus.CANCELLING, JobStatus.CANCELLED),
    )
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": arguments.endpoint,
        "model": result.model or None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": arguments.input_file,
        "completion_window": arguments.window,
        "status": str(row.status),
        "output_file_id": result.output_file or None,
        "error_file_id": result.error_file or None,
        "created_at": row.created,
        "expires_at": row.expires,
        **{f"{status}_at": row.stamps.get(status) for status in stamps},
        "request_counts": {
            "total": row.num_total,
            "completed": row.num_done,
            "failed": row.num_failed,
        },
        "usage": {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens},
            "output_tokens": result.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used,
        }
        if used
        else None,
        "metadata": arguments.metadata or None,
    }
