"""Asks holders for their whole index whenever a feed of block events is unsynced: few at once, and none too often.

Caches and Job Executors follow the same events, and catch up in the same way. This module must not know what the dumps
are loaded into.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from shared.block_feed import BlockFeeds
from shared.bus import Bus
from shared.errors import DeepFlowError, Internal
from shared.rtc_messages import BlocksDump, BlocksQuery

if TYPE_CHECKING:
    from prometheus_client import Counter
    from structlog.typing import FilteringBoundLogger

_RETRY_S: Final = 1.0  # before the same holder is asked again
_NUM_ASKED: Final = 4  # at once: dumps are megabytes


class Dumps:
    """Keeps feeds synced. `ask` gets one index, `load` takes it in, `alive` says whether it still matters.

    `outcomes` counts what came of each question, by label.
    """

    def __init__(
        self,
        feeds: BlockFeeds,
        *,
        ask: Callable[[str, str], Awaitable[BlocksDump]],
        load: Callable[[BlocksDump], None],
        alive: Callable[[str], bool],
        tasks: asyncio.TaskGroup,
        log: FilteringBoundLogger,
        outcomes: Counter,
    ) -> None:
        self._feeds = feeds
        self._ask = ask
        self._load = load
        self._alive = alive
        self._tasks = tasks
        self._log = log
        self._outcomes = outcomes
        self._asking = asyncio.Semaphore(_NUM_ASKED)
        self._ask_after: dict[tuple[str, str], float] = {}  # (holder, model) -> not before

    async def warm_up(self, timeout_s: float) -> None:
        """Asks for every index that is unsynced now, and waits for the answers, but no longer than that."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self._catch_up(*index) for index in self._feeds.unsynced()))
        except TimeoutError:
            self._log.warning("warm_up_cut_short", unsynced=self._feeds.unsynced())

    def catch_up(self) -> None:
        """Begins to ask for every index that is unsynced, unless it was asked for a moment ago. Call it often."""
        now = time.monotonic()
        for holder, model in self._feeds.unsynced():
            if self._ask_after.get((holder, model), 0.0) <= now:
                self._ask_after[holder, model] = math.inf  # until this one has been answered
                self._tasks.create_task(self._catch_up(holder, model), name=f"ask-{holder}")

    def gone(self, holder: str) -> None:
        """The holder is dead, and will not be asked again."""
        for index in [index for index in self._ask_after if index[0] == holder]:
            del self._ask_after[index]

    async def _catch_up(self, holder: str, model: str) -> None:
        """One whole index; events that come meanwhile wait in the feed."""
        try:
            async with self._asking:
                dump = await self._ask(holder, model)
        except DeepFlowError as error:
            self._outcomes.labels(error.code).inc()
            self._log.warning("dump_failed", te=holder, error=error.message)
        else:
            if self._alive(holder):
                self._outcomes.labels("loaded").inc()
                self._load(dump)
                pages = len(dump.hashes) + len(dump.ssd)
                self._log.info("dump_loaded", te=holder, pages=pages, seq=dump.seq)
        if self._alive(holder):
            self._ask_after[holder, model] = time.monotonic() + _RETRY_S


async def request_dump(
    bus: Bus, holder: str, model: str, *, by: str, timeout_s: float
) -> BlocksDump:
    """The whole index of another holder. Raises DeepFlowError: no answer, or that of somebody else."""
    dump = await bus.request(
        bus.subjects.blocks_dump(holder),
        BlocksQuery(by=by, model=model),
        BlocksDump,
        timeout_s=timeout_s,
    )
    if (dump.te, dump.model) != (holder, model):
        raise Internal("the index of another holder or model came")
    return dump
