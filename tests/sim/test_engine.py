"""The simulated engine: closed forms, the worker's own scheduler as the measure, and books that balance."""

from __future__ import annotations

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepflow.sim.clock import Clock
from deepflow.sim.engine import Engine
from deepflow.sim.profile import Profile, pairs
from deepflow.sim.sequence import Sequence, Status
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import SequenceGroup
from shared import blockhash
from shared.messages import Band, Request, Sampling

PAGE = 4
ROOT = b"r" * 16
SAMPLED = 200  # in no prompt: what is generated is found by nobody
LONG = 20 if os.environ.get("DEEPFLOW_SOAK") else 1

pytestmark = pytest.mark.timeout(60 * LONG)

# A row looks back on a position at the same price, whether its sequence decodes or not: then only sums matter.
PROFILE = Profile(
    name="test",
    rows=((1, 0.010), (4, 0.013), (16, 0.025)),
    token_s=0.001,
    prefill_pair_s=1e-5,
    decode_pair_s=1e-5,
    max_batched_tokens=16,
    max_num_seqs=4,
    kv_tokens=4096,
    page=PAGE,
)


@dataclass(frozen=True, slots=True)
class Job:
    at: float
    prompt: tuple[int, ...]
    num_output: int
    band: Band = Band.DEFAULT
    tenant: str = "t"


@dataclass
class Times:
    """When each sequence had its first and its last token."""

    clock: Clock
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)

    def first_token(self, sequence: Sequence) -> None:
        self.first[sequence.order] = self.clock.now

    def ended(self, sequence: Sequence) -> None:
        assert sequence.order not in self.last, "an end is told once"
        self.last[sequence.order] = self.clock.now
        self.first.setdefault(sequence.order, self.clock.now)

    def indexed(self, stored: list[bytes], removed: list[bytes]) -> None:
        assert stored or removed


def hashes(prompt: SequenceOf[int]) -> list[bytes]:
    return blockhash.chain(ROOT, list(prompt), PAGE)


def simulated(
    jobs: SequenceOf[Job], *, num_blocks: int = 1024, nudges: SequenceOf[float] = ()
) -> tuple[Times, Engine]:
    """The jobs on a simulated engine, which is woken for nothing at the times `nudges`."""
    clock = Clock()
    times = Times(clock)
    engine = Engine(clock, PROFILE, times, num_blocks=num_blocks, page=PAGE)
    for order, job in enumerate(jobs):
        sequence = Sequence(
            order=order,
            band=job.band,
            tenant=job.tenant,
            hashes=hashes(job.prompt),
            num_prompt=len(job.prompt),
            num_output=job.num_output,
        )
        clock.at(job.at, engine.add, sequence)
    for when in nudges:
        clock.at(when, engine.wake)
    clock.run()
    engine.check()
    return times, engine


def real(
    jobs: SequenceOf[Job], num_blocks: int = 1024
) -> tuple[dict[int, float], dict[int, float]]:
    """The same jobs planned by the worker's scheduler, step by step, each as long as the profile says."""
    scheduler = Scheduler(
        RtcMaster(num_blocks),
        page=PAGE,
        max_num_seqs=PROFILE.max_num_seqs,
        max_batched_tokens=PROFILE.max_batched_tokens,
    )
    coming = list(enumerate(jobs))
    groups: dict[int, SequenceGroup] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    arrivals, now = count(), 0.0
    while len(last) < len(jobs):
        while coming and coming[0][1].at <= now:
            number, job = coming.pop(0)
            groups[number] = group(number, job, next(arrivals))
            scheduler.add(groups[number])
        plan = scheduler.schedule()
        if not plan.chunks:
            now = coming[0][1].at
            continue
        context = sum(pairs(chunk.start, chunk.length) for chunk in plan.chunks)
        now += PROFILE.step_s(
            num_prefill=plan.num_rows, prefill_pairs=context, num_first=len(plan.sampled)
        )
        scheduler.update(plan, [[SAMPLED] for _ in plan.sampled])
        for number, one in groups.items():
            [sequence] = one.sequences
            if sequence.num_known > sequence.num_prompt:
                first.setdefault(number, now)
            if sequence.finish is not None:
                last.setdefault(number, now)
    return first, last


def group(number: int, job: Job, arrival: int) -> SequenceGroup:
    request = Request(
        request=f"r{number}",
        attempt=0,
        client="c",
        model="m",
        tenant=job.tenant,
        prompt=list(job.prompt),
        root=ROOT,
        hashes=hashes(job.prompt),
        sampling=Sampling(max_tokens=job.num_output, seed=0),
        deadline_ms=1000,
        park_ms=0,
        band=job.band,
    )
    return SequenceGroup(
        request, arrival=arrival, deadline=0, page=PAGE, context=1 << 20, eos_ids=frozenset()
    )


def prompt(num_tokens: int, of: int = 0) -> tuple[int, ...]:
    return tuple((of * 31 + position) % 97 for position in range(num_tokens))


def test_one_request_takes_what_the_profile_says() -> None:
    """An idle engine computes a prompt chunk after chunk, then a token a step, each a little longer."""
    times, engine = simulated([Job(1.0, prompt(40), 21)])
    assert times.first[0] == pytest.approx(1.0 + PROFILE.prefill_s(40))
    assert times.last[0] == pytest.approx(times.first[0] + PROFILE.decode_s(1, 41, 20))
    assert engine.num_steps == 3 + 20
    assert engine.pool.ledger()["live"] == 0


