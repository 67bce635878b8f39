"""The scheduler between bands and tenants: who goes first, who gives way, and that nobody pays for that but in time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.sequence import Sequence, Status
from shared.messages import Band
from tests.worker.planning import Bench, distinct, output, truth


def add(bench: Bench, start: int, length: int, max_tokens: int, **fields: object) -> Sequence:
    """A sequence whose prompt begins with what no other's does."""
    prompt = [start % 11 + 1, start // 11 % 11 + 1, *distinct(length - 2, start)]
    return bench.add(prompt, max_tokens, **fields).sequences[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2])
def test_band_batch_gives_up_a_slot_within_one_step(depth: int) -> None:
    """Where it has all slots, one that comes in a higher band is computed in the first step planned after it came that
    is not planned ahead; the youngest of the band gives way, and later ends with the tokens it would have had."""
    bench = Bench(num_blocks=64, max_num_seqs=4, depth=depth)
    fillers = [add(bench, n, 6, 20, band=Band.BATCH) for n in range(4)]
    for _ in range(5):
        bench.step()
    urgent = add(bench, 9, 5, 3)
    for _ in range(depth - 1):
        bench.step()  # was on its way
    assert urgent in [chunk.sequence for chunk in bench.step().chunks]
    assert [filler.status for filler in fillers] == [Status.RUNNING] * 3 + [Status.WAITING]
    assert (bench.scheduler.num_yields, bench.scheduler.num_preemptions) == (1, 1)
    bench.run()
    for sequence in (*fillers, urgent):
        prompt = sequence.tokens[: sequence.num_prompt]
        assert output(sequence) == truth(prompt, sequence.sampling.max_tokens)


def test_band_batch_gives_up_blocks_within_one_step_and_goes_on_from_its_pages() -> None:
    """A long prompt in a higher band takes the blocks of as many of the band as it needs, at once; what they had
    computed and nobody needed meanwhile is found again."""
    bench = Bench(num_blocks=16, max_num_seqs=8, max_batched_tokens=64)
    fillers = [add(bench, n, 13, 4, band=Band.BATCH) for n in range(4)]
    bench.step()
    assert bench.pool.num_available == 0
    urgent = add(bench, 9, 19, 1)
    assert urgent in [chunk.sequence for chunk in bench.step().chunks]
    assert [filler.status for filler in fillers] == [Status.RUNNING] * 2 + [Status.WAITING] * 2
    before = bench.scheduler.num_hit_tokens
    bench.run()
    assert bench.scheduler.num_hit_tokens > before
    assert all(output(one) == truth(one.tokens[:13], 4) for one in fillers)


def test_rows_of_band_batch_come_last_and_are_few_beside_others() -> None:
    """Alone it has the whole budget; beside others a sixteenth, and nothing where they want all of it."""
    bench = Bench(num_blocks=256, max_num_seqs=16, max_batched_tokens=32)
    add(bench, 0, 400, 1, band=Band.BATCH)
    for n in range(8):
        add(bench, n + 1, 3, 100, band=Band.BATCH)
    assert bench.step().num_rows == 32
    add(bench, 20, 10, 5)
    assert [chunk.sequence.band for chunk in bench.step().chunks] == [Band.DEFAULT, Band.BATCH]
    assert bench.step().num_rows == 1 + 32 // 16
    add(bench, 21, 60, 5)
    plan = bench.step()
    assert {chunk.sequence.band for chunk in plan.chunks} == {Band.DEFAULT}
    assert plan.num_rows == 32


@pytest.mark.parametrize("band", [Band.PRIORITY, Band.DEFAULT, Band.FLEX])
def test_only_band_batch_is_preempted_for_a_newcomer(band: Band) -> None:
    """Whoever else runs keeps its slot; a higher band is admitted first as soon as one is free."""
    bench = Bench(max_num_seqs=1)
    running = add(bench, 0, 5, 8, band=band)
    bench.step()
    second, first = add(bench, 1, 5, 2, band=Band.FLEX), add(bench, 2, 5, 2, band=Band.PRIORITY)
    while running.status is not Status.ENDED:
        bench.step()
    assert bench.scheduler.num_preemptions == 0
    bench.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    bench.run()


