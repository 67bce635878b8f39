"""The HTTP routes of explicit context caching, `/v1/caches`. This module must not know how any of it is done."""

from __future__ import annotations

from aiohttp import web

from services.gateway.context_maker import ContextMaker
from services.gateway.contexts import Contexts
from services.gateway.http import caller_of, json_response, read_json, require_operator
from services.gateway.openai.caches import (
    context_body,
    contexts_body,
    deleted_body,
    read_context,
    read_list,
    read_renewal,
)
from services.gateway.settings import GatewaySettings


class CacheRoutes:
    """The handlers of one gateway."""

    def __init__(self, settings: GatewaySettings, maker: ContextMaker, contexts: Contexts) -> None:
        self._settings = settings
        self._maker = maker
        self._contexts = contexts

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        router = app.router
        router.add_post("/v1/caches", self.create)
        router.add_get("/v1/caches", self.list)
        router.add_get("/v1/caches/{id}", self.get)
        router.add_patch("/v1/caches/{id}", self.renew)
        router.add_delete("/v1/caches/{id}", self.delete)

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/caches: answered once its pages are computed."""
        order = read_context(await read_json(request, self._settings))
        if order.public:
            require_operator(request, self._settings)
        context = await self._maker.make(order, caller_of(request))
        return json_response(context_body(context))

    async def list(self, request: web.Request) -> web.Response:
        """GET /v1/caches: the caller's own, the newest first."""
        order = read_list(request.query)
        contexts = await self._contexts.of(caller_of(request).tenant)
        return json_response(contexts_body(contexts, order))

    async def get(self, request: web.Request) -> web.Response:
        """GET /v1/caches/{id}."""
        id_, tenant = request.match_info["id"], caller_of(request).tenant
        return json_response(context_body(await self._contexts.get(id_, tenant)))

    async def renew(self, request: web.Request) -> web.Response:
        """PATCH /v1/caches/{id}: from now on for another `ttl`."""
        ttl_s = read_renewal(await read_json(request, self._settings))
        context = await self._maker.renew(request.match_info["id"], ttl_s, caller_of(request))
        return json_response(context_body(context))

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v1/caches/{id}."""
        id_ = request.match_info["id"]
        await self._contexts.remove(id_, caller_of(request).tenant)
        return json_response(deleted_body(id_))
