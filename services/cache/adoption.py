"""Which segments change hands: the orphan worth adopting, and the one that its holder should give back. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from services.cache.extent import Extent
from services.cache.extents import Extents
from shared.arena.segment import PageKind


def best_orphan(extents: Iterable[Extent], kind: PageKind, before: int) -> Extent | None:
    """The orphan that somebody whose segments are full should take for pages of a kind; None if its own coldest page,
    which was used last at `before`, is a better victim.

    One of the same kind is adopted with its pages: at once if it has free slots, else if its coldest page is colder.
    One of another kind would be emptied: so only if all of it is colder, and nothing of it is pinned.
    """
    best, best_age = None, before
    for extent in extents:
        if not extent.orphan:
            continue
        if extent.kind == kind:
            age = -1 if extent.num_free else extent.age()
        elif extent.keeps or extent.leases:
            continue
        else:
            age = extent.last_use()
        if age < best_age:
            best, best_age = extent, age
    return best


class Wanted:
    """The segments that their holders were asked to give back, at most one for each who has no room."""

    def __init__(self, extents: Extents) -> None:
        self._extents = extents
        self._asked: dict[str, str] = {}  # asker -> segment

    def ask_the_richest(self, te: str, before: int) -> None:
        """`te` has no room: a segment that was not used since `before` is `wanted` from now on, unless one is already,
        or `te` has its share."""
        extents = self._extents
        asked = {asker: extents.named(name) for asker, name in self._asked.items()}
        self._asked = {asker: e.name for asker, e in asked.items() if e is not None and e.wanted}
        if te not in self._asked:
            extent = _to_give_back(extents, te, before)
            if extent is not None:
                extent.wanted = True
                self._asked[te] = extent.name


def _to_give_back(extents: Extents, te: str, before: int) -> Extent | None:
    """The segment that the richest holder should give to `te`, which has no room: its coldest. None if `te` has its
    share, which is an equal one, if nobody has more than that, or if all was used since `before`."""
    held = [extent for extent in extents if extent.holder]
    riches = Counter(extent.holder for extent in held)
    mine = riches.pop(te, 0)
    if not riches:
        return None
    richest, most = max(riches.items(), key=lambda item: item[1])
    share = max(1, extents.max_bytes // extents.segment_bytes // (len(riches) + 1))
    if mine >= share or (most <= share and most <= mine + 1):
        return None
    coldest = min(
        (e for e in held if e.holder == richest and not e.wanted and not e.keeps and not e.leases),
        key=Extent.last_use,
        default=None,
    )
    return coldest if coldest is not None and coldest.last_use() < before else None
