"""A Job Executor in virtual time: the real placer, registry and prompt trees, and around them what `executor.py`,
`dispatch.py` and `handover.py` of the scheduler do on the bus.

This module must not know what TEs are made of, nor what becomes of a request after its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final

from deepflow.sim.clock import Clock, Process
from deepflow.sim.flight import Flight
from deepflow.sim.scenario import Scenario
from deepflow.sim.te import Handover, Held, Task, Te
from services.scheduler.placer import Placer
from services.scheduler.policy.base import Candidate
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from services.scheduler.work import Work
from shared.errors import DeepFlowError, InvalidRequest, Overloaded, Unavailable
from shared.messages import TaskEnded, TaskKind, TeBeat
from shared.rtc_messages import BlockEvents, BlocksDump

if TYPE_CHECKING:
    from deepflow.sim.gateway import Gateway

MAX_SPLIT_ATTEMPTS: Final = 3
_MAX_KNOWN: Final = 65_536
_NO_TE_RETRY_S: Final = 5.0


@dataclass(slots=True, eq=False, kw_only=True)
class _Parked:
    flight: Flight
    attempt: int
    until: float
    since: float


class Je:
    """One replica. `find` gives the TE of a name, if anybody listens there."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        scenario: Scenario,
        gateway: Gateway,
        find: Callable[[str], Te | None],
        *,
        model: str,
        placer: Placer,
        registry: Registry,
        trees: PromptTrees,
    ) -> None:
        self.name = name
        self.is_dead = False
        self.placer = placer
        self.registry = registry
        self.trees = trees
        self.num_placements = 0
        self._clock = clock
        self._scenario = scenario
        self._gateway = gateway
        self._find = find
        self._model = model
        self._tasks = count(1)
        self._newest: OrderedDict[int, int] = OrderedDict()  # flight -> attempt known here
        self._parked: list[_Parked] = []
        self._asked_dumps: set[str] = set()

    # ---------------------------------------------------------------------------------------------------- admission

    def admit(self, flight: Flight, attempt: int) -> Generator[float, None, Held | None]:
        """The answer to a request: what a TE holds of it now, or None: it is parked. Raises DeepFlowError."""
        self._newest[flight.number] = max(attempt, self._newest.get(flight.number, 0))
        self._newest.move_to_end(flight.number)
        if len(self._newest) > _MAX_KNOWN:
            self._newest.popitem(last=False)
        held = None
        if self.registry.ready(self._model):
            held = yield from self._place(flight, attempt)
        if held is None:
            until = self._clock.now + min(
                self._scenario.park_s, flight.arrived + self._scenario.deadline_s - self._clock.now
            )
            self._parked.append(
                _Parked(flight=flight, attempt=attempt, until=until, since=self._clock.now)
            )
        return held

    def _place(self, flight: Flight, attempt: int) -> Generator[float, None, Held | None]:
        """Algorithm 1: a pair of TEs, or one."""
        whole = self._work(flight, attempt, TaskKind.GENERATE)
        if attempt <= MAX_SPLIT_ATTEMPTS and self.placer.is_split(whole, self._clock.now):
            prefill = self._work(flight, attempt, TaskKind.PREFILL)
            try:
                held = yield from self._dispatch(flight, prefill)
            except Overloaded:
                held = None
            if held is not None:
                return held
        return (yield from self._dispatch(flight, whole))

    def _work(self, flight: Flight, attempt: int, kind: TaskKind) -> Work:
        call = flight.call
        return Work(
            request=flight.id,
            attempt=attempt,
            model=self._model,
            tenant=call.tenant,
            kind=kind,
            band=call.band,
            num_known=call.input_length + flight.num_had,
            hashes=flight.hashes,
            num_choices=1,
            # Nothing bounds it: a trace does not say what was allowed.
            length=flight.length.after(flight.num_had),
            avoid=frozenset(flight.avoid),
        )

    def _dispatch(
        self, flight: Flight, work: Work, handover: Handover | None = None
    ) -> Generator[float, None, Held | None]:
        """What the first TE that takes it holds; None if none could be reached. Raises as `Dispatcher.dispatch`."""
        clock, placer = self._clock, self.placer
        holder = handover.te.name if handover is not None else None
        decision = placer.place(work, clock.now, holder=holder)
        self.num_placements += 1
        task = Task(
            id=f"{self.name}-{next(self._tasks)}",
            je=self.name,
            kind=work.kind,
            flight=flight,
            attempt=work.attempt,
            num_had=flight.num_had,
            band=work.band,
            expected=work.length.mid,
            handover=handover,
        )
        waits: list[float] = []
        for candidate in decision.shortlist():
            placer.asked(candidate, work, task.id, clock.now)
            try:
                held = yield from self._ask(candidate, task)
            except Overloaded as error:
                placer.refused(candidate, task.id, clock.now)
                waits.append(error.retry_after_s or 1.0)
            except Unavailable as error:
                placer.refused(candidate, task.id, clock.now)
                if error.retry_after_s == 0.0:  # no answer: it may have taken it
                    self.registry.suspect(candidate.te, clock.now)
                    self._cancel(candidate.te, task)
                    raise
                self.registry.unreachable(candidate.te)
            except InvalidRequest:
                placer.refused(candidate, task.id, clock.now)
                raise
            else:
                placer.accepted(candidate, work, task.id, clock.now)
                decision.chosen = candidate.te
                return held
        if waits:
            raise Overloaded("every replica is full", retry_after_s=min(waits))
        return None

    def _ask(self, candidate: Candidate, task: Task) -> Generator[float, None, Held]:
        hop_s = self._scenario.hop_s
        yield hop_s
        te = self._find(candidate.te)
        if te is None:
            yield hop_s
            raise Unavailable("nobody listens")
        answer: Held | DeepFlowError | None = None
        if not te.is_cut:
            try:
                answer = te.take(task)
            except DeepFlowError as error:
                answer = error
            yield hop_s
        if answer is None or te.is_cut or (te.is_dead and isinstance(answer, Held)):
            yield self._scenario.task_timeout_s
            raise Unavailable("a replica left the request without an answer", retry_after_s=0.0)
        if isinstance(answer, DeepFlowError):
            raise answer
        return answer

    def _cancel(self, te: str, task: Task) -> None:
        found = self._find(te)
        if found is not None:
            found.tell(found.cancel, task.flight.number, task.attempt)

    # ------------------------------------------------------------------------------------------------- handing over

    def prefilled(self, held: Held, ended: TaskEnded, handover: Handover) -> None:
        """A prefill task of ours is done."""
        self.placer.ended(ended.te, ended.task)
        flight, attempt = held.task.flight, held.task.attempt
        if self._newest.get(flight.number) != attempt or flight.over:
            handover.te.tell(handover.te.release, handover.lease)
        else:
            self._clock.spawn(self._hand_over(flight, attempt, handover))

    def _hand_over(self, flight: Flight, attempt: int, handover: Handover) -> Process:
        gateway = self._gateway
        work = self._work(flight, attempt, TaskKind.DECODE)
        try:
            held = yield from self._dispatch(flight, work, handover)
        except DeepFlowError:
            held = None
        if self.is_dead:
            return
        yield self._scenario.hop_s
        if held is not None:
            gateway.on_moved(held)
        else:
            handover.te.tell(handover.te.release, handover.lease)
            gateway.on_failed(flight, attempt)

    # ------------------------------------------------------------------------------------------------ what one hears

    def beat(self, beat: TeBeat) -> None:
        """A TE's load and pulse."""
        newly_ready = self.registry.beat(beat, self._clock.now)
        if beat.state != "loading" and self.registry.last_beat(beat.id) is not None:
            self.trees.seen(beat.id, beat.model, beat.role)
        if newly_ready:
            self._unpark()

    def ended(self, ended: TaskEnded) -> None:
        """A TE is done with a task of ours."""
        self.placer.ended(ended.te, ended.task)

    def events(self, events: BlockEvents) -> None:
        """News of a TE's pages."""
        self.trees.apply(events)

    def down(self, te: str) -> None:
        """Its pod host says that a TE is dead."""
        self.registry.down(te)
        self.trees.gone(te)

    def tick(self) -> None:
        """Several times a second."""
        now = self._clock.now
        for te in self.registry.lost(now):
            self.trees.gone(te)
        for te, _ in self.trees.unsynced():
            if te not in self._asked_dumps:
                self._asked_dumps.add(te)
                self._clock.spawn(self._load(te))
        for parked in [one for one in self._parked if one.until <= now or one.flight.over]:
            self._parked.remove(parked)
            self._fail(parked)
        if self._parked and self.registry.ready(self._model):
            self._unpark()

    def _load(self, name: str) -> Process:
        """Ask a TE for its whole index."""
        yield self._scenario.hop_s
        te = self._find(name)
        dump: BlocksDump | None = None
        if te is not None and not te.is_cut:
            dump = te.dump()
        yield self._scenario.hop_s
        self._asked_dumps.discard(name)
        if dump is not None and not self.is_dead:
            self.trees.load(dump)

    # ------------------------------------------------------------------------------------------------------ parking

    def parked_since(self) -> list[float]:
        """Since when each request waits here that does."""
        return [one.since for one in self._parked]

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for one in parked:
            self._clock.spawn(self._again(one))

    def _again(self, parked: _Parked) -> Process:
        flight, gateway = parked.flight, self._gateway
        if not gateway.awaits(flight, parked.attempt):
            return
        try:
            held = yield from self._place(flight, parked.attempt)
        except Overloaded:
            held = None
        except DeepFlowError:
            self._fail(parked)
            return
        if self.is_dead:
            return
        if held is None:
            self._parked.append(parked)
            return
        yield self._scenario.hop_s
        gateway.on_moved(held)

    def _fail(self, parked: _Parked) -> None:
        why = Unavailable("no replica came up in time", retry_after_s=_NO_TE_RETRY_S)
        self._gateway.on_refused(parked.flight, parked.attempt, why)
