"""The parked requests: order, bounds, budgets, and every way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.job import JobKind, serve
from services.scheduler.parking import Parked, ParkingLot, num_bytes
from shared.errors import Overloaded
from shared.messages import Band, Request, Sampling


def park(lot: ParkingLot, name: str, now: float = 0.0, **fields: object) -> Parked:
    """Parks a small request."""
    values: dict[str, object] = {
        "request": name,
        "attempt": 1,
        "client": "gateway-1",
        "model": "m",
        "tenant": "t",
        "prompt": [1, 2, 3],
        "root": b"r" * 16,
        "hashes": [],
        "sampling": Sampling(max_tokens=10, seed=1),
        "deadline_ms": 60_000,
        "park_ms": 5_000,
    }
    request = Request(**{**values, **fields})  # type: ignore[arg-type]
    return lot.park(request, serve(JobKind.CHAT, name, 1), now)


def lot(max_requests: int = 10, max_bytes: int = 1 << 20, max_park_s: float = 100.0) -> ParkingLot:
    """A lot."""
    return ParkingLot(max_requests=max_requests, max_bytes=max_bytes, max_park_s=max_park_s)


def test_first_come_first_served_per_model() -> None:
    """Of one tenant `next` gives a model's oldest request; one that is put back keeps its place at the head."""
    parked = lot()
    for name, model in (("1", "m"), ("2", "n"), ("3", "m")):
        park(parked, name, model=model)
    assert parked.models() == ["m", "n"]
    first = parked.next("m")
    assert first is not None
    assert first.request.request == "1"
    parked.put_back(first)
    assert [p.request.request for p in parked] == ["1", "2", "3"]
    assert parked.next("none") is None


def test_requests_leave_by_band_then_by_turns_of_the_tenants_then_by_age() -> None:
    """As a TE would take them: nobody's many requests keep another tenant's waiting, and a higher band goes first."""
    parked = lot(max_requests=20)
    for number in range(6):
        park(parked, f"a{number}", tenant="a")
    park(parked, "batch", tenant="c", band=Band.BATCH)
    park(parked, "b0", tenant="b")
    park(parked, "b1", tenant="b")
    park(parked, "high", tenant="a", band=Band.PRIORITY)
    order = []
    while (entry := parked.next("m")) is not None:
        order.append(entry.request.request)
    assert order == ["high", "a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5", "batch"]


def test_who_is_put_back_has_lost_no_turn() -> None:
    """A request for which no TE had room is the next one again, and its tenant has not paid."""
    parked = lot()
    for name, tenant in (("a0", "a"), ("b0", "b"), ("a1", "a")):
        park(parked, name, tenant=tenant)
    for _ in range(3):
        entry = parked.next("m")
        assert entry is not None
        assert entry.request.request == "a0"
        parked.put_back(entry)
    order = [entry.request.request for _ in range(3) if (entry := parked.next("m"))]
    assert order == ["a0", "b0", "a1"]


def test_bounded_by_count_and_bytes() -> None:
    """A full lot refuses, and knows before that it would."""
    parked = lot(max_requests=2)
    first = park(parked, "1")
    park(parked, "2")
    assert parked.num_waiting("m") == 2
    assert not parked.has_room(first.request)
    with pytest.raises(Overloaded):
        park(parked, "3", now=1.0)
    assert [one.request.request for one in parked.take_model("m")] == ["1", "2"]
    assert parked.num_waiting("m") == 0
    assert parked.has_room(first.request)
    wide = lot(max_bytes=100_000)
    park(wide, "1")
    with pytest.raises(Overloaded):
        park(wide, "2", prompt=[7] * 10_000)
    assert len(wide) == 1


def test_the_nearest_of_three_limits_ends_the_wait() -> None:
    """A request leaves at its park budget, its deadline or the lot's own limit, whichever comes first."""
    parked = lot(max_park_s=3.0)
    park(parked, "budget", park_ms=1000)
    park(parked, "deadline", deadline_ms=2000)
    park(parked, "limit")
    ends = [[p.request.request for p in parked.take_expired(t)] for t in (0.9, 1.0, 2.0, 3.0)]
    assert ends == [[], ["budget"], ["deadline"], ["limit"]]
    assert len(parked) == parked.num_bytes == 0


def test_waiting_uses_up_the_budgets() -> None:
    """What is dispatched after a wait has that much less time left."""
    entry = park(lot(), "1", now=10.0)
    assert (entry.remaining(11.5).deadline_ms, entry.remaining(11.5).park_ms) == (58_500, 3_500)


def test_a_silent_client_takes_its_requests_with_it() -> None:
    """All requests of one client leave together, those of others stay."""
    parked = lot()
    park(parked, "1")
    park(parked, "2", client="gateway-2")
    assert [p.request.request for p in parked.take_client("gateway-1")] == ["1"]
    assert [p.request.request for p in parked] == ["2"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["park", "take", "next", "back", "client", "expire"]),
            st.integers(0, 7),
            st.integers(0, 400),
        ),
        max_size=60,
    )
)
def test_the_account_always_balances(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens, the bytes are those of the requests inside, and both bounds hold."""
    parked = lot(max_requests=4, max_bytes=40_000, max_park_s=5.0)
    out: list[Parked] = []
    for now, (verb, number, size) in enumerate(steps):
        name = str(number)
        if verb == "park" and name not in parked:
            try:
                park(parked, name, float(now), prompt=[0] * size, client=str(number % 2))
            except Overloaded:
                assert len(parked) >= 4 or parked.num_bytes + 2048 + 40 * size > 40_000
        elif verb == "take":
            parked.take(name)
        elif verb == "next" and (entry := parked.next("m")) is not None:
            out.append(entry)
        elif verb == "back" and out and out[-1].request.request not in parked:
            if len(parked) < 4:
                parked.put_back(out.pop())
        elif verb == "client":
            parked.take_client(str(number % 2))
        elif verb == "expire":
            assert all(p.until <= now for p in parked.take_expired(float(now)))
        assert parked.num_bytes == sum(num_bytes(p.request) for p in parked)
        assert len(parked) <= 4
