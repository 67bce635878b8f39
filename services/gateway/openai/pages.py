"""OpenAI's lists in parts: `limit`, `after` and `order` in a query, and the part they ask for.

This module must not know what is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from services.gateway.openai.fields import Field, integer, one_of, read, text
from shared.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOrder:
    """Which part is wanted. `after` is the last id of the part before."""

    limit: int
    after: str | None
    newest_first: bool


def read_page(query: Mapping[str, str], *, limit: int, most: int) -> PageOrder:
    """What a query asks for; `limit` unless it says so. Raises InvalidRequest naming the parameter."""
    values: dict[str, Any] = dict(query)
    given = values.get("limit", "")
    if given.isascii() and given.isdigit() and len(given) < 10:
        values["limit"] = int(given)
    fields = {
        "limit": Field(integer(1, most), limit),
        "after": Field(text(256, empty=False)),
        "order": Field(one_of("asc", "desc"), "desc"),
    }
    values = read(values, fields)
    return PageOrder(
        limit=values["limit"], after=values["after"], newest_first=values["order"] == "desc"
    )


def page_body(
    oldest_first: Sequence[T],
    order: PageOrder,
    id_of: Callable[[T], str],
    body: Callable[[T], dict[str, Any]],
) -> dict[str, Any]:
    """A part of a list. Raises InvalidRequest if `after` is not in it."""
    wanted = list(reversed(oldest_first)) if order.newest_first else list(oldest_first)
    if order.after is not None:
        ids = [id_of(one) for one in wanted]
        if order.after not in ids:
            raise InvalidRequest("'after' names nothing in this list", param="after")
        wanted = wanted[ids.index(order.after) + 1 :]
    shown = wanted[: order.limit]
    return {
        "object": "list",
        "data": [body(one) for one in shown],
        "first_id": id_of(shown[0]) if shown else None,
        "last_id": id_of(shown[-1]) if shown else None,
        "has_more": len(wanted) > len(shown),
    }
