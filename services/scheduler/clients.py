"""What a JE says to the clients of its requests: progress, and the end of what no TE will end.

Nothing here fails: a client that cannot be told asks, resubmits, or gives up at its deadline by itself. This module
must not know plans, parking, or TEs.
"""

from __future__ import annotations

from typing import Final

from services.scheduler.outlook import QUEUED, Stage
from shared import log
from shared.bus import Bus
from shared.errors import DeepFlowError
from shared.messages import Delta, Failure, Progress, Request, Tokens

_MAX_CLIENTS: Final = 4096


class Clients:
    """The frames of one JE, numbered per client."""

    def __init__(self, bus: Bus, je: str) -> None:
        self._bus = bus
        self._je = je
        self._log = log.get(service="scheduler", id=je)
        self._frames: dict[str, int] = {}  # client -> frames sent to it

    def forget(self, client: str) -> None:
        """It is gone."""
        self._frames.pop(client, None)

    async def progress(
        self,
        request: Request,
        state: str,
        te: str | None = None,
        waited_s: float = 0.0,
        stage: Stage = QUEUED,
    ) -> None:
        """What is happening to a request: a state of `Progress` and, while it is parked, what it waits for."""
        progress = Progress(
            source=self._je,
            request=request.request,
            attempt=request.attempt,
            state=state,
            te=te,
            waited_ms=int(waited_s * 1000),
            stage=stage.name,
            percent=stage.percent,
        )
        await self._tell(request.client, progress)

    async def end(self, request: Request, finish: str, why: Failure | None = None) -> None:
        """The terminal frame: one delta for every choice that is not over."""
        deltas = [
            Delta(
                request=request.request,
                attempt=request.attempt,
                choice=choice,
                index=len(request.output[choice]) if choice < len(request.output) else 0,
                ids=[],
                finish=finish,
                failure=why,
            )
            for choice in range(request.sampling.n)
            if choice not in request.ended
        ]
        seq = self._frames.pop(request.client, 0) + 1
        self._frames[request.client] = seq
        if len(self._frames) > _MAX_CLIENTS:
            del self._frames[next(iter(self._frames))]
        await self._tell(request.client, Tokens(source=self._je, seq=seq, deltas=deltas))

    async def _tell(self, client: str, message: Progress | Tokens) -> None:
        try:
            await self._bus.publish(self._bus.subjects.tokens(client), message)
        except DeepFlowError as error:
            # The bus's buffer is full; the gateway itself ends the request at the deadline.
            self._log.warning("frame_lost", client=client, error=error.message)
