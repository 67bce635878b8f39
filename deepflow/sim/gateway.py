"""The gateway and its clients in virtual time: a request is sent, sent again when it was lost, and ends exactly once.

Only the gateway resubmits, as the real one does: the next attempt carries what the client already has, and whatever
still comes of an older attempt is dropped and cancelled. This module must not know how a TE is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Final

from deepflow.sim.clock import Clock, Process
from deepflow.sim.flight import Flight
from deepflow.sim.report import Outcome
from deepflow.sim.scenario import Scenario
from deepflow.sim.te import Held
from shared.errors import DeepFlowError, InvalidRequest, Overloaded, Unavailable
from shared.liveness import Liveness

if TYPE_CHECKING:
    from deepflow.sim.je import Je

HANDOVER_S: Final = 2.0  # from the first TE's last token to any sign of the second
MAX_LOSSES: Final = 8  # in a row, without a new token
MAX_AVOID: Final = 8
BACKOFF_S: Final = (0.05, 2.0)
SUBMIT_TIMEOUT_S: Final = 2.0


class Gateway:
    """All requests in flight."""

    def __init__(self, clock: Clock, scenario: Scenario, random: Random) -> None:
        self.jes: Sequence[Je] = ()  # those that answer
        self.outcomes: list[Outcome] = []
        self.num_resubmissions = 0
        self._clock = clock
        self._scenario = scenario
        self._random = random
        self._liveness = Liveness()
        self._flights: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    # ---------------------------------------------------------------------------------------------------- submitting

    def send(self, flight: Flight) -> None:
        """A client's request."""
        self._flights[flight.number] = flight
        self._clock.after(self._scenario.deadline_s, self._too_late, flight)
        self._submit(flight, 0.0)

    def _submit(self, flight: Flight, delay_s: float) -> None:
        flight.held, flight.je, flight.moving = None, "", False
        self._clock.after(delay_s, self._clock.spawn, self._ask(flight, flight.attempt))

    def _ask(self, flight: Flight, attempt: int) -> Process:
        if not self.awaits(flight, attempt):
            return
        since = self._clock.now
        jes = [je for je in self.jes if not je.is_dead]
        try:
            if not jes:
                raise Unavailable("no scheduler is there")
            je = self._random.choice(jes)
            yield self._scenario.hop_s
            held = yield from je.admit(flight, attempt)
            if je.is_dead:  # its answer does not come
                yield max(0.0, since + SUBMIT_TIMEOUT_S - self._clock.now)
                raise Unavailable("the scheduler left the request without an answer")
            yield self._scenario.hop_s
        except DeepFlowError as error:
            self.on_refused(flight, attempt, error)
        else:
            self._accepted(flight, attempt, je, held)

    def _accepted(self, flight: Flight, attempt: int, je: Je, held: Held | None) -> None:
        if not self.awaits(flight, attempt):
            if held is not None:
                self._drop(held)
            return
        flight.num_refusals = 0
        flight.je = je.name
        if flight.held is None and not flight.moving:  # else its TE was faster than this answer
            flight.held = held

    def on_refused(self, flight: Flight, attempt: int, error: DeepFlowError) -> None:
        """A JE says no."""
        if not self.awaits(flight, attempt) or flight.held is not None:
            return
        if isinstance(error, InvalidRequest):
            self._end(flight, "failed")
        elif isinstance(error, Overloaded) and flight.attempt == 0 and not self._scenario.insists:
            self._end(flight, "refused")
        elif isinstance(error, Overloaded):
            flight.num_refusals += 1
            flight.attempt += 1
            self._submit(flight, error.retry_after_s or self._backoff_s(flight.num_refusals))
        elif error.retry_after_s:
            self._end(flight, "failed")  # nobody was there for as long as it could wait
        else:
            self._lost(flight, None)

    def awaits(self, flight: Flight, attempt: int) -> bool:
        """Whether news of this attempt still matters."""
        return not flight.over and flight.attempt == attempt

    # --------------------------------------------------------------------------------------------------- what comes

    def on_token(self, held: Held) -> None:
        """The first token of a task."""
        flight = held.task.flight
        if not self.awaits(flight, held.task.attempt):
            self._drop(held)
            return
        flight.held, flight.moving = held, False
        self._note(flight, held)

    def on_moves(self, held: Held) -> None:
        """The only token of a prefill task: another TE goes on."""
        flight = held.task.flight
        attempt = held.task.attempt
        if not self.awaits(flight, attempt):
            return
        self._note(flight, held)
        if flight.held is None or flight.held is held:
            flight.held, flight.moving = None, True
            flight.num_had = held.task.num_had + 1
            self._clock.after(HANDOVER_S, self._not_moved, flight, attempt)

    def on_moved(self, held: Held) -> None:
        """A JE says who goes on."""
        flight = held.task.flight
        if not self.awaits(flight, held.task.attempt):
            self._drop(held)
        elif flight.moving or flight.held is None:
            flight.held, flight.moving = held, False

    def on_failed(self, flight: Flight, attempt: int) -> None:
        """A JE says that the attempt has come to nothing."""
        if self.awaits(flight, attempt):
            self._lost(flight, None)

    def on_ended(self, held: Held) -> None:
        """The last token."""
        flight = held.task.flight
        if not self.awaits(flight, held.task.attempt):
            return
        self._note(flight, held)
        flight.held = held
        self._end(flight, "length")

    def _note(self, flight: Flight, held: Held) -> None:
        flight.num_losses = 0
        if flight.first_at is None:
            flight.first_at = self._clock.now
        if flight.num_cached is None:
            flight.num_cached = min(held.sequence.num_cached or 0, flight.call.input_length)
            flight.prefill_te = held.te.name

    # -------------------------------------------------------------------------------------------------------- losses

    def beat(self, te: str) -> None:
        """A TE's sign of life."""
        self._liveness.beat(te, self._clock.now)

    def tick(self) -> None:
        """Several times a second."""
        for te in self._liveness.lost(self._clock.now):
            self.te_lost(te)

    def te_lost(self, te: str) -> None:
        """This TE is dead, or counts as dead."""
        self._liveness.down(te)
        for flight in list(self._flights.values()):
            if flight.held is not None and flight.held.te.name == te:
                self._lost(flight, te)

    def je_lost(self, je: str) -> None:
        """This JE is dead, and with it what it parked, or was about to hand over."""
        for flight in list(self._flights.values()):
            if flight.je == je and flight.held is None:
                self._lost(flight, None)

    def _not_moved(self, flight: Flight, attempt: int) -> None:
        if self.awaits(flight, attempt) and flight.moving:
            self._lost(flight, None)

    def _lost(self, flight: Flight, blame: str | None) -> None:
        """The attempt is lost: the next one carries what the client has."""
        held = flight.held
        if held is not None:
            # Its end, if that is on its way, comes too late.
            had = min(held.num_delivered, flight.call.output_length - 1)
            if had > flight.num_had:
                flight.num_losses = 0
            flight.num_had = had
            self._drop(held)
        flight.num_losses += 1
        if flight.num_losses > MAX_LOSSES:
            self._end(flight, "failed")
            return
        if blame is not None:
            flight.avoid = (*flight.avoid, blame)[-MAX_AVOID:]
        self.num_resubmissions += 1
        flight.attempt += 1
        self._submit(flight, 0.0 if flight.num_losses == 1 else self._backoff_s(flight.num_losses))

    def _backoff_s(self, num: int) -> float:
        low, high = BACKOFF_S
        return min(low * float(1 << num), high) * (0.5 + self._random.random() / 2)

    def _drop(self, held: Held) -> None:
        """Nobody wants what this task brings."""
        te, task = held.te, held.task
        if te.is_dead:
            return
        te.tell(te.cancel, task.flight.number, task.attempt)

    def _too_late(self, flight: Flight) -> None:
        if not flight.over:
            if flight.held is not None:
                self._drop(flight.held)
            self._end(flight, "failed")

    def _end(self, flight: Flight, finish: str) -> None:
        """The one terminal frame."""
        assert not flight.over, "a request ends once"
        flight.over = True
        del self._flights[flight.number]
        held, now = flight.held, self._clock.now
        done = finish == "length" and held is not None
        self.outcomes.append(
            Outcome(
                number=flight.number,
                finish=finish,
                arrived_s=flight.arrived,
                ttft_s=None if flight.first_at is None else flight.first_at - flight.arrived,
                jct_s=now - flight.arrived,
                prompt_tokens=flight.call.input_length,
                cached_tokens=flight.num_cached or 0,
                output_tokens=held.num_delivered if done and held is not None else flight.num_had,
                wanted_tokens=flight.call.output_length,
                num_attempts=flight.attempt + 1,
                prefill_te=flight.prefill_te,
                te=held.te.name if held is not None else "",
                tenant=flight.call.tenant,
                band=int(flight.call.band),
            )
        )
