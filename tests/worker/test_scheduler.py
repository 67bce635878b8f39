"""The token-budget scheduler, run without a device over a paged cache that remembers what was written where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import SequenceGroup, Status
from shared import blockhash
from shared.messages import Band
from tests.worker.planning import EOS, PAGE, ROOT, Bench, distinct, output, truth


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    """Decodes get their rows first; the prompt takes what is left of the budget, step by step."""
    bench = Bench(max_batched_tokens=8, max_num_seqs=2)
    first = bench.add([3, 1, 4], max_tokens=40).sequences[0]
    bench.step()
    second = bench.add(distinct(20), max_tokens=4).sequences[0]
    lengths = []
    while not second.num_output and first.status is Status.RUNNING:
        lengths.append([(c.sequence is first, c.length) for c in bench.step().chunks])
    assert lengths[:2] == [[(True, 1), (False, 7)], [(True, 1), (False, 7)]]
    bench.run()
    assert output(second) == truth(distinct(20), 4)


def test_a_known_prefix_is_not_computed_again() -> None:
    """A second request finds the full pages of the first one's prompt, but computes at least one token."""
    bench = Bench()
    prompt = distinct(12)
    bench.add(prompt, max_tokens=2)
    bench.run()
    group = bench.add(prompt, max_tokens=2)
    chunk = bench.step().chunks[0]
    assert (chunk.start, chunk.length) == (8, 4)
    assert group.num_cached == 8
    bench.run()


def test_a_continued_conversation_finds_its_output() -> None:
    """Pages of an ended choice's output serve the next turn."""
    bench = Bench()
    prompt = distinct(6)
    first = bench.add(prompt, max_tokens=10).sequences[0]
    bench.run()
    turn = [*first.tokens, 5]
    group = bench.add(turn, max_tokens=2)
    bench.step()
    assert group.num_cached == (first.num_known - 1) // PAGE * PAGE > len(prompt)


def test_output_past_the_kept_tokens_is_not_indexed() -> None:
    """A choice cut at a stop string indexes its pages only up to the cut, even if it had ended before."""
    for cut_after_end in (False, True):
        bench = Bench()
        prompt = distinct(8)
        sequence = bench.add(prompt, max_tokens=12).sequences[0]
        while sequence.num_output < 9 and sequence.status is not Status.ENDED:
            bench.step()
        if cut_after_end:
            bench.run()
            bench.scheduler.holdings.trim(sequence, 5)
        else:
            bench.scheduler.end(sequence, "cancelled", keep=5)
        kept = sequence.tokens[: 8 + 5]
        assert bench.pool.index_snapshot() == blockhash.chain(ROOT, kept, PAGE)
        bench.check()


def test_output_is_indexed_only_when_it_is_known_what_counts() -> None:
    """While a choice decodes the index holds its prompt's pages; at its end also those of its output."""
    bench = Bench()
    sequence = bench.add(distinct(9), max_tokens=12).sequences[0]
    while sequence.num_output < 10:
        bench.step()
    assert bench.pool.index_snapshot() == blockhash.chain(ROOT, distinct(9), PAGE)
    bench.run()
    assert len(bench.pool.index_snapshot()) == 20 // PAGE


