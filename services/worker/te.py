"""`python -m services.worker.te`: one Task Executor, started by a pod host. Killing this process kills all of it.

It connects to the bus, says its name, and waits to be told what to be: at once if it is wanted, later if it is kept
warm. Then it joins shell and engine. The engine is loaded in its own thread, while the shell already beats.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.device.pick import open_device, pick
from services.worker.loop import SWITCH_INTERVAL_S
from services.worker.settings import TeSettings, compute_env
from services.worker.shell import Shell
from services.worker.tie import Assignment, Drain, Named, StepTook, Tie
from services.worker.visible import num_places, present, visible
from shared.catalog import open_model
from shared.config import ConfigError
from shared.scaling_messages import Step
from shared.service import Service, main

if TYPE_CHECKING:
    from collections.abc import Mapping

_WANTED_S: Final = 0.1  # who is wanted at once has been told by then


class Te:
    """One TE from its name to its shell."""

    def __init__(self, service: Service[TeSettings]) -> None:
        self._service = service
        self._shell: Shell | None = None
        self._tie = Tie(self._drain)

    async def open(self) -> None:
        """Say our name; all else follows the assignment."""
        self._service.status(lambda: {"state": "warm"})
        self._tie.say(Named(self._service.id))
        self._service.tasks.create_task(self._serve(), name="serve")

    async def _serve(self) -> None:
        """Become what we are told to be. Raises ModelNotFound, Unavailable."""
        connected = time.monotonic()
        await self._open_device_ahead()
        assignment = await self._tie.assigned
        took_s = max(0.0, connected - assignment.since)
        self._tie.say(StepTook(Step.TE_PRE_LOAD, took_s))
        os.environ.update(assignment.devices | compute_env(assignment.threads))
        service = self._service
        settings = service.settings = assigned(service.settings, assignment)
        folder = open_model(settings.cache_dir, settings.model, text=False)
        picked = pick(settings.device)
        service.log.info(
            "device_picked", device=picked.name, why=picked.why, threads=settings.threads
        )

        from services.worker.loading import Loading

        loading = Loading(folder, settings, say=self._tie.say)
        self._shell = Shell(service, settings, loading, assignment.sources)
        await self._shell.open()

    async def _open_device_ahead(self) -> None:
        """While nobody wants us: the runtime of an accelerator takes long to begin, and cannot be forked. Only where
        all TEs of this host see the same one, for we are not told yet which is ours."""
        if (devices := shared_devices(self._service.settings, os.environ)) is None:
            return
        await asyncio.wait([self._tie.assigned], timeout=_WANTED_S)
        if not self._tie.assigned.done():
            os.environ.update(devices)
            try:
                device = await asyncio.to_thread(
                    open_device, pick(self._service.settings.device).name
                )
                self._service.log.info("device_opened_ahead", device=device.name)
            except (
                ModelError
            ) as error:  # it is tried again for the model, and tells what is wrong then
                self._service.log.warning("device_not_opened_ahead", error=error.message)

    def _drain(self, drain: Drain) -> None:
        if self._shell is not None:
            self._shell.drain(drain.migrate_after_s)
        else:
            self._service.stop()


def assigned(settings: TeSettings, assignment: Assignment) -> TeSettings:
    """The settings of a TE that is to be this."""
    return replace(
        settings, model=assignment.model, role=assignment.role, threads=assignment.threads
    )


def shared_devices(settings: TeSettings, env: Mapping[str, str]) -> dict[str, str] | None:
    """What shows a TE its accelerators, if that is the same for all TEs of this host; None for the CPU."""
    device, num_ranks = pick(settings.device).name, settings.tp * settings.pp
    num_present = present(device)
    if num_places(device, env, num_present=num_present, num_ranks=num_ranks) != 1:
        return None
    return visible(device, env, num_present=num_present, place=0, num_ranks=num_ranks)


async def open_te(service: Service[TeSettings]) -> None:
    """A TE's `main` for `service.run`."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    await Te(service).open()


def run() -> None:
    """This process's whole life."""
    _open_nest()
    code = main("te", TeSettings.load, open_te, metrics=False)
    sys.stderr.flush()
    # Not sys.exit: the engine's thread may still be in native code, which must not find the interpreter gone.
    os._exit(code)


def _open_nest() -> None:
    """Have the other ranks of a model forked, too, where what they need is imported: now, while there is one thread."""
    with contextlib.suppress(ConfigError):  # whose end is told below
        settings = TeSettings.load(os.environ)
        if settings.tp * settings.pp > 1 and "torch" in sys.modules:
            from services.worker.flowserve.spmd.nest import open_nest

            open_nest()


if __name__ == "__main__":
    run()
