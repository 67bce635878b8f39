"""Single lines of batches, run by the gateways: which gateway gets which, and how its answer is waited for.

A line's gateway follows from its key, so that a JE which takes a batch over asks where the one before it asked, and
finds what is running or just done. An answer is waited for in rounds, so that a gateway's death costs one of them.
This module must not know batches.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from hashlib import blake2b
from typing import Final

import orjson

from shared.bus import Bus
from shared.errors import DeadlineExceeded, DeepFlowError, Overloaded, Unavailable
from shared.job_messages import Line, LineDone
from shared.liveness import Liveness
from shared.messages import Beat, Down
from shared.table import heed_cancellation

ROUND_S: Final = 7.5  # more than a gateway lets a round last
_TICK_S: Final = 0.5
_AGAIN_S: Final = 0.5


class Lines:
    """The gateways, as those who run lines."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._alive = Liveness()
        self._draining: set[str] = set()
        bus.on_disconnect(self._alive.hold)
        bus.on_reconnect(lambda: self._alive.resume(time.monotonic()))

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Hear gateways from now on."""
        subjects = self._bus.subjects
        await self._bus.listen(subjects.beat("gateway", "*"), (Beat,), self._on_beat)
        await self._bus.listen(subjects.down("gateway", "*"), (Down,), self._on_down)
        tasks.create_task(self._watch(), name="watch-gateways")

    async def ask(self, line: Line) -> LineDone:
        """Have a line run. A fault of the line itself is a `LineDone`, too.

        Raises Unavailable if there is nobody to run it, Overloaded, and DeadlineExceeded once its time is over.
        """
        give_up = time.monotonic() + line.deadline_ms / 1000
        while True:
            heed_cancellation()
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded("the line's time is over")
            gateway = self._gateway(line.key)
            try:
                return await self._bus.request(
                    self._bus.subjects.line(gateway),
                    replace(line, deadline_ms=round(left_s * 1000)),
                    LineDone,
                    timeout_s=min(ROUND_S, left_s + 1.0),
                )
            except DeadlineExceeded:
                continue  # not yet
            except Unavailable:
                if not self._bus.connected or self._gateway(line.key) == gateway:
                    raise
                await asyncio.sleep(_AGAIN_S)  # it is gone, and another one is there
            except Overloaded:
                raise
            except DeepFlowError as error:
                return refused(error)

    def _gateway(self, key: str) -> str:
        """Rendezvous hashing: the same one for a key while it lives, and an equal share of keys for each."""
        names = [name for name in self._alive.all() if name not in self._draining]
        if not names:
            raise Unavailable("no gateway is up", retry_after_s=1.0)
        return max(
            names, key=lambda name: blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
        )

    def _on_beat(self, beat: Beat) -> None:
        self._alive.beat(beat.id, time.monotonic())
        (self._draining.add if beat.draining else self._draining.discard)(beat.id)

    def _on_down(self, down: Down) -> None:
        self._alive.down(down.id)
        self._draining.discard(down.id)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._draining -= set(self._alive.lost(time.monotonic()))


def refused(error: DeepFlowError) -> LineDone:
    """What HTTP would have answered."""
    body = {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }
    return LineDone(request_id="", status=error.status, body=orjson.dumps(body).decode())
