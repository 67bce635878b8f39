"""What a TE has taken on, and whether it takes more. Pure: the clock is passed in.

The answer to a task is the admission, so it must be known at once and be final: the books are kept here, on the
shell's side, and the engine cannot refuse what they let in. Bounds of so many choices make refusals cheap and the queue
finite. Each band has one, for the choices of this band and the more urgent ones: what is less urgent gives way to a
task, so it never makes one be refused. This module must not know the bus, the engine or its thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared.errors import InvalidRequest, Overloaded, Unavailable
from shared.messages import Band, TaskKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.messages import Request, Task

# How long the end of a task is remembered, for a repeated one. No shorter than the engine's `keep_finished_s`: what is
# taken here and known there would be owed an end that never comes.
REMEMBERED_S: Final = 10.0
_SERVED: Final = (TaskKind.GENERATE, TaskKind.PREFILL, TaskKind.DECODE)  # by any serving TE


@dataclass(frozen=True, slots=True)
class Owed:
    """A task that is owed an end, taken at the time `since`."""

    task: Task
    since: float


class Admission:
    """The tasks this TE owes an end, by (request, attempt), and those that ended of late.

    Only a decode task may follow another one of the same attempt: where no other TE takes what was prefilled here.
    """

    def __init__(
        self,
        *,
        model: str,
        max_choices: int,
        max_batch_choices: int | None = None,
        validate: Callable[[Request], None],
        retry_after_s: Callable[[Band], float],
    ) -> None:
        """`max_choices` bounds the choices under way, `max_batch_choices` those that band BATCH finds and adds to;
        `validate` raises InvalidRequest for what can never run;
        `retry_after_s` says when there may be room again for a band."""
        self.model = model
        self.max_choices = max_choices
        self.draining = False
        self.counters = Counter({_refused(band): 0 for band in Band})  # for want of room
        self._max_batch_choices = max_choices if max_batch_choices is None else max_batch_choices
        self._num_choices = [0 for _ in Band]
        self._validate = validate
        self._retry_after_s = retry_after_s
        self._owed: dict[tuple[str, int], Owed] = {}
        self._newest: dict[str, int] = {}  # attempt of each request under way
        self._ended: OrderedDict[tuple[str, int, bool], float] = OrderedDict()  # bool: decode

    def admit(self, task: Task, now: float) -> bool:
        """Take `task`; False if it had been taken before, so that nothing is left to do.

        Raises InvalidRequest (not for this TE, or too long), Overloaded (full), Unavailable (draining). A request of
        more choices than the bound is taken when nothing else is under way.
        """
        request, decodes = task.request, task.kind is TaskKind.DECODE
        key = (request.request, request.attempt)
        self._forget(now)
        known = self._owed.get(key)
        if known is not None and decodes and known.task.kind is not TaskKind.DECODE:
            raise InvalidRequest("this attempt is under way as a task of another kind")
        if known is not None or (*key, decodes) in self._ended:
            return False
        newest = self._newest.get(request.request)
        if newest is not None and newest > request.attempt:
            raise InvalidRequest("a newer attempt of the request is under way")
        if task.kind not in _SERVED:
            raise InvalidRequest(f"a serving TE does not run tasks of kind {task.kind}")
        if request.model != self.model:
            raise InvalidRequest(f"this TE serves {self.model!r}", param="model")
        if self.draining:
            raise Unavailable("the TE is draining")
        self._validate(request)
        # The attempt that this one replaces is over as soon as the engine sees it.
        older = None if newest is None else self._owed.get((request.request, newest))
        others = sum(self._num_choices[: request.band + 1])
        if older is not None and older.task.request.band <= request.band:
            others -= _num_choices(older.task.request)
        is_batch = request.band is Band.BATCH
        bound = self._max_batch_choices if is_batch else self.max_choices
        if others and others + _num_choices(request) > bound:
            self.counters[_refused(request.band)] += 1
            raise Overloaded("the TE is full", retry_after_s=self._retry_after_s(request.band))
        self._owed[key] = Owed(task, now)
        self._newest[request.request] = request.attempt
        self._num_choices[request.band] += _num_choices(request)
        return True

    @property
    def num_choices(self) -> int:
        """Choices under way."""
        return sum(self._num_choices)

    def ended(self, request: str, attempt: int, now: float) -> Owed | None:
        """(request, attempt) has come to its end: what was owed it, if anything."""
        owed = self._owed.pop((request, attempt), None)
        if owed is None:
            return None
        task = owed.task
        self._num_choices[task.request.band] -= _num_choices(task.request)
        if self._newest.get(request) == attempt:  # gone if a newer attempt ended first
            del self._newest[request]
        self._forget(now)
        self._ended[(request, attempt, task.kind is TaskKind.DECODE)] = now
        return owed

    def tasks(self) -> list[Task]:
        """Every task that is owed an end."""
        return [owed.task for owed in self._owed.values()]

    def _forget(self, now: float) -> None:
        while self._ended:
            key, when = next(iter(self._ended.items()))
            if now - when <= REMEMBERED_S:
                break
            del self._ended[key]


def _refused(band: Band) -> str:
    return f"refused_{band.name.lower()}"


def _num_choices(request: Request) -> int:
    """Choices of `request` that are still to be generated."""
    return request.sampling.n - len(request.ended)
