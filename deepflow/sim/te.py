"""A TE in virtual time: admission, beats, news of pages, hand-overs, around an `Engine`.

This module must not know how a TE is chosen, nor what a client makes of what it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol

from deepflow.sim.clock import Clock, Process
from deepflow.sim.engine import Engine
from deepflow.sim.load import measure
from deepflow.sim.scenario import TeSpec
from deepflow.sim.sequence import Sequence, Status
from services.worker.flowserve.rtc.promise import State, Ticket
from shared.errors import InvalidRequest, Overloaded, Unavailable
from shared.messages import Band, TaskEnded, TaskKind, TeBeat
from shared.rtc_messages import BlockEvents, BlocksDump

if TYPE_CHECKING:
    from deepflow.sim.flight import Flight

BATCH_SHARE: Final = 4  # of those that may wait here, band BATCH may be one in so many
_LEASE_S: Final = 10.0
_AGAIN_S: Final = 0.02  # between two looks for room for what is handed over
_RETRY_S: Final = (1.0, 30.0)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Handover:
    """Who has the pages of a prompt, under which lease ("": none)."""

    te: Te
    lease: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """JE -> TE: run this. `num_had`: tokens of output that came before, and count as prompt here."""

    id: str
    je: str
    kind: TaskKind
    flight: Flight
    attempt: int
    num_had: int
    band: Band
    expected: int
    handover: Handover | None = None

    @property
    def num_prompt(self) -> int:
        return self.flight.call.input_length + self.num_had

    @property
    def num_output(self) -> int:
        return self.flight.call.output_length - self.num_had


@dataclass(slots=True, eq=False, kw_only=True)
class Held:
    """A task that a TE has taken. `frozen`: the tokens that got out before the TE died or was cut off."""

    te: Te
    task: Task
    sequence: Sequence
    since: float
    first_at: float | None = None
    cancelled: bool = False
    frozen: int | None = None

    @property
    def num_delivered(self) -> int:
        """Tokens of output that its client has by now, those from before included."""
        more = self.te.engine.num_generated(self.sequence) if self.frozen is None else self.frozen
        return self.task.num_had + more


class Listener(Protocol):
    """Whom a TE tells what. Calls take as long as a message takes."""

    def on_token(self, held: Held) -> None:
        """The first token of a task that goes on, here or elsewhere."""

    def on_ended(self, held: Held, ended: TaskEnded) -> None:
        """The last one."""

    def on_prefilled(self, held: Held, ended: TaskEnded, handover: Handover) -> None:
        """A prefill task is done, and another TE may go on."""


class Te:
    """One instance. It may be ready, loading, draining or dead; and cut off, while nothing gets in or out."""

    def __init__(
        self,
        name: str,
        number: int,
        spec: TeSpec,
        clock: Clock,
        listener: Listener,
        announce: Callable[[Te, BlockEvents], None],
        *,
        model: str,
        page: int,
        hop_s: float,
    ) -> None:
        self.name = name
        self.number = number
        self.spec = spec
        self.state = "loading"
        self.is_cut = False
        profile = spec.profile
        num_blocks = spec.num_blocks or max(1, profile.kv_tokens // page)
        self.engine = Engine(clock, profile, self, num_blocks=num_blocks, page=page)
        self.held: dict[tuple[int, int], Held] = {}
        self.num_taken = 0
        self._by_order: dict[int, Held] = {}
        self._num_held = [0 for _ in Band]
        self._orders = count()
        self._clock = clock
        self._listener = listener
        self._announce = announce
        self._model = model
        self._page = page
        self._hop_s = hop_s
        self._seq = 0
        self._link_free_at = 0.0
        self._frozen: list[Held] = []
        # What could not get out, or in, while it was cut off.
        self._outbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    @property
    def is_dead(self) -> bool:
        return self.state == "dead"

    # ----------------------------------------------------------------------------------------------------- admission

    def take(self, task: Task) -> Held:
        """The answer to a task. Raises InvalidRequest, Overloaded, Unavailable."""
        if self.state != "ready":
            raise Unavailable(f"the TE is {self.state}")
        key = (task.flight.number, task.attempt)
        if key in self.held:
            return self.held[key]
        if task.num_prompt + task.num_output > self.engine.pool.num_blocks * self._page:
            raise InvalidRequest("longer than all of this TE's memory")
        # As the worker's admission: what is less urgent gives way, so it does not count.
        num_slots = self.spec.profile.max_num_seqs
        share = BATCH_SHARE if task.band is Band.BATCH else 1
        room = num_slots + self.spec.max_waiting // share
        others = sum(self._num_held[: task.band + 1])
        if others and others >= room:
            low, high = _RETRY_S
            wait_s = min(max(measure(self.engine).outstanding_s / 2, low), high)
            raise Overloaded("the TE is full", retry_after_s=wait_s)
        sequence = Sequence(
            order=next(self._orders),
            band=task.band,
            tenant=task.flight.call.tenant,
            hashes=task.flight.hashes,
            num_prompt=task.num_prompt,
            num_output=task.num_output,
            expected=task.expected,
            keeps=task.kind is TaskKind.PREFILL,
        )
        held = Held(te=self, task=task, sequence=sequence, since=self._clock.now)
        self.held[key] = held
        self._num_held[task.band] += 1
        self.num_taken += 1
        self._by_order[sequence.order] = held
        if task.handover is None:
            self.engine.add(sequence)
        else:
            self._clock.spawn(self._fetch(held, task.handover))
        return held

    def cancel(self, flight: int, attempt: int) -> None:
        """Drop a request, whatever its attempt up to this one."""
        for key, held in list(self.held.items()):
            if key[0] == flight and key[1] <= attempt and not self.is_dead:
                held.cancelled = True
                held.frozen = self.engine.num_generated(held.sequence)
                self.engine.cancel(held.sequence)
                self._forget(held)

    def _forget(self, held: Held) -> None:
        del self.held[(held.task.flight.number, held.task.attempt)]
        self._num_held[held.task.band] -= 1
        del self._by_order[held.sequence.order]

    # ---------------------------------------------------------------------------------------------------- hand-overs

    def _fetch(self, held: Held, handover: Handover) -> Process:
        """Bring the pages here once there is room; what does not come is computed."""
        source, sequence, pool = handover.te, held.sequence, self.engine.pool
        num_pages = (sequence.num_prompt - 1) // self._page
        hashes = held.task.flight.hashes[:num_pages]
        ticket: Ticket | None = None
        give_up = self._clock.now + _LEASE_S
        if source is self:
            sequence.carried = sequence.num_prompt - 1
        else:
            while source.has(hashes) and self._clock.now < give_up and not self._is_over(held):
                ticket = pool.populate(hashes, None, spare=len(self.engine.decoding) + 1)
                if ticket is not None:
                    break
                yield _AGAIN_S
        if ticket is not None:
            num_tail = sequence.num_prompt - 1 - len(hashes) * self._page
            yield source.send_s(len(ticket.own) * self._page + num_tail)
            is_there = source.has(hashes)
            if not ticket.is_landed:
                pool.landed(ticket, len(ticket.own) if is_there else 0)
            while pool.query_populate(ticket) is State.PENDING:  # others bring some of them
                yield _AGAIN_S
            sequence.carried = sequence.num_prompt - 1 if is_there else 0
        if not self._is_over(held):
            self.engine.add(sequence)
        if ticket is not None:
            pool.close(ticket)
            self.engine.wake()
        yield self._hop_s
        source.release(handover.lease)

    def _is_over(self, held: Held) -> bool:
        return held.cancelled or self.is_dead

    def has(self, hashes: SequenceOf[bytes]) -> bool:
        """Whether these pages can be had from here."""
        reachable = not self.is_dead and not self.is_cut
        return reachable and self.engine.pool.num_present(hashes) == len(hashes)

    def send_s(self, num_tokens: int) -> float:
        """Seconds until the KV of so many tokens is elsewhere: one transfer after another."""
        now = self._clock.now
        transfer_s = self.spec.profile.transfer_s * num_tokens
        start = max(now, self._link_free_at)
        self._link_free_at = start + transfer_s
        return start - now + self.spec.profile.handover_time_s(num_tokens)

    def release(self, lease: str) -> None:
        """The pages are not needed any more."""
        if lease and not self.is_dead:
            self.engine.pool.release(lease)
            self.engine.wake()

    # ------------------------------------------------------------------------------------------------- the engine's

    def first_token(self, sequence: Sequence) -> None:
        """See `Sink`."""
        held = self._by_order[sequence.order]
        held.first_at = self._clock.now
        self._send(self._listener.on_token, held)

    def ended(self, sequence: Sequence) -> None:
        """See `Sink`."""
        held = self._by_order[sequence.order]
        if held.first_at is None:
            held.first_at = self._clock.now
        self._forget(held)
        if sequence.keeps and sequence.num_output > 1:
            num_pages = (sequence.num_prompt) // self._page
            hashes = held.task.flight.hashes[:num_pages]
            until = self._clock.now + _LEASE_S
            lease = self.engine.pool.lease(hashes, held.task.id, until)
            handover = Handover(te=self, lease=lease.id if lease else "")
            self._send(self._listener.on_prefilled, held, self._told(held, "handed"), handover)
        else:
            self._send(self._listener.on_ended, held, self._told(held, "length"))

    def indexed(self, stored: list[bytes], removed: list[bytes]) -> None:
        """See `Sink`."""
        self._seq += 1
        events = BlockEvents(
            te=self.name, model=self._model, seq=self._seq, stored=stored, removed=removed
        )
        self._announce(self, events)

    def _told(self, held: Held, finish: str) -> TaskEnded:
        assert held.first_at is not None
        task, sequence = held.task, held.sequence
        return TaskEnded(
            task=task.id,
            request=task.flight.id,
            attempt=task.attempt,
            te=self.name,
            finish=finish,
            prompt_tokens=task.num_prompt,
            cached_tokens=sequence.num_cached or 0,
            output_tokens=sequence.num_done,
            first_token_ms=round((held.first_at - held.since) * 1000),
            total_ms=round((self._clock.now - held.since) * 1000),
        )

    # --------------------------------------------------------------------------------------------------- life and load

    def beat(self) -> TeBeat:
        """Its load and pulse."""
        engine = self.engine
        engine.pool.expire(self._clock.now)
        load, blocks = measure(engine), engine.pool.ledger()
        return TeBeat(
            id=self.name,
            model=self._model,
            pod=f"pod-of-{self.name}",
            state=self.state,
            step=engine.num_steps_now,
            step_ms=load.step_ms,
            running=load.running,
            waiting=load.waiting,
            free_slots=load.free_slots,
            outstanding_s=load.outstanding_s,
            outstanding_batch_s=load.outstanding_batch_s,
            waiting_tokens=load.waiting_tokens,
            prefill_us=load.prefill_us,
            decode_us=load.decode_us,
            decode_row_us=load.decode_row_us,
            blocks_total=blocks["total"],
            blocks_used=blocks["live"] + blocks["moving"],
            blocks_cached=blocks["cached"],
            blocks_leased=blocks["leased"],
            blocks_reserved=load.blocks_reserved,
            role=self.spec.role,
        )

    def dump(self) -> BlocksDump:
        """Its whole index."""
        return BlocksDump(
            te=self.name,
            model=self._model,
            seq=self._seq,
            hashes=self.engine.pool.index_snapshot(),
        )

    def die(self) -> None:
        """The process is gone, and with it all it held. What its clients have got stands."""
        self._freeze()
        self.state = "dead"
        self.engine.stop()
        self._outbox.clear()
        self._inbox.clear()

    def cut(self) -> None:
        """From now on nothing gets in or out."""
        self._freeze()
        self.is_cut = True

    def heal(self) -> None:
        """Everybody can be reached again: what is owed goes out, late."""
        self.is_cut = False
        for held in self._frozen:
            held.frozen = None
        self._frozen.clear()
        outbox, self._outbox = self._outbox, []
        for event, args in outbox:
            self._send(event, *args)
        inbox, self._inbox = self._inbox, []
        for event, args in inbox:
            self._clock.after(self._hop_s, event, *args)

    def tell(self, event: Callable[..., None], *args: Any) -> None:
        """Have it told something, as long as a message takes; not before it can be reached."""
        if self.is_cut:
            self._inbox.append((event, args))
        else:
            self._clock.after(self._hop_s, event, *args)

    def _freeze(self) -> None:
        for held in self.held.values():
            if held.frozen is None:
                held.frozen = self.engine.num_generated(held.sequence)
                self._frozen.append(held)

    def _send(self, event: Callable[..., None], *args: Any) -> None:
        if self.is_cut:
            self._outbox.append((event, args))
        else:
            self._clock.after(self._hop_s, event, *args)

    def check(self) -> None:
        """Prove that what it holds is what its engine has. Raises AssertionError otherwise."""
        self.engine.check()
        live = {one.order for one in [*self.engine.waiting, *self.engine.prefilling]}
        live |= self.engine.decoding.keys()
        assert live <= self._by_order.keys(), "the engine has work that nobody is owed"
        assert all(held.sequence.status is not Status.ENDED for held in self.held.values())
