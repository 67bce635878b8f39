"""A scheduler by itself: plans are taken one after the other, and answered by a stand-in whose tokens follow from the
sequence alone."""

from __future__ import annotations

from collections import deque
from hashlib import blake2b
from itertools import count

from services.worker.flowserve.plan import StepPlan
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from shared import blockhash
from shared.messages import Band, Request, Sampling

PAGE = 4
EOS = 0
ROOT = blockhash.root(b"secret", "model")


def next_token(tokens: list[int]) -> int:
    """The model of these tests: a function of the whole prefix over a vocabulary of 12."""
    return blake2b(bytes(tokens), digest_size=1).digest()[0] % 12


def truth(prompt: list[int], max_tokens: int, eos: int | None = None) -> list[int]:
    """The output of an unscheduled decoder."""
    tokens = prompt.copy()
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


class Bench:
    """A scheduler, and a cache whose cells hold the prefix they were computed from; `depth` plans are on their way, in
    a pipeline of several stages as many as those."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 16,
        eos: int | None = None,
        depth: int = 1,
        num_stages: int = 1,
        spread_chunks: bool = True,
    ) -> None:
        self.depth = num_stages if num_stages > 1 else depth
        self.on_their_way: deque[tuple[StepPlan, list[list[int]]]] = deque()  # with the tables
        self.eos_ids = frozenset() if eos is None else frozenset([eos])
        self.pool = RtcMaster(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            page=PAGE,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            num_stages=num_stages,
            spread_chunks=spread_chunks,
        )
        self.context = num_blocks * PAGE
        self.cells: dict[tuple[int, int], bytes] = {}
        self.groups: list[SequenceGroup] = []
        self.arrivals = count()

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int = 1,
        given: list[list[int]] | None = None,
        *,
        band: Band = Band.DEFAULT,
        tenant: str = "t",
    ) -> SequenceGroup:
        request = Request(
            request=f"r{len(self.groups)}",
            attempt=0,
            client="c",
            model="m",
            tenant=tenant,
            prompt=prompt,
            root=ROOT,
            hashes=blockhash.chain(ROOT, prompt, PAGE),
            sampling=Sampling(max_tokens=max_tokens, seed=0, n=n),
            deadline_ms=1000,
            park_ms=0,
            output=given or [],
            band=band,
        )
        group = SequenceGroup(
            request,
            arrival=next(self.arrivals),
            deadline=0,
            page=PAGE,
            context=self.context,
            eos_ids=self.eos_ids,
        )
        self.groups.append(group)
        self.scheduler.add(group)
        return group

    def step(self) -> StepPlan:
        """Plan as far ahead as may be, then compute the oldest plan's rows into their cells, sample from what the
        tables read back, and update."""
        while len(self.on_their_way) < self.depth and self.plan():
            pass
        if not self.on_their_way:
            return StepPlan([])
        plan, tables = self.on_their_way.popleft()
        tokens = []
        for chunk, table in zip(plan.chunks, tables, strict=True):
            sequence, stop = chunk.sequence, chunk.start + chunk.length
            for position in range(chunk.start, stop):
                # A late row's token is anything, and its prefix too.
                is_known = position < sequence.num_known
                prefix = bytes(sequence.tokens[: position + 1]) if is_known else b"late"
                self.cells[table[position // PAGE], position % PAGE] = prefix
            if sequence.status is Status.RUNNING:
                for position in range(stop):
                    expected = bytes(sequence.tokens[: position + 1])
                    assert self.cells[table[position // PAGE], position % PAGE] == expected
            if chunk.samples:
                tokens.append([next_token(sequence.tokens)])
        self.scheduler.update(plan, tokens)
        self.check()
        return plan

    def plan(self) -> bool:
        """Launch a plan, if one can be made, after proving that it overtakes nobody and keeps within its limits."""
        scheduler = self.scheduler
        num_preemptions, is_ahead = scheduler.num_preemptions, bool(self.on_their_way)
        waiting, running = list(scheduler.waiting), scheduler.running.copy()
        inside = {chunk.sequence for plan, _ in self.on_their_way for chunk in plan.chunks}
        sampled = {sequence for plan, _ in self.on_their_way for sequence in plan.sampled}
        plan = scheduler.schedule(ahead=len(self.on_their_way))
        if scheduler.num_stages > 1:
            waits = sampled if scheduler.spread_chunks else inside
            assert all(chunk.sequence not in waits for chunk in plan.chunks)
        assert sum(chunk.length for chunk in plan.chunks) <= scheduler.max_batched_tokens
        assert len(plan.chunks) <= scheduler.max_num_seqs
        assert not is_ahead or scheduler.num_preemptions == num_preemptions
        self._check_order(waiting, running)
        if plan.chunks:
            self.on_their_way.append((plan, [c.sequence.table.copy() for c in plan.chunks]))
        elif not is_ahead:
            assert not scheduler.running, "running, but does not move"
        if not is_ahead and scheduler.running and not scheduler.running[0].is_complete:
            # With the order of admission this bounds every wait: of those that are next, somebody moves in every step.
            first = scheduler.running[0]
            moved = [chunk.sequence for chunk in plan.chunks]
            assert any(s.band == first.band for s in moved)
            assert first in moved or first.num_remaining > 1
        return bool(plan.chunks)

    def _check_order(self, waiting: list[Sequence], running: list[Sequence]) -> None:
        """Prove of a plan just made, before which these waited and ran: nobody was overtaken by a later one of its
        tenant or by a lower band, and who had to give way was the last."""
        admitted = [s for s in waiting if s.status is Status.RUNNING]
        left = [s for s in waiting if s.status is Status.WAITING]
        for one in left:
            assert all(s.band <= one.band for s in admitted), "overtaken by a lower band"
            others = [s for s in admitted if s.group.share is one.group.share]
            assert all(s.rank < one.rank for s in others), "overtaken by a later one"
        gone = [s for s in running if s.status is Status.WAITING]
        kept = [s for s in running if s.status is Status.RUNNING]
        assert all(s.rank < one.rank for s in kept for one in gone), "not the last gave way"

    def run(self) -> None:
        for _ in range(10_000):
            if not any(list(group.live()) for group in self.groups):
                return
            assert self.step().chunks, "a step with work to do does nothing"
        raise AssertionError("does not end")

    def check(self) -> None:
        self.pool.check(s.table for group in self.groups for s in group.live())


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt :]


def distinct(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i) % 11 + 1 for i in range(length)]
