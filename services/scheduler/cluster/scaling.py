"""What operators set: bounds and keep-alive of each model, in a table that every scheduler reads.

Any scheduler takes a change, by compare and set, and all hear of it. Without the table the last view stands. This
module must not know what becomes of the numbers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, NoReturn, TypeVar

from shared.bus import Bus, Table
from shared.errors import DeepFlowError, InvalidRequest, ModelNotFound, Unavailable
from shared.log import Logger
from shared.scaling_messages import ScalingEntry, SetScaling
from shared.subjects import QUEUE_SCHEDULER, is_token
from shared.table import keep_read

N = TypeVar("N", int, float)
MAX_TES: Final = 4096
MAX_KEEP_ALIVE_S: Final = 7 * 86_400.0
_TABLE: Final = "scaling"
_REFRESH_S: Final = 5.0
_SOON_S: Final = 0.1  # by then whoever serves a change has written it
_MAX_TRIES: Final = 16


def merged(entry: ScalingEntry, change: SetScaling, default_max: int) -> ScalingEntry:
    """`entry` after `change`; a model that nothing is set for may have `default_max` TEs. Raises InvalidRequest."""
    for name, number in (("min", change.min_tes), ("max", change.max_tes)):
        if number is not None and number > MAX_TES:
            raise InvalidRequest(f"{name} must be at most {MAX_TES}", param=name)
    keep_s = change.keep_alive_s
    if keep_s is not None and (math.isnan(keep_s) or keep_s > MAX_KEEP_ALIVE_S):
        raise InvalidRequest(
            f"keep_alive_s must be at most {MAX_KEEP_ALIVE_S:.0f}", param="keep_alive_s"
        )
    after = replace(
        entry,
        min_tes=_after(entry.min_tes, change.min_tes),
        max_tes=_after(entry.max_tes, change.max_tes),
        keep_alive_s=_after(entry.keep_alive_s, keep_s),
    )
    high = default_max if after.max_tes is None else after.max_tes
    if after.min_tes is not None and after.min_tes > high:
        name = "max" if change.min_tes is None else "min"
        raise InvalidRequest(f"min ({after.min_tes}) must not be above max ({high})", param=name)
    return after


def _after(before: N | None, change: N | None) -> N | None:
    if change is None:
        return before
    return change if change >= 0 else None


class Scaling:
    """The entries as last read. `changed` is called when they are other ones."""

    def __init__(
        self,
        bus: Bus,
        log: Logger,
        *,
        knows: Callable[[str], Awaitable[bool]],
        default_max: Callable[[str], int],
        changed: Callable[[], None],
    ) -> None:
        self.entries: dict[str, ScalingEntry] = {}
        self._bus = bus
        self._log = log
        self._knows = knows
        self._default_max = default_max
        self._changed = changed
        self._table: Table | None = None
        self._again = asyncio.Event()

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Read, and serve changes from now on."""
        await self._refresh()
        subject = self._bus.subjects.scaling("*")
        await self._bus.listen(subject, (SetScaling,), self._on_change)
        await self._bus.serve(subject, (SetScaling,), self._set, queue=QUEUE_SCHEDULER, limit=64)
        self._bus.on_reconnect(self._again.set)
        tasks.create_task(self._keep_read(), name="scaling")

    async def _keep_read(self) -> NoReturn:
        await keep_read(self._refresh, self._again, _REFRESH_S)

    def _on_change(self, change: SetScaling) -> None:
        if change == SetScaling(model=change.model, by=change.by):
            return  # a question
        asyncio.get_running_loop().call_later(_SOON_S, self._again.set)

    async def _refresh(self) -> None:
        try:
            table = await self._open()
            entries = await table.all(ScalingEntry)
        except DeepFlowError as error:
            self._log.warning("scaling_unread", error=error.message)
            self._table = None  # it may be another one, in another store
            return
        if entries != self.entries:
            self.entries = entries
            self._changed()

    async def _open(self) -> Table:
        if self._table is None:
            self._table = await self._bus.table(_TABLE)
        return self._table

    async def _set(self, change: SetScaling) -> ScalingEntry:
        """Answers `scaling.<model>`. Raises InvalidRequest naming the field, ModelNotFound, Unavailable."""
        model = change.model
        if not is_token(model) or not await self._knows(model):
            raise ModelNotFound(f"the model {model!r} does not exist", param="model")
        table = await self._open()
        for _ in range(_MAX_TRIES):
            found = await table.look(model, ScalingEntry)
            entry, revision = found if found is not None else (ScalingEntry(model=model), 0)
            after = merged(entry, change, self._default_max(model))
            if after == entry:  # a question
                return entry
            if await table.replace(model, after, revision) is not None:
                self._log.info("scaling_set", model=model, by=change.by, entry=str(after))
                self.entries = {**self.entries, model: after}
                self._changed()
                return after
        raise Unavailable("the model's bounds are changed by too many at once")