def test_one_that_gave_way_brings_its_tenant_no_credit() -> None:
    """While one of its sequences ran alone, others of its band got far more. When it has to give way, the tenant is
    among those that begin to wait: it does not get all that first."""
    bench = Bench(num_blocks=64, max_num_seqs=2, max_batched_tokens=32)
    long = add(bench, 0, 4, 200, tenant="long", band=Band.BATCH)
    crowd = [add(bench, n + 1, 25, 1, tenant="crowd", band=Band.BATCH) for n in range(40)]
    for _ in range(20):
        bench.step()
    urgent = [add(bench, 60 + n, 5, 2) for n in range(2)]
    bench.step()
    assert long.status is Status.WAITING
    late = [add(bench, 70 + n, 25, 1, tenant="long", band=Band.BATCH) for n in range(20)]
    while any(one.status is not Status.ENDED for one in late[:8]):
        bench.step()
    assert all(one.status is Status.ENDED for one in urgent)
    num_waited = sum(one.status is Status.ENDED for one in crowd)
    assert num_waited > 25
    bench.run()


def test_in_a_pipeline_rows_of_band_batch_are_few_though_the_others_are_inside() -> None:
    """The next token of one that is inside waits for the micro-batches before it, so they stay small."""
    bench = Bench(num_blocks=256, max_num_seqs=16, max_batched_tokens=32, num_stages=2)
    urgent = add(bench, 20, 4, 50)
    for n in range(8):
        add(bench, n, 100, 50, band=Band.BATCH)
    bench.step()
    while urgent.status is not Status.ENDED:
        plan = bench.step()
        fillers = [chunk for chunk in plan.chunks if chunk.sequence.band is Band.BATCH]
        assert sum(chunk.length for chunk in fillers) <= 32 // 16
    bench.run()


def test_nobody_is_preempted_for_a_newcomer_while_a_step_is_on_its_way() -> None:
    """One that is admitted ahead takes the block that a sequence of band BATCH needs next: that one waits for it, and
    gives way only once its own token is there."""
    bench = Bench(num_blocks=4, max_num_seqs=2, depth=2)
    filler = add(bench, 0, 4, 6, band=Band.BATCH)
    assert bench.plan()
    urgent = add(bench, 9, 12, 1)
    assert bench.plan()
    assert (filler.status, urgent.status) == (Status.RUNNING, Status.RUNNING)
    bench.run()
    assert output(filler) == truth(filler.tokens[:4], 6)


@settings(max_examples=30, deadline=None)
@given(
    load=st.lists(
        st.tuples(st.integers(0, 30), st.integers(2, 24), st.integers(1, 16)), max_size=8
    ),
    batch=st.lists(
        st.tuples(st.integers(0, 30), st.integers(2, 24), st.integers(1, 16)), max_size=12
    ),
    num_blocks=st.integers(12, 30),
    num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 20),
)
def test_band_batch_costs_the_others_nothing(
    load: list[tuple[int, int, int]],
    batch: list[tuple[int, int, int]],
    num_blocks: int,
    num_seqs: int,
    spare_tokens: int,
) -> None:
    """Whatever comes in it, each of the others ends in the same step as without it."""
    ends: list[list[int]] = []
    for fillers in ([], batch):
        bench = Bench(
            num_blocks=num_blocks,
            max_num_seqs=num_seqs,
            max_batched_tokens=num_seqs + spare_tokens,
        )
        mine: dict[int, Sequence] = {}
        ended: dict[int, int] = {}
        for step in range(3000):
            for n, (when, length, max_tokens) in enumerate(load):
                if when == step:
                    mine[n] = add(bench, n, length, max_tokens)
            for n, (when, length, max_tokens) in enumerate(fillers):
                if when == step:
                    add(bench, 20 + n, length, max_tokens, band=Band.BATCH)
            bench.step()
            for n, one in mine.items():
                if one.status is Status.ENDED:
                    ended.setdefault(n, step)
            if step > 30 and all(group.has_ended for group in bench.groups):
                break
        ends.append([ended[n] for n in range(len(load))])
    assert ends[0] == ends[1]


