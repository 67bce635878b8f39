"""An engine in virtual time: continuous batching under a token budget, over the real RTC master.

As in the worker's scheduler every sequence has known and computed tokens, a step hands out a budget of rows until the
two meet, and whose turn it is says `FairQueue`. What differs is that no step is looked at that changes nothing:
decoding sequences advance alike, one token a step, so a run of steps without prompts is one event that ends where a
sequence ends or needs a block, or where work comes in. Positions of a sequence are therefore kept relative to the
engine's count of steps. (Those of band BATCH advance alike too; in the worker, only as far as there is room.)

Pages are those of the trace. What a sequence generates is not indexed, since a trace does not say whose prompt goes on
from it; one that was preempted computes it again. This module must not know messages, TEs, or who sends work.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, Protocol

from deepflow.sim.clock import Clock
from deepflow.sim.profile import Profile, pairs
from deepflow.sim.sequence import Sequence, Status, share_of
from services.worker.flowserve.pace import Pace
from services.worker.flowserve.rtc.master import RtcMaster
from shared.fairness import FairQueue, Share
from shared.messages import Band

# Of the rows of a step that others are in, those of band BATCH are so many at the most: one in so many of the budget.
FILLED_SHARE: Final = 8


class Sink(Protocol):
    """Who is told what an engine did. Called at the time it happens."""

    def first_token(self, sequence: Sequence) -> None:
        """It has generated a token here for the first time, and goes on."""

    def ended(self, sequence: Sequence) -> None:
        """It has generated its last token; of a prefill task, its only one."""

    def indexed(self, stored: list[bytes], removed: list[bytes]) -> None:
        """What changed in the index."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Run:
    """Steps on their way: one with chunks of prompts, or several in which only `batch` sequences decode."""

    chunks: list[tuple[Sequence, int]]
    batch: int
    context: int  # positions of those that decode, before the first step
    started: float
    num_steps: int
    until: float