def test_a_batch_shares_its_steps() -> None:
    """Four sequences that decode together take the steps of one, not of four."""
    times, engine = simulated([Job(0.0, prompt(3, n), 50) for n in range(4)])
    # One step for what came first, one for the others, and the last of them ends with 49 more.
    assert engine.num_steps == 1 + 1 + 49
    assert max(times.last.values()) < 51 * PROFILE.rows_s(16)


def test_what_is_cached_is_not_computed_again() -> None:
    """A prompt that goes on where another ended computes the rest of it only."""
    times, engine = simulated([Job(0.0, prompt(40), 1), Job(10.0, prompt(56), 1)])
    assert engine.num_hit_tokens == 40
    assert times.last[1] - 10.0 == pytest.approx(PROFILE.prefill_s(56, cached=40))


def test_a_full_pool_takes_turns() -> None:
    """Where there is no room for all, the youngest gives way and goes on later; nothing is lost."""
    jobs = [Job(0.0, prompt(20, n), 40) for n in range(4)]
    times, engine = simulated(jobs, num_blocks=24)
    assert engine.num_preemptions > 0
    assert len(times.last) == 4
    assert times.last[0] == min(times.last.values())


def test_band_batch_yields_to_whoever_comes() -> None:
    """With all slots taken by work nobody waits for, a request of another band is served as if it were nearly alone."""
    fill = [Job(0.0, prompt(20, n), 500, Band.BATCH) for n in range(4)]
    times, engine = simulated([*fill, Job(2.0, prompt(16, 9), 10)])
    assert times.last[4] < 2.0 + 12 * PROFILE.rows_s(16)
    assert engine.num_preemptions == 1
    assert len(times.last) == 5


def test_a_tenant_with_few_requests_does_not_wait_for_one_with_many() -> None:
    """Whoever got less goes first: the second tenant's prompt overtakes the first one's queue."""
    many = [Job(0.0, prompt(32, n), 30, tenant="many") for n in range(20)]
    times, _ = simulated([*many, Job(0.1, prompt(32, 50), 30, tenant="few")])
    assert sum(last < times.last[20] for last in times.last.values()) < 10


def test_a_cancelled_sequence_is_gone_with_its_step() -> None:
    """Nothing more is told of it, its blocks are free, and the others go on; a dead engine does nothing at all."""
    clock = Clock()
    times = Times(clock)
    engine = Engine(clock, PROFILE, times, num_blocks=64, page=PAGE)
    one, other = (
        Sequence(
            order=n, band=Band.DEFAULT, tenant="t", hashes=hashes(prompt(9, n)), num_prompt=9,
            num_output=100,
        )
        for n in range(2)
    )  # fmt: skip
    engine.add(one)
    engine.add(other)
    clock.at(0.5, engine.cancel, one)
    clock.run(0.6)
    assert one.status is Status.ENDED
    assert other.status is Status.DECODING
    assert 0 < engine.num_generated(other) < 100
    engine.check()
    assert engine.pool.ledger()["live"] == len(other.table)
    engine.stop()
    engine.add(one)
    clock.run()
    assert times.last == {}


_jobs = st.lists(
    st.builds(
        Job,
        st.floats(0.0, 3.0),
        st.builds(prompt, st.integers(1, 70), st.integers(0, 2)),
        st.integers(1, 60),
        st.sampled_from([Band.PRIORITY, Band.DEFAULT, Band.FLEX]),
        st.sampled_from("tu"),
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda job: job.at,
).map(lambda jobs: sorted(jobs, key=lambda job: job.at))


@settings(max_examples=40 * LONG, deadline=None)
@given(jobs=_jobs)
def test_it_does_what_the_workers_scheduler_does(jobs: list[Job]) -> None:
    """First and last tokens come when the worker's scheduler, run step by step in the same time, brings them."""
    times, _ = simulated(jobs)
    first, last = real(jobs)
    assert times.first == pytest.approx(first)
    assert times.last == pytest.approx(last)


@settings(max_examples=25 * LONG, deadline=None)
@given(jobs=_jobs, nudges=st.lists(st.floats(0.0, 5.0), max_size=20))
def test_where_it_stops_to_look_changes_nothing(jobs: list[Job], nudges: list[float]) -> None:
    """Steps that are passed over would have changed nothing: stopping at any of them gives the same times."""
    undisturbed, _ = simulated(jobs)
    disturbed, _ = simulated(jobs, nudges=nudges)
    assert disturbed.first == pytest.approx(undisturbed.first)
    assert disturbed.last == pytest.approx(undisturbed.last)


@settings(max_examples=25 * LONG, deadline=None)
@given(jobs=_jobs, num_blocks=st.integers(33, 60))
def test_a_small_pool_loses_nobody(jobs: list[Job], num_blocks: int) -> None:
    """Whatever is preempted comes to its end, and every block is given back."""
    times, engine = simulated(jobs, num_blocks=num_blocks)
    assert times.last.keys() == set(range(len(jobs)))
    assert engine.pool.ledger()["live"] == 0
