"""The chunk table: parts of prompts found in the cache by their content, whatever stands before them (`pic.py`).

A chunk's pages are cached as those of a prompt of its own, under a chain of hashes that begins at the tenant's root, so
the prefix index finds them, tenants stay apart, and eviction, the arena and the ledger are the ordinary ones. What is
added here: which part of which chunk a prompt takes over, and who waits for a chunk that is being computed alone. Pure;
it must not know tensors, or how anything is scheduled.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from services.worker.flowserve import pic
from services.worker.flowserve.decoder import Splice
from services.worker.flowserve.rtc.pool import BlockPool
from shared import blockhash
from shared.messages import Request


class Chunk(NamedTuple):
    """Full pages of a prompt's part, from `start` on: their tokens, and their hashes as of a prompt of their own.

    The last hash is its name: who has that page has all of them.
    """

    start: int
    ids: list[int]
    hashes: list[bytes]

    @property
    def name(self) -> bytes:
        return self.hashes[-1]


class Taken(NamedTuple):
    """Positions start to stop of a sequence, to be taken over from `source_start` on of the block table `source`."""

    start: int
    stop: int
    source: list[int]
    source_start: int

    def splice(self, table: Sequence[int]) -> Splice:
        """The same for a decoder, into the sequence's own block table."""
        return Splice(self.source, self.source_start, table, self.start, self.stop - self.start)


class ChunkTable:
    """Over the pages of one pool. The first `num_recomputed` tokens of a chunk are never taken over."""

    def __init__(self, pool: BlockPool, *, page: int, num_recomputed: int) -> None:
        self._pool = pool
        self._page = page
        self._num_recomputed = num_recomputed
        # What each waits for; and the other way, for all chunks that are being computed.
        self._waiting: dict[Hashable, set[bytes]] = {}
        self._wanted: dict[bytes, list[Hashable]] = {}

    def chunks(self, request: Request, hashes: Sequence[bytes]) -> list[Chunk]:
        """The chunks of a prompt of which there is something to take over, once they are cached, beyond those of the
        prompt's own pages, `hashes`, that are found as a prefix."""
        page, num_prompt = self._page, len(request.prompt)
        num_found = self._pool.num_present(hashes) * page
        found = []
        for start, stop in request.chunks:
            if pic.taken_over((start, stop), num_prompt, page, self._num_recomputed, num_found):
                ids = request.prompt[start : start + (stop - start) // page * page]
                found.append(Chunk(start, ids, blockhash.chain(request.root, ids, page)))
        return found

    # ------------------------------------------------------------------------------------------------- taking over

    def take(self, chunks: Iterable[Chunk], num_prompt: int, num_found: int) -> list[Taken]:
        """What a prompt takes over now, with references on the blocks it comes from; its first `num_found` positions
        were found as a prefix. What is not in the cache (any more) is for the prompt itself to compute."""
        page, taken = self._page, []
        for chunk in chunks:
            source = self._pool.match_by_prefix_token(chunk.hashes)
            found = (chunk.start, chunk.start + len(source) * page)
            positions = pic.taken_over(found, num_prompt, page, self._num_recomputed, num_found)
            if positions:
                begin = positions.start - chunk.start
                taken.append(Taken(positions.start, positions.stop, source, begin))
            else:
                self._pool.free(source)
        return taken

    # ---------------------------------------------------------------------------------------------------- waiting

    def wait(self, waiter: Hashable, chunks: Sequence[Chunk]) -> list[Chunk] | None:
        """Let `waiter` wait for those of its chunks that are not in the cache; those of them that nobody computes yet
        are returned. None: it has nothing to wait for."""
        pool = self._pool
        missing = {c.name: c for c in chunks if pool.num_present(c.hashes) < len(c.hashes)}
        if not missing:
            return None
        new = [chunk for name, chunk in missing.items() if name not in self._wanted]
        self._waiting[waiter] = set(missing)
        for name in missing:
            self._wanted.setdefault(name, []).append(waiter)
        return new

    def waiters(self, name: bytes) -> list[Hashable]:
        """Who waits for a chunk that is being computed."""
        return self._wanted.get(name, [])

    def computed(self, name: bytes) -> list[Hashable]:
        """A chunk is computed, or will not be: who has nothing to wait for any more."""
        free = []
        for waiter in self._wanted.pop(name, ()):
            names = self._waiting[waiter]
            names.discard(name)
            if not names:
                del self._waiting[waiter]
                free.append(waiter)
        return free
