"""A deployment in virtual time: TEs, JEs and a gateway, what they hear of each other, and what goes wrong.

`simulate` is a function of its arguments: chance is drawn from the scenario's seed alone, so the same calls and the
same scenario give the same result, byte for byte. What decides is the code that ships: placer, registry, prompt trees,
heatmap and policy of the scheduler, and the engine's index of pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any, Final

from deepflow.sim.clock import Clock
from deepflow.sim.faults import Beats, Fault, JeDeath, TeDeath
from deepflow.sim.flight import Flight, Names
from deepflow.sim.gateway import Gateway
from deepflow.sim.je import Je
from deepflow.sim.manager import Manager
from deepflow.sim.report import Result, TeShare
from deepflow.sim.scaling import Scaling
from deepflow.sim.scenario import Scenario, TeSpec
from deepflow.sim.te import Handover, Held, Te
from deepflow.sim.trace import Call
from services.scheduler.costs import Costs
from services.scheduler.heatmap import Heatmaps
from services.scheduler.lengths import Lengths
from services.scheduler.placer import MIN_SPLIT_TOKENS, Placer
from services.scheduler.policy.roster import make
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from shared.liveness import Liveness
from shared.messages import TaskEnded, TeBeat
from shared.rtc_messages import BlockEvents

MODEL: Final = "model"
TICK_S: Final = 0.25
_DETECT_S: Final = 1.5  # until a JE's silence has told its gateway


def simulate(calls: Iterable[Call], scenario: Scenario) -> Result:
    """Run the calls against the scenario until each has come to its end.

    Raises ConfigError for a policy that does not exist.
    """
    return Cluster(calls, scenario).run()


class Cluster:
    """All parts, and the events that join them. `run` may be called once."""

    def __init__(self, calls: Iterable[Call], scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.random = Random(scenario.seed)
        self.gateway = Gateway(self.clock, scenario, self._chance("gateway"))
        self.tes: dict[str, Te] = {}  # all that ever were
        self.jes: list[Je] = []
        self._by_number: dict[int, Te] = {}  # the newest of each
        self._specs: list[TeSpec] = []
        self._boots = 0
        self._calls = sorted(calls, key=lambda call: call.timestamp_ms)
        self._num_sent = 0
        self._names = Names()
        self._lengths = self._chance("lengths")
        self._beats_chance = self._chance("beats")
        self._disturbed: list[Beats] = []
        self._life: dict[
            str, list[float]
        ] = {}  # of each TE: its start, and its end once it has come
        self._manager = (
            Manager(self.clock, scenario, MODEL, self) if scenario.autoscaling is not None else None
        )

    def _chance(self, of: str) -> Random:
        """Randomness of one part's own, so that no part's draws depend on another's."""
        return Random(f"{self.scenario.seed} {of}")

    # ------------------------------------------------------------------------------------------------------- running

    def run(self) -> Result:
        """All calls, from the first arrival to the last end."""
        scenario, clock = self.scenario, self.clock
        for number in range(scenario.num_jes):
            self.jes.append(self._je(f"je-{number}"))
        for spec in scenario.tes:
            self._start(spec, 0.0)
        for fault in scenario.faults:
            clock.at(fault.at, self._strike, fault)
        for scaling in scenario.scaling:
            clock.at(scaling.at, self._scale, scaling)
        clock.after(TICK_S, self._tick)
        if self._manager is not None:
            self._manager.run()
        if self._calls:
            # Until everybody knows everybody.
            self._settled_s = 2 * scenario.beat_s
            self._send_next()
            clock.run()
        return self._result()

    def _send_next(self) -> None:
        """Set the arrival of the next call."""
        call = self._calls[self._num_sent]
        first = self._calls[0].timestamp_ms
        when = self._settled_s + (call.timestamp_ms - first) / 1000
        self.clock.at(when, self._arrive, call, when)

    def _arrive(self, call: Call, when: float) -> None:
        page = self.scenario.page
        flight = Flight(
            number=self._num_sent,
            call=call,
            hashes=self._names.chain(call.hash_ids[: call.input_length // page]),
            length=self.scenario.predict(call, self._lengths),
            arrived=when,
        )
        self._num_sent += 1
        if self._num_sent < len(self._calls):
            self._send_next()
        if self._manager is not None:
            self._manager.arrived(flight)
            if not any(
                te.state == "ready" for te in self.fleet()
            ):  # it is told at once of who is parked
                self.clock.after(3 * self.scenario.hop_s, self._manager.decide)
        self.gateway.send(flight)

    def _tick(self) -> None:
        """Several times a second: who has fallen silent, what waits."""
        if self._num_sent == len(self._calls) and not len(self.gateway):
            self.clock.stop()
            return
        self.gateway.tick()
        for je in self.jes:
            if not je.is_dead:
                je.tick()
        self.clock.after(TICK_S, self._tick)

    # ------------------------------------------------------------------------------------------------------ the parts

    def _je(self, name: str) -> Je:
        scenario = self.scenario
        costs = Costs()
        registry = Registry(Liveness(), costs=costs, page=scenario.page)
        registry.num_peers = max(1, scenario.num_jes)
        trees = PromptTrees()
        placer = Placer(
            policy=make(scenario.policy),
            registry=registry,
            trees=trees,
            heatmaps=Heatmaps(scenario.heatmap),
            lengths=Lengths(),
            costs=costs,
            random=self._chance(name),
            min_split_tokens=(
                MIN_SPLIT_TOKENS if scenario.min_split_tokens is None else scenario.min_split_tokens
            ),
        )
        je = Je(
            name,
            self.clock,
            scenario,
            self.gateway,
            self._find,
            model=MODEL,
            placer=placer,
            registry=registry,
            trees=trees,
        )
        self.gateway.jes = [*self.gateway.jes, je]
        return je

    def _find(self, name: str) -> Te | None:
        te = self.tes.get(name)
        return None if te is None or te.is_dead else te

    def _start(self, spec: TeSpec, load_s: float, number: int | None = None) -> None:
        """A TE's process, which is ready once it has loaded."""
        if number is None:
            number = len(self._specs)
            self._specs.append(spec)
        self._boots += 1
        name = f"te-{number}.{self._boots}"
        te = Te(
            name,
            number,
            spec,
            self.clock,
            self,
            self._announce,
            model=MODEL,
            page=self.scenario.page,
            hop_s=self.scenario.hop_s,
        )
        self.tes[name] = self._by_number[number] = te
        self._life[name] = [self.clock.now]
        self.clock.after(load_s, self._ready, te)
        self.clock.after(self.random.random() * self.scenario.beat_s, self._beat, te)

    def _ready(self, te: Te) -> None:
        if te.state == "loading":
            te.state = "ready"

    # -------------------------------------------------------------------------------------------- what a TE says

    def on_token(self, held: Held) -> None:
        """See `Listener`."""
        self._first(held)
        self.gateway.on_token(held)

    def on_ended(self, held: Held, ended: TaskEnded) -> None:
        """See `Listener`."""
        je = self._je_of(held)
        if je is not None:
            je.ended(ended)
        self._first(held)
        self.gateway.on_ended(held)

    def _first(self, held: Held) -> None:
        flight = held.task.flight
        if self._manager is not None and flight.first_at is None and not flight.over:
            self._manager.answered(flight)

    def on_prefilled(self, held: Held, ended: TaskEnded, handover: Handover) -> None:
        """See `Listener`."""
        self.gateway.on_moves(held)
        je = self._je_of(held)
        if je is not None:
            je.prefilled(held, ended, handover)
        else:
            handover.te.tell(handover.te.release, handover.lease)

    def _je_of(self, held: Held) -> Je | None:
        return next((je for je in self.jes if je.name == held.task.je and not je.is_dead), None)

    def _beat(self, te: Te) -> None:
        if te.is_dead:
            return
        if te.state == "draining" and not te.held:
            self._leave(te)
            return
        beat = te.beat()
        if not te.is_cut:
            self.clock.after(self.scenario.hop_s, self.gateway.beat, te.name)
            if self._manager is not None:
                self.clock.after(self.scenario.hop_s, self._manager.beat, beat)
            for je in self.jes:
                self._tell(te, je, Je.beat, beat)
        busy = beat.running or beat.waiting or te.state != "ready"
        self.clock.after(self.scenario.beat_s if busy else self.scenario.rest_s, self._beat, te)

    def _announce(self, te: Te, events: BlockEvents) -> None:
        if not te.is_cut:
            for je in self.jes:
                self._tell(te, je, Je.events, events)

    def _tell(self, te: Te, je: Je, what: Any, message: TeBeat | BlockEvents) -> None:
        """A TE's news on its way to a JE, unless something keeps it."""
        delay_s = self.scenario.hop_s
        for fault in self._disturbed:
            of_te = fault.te is None or fault.te == te.number
            if of_te and (fault.je is None or self.jes[fault.je] is je):
                if self._beats_chance.random() < fault.lost:
                    return
                delay_s += self._beats_chance.random() * fault.late_s
        self.clock.after(delay_s, self._hear, je, what, message)

    def _hear(self, je: Je, what: Any, message: TeBeat | BlockEvents) -> None:
        if not je.is_dead:
            what(je, message)

    # --------------------------------------------------------------------------------------------- faults and scaling

    def _strike(self, fault: Fault) -> None:
        clock = self.clock
        if isinstance(fault, JeDeath):
            je = self.jes[fault.je]
            if not je.is_dead:
                je.is_dead = True
                clock.after(_DETECT_S, self.gateway.je_lost, je.name)
                if fault.restart_after_s is not None:
                    clock.after(fault.restart_after_s, self._restart_je, fault.je)
        elif isinstance(fault, Beats):
            self._disturbed.append(fault)
            clock.after(fault.for_s, self._disturbed.remove, fault)
        else:
            te = self._by_number.get(fault.te)
            if te is None or te.is_dead:
                return
            if isinstance(fault, TeDeath):
                self._kill(te, fault)
            elif not te.is_cut:
                te.cut()
                clock.after(fault.for_s, self._heal, te)

    def _die(self, te: Te) -> None:
        te.die()
        self._life[te.name].append(self.clock.now)
        if self._manager is not None:
            self._manager.gone(te.name)

    def _kill(self, te: Te, fault: TeDeath) -> None:
        self._die(te)
        if fault.down_after_s is not None:
            self.clock.after(fault.down_after_s, self._down, te.name)
        if fault.restart_after_s is not None:
            self.clock.after(
                fault.restart_after_s, self._start, te.spec, self.scenario.load_s, te.number
            )

    def _heal(self, te: Te) -> None:
        if not te.is_dead:
            te.heal()

    def _down(self, te: str) -> None:
        self.gateway.te_lost(te)
        for je in self.jes:
            if not je.is_dead:
                je.down(te)

    def _restart_je(self, number: int) -> None:
        self._boots += 1
        self.jes[number] = self._je(f"je-{number}.{self._boots}")

    def _scale(self, scaling: Scaling) -> None:
        like = next(iter(self._specs), TeSpec())
        like = next((spec for spec in self._specs if spec.role == scaling.role), like)
        spec = replace(like, role=scaling.role)
        for _ in range(scaling.num):
            self._start(spec, self.scenario.load_s)
        going = [
            te
            for te in self.tes.values()
            if te.spec.role == scaling.role and te.state in ("loading", "ready")
        ]
        for te in going[scaling.num :] if scaling.num < 0 else ():
            te.state = "draining"

    def _leave(self, te: Te) -> None:
        """It has finished what it had: it says farewell."""
        self._die(te)
        self._down(te.name)

    # ------------------------------------------------------------------------------------------------- as pod host

    def fleet(self) -> list[Te]:
        """See `Host`."""
        return [te for te in self.tes.values() if not te.is_dead]

    def start(self) -> None:
        """See `Host`."""
        self._start(next(iter(self._specs), self.scenario.like), self.scenario.load_s)

    def stop(self, te: Te) -> None:
        """See `Host`."""
        if te.state == "loading":
            self._leave(te)
        else:
            te.state = "draining"

    def parked(self) -> list[float]:
        """See `Host`."""
        return [since for je in self.jes if not je.is_dead for since in je.parked_since()]

    # --------------------------------------------------------------------------------------------------- the result

    def _result(self) -> Result:
        outcomes = sorted(self.gateway.outcomes, key=lambda one: one.number)
        ends = [one.arrived_s + one.jct_s for one in outcomes]
        start = min((one.arrived_s for one in outcomes), default=0.0)
        return Result(
            policy=self.scenario.policy,
            duration_s=max(ends, default=0.0) - start,
            requests=tuple(outcomes),
            tes=tuple(self._share(te, start, max(ends, default=start)) for te in self.tes.values()),
            num_resubmissions=self.gateway.num_resubmissions,
            num_placements=sum(je.num_placements for je in self.gateway.jes),
            num_events=self.clock.num_events,
            decisions=tuple(self._manager.decisions) if self._manager is not None else (),
        )

    def _share(self, te: Te, start: float, end: float) -> TeShare:
        engine = te.engine
        born, *died = self._life[te.name]
        return TeShare(
            te=te.name,
            role=te.spec.role,
            num_tasks=te.num_taken,
            num_prefilled_tokens=engine.num_prefilled_tokens,
            num_hit_tokens=engine.num_hit_tokens,
            num_preemptions=engine.num_preemptions,
            busy_s=engine.busy_s,
            up_s=max(min([end, *died]) - max(born, start), 0.0),
        )