def test_what_a_preemption_indexed_is_taken_back_by_a_cut() -> None:
    """A choice that waits to be recomputed and is cut at a stop string leaves no page past the cut."""
    bench = Bench(num_blocks=8)
    bench.add([2, 2, 2, 2], max_tokens=28)
    young = bench.add([9, 9, 9, 1], max_tokens=28).sequences[0]
    while young.status is not Status.WAITING or not young.num_output:
        bench.step()
    past_the_cut = blockhash.chain(ROOT, young.tokens, PAGE)[(4 + 6) // PAGE :]
    assert set(past_the_cut) & set(bench.pool.index_snapshot())
    bench.scheduler.end(young, "cancelled", keep=6)
    assert not set(past_the_cut) & set(bench.pool.index_snapshot())
    bench.run()


def test_further_choices_keep_the_place_of_their_request() -> None:
    """Choices released once the prompt is there go before requests that came later."""
    bench = Bench(max_num_seqs=1)
    group = bench.add(distinct(6), max_tokens=2, n=3)
    later = bench.add([5], max_tokens=2).sequences[0]
    while later.status is not Status.RUNNING:
        bench.step()
    assert [s.status for s in group.sequences] == [Status.ENDED] * 3


def test_further_choices_share_the_prompt_of_the_first() -> None:
    """With n = 3 the prompt's full pages are computed once and held by all three."""
    bench = Bench()
    group = bench.add(distinct(14), max_tokens=12, n=3)
    assert [s.status for s in group.sequences] == [Status.WAITING, Status.HELD, Status.HELD]
    bench.step()
    plan = bench.step()
    assert [chunk.length for chunk in plan.chunks[-2:]] == [2, 2]
    assert len({tuple(s.table[:3]) for s in group.sequences}) == 1
    bench.run()
    assert len({tuple(output(s)) for s in group.sequences}) == 1


@pytest.mark.parametrize("finish", ["cancelled", "failed"])
def test_the_next_choice_takes_over_when_the_first_goes(finish: str) -> None:
    """Held choices do not wait for one that has ended before it computed the prompt."""
    bench = Bench(max_batched_tokens=8)
    group = bench.add(distinct(30), max_tokens=3, n=3)
    bench.step()
    bench.scheduler.end(group.sequences[0], finish)
    bench.run()
    assert group.sequences[0].finish == finish
    assert output(group.sequences[1]) == output(group.sequences[2]) != []


def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    """Preemption takes the youngest, which is recomputed later and gets the same tokens."""
    bench = Bench(num_blocks=6)
    old = bench.add([2, 2, 2, 2], max_tokens=16).sequences[0]
    young = bench.add([9, 9, 9, 1], max_tokens=16).sequences[0]
    seen = set()
    while old.status is not Status.ENDED:
        bench.step()
        seen.add(young.status)
        assert old.status is not Status.WAITING
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert Status.WAITING in seen
    for sequence in (old, young):
        assert output(sequence) == truth(sequence.tokens[:4], 16)


def test_nothing_overtakes_a_waiting_request() -> None:
    """A short request behind a long one that does not fit yet waits its turn."""
    bench = Bench(num_blocks=8)
    running = bench.add(distinct(12), max_tokens=8).sequences[0]
    bench.step()
    long = bench.add(distinct(22, 3), max_tokens=2).sequences[0]
    short = bench.add([5], max_tokens=2).sequences[0]
    while running.status is Status.RUNNING:
        bench.step()
        if running.status is Status.RUNNING:
            assert (long.status, short.status) == (Status.WAITING, Status.WAITING)
    bench.run()


def test_a_resubmitted_request_goes_on_where_it_was() -> None:
    """Given output is computed like a prompt; what follows is what would have followed."""
    bench = Bench()
    prompt = distinct(6)
    whole = truth(prompt, 20)
    for cut in range(len(whole)):
        group = bench.add(prompt, max_tokens=20, given=[whole[:cut]])
        bench.run()
        assert output(group.sequences[0]) == whole


def test_limits_that_could_starve_are_refused() -> None:
    """A budget smaller than the batch would leave decoding sequences behind."""
    with pytest.raises(ValueError, match="max_batched_tokens"):
        Scheduler(RtcMaster(4), page=PAGE, max_num_seqs=8, max_batched_tokens=7)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it comes
        st.integers(1, 18),  # prompt length
        st.integers(1, 14),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 1),  # family of prompts: those of one family share prefixes
        st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(0, 3))),  # cancel, keep
        st.sampled_from([Band.DEFAULT, *Band]),
        st.sampled_from("aab"),  # tenant
    ),
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(
    load=arrivals,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 12),
    depth=st.integers(1, 2),
    num_stages=st.sampled_from([1, 2, 4]),
    spread_chunks=st.booleans(),
)
def test_every_choice_ends_once_with_the_tokens_of_an_unscheduled_decoder(
    load: list[tuple[int, int, int, int, int, tuple[int, int] | None, Band, str]],
    num_blocks: int,
    max_num_seqs: int,
    spare_tokens: int,
    depth: int,
    num_stages: int,
    spread_chunks: bool,
) -> None:
    """Whatever arrives and is cancelled, in whichever bands, in pools far too small: no deadlock, no loss, no foreign
    page, no leak, nobody overtaken (`Bench.plan`), and nobody left behind."""
    max_batched_tokens = max_num_seqs + spare_tokens
    bench = Bench(
        num_blocks, max_num_seqs, max_batched_tokens, EOS, depth, num_stages, spread_chunks
    )
    cancels: dict[int, list[tuple[SequenceGroup, int]]] = {}
    by_step: dict[int, list[tuple[int, int, int, int, tuple[int, int] | None, Band, str]]] = {}
    for step, *rest in load:
        by_step.setdefault(step, []).append(tuple(rest))  # type: ignore[arg-type]
    for step in range(40):
        for length, max_tokens, n, family, cancel, band, tenant in by_step.get(step, []):
            group = bench.add(distinct(length, family), max_tokens, n, band=band, tenant=tenant)
            if cancel is not None:
                cancels.setdefault(step + cancel[0], []).append((group, cancel[1]))
        for group, keep in cancels.get(step, []):
            for sequence in list(group.live()):
                bench.scheduler.end(sequence, "cancelled", keep=min(keep, sequence.num_output))
        bench.check()
        bench.step()
    bench.run()
    assert bench.pool.ledger()["live"] == 0
    assert not bench.scheduler.running
    assert not bench.scheduler.waiting
    assert not bench.scheduler.held
    for group in bench.groups:
        for sequence in group.sequences:
            whole = truth(group.request.prompt, group.request.sampling.max_tokens, EOS)
            got = output(sequence)
            if sequence.finish == "cancelled":
                assert got == whole[: len(got)]
            else:
                assert got == whole
                assert sequence.finish == ("stop" if got[-1] == EOS else "length")
