"""One request on its way to exactly one end per choice, whatever gets lost: a pure state machine.

Events go in as method calls with the time, actions come out as values; `streams.py` carries them out. The law: the
tokens emitted for a choice are the true sequence, each once and in order, then one terminal `Emit`, unless the client
left. It holds because every delta names (attempt, choice, index): an older attempt is dropped, an overlap is trimmed,
a gap is asked for again, and after a loss the next attempt carries what the client already has. Noise is a function
of (seed, choice, position), so a new attempt continues the same text.

One attempt may be worked on by two TEs, one after the other: the first says with its last delta that it *moves*, and
from then on whoever the JE names, or whoever speaks, is its TE. Frames of both may come in any order and get lost: each
answers for what it made, and the second for the first one's tokens too. Between the two nobody can be asked, so silence
there is short: `HANDOVER_S` after the first one's word, or with the death of the JE, the attempt counts as lost.

This module must not know text, HTTP, or the bus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.gateway.actions import Action, Ask, Drop, Emit, Submit
from shared.errors import (
    DeadlineExceeded,
    DeepFlowError,
    Internal,
    NotFound,
    NotReady,
    Overloaded,
    Unavailable,
    from_code,
)
from shared.messages import Delta

MAX_LOSSES: Final = 8  # in a row without a new token: the request itself may be what kills TEs
MAX_AHEAD: Final = 256  # deltas kept beyond a gap while the missing ones are asked for
MAX_AVOID: Final = 8
PROBE_S: Final = (
    1.0,
    8.0,
)  # first and longest silence before the TE is asked; doubles while nothing is new
PARKED_SILENCE_S: Final = 3.0  # a JE tells about what it parks more often than this
HANDOVER_S: Final = 2.0  # from the first TE's last delta to any sign of the second
SUBMIT_TIMEOUT_S: Final = (2.0, 10.0)
BACKOFF_S: Final = (0.05, 2.0)


RETRIED: Final = (
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Internal,
)  # another attempt may do better


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Time budgets of one request in seconds: in all, and without any TE."""

    deadline_s: float
    park_s: float


