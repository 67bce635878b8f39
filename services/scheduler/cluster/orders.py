"""Sends pod hosts their orders: at once what is new, and every second what is not, one at a time to each.

An order is absolute, so of several that wait only the newest counts, and one that was lost is made up for by the next.
This module must not know why an order is what it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shared.bus import Bus
from shared.errors import DeadlineExceeded, DeepFlowError, Forbidden
from shared.log import Logger
from shared.scaling_messages import Scaled, ScaleOrder

REPEAT_S: Final = 1.0
_ANSWER_S: Final = 1.0
_AGAIN_S: Final = 0.2  # after one that was not taken; longer each time, up to
_LONGEST_S: Final = 3.2


@dataclass(slots=True)
class _Given:
    order: ScaleOrder
    due: float = 0.0  # when to say it again, if nothing changes
    sending: ScaleOrder | None = None
    answered: ScaleOrder | None = (
        None  # the last one that the pod host took, or said that it cannot
    )
    num_failed: int = 0  # in a row


class Orders:
    """`is_allowed` says whether one may still order under a term; `is_refused` hears who knows of a later one."""

    def __init__(
        self,
        bus: Bus,
        tasks: asyncio.TaskGroup,
        log: Logger,
        *,
        is_allowed: Callable[[int], bool],
        is_refused: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._tasks = tasks
        self._log = log
        self._is_allowed = is_allowed
        self._is_refused = is_refused
        self._given: dict[str, _Given] = {}

    def give(self, pod: str, order: ScaleOrder, now: float) -> None:
        """Have a pod host do this."""
        given = self._given.get(pod)
        if given is None:
            given = self._given[pod] = _Given(order)
        is_new = given.due == 0.0 or _numbers(given.order) != _numbers(order)
        given.order = order
        if given.sending is None and (is_new or now >= given.due):
            given.sending = order
            self._tasks.create_task(self._send(pod, given), name=f"order-{pod}")

    def answered(self, pod: str) -> bool:
        """Whether it has had what it is ordered now, and a beat of it tells what came of that."""
        given = self._given.get(pod)
        if given is None or given.answered is None:
            return False
        return _numbers(given.answered) == _numbers(given.order)

    def forget(self, pod: str | None = None) -> None:
        """It is gone; or somebody else gives orders now."""
        if pod is None:
            self._given.clear()
        else:
            self._given.pop(pod, None)

    async def _send(self, pod: str, given: _Given) -> None:
        subject = self._bus.subjects.scale(pod)
        while given.sending is not None:
            order = given.sending
            pause_s = REPEAT_S
            try:
                if self._is_allowed(order.term) and self._given.get(pod) is given:
                    await self._bus.request(subject, order, Scaled, timeout_s=_ANSWER_S)
                    given.answered, given.num_failed = order, 0
            except Forbidden:
                self._is_refused(pod)
            except DeepFlowError as error:
                if given.num_failed == 0:
                    self._log.warning("order_not_taken", pod=pod, error=error.message)
                pause_s = min(_AGAIN_S * 2**given.num_failed, _LONGEST_S)
                given.num_failed = min(given.num_failed + 1, 16)
                if not isinstance(error, DeadlineExceeded):  # silence is no answer
                    given.answered = order
            given.due = time.monotonic() + pause_s
            is_newer = _numbers(given.order) != _numbers(order)
            given.sending = given.order if is_newer else None


def _numbers(order: ScaleOrder) -> tuple[object, ...]:
    """What is ordered; where weights come from may change all the time."""
    targets = sorted((target.model, target.role, target.num) for target in order.targets)
    return order.term, tuple(targets)
