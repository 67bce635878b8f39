"""The HTTP routes of what nobody waits on: `/v1/files` and `/v1/batches`. This module must not know how it is done."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import quote

from aiohttp import web

from services.gateway.forms import Form
from services.gateway.http import REQUEST_ID, caller_of, json_response, read_json
from services.gateway.openai.batches import batch_body, read_batch
from services.gateway.openai.files import deleted_body, file_body, read_file
from services.gateway.openai.pages import page_body, read_page
from services.gateway.settings import GatewaySettings
from services.gateway.tenant_batches import TenantBatches
from services.gateway.tenant_files import TenantFiles
from shared.errors import DeepFlowError

STALLED_READER_S: Final = 30.0  # for a client to take the next piece


class JobRoutes:
    """The handlers of one gateway."""

    def __init__(
        self, settings: GatewaySettings, files: TenantFiles, batches: TenantBatches
    ) -> None:
        self._settings = settings
        self._files = files
        self._batches = batches

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        router = app.router
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files", self.list_files)
        router.add_get("/v1/files/{id}", self.get_file)
        router.add_delete("/v1/files/{id}", self.delete_file)
        # What is streamed would be sent to a HEAD, too, and be taken for the answer to another request.
        router.add_get("/v1/files/{id}/content", self.content, allow_head=False)
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", self.list_batches)
        router.add_get("/v1/batches/{id}", self.get_batch)
        router.add_post("/v1/batches/{id}/cancel", self.cancel)

    # -------------------------------------------------------------------------------------------------------- files

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files: a form with `purpose` and `file`."""
        limit = self._settings.max_file_bytes
        form = Form(request, max_bytes=limit, timeout_s=self._settings.read_timeout_s)
        length = request.content_length
        if "Content-Encoding" in request.headers:  # it says nothing of what comes out
            length = None
        row = await self._files.upload(
            caller_of(request).tenant,
            form.chunks(),
            lambda: read_file(form.fields, form.file_name),
            limit if length is None else min(limit, length),
        )
        return json_response(file_body(row))

    async def list_files(self, request: web.Request) -> web.Response:
        """GET /v1/files: the caller's own, the newest first."""
        order = read_page(request.query, limit=10_000, most=10_000)
        purpose = request.query.get("purpose")
        rows = await self._files.all(caller_of(request).tenant)
        rows = [row for row in rows if purpose in (None, row.purpose)]
        return json_response(page_body(rows, order, lambda row: row.id, file_body))

    async def get_file(self, request: web.Request) -> web.Response:
        """GET /v1/files/{id}."""
        row = await self._files.get(caller_of(request).tenant, request.match_info["id"])
        return json_response(file_body(row))

    async def delete_file(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/{id}."""
        id_ = request.match_info["id"]
        await self._files.remove(caller_of(request).tenant, id_)
        return json_response(deleted_body(id_))

    async def content(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/files/{id}/content."""
        row = await self._files.get(caller_of(request).tenant, request.match_info["id"])
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(row.num_bytes),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row.name)}",
                "X-Content-Type-Options": "nosniff",
                "X-Request-Id": request[REQUEST_ID],
            }
        )
        try:
            async for chunk in self._files.read(row):
                async with asyncio.timeout(STALLED_READER_S):
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(chunk)
            if not response.prepared:  # it is empty
                await response.prepare(request)
            await response.write_eof()
        except (TimeoutError, DeepFlowError):
            if not response.prepared:
                raise
            if request.transport is not None:  # half a file must not look like one
                request.transport.abort()
        except ConnectionError:
            pass  # the client left
        return response

    # ------------------------------------------------------------------------------------------------------- batches

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/batches."""
        arguments = read_batch(await read_json(request, self._settings))
        return json_response(batch_body(await self._batches.create(arguments, caller_of(request))))

    async def list_batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches: the caller's own, the newest first."""
        order = read_page(request.query, limit=20, most=100)
        rows = await self._batches.all(caller_of(request).tenant)
        return json_response(page_body(rows, order, lambda row: row.id, batch_body))

    async def get_batch(self, request: web.Request) -> web.Response:
        """GET /v1/batches/{id}."""
        row = await self._batches.get(caller_of(request).tenant, request.match_info["id"])
        return json_response(batch_body(row))

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/batches/{id}/cancel."""
        row = await self._batches.cancel(caller_of(request).tenant, request.match_info["id"])
        return json_response(batch_body(row))
