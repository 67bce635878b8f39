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

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from services.worker.flowserve.drafts import Drafts
from services.worker.flowserve.holdings import Holdings
from services.worker.flowserve.plan import Chunk, StepPlan, extend, next_row, take_back
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from services.worker.flowserve.speculation import Speculator
from shared.fairness import FairQueue
from shared.messages import Band, Failure

# Of the rows of a step, band BATCH gets so many at the most while others run: one in so many of the budget. The others'
# next tokens wait for the whole step.
FILLED_SHARE: Final = 16

by_rank = attrgetter("rank")
by_band = attrgetter("band")
GOING = (Status.RUNNING, Status.WAITING, Status.FETCHING)


class Scheduler:
    """Bands, fair shares and ages (`fairness.py`) over the blocks of one `RtcMaster`.

    Who waits is admitted in the order of the queue, strictly: nothing overtakes a long prompt that lacks blocks, but
    what a fair share or a higher band puts before it. Running prompts get their rows in the same order. Who has to give
    up blocks is a matter of rank alone, the band and then the age, which do not change.

    Band BATCH fills what the others leave. It yields within one step: to whoever waits, or has pages brought, in a
    higher band, its running sequences give up slots and blocks, youngest first, and go on later from the pages that
    stay in the index; and its rows come after all others, a few while those run, as many as there is room without.

    Why nothing deadlocks. A sequence is admitted only with blocks for all its known tokens, so only decoding can run
    out of blocks; then the running sequence of the lowest rank gives up its own and waits to be recomputed. Nobody is
    submitted who would not fit the pool alone, so the running sequence of the highest rank always gets its block:
    leases and other promises give way to it, and where all that is left is moving, which ends by itself, it waits for
    that. Should it hold too many itself (pages that it computed beside another, and the other's, which its next ones
    build on), it is preempted as the last, and admitted again with one block for each. If nobody runs, promises give
    way to who is admitted next, too, and nothing is brought for later ones into what it needs (`num_blocks_before`).

    Why nobody starves, but a band for higher ones. Requires max_batched_tokens >= max_num_seqs: every decoding sequence
    above BATCH moves on in every step, so all that run end. Of a band only those with the smaller share go before one
    that waits or is being prefilled, and each row they get adds to theirs: see `FairQueue` for the bound.

    In a pipeline a decode that is not inside goes into one of the next `num_stages` micro-batches: those of higher
    rank, each in one of them at most, do not fill the shares of all. `max_num_seqs` is over all micro-batches,
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
        self.num_stages = num_stages
        self.spread_chunks = spread_chunks
        self.holdings = Holdings(pool, page=page)
        if num_stages > 1:  # how many guesses are right, the steps behind would have to wait for
            max_draft = 0
        self.drafts = Drafts(pool, page=page, max_draft=max_draft, max_rows=max_draft_rows)
        self.running: list[Sequence] = []  # by rank
        self.waiting: FairQueue[Sequence] = FairQueue(by_rank)
        self.fetching: list[Sequence] = []
        self.held: dict[SequenceGroup, list[Sequence]] = {}
        # Who has pages brought, and lacks room for that: so many blocks are to be available.
        self.lacking: tuple[Sequence, int] | None = None
        self._closed_from = len(Band)  # bands from this one on admit nobody in this round
        self.num_preemptions = 0
        self.num_yields = 0  # those of them that made room for a higher band
        self.num_queried_tokens = 0  # known tokens at admission
        self.num_hit_tokens = 0  # those of them found in the index
        self.num_taken_tokens = 0

    def add(self, group: SequenceGroup) -> None:
        """Take in a group. Its first choice goes ahead; the others are held until the prompt is computed, then find
        it in the index."""
        group.share = self.waiting.share(group.request.band, group.request.tenant)
        self.held[group] = list(group.sequences)
        self._release(group, 1)

    def fetch(self, sequence: Sequence) -> None:
        """Let a waiting sequence wait for pages first."""
        self.waiting.remove(sequence.group.share, sequence)
        self.fetching.append(sequence)
        sequence.status = Status.FETCHING

    def fetched(self, sequence: Sequence) -> None:
        """Whatever came: let it wait for admission, in its old place."""
        self.fetching.remove(sequence)
        self._wait(sequence, is_new=False)

    def num_blocks_before(self, sequence: Sequence) -> int:
        """Blocks that are not for pages brought for a fetching one: each that decodes needs one soon, and who is
        admitted before it goes first."""
        first = self.waiting.first()
        goes_first = first is not None and self.turn(first) < self.turn(sequence)
        num_due = -(-first.num_known // self.page) if first is not None and goes_first else 0
        return len(self.running) + num_due

    def turn(self, sequence: Sequence) -> tuple[int, int, tuple[int, ...]]:
        """Sorts sequences by who goes first."""
        return self.waiting.turn(sequence.group.share, sequence)

    # -------------------------------------------------------------------------------------------------- decide

    def schedule(self, *, ahead: int = 0) -> StepPlan:
        """The next step: decodes (all, or a micro-batch's share), running and new prefills; then those of band BATCH.

        `ahead`: the number of steps on their way. If there are any, the plan is empty where going on would take a
        preemption or guesses, both of which want their results first.
        """
        self._closed_from = len(Band)
        if self.lacking is not None and self._may_yield_to_pages(*self.lacking):
            self._closed_from = Band.BATCH
            while self._pages_wait and not ahead and self._yield_to(self.lacking[0]):
                pass
        num_complete = num_decodes = 0
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            is_decode = sequence.num_remaining == 1
            num_decodes += is_decode
            if sequence.is_complete:  # its last token is on its way
                num_complete += 1
            elif self.num_stages == 1 or not self._is_inside(sequence):
                (decodes if is_decode else prefills).append(sequence)
        num_slots = self.max_num_seqs + num_complete
        if ahead and (
            self._num_blocks_due(decodes) > self.pool.num_available
            or self.drafts.are_likely(self.running)
            or self._pages_wait
            or self._has_to_yield(num_slots)
        ):
            return StepPlan([])
        has_batch = bool(self.running) and self.running[-1].band is Band.BATCH
        fillers = (_cut_batch(decodes), _cut_batch(prefills)) if has_batch else ([], [])
        num_most = len(self.running)  # decodes in this step
        if self.num_stages > 1:
            num_most = self._share(len(decodes) + len(fillers[0]), num_decodes, ahead)
        chunks: list[Chunk] = []
        quiet = not ahead
        budget = self.max_batched_tokens
        budget = self._decode(chunks, budget, decodes, num_most, may_preempt=quiet)
        budget = self._prefill(chunks, budget, prefills, num_slots, may_yield=quiet)
        # In a pipeline the others' next tokens wait for this step, though they are not in it.
        room = budget
        if self.running and self.running[0].band is not Band.BATCH:
            room = min(budget, -(-self.max_batched_tokens // FILLED_SHARE))
        left = room
        if has_batch:
            num_most = max(num_most - len(decodes), 0)
            left = self._decode(chunks, left, fillers[0], num_most, may_preempt=quiet)
        left = self._prefill(chunks, left, fillers[1], num_slots, is_batch=True)
        if not ahead:
            self.drafts.add(chunks, budget - room + left)
        return StepPlan(chunks)

    def _decode(
        self,
        chunks: list[Chunk],
        budget: int,
        decodes: list[Sequence],
        num_most: int,
        *,
        may_preempt: bool,
    ) -> int:
        """Plan a row for `num_most` of these at the most; what is left of the budget."""
        # A block for each of them, so that the micro-batches behind this one have theirs too.
        decodes = [sequence for sequence in decodes if self._reserve(sequence, may_preempt)]
        num_rows = min(num_most, budget, len(decodes))
        chunks += map(next_row, decodes[:num_rows])
        return budget - num_rows

    def _prefill(
        self,
        chunks: list[Chunk],
        budget: int,
        prefills: list[Sequence],
        num_slots: int,
        *,
        is_batch: bool = False,
        may_yield: bool = False,
    ) -> int:
        """Plan rows for running prompts, and admit who waits (in band BATCH or above it), whoever's turn it is; what is
        left of the budget. Who is next and finds no room keeps all others that wait from it."""
        is_open = True
        while budget:
            sequence = min(prefills, key=self.turn, default=None)
            newcomer = self._newcomer(is_batch) if is_open else None
            if newcomer and (sequence is None or self.turn(newcomer) < self.turn(sequence)):
                is_open = self._admit(newcomer, num_slots, may_yield=may_yield)
                if is_open:
                    budget = extend(chunks, newcomer, budget)
            elif sequence is None:
                break
            else:
                prefills.remove(sequence)
                if sequence.status is Status.RUNNING:
                    budget = extend(chunks, sequence, budget)
        return budget

    def _newcomer(self, is_batch: bool) -> Sequence | None:
        """Who may be admitted next. Blocks just taken from someone are not for newcomers of its band, or below it."""
        first = self.waiting.first()
        if first is None or (first.band is Band.BATCH) != is_batch:
            return None
        return first if first.band < self._closed_from else None

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

    def _reserve(self, sequence: Sequence, may_preempt: bool) -> bool:
        """A block for the token about to be computed; False if there is none, or the sequence had to give way itself.

        Decodes are visited by rank, so a victim, being the last, has none reserved in this round yet.
        """
        while sequence.status is Status.RUNNING:
            if len(sequence.table) * self.page >= sequence.num_expected:
                return True
            if not self.pool.append_block(sequence.table, firm=True):
                if not may_preempt or (len(self.running) == 1 and self.pool.num_moving):
                    return False
                self._preempt(self.running[-1])
        return False

    def _admit(self, sequence: Sequence, num_slots: int, *, may_yield: bool) -> bool:
        """Admit it: find the known prefix in the index and take blocks for the rest; all or nothing."""
        while len(self.running) >= num_slots:
            if not (may_yield and self._yield_to(sequence)):
                return False
        group, holdings = sequence.group, self.holdings
        num_pages = (sequence.num_known - 1) // self.page  # the last token must be computed
        matched = self.pool.match_by_prefix_token(sequence.page_hashes(num_pages))
        num_rest = -(-sequence.num_known // self.page) - len(matched)
        holdings.take_over(sequence, len(matched) * self.page)
        rest = self.pool.alloc_blocks(num_rest, firm=not self.running)
        while rest is None and may_yield and self._yield_to(sequence):
            rest = self.pool.alloc_blocks(num_rest, firm=not self.running)
        if rest is None and sequence.taken and not self.running:
            holdings.drop_sources(sequence)  # it does not fit beside what it would take over
            rest = self.pool.alloc_blocks(num_rest, firm=True)
        if rest is None:
            holdings.drop_sources(sequence)
            self.pool.free(matched)
            return False
        self.waiting.remove(group.share, sequence)
        insort(self.running, sequence, key=by_rank)
        sequence.status = Status.RUNNING
        sequence.table = matched + rest
        sequence.num_exact = sequence.taken[0].start if sequence.taken else sequence.max_known
        sequence.num_indexed = len(matched)
        sequence.num_computed = sequence.num_planned = len(matched) * self.page
        if sequence.num_paid > sequence.num_computed:  # what a preemption cost is not its tenant's
            group.share.served -= sequence.num_paid - sequence.num_computed
        sequence.num_paid = 0
        self.num_queried_tokens += sequence.num_known
        self.num_hit_tokens += sequence.num_computed
        num_taken = sum(one.stop - one.start for one in sequence.taken)
        self.num_taken_tokens += num_taken
        if group.num_cached is None:
            num_found = min(sequence.num_computed, sequence.num_prompt)
            num_new = sum(len(one.request.prompt) - (one.num_cached or 0) for one in group.alone)
            group.num_cached = num_found + max(num_taken - num_new, 0)
        return True

    def _has_to_yield(self, num_slots: int) -> bool:
        """Whether somebody of band BATCH runs, and who is next, in a higher band, may lack a slot or blocks."""
        if not self.running or self.running[-1].band is not Band.BATCH:
            return False
        first = self.waiting.first()
        if first is None or first.band is Band.BATCH:
            return False
        num_blocks = -(-first.num_known // self.page)
        return len(self.running) >= num_slots or num_blocks > self.pool.num_available

    def _may_yield_to_pages(self, sequence: Sequence, num_blocks: int) -> bool:
        """Whether a sequence above band BATCH can have its pages brought, at the latest once the band gave way."""
        if sequence.band is Band.BATCH:
            return False
        held: list[set[int]] = [set(), set()]
        for one in self.running:
            held[one.band is Band.BATCH].update(one.table)
        return self.pool.num_available + len(held[True] - held[False]) >= num_blocks

    @property
    def _pages_wait(self) -> bool:
        """Whether pages wait for band BATCH to give way."""
        if self.lacking is None or self._closed_from > Band.BATCH:
            return False
        return self.pool.num_available < self.lacking[1]

    def _yield_to(self, sequence: Sequence) -> bool:
        """Have the youngest of band BATCH give way to one that waits in a higher band; False if there is none."""
        if not self.running or not sequence.band < self.running[-1].band is Band.BATCH:
            return False
        self._preempt(self.running[-1])
        self.num_yields += 1
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting. Its pages stay in the index, so what is not evicted meanwhile is not computed again."""
        self.running.remove(sequence)
        self.holdings.index(sequence, sequence.num_computed)
        self.holdings.give_back(sequence)
        sequence.num_paid = sequence.num_computed
        sequence.num_computed = sequence.num_planned = 0
        self._wait(sequence)  # what its tenant did not ask for while it ran is not saved up
        self._closed_from = min(self._closed_from, sequence.band)
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
                self.drafts.learn(sequence, len(draft), len(new) - 1)
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
                sequence.group.share.served += 2 * (counts[-1] - 1)
            self._prompt_computed(sequence, start)
            if sequence.finish is not None:
                self.end(sequence, sequence.finish)
        return counts

    def undo(self, plan: StepPlan) -> None:
        """Take back the newest plan on its way, which was not computed: its sequences are as if never planned."""
        for chunk in plan.chunks:
            if chunk.sequence.status is Status.RUNNING:
                take_back(chunk)

    def _prompt_computed(self, sequence: Sequence, start: int) -> None:
        """Index what was computed of a prompt from `start` on; once that is all of it, the other choices may go."""
        if start < sequence.num_prompt:
            self.holdings.index(sequence, min(sequence.num_computed, sequence.num_prompt))
        if sequence.num_computed >= sequence.num_prompt:
            if sequence.taken:
                self.holdings.drop_sources(sequence)
            if self.held:
                self._release(sequence.group)

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
            self.waiting.remove(group.share, sequence)
        elif sequence.status is Status.FETCHING:
            self.fetching.remove(sequence)
        else:
            self.held[group].remove(sequence)
        counted = sequence.num_known if keep is None else sequence.num_prompt + keep
        self.holdings.index(sequence, min(sequence.num_computed, counted))
        if keep is not None:
            self.holdings.trim(sequence, keep)
        self.holdings.give_back(sequence)
        sequence.status = Status.ENDED
        sequence.finish, sequence.failure = finish, failure
        sequence.row, sequence.speculator = None, Speculator()  # both may be large
        if not any(s.status in GOING for s in group.sequences):
            self._release(group, 1)  # the others waited for this one: the next takes its part

    # ----------------------------------------------------------------------------------------------- internals

    def _release(self, group: SequenceGroup, count: int | None = None) -> None:
        """Let the first `count` held choices of a group wait for admission; all of them by default."""
        held = self.held.get(group)
        if held is None:
            return
        for sequence in held[:count]:
            self._wait(sequence)
        del held[:count]
        if not held:
            del self.held[group]

    def _wait(self, sequence: Sequence, *, is_new: bool = True) -> None:
        """Let it wait for admission, in the place of its age."""
        sequence.status = Status.WAITING
        self.waiting.add(sequence.group.share, sequence, is_new=is_new)


def _cut_batch(ranked: list[Sequence]) -> list[Sequence]:
    """Take those of band BATCH out of a list by rank."""
    first = bisect_left(ranked, Band.BATCH, key=by_band)
    batch = ranked[first:]
    del ranked[first:]
    return batch
