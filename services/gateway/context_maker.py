"""How a context cache comes to be, and how it is renewed: its tokens are computed once, by the ordinary call path.

What is computed is what every continuation begins with; so the prompt is rendered without a generation prompt, and
compared with prompts that go on from it. This module must not know HTTP or tables.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from hashlib import blake2b

import orjson

from services.gateway.auth import TenantSecrets
from services.gateway.calls import Caller, Calls
from services.gateway.catalogue import Catalogue
from services.gateway.contexts import Contexts, check_size
from services.gateway.openai.caches import (
    Conflict,
    ContextNotFound,
    ContextOrder,
    computing,
    contents,
)
from services.gateway.openai.orders import ContextLengthExceeded
from services.gateway.prompts import Prompts
from shared.messages import ContextCache, Keep


class ContextMaker:
    """Makes context caches for whoever asks."""

    def __init__(
        self,
        calls: Calls,
        catalogue: Catalogue,
        prompts: Prompts,
        contexts: Contexts,
        tenant_secrets: TenantSecrets,
    ) -> None:
        self._calls = calls
        self._catalogue = catalogue
        self._prompts = prompts
        self._contexts = contexts
        self._secrets = tenant_secrets

    async def make(self, order: ContextOrder, caller: Caller) -> ContextCache:
        """A new cache; the one that was made before under the same Idempotency-Key, if it still lives.

        Raises what `Contexts.making`, `check_size` and a call raise, Conflict if the key was used for something else.
        """
        id_ = await self._id(caller)
        if caller.idempotency_key:
            try:
                known = await self._contexts.whole(id_, caller.tenant)
            except ContextNotFound:
                pass
            else:
                return _same(known, order)
        now = int(time.time())  # for the quota; its time begins when it is computed
        context = ContextCache(
            id=id_,
            tenant=caller.tenant,
            model=order.model,
            name=order.name,
            num_tokens=0,
            created=now,
            expires=now + order.ttl_s,
            public=order.public,
            **contents(order),
        )
        ids = await self._tokens(context)
        context = replace(context, num_tokens=len(ids), prefix=ids if order.public else [])
        async with self._contexts.making(context):
            await self._compute(context, ids, order.ttl_s, caller)
            now = int(time.time())
            context = replace(context, created=now, expires=now + order.ttl_s)
            await self._contexts.add(context)
        return context

    async def renew(self, id_: str, ttl_s: int, caller: Caller) -> ContextCache:
        """The same cache, for `ttl_s` from now on; what was lost of its pages is computed again.

        Raises ContextNotFound, and what a call raises.
        """
        context = await self._contexts.whole(id_, caller.tenant)
        ids = await self._tokens(context)
        expires = int(time.time()) + ttl_s
        async with self._contexts.renewing(id_, caller.tenant, expires) as renewed:
            await self._compute(context, ids, ttl_s, caller)
        return renewed

    async def _id(self, caller: Caller) -> str:
        """Random; for one Idempotency-Key of one tenant always the same, and not to be guessed."""
        if not caller.idempotency_key:
            return f"cache_{secrets.token_hex(16)}"
        secret = await self._secrets.get(caller.tenant)
        key = f"cache\0{caller.idempotency_key}".encode()
        return f"cache_{blake2b(key, digest_size=16, key=secret).hexdigest()}"

    async def _tokens(self, context: ContextCache) -> list[int]:
        """What every continuation begins with."""
        model = await self._catalogue.find(context.model)
        field = "messages" if context.messages else "text"
        ids, num_common = await self._prompts.context(
            model.folder,
            model.version,
            orjson.loads(context.messages) if context.messages else context.text,
            orjson.loads(context.options),
        )
        check_size(len(ids), num_common, model.entry.page, public=context.public, field=field)
        if num_common >= model.entry.context:
            raise ContextLengthExceeded(
                f"{num_common} tokens leave no room in this model's context of"
                f" {model.entry.context} tokens",
                param=field,
            )
        return ids[:num_common]

    async def _compute(
        self, context: ContextCache, ids: list[int], ttl_s: int, caller: Caller
    ) -> None:
        keep = Keep(id=context.id, ttl_ms=ttl_s * 1000)
        order = computing(context.model, ids, keep, public=context.public)
        async with self._calls.open(order, caller) as call:
            await call.answer.whole()


def _same(known: ContextCache, order: ContextOrder) -> ContextCache:
    """The cache that an Idempotency-Key stands for. Raises Conflict if it is not what is asked for now."""
    asked = {
        "model": order.model,
        "name": order.name,
        "public": order.public,
        **contents(order),
    }
    if any(getattr(known, field) != value for field, value in asked.items()):
        raise Conflict(
            "this Idempotency-Key was used to make another cache", param="Idempotency-Key"
        )
    return known
