"""Bodies of `/v1/caches`, and what it means for a request to continue from a context cache.

To name a cache is to send its messages, or its text, before one's own: nothing but the time it takes may differ. This
module must not know the bus, HTTP, or where caches are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import orjson

from services.gateway.openai.fields import Field, flag, integer, one_of, read, text, wrong_type
from services.gateway.openai.orders import CHAT, MAX_TEXT, Order, read_completion
from shared.errors import InvalidRequest, NotFound, Overloaded
from shared.messages import ContextCache, Keep

MIN_TTL_S: Final = 1
MAX_TTL_S: Final = 7 * 24 * 3600
TTL_S: Final = 3600
MAX_LISTED: Final = 100
LISTED: Final = 20

_MAKE: Final[dict[str, Field]] = {
    "model": CHAT["model"],
    "messages": CHAT["messages"],
    "text": Field(text(MAX_TEXT, empty=False)),
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "ttl": Field(integer(MIN_TTL_S, MAX_TTL_S), TTL_S),
    "name": Field(text(256, empty=False), ""),
    "public": Field(flag, False),
}
_RENEW: Final = {"ttl": _MAKE["ttl"]}
_LIST: Final = {
    "limit": Field(integer(1, MAX_LISTED), LISTED),
    "after": Field(text(256, empty=False)),
    "order": Field(one_of("asc", "desc"), "desc"),
    "name": Field(text(256, empty=False)),
}


class Conflict(InvalidRequest):
    """Something of that name exists already."""

    code: ClassVar[str] = "conflict"
    status: ClassVar[int] = 409


class QuotaExceeded(Overloaded):
    """The tenant has as much as it may have; waiting does not help, deleting does."""

    code: ClassVar[str] = "insufficient_quota"


class ContextNotFound(NotFound):
    """No context cache of that id that the caller may see: it never was, has ended, or is another tenant's."""

    code: ClassVar[str] = "cache_not_found"

    def __init__(self, id_: str, *, param: str | None = "cache") -> None:
        super().__init__(f"The cache {id_[:100]!r} does not exist", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOrder:
    """A context cache to be made. Exactly one of `messages` and `text` is set."""

    model: str
    messages: list[dict[str, Any]] | None
    text: str | None
    options: dict[str, Any]
    ttl_s: int
    name: str
    public: bool

    @property
    def field(self) -> str:
        """The name of the field that holds the contents."""
        return "text" if self.messages is None else "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOrder:
    """Which part of a tenant's caches to show. `after` is the last id of the part before."""

    limit: int
    after: str | None
    newest_first: bool
    name: str | None


def read_context(body: Any) -> ContextOrder:
    """The body of POST /v1/caches. Raises InvalidRequest naming the field."""
    values = read(_object(body), _MAKE)
    if values["model"] is None:
        raise InvalidRequest("you must provide 'model'", param="model")
    if (values["messages"] is None) == (values["text"] is None):
        raise InvalidRequest(
            "you must provide either 'messages' or 'text'",
            param="messages" if values["text"] is None else "text",
        )
    return ContextOrder(
        model=values["model"],
        messages=values["messages"],
        text=values["text"],
        options=values["chat_template_kwargs"],
        ttl_s=values["ttl"],
        name=values["name"],
        public=values["public"],
    )


def read_renewal(body: Any) -> int:
    """The body of PATCH /v1/caches/{id}: from now on, for how many seconds more. Raises InvalidRequest."""
    ttl_s: int = read(_object(body), _RENEW)["ttl"]
    return ttl_s


def read_list(query: Mapping[str, str]) -> ListOrder:
    """The query of GET /v1/caches. Raises InvalidRequest naming the parameter."""
    values: dict[str, Any] = dict(query)
    limit = values.get("limit", "")
    if limit.isascii() and limit.isdigit() and len(limit) < 10:
        values["limit"] = int(limit)
    values = read(values, _LIST)
    return ListOrder(
        limit=values["limit"],
        after=values["after"],
        newest_first=values["order"] == "desc",
        name=values["name"],
    )


def _object(body: Any) -> dict[str, Any]:
    if type(body) is not dict:
        raise wrong_type("body", "an object", body)
    return body


def contents(order: ContextOrder) -> dict[str, Any]:
    """The fields of a `ContextCache` that hold what was sent. Raises InvalidRequest."""
    try:
        options = orjson.dumps(order.options, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError as error:  # what can be read need not be written
        raise InvalidRequest(
            "'chat_template_kwargs' is nested too deeply", param="chat_template_kwargs"
        ) from error
    return {
        "messages": "" if order.messages is None else orjson.dumps(order.messages).decode(),
        "text": order.text or "",
        "options": options,
    }


def computing(model: str, ids: list[int], keep: Keep, *, public: bool) -> Order:
    """The order that has the tokens of a cache computed, and nothing beyond them."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    return replace(read_completion(body), keep=keep, public=public)


def continued(order: Order, context: ContextCache) -> Order:
    """The order with the cache's messages or text before its own. Raises InvalidRequest where they do not go
    together."""
    if context.model != order.model:
        raise InvalidRequest(
            f"this cache is of the model {context.model!r}, not {order.model!r}", param="cache"
        )
    if order.messages is not None:
        if not context.messages:
            raise InvalidRequest("this cache holds text: continue it at completions", param="cache")
        return replace(
            order,
            messages=orjson.loads(context.messages) + order.messages,
            template_options=orjson.loads(context.options) | order.template_options,
        )
    if context.messages:
        raise InvalidRequest(
            "this cache holds messages: continue it at chat/completions", param="cache"
        )
    prompts: list[str | list[int]] = []
    for prompt in order.prompts or ():
        if not isinstance(prompt, str):
            raise InvalidRequest("only text can continue a cache, not token ids", param="prompt")
        prompts.append(context.text + prompt)
    return replace(order, prompts=prompts)


def context_body(context: ContextCache) -> dict[str, Any]:
    """One cache, without its contents."""
    return {
        "id": context.id,
        "object": "cache",
        "model": context.model,
        "name": context.name or None,
        "tokens": context.num_tokens,
        "public": context.public,
        "created_at": context.created,
        "expires_at": context.expires,
        "usage": {"requests": context.requests, "cached_tokens": context.cached_tokens},
    }


def deleted_body(id_: str) -> dict[str, Any]:
    """What is left to say of a cache that was deleted."""
    return {"id": id_, "object": "cache.deleted", "deleted": True}


def contexts_body(contexts: list[ContextCache], order: ListOrder) -> dict[str, Any]:
    """A part of a tenant's caches. Raises InvalidRequest if `after` is none of them."""
    key = {context.id: (context.created, context.id) for context in contexts}
    if order.after is not None and order.after not in key:
        raise InvalidRequest("'after' names no cache of yours", param="after")
    contexts = sorted(
        (one for one in contexts if order.name in (None, one.name)),
        key=lambda one: key[one.id],
        reverse=order.newest_first,
    )
    if order.after is not None:
        after = key[order.after]
        contexts = [
            one
            for one in contexts
            if (key[one.id] < after) == order.newest_first and key[one.id] != after
        ]
    shown = contexts[: order.limit]
    return {
        "object": "list",
        "data": [context_body(context) for context in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(contexts) > len(shown),
    }
