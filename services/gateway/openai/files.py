"""Bodies of `/v1/files`. This module must not know the bus, HTTP, or where files are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.gateway.openai.fields import out_of_range
from shared.errors import InvalidRequest
from shared.job_messages import FileRow

PURPOSES: Final = ("batch",)
MIN_TTL_S: Final = 3600
MAX_TTL_S: Final = 30 * 86_400
MAX_NAME: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOrder:
    """A file to be kept; `ttl_s` 0: until it is deleted."""

    name: str
    purpose: str
    ttl_s: int


def read_file(fields: Mapping[str, str], name: str | None) -> FileOrder:
    """The fields of the form that POST /v1/files brings, and its file's name. Raises InvalidRequest naming the
    field."""
    if name is None:
        raise InvalidRequest("you must provide 'file', as a file", param="file")
    purpose = fields.get("purpose", "")
    if not purpose:
        raise InvalidRequest("you must provide 'purpose'", param="purpose")
    if purpose not in PURPOSES:
        raise out_of_range("purpose", "must be " + " or ".join(map(repr, PURPOSES)))
    ttl_s = 0
    given = fields.get("expires_after[seconds]", "")
    if given or "expires_after[anchor]" in fields:
        if fields.get("expires_after[anchor]") != "created_at":
            raise out_of_range("expires_after[anchor]", "must be 'created_at'")
        ttl_s = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise out_of_range(
                "expires_after[seconds]", f"must be between {MIN_TTL_S} and {MAX_TTL_S}"
            )
    return FileOrder(name=name[:MAX_NAME] or "file", purpose=purpose, ttl_s=ttl_s)


def file_body(row: FileRow) -> dict[str, Any]:
    """One file, without its contents."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": row.created,
        "expires_at": row.expires or None,
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def deleted_body(id_: str) -> dict[str, Any]:
    """What is left to say of a file that was deleted."""
    return {"id": id_, "object": "file", "deleted": True}
