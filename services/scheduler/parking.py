"""The parked requests of a JE: accepted while no TE of their model was up, or had room, within two bounds.

They leave for a TE in the order in which it would take them: by band, then by what their tenants got, then by age. A
request leaves the lot exactly once: taken for dispatch, cancelled, orphaned (its client fell silent) or expired.
Pure: the clock is passed in, and what is owed to the client (progress, the terminal frame) is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from operator import attrgetter
from typing import Final

from services.scheduler.job import Plan
from services.scheduler.outlook import QUEUED, Stage
from shared.errors import Overloaded
from shared.fairness import FairQueue
from shared.messages import Request

_REQUEST_BYTES: Final = 2048  # a request without its lists, its plan, and what points at it
_TOKEN_BYTES: Final = 40  # an int object and the list's pointer to it
_HASH_BYTES: Final = 64  # 16 bytes as a bytes object, and the pointer


def num_bytes(request: Request) -> int:
    """What keeping `request` costs, an upper estimate."""
    tokens = len(request.prompt) + sum(len(ids) for ids in request.output)
    return _REQUEST_BYTES + _TOKEN_BYTES * tokens + _HASH_BYTES * len(request.hashes)


@dataclass(slots=True, kw_only=True, eq=False)
class Parked:
    """A request in the lot, or out of it on its way to a TE. Times are readings of the caller's clock. `number` is its
    age: it keeps it when it is put back."""

    request: Request
    plan: Plan
    since: float
    until: float  # end of the park budget or of the deadline, whichever is nearer
    num_bytes: int
    number: int
    told: float = float("-inf")  # when the client last heard of it
    stage: Stage = QUEUED  # and what

    def remaining(self, now: float) -> Request:
        """The request as it stands now: time spent here is gone from its budgets."""
        waited_ms = int((now - self.since) * 1000)
        return replace(
            self.request,
            deadline_ms=max(0, self.request.deadline_ms - waited_ms),
            park_ms=max(0, self.request.park_ms - waited_ms),
        )


class ParkingLot:
    """A fair queue per model; bounded by `max_requests` and `max_bytes` (of all models together)."""

    def __init__(self, *, max_requests: int, max_bytes: int, max_park_s: float) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.max_park_s = max_park_s
        self.num_bytes = 0
        self._parked: dict[str, Parked] = {}  # by request id
        self._queues: dict[str, FairQueue[Parked]] = {}  # by model
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[Parked]:
        """All that are parked, the oldest first."""
        return iter(sorted(self._parked.values(), key=attrgetter("number")))

    def __contains__(self, request: str) -> bool:
        return request in self._parked

    def park(self, request: Request, plan: Plan, now: float) -> Parked:
        """Raises Overloaded when the lot is full. The caller has removed an older attempt before."""
        if not self.has_room(request):
            raise Overloaded(
                f"no replica of model {request.model!r} is up and too many requests wait for one"
            )
        parked = Parked(
            request=request,
            plan=plan,
            since=now,
            until=now + self.budget_s(request),
            num_bytes=num_bytes(request),
            number=next(self._numbers),
        )
        self._add(parked)
        return parked

    def has_room(self, request: Request) -> bool:
        """Whether it may be parked."""
        return (
            len(self) < self.max_requests and self.num_bytes + num_bytes(request) <= self.max_bytes
        )

    def budget_s(self, request: Request) -> float:
        """How long it may be parked."""
        return min(request.park_ms / 1000, request.deadline_ms / 1000, self.max_park_s)

    def put_back(self, parked: Parked) -> None:
        """Back in its old place: it was taken for dispatch and no TE had room. Never refused, it was inside already."""
        self._add(parked, is_new=False)
        self._queue(parked).share(*_tenant(parked)).served -= len(parked.request.prompt)

    def take(self, request: str) -> Parked | None:
        """Removes and returns the parked request, if it is here."""
        parked = self._parked.pop(request, None)
        if parked is not None:
            self.num_bytes -= parked.num_bytes
            queue = self._queue(parked)
            queue.remove(queue.share(*_tenant(parked)), parked)
        return parked

    def next(self, model: str) -> Parked | None:
        """Removes and returns the request whose turn it is of those for `model`; its tenant's next turn comes later."""
        queue = self._queues.get(model)
        first = None if queue is None else queue.first()
        if queue is None or first is None:
            return None
        queue.share(*_tenant(first)).served += len(first.request.prompt)
        return self.take(first.request.request)

    def num_waiting(self, model: str) -> int:
        """How many wait for this model."""
        queue = self._queues.get(model)
        return len(queue) if queue is not None else 0

    def models(self) -> list[str]:
        """The models somebody waits for, longest wait first."""
        return list(dict.fromkeys(parked.request.model for parked in self))

    def take_client(self, client: str) -> list[Parked]:
        """Removes and returns all requests of a client."""
        ids = [p.request.request for p in self if p.request.client == client]
        return [parked for request in ids if (parked := self.take(request))]

    def take_model(self, model: str) -> list[Parked]:
        """Removes and returns all requests for a model."""
        ids = [p.request.request for p in self if p.request.model == model]
        return [parked for request in ids if (parked := self.take(request))]

    def take_expired(self, now: float) -> list[Parked]:
        """Removes and returns the requests whose time here is over."""
        ids = [p.request.request for p in self if p.until <= now]
        return [parked for request in ids if (parked := self.take(request))]

    def _add(self, parked: Parked, *, is_new: bool = True) -> None:
        self._parked[parked.request.request] = parked
        self.num_bytes += parked.num_bytes
        queue = self._queue(parked)
        queue.add(queue.share(*_tenant(parked)), parked, is_new=is_new)

    def _queue(self, parked: Parked) -> FairQueue[Parked]:
        model = parked.request.model
        if model not in self._queues:
            for idle in [name for name, queue in self._queues.items() if not queue]:
                del self._queues[idle]  # no more queues than requests, and one
            self._queues[model] = FairQueue(lambda parked: (parked.number,))
        return self._queues[model]


def _tenant(parked: Parked) -> tuple[int, str]:
    return parked.request.band, parked.request.tenant
