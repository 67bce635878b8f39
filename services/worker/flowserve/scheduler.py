"""Which tokens to compute next: continuous batching under a token budget.

There is no prefill phase and no decode phase. Every sequence has known and computed tokens, and a step hands out a
budget of rows until the two meet; chunked prefill, prefix hits, preemption and resubmission are all the same case,
"known but not computed" (the idea of vLLM's second scheduler). `schedule` decides and returns a value, `update` applies
what the device made of it. This module must not know the device, the bus or the clock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from services.worker.flowserve.blocks import BlockPool
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from shared.messages import Failure

by_age = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence in one step: `length` tokens from position `start`.

    `samples`: the chunk reaches the last known token, so its last row gives the next one.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    chunks: list[Chunk]

    @property
    def num_decodes(self) -> int:
        return sum(chunk.length == 1 for chunk in self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks if chunk.length > 1)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order `update` wants them."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """First come, first served over one `BlockPool`.

    Why nothing deadlocks or starves. A sequence is admitted only with blocks for all its known tokens, so only decoding
    can run out of blocks; then the youngest running sequence gives up its own and waits to be recomputed. Nobody is
    submitted who would not fit the pool alone, so the oldest running sequence always gets its block. Whoever waits is
    admitted strictly by age, so nothing overtakes a long prompt for ever. Requires max_batched_tokens >= max_num_seqs:
    every decoding sequence moves on in every step, and a prefill among them gets at least one row.
    """

    def __init__(
        self, pool: BlockPool, *, page: int, max_num_seqs: int, max_batched_tokens: int
    ) -> None:
        if not 0 < max_num_seqs <= max_batched_tokens:
            raise ValueError("needs 0 < max_num_seqs <= max_batched_tokens")
        self.pool = pool
        self.page = page
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.running: list[Sequence] = []  # oldest first
        self.waiting: list[Sequence] = []  # oldest first
        self.held: dict[SequenceGroup, list[Sequence]] = {}
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # known tokens at admission
        self.num_hit_tokens = 0  # those of them found in the index

    def add(self, group: SequenceGroup) -> None:
        """Take in a group. Its first choice goes ahead; the others are held until the prompt is computed, then find
        it in the index."""
        self.held[group] = list(group.sequences)
        self._release(group, 1)

    # -------------------------------------------------------------------------------------------------- decide

    def schedule(self) -> StepPlan:
        """The next step: all decodes, then running prefills, then admissions, each oldest first."""
        chunks: list[Chunk] = []
        budget = self.max_batched_tokens
        num_preemptions = self.num_preemptions
        for sequence in self.running.copy():
            if sequence.num_remaining == 1 and self._reserve(sequence):
                chunks.append(_chunk(sequence, 1))
                budget -= 1
        for sequence in self.running:
            if sequence.num_remaining > 1 and budget:
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].length
        # Blocks just taken from someone are not for newcomers.
        can_admit = num_preemptions == self.num_preemptions
        while can_admit and budget and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            chunks.append(_chunk(sequence, budget))
            budget -= chunks[-1].length
        return StepPlan(chunks)

    def _reserve(self, sequence: Sequence) -> bool:
        """A block for the token about to be computed; False if the sequence had to give way itself.

        Decodes are visited oldest first, so a victim, being the youngest, is never in the plan yet.
        """
        while sequence.status is Status.RUNNING:
            if len(sequence.table) * self.page >= sequence.num_known:
                return True
            if not self.pool.append_block(sequence.table):
                self._preempt(self.running[-1])
        return False

    def _admit(self, sequence: Sequence) -> bool:
        """Find the known prefix in the index and take blocks for the rest; all or nothing."""
        num_pages = (sequence.num_known - 1) // self.page  # the last token must be computed
        matched = self.pool.match_by_prefix_token(sequence.page_hashes(num_pages))
        rest = self.pool.alloc_blocks(-(-sequence.num_known // self.page) - len(matched))
        if rest is None:
            self.pool.free(matched)
            return False
        del self.waiting[0]
        insort(self.running, sequence, key=by_age)
        sequence.status = Status.RUNNING
        sequence.table = matched + rest
        sequence.num_indexed = len(matched)
        sequence.num_computed = len(matched) * self.page
        self.num_queried_tokens += sequence.num_known
        self.num_hit_tokens += sequence.num_computed
        if sequence.group.num_cached is None:
            sequence.group.num_cached = min(sequence.num_computed, sequence.num_prompt)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting. Its pages stay in the index, so what is not evicted meanwhile is not computed again."""
        self.running.remove(sequence)
        self._index(sequence, sequence.num_computed)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=by_age)
        self.num_preemptions += 1

    # --------------------------------------------------------------------------------------------------- apply

    def update(self, plan: StepPlan, tokens: Iterable[int]) -> None:
        """Apply a computed plan; `tokens` are the sampled ones, in the order of `plan.sampled`.

        Prompt pages are indexed as soon as they are computed, output pages when the choice ends: only then is it
        known how many of its tokens count.
        """
        sampled = iter(tokens)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.length
            self._index(sequence, min(sequence.num_computed, sequence.num_prompt))
            if sequence.num_computed >= sequence.num_prompt:
                self._release(sequence.group)
            if chunk.samples:
                sequence.append(next(sampled))
                if sequence.finish is not None:
                    self.end(sequence, sequence.finish)

    def end(
        self,
        sequence: Sequence,
        finish: str,
        *,
        keep: int | None = None,
        failure: Failure | None = None,
    ) -> None:
        """End a live sequence, whatever it is doing, and free its blocks. Output past `keep` tokens is not indexed."""
        group = sequence.group
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.held[group].remove(sequence)
        counted = sequence.num_known if keep is None else sequence.num_prompt + keep
        self._index(sequence, min(sequence.num_computed, counted))
        if keep is not None:
            self.trim(sequence, keep)
        self._give_back(sequence)
        sequence.status = Status.ENDED
        sequence.finish, sequence.failure, sequence.row = finish, failure, None
        if not any(s.status in (Status.RUNNING, Status.WAITING) for s in group.sequences):
            self._release(group, 1)  # the others waited for this one: the next takes its part

    def trim(self, sequence: Sequence, keep: int) -> None:
        """Take output pages past `keep` tokens out of the index (a preemption or an end may have put them in)."""
        num_pages = (sequence.num_prompt + keep) // self.page
        for page_hash in sequence.hashes[num_pages:]:
            self.pool.forget(page_hash)

    # ----------------------------------------------------------------------------------------------- internals

    def _release(self, group: SequenceGroup, count: int | None = None) -> None:
        """Let the first `count` held choices of a group wait for admission; all of them by default."""
        held = self.held.get(group)
        if held is None:
            return
        for sequence in held[:count]:
            sequence.status = Status.WAITING
            insort(self.waiting, sequence, key=by_age)
        del held[:count]
        if not held:
            del self.held[group]

    def _index(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the full pages among the first `num_tokens` computed tokens to the prefix index."""
        num_pages = num_tokens // self.page
        if num_pages > sequence.num_indexed:
            hashes = sequence.page_hashes(num_pages)
            for index in range(sequence.num_indexed, num_pages):
                self.pool.store(sequence.table[index], hashes[index])
            sequence.num_indexed = num_pages

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.free(sequence.table)
        sequence.table = []
        sequence.num_indexed = 0


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    length = min(budget, sequence.num_remaining)
    return Chunk(sequence, sequence.num_computed, length, samples=length == sequence.num_remaining)
