"""Pages that must not be evicted: those of explicit caches, and those a reader elsewhere has under lease.

A pin has a name and an end. It holds a slot as of a generation, so one whose page has gone meanwhile (its file
vanished) holds nothing. This module must not know what a page is found by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from services.cache.extent import INDEX_BITS, Extent


@dataclass(slots=True)
class Pin:
    """Place -> generation, until a moment (monotonic seconds)."""

    until: float
    places: dict[int, int] = field(default_factory=dict)


class Pins:
    """Pins of one sort: `counts` says which of a segment's counts they are, `max_bytes` how much they may hold."""

    def __init__(
        self,
        extents: Mapping[int, Extent],
        counts: Callable[[Extent], dict[int, int]],
        max_bytes: float,
    ) -> None:
        self.num_bytes = 0  # of slots held, each counted once
        self._extents = extents
        self._counts = counts
        self._max_bytes = max_bytes
        self._pins: dict[str, Pin] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._pins

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, name: str) -> Pin | None:
        """The pin of this name, to look at."""
        return self._pins.get(name)

    def open(self, name: str, until: float) -> Pin:
        """The pin of this name, made or prolonged."""
        pin = self._pins.setdefault(name, Pin(until))
        pin.until = max(pin.until, until)
        return pin

    def add(self, pin: Pin, extent: Extent, index: int) -> bool:
        """Holds a slot that has a page. False if that would be more than may be held."""
        place = extent.place(index)
        generation = extent.generations[index]
        if pin.places.get(place) == generation:
            return True
        counts = self._counts(extent)
        if index not in counts:
            num_bytes = extent.kind.slot_bytes
            if self.num_bytes + num_bytes > self._max_bytes:
                return False
            self.num_bytes += num_bytes
        extent.pin(counts, index)
        pin.places[place] = generation
        return True

    def close(self, name: str, stamp: Callable[[], int]) -> bool:
        """Lets go of what the pin holds, which counts as a use. True if there was such a pin."""
        pin = self._pins.pop(name, None)
        if pin is None:
            return False
        # Pages given out later come later in their chain, and are to be evicted first.
        for place, generation in sorted(pin.places.items(), key=itemgetter(1), reverse=True):
            extent = self._extents.get(place >> INDEX_BITS)
            index = place & (1 << INDEX_BITS) - 1
            if extent is None or extent.generations[index] != generation:
                continue
            counts = self._counts(extent)
            if index in counts:
                extent.mark_useful(index)
                extent.unpin(counts, index, stamp())
                self.num_bytes -= 0 if index in counts else extent.kind.slot_bytes
        return True

    def forget(self, extent: Extent, index: int) -> None:
        """The slot's page is going, whoever held it."""
        if index in self._counts(extent):
            self.num_bytes -= extent.kind.slot_bytes

    def expired(self, now: float) -> list[str]:
        """Names of the pins whose end has come."""
        return [name for name, pin in self._pins.items() if pin.until <= now]

    def check(self) -> None:
        """Raises AssertionError if the account does not balance."""
        held = sum(len(self._counts(e)) * e.kind.slot_bytes for e in self._extents.values())
        assert self.num_bytes == held <= self._max_bytes
        counts: dict[tuple[int, int], int] = {}
        for pin in self._pins.values():
            for held_place in pin.places.items():
                counts[held_place] = counts.get(held_place, 0) + 1
        for number, extent in self._extents.items():
            for index, count in self._counts(extent).items():
                place = number << INDEX_BITS | index
                assert counts.get((place, extent.generations[index])) == count
