"""This TE's end of DistFlow, and the one that answers `link.<te>`: offers of links by itself, all else by whoever holds
what is asked for.

It stands before anything is loaded, so that what comes in can be passed on while it comes. This module must not know
what is read over a link.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar, cast

from shared.arena.place import read_host
from shared.distflow.backend import chosen
from shared.distflow.flow import DistFlow
from shared.errors import Unavailable
from shared.rtc_messages import LeaseRelease, LeaseRequest, LinkRequest, WeightsRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from shared.bus import Bus

    Asked = LinkRequest | LeaseRequest | LeaseRelease | WeightsRequest

M = TypeVar("M", bound="LeaseRequest | LeaseRelease | WeightsRequest")


class Linking:
    """`te` is this TE's name on the bus, `directory` a folder that TEs of this host share, while somebody keeps it
    (the arena's); `fabric` and `backends` are the settings' (`DistFlow`, `chosen`)."""

    def __init__(
        self, bus: Bus, te: str, *, fabric: str, directory: Path, backends: str = ""
    ) -> None:
        self.te = te
        self._bus = bus
        self._fabric = fabric
        host = read_host(directory)
        self.flow = DistFlow(
            name=te,
            fabric=fabric,
            directory=directory,
            host=host,
            backends=chosen(backends, fabric),
        )
        self._answers: dict[type[object], Callable[[object], Awaitable[object]]] = {}

    async def open(self) -> None:
        """Listen, on the fabric and on the bus. Raises Unavailable."""
        try:
            self.flow.start()
        except (OSError, ValueError) as error:
            raise Unavailable(f"DEEPFLOW_FABRIC={self._fabric}: {error}") from error
        kinds: tuple[type[Asked], ...] = (LinkRequest, LeaseRequest, LeaseRelease, WeightsRequest)
        await self._bus.serve(self._bus.subjects.link(self.te), kinds, self._answer)

    def answer(self, kind: type[M], with_: Callable[[M], Awaitable[object]]) -> None:
        """From now on `with_` answers messages of this kind."""
        self._answers[kind] = cast("Callable[[object], Awaitable[object]]", with_)

    async def close(self) -> None:
        """End every link. What others read here must not be given back before."""
        with contextlib.suppress(
            RuntimeError
        ):  # the loop's threads have ended before: so will this process
            await asyncio.to_thread(self.flow.close)

    async def _answer(self, asked: Asked) -> object:
        if isinstance(asked, LinkRequest):
            return self.flow.offer(asked.by)
        answer = self._answers.get(type(asked))
        if answer is None:
            raise Unavailable("this TE has nothing to give yet", retry_after_s=1.0)
        return await answer(asked)
