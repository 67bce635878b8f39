"""What a cache could find at best in a trace, were each request over before the next: one cache for all TEs. Pure.

The bars of the policies' hits: without bounds (`ideal`), and as large as all TEs' caches together (`pooled`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from deepflow.sim.trace import BLOCK, Call


class Cache:
    """An LRU of so many blocks, 0 for one without bounds; the end of a prompt goes before its beginning."""

    def __init__(self, num_blocks: int = 0) -> None:
        self._num_blocks = num_blocks
        self._held: OrderedDict[int, None] = OrderedDict()

    def num_found(self, call: Call) -> int:
        """Leading blocks of its prompt that are here; the last token is always computed."""
        asked = call.hash_ids[: (call.input_length - 1) // BLOCK]
        return next((n for n, one in enumerate(asked) if one not in self._held), len(asked))

    def use(self, call: Call) -> tuple[list[int], list[int]]:
        """Its full blocks are here now: those that were not before, and those that had to go."""
        full = full_blocks(call)
        stored = [one for one in full if one not in self._held]
        for one in reversed(full):
            self._held[one] = None
            self._held.move_to_end(one)
        removed = []
        while self._num_blocks and len(self._held) > self._num_blocks:
            removed.append(self._held.popitem(last=False)[0])
        return stored, removed


def full_blocks(call: Call) -> Sequence[int]:
    """What can be found again of its prompt."""
    return call.hash_ids[: call.input_length // BLOCK]


def ideal(calls: Iterable[Call]) -> int:
    """Tokens of prompts found, in full blocks."""
    return pooled(calls, 0)


def pooled(calls: Iterable[Call], num_blocks: int) -> int:
    """Tokens of prompts found by one cache of so many blocks, 0 for one without bounds."""
    cache = Cache(num_blocks)
    found = 0
    for call in calls:
        found += cache.num_found(call)
        cache.use(call)
    return found * BLOCK
