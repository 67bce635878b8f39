"""The cluster manager in virtual time: what TEs and JEs tell of themselves goes to a rule, and its targets to TEs.

Who decides is the AUTOSCALER that ships, or one that it is compared with. It sees what a real one sees: beats, as late
as they come, and what arrived as the JEs price it. This module must not know what becomes of a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from deepflow.sim.clock import Clock
from deepflow.sim.flight import Flight
from deepflow.sim.scaling import Decision
from deepflow.sim.scenario import Scenario
from services.scheduler.cluster.autoscaler import Observation
from services.scheduler.cluster.price import price
from services.scheduler.costs import Costs
from shared.messages import TeBeat

if TYPE_CHECKING:
    from deepflow.sim.te import Te


class Host(Protocol):
    """Where TEs run."""

    def fleet(self) -> list[Te]:
        """All that are loading, ready or draining, in the order of their starts."""

    def start(self) -> None:
        """One more."""

    def stop(self, te: Te) -> None:
        """One that takes nothing new and goes when it is done."""

    def parked(self) -> list[float]:
        """Since when requests wait for a TE."""


class Manager:
    """One model's."""

    def __init__(self, clock: Clock, scenario: Scenario, model: str, host: Host) -> None:
        assert scenario.autoscaling is not None
        self.decisions: list[Decision] = []
        self._settings = scenario.autoscaling
        self._rule = scenario.autoscaling.make()
        self._clock = clock
        self._scenario = scenario
        self._model = model
        self._host = host
        self._costs = Costs()
        self._beats: dict[str, TeBeat] = {}
        self._known: TeBeat | None = None  # the last one that told what work costs
        self._arrivals = self._answered = self._late = 0
        self._work_s = 0.0

    # ---------------------------------------------------------------------------------------------- what it is told

    def arrived(self, flight: Flight) -> None:
        """A JE was asked for this."""
        self._arrivals += 1
        self._work_s += price(flight.call.input_length, flight.length.mid, self._known, self._costs)

    def answered(self, flight: Flight) -> None:
        """Its first token came."""
        self._answered += 1
        self._late += self._clock.now - flight.arrived > self._settings.slo_ttft_s

    def beat(self, beat: TeBeat) -> None:
        """A TE's."""
        self._beats[beat.id] = beat
        if beat.prefill_us and beat.decode_us:
            self._known = beat

    def gone(self, te: str) -> None:
        """It is dead."""
        self._beats.pop(te, None)

    # ------------------------------------------------------------------------------------------------- what it does

    def run(self) -> None:
        """Decide, now and from now on."""
        self.decide()
        self._clock.after(self._settings.every_s, self.run)

    def decide(self) -> None:
        """Have as many TEs as the rule says."""
        fleet = self._host.fleet()
        verdict = self._rule.observe(self._seen(fleet), self._clock.now)
        up = [te for te in fleet if te.state != "draining"]
        before = self.decisions[-1] if self.decisions else None
        ready = sum(te.state == "ready" for te in up)
        if before is None or (before.target, before.ready) != (verdict.target, ready):
            self.decisions.append(
                Decision(
                    at=self._clock.now,
                    target=verdict.target,
                    ready=ready,
                    cause=str(verdict.cause),
                )
            )
        for _ in range(verdict.target - len(up)):
            self._host.start()
        # The idlest first, and of these the newest.
        order = sorted(up, key=lambda te: (len(te.held) if te.state == "ready" else -1, -te.number))
        for te in order[: max(len(up) - verdict.target, 0)]:
            self._host.stop(te)

    def _seen(self, fleet: list[Te]) -> Observation:
        settings, now = self._settings, self._clock.now
        # A TE that drains does what it has; what it has is nobody else's load.
        beats = [
            self._beats[te.name] for te in fleet if te.state == "ready" and te.name in self._beats
        ]
        parked = self._host.parked()
        seen = Observation(
            model=self._model,
            min_tes=settings.min_tes,
            max_tes=settings.max_tes,
            ready=sum(te.state == "ready" for te in fleet),
            starting=sum(te.state == "loading" for te in fleet),
            draining=sum(te.state == "draining" for te in fleet),
            num_slots=max((te.spec.profile.max_num_seqs for te in fleet), default=0),
            running=sum(beat.running for beat in beats),
            waiting=sum(beat.waiting for beat in beats),
            parked=len(parked),
            parked_wait_s=now - min(parked, default=now),
            arrivals=self._arrivals,
            work_s=self._work_s,
            answered=self._answered,
            late=self._late,
            start_s=self._scenario.load_s,
        )
        self._arrivals = self._answered = self._late = 0
        self._work_s = 0.0
        return seen
