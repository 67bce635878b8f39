"""Is a page better fetched than computed, and from where? Pure: availability, speeds and the clock are passed in.

`plan` splits the missing pages of a chain into runs, each from the source that makes the whole cheapest, and ends
where computing the rest is cheaper (PAPER: populate only if that takes less than prefill would). `Speeds` is what the
sources are known to do: measured where they were used lately, a prior otherwise. This module must not know what a
source is, only what it costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

SOURCES_KNOWN: Final = 256  # speeds remembered; the longest unused is forgotten
WEIGHT: Final = 0.25  # of a new measurement against all before it
HALF_LIFE_S: Final = 120.0  # of the trust in a measurement: what was slow once deserves another try
BACK_OFF_S: Final = 1.0  # after a failure, doubled by each further one in a row
BACK_OFF_MAX_S: Final = 60.0


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True)
class Source:
    """Where pages can be had: `has[i]` tells for page i of the chain. Costs are in microseconds.

    `start_us` is paid at the start of each run, `page_us` per page. Behind a `last` source comes no other: who reads
    there does so itself, after all that others have fetched for it.
    """

    name: str
    has: Sequence[bool]
    start_us: float
    page_us: float
    last: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Pages [start, stop) of a chain come from `source`."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to fetch: adjacent runs from page 0 on. Pages behind the last run are computed."""

    runs: list[Run]
    fetch_us: float  # of all runs, one after the other
    total_us: float  # with computing the rest
    compute_us: float  # of everything, had nothing been fetched

    @property
    def num_pages(self) -> int:
        """How many pages are fetched."""
        return self.runs[-1].stop if self.runs else 0


def plan(num_pages: int, compute_us: float, sources: Sequence[Source]) -> Plan:
    """The cheapest way to `num_pages` pages, each of which takes `compute_us` to compute.

    Dynamic programming from the last page to the first; between two pages at which any source's stock changes, nothing
    is decided, so it runs over those stretches: O(stretches x sources). Of equally cheap ways it takes the one that
    fetches less, then the one with the source named first.
    """
    cuts = _cuts(num_pages, sources)
    # best[k]: (cost from cut k on, the source of the run that starts there or None to compute all the rest).
    # going[k][s]: cost from cut k on while a run from source s goes on, and whether it goes on behind the next cut.
    num_cuts = len(cuts)
    best: list[tuple[float, int | None]] = [(0.0, None)] * num_cuts
    going: list[list[tuple[float, bool] | None]] = [[None] * len(sources) for _ in cuts]
    for k in range(num_cuts - 2, -1, -1):
        length = cuts[k + 1] - cuts[k]
        rest_us = (num_pages - cuts[k + 1]) * compute_us
        choice: tuple[float, int | None] = ((num_pages - cuts[k]) * compute_us, None)
        for s, source in enumerate(sources):
            if not source.has[cuts[k]]:
                continue
            after = rest_us if source.last else best[k + 1][0]
            onward = going[k + 1][s]
            # A start that costs nothing is no reason to split a run.
            again = not source.last and best[k + 1][1] == s
            goes_on = onward is not None and (onward[0] < after or (again and onward[0] == after))
            if onward is not None and goes_on:
                after = onward[0]
            cost = length * source.page_us + after
            going[k][s] = (cost, goes_on)
            if source.start_us + cost < choice[0]:
                choice = (source.start_us + cost, s)
        best[k] = choice
    runs = _runs(cuts, sources, best, going)
    computed_us = (num_pages - (runs[-1].stop if runs else 0)) * compute_us
    total_us = best[0][0] if num_pages else 0.0
    return Plan(runs, total_us - computed_us, total_us, num_pages * compute_us)


def _cuts(num_pages: int, sources: Sequence[Source]) -> list[int]:
    """The pages before which some source's stock changes, with both ends."""
    cuts = {0, num_pages}
    for source in sources:
        has = source.has
        cuts.update(i for i in range(1, num_pages) if has[i] != has[i - 1])
    return sorted(cuts)


def _runs(
    cuts: list[int],
    sources: Sequence[Source],
    best: list[tuple[float, int | None]],
    going: list[list[tuple[float, bool] | None]],
) -> list[Run]:
    runs: list[Run] = []
    k = 0
    while (s := best[k][1]) is not None:
        start = k
        while True:
            step = going[k][s]
            assert step is not None
            k += 1
            if not step[1]:
                break
        runs.append(Run(sources[s].name, cuts[start], cuts[k]))
        if sources[s].last:
            break
    return runs


