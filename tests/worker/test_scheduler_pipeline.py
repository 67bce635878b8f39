"""The scheduler with several micro-batches on their way: chunks spread, decodes shared out evenly, nobody forgotten."""

from __future__ import annotations

import pytest

from services.worker.flowserve.sequence import Status
from tests.worker.planning import Bench, distinct, output, truth


def test_chunks_of_a_prompt_go_into_consecutive_micro_batches() -> None:
    """A long prompt fills a pipeline at once, a chunk in each micro-batch, beside the decodes that are there."""
    bench = Bench(max_batched_tokens=8, max_num_seqs=4, num_stages=4)
    sequence = bench.add(distinct(27), max_tokens=3).sequences[0]
    for _ in range(4):
        assert bench.plan()
    chunks = [plan.chunks for plan, _ in bench.on_their_way]
    assert [(c.start, c.length, c.samples) for (c,) in chunks] == [
        (0, 8, False),
        (8, 8, False),
        (16, 8, False),
        (24, 3, True),
    ]
    bench.run()
    assert output(sequence) == truth(distinct(27), 3)


def test_a_prompt_kept_in_one_micro_batch_waits_for_its_chunk() -> None:
    """Without spreading, its next chunk is planned once the former one is out; other prompts go in between."""
    bench = Bench(max_batched_tokens=8, max_num_seqs=4, num_stages=2, spread_chunks=False)
    first, second = (bench.add(distinct(20, start), max_tokens=1).sequences[0] for start in (1, 2))
    seen = []
    while first.status is not Status.ENDED or second.status is not Status.ENDED:
        seen.append([(chunk.sequence, chunk.start) for chunk in bench.step().chunks])
    assert seen[:4] == [[(first, 0)], [(second, 0)], [(first, 8)], [(second, 8)]]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_decodes", [2, 3, 8, 13])
def test_decodes_even_out_over_the_micro_batches(num_stages: int, num_decodes: int) -> None:
    """Prompts that all end in one micro-batch decode in all of them, each once in a round; so it stays as some end."""
    bench = Bench(max_num_seqs=16, max_batched_tokens=64, num_stages=num_stages)
    sequences = [
        bench.add(distinct(3, number), max_tokens=40 if number % 3 else 14).sequences[0]
        for number in range(num_decodes)
    ]

    def check_round() -> None:
        live = [sequence for sequence in sequences if sequence.status is not Status.ENDED]
        plans = [bench.step() for _ in range(min(num_stages, len(live)))]
        sizes = sorted(len(plan.chunks) for plan in plans)
        assert sizes[-1] - sizes[0] <= 1
        assert {c.sequence for plan in plans for c in plan.chunks} == set(live)
        assert sum(sizes) == len(live)

    for _ in range(2 * num_stages):
        bench.step()
    check_round()
    while any(sequence.status is not Status.ENDED for sequence in sequences[::3]):
        bench.step()
    for _ in range(2 * num_stages):
        bench.step()
    check_round()


@pytest.mark.parametrize("num_stages", [2, 4])
def test_sequences_that_end_together_do_not_thin_out_the_last_micro_batches(
    num_stages: int,
) -> None:
    """Equal requests decode in equal micro-batches to their last token, none left out of more than one round."""
    bench = Bench(num_blocks=256, max_num_seqs=32, max_batched_tokens=256, num_stages=num_stages)
    sequences = [bench.add(distinct(3, n), max_tokens=9).sequences[0] for n in range(32)]
    sizes = []
    while any(sequence.status is not Status.ENDED for sequence in sequences):
        sizes.append(len(bench.step().chunks))
    assert [size for size in sizes[-num_stages:] if size] == [32 // num_stages] * num_stages


def test_a_pipeline_out_of_blocks_empties_before_somebody_gives_way() -> None:
    """Over all micro-batches the youngest gives way, once nothing of anybody is inside, and gets its tokens later; who
    keeps running moves on in every round or two."""
    bench = Bench(num_blocks=20, num_stages=4)
    groups = [bench.add([9, start, 2, 2], max_tokens=24) for start in range(1, 9)]
    oldest = groups[0].sequences[0]
    last_moved = dict.fromkeys((group.sequences[0] for group in groups), 0)
    for number in range(300):
        running = set(bench.scheduler.running)
        moved = {chunk.sequence for chunk in bench.step().chunks}
        last_moved |= {s: number for s in last_moved if s in moved or s not in running}
        assert number - min(last_moved.values()) <= 2 * 4, "running, but left behind"
        assert oldest.status is not Status.WAITING
    assert not bench.scheduler.running
    assert bench.scheduler.num_preemptions > 0
    for group in groups:
        assert output(group.sequences[0]) == truth(group.request.prompt, 24)


def test_a_step_that_did_not_get_in_is_planned_again() -> None:
    """The newest plan is taken back, while chunks of the same prompt are inside before it."""
    bench = Bench(max_batched_tokens=8, max_num_seqs=4, num_stages=4)
    sequence = bench.add(distinct(20), max_tokens=3).sequences[0]
    assert bench.plan()
    assert bench.plan()
    assert bench.plan()
    plan, _ = bench.on_their_way.pop()
    bench.scheduler.undo(plan)
    again = bench.scheduler.schedule(ahead=2)
    assert again == plan
    bench.scheduler.undo(again)
    bench.run()
    assert output(sequence) == truth(distinct(20), 3)
