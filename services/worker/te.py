"""`python -m services.worker.te`: one Task Executor, started by a pod host. Killing this process kills all of it.

It joins shell and engine. The engine is loaded in its own thread, while the shell already beats.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from services.worker.child import attach
from services.worker.flowserve.device.pick import pick
from services.worker.loop import SWITCH_INTERVAL_S
from services.worker.settings import TeSettings
from services.worker.shell import Shell
from shared.catalog import open_model
from shared.service import Service, main

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.flowserve.engine import Engine


async def open_te(service: Service[TeSettings]) -> None:
    """A TE's `main` for `service.run`. Raises ModelNotFound, Unavailable."""
    attach(service.id)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    settings = service.settings
    folder = open_model(settings.cache_dir, settings.model)
    picked = pick(settings.device)
    service.log.info("device_picked", device=picked.name, why=picked.why, threads=settings.threads)

    def load(wake: Callable[[], None]) -> Engine:
        from services.worker.loading import load_engine

        return load_engine(folder, settings, wake)

    await Shell(service, folder, load).open()


if __name__ == "__main__":
    code = main("te", TeSettings.load, open_te)
    sys.stderr.flush()
    # Not sys.exit: the engine's thread may still be in native code, which must not find the interpreter gone.
    os._exit(code)
