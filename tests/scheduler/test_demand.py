"""What a JE tells the cluster manager: counters that grow, and who waits, at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.costs import Costs
from services.scheduler.demand import DemandMeter
from services.scheduler.job import JobKind, serve
from services.scheduler.lengths import Lengths
from services.scheduler.parking import ParkingLot
from shared.errors import InvalidRequest, ModelNotFound, NotReady, Overloaded
from shared.messages import Request, Sampling, TaskEnded, TeBeat
from shared.scaling_messages import Demand


def request(name: str, **fields: object) -> Request:
    """A small one."""
    values: dict[str, object] = {
        "request": name,
        "attempt": 1,
        "client": "gateway-1",
        "model": "m",
        "tenant": "t",
        "prompt": list(range(1000)),
        "root": b"r" * 16,
        "hashes": [],
        "sampling": Sampling(max_tokens=10, seed=1),
        "deadline_ms": 60_000,
        "park_ms": 5_000,
    }
    return Request(**{**values, **fields})  # type: ignore[arg-type]


@dataclass
class Je:
    """A JE with a clock that is moved by hand."""

    now: float = 0.0
    lot: ParkingLot = field(
        default_factory=lambda: ParkingLot(max_requests=9, max_bytes=1 << 20, max_park_s=100.0)
    )

    def __post_init__(self) -> None:
        self.meter = DemandMeter(
            "je", self.lot, Lengths(), Costs(), slo_s=1.0, clock=lambda: self.now
        )

    def said(self) -> Demand | None:
        """What it says now of its one model."""
        told = self.meter.due(self.now)
        assert len(told) <= 1
        return told[0] if told else None

    def park(self, name: str) -> None:
        """A request that waits."""
        one = request(name)
        self.lot.park(one, serve(JobKind.CHAT, name, 1), self.now)
        self.meter.accepted(one, None)

    def ended(self, name: str, *, first_token_ms: int, total_ms: int) -> None:
        """A TE is done."""
        self.meter.ended(
            TaskEnded(
                task="t",
                request=name,
                attempt=1,
                te="te",
                finish="stop",
                prompt_tokens=1,
                cached_tokens=0,
                output_tokens=1,
                first_token_ms=first_token_ms,
                total_ms=total_ms,
            )
        )


def test_who_waits_is_told_of_at_once_and_again_and_then_that_nobody_does() -> None:
    """Each change is news; while nothing changes it is repeated twice a second, and afterwards there is silence."""
    je = Je()
    je.park("1")
    said = je.said()
    assert said is not None
    assert (said.parked, said.arrivals, said.waited_ms) == (1, 1, 0)
    assert said.work_ms >= 1000  # its prompt alone, by the prior
    je.now = 0.1
    assert je.said() is None
    je.park("2")
    said = je.said()
    assert said is not None
    assert (said.parked, said.arrivals, said.waited_ms) == (2, 2, 100)
    je.now = 0.7
    assert je.said() == Demand(
        je="je", model="m", parked=2, arrivals=2, waited_ms=700, work_ms=said.work_ms
    )
    while je.lot.next("m") is not None:  # both leave
        je.now += 0.01
    said = je.said()
    assert said is not None
    assert (said.parked, said.waited_ms) == (0, 0)
    je.now = 60.0
    assert je.said() is None


def test_what_has_a_te_is_counted_only_and_told_twice_a_second() -> None:
    """A second attempt is no second arrival."""
    je = Je()
    je.meter.accepted(request("1"), "te")
    assert je.said() is not None
    je.now = 0.3
    je.meter.accepted(request("2"), "te")
    je.meter.accepted(request("1", attempt=2), "te")
    assert je.said() is None
    je.now = 0.5
    said = je.said()
    assert said is not None
    assert (said.arrivals, said.parked) == (2, 0)


def test_one_who_may_not_wait_counts_as_waiting_for_a_moment() -> None:
    """So the model wakes; who is turned away for want of room is late; who asks for nonsense does not count."""
    je = Je()
    je.meter.refused(request("1"), NotReady("asleep"))
    said = je.said()
    assert said is not None
    assert (said.parked, said.arrivals, said.late) == (1, 1, 0)
    je.now = 1.1
    je.meter.refused(request("2"), Overloaded("full"))
    je.meter.refused(request("3"), InvalidRequest("no"))
    je.meter.refused(request("4", model="nobody"), ModelNotFound("no"))
    said = je.said()
    assert said is not None
    assert (said.parked, said.arrivals, said.answered, said.late) == (0, 2, 1, 1)


def test_an_answer_is_late_by_its_first_token() -> None:
    """From the arrival on, however long the rest took; each request is judged once, and one without a token never."""
    je = Je()
    for name in ("quick", "late", "none"):
        je.meter.accepted(request(name), "te")
    je.now = 10.0
    je.ended("quick", first_token_ms=100, total_ms=9_600)  # the token came at 0.5 s
    je.ended("quick", first_token_ms=100, total_ms=0)
    je.ended("late", first_token_ms=100, total_ms=1_100)
    je.ended("none", first_token_ms=-1, total_ms=0)
    said = je.said()
    assert said is not None
    assert (said.answered, said.late) == (2, 1)


def test_impossible_costs_do_not_stop_a_request() -> None:
    """A TE that tells nonsense of itself is not believed; what is told stays a number."""
    je = Je()
    je.meter.accepted(request("1"), "te")
    for number in (float("nan"), float("inf"), -1.0):
        je.meter.beat(
            TeBeat(id="te", model="m", pod="p", state="ready", prefill_us=number, decode_us=number)
        )
        je.meter.accepted(request(f"of {number}"), "te")
    said = je.said()
    assert said is not None
    assert said.arrivals == 4
    assert 4000 <= said.work_ms < 100_000


def test_the_books_are_bounded() -> None:
    """Requests whose first token never comes, and models, are forgotten in the end, the oldest first."""
    je = Je()
    for number in range(17_000):
        one = request(str(number), prompt=[1], model=f"m{number % 4200}")
        je.meter.accepted(one, "te")
    assert len(je.meter._open) == 16_384
    assert len(je.meter._models) == 4096
