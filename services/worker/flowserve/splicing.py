"""Prompts with chunks: a chunk that is not cached is first computed alone, as a prompt of the engine's own.

The request waits for that, as others wait for pages from elsewhere, and is then admitted with what the cache has of its
chunks; whatever is missing by then it computes in place. This module must not know the decoder, or who asks.
"""

from __future__ import annotations

import math

from services.worker.flowserve.life import local_request
from services.worker.flowserve.rtc.chunks import Chunk, ChunkTable
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from shared.messages import Sampling


class Splicing:
    """The engine's own prompts, and the requests that wait for them. `groups` are under way, by their chunks' names.

    Without a table nothing is taken over, and requests are as if they had no chunks.
    """

    def __init__(self, scheduler: Scheduler, table: ChunkTable | None) -> None:
        self.groups: dict[bytes, SequenceGroup] = {}
        self._scheduler = scheduler
        self._table = scheduler.holdings.chunk_table = table

    def begin(self, group: SequenceGroup) -> list[SequenceGroup]:
        """Find the chunks of a group that was just added, and let it wait if some are not cached.

        Returns whose pages may be asked for elsewhere: its own, or, of one with chunks, those of what it waits for.
        """
        if self._table is None or not group.request.chunks:
            return [group]
        self._drop_orphans(self._table)
        first = next((s for s in group.sequences if s.status is Status.WAITING), None)
        if first is None:
            return []
        hashes = first.page_hashes((first.num_known - 1) // group.page)
        group.chunks = self._table.chunks(group.request, hashes)
        new = self._table.wait(first, group.chunks)
        if new is None:
            return []
        self._scheduler.fetch(first)
        group.alone = [self._alone(chunk, group) for chunk in new]
        for one in group.alone:
            self._scheduler.add(one)
        return group.alone

    def ended(self, sequence: Sequence) -> bool:
        """Whether a sequence that has ended was one of these; then the requests that waited for it go on."""
        name = sequence.group.chunk
        if self._table is None or name is None:
            return False
        del self.groups[name]
        for waiter in self._table.computed(name):
            if isinstance(waiter, Sequence) and waiter.status is Status.FETCHING:
                self._scheduler.fetched(waiter)
        return True

    def fail(self, sequence: Sequence) -> bool:
        """End a live sequence for a fault in its step, if it is one of these."""
        if sequence.group.chunk is None:
            return False
        self._scheduler.end(sequence, "failed")
        return self.ended(sequence)

    def _drop_orphans(self, table: ChunkTable) -> None:
        """End the prompts for which nobody waits any more: who comes and goes leaves no queue of them behind."""
        for name, group in list(self.groups.items()):
            waiters = table.waiters(name)
            if not any(isinstance(w, Sequence) and w.status is Status.FETCHING for w in waiters):
                [sequence] = group.sequences
                self._scheduler.end(sequence, "cancelled")
                self.ended(sequence)

    def _alone(self, chunk: Chunk, group: SequenceGroup) -> SequenceGroup:
        """A chunk as a prompt, of the age of the one that needs it."""
        request = local_request(
            f"{group.request.request}+{chunk.start}",
            chunk.ids,
            Sampling(max_tokens=1, seed=0, temperature=0.0, ignore_eos=True),
            root=group.request.root,
            tenant=group.request.tenant,
            band=group.request.band,
        )
        alone = SequenceGroup(
            request,
            arrival=group.arrival,
            deadline=math.inf,
            page=group.page,
            context=group.context,
            eos_ids=frozenset(),
        )
        alone.chunk = chunk.name
        self.groups[chunk.name] = alone
        return alone
