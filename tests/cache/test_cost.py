"""The cost model against brute force, and the memory of speeds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache.cost import (
    BACK_OFF_MAX_S,
    BACK_OFF_S,
    HALF_LIFE_S,
    SOURCES_KNOWN,
    Run,
    Source,
    Speed,
    Speeds,
    plan,
)


def source(
    name: str, has: str, start_us: float = 0, page_us: float = 1, *, last: bool = False
) -> Source:
    """A source with the pages marked by an x."""
    return Source(name, [mark == "x" for mark in has], start_us, page_us, last)


def test_nothing_is_fetched_that_is_computed_faster() -> None:
    """A source slower than computing, or not worth its start for so few pages, is left alone."""
    assert plan(4, 10, [source("a", "xxxx", page_us=10)]).runs == []
    assert plan(4, 10, [source("a", "xxxx", start_us=36, page_us=1)]).runs == []
    assert plan(4, 10, [source("a", "xxxx", start_us=35, page_us=1)]).runs == [Run("a", 0, 4)]
    assert plan(0, 10, []).runs == []


def test_each_run_comes_from_its_cheapest_source() -> None:
    """The near source gives what it has, the far one what is missing in between, and behind a hole all is computed."""
    near, far = source("near", "xx--xx", page_us=1), source("far", "xxxx--", 5, 2)
    made = plan(6, 10, [near, far])
    assert made.runs == [Run("near", 0, 2), Run("far", 2, 4), Run("near", 4, 6)]
    assert (made.fetch_us, made.total_us, made.compute_us) == (13, 13, 60)
    made = plan(6, 10, [source("near", "xx-xxx")])
    assert (made.runs, made.num_pages, made.total_us) == ([Run("near", 0, 2)], 2, 42)


def test_a_run_goes_on_rather_than_to_pay_a_start_twice() -> None:
    """A cheaper source in the middle is not worth the second start of the dearer one behind it."""
    dear, cheap = source("dear", "xxx", 10, 3), source("cheap", "-x-", 0, 1)
    assert plan(3, 100, [dear, cheap]).runs == [Run("dear", 0, 3)]


def test_nothing_comes_behind_a_last_source() -> None:
    """What the asker reads by itself ends the plan."""
    peer, near = source("peer", "xx--", last=True), source("near", "--xx")
    assert plan(4, 10, [peer, near]).runs == [Run("peer", 0, 2)]


@st.composite
def sources(draw: st.DrawFn) -> tuple[int, list[Source]]:
    """A short chain and up to three sources of parts of it."""
    num_pages = draw(st.integers(0, 5))
    made = [
        Source(
            name,
            draw(st.lists(st.booleans(), min_size=num_pages, max_size=num_pages)),
            draw(st.integers(0, 30)),
            draw(st.integers(0, 12)),
            draw(st.booleans()),
        )
        for name in "abc"[: draw(st.integers(0, 3))]
    ]
    return num_pages, made


def price(way: tuple[int, ...], num_pages: int, found: list[Source], compute_us: float) -> float:
    """What it costs to have page i from source `way[i]`, and to compute the rest; infinite for what cannot be."""
    total = (num_pages - len(way)) * compute_us
    for i, s in enumerate(way):
        if not found[s].has[i] or any(found[before].last and before != s for before in way[:i]):
            return float("inf")
        total += found[s].page_us + (found[s].start_us if i == 0 or way[i - 1] != s else 0)
    return total


@given(sources(), st.integers(0, 15))
def test_the_plan_is_the_cheapest_there_is(chain: tuple[int, list[Source]], us: int) -> None:
    """No other way of having and computing the pages costs less, and the plan can be carried out at its price."""
    num_pages, found = chain
    made = plan(num_pages, us, found)
    way = tuple(
        next(i for i, s in enumerate(found) if s.name == run.source)
        for run in made.runs
        for _ in range(run.start, run.stop)
    )
    assert len(way) == made.num_pages
    assert all(a.stop == b.start and a.source != b.source for a, b in itertools.pairwise(made.runs))
    cheapest = min(
        price(other, num_pages, found, us)
        for length in range(num_pages + 1)
        for other in itertools.product(range(len(found)), repeat=length)
    )
    assert made.total_us == price(way, num_pages, found, us) == cheapest
    assert made.total_us <= made.compute_us == num_pages * us
    assert made.fetch_us == made.total_us - (num_pages - made.num_pages) * us


PRIORS = {"far": Speed(0.01, 100e6), "ssd": Speed(0.001, 200e6)}


def test_what_was_measured_counts_and_fades() -> None:
    """A first measurement replaces the prior, later ones move it, and with age it goes back to the prior."""
    speeds = Speeds(PRIORS)
    assert speeds.of("far:a", 0) == PRIORS["far"]
    speeds.measured("far:a", start_s=0.002, num_bytes=10_000_000, seconds=1.0, now=0)
    speed = speeds.of("far:a", 0)
    assert speed.start_s == 0.002
    assert speed.bytes_per_s == pytest.approx(10e6)
    assert speeds.of("far:b", 0) == PRIORS["far"]
    speeds.measured("far:a", start_s=0.002, num_bytes=40_000_000, seconds=1.0, now=0)
    assert 10e6 < speeds.of("far:a", 0).bytes_per_s < 40e6
    assert speeds.of("far:a", HALF_LIFE_S).bytes_per_s > speeds.of("far:a", 0).bytes_per_s
    old = speeds.of("far:a", 40 * HALF_LIFE_S)
    assert old.bytes_per_s == pytest.approx(100e6, rel=1e-6)
    assert old.start_s == pytest.approx(0.01, rel=1e-6)


def test_a_queue_delays_the_start() -> None:
    """Bytes that are under way already come first."""
    speeds = Speeds(PRIORS)
    speeds.queued("ssd", 200_000_000, 0)
    assert speeds.of("ssd", 0).start_s == pytest.approx(1.001)
    speeds.queued("ssd", -200_000_000, 0)
    assert speeds.of("ssd", 0) == PRIORS["ssd"]


def test_failures_keep_away_ever_longer_until_a_success() -> None:
    """Each failure in a row doubles the time, up to a bound; one success ends it."""
    speeds = Speeds(PRIORS)
    assert speeds.usable("far:a", 0)
    speeds.failed("far:a", 0)
    assert not speeds.usable("far:a", BACK_OFF_S * 0.9)
    assert speeds.usable("far:a", BACK_OFF_S)
    for _ in range(20):
        speeds.failed("far:a", 0)
    assert not speeds.usable("far:a", BACK_OFF_MAX_S * 0.9)
    assert speeds.usable("far:a", BACK_OFF_MAX_S)
    speeds.measured("far:a", start_s=0, num_bytes=1, seconds=1, now=0)
    assert speeds.usable("far:a", 0)


def test_the_memory_of_speeds_is_bounded() -> None:
    """The longest unused source is forgotten, unless something is under way from there."""
    speeds = Speeds(PRIORS)
    speeds.queued("far:busy", 5, 0)
    for number in range(2 * SOURCES_KNOWN):
        speeds.measured(f"far:{number}", start_s=0, num_bytes=1, seconds=1, now=0)
    table = speeds.table(0)
    assert len(table) == SOURCES_KNOWN
    assert "far:busy" in table
    assert f"far:{2 * SOURCES_KNOWN - 1}" in table
    assert "far:0" not in table
    speeds.forget("far:busy")
    assert "far:busy" not in speeds.table(0)
