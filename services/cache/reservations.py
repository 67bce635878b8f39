"""Slots that somebody was given and has not written yet. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from shared.arena.segment import PageKind

RESERVE_S: Final = (
    30.0  # for a page to be written; then its slot may go to another page of the same holder
)
PATIENCE_S: Final = 5.0  # before a page that one holder is to write is given to another one as well


@dataclass(slots=True)
class Reservation:
    """`te` (or "", not known any more) is to write a page; `keeps` are the explicit caches that will hold it."""

    te: str
    kind: PageKind
    page_hash: bytes
    since: float
    keeps: set[str] = field(default_factory=set)


class Reservations:
    """By place; the oldest first. Of a page that two are to write, the later reservation answers for it."""

    def __init__(self) -> None:
        self._places: dict[int, Reservation] = {}
        self._pages: dict[tuple[PageKind, bytes], int] = {}

    def __contains__(self, place: int) -> bool:
        return place in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: int, reservation: Reservation) -> None:
        """The place is to be written."""
        self._places[place] = reservation
        self._pages[reservation.kind, reservation.page_hash] = place

    def get(self, place: int) -> Reservation | None:
        """What the place is to be written with."""
        return self._places.get(place)

    def end(self, place: int) -> None:
        """The place has been written, or will not be."""
        reservation = self._places.pop(place)
        page = reservation.kind, reservation.page_hash
        if self._pages.get(page) == place:
            del self._pages[page]

    def awaited(self, te: str, kind: PageKind, page_hash: bytes, now: float) -> Reservation | None:
        """The reservation that makes another one for this page useless. One that somebody else has had for long does
        not: he may never write it."""
        place = self._pages.get((kind, page_hash))
        if place is None:
            return None
        reservation = self._places[place]
        return reservation if reservation.te == te or now - reservation.since < PATIENCE_S else None

    def overdue(self, now: float) -> Iterator[int]:
        """Places that were not written in time; the caller ends each before it asks for the next."""
        while self._places:
            place, reservation = next(iter(self._places.items()))
            if now - reservation.since < RESERVE_S:
                return
            yield place
