"""What the RTC master has promised: tickets of pages to come, leases on pages for others, and named caches.

Plain state, which the master keeps. A promise saves work and never stops any: see `RtcMaster`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """How a ticket is getting on. DONE: all its pages are in the index. FAILED: some are not, and nothing moves."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """Consecutive pages that somebody wants on the device, behind the page `before` (None: a chain's first).

    `own` are positions in `hashes` of the pages that it brings itself, into `blocks`, in order; `awaited` are pages
    that other tickets bring. `held` are indexed pages that it holds.
    """

    hashes: list[bytes]
    before: bytes | None
    own: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    awaited: set[bytes] = field(default_factory=set)
    held: list[int] = field(default_factory=list)
    is_landed: bool = False
    is_closed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Arrival:
    """A page that is moving in, the ticket that brings it, and those that wait for it."""

    ticket: Ticket
    waiting: list[Ticket] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lease:
    """Indexed pages held for `owner` until `until`. Ids are given once in the life of a master: the generation."""

    id: str
    owner: str
    until: float
    hashes: list[bytes]
    blocks: list[int]


@dataclass(slots=True, kw_only=True, eq=False)
class Kept:
    """The pages of a named cache; `pinned` is the last one that is held on the device, NONE if none is."""

    hashes: list[bytes]
    until: float
    pinned: int
    num_pinned: int
