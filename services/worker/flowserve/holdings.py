"""What sequences hold of the pool: pages offered to the prefix index, sources of what they take over, and their return.

This module must not know who goes first, or what a step is.
"""

from __future__ import annotations

from services.worker.flowserve.rtc.chunks import ChunkTable
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.sequence import Sequence


class Holdings:
    """Of all sequences of one scheduler. Without a `chunk_table` nothing is taken over."""

    def __init__(self, pool: RtcMaster, *, page: int) -> None:
        self.chunk_table: ChunkTable | None = None
        self._pool = pool
        self._page = page

    def take_over(self, sequence: Sequence, num_found: int) -> None:
        """Find the chunks of its prompt, of which `num_found` tokens were found as a prefix, and hold their sources."""
        chunks = sequence.group.chunks
        if self.chunk_table is not None and chunks:
            sequence.taken = self.chunk_table.take(chunks, sequence.num_prompt, num_found)

    def drop_sources(self, sequence: Sequence) -> None:
        """Nothing (more) is taken over by this sequence."""
        for one in sequence.taken:
            self._pool.free(one.source)
        sequence.taken = []

    def index(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the full pages among the first `num_tokens` computed tokens to the prefix index."""
        num_pages = min(num_tokens, sequence.num_exact) // self._page
        if num_pages > sequence.num_indexed:
            hashes = sequence.page_hashes(num_pages)
            for index in range(sequence.num_indexed, num_pages):
                before = hashes[index - 1] if index else None
                self._pool.store(sequence.table[index], hashes[index], before)
            sequence.num_indexed = num_pages

    def trim(self, sequence: Sequence, keep: int) -> None:
        """Take output pages past `keep` tokens out of the index (a preemption or an end may have put them in)."""
        num_pages = (sequence.num_prompt + keep) // self._page
        for page_hash in reversed(sequence.hashes[num_pages:]):
            self._pool.forget(page_hash)

    def give_back(self, sequence: Sequence) -> None:
        """All its blocks; what is indexed of them stays cached."""
        self.drop_sources(sequence)
        self._pool.free(sequence.table)
        sequence.table = []
        sequence.num_indexed = 0
