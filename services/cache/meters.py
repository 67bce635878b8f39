"""The numbers of a cache service, by the names under which they are scraped.

Everything is kept where it happens and read at the scrape. This module must not change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.cache.arena_service import ArenaService
from services.cache.directory import Directory

SLOT_STATES = ("cached", "kept", "leased", "writing", "free")


class Meters(Collector):
    """What the directory and, while there is one, the arena have to tell."""

    def __init__(self, directory: Directory, arena: Callable[[], ArenaService | None]) -> None:
        self._directory = directory
        self._arena = arena

    def collect(self) -> Iterator[Metric]:
        """At each scrape, in the thread of the metrics port: single reads of numbers, no walk over tables."""
        directory, arena = self._directory, self._arena()
        yield _gauge("entries", "Pages in all indexes.", directory.num_pages)
        yield _gauge("bytes", "What they cost.", directory.num_bytes)
        yield _gauge("tes", "Holders of pages: TEs and arenas.", directory.num_holders)
        yield _gauge("unsynced", "Indexes that are to be asked for.", directory.feeds.num_unsynced)
        yield _count("gaps", "Gaps in the numbers of events so far.", directory.feeds.num_gaps)
        yield _count("refused", "Pages the budget left out so far.", directory.num_refused)
        yield _gauge("arena_owned", "Whether this service owns its host's arena.", bool(arena))
        if arena is not None:
            yield from _of(arena)


def _of(arena: ArenaService) -> Iterable[Metric]:
    host, broker, leases = arena.host, arena.broker, arena.leases
    yield _gauge("arena_bytes_max", "The arena's byte budget.", host.max_bytes)
    kinds = list(host.accounts.get("arena", {}).values())
    slots = GaugeMetricFamily(
        "deepflow_cache_arena_slots", "Slots of the arena by state.", labels=["state"]
    )
    for state in SLOT_STATES:
        slots.add_metric([state], sum(kind[state] for kind in kinds))
    yield slots
    ssd = host.accounts.get("ssd", {})
    yield _gauge("ssd_bytes", "Bytes of the SSD's files.", ssd.get("bytes", 0))
    yield _gauge("ssd_pages", "Pages on the SSD.", ssd.get("pages", 0))
    yield _count("ssd_damaged", "Records found torn or damaged.", ssd.get("dropped", 0))
    yield _gauge("leases", "Leases of other hosts.", leases.num_leases)
    yield _gauge("leased_bytes", "Bytes they pin.", leases.num_bytes)
    yield _count("leases_granted", "Leases so far.", leases.num_granted)
    yield _gauge("moving_bytes", "Bytes on their way into the arena.", broker.num_bytes)
    yield _gauge("tickets", "Tickets that are not over.", broker.num_tickets)
    yield _count("joined_pages", "Pages asked for while on their way.", broker.num_joined)
    for name, text, label, counts in (
        ("pages", "Pages by what became of them.", "event", host.counts),
        ("decisions", "Populates by outcome.", "outcome", broker.outcomes),
        ("fetched_pages", "Pages that came from elsewhere.", "source", broker.pages),
        ("fetch_faults", "Fetches that ended early.", "source", broker.faults),
    ):
        family = CounterMetricFamily(f"deepflow_cache_{name}", text, labels=[label])
        for value, number in list(counts.items()):
            family.add_metric([value], number)
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"deepflow_cache_{name}", text, value=float(value))


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"deepflow_cache_{name}", text, value=float(value))
