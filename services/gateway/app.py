"""The gateway put together: what is made in which order, the HTTP server, and how all of it ends.

This module must not hold any logic of a request.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.auth import TenantSecrets
from services.gateway.cache_routes import CacheRoutes
from services.gateway.calls import Calls
from services.gateway.catalogue import Catalogue
from services.gateway.context_maker import ContextMaker
from services.gateway.contexts import Contexts
from services.gateway.counts import Counts
from services.gateway.http import middleware
from services.gateway.job_routes import JobRoutes
from services.gateway.lines import Lines
from services.gateway.model_routes import ModelRoutes
from services.gateway.producers import Producers
from services.gateway.prompts import Prompts
from services.gateway.publics import PublicPrefixes
from services.gateway.routes import Routes
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.tenant_batches import TenantBatches
from services.gateway.tenant_files import TenantFiles
from shared.errors import Unavailable
from shared.service import Service
from shared.store.files import Files


async def main(service: Service[GatewaySettings]) -> None:
    """Set the gateway up on a service. Raises Unavailable if the port is taken, or the bus is gone again."""
    settings, bus, log = service.settings, service.bus, service.log
    counts = Counts(service.metrics, lambda: len(calls))
    prompts = Prompts(settings.num_tokenizers, settings.tokenize_timeout_s, log)
    catalogue = Catalogue(bus, settings.cache_dir, log, prompts.announce)
    streams = Streams(bus, service.id, service.tasks, counts, log)
    secrets = TenantSecrets(bus, patience_s=settings.park_s)
    contexts = Contexts(bus, settings, PublicPrefixes(secrets.public), log)
    calls = Calls(settings, catalogue, prompts, streams, secrets, contexts, counts, log)
    maker = ContextMaker(calls, catalogue, prompts, contexts, secrets)
    producers = Producers(bus, calls, log)
    files = TenantFiles(Files(settings.store.open(), await bus.table("files")), settings)
    rows, queue = await bus.table("jobs"), await bus.work_queue()
    batches = TenantBatches(rows, queue, files, settings)
    lines = Lines(bus, calls, service.tasks, service.id, settings, log)

    app = web.Application(
        middlewares=[middleware(settings, counts, log)], client_max_size=settings.max_body_bytes
    )
    Routes(service, calls, catalogue, prompts).add_to(app)
    ModelRoutes(settings, catalogue, bus).add_to(app)
    CacheRoutes(settings, maker, contexts).add_to(app)
    JobRoutes(settings, files, batches).add_to(app)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a client that leaves cancels its handler, streaming or not
        shutdown_timeout=1.0,  # `drain` has waited for calls before
    )

    await streams.start()
    await catalogue.start(service.tasks)
    await contexts.start(service.tasks)
    await prompts.start(service.tasks)
    await producers.start()
    await lines.start()
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, backlog=1024, reuse_address=True)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise Unavailable(f"cannot listen on {settings.host}:{settings.port}: {error}") from error
    address = f"http://{_shown(settings.host)}:{runner.addresses[0][1]}"

    def status() -> dict[str, Any]:
        return {
            "url": address,
            "in_flight": len(calls),
            "batch_lines": len(lines),
            "models": [model.name for model in catalogue.models()],
            "refused_models": catalogue.refused(),
        }

    async def drain() -> None:
        calls.draining = True
        await producers.stop()
        await lines.stop()
        await calls.drain(settings.grace_s)
        await contexts.flush()

    service.status(status)
    service.on_drain(drain)
    service.on_drain(runner.cleanup)
    service.beat()
    await bus.flush()  # the server knows our subscriptions: a prompt sent from here on is heard
    service.ready()
    log.info("gateway_listening", url=address)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
