"""Whose turn it is: bands in strict order, the tenants of a band by what each got, a tenant's own by age.

Within a band this is the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024):
whoever serves a tenant adds the cost to its share, and who got least is next. A tenant that begins to wait is lifted to
the least of those that wait, or, if nobody does, to the one that went last: what it did not ask for before is not saved
up. So of two tenants of one band that wait all the time, neither gets more than the other plus what one of them can
be given between two turns, however many prompts it sends, and whoever it is: nobody who waits is overtaken without
end by others of its band. A band waits for as long as higher bands take all there is.

Pure. This module must not know what waits, or what it costs.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# Remembered, beside those of which something waits. Of a tenant that did not come while so many others did, it is
# forgotten what it got.
MAX_SHARES: Final = 1024


@dataclass(slots=True, eq=False)
class Share(Generic[T]):
    """What one tenant got in one band (`served`, in whatever is counted), and what of its waits, oldest first."""

    band: int
    tenant: str
    served: int = 0
    waiting: list[T] = field(default_factory=list)


class FairQueue(Generic[T]):
    """All that waits in one place. `age` orders what one tenant sends. All costs are in tenants that wait, not in what
    they sent. May be iterated from another thread."""

    def __init__(self, age: Callable[[T], tuple[int, ...]]) -> None:
        self._age = age
        self._shares: OrderedDict[tuple[int, str], Share[T]] = OrderedDict()  # latest used last
        self._waiting: dict[Share[T], None] = {}  # those of which something waits
        self._last: dict[int, Share[T]] = {}  # of each band, the one that went last

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(len(share.waiting) for share in list(self._waiting))

    def __iter__(self) -> Iterator[T]:
        """All that waits: each tenant's by age, the tenants in no order."""
        for share in list(self._waiting):
            yield from share.waiting.copy()

    def share(self, band: int, tenant: str) -> Share[T]:
        """The share of a tenant in a band."""
        key = band, tenant
        share = self._shares.get(key)
        if share is None:
            if len(self._shares) >= MAX_SHARES:
                idle = next((k for k, s in self._shares.items() if not s.waiting), None)
                if idle is not None:
                    del self._shares[idle]
            share = self._shares[key] = Share(band, tenant)
        self._shares.move_to_end(key)
        return share

    def add(self, share: Share[T], item: T, *, is_new: bool = True) -> None:
        """Let it wait, in the place that its age gives it. Not `is_new`: it waited before, so its tenant does not begin
        to."""
        if not share.waiting and is_new:
            others = [s.served for s in self._waiting if s.band == share.band]
            last = self._last.get(share.band)
            share.served = max(share.served, min(others) if others else last.served if last else 0)
        self._waiting[share] = None
        insort(share.waiting, item, key=self._age)

    def remove(self, share: Share[T], item: T) -> None:
        """It waits no longer, for whatever reason."""
        share.waiting.remove(item)
        self._last[share.band] = share
        if not share.waiting:
            del self._waiting[share]

    def first(self) -> T | None:
        """What is to be served next; None if nothing waits."""
        if not self._waiting:
            return None
        if len(self._waiting) == 1:
            return next(iter(self._waiting)).waiting[0]
        return min(self._waiting, key=lambda share: self.turn(share, share.waiting[0])).waiting[0]

    def turn(self, share: Share[T], item: T) -> tuple[int, int, tuple[int, ...]]:
        """Sorts what may be served, waiting or not: the smallest is next."""
        return share.band, share.served, self._age(item)
