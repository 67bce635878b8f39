"""The HTTP routes: OpenAI's endpoints, vLLM's tokenize and detokenize, probes, metrics, and the operator's views.

A handler reads a body, opens a call, and writes what comes. aiohttp cancels the handler when its client leaves; the
call's context then cancels the work. This module must not know the bus, beyond asking every service for its status.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from aiohttp import web

from services.gateway.calls import Call, Calls
from services.gateway.catalogue import Catalogue, Model
from services.gateway.http import (
    REQUEST_ID,
    caller_of,
    json_response,
    read_json,
    require_operator,
)
from services.gateway.openai.bodies import whole
from services.gateway.openai.chunks import DONE, ChunkWriter, comments, error_event, events
from services.gateway.openai.orders import Order, read_chat, read_completion
from services.gateway.openai.tokens import read_detokenize, read_tokenize
from services.gateway.prompts import Prompts
from services.gateway.settings import GatewaySettings
from shared.bus import Bus
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Unavailable
from shared.messages import StatusQuery, StatusReply
from shared.service import Service

STATUS_WAIT_S: Final = 0.3
STALLED_READER_S: Final = 30.0  # beyond the deadline, for a client that does not read


class Routes:
    """The handlers of one gateway."""

    def __init__(
        self,
        service: Service[GatewaySettings],
        calls: Calls,
        catalogue: Catalogue,
        prompts: Prompts,
    ) -> None:
        self._service = service
        self._settings = service.settings
        self._calls = calls
        self._catalogue = catalogue
        self._prompts = prompts

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        router = app.router
        router.add_post("/v1/chat/completions", self.chat)
        router.add_post("/v1/completions", self.completion)
        router.add_post("/tokenize", self.tokenize)
        router.add_post("/detokenize", self.detokenize)
        router.add_get("/health", self.health)
        router.add_get("/ready", self.ready)
        router.add_get("/metrics", self.metrics)
        router.add_get("/debug/status", self.status)
        router.add_get("/debug/kv/ledger", self.ledger)
        router.add_get("/debug/requests/{id}/placement", self.placement)

    # ---------------------------------------------------------------------------------------------------- generation

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._answer(request, read_chat(await read_json(request, self._settings)))

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = await read_json(request, self._settings)
        return await self._answer(request, read_completion(body))

    async def _answer(self, request: web.Request, order: Order) -> web.StreamResponse:
        async with self._calls.open(order, caller_of(request)) as call:
            if order.stream:
                return await self._stream(request, call)
            pieces = await call.answer.whole()
            return json_response(
                whole(call.header, pieces, call.num_choices, call.usage(), call.logprobs_tokenizer)
            )

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        # What fails before the first token, comment or end still gets an HTTP status of its own.
        pieces, notices = await call.answer.take()
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would hold the stream back
                "X-Request-Id": request[REQUEST_ID],
            }
        )
        writer = ChunkWriter(
            call.header,
            call.num_choices,
            with_usage=call.order.include_usage,
            tokenizer=call.logprobs_tokenizer,
        )
        try:
            async with asyncio.timeout(self._settings.deadline_s + STALLED_READER_S):
                await response.prepare(request)
                try:
                    while pieces or notices:
                        data = comments(notices) + events(writer.chunks(pieces))
                        if call.answer.complete:
                            data += events(writer.usage(call.usage())) + DONE
                            await response.write(data)
                            break
                        await response.write(data)
                        pieces, notices = await call.answer.take()
                except DeepFlowError as error:
                    await response.write(error_event(error))
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the client left: the call's context counts and cancels
        return response

    # -------------------------------------------------------------------------------------------------------- tokens

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize, as vLLM: {count, max_model_len, tokens, token_strs}."""
        order = read_tokenize(await read_json(request, self._settings))
        model = await self._model(order.model)
        if order.messages is not None:
            prompt = await self._prompts.chat(
                model.folder, model.version, order.messages, order.template_options,
                special=order.special, root=b"", page=0,
            )  # fmt: skip
        else:
            [prompt] = await self._prompts.texts(
                model.folder, model.version, [order.prompt or ""],
                special=order.special, root=b"", page=0,
            )  # fmt: skip
        strings = [model.tokenizer.id_to_text(id_) for id_ in prompt.ids] if order.strings else None
        return json_response(
            {
                "count": len(prompt.ids),
                "max_model_len": model.entry.context,
                "tokens": prompt.ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize, as vLLM: {prompt}."""
        name, ids = read_detokenize(await read_json(request, self._settings))
        model = await self._model(name)
        if ids and max(ids) >= model.entry.vocab:
            raise InvalidRequest(
                f"token ids must be below {model.entry.vocab}, the size of the vocabulary",
                param="tokens",
            )
        text = await self._prompts.decode(model.folder, model.version, ids)
        return json_response({"prompt": text})

    async def _model(self, name: str | None) -> Model:
        """The named model; the only one if none is named."""
        if name is not None:
            return await self._catalogue.find(name)
        models = self._catalogue.models()
        if len(models) != 1:
            raise InvalidRequest("you must provide 'model'", param="model")
        return models[0]

    # --------------------------------------------------------------------------------------------- probes and views

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the process works."""
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: new requests are welcome."""
        if not self._service.is_ready:
            raise Unavailable("not ready", retry_after_s=1.0)
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics, in Prometheus' text format."""
        return web.Response(
            body=self._service.metrics.text(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def status(self, request: web.Request) -> web.Response:
        """GET /debug/status: what every service says about itself."""
        require_operator(request, self._settings)
        return json_response({"services": await gather(self._service.bus, "status")})

    async def ledger(self, request: web.Request) -> web.Response:
        """GET /debug/kv/ledger: the KV memory of every TE and who owns it."""
        require_operator(request, self._settings)
        replies = await gather(self._service.bus, "ledger")
        return json_response({"ledgers": [reply for reply in replies if len(reply) > 3]})

    async def placement(self, request: web.Request) -> web.Response:
        """GET /debug/requests/{id}/placement: where the job executors placed a request, why, and what came of it.

        `id` is that of the answer (`chatcmpl-...`), for all its prompts, or of one prompt of it.
        """
        require_operator(request, self._settings)
        name = request.match_info["id"]
        replies = await gather(self._service.bus, "placement", kind="scheduler", argument=name)
        decisions = [
            {"je": reply["id"], **decision}
            for reply in replies
            for decision in reply.get("decisions", ())
        ]
        if not decisions:
            raise NotFound(f"no job executor remembers a request {name!r}", param="id")
        return json_response({"id": name, "decisions": decisions})


async def gather(
    bus: Bus, verb: str, *, kind: str = "all", argument: str = ""
) -> list[dict[str, Any]]:
    """The answers of all services, or those of one kind: their bodies with `kind`, `id` and `pid`."""
    replies = await bus.gather(
        bus.subjects.status(kind, "all"),
        StatusQuery(verb=verb, argument=argument),
        StatusReply,
        wait_s=STATUS_WAIT_S,
    )
    services = []
    for reply in sorted(replies, key=lambda reply: (reply.kind, reply.id)):
        try:
            body = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            body = {}
        body = body if isinstance(body, dict) else {}
        services.append({**body, "kind": reply.kind, "id": reply.id, "pid": reply.pid})
    return services