def test_nobody_has_to_yield_to_its_own_band() -> None:
    """Band BATCH alone is an ordinary load: first come, first served."""
    bench = Bench(num_blocks=16, max_num_seqs=2)
    sequences = [add(bench, n, 10, 6, band=Band.BATCH) for n in range(6)]
    bench.run()
    assert bench.scheduler.num_yields == 0
    assert all(output(one) == truth(one.tokens[:10], 6) for one in sequences)


def test_a_tenant_that_floods_waits_for_itself() -> None:
    """Behind forty prompts of one tenant, another's is admitted as the next."""
    bench = Bench(num_blocks=256, max_num_seqs=2)
    flood = [add(bench, n, 8, 6, tenant="flood") for n in range(40)]
    for _ in range(4):
        bench.step()
    other = add(bench, 50, 8, 6, tenant="other")
    while other.status is not Status.ENDED:
        bench.step()
    assert sum(one.status is Status.ENDED for one in flood) <= 4
    bench.run()


def test_a_long_prompt_shares_the_budget_with_another_tenants() -> None:
    """While it is prefilled, a short prompt of another tenant is not kept waiting; one of its own tenant is."""
    bench = Bench(num_blocks=256, max_num_seqs=4, max_batched_tokens=8)
    long = add(bench, 0, 200, 1, tenant="a")
    bench.step()
    own, other = add(bench, 1, 6, 1, tenant="a"), add(bench, 2, 6, 1, tenant="b")
    for _ in range(3):
        bench.step()
    assert other.status is Status.ENDED
    assert not own.num_computed
    assert long.num_computed >= 16
    bench.run()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 20), st.integers(1, 12)), min_size=24, max_size=24),
    num_seqs=st.integers(2, 4),
    band=st.sampled_from([Band.DEFAULT, Band.BATCH]),
)
def test_tenants_that_wait_all_the_time_are_served_alike(
    sizes: list[tuple[int, int]], num_seqs: int, band: Band
) -> None:
    """The bound on overtaking: while both wait, what two tenants got never differs by more than what those of one that
    run at once are given, whatever the sizes of their prompts (twice the largest batch, in the paper)."""
    bench = Bench(num_blocks=256, max_num_seqs=num_seqs, max_batched_tokens=8)
    for n, (length, max_tokens) in enumerate(sizes):
        add(bench, n, length, max_tokens, tenant="ab"[n % 2], band=band)
    bound = num_seqs * (20 + 2 * 12)
    shares = {group.share for group in bench.groups}
    while all(share.waiting for share in shares):
        bench.step()
        served = [share.served for share in shares]
        assert max(served) - min(served) <= bound
    bench.run()


@settings(max_examples=25, deadline=None)
@given(
    load=st.lists(
        st.tuples(
            st.integers(0, 20),  # steps before it comes
            st.integers(2, 16),
            st.integers(1, 10),
            st.sampled_from(list(Band)),
        ),
        max_size=12,
    ),
    num_blocks=st.integers(8, 16),
)
def test_preemption_costs_its_tenant_nothing_and_the_same_load_gets_the_same_plans(
    load: list[tuple[int, int, int, Band]], num_blocks: int
) -> None:
    """In the end a tenant that is alone in its band has paid for each token once, input 1 and output 2, but for pages
    that it found in the cache; and a second run of it all makes the same plans."""
    seen = []
    for _ in range(2):
        bench, plans = Bench(num_blocks=num_blocks, max_num_seqs=3), []
        for step in range(60):
            for n, (when, length, max_tokens, band) in enumerate(load):
                if when == step:
                    add(bench, n, length, max_tokens, band=band)
            plan = bench.step()
            plans.append([(c.sequence.name, c.start, c.length) for c in plan.chunks])
        bench.run()
        for share in {group.share for group in bench.groups}:
            mine = [group for group in bench.groups if group.share is share]
            whole = sum(s.num_known - 1 + s.num_output for g in mine for s in g.sequences)
            assert whole - sum(g.num_cached or 0 for g in mine) <= share.served <= whole
        seen.append(plans)
    assert seen[0] == seen[1]
