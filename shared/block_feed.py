"""Block events put in order: which of them may be applied now, and whose index is to be asked for whole. Pure.

Each holder (a TE, a cache service) numbers the events of each of its models from 1. An event that arrives out of turn
waits; while one waits, or when a holder is met for the first time in mid-life, its feed is *unsynced* until a dump
of the whole index comes. An event that waits counts its pages, and no feed lets more than `MAX_WAITING_PAGES` wait.
This module must not know what is made of the events: the directory of a cache service and the prompt trees of a Job
Executor each keep an index of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from shared.rtc_messages import BlockEvents, BlocksDump

MAX_WAITING_PAGES: Final = 16_384  # of one feed, in events that arrived out of turn


@dataclass(slots=True)
class _Feed:
    """One holder's events of one model. `seq` is the last one in turn, `heard` the last one of all; `waiting` are those
    that came too early, as far as there was room for them."""

    seq: int = 0
    heard: int = 0
    synced: bool = False
    waiting: dict[int, BlockEvents] = field(default_factory=dict)
    num_waiting_pages: int = 0


class BlockFeeds:
    """The feeds of all holders; bounded by the holders that are not removed."""

    def __init__(self) -> None:
        self.num_gaps = 0
        self._holders: dict[str, dict[str, _Feed]] = {}  # holder -> model -> feed

    @property
    def num_unsynced(self) -> int:
        """Indexes that are to be asked for. For the thread of the metrics port as well: it copies, then counts."""
        return sum(
            not feed.synced
            for feeds in list(self._holders.values())
            for feed in list(feeds.values())
        )

    def seen(self, holder: str, model: str) -> None:
        """A holder lives. One not known yet may hold anything: it is unsynced."""
        self._holders.setdefault(holder, {}).setdefault(model, _Feed())

    def take(self, events: BlockEvents) -> list[BlockEvents]:
        """What is to be applied now, in order: nothing if `events` is old or early, else it and those it was missing
        to. The first event of a feed that nobody has `seen` opens it: from number 1 on nothing is missing."""
        feeds = self._holders.setdefault(events.te, {})
        feed = feeds.get(events.model)
        if feed is None:
            feed = feeds[events.model] = _Feed(synced=events.seq == 1)
        if events.seq <= feed.seq:
            return []
        feed.heard = max(feed.heard, events.seq)
        if events.seq != feed.seq + 1:
            self._wait(feed, events)
            return []
        feed.seq = events.seq
        return [events, *_in_turn(feed)] if feed.waiting else [events]

    def load(self, dump: BlocksDump) -> list[BlockEvents] | None:
        """What is to be applied on top of a whole index; None if it is older than what was applied already, and so
        says nothing new."""
        feed = self._holders.setdefault(dump.te, {}).setdefault(dump.model, _Feed())
        if dump.seq < feed.seq:
            feed.synced = feed.synced or feed.seq == feed.heard
            return None
        feed.seq, feed.heard = dump.seq, max(feed.heard, dump.seq)
        for seq in [seq for seq in feed.waiting if seq <= dump.seq]:
            _drop(feed, seq)
        later = _in_turn(feed)
        feed.synced = feed.seq == feed.heard
        return later

    def remove(self, holder: str) -> bool:
        """The holder is gone. True if it was known."""
        return self._holders.pop(holder, None) is not None

    def doubt(self, holder: str | None = None, model: str | None = None) -> None:
        """Events may have been lost unseen (None: of everybody): these indexes are to be asked for again."""
        for name, feeds in self._holders.items():
            for of, feed in feeds.items():
                if holder in (None, name) and model in (None, of):
                    feed.synced = False

    def unsynced(self) -> list[tuple[str, str]]:
        """(holder, model) of the indexes that are to be asked for."""
        return [
            (holder, model)
            for holder, feeds in self._holders.items()
            for model, feed in feeds.items()
            if not feed.synced
        ]

    def check(self) -> None:
        """Raises AssertionError if the account does not balance or the bound is passed. For tests and `status`."""
        for feed in self._all():
            waiting = sum(map(_num_hashes, feed.waiting.values()))
            assert waiting == feed.num_waiting_pages <= MAX_WAITING_PAGES
            assert feed.seq == feed.heard if feed.synced else feed.seq <= feed.heard
            assert all(seq > feed.seq + 1 for seq in feed.waiting)

    def _all(self) -> Iterator[_Feed]:
        for feeds in self._holders.values():
            yield from feeds.values()

    def _wait(self, feed: _Feed, events: BlockEvents) -> None:
        if feed.synced:
            self.num_gaps += 1
        feed.synced = False
        if events.seq in feed.waiting:
            return
        cost = _num_hashes(events)
        if feed.num_waiting_pages + cost > MAX_WAITING_PAGES:
            # A dump that comes now is too old, and followed by the next one: nothing is lost for good.
            feed.waiting.clear()
            feed.num_waiting_pages = 0
            return
        feed.waiting[events.seq] = events
        feed.num_waiting_pages += cost


def _in_turn(feed: _Feed) -> list[BlockEvents]:
    """The waiting events whose turn it is."""
    events = []
    while (event := feed.waiting.get(feed.seq + 1)) is not None:
        _drop(feed, event.seq)
        feed.seq = event.seq
        events.append(event)
    return events


def _drop(feed: _Feed, seq: int) -> None:
    feed.num_waiting_pages -= _num_hashes(feed.waiting.pop(seq))


def _num_hashes(events: BlockEvents) -> int:
    """What an event costs while it waits; one without pages still costs something."""
    return 1 + len(events.stored) + len(events.removed)