class Delivery:
    """The state of one request; see the module's text. `jitter` gives numbers in [0, 1)."""

    def __init__(
        self, num_choices: int, limits: Limits, now: float, jitter: Callable[[], float]
    ) -> None:
        self.attempt = 0
        self.te: str | None = None
        self.je: str | None = None  # holds the request while no TE does
        self.started = False  # a TE took it once: from then on it may use the whole deadline
        self.parked = False
        self.output: list[list[int]] = [[] for _ in range(num_choices)]
        self.ended = [False] * num_choices
        self.avoid: list[str] = []
        self.num_resubmissions = 0
        self.num_asked = 0
        self.cached: int | None = None  # prompt tokens found in the cache by the first attempt
        self._live = num_choices
        self._deadline = now + limits.deadline_s
        self._park_until = min(self._deadline, now + limits.park_s)
        self._jitter = jitter
        self._submitting = False
        self._heard = now
        self._probe_s = PROBE_S[0]
        self._asking = False
        self._ahead: list[Delta] = []
        self._losses = 0
        self._refusals = 0
        # Of an attempt that moves. `te` is the first TE, while it prefills; then nobody (`_moving`), though `te` still
        # names the first; then (`_moved`) the second, which may be the same.
        self._by: str | None = None  # the JE that took the attempt, and names the second TE
        self._moving: float | None = None  # since when
        self._moved = False
        self._before: str | None = None  # the first TE, once another is the second
        self._stranger: str | None = None  # not `te`, but speaks before that is done: the second?

    @property
    def over(self) -> bool:
        """Whether every choice has ended, or the client left."""
        return self._live == 0

    @property
    def have(self) -> list[int]:
        """How many tokens of each choice the client has."""
        return [len(ids) for ids in self.output]

    def awaits(self, attempt: int) -> bool:
        """Whether news of this attempt still matters."""
        return not self.over and attempt == self.attempt

    def remaining_s(self, now: float) -> float:
        """What is left of the deadline."""
        return max(0.0, self._deadline - now)

    def park_s(self, now: float) -> float:
        """How long the request may still wait without a TE."""
        return self.remaining_s(now) if self.started else max(0.0, self._park_until - now)

    # ------------------------------------------------------------------------------------------- submission's answers

    def start(self, now: float) -> list[Action]:
        """The first submission."""
        return [self._submit(now, 0.0)]

    def accepted(self, attempt: int, by: str, te: str | None, now: float) -> list[Action]:
        """A JE took this attempt: a TE has it, or (`te` None) the JE parks it."""
        if not self.awaits(attempt):
            if te is not None and te == self.te:  # its frames were faster than this answer
                return []
            return [Drop(te or by, attempt)]
        self._submitting = False
        self._refusals = 0
        self._heard = now
        self._by = by
        if te is None:
            self.je, self.parked = by, self.te is None
            return []
        self._at(te, now)
        return []

    def refused(self, attempt: int, error: DeepFlowError, now: float) -> list[Action]:
        """No JE took this attempt: it said no, nobody was there, or it stayed silent."""
        if not self.awaits(attempt):
            return []
        self._submitting = False
        if self.te is not None:  # its answer was lost, yet its TE speaks
            return []
        return self._lost(error, now)

    def progress(
        self, source: str, attempt: int, state: str, te: str | None, now: float
    ) -> list[Action]:
        """A JE tells what happens to a request that it parked, or that moves."""
        if not self.awaits(attempt):
            return [Drop(te or source, attempt)] if attempt <= self.attempt else []
        self._heard = now
        if te is not None:
            if state == "moved":
                return self._move(te, now)
            self._at(te, now)
        elif self.te is None:
            self.je, self.parked = source, state == "parked"
        return []

    def _at(self, te: str, now: float) -> None:
        """Now it is known where the attempt runs, or where it ran before it moved."""
        if self._moving is not None or self._moved:
            return
        if self.te not in (None, te):  # who speaks already is the second TE
            self._before, self._moved = te, True
            return
        self.te = te
        self.started, self.parked, self.je = True, False, None
        self._heard = now
        self._probe_s = PROBE_S[0]

    def _move(self, te: str, now: float) -> list[Action]:
        """Another TE, or the same one on another task, goes on with the attempt."""
        if self._moved and te == self.te:
            return []
        if te != self.te:
            self._before, self.te = self.te, te
            self._asking = False
        missed = self._stranger == te or bool(self._ahead)
        self._moving, self._moved, self._stranger = None, True, None
        self.started, self.parked, self.je = True, False, None
        self._heard = now
        self._probe_s = PROBE_S[0]
        return self._ask() if missed else []

    # ---------------------------------------------------------------------------------------------------- tokens

    def tokens(self, source: str, delta: Delta, now: float) -> list[Action]:
        """A delta from the bus: in order, repeated, out of date, or after a gap."""
        if not self.awaits(delta.attempt):
            if delta.finish is None and delta.attempt <= self.attempt:
                return [Drop(source, delta.attempt)]
            return []
        if delta.finish in ("failed", "cancelled"):
            return self._ended_badly(source, delta, now)
        actions: list[Action] = []
        if self.te is None:  # the frames were faster than the JE's answer
            self._at(source, now)
        elif source == self._before:
            return self._take(delta)  # late, but true
        elif source != self.te:
            if self._moved:
                return [Drop(source, self.attempt)]  # one attempt, three TEs: one is too many
            if (
                self._moving is None
            ):  # the one it moved to, unless its own TE goes on as well: ask that
                self._stranger = source
                return self._ask()
            actions = self._move(source, now)
        self._heard = now
        return [*actions, *self._note(delta, now), *self._take(delta)]

    def _note(self, delta: Delta, now: float) -> list[Action]:
        """What a delta of the attempt's TE says about who goes on."""
        if self._moved:
            return []
        if not delta.moves:
            self._moved = self._moving is not None  # the first TE takes the second task, too
            self._moving = None
            stranger, self._stranger = self._stranger, None
            return [Drop(stranger, self.attempt)] if stranger is not None else []
        if self._stranger is not None:
            return self._move(self._stranger, now)
        if self._moving is None:
            self._moving = now
        return []

    def _take(self, delta: Delta) -> list[Action]:
        choice = delta.choice
        if not 0 <= choice < len(self.ended) or self.ended[choice]:
            return []
        have = len(self.output[choice])
        if delta.index > have:
            if len(self._ahead) < MAX_AHEAD:
                self._ahead.append(delta)
            return self._ask()
        emitted = self._apply(delta, have)
        if self._ahead and emitted:
            emitted += self._catch_up()
        return emitted

    def _apply(self, delta: Delta, have: int) -> list[Action]:
        """A delta without a gap: what is new of it goes out."""
        ids, logprobs = delta.ids, delta.logprobs
        if delta.index < have:
            ids = ids[have - delta.index :]
            logprobs = None if logprobs is None else logprobs[have - delta.index :]
        if self.cached is None:
            self.cached = delta.cached
        if not ids and delta.finish is None:
            return []
        self.output[delta.choice].extend(ids)
        self._probe_s = PROBE_S[0]
        if ids:
            self._losses = 0
        if delta.finish is not None:
            self.ended[delta.choice] = True
            self._live -= 1
        return [Emit(delta.choice, ids, logprobs, delta.finish, delta.stop_id)]

    def _catch_up(self) -> list[Action]:
        """Deltas that waited beyond a gap, as far as they fit now."""
        waiting = sorted(self._ahead, key=lambda delta: delta.index)
        self._ahead = []
        actions: list[Action] = []
        for delta in waiting:
            if self.ended[delta.choice]:
                continue
            have = len(self.output[delta.choice])
            if delta.index > have:
                self._ahead.append(delta)
            else:
                actions += self._apply(delta, have)
        return actions

    def _ended_badly(self, source: str, delta: Delta, now: float) -> list[Action]:
        """A TE, or the JE that parked it, gave the attempt up. Nobody asked it to, so it is a loss."""
        if self.te is not None and source != self.te and self._moving is None:
            return []
        if 0 <= delta.choice < len(self.ended) and self.ended[delta.choice]:
            return []  # the answer to our own cancel after a stop string
        failure = delta.failure
        if failure is None:
            return self._lost(Internal(f"the replica {delta.finish} the request"), now)
        error = from_code(
            failure.code,
            failure.message,
            param=failure.param,
            retry_after_s=failure.retry_after_s,
        )
        if not isinstance(error, RETRIED) or isinstance(error, DeadlineExceeded):
            return self.fail(error)  # what cannot be answered in time there cannot elsewhere
        return self._lost(error, now)

    # --------------------------------------------------------------------------------------- gaps, silence, replays

    def gap(self, source: str) -> list[Action]:
        """A frame of this TE went missing: it may have held anything, even the end."""
        return self._ask() if source == self.te and not self.over else []

    def replayed(self, te: str, attempt: int, deltas: list[Delta], now: float) -> list[Action]:
        """The TE's answer to `Ask`."""
        if not self.awaits(attempt) or te not in (self.te, self._before):
            return []
        if te == self.te:
            self._asking = False
            self._heard = now
        actions: list[Action] = []
        for delta in deltas:
            if not self.awaits(attempt):
                break
            if delta.attempt != attempt or not 0 <= delta.choice < len(self.ended):
                continue
            if delta.finish in ("failed", "cancelled"):
                actions += self._ended_badly(te, delta, now)
                continue
            if te == self.te:
                actions += self._note(delta, now)
            if not self.ended[delta.choice] and delta.index <= len(self.output[delta.choice]):
                actions += self._apply(delta, len(self.output[delta.choice]))
        if not any(isinstance(action, Emit) for action in actions):
            self._probe_s = min(self._probe_s * 2, PROBE_S[1])
        return actions + self._catch_up()

    def replay_failed(
        self, te: str, attempt: int, error: DeepFlowError, now: float
    ) -> list[Action]:
        """The TE could not answer `Ask`: it forgot the request, it is gone, or it stayed silent."""
        if not self.awaits(attempt) or te != self.te:
            return []
        self._asking = False
        if self._moving is not None:  # it did its part; whether somebody goes on shows soon
            return []
        if isinstance(error, NotFound | Unavailable):
            return self._lost(error, now, blame=self.te if isinstance(error, Unavailable) else None)
        self._heard = now
        self._probe_s = min(self._probe_s * 2, PROBE_S[1])
        return []

    def te_lost(self, te: str, now: float) -> list[Action]:
        """This TE is dead or hangs. If it is done with its part, the other one can do without it."""
        if self.over or te != self.te or self._moving is not None:
            return []
        return self._lost(Unavailable("the replica was lost"), now, blame=te)

    def je_lost(self, je: str, now: float) -> list[Action]:
        """This JE is dead, and with it what it parked, or was about to hand over."""
        parked = je == self.je and self.te is None
        if self.over or not (parked or (je == self._by and self._moving is not None)):
            return []
        return self._lost(Unavailable("the scheduler was lost", retry_after_s=0.0), now)

    def reconnected(self, now: float) -> list[Action]:
        """Our bus connection is back: anything may have been missed."""
        self._restart(now)
        self._asking = False
        return [] if self.over else self._ask()

    def _restart(self, now: float) -> None:
        """What was not heard until now is nobody's fault."""
        self._heard = now
        if self._moving is not None:
            self._moving = now

    def tick(self, now: float, *, connected: bool) -> list[Action]:
        """Time has passed; call it several times a second. Without the bus nobody is judged but the deadline."""
        if self.over:
            return []
        if now >= self._deadline:
            return self.fail(DeadlineExceeded("the request took longer than its deadline"))
        if not connected:
            self._restart(now)
            return []
        if self._moving is not None:
            if now - self._moving <= HANDOVER_S:
                return []
            nobody = Unavailable("nobody went on with the request", retry_after_s=0.0)
            return self._lost(nobody, now)
        if self.te is not None:
            return self._ask() if now - self._heard > self._probe_s else []
        if not self._submitting and now - self._heard > PARKED_SILENCE_S:
            return self._lost(Unavailable("the scheduler fell silent", retry_after_s=0.0), now)
        return []

    def _ask(self) -> list[Action]:
        if self._asking or self.te is None:
            return []
        self._asking = True
        self.num_asked += 1
        return [Ask(self.te, self.attempt, self.have)]

    # ------------------------------------------------------------------------------------------------ ends and losses

    def stop(self, choice: int, keep: int) -> list[Action]:
        """A stop string ended this choice after `keep` tokens. No further Emit for it.

        If the tokens that completed it also ended the choice, its TE only has to forget those past the stop string.
        """
        if not self.ended[choice]:
            self.ended[choice] = True
            self._live -= 1
        elif keep >= len(self.output[choice]):
            return []
        del self.output[choice][keep:]
        if self.te is None:
            return []
        others = self._drop()[1:] if self.over else []
        return [Drop(self.te, self.attempt, choice, keep), *others]

    def cancel(self) -> list[Action]:
        """The client left. Nothing is emitted any more."""
        if self.over:
            return []
        self._live = 0
        return self._drop()

    def _drop(self) -> list[Action]:
        """Whoever may hold something of the attempt is told; its TE first."""
        between = self._by if self._moving is not None else None
        holders = (self.te or self.je, self._before, self._stranger, between)
        return [Drop(to, self.attempt) for to in dict.fromkeys(holders) if to is not None]

    def fail(self, error: DeepFlowError) -> list[Action]:
        """The one terminal Emit of each choice that has none."""
        actions = self._drop()
        for choice, ended in enumerate(self.ended):
            if not ended:
                self.ended[choice] = True
                actions.append(Emit(choice, [], finish="failed", failure=error))
        self._live = 0
        return actions

    def _lost(self, error: DeepFlowError, now: float, blame: str | None = None) -> list[Action]:
        """Nobody works on this attempt: make the next one, or give up with `error`."""
        soon = error.retry_after_s == 0.0 and self._refusals < 2
        if isinstance(error, Overloaded) and not self.started:
            return self.fail(error)  # capacity exists but is taken: the client decides
        if not isinstance(error, RETRIED) and not isinstance(error, NotFound):
            return self.fail(error)
        if isinstance(error, NotFound) and self.te is None:
            return self.fail(error)  # a JE that does not know the model
        if isinstance(error, NotReady) and not self.started:
            return self.fail(error)  # the JE knows how long it would take
        if now >= self._deadline or (not self.started and now >= self._park_until):
            return self.fail(error)
        if self.te is not None or isinstance(error, Internal):
            self._losses += 1
            if self._losses > MAX_LOSSES:
                return self.fail(Internal("the request was lost again and again"))
            soon = soon or self._losses == 1
        else:
            self._refusals += 1
        actions = self._drop()
        if blame is not None and blame not in self.avoid:
            self.avoid = [*self.avoid, blame][-MAX_AVOID:]
        self.te = self.je = self._by = self._before = self._stranger = self._moving = None
        self._asking = self.parked = self._moved = False
        self._ahead.clear()
        self.num_resubmissions += 1
        return [*actions, self._submit(now, 0.0 if soon else self._backoff_s())]

    def _submit(self, now: float, delay_s: float) -> Submit:
        self.attempt += 1
        self._submitting = True
        self._heard = now
        low, high = SUBMIT_TIMEOUT_S
        timeout_s = min(low * 2 ** min(self._refusals, 8), high)
        return Submit(self.attempt, delay_s, timeout_s)

    def _backoff_s(self) -> float:
        low, high = BACKOFF_S
        times = min(self._losses + self._refusals, 16)
        longest: float = min(low * 2.0**times, high)
        return longest * (0.5 + self._jitter() / 2)
