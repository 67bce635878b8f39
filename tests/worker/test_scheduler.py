"""The token-budget scheduler, run without a device over a paged cache that remembers what was written where."""

from __future__ import annotations

from collections import deque
from hashlib import blake2b
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.blocks import BlockPool
from services.worker.flowserve.scheduler import Scheduler, StepPlan
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from shared import blockhash
from shared.messages import Request, Sampling

PAGE = 4
EOS = 0
ROOT = blockhash.root(b"secret", "model")


def next_token(tokens: list[int]) -> int:
    """The model of these tests: a function of the whole prefix over a vocabulary of 12."""
    return blake2b(bytes(tokens), digest_size=1).digest()[0] % 12


def truth(prompt: list[int], max_tokens: int, eos: int | None = None) -> list[int]:
    """The output of an unscheduled decoder."""
    tokens = prompt.copy()
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


class Bench:
    """A scheduler, and a cache whose cells hold the prefix they were computed from; `depth` plans are on their way, in
    a pipeline of several stages as many as those."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 16,
        eos: int | None = None,
        depth: int = 1,
        num_stages: int = 1,
        spread_chunks: bool = True,
    ) -> None:
        self.depth = num_stages if num_stages > 1 else depth
        self.on_their_way: deque[tuple[StepPlan, list[list[int]]]] = deque()  # with the tables
        self.eos_ids = frozenset() if eos is None else frozenset([eos])
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            page=PAGE,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            num_stages=num_stages,
            spread_chunks=spread_chunks,
        )
        self.context = num_blocks * PAGE
        self.cells: dict[tuple[int, int], bytes] = {}
        self.groups: list[SequenceGroup] = []
        self.arrivals = count()

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int = 1,
        given: list[list[int]] | None = None,
    ) -> SequenceGroup:
        request = Request(
            request=f"r{len(self.groups)}",
            attempt=0,
            client="c",
            model="m",
            tenant="t",
            prompt=prompt,
            root=ROOT,
            hashes=blockhash.chain(ROOT, prompt, PAGE),
            sampling=Sampling(max_tokens=max_tokens, seed=0, n=n),
            deadline_ms=1000,
            park_ms=0,
            output=given or [],
        )
        group = SequenceGroup(
            request,
            arrival=next(self.arrivals),
            deadline=0,
            page=PAGE,
            context=self.context,
            eos_ids=self.eos_ids,
        )
        self.groups.append(group)
        self.scheduler.add(group)
        return group

    def step(self) -> StepPlan:
        """Plan as far ahead as may be, then compute the oldest plan's rows into their cells, sample from what the
        tables read back, and update."""
        while len(self.on_their_way) < self.depth and self.plan():
            pass
        if not self.on_their_way:
            return StepPlan([])
        plan, tables = self.on_their_way.popleft()
        tokens = []
        for chunk, table in zip(plan.chunks, tables, strict=True):
            sequence, stop = chunk.sequence, chunk.start + chunk.length
            for position in range(chunk.start, stop):
                # A late row's token is anything, and its prefix too.
                is_known = position < sequence.num_known
                prefix = bytes(sequence.tokens[: position + 1]) if is_known else b"late"
                self.cells[table[position // PAGE], position % PAGE] = prefix
            if sequence.status is Status.RUNNING:
                for position in range(stop):
                    expected = bytes(sequence.tokens[: position + 1])
                    assert self.cells[table[position // PAGE], position % PAGE] == expected
            if chunk.samples:
                tokens.append([next_token(sequence.tokens)])
        self.scheduler.update(plan, tokens)
        self.check()
        return plan

    def plan(self) -> bool:
        """Launch a plan, if one can be made, after proving that it overtakes nobody and keeps within its limits."""
        scheduler = self.scheduler
        num_preemptions, is_ahead = scheduler.num_preemptions, bool(self.on_their_way)
        waiting = scheduler.waiting.copy()
        inside = {chunk.sequence for plan, _ in self.on_their_way for chunk in plan.chunks}
        sampled = {sequence for plan, _ in self.on_their_way for sequence in plan.sampled}
        plan = scheduler.schedule(ahead=len(self.on_their_way))
        if scheduler.num_stages > 1:
            waits = sampled if scheduler.spread_chunks else inside
            assert all(chunk.sequence not in waits for chunk in plan.chunks)
        assert sum(chunk.length for chunk in plan.chunks) <= scheduler.max_batched_tokens
        assert len(plan.chunks) <= scheduler.max_num_seqs
        assert not is_ahead or scheduler.num_preemptions == num_preemptions
        num_admitted = sum(s.status is Status.RUNNING for s in waiting)
        assert all(s.status is Status.RUNNING for s in waiting[:num_admitted]), "overtaken"
        if plan.chunks:
            self.on_their_way.append((plan, [c.sequence.table.copy() for c in plan.chunks]))
        elif not is_ahead:
            assert not scheduler.running, "running, but does not move"
        if not is_ahead and scheduler.running and not scheduler.running[0].is_complete:
            # With the admissions by age, this bounds every wait: who is oldest moves in every step.
            assert any(chunk.sequence is scheduler.running[0] for chunk in plan.chunks)
        return bool(plan.chunks)

    def run(self) -> None:
        for _ in range(10_000):
            if not any(list(group.live()) for group in self.groups):
                return
            assert self.step().chunks, "a step with work to do does nothing"
        raise AssertionError("does not end")

    def check(self) -> None:
        self.pool.check(s.table for group in self.groups for s in group.live())


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt :]


def distinct(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i) % 11 + 1 for i in range(length)]


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
            bench.scheduler.trim(sequence, 5)
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
        Scheduler(BlockPool(4), page=PAGE, max_num_seqs=8, max_batched_tokens=7)


# ----------------------------------------------------------------------------------------------------------- pipelines


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


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it comes
        st.integers(1, 18),  # prompt length
        st.integers(1, 14),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 1),  # family of prompts: those of one family share prefixes
        st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(0, 3))),  # cancel, keep
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
    load: list[tuple[int, int, int, int, int, tuple[int, int] | None]],
    num_blocks: int,
    max_num_seqs: int,
    spare_tokens: int,
    depth: int,
    num_stages: int,
    spread_chunks: bool,
) -> None:
    """Whatever arrives and is cancelled, in pools far too small: no deadlock, no loss, no foreign page, no leak."""
    max_batched_tokens = max_num_seqs + spare_tokens
    bench = Bench(
        num_blocks, max_num_seqs, max_batched_tokens, EOS, depth, num_stages, spread_chunks
    )
    cancels: dict[int, list[tuple[SequenceGroup, int]]] = {}
    by_step: dict[int, list[tuple[int, int, int, int, tuple[int, int] | None]]] = {}
    for step, *rest in load:
        by_step.setdefault(step, []).append(tuple(rest))  # type: ignore[arg-type]
    for step in range(40):
        for length, max_tokens, n, family, cancel in by_step.get(step, []):
            group = bench.add(distinct(length, family), max_tokens, n)
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