# ----------------------------------------------------------------------------------------------------------- speeds


@dataclass(frozen=True, slots=True)
class Speed:
    """What one source does: a run starts after `start_s`, then bytes come at `bytes_per_s`."""

    start_s: float
    bytes_per_s: float

    def us(self, num_bytes: int) -> float:
        """The time of `num_bytes` without the start."""
        return num_bytes / self.bytes_per_s * 1e6


@dataclass(slots=True)
class _Known:
    speed: Speed
    at: float
    num_failures: int = 0
    avoid_until: float = 0.0
    measured: bool = False
    num_pending_bytes: int = 0


class Speeds:
    """The speeds of sources by name; `priors` are those of their kinds, the part of a name before the first colon."""

    def __init__(self, priors: dict[str, Speed]) -> None:
        self._priors = priors
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def of(self, source: str, now: float) -> Speed:
        """The speed to expect: the measured one, faded towards the prior with age; a queue before it delays the start.

        Raises KeyError for a kind without a prior.
        """
        prior = self._priors[source.partition(":")[0]]
        known = self._known.get(source)
        if known is None:
            return prior
        speed = self._faded(known, prior, now)
        return replace(speed, start_s=speed.start_s + known.num_pending_bytes / speed.bytes_per_s)

    def usable(self, source: str, now: float) -> bool:
        """False for a while after a failure."""
        known = self._known.get(source)
        return known is None or known.avoid_until <= now

    def queued(self, source: str, num_bytes: int, now: float) -> None:
        """So many bytes more (less, if negative) are being had from there: whoever comes next waits for them."""
        known = self._entry(source, now)
        known.num_pending_bytes = max(known.num_pending_bytes + num_bytes, 0)

    def measured(
        self, source: str, *, start_s: float | None, num_bytes: int, seconds: float, now: float
    ) -> None:
        """`num_bytes` came in `seconds`, after `start_s` (None: part of the seconds). A success ends any back-off."""
        known = self._entry(source, now)
        prior = self._priors[source.partition(":")[0]]
        before = self._faded(known, prior, now)
        rate = num_bytes / max(seconds, 1e-6)
        if start_s is None:
            start_s = before.start_s
        if known.measured:
            # The mean of times, not of rates: a stall counts as long as it lasted.
            rate = 1 / (WEIGHT / max(rate, 1.0) + (1 - WEIGHT) / before.bytes_per_s)
            start_s = WEIGHT * start_s + (1 - WEIGHT) * before.start_s
        known.speed = Speed(start_s, max(rate, 1.0))
        known.at, known.measured = now, True
        known.num_failures, known.avoid_until = 0, 0.0

    def failed(self, source: str, now: float) -> None:
        """It did not answer, or not in time."""
        known = self._entry(source, now)
        known.avoid_until = now + min(BACK_OFF_S * 2.0**known.num_failures, BACK_OFF_MAX_S)
        known.num_failures += 1

    def forget(self, source: str) -> None:
        """It is gone for good."""
        self._known.pop(source, None)

    def table(self, now: float) -> dict[str, dict[str, float]]:
        """For people: per source the start in ms, the rate in MB/s, and for how long it is avoided still."""
        table = {}
        for source, known in self._known.items():
            speed = self.of(source, now)
            table[source] = {
                "start_ms": round(speed.start_s * 1e3, 2),
                "mb_per_s": round(speed.bytes_per_s / 1e6, 1),
                "avoided_s": round(max(known.avoid_until - now, 0.0), 1),
            }
        return table

    def _entry(self, source: str, now: float) -> _Known:
        known = self._known.get(source)
        if known is None:
            if len(self._known) >= SOURCES_KNOWN:
                # What is in use has an account to settle: it stays, and there are never many of those.
                idle = next(
                    (n for n, other in self._known.items() if not other.num_pending_bytes), ""
                )
                self._known.pop(idle, None)
            known = self._known[source] = _Known(self._priors[source.partition(":")[0]], now)
        self._known.move_to_end(source)
        return known

    @staticmethod
    def _faded(known: _Known, prior: Speed, now: float) -> Speed:
        if not known.measured:
            return prior
        trust = 0.5 ** (max(now - known.at, 0.0) / HALF_LIFE_S)
        return Speed(
            start_s=trust * known.speed.start_s + (1 - trust) * prior.start_s,
            bytes_per_s=1 / (trust / known.speed.bytes_per_s + (1 - trust) / prior.bytes_per_s),
        )
