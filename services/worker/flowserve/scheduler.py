"""Which tokens to compute next: continuous batching under a token budget.

There is no prefill phase and no decode phase. Every sequence has known and computed tokens, and a step hands out a
budget of rows until the two meet; chunked prefill, prefix hits, preemption, resubmission and speculation are all the
same case, "known (or guessed) but not computed" (the idea of vLLM's second scheduler). `schedule` decides and returns a
value, `update` applies what the device made of it. Between the two lie the steps on their way: a step may be planned
while the one before it runs, on the number of tokens that one will bring, whatever they are. This module must not know
the device, the bus or the clock.

In a pipeline of stages as many steps are on their way, its micro-batches, and one scheduler with one view of the memory
plans them all (the paper, section 2.4). A sequence whose token is on its way is not planned, so each decode is in one
micro-batch, and they are shared out evenly. A prompt needs no token: its next chunk follows in the next micro-batch,
while the chunks before it are inside.

Blocks are given back and handed out again at once, also while a step on its way still writes to them. That is safe:
1. Steps run one after the other, in the order in which they were planned. In a pipeline that holds at each stage, and
   a stage touches the cells of its own layers only.
2. A row writes only to a block that its sequence alone holds and that is not indexed: matched blocks hold full pages
   before the first row computed, and a page is indexed only once the step that completed it was applied.
3. A new owner's rows are planned later, so they run later, and every cell it reads is one that it wrote itself, in
   this step or one planned before, or that belongs to a page matched in the index, which all stages have computed.
So a late row (of a sequence that was cancelled or found to have ended) writes to cells that nobody reads before the new
owner has written them. A preemption keeps what was computed, so it waits until no step is on its way.

What a prompt takes over of its chunks is written by the step that computes the next row, before all its rows, and its
sequence holds the blocks that it comes from: 1 to 3 hold for it as for rows.

Bytes that move to or from blocks do so beside the steps, in no order with them. That is safe:
4. What is copied out, or read by whoever has a lease, is in the index: all stages have computed it, and by 2 no row
   writes to it, nor has one planned earlier yet to run, since the step that completed it came after that.
5. What is moved in goes to blocks that nobody else holds; but late rows of steps on their way may still write there.
   So it starts once all of those are applied (`fetching.py`). It enters the index when it is all there, and is only
   read from then on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from services.worker.flowserve.rtc.chunks import ChunkTable, Taken
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from services.worker.flowserve.speculation import Speculator
from shared.messages import Failure

TAKEN_PER_ROW = 16  # positions that are taken over in the time of one row, at the least

by_age = attrgetter("order")
GOING = (Status.RUNNING, Status.WAITING, Status.FETCHING)


class Chunk(NamedTuple):
    """Rows of one sequence in one step: `length` tokens from position `start`.

    `samples`: the chunk reaches the last known token, so its last row gives the next one. With a `draft`, the guesses
    are the last of its rows, and each of them samples too. `taken`: what is taken over right before `start`.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    draft: list[int] | tuple[()] = ()
    taken: tuple[Taken, ...] = ()

    @property
    def num_taken(self) -> int:
        """Positions taken over."""
        return sum(one.stop - one.start for one in self.taken)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Rows of decoding sequences, their guesses included."""
        return sum(c.length for c in self.chunks if c.length == 1 + len(c.draft))

    @property
    def num_prefill_tokens(self) -> int:
        return sum(c.length for c in self.chunks if c.length > 1 + len(c.draft))

    @property
    def has_drafts(self) -> bool:
        """Whether some sequence may get more than one token."""
        return any(chunk.draft for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get tokens, in the order `update` wants them."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """First come, first served over the blocks of one `RtcMaster`.

    Why nothing deadlocks or starves. A sequence is admitted only with blocks for all its known tokens, so only decoding
    can run out of blocks; then the youngest running sequence gives up its own and waits to be recomputed. Nobody is
    submitted who would not fit the pool alone, so the oldest running sequence always gets its block: leases and other
    promises give way to it, and where all that is left is moving, which ends by itself, it waits for that. Should it
    hold too many itself (pages that it computed beside another, and the other's, which its next ones build on), it is
    preempted as the last, and admitted again with one block for each. Whoever waits is admitted strictly by age, so
    nothing overtakes a long prompt for ever; if nobody runs, promises give way to it too, and nothing is brought for
    younger ones into what it needs (`num_blocks_before`). Requires max_batched_tokens >= max_num_seqs: every decoding
    sequence moves on in every step, and a prefill among them gets at least one row.

    In a pipeline a decode that is not inside goes into one of the next `num_stages` micro-batches: the older ones, each
    in one of them at most, do not fill the shares of all. `max_num_seqs` is over all micro-batches,
    `max_batched_tokens` of each. Without `spread_chunks` a prompt stays in one micro-batch: a chunk waits until the one
    before it has left the pipeline. That is slower, and there to be compared with.
    """

    def __init__(
        self,
        pool: RtcMaster,
        *,
        page: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_draft: int = 0,
        max_draft_rows: int = 0,
        num_stages: int = 1,
        spread_chunks: bool = True,
    ) -> None:
        if not 0 < max_num_seqs <= max_batched_tokens:
            raise ValueError("needs 0 < max_num_seqs <= max_batched_tokens")
        self.pool = pool
        self.page = page
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        # Guesses for one sequence; 0: no speculation. How many are right, the steps behind would have to wait for.
        self.max_draft = max_draft if num_stages == 1 else 0
        self.max_draft_rows = max_draft_rows  # rows of a step that has guesses among them
        self.num_stages = num_stages
        self.spread_chunks = spread_chunks
        self.chunk_table: ChunkTable | None = None  # without one nothing is taken over
        self.running: list[Sequence] = []  # oldest first
        self.waiting: list[Sequence] = []  # oldest first
        self.fetching: list[Sequence] = []
        self.held: dict[SequenceGroup, list[Sequence]] = {}
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # known tokens at admission
        self.num_hit_tokens = 0  # those of them found in the index
        self.num_taken_tokens = 0
        self.num_guessed_tokens = 0
        self.num_right_tokens = 0  # guesses that were sampled

    def add(self, group: SequenceGroup) -> None:
        """Take in a group. Its first choice goes ahead; the others are held until the prompt is computed, then find
        it in the index."""
        self.held[group] = list(group.sequences)
        self._release(group, 1)

    def fetch(self, sequence: Sequence) -> None:
        """Let a waiting sequence wait for pages first."""
        self.waiting.remove(sequence)
        self.fetching.append(sequence)
        sequence.status = Status.FETCHING

    def fetched(self, sequence: Sequence) -> None:
        """Whatever came: let it wait for admission, in its old place."""
        self.fetching.remove(sequence)
        insort(self.waiting, sequence, key=by_age)
        sequence.status = Status.WAITING

    def num_blocks_before(self, sequence: Sequence) -> int:
        """Blocks that are not for pages brought for a fetching one: each that decodes needs one soon, and who waits
        longer than it goes first."""
        first = self.waiting[0] if self.waiting else sequence
        due = -(-first.num_known // self.page) if first.order < sequence.order else 0
        return len(self.running) + due

    # -------------------------------------------------------------------------------------------------- decide

    def schedule(self, *, ahead: int = 0) -> StepPlan:
        """The next step: decodes (all, or a micro-batch's share), running prefills, admissions, each oldest first.

        `ahead`: the number of steps on their way. If there are any, the plan is empty where going on would take a
        preemption or guesses, both of which want their results first.
        """
        num_going = num_decodes = 0
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            is_decode = sequence.num_remaining == 1
            num_decodes += is_decode
            if sequence.is_complete:  # its last token is on its way
                continue
            num_going += 1
            if self.num_stages == 1 or not self._is_inside(sequence):
                (decodes if is_decode else prefills).append(sequence)
        if ahead and (self._num_blocks_due(decodes) > self.pool.num_available or self._may_guess()):
            return StepPlan([])
        num_preemptions = self.num_preemptions
        # All of them, so that the micro-batches behind this one have their blocks too.
        decodes = [sequence for sequence in decodes if self._reserve(sequence)]
        if self.num_stages > 1:
            del decodes[self._share(len(decodes), num_decodes, ahead) :]
        chunks = [chunk for sequence in decodes for chunk in _chunks(sequence, 1)]
        budget = self.max_batched_tokens - len(chunks)
        for sequence in prefills:
            if budget and sequence.status is Status.RUNNING:
                budget = _extend(chunks, sequence, budget)
        # Blocks just taken from someone are not for newcomers.
        can_admit = num_preemptions == self.num_preemptions
        while can_admit and budget and self.waiting and num_going < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            num_going += 1
            budget = _extend(chunks, sequence, budget)
        if self.max_draft and not ahead:
            self._add_drafts(chunks, budget)
        return StepPlan(chunks)

    def _is_inside(self, sequence: Sequence) -> bool:
        """Whether it has to leave the pipeline before more of it is planned."""
        if self.spread_chunks:
            return sequence.num_coming > 0
        return sequence.num_planned > sequence.num_computed

    def _share(self, num_free: int, num_decodes: int, ahead: int) -> int:
        """How many of the `num_free` decodes that are not inside go into the next micro-batch, out of all of them.

        As many as let those that can be planned now get alike, and no more than if all had alike: when many prompts
        ended in one micro-batch, or one has lost its sequences, they even out within a round or two.
        """
        num_open = self.num_stages - ahead
        return min(-(-num_free // num_open), -(-num_decodes // self.num_stages))

    def _num_blocks_due(self, decodes: list[Sequence]) -> int:
        """Blocks that the next rows of these take."""
        page = self.page
        return sum(len(sequence.table) * page < sequence.num_expected for sequence in decodes)

    def _may_guess(self) -> bool:
        """Whether some sequence is likely to have guesses for the step after the one on its way."""
        return 0 < len(self.running) < self.max_draft_rows * bool(self.max_draft) and any(
            sequence.speculator.has_match(sequence.tokens) for sequence in self.running
        )

    def _add_drafts(self, chunks: list[Chunk], budget: int) -> None:
        """Extend decodes by guesses, while further rows cost little: in a small step without prompts.

        Guesses take blocks only where there are some to spare, so they preempt nobody and break no promise.
        """
        num_spare = min(budget, self.max_draft_rows - len(chunks))
        if num_spare <= 0 or any(chunk.length > 1 or chunk.taken for chunk in chunks):
            return
        for index, (sequence, start, *_) in enumerate(chunks):
            limit = min(self.max_draft, num_spare, sequence.max_known - sequence.num_known - 1)
            draft = sequence.speculator.propose(sequence.tokens, limit)
            while draft and len(sequence.table) * self.page < sequence.num_known + len(draft):
                if not (self.pool.num_available and self.pool.append_block(sequence.table)):
                    del draft[len(sequence.table) * self.page - sequence.num_known :]
                    break
            if draft:
                chunks[index] = Chunk(sequence, start, 1 + len(draft), samples=True, draft=draft)
                num_spare -= len(draft)

    def _reserve(self, sequence: Sequence) -> bool:
        """A block for the token about to be computed; False if the sequence had to give way itself.

        Decodes are visited oldest first, so a victim, being the youngest, has none reserved in this round yet.
        """
        while sequence.status is Status.RUNNING:
            if len(sequence.table) * self.page >= sequence.num_expected:
                return True
            if not self.pool.append_block(sequence.table, firm=True):
                if len(self.running) == 1 and self.pool.num_moving:
                    return False
                self._preempt(self.running[-1])
        return False

    def _admit(self, sequence: Sequence) -> bool:
        """Find the known prefix in the index and take blocks for the rest; all or nothing."""
        group = sequence.group
        num_pages = (sequence.num_known - 1) // self.page  # the last token must be computed
        matched = self.pool.match_by_prefix_token(sequence.page_hashes(num_pages))
        num_rest = -(-sequence.num_known // self.page) - len(matched)
        self._take_over(sequence, len(matched) * self.page)
        rest = self.pool.alloc_blocks(num_rest, firm=not self.running)
        if rest is None and sequence.taken and not self.running:
            self._drop_sources(sequence)  # it does not fit beside what it would take over
            rest = self.pool.alloc_blocks(num_rest, firm=True)
        if rest is None:
            self._drop_sources(sequence)
            self.pool.free(matched)
            return False
        del self.waiting[0]
        insort(self.running, sequence, key=by_age)
        sequence.status = Status.RUNNING
        sequence.table = matched + rest
        sequence.num_exact = sequence.taken[0].start if sequence.taken else sequence.max_known
        sequence.num_indexed = len(matched)
        sequence.num_computed = sequence.num_planned = len(matched) * self.page
        self.num_queried_tokens += sequence.num_known
        self.num_hit_tokens += sequence.num_computed
        num_taken = sum(one.stop - one.start for one in sequence.taken)
        self.num_taken_tokens += num_taken
        if group.num_cached is None:
            num_found = min(sequence.num_computed, sequence.num_prompt)
            num_new = sum(len(one.request.prompt) - (one.num_cached or 0) for one in group.alone)
            group.num_cached = num_found + max(num_taken - num_new, 0)
        return True

    def _take_over(self, sequence: Sequence, num_found: int) -> None:
        """Find the chunks of its prompt, of which `num_found` tokens were found as a prefix."""
        chunks = sequence.group.chunks
        if self.chunk_table is not None and chunks:
            sequence.taken = self.chunk_table.take(chunks, sequence.num_prompt, num_found)

    def _drop_sources(self, sequence: Sequence) -> None:
        """Nothing (more) is taken over by this sequence."""
        for one in sequence.taken:
            self.pool.free(one.source)
        sequence.taken = []

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting. Its pages stay in the index, so what is not evicted meanwhile is not computed again."""
        self.running.remove(sequence)
        self._index(sequence, sequence.num_computed)
        self._give_back(sequence)
        sequence.num_computed = sequence.num_planned = 0
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=by_age)
        self.num_preemptions += 1

    # --------------------------------------------------------------------------------------------------- apply

    def update(self, plan: StepPlan, tokens: Iterable[list[int]]) -> list[int]:
        """Apply the oldest plan on its way, now computed; `tokens` are the sampled ones of each of `plan.sampled`.

        Returns how many of each count: what comes after an end does not. Prompt pages are indexed as soon as they are
        computed, output pages when the choice ends: only then is it known how many of its tokens count.
        """
        sampled = iter(tokens)
        counts: list[int] = []
        for sequence, start, length, samples, draft, taken in plan.chunks:
            new = next(sampled) if samples else []
            if sequence.status is not Status.RUNNING:  # it ended while this step was on its way
                if samples:
                    counts.append(0)
                continue
            sequence.num_computed += sum(one.stop - one.start for one in taken)
            if not samples:
                sequence.num_computed += length
                self._prompt_computed(sequence, start)
                continue
            sequence.num_coming -= 1
            if draft:
                self._learn(sequence, draft, len(new) - 1)
            num_known = sequence.num_known
            for token in new:
                sequence.append(token)
                if sequence.finish is not None:
                    break
            counts.append(sequence.num_known - num_known)
            # Of the guesses' rows, those that were right have written what the tokens appended would have.
            sequence.num_computed += length - len(draft) + counts[-1] - 1
            if draft:
                sequence.num_planned = sequence.num_computed
            self._prompt_computed(sequence, start)
            if sequence.finish is not None:
                self.end(sequence, sequence.finish)
        return counts

    def undo(self, plan: StepPlan) -> None:
        """Take back the newest plan on its way, which was not computed: its sequences are as if never planned."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.status is Status.RUNNING:
                sequence.num_planned -= chunk.num_taken + chunk.length - len(chunk.draft)
                sequence.num_coming -= chunk.samples

    def _prompt_computed(self, sequence: Sequence, start: int) -> None:
        """Index what was computed of a prompt from `start` on; once that is all of it, the other choices may go."""
        if start < sequence.num_prompt:
            self._index(sequence, min(sequence.num_computed, sequence.num_prompt))
        if sequence.num_computed >= sequence.num_prompt:
            self._drop_sources(sequence)
            if self.held:
                self._release(sequence.group)

    def _learn(self, sequence: Sequence, draft: list[int] | tuple[()], num_right: int) -> None:
        self.num_guessed_tokens += len(draft)
        self.num_right_tokens += num_right
        sequence.speculator.observe(sequence.num_known + num_right + 1, len(draft), num_right)

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
        elif sequence.status is Status.FETCHING:
            self.fetching.remove(sequence)
        else:
            self.held[group].remove(sequence)
        counted = sequence.num_known if keep is None else sequence.num_prompt + keep
        self._index(sequence, min(sequence.num_computed, counted))
        if keep is not None:
            self.trim(sequence, keep)
        self._give_back(sequence)
        sequence.status = Status.ENDED
        sequence.finish, sequence.failure = finish, failure
        sequence.row, sequence.speculator = None, Speculator()  # both may be large
        if not any(s.status in GOING for s in group.sequences):
            self._release(group, 1)  # the others waited for this one: the next takes its part

    def trim(self, sequence: Sequence, keep: int) -> None:
        """Take output pages past `keep` tokens out of the index (a preemption or an end may have put them in)."""
        num_pages = (sequence.num_prompt + keep) // self.page
        for page_hash in reversed(sequence.hashes[num_pages:]):
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
        num_pages = min(num_tokens, sequence.num_exact) // self.page
        if num_pages > sequence.num_indexed:
            hashes = sequence.page_hashes(num_pages)
            for index in range(sequence.num_indexed, num_pages):
                before = hashes[index - 1] if index else None
                self.pool.store(sequence.table[index], hashes[index], before)
            sequence.num_indexed = num_pages

    def _give_back(self, sequence: Sequence) -> None:
        self._drop_sources(sequence)
        self.pool.free(sequence.table)
        sequence.table = []
        sequence.num_indexed = 0


def _extend(chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
    """Plan the next rows of a sequence; what is left of the budget."""
    for chunk in _chunks(sequence, budget):
        chunks.append(chunk)
        budget -= chunk.length + chunk.num_taken // TAKEN_PER_ROW
    return max(budget, 0)


def _chunks(sequence: Sequence, budget: int) -> Iterator[Chunk]:
    """The next rows of a sequence, up to `budget`, which count as planned from here on. Rows that lie apart, because
    what is between them is taken over, are several chunks."""
    while budget > 0:
        taken = []
        while (one := sequence.next_taken()) and one.start == sequence.num_planned:
            taken.append(one)
            sequence.num_planned = one.stop
        remaining = sequence.num_remaining
        end = remaining if one is None else min(remaining, one.start - sequence.num_planned)
        start, length = sequence.num_planned, min(budget, end)
        sequence.num_planned += length
        samples = length == remaining
        sequence.num_coming += samples
        chunk = Chunk(sequence, start, length, samples, taken=tuple(taken))
        yield chunk
        budget -= length + chunk.num_taken // TAKEN_PER_ROW
        if samples or one is None:
            return