class Engine:
    """One engine; `add` and `cancel` may be called at any time."""

    def __init__(
        self, clock: Clock, profile: Profile, sink: Sink, *, num_blocks: int, page: int
    ) -> None:
        self.pool = RtcMaster(num_blocks)
        self.pace = Pace()
        self.profile = profile
        self.page = page
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_prefilled_tokens = 0
        self.busy_s = 0.0
        self.waiting: FairQueue[Sequence] = FairQueue(lambda one: (one.order,))
        self.prefilling: list[Sequence] = []
        self.decoding: dict[int, Sequence] = {}  # by order
        self._clock = clock
        self._sink = sink
        self._context = 0  # positions of all that decode
        # (count of steps, order, begun, sequence): when each is at its end, and when it needs a block to go on. Those
        # whose sequence does not decode any more, or again, are passed over.
        self._ends: list[tuple[int, int, int, Sequence]] = []
        self._grows: list[tuple[int, int, int, Sequence]] = []
        self._decoders: Counter[Share[Sequence]] = Counter()  # how many of each tenant decode
        self._closed_from = len(Band)  # bands whose sequences have just made room
        self._cancelled: list[Sequence] = []
        self._run: _Run | None = None
        self._is_dead = False

    # ------------------------------------------------------------------------------------------------- what comes in

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence that fits the pool alone."""
        sequence.share = self.waiting.share(sequence.band, sequence.tenant)
        self._wait(sequence)
        self.wake()

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence, with the end of the present step. Nothing more is told of it."""
        if sequence.status in (Status.NEW, Status.WAITING):
            if sequence.status is Status.WAITING:
                self.waiting.remove(share_of(sequence), sequence)
            sequence.status = Status.ENDED
        elif sequence.status is not Status.ENDED:
            self._cancelled.append(sequence)
            self.wake()

    def stop(self) -> None:
        """The process is dead: nothing of what is on its way happens, nor anything else."""
        self._run = None
        self._is_dead = True

    def num_generated(self, sequence: Sequence) -> int:
        """Tokens of it up to now."""
        if sequence.status is not Status.DECODING:
            return sequence.num_done
        # The last one is told by `ended`.
        return min(self.num_steps_now - sequence.begun, sequence.num_output - 1)

    @property
    def num_steps_now(self) -> int:
        """Steps up to now; `num_steps` are those that have been applied."""
        run = self._run
        if run is None or run.chunks:
            return self.num_steps
        elapsed = self._clock.now - run.started
        num_done = self.profile.num_decode_steps(run.batch, run.context, elapsed)
        return self.num_steps + min(num_done, run.num_steps)

    # -------------------------------------------------------------------------------------------------------- steps

    def wake(self) -> None:
        """There is something new: idle engines start, and a run of decodes ends with its present step."""
        run = self._run
        if self._is_dead:
            return
        if run is None:
            self._start()
        elif not run.chunks and run.num_steps > 1:
            elapsed = self._clock.now - run.started
            num_steps = self.profile.num_decode_steps(run.batch, run.context, elapsed) + 1
            if num_steps < run.num_steps:
                self._set(run, num_steps)

    def _set(self, run: _Run, num_steps: int) -> None:
        run.num_steps = num_steps
        run.until = run.started + self.profile.decode_s(run.batch, run.context, num_steps)
        self._clock.at(run.until, self._finish, run)

    def _start(self) -> None:
        """Plan the next step, or run of steps."""
        self._drop_cancelled()
        chunks = self._plan()
        batch = len(self.decoding)
        if not chunks and not batch:
            self._run = None
        else:
            now = self._clock.now
            run = _Run(
                chunks=chunks, batch=batch, context=self._context, started=now, num_steps=1, until=now
            )  # fmt: skip
            self._run = run
            if chunks:
                run.until += self.profile.step_s(
                    num_decodes=batch,
                    decode_context=self._context,
                    num_prefill=sum(length for _, length in chunks),
                    prefill_pairs=sum(pairs(one.num_computed, length) for one, length in chunks),
                    num_first=sum(one.num_computed + n == one.num_known for one, n in chunks),
                )
                self._clock.at(run.until, self._finish, run)
            else:
                self._set(run, self._num_quiet_steps())
        stored, removed = self.pool.drain_events()
        if stored or removed:
            self._sink.indexed(stored, removed)

    def _num_quiet_steps(self) -> int:
        """Steps until a sequence ends or needs a block."""
        next_end, next_growth = self._next(self._ends), self._next(self._grows)
        return max(1, min(next_end, next_growth) - self.num_steps)

    def _next(self, heap: list[tuple[int, int, int, Sequence]]) -> int:
        """When the first of a heap is due that still counts."""
        while heap:
            due, _, begun, sequence = heap[0]
            if sequence.status is Status.DECODING and sequence.begun == begun:
                return due
            heappop(heap)
        return 1 << 62

    def _finish(self, run: _Run) -> None:
        """The run is over: apply it, and start the next one."""
        if run is not self._run:  # it was cut short, or the engine is dead
            return
        duration = run.until - run.started
        self.busy_s += duration
        num_prefill = sum(length for _, length in run.chunks)
        self.pace.observe(
            duration / run.num_steps, num_decodes=run.batch, num_prefill_tokens=num_prefill
        )
        self.num_prefilled_tokens += num_prefill
        self.num_steps += run.num_steps
        self._context += run.batch * run.num_steps
        self._charge(run.num_steps - 1)
        self._drop_cancelled()
        while self._next(self._ends) <= self.num_steps:
            sequence = heappop(self._ends)[3]
            self._leave(sequence)
            self._end(sequence)
        for sequence, length in run.chunks:
            if sequence.status is Status.PREFILLING:
                self._computed(sequence, length)
        self._start()

    def _computed(self, sequence: Sequence, length: int) -> None:
        sequence.num_computed += length
        self._index(sequence)
        if sequence.num_computed < sequence.num_known:
            return
        sequence.num_done += 1
        is_first = sequence.num_done == 1
        self.prefilling.remove(sequence)
        if sequence.num_done >= sequence.num_output or sequence.keeps:
            self._end(sequence)
            return
        sequence.status = Status.DECODING
        sequence.begun = self.num_steps - sequence.num_done
        self.decoding[sequence.order] = sequence
        self._decoders[share_of(sequence)] += 1
        self._context += sequence.num_known
        due = sequence.begun + sequence.num_output
        heappush(self._ends, (due, sequence.order, sequence.begun, sequence))
        self._watch_growth(sequence)
        if is_first:
            self._sink.first_token(sequence)

    def _watch_growth(self, sequence: Sequence) -> None:
        room = len(sequence.table) * self.page - sequence.num_prompt  # tokens generated that fit
        due = sequence.begun + room + 1
        heappush(self._grows, (due, sequence.order, sequence.begun, sequence))

    def _index(self, sequence: Sequence) -> None:
        hashes, store = sequence.hashes, self.pool.store
        num_pages = min(sequence.num_computed // self.page, len(hashes))
        for page in range(sequence.num_indexed, num_pages):
            store(sequence.table[page], hashes[page], hashes[page - 1] if page else None)
        sequence.num_indexed = max(sequence.num_indexed, num_pages)

    # --------------------------------------------------------------------------------------------------- leaving

    def _leave(self, sequence: Sequence) -> None:
        """Out of the batch, with what it has generated."""
        sequence.num_done = min(self.num_steps - sequence.begun, sequence.num_output)
        del self.decoding[sequence.order]
        share = share_of(sequence)
        self._decoders[share] -= 1
        if not self._decoders[share]:
            del self._decoders[share]
        self._context -= sequence.num_prompt + self.num_steps - sequence.begun

    def _end(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.status = Status.ENDED
        if not sequence.keeps:
            self.pace.observe_output(sequence.num_done)
        self._sink.ended(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.free(sequence.table)
        sequence.table = []
        sequence.num_indexed = 0

    def _drop_cancelled(self) -> None:
        for sequence in self._cancelled:
            if sequence.status is Status.DECODING:
                self._leave(sequence)
            elif sequence.status is Status.PREFILLING:
                self.prefilling.remove(sequence)
            elif sequence.status is Status.WAITING:
                self.waiting.remove(share_of(sequence), sequence)
            else:
                continue
            self._give_back(sequence)
            sequence.status = Status.ENDED
        self._cancelled.clear()

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting; what is found again of its prompt is not computed again."""
        if sequence.status is Status.DECODING:
            self._leave(sequence)
        else:
            self.prefilling.remove(sequence)
        self._give_back(sequence)
        sequence.num_paid, sequence.num_computed = sequence.num_computed, 0
        sequence.carried = 0
        self._wait(sequence)
        self._closed_from = min(self._closed_from, sequence.band)
        self.num_preemptions += 1

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.add(share_of(sequence), sequence)

    # ---------------------------------------------------------------------------------------------------- planning

    def _plan(self) -> list[tuple[Sequence, int]]:
        """The chunks of the next step, beside all that decode: whoever's turn it is, and then those of band BATCH."""
        self._closed_from = len(Band)
        self._reserve()
        self._charge(1)
        chunks: list[tuple[Sequence, int]] = []
        if not self.prefilling and not self.waiting:
            return chunks
        most = self.profile.max_batched_tokens
        num_fillers = sum(num for share, num in self._decoders.items() if share.band == Band.BATCH)
        budget = most - len(self.decoding) + num_fillers
        left = self._fill(chunks, budget, is_batch=False)
        is_shared = left < most
        room = min(left, -(-most // FILLED_SHARE)) if is_shared else left
        self._fill(chunks, room - num_fillers, is_batch=True)
        return [chunk for chunk in chunks if chunk[0].status is Status.PREFILLING]

    def _fill(self, chunks: list[tuple[Sequence, int]], budget: int, *, is_batch: bool) -> int:
        """Plan rows of prompts, of band BATCH or of those above it; what is left of the budget."""
        turn = self._turn
        under_way = []
        for one in self.prefilling:
            if (one.band is Band.BATCH) != is_batch:
                continue
            if budget > 0 and one.num_computed + 1 == one.num_known:  # a row like one that decodes
                budget = self._extend(chunks, one, budget)
            else:
                under_way.append(one)
        is_open = True
        while budget > 0:
            sequence = min(under_way, key=turn, default=None)
            first = self._newcomer(is_batch) if is_open else None
            if first is not None and (sequence is None or turn(first) < turn(sequence)):
                is_open = self._admit(first)
                budget = self._extend(chunks, first, budget) if is_open else budget
            elif sequence is None:
                break
            else:
                under_way.remove(sequence)
                if sequence.status is Status.PREFILLING:  # else it has just made room
                    budget = self._extend(chunks, sequence, budget)
        return budget

    def _turn(self, sequence: Sequence) -> tuple[int, int, tuple[int, ...]]:
        return self.waiting.turn(share_of(sequence), sequence)

    def _newcomer(self, is_batch: bool) -> Sequence | None:
        """Who is next of those that wait, if it is of band BATCH or not, as asked, and may come in now."""
        first = self.waiting.first()
        if first is None or (first.band is Band.BATCH) != is_batch:
            return None
        return first if first.band < self._closed_from else None

    def _extend(self, chunks: list[tuple[Sequence, int]], sequence: Sequence, budget: int) -> int:
        length = min(budget, sequence.num_known - sequence.num_computed)
        if length > 0:
            chunks.append((sequence, length))
            samples = sequence.num_computed + length == sequence.num_known
            share_of(sequence).served += length + samples
        return budget - max(length, 0)

    def _charge(self, num_steps: int) -> None:
        """Whoever decodes pays for its tokens."""
        for share, num in self._decoders.items():
            share.served += 2 * num * num_steps

    def _reserve(self) -> None:
        """A block for each that needs one to decode on; the last in order gives way where there is none."""
        while self._next(self._grows) <= self.num_steps:
            sequence = heappop(self._grows)[3]
            while sequence.status is Status.DECODING:
                if self.pool.append_block(sequence.table, firm=True):
                    self._watch_growth(sequence)
                    break
                self._preempt(self._last())

    def _last(self) -> Sequence:
        """Who gives way first."""
        return max([*self.prefilling, *self.decoding.values()], key=lambda one: one.rank)

    def _admit(self, sequence: Sequence) -> bool:
        """Find its prefix in the index and take blocks for the rest; sequences of band BATCH make room for others."""
        while not self._fits(sequence):
            if sequence.band is Band.BATCH or not (self.prefilling or self.decoding):
                return False
            last = self._last()
            if last.band is not Band.BATCH:
                return False
            self._preempt(last)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        num_running = len(self.prefilling) + len(self.decoding)
        if num_running >= self.profile.max_num_seqs:
            return False
        num_known = sequence.num_known
        # The last token must be computed.
        num_pages = min((num_known - 1) // self.page, len(sequence.hashes))
        matched = self.pool.match_by_prefix_token(sequence.hashes[:num_pages])
        rest = self.pool.alloc_blocks(
            -(-num_known // self.page) - len(matched), firm=not num_running
        )
        if rest is None:
            self.pool.free(matched)
            return False
        self.waiting.remove(share_of(sequence), sequence)
        self.prefilling.append(sequence)
        sequence.status = Status.PREFILLING
        sequence.table = matched + rest
        sequence.num_indexed = len(matched)
        sequence.num_computed = len(matched) * self.page
        if sequence.carried and len(matched) == num_pages:
            sequence.num_computed = max(min(sequence.carried, num_known - 1), sequence.num_computed)
        # What a preemption cost is not its tenant's.
        share_of(sequence).served -= max(sequence.num_paid - sequence.num_computed, 0)
        sequence.num_paid = 0
        self.num_queried_tokens += num_known
        self.num_hit_tokens += sequence.num_computed
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    # ------------------------------------------------------------------------------------------------- introspection

    @property
    def step_s(self) -> float:
        """Seconds of the present step; 0 without one."""
        run = self._run
        return (run.until - run.started) / run.num_steps if run is not None else 0.0

    def check(self) -> None:
        """Prove that the books balance. Raises AssertionError otherwise."""
        running = [*self.prefilling, *self.decoding.values()]
        self.pool.check(sequence.table for sequence in running)
        context = sum(one.num_prompt + self.num_steps - one.begun for one in self.decoding.values())
        assert context == self._context, "the positions of all that decode are miscounted"
