"""Requests with chunks through the engine: what is taken over, what is computed, and what the cache never learns."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve import native_decoder, pic
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, Span, Splice, StepInput
from services.worker.flowserve.native_decoder import NativeDecoder
from services.worker.flowserve.prepared import open_prepared
from shared import errors
from shared.messages import Cancel
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.bench import PAGE, Bench, request
from tests.worker.courier import Courier
from tests.worker.drive import random_ids
from tests.worker.tiny import make_tiny

INTRO, QUESTION = random_ids(21, seed=1), random_ids(9, seed=2)
PASSAGES = [random_ids(length, seed=length) for length in (48, 50, 64)]
NUM = 10  # tokens generated


class ArithmeticSplicer(ArithmeticDecoder):
    """Cells are copied as they are. `num_rows`: rows computed so far."""

    splices = True

    def __init__(self, config: ModelConfig, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.num_rows = 0

    def forward(self, step: StepInput) -> Floats:
        self.num_rows += len(step.tokens)
        page = self._cells.shape[2]
        for splice in step.splices:
            for offset in range(splice.length):
                source, target = splice.source_start + offset, splice.start + offset
                cell = self._cells[splice.source[source // page], :, source % page]
                self._cells[splice.table[target // page], :, target % page] = cell
        return super().forward(step)


def asked(*passages: int) -> tuple[list[int], list[list[int]]]:
    """A prompt of these passages, and their ranges."""
    prompt, chunks = INTRO.copy(), []
    for passage in passages:
        chunks.append([len(prompt), len(prompt) + len(PASSAGES[passage])])
        prompt += PASSAGES[passage]
    return prompt + QUESTION, chunks


def expected(
    config: ModelConfig, prompt: list[int], chunks: list[list[int]], num: int = NUM
) -> list[int]:
    """The tokens of a prompt spliced by hand: each chunk computed alone, then the pieces, then greedy decoding."""
    decoder = ArithmeticSplicer(config)
    decoder.allocate(100, PAGE)
    table, free = range(20), 20
    sources, taken = [], []
    for start, stop in chunks:
        num_pages = (stop - start) // PAGE
        sources.append(range(free, free + num_pages))
        free += num_pages
        ids = prompt[start : start + num_pages * PAGE]
        decoder.forward(StepInput(ids, [Span(0, len(ids), sources[-1])], []))
        taken.append(pic.taken_over((start, stop), len(prompt), PAGE))
    tokens, splices = prompt.copy(), []
    for piece in pic.pieces(taken, len(prompt)):
        length = piece.stop - piece.start
        if piece.chunk is not None:
            at = piece.start - chunks[piece.chunk][0]
            splices.append(Splice(sources[piece.chunk], at, table, piece.start, length))
            continue
        span = Span(piece.start, length, table)
        step = StepInput(prompt[piece.start : piece.stop], [span], [length - 1], splices)
        logits, splices = decoder.forward(step), []
    for _ in range(num):
        tokens.append(int(logits[0].argmax()))
        logits = decoder.forward(StepInput(tokens[-1:], [Span(len(tokens) - 1, 1, table)], [0]))
    return tokens[len(prompt) :]


def ask(bench: Bench, name: str, *passages: int, use: bool = True, **fields: Any) -> None:
    prompt, chunks = asked(*passages)
    one = request(name, prompt, **{"max_tokens": NUM, "temperature": 0} | fields)
    if use:
        one.chunks.extend(chunks)
    bench.submit(one)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("budget", [8, 40, 256])
def test_the_tokens_are_those_of_the_spliced_prompt(tiny_config: ModelConfig, budget: int) -> None:
    """Whether chunks are new or cached, in whatever steps: the result depends on the prompt and its chunks alone."""
    bench = Bench(ArithmeticSplicer(tiny_config), max_batched_tokens=budget, max_num_seqs=4)
    orders = {"new": (0, 1, 2), "again": (0, 1, 2), "shuffled": (2, 0), "twice": (1, 1)}
    for name, passages in orders.items():
        ask(bench, name, *passages)
        bench.run()
        prompt, chunks = asked(*passages)
        assert bench.tokens(name) == expected(tiny_config, prompt, chunks)
        taken = [pic.taken_over(chunk, len(prompt), PAGE) for chunk in chunks]
        exact = taken[0].start // PAGE * PAGE if name == "again" else PAGE
        # What was computed alone on its account was not cached.
        assert bench.cached[name] == (0 if name == "new" else exact + sum(map(len, taken)))


@pytest.mark.usefixtures("mode")
def test_a_chunk_is_computed_once(tiny_config: ModelConfig) -> None:
    """Requests that come while it is computed wait for it; later ones compute next to nothing."""
    decoder = ArithmeticSplicer(tiny_config)
    bench = Bench(decoder)
    ask(bench, "one", 0, 2)
    ask(bench, "two", 2, 0)
    bench.run()
    alone = 48 + 64
    in_place = len(INTRO) + len(QUESTION) + 2 * pic.RECOMPUTED
    assert decoder.num_rows == alone + 2 * in_place + 2 * (NUM - 1)
    for name, passages in {"one": (0, 2), "two": (2, 0)}.items():
        assert bench.tokens(name) == expected(tiny_config, *asked(*passages))
    assert bench.engine.counters["tokens_taken_over"] == 2 * (alone - 2 * pic.RECOMPUTED)
    assert bench.engine.counters["generation_tokens"] == 2 * NUM


@pytest.mark.usefixtures("mode")
def test_what_is_spliced_is_never_found_as_a_prefix(tiny_config: ModelConfig) -> None:
    """The same prompt without chunks is computed in full, after a spliced one, and its tokens are the exact ones."""
    bench = Bench(ArithmeticSplicer(tiny_config))
    ask(bench, "spliced", 0, 1, 2)
    bench.run()
    ask(bench, "exact", 0, 1, 2, use=False)
    bench.run()
    prompt, _ = asked(0, 1, 2)
    assert bench.tokens("exact") == expected(tiny_config, prompt, [])
    assert bench.tokens("exact") != bench.tokens("spliced")
    # Up to the first position taken over all is exact.
    assert bench.cached["exact"] == (len(INTRO) + pic.RECOMPUTED) // PAGE * PAGE


def test_exact_pages_go_before_splices(tiny_config: ModelConfig) -> None:
    """Of a prompt that was computed in full nothing is taken over, nor are its chunks computed alone."""
    decoder = ArithmeticSplicer(tiny_config)
    bench = Bench(decoder)
    ask(bench, "exact", 0, 1, 2, use=False)
    bench.run()
    before = decoder.num_rows
    ask(bench, "spliced", 0, 1, 2)
    bench.run()
    assert decoder.num_rows - before < PAGE + NUM
    assert bench.tokens("spliced") == bench.tokens("exact")


@pytest.mark.parametrize("chunk", [64, 512])
def test_with_all_recomputed_it_is_the_full_prefill(tiny_config: ModelConfig, chunk: int) -> None:
    """k >= the chunk's length: nothing is taken over, and nothing is computed twice."""
    decoder = ArithmeticSplicer(tiny_config)
    bench = Bench(decoder, num_recomputed=chunk)
    ask(bench, "r", 0, 1, 2)
    bench.run()
    prompt, _ = asked(0, 1, 2)
    assert bench.tokens() == expected(tiny_config, prompt, [])
    assert decoder.num_rows == len(prompt) + NUM - 1


@pytest.mark.usefixtures("mode")
def test_without_a_decoder_that_splices_all_is_computed(tiny_config: ModelConfig) -> None:
    """Chunks are a permission, not a demand."""
    bench = Bench(ArithmeticDecoder(tiny_config))
    ask(bench, "r", 0, 1)
    bench.run()
    prompt, _ = asked(0, 1)
    assert bench.tokens() == expected(tiny_config, prompt, [])


@pytest.mark.usefixtures("mode")
def test_all_choices_are_spliced_alike(tiny_config: ModelConfig) -> None:
    """The second choice cannot find the first one's prompt as a prefix; it takes over the same."""
    bench = Bench(ArithmeticSplicer(tiny_config))
    ask(bench, "r", 1, 0, n=2)
    bench.run()
    tokens = expected(tiny_config, *asked(1, 0))
    assert bench.tokens("r", 0) == bench.tokens("r", 1) == tokens


@pytest.mark.usefixtures("mode")
def test_a_resubmitted_request_goes_on_with_the_same_tokens(tiny_config: ModelConfig) -> None:
    """An engine that never saw the chunks splices as the lost one did."""
    tokens = expected(tiny_config, *asked(0, 2))
    bench = Bench(ArithmeticSplicer(tiny_config))
    ask(bench, "r", 0, 2, output=[tokens[:4]], attempt=1)
    bench.run()
    assert bench.tokens() == tokens


@pytest.mark.usefixtures("mode")
def test_a_preempted_request_computes_what_was_evicted(tiny_config: ModelConfig) -> None:
    """Its chunks went with its blocks: it goes on from a prompt that is computed in full, after the tokens it has."""
    bench = Bench(ArithmeticSplicer(tiny_config), num_blocks=22)
    ask(bench, "old", 0)
    bench.run()
    bench.submit(request("long", random_ids(180, seed=9), max_tokens=100, temperature=0))
    bench.step()
    ask(bench, "young", 0, max_tokens=60)
    bench.run()
    assert bench.engine.counters["preemptions"] > 0
    prompt, chunks = asked(0)
    found, spliced = bench.tokens("young"), expected(tiny_config, prompt, chunks, num=60)
    same = next(n for n in range(60) if found[n] != spliced[n])
    assert same > 0
    exact = expected(tiny_config, prompt + found[:same], [], num=60 - same)
    assert found == found[:same] + exact


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("num_steps", range(4))
def test_a_request_cancelled_while_it_waits_strands_nothing(
    tiny_config: ModelConfig, num_steps: int
) -> None:
    """The chunks are computed to their end, nobody hears of them, and whoever comes next finds them."""
    bench = Bench(ArithmeticSplicer(tiny_config), max_batched_tokens=64)
    ask(bench, "r", 0, 1, 2)
    for _ in range(num_steps):
        bench.step()
    for _, delta in bench.engine.cancel(Cancel(request="r", attempt=0)):
        bench.take(delta)
    bench.run()
    assert set(bench.ends) == {("r", 0)}
    ask(bench, "next", 2, 1, 0)
    bench.run()
    assert bench.tokens("next") == expected(tiny_config, *asked(2, 1, 0))


@pytest.mark.usefixtures("mode")
def test_requests_that_come_and_go_leave_no_queue_behind(tiny_config: ModelConfig) -> None:
    """Chunks that nobody waits for any more are not computed; those that somebody else waits for are."""
    decoder = ArithmeticSplicer(tiny_config)
    bench = Bench(decoder, max_batched_tokens=16, max_num_seqs=4)
    ask(bench, "stays", 0)
    for number in range(20):
        prompt = INTRO + PASSAGES[0] + random_ids(64, seed=100 + number) + QUESTION
        one = request(f"{number}", prompt, max_tokens=NUM, temperature=0)
        one.chunks.extend([[21, 69], [69, 133]])
        bench.submit(one)
        for _, delta in bench.engine.cancel(Cancel(request=f"{number}", attempt=0)):
            bench.take(delta)
        assert bench.engine.load().waiting + bench.engine.load().running <= 3
    bench.run()
    assert bench.tokens("stays") == expected(tiny_config, *asked(0))
    # The last one's own chunk is computed, as nobody came after it.
    in_place = len(INTRO) + len(QUESTION) + pic.RECOMPUTED
    assert decoder.num_rows == 48 + in_place + NUM - 1 + 64


@pytest.mark.usefixtures("mode")
def test_a_fault_in_a_chunk_is_not_the_request_s(tiny_config: ModelConfig) -> None:
    """What could not be computed alone is computed in place."""
    bench = Bench(ArithmeticSplicer(tiny_config, faults=(1,)))
    ask(bench, "r", 0, 1)
    bench.run()
    prompt, _ = asked(0, 1)
    assert bench.ends["r", 0].finish == "length"
    assert bench.tokens() == expected(tiny_config, prompt, [])


def test_tenants_do_not_share_chunks(tiny_config: ModelConfig) -> None:
    """The same words under another root are computed again."""
    decoder = ArithmeticSplicer(tiny_config)
    bench = Bench(decoder)
    prompt, chunks = asked(0, 1)
    rows = []
    for name, root in {"a": b"a" * 16, "b": b"b" * 16}.items():
        before = decoder.num_rows
        one = request(name, prompt, max_tokens=NUM, temperature=0)
        one.hashes.clear()
        bench.submit(type(one)(**{**_fields(one), "root": root, "chunks": chunks}))
        bench.run()
        rows.append(decoder.num_rows - before)
    assert rows[0] == rows[1]
    assert bench.cached["b"] == bench.cached["a"]
    assert bench.tokens("a") == bench.tokens("b") == expected(tiny_config, prompt, chunks)


def _fields(one: Any) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_a_chunk_is_fetched_like_any_prompt(tiny_config: ModelConfig) -> None:
    """What another engine computed of a chunk comes from there, all but its last page; the request itself asks for
    nothing."""
    other = Courier(ArithmeticSplicer(tiny_config))
    ask(other, "r", 1, 2)
    for want in (other.want(), other.want()):
        other.ready(want)
    other.finish("r")
    other.save_all()
    other.close()
    decoder = ArithmeticSplicer(tiny_config)
    courier = Courier(decoder, other.store)
    ask(courier, "r", 2, 0)
    wanted = {}
    for want in (courier.want(), courier.want()):
        wanted[want.request] = len(want.hashes)
        courier.populate(want, courier.load_of(want))
    courier.finish("r")
    courier.close()
    assert wanted == {"r+21": 3, "r+85": 2}
    assert courier.tokens() == expected(tiny_config, *asked(2, 0))
    in_place = len(INTRO) + len(QUESTION) + 2 * pic.RECOMPUTED
    assert decoder.num_rows == PAGE + 48 + in_place + NUM - 1
    assert not courier.wants


def test_ranges_that_are_none_are_refused(tiny_config: ModelConfig) -> None:
    """With the name of the field."""
    bench = Bench(ArithmeticSplicer(tiny_config))
    one = request("r", random_ids(50))
    one.chunks.append([10, 60])
    with pytest.raises(errors.InvalidRequest) as caught:
        bench.submit(one)
    assert caught.value.param == "chunks"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_happens_nothing_is_stranded_and_the_cache_stays_exact(
    tiny_config: ModelConfig, data: st.DataObject
) -> None:
    """Small pools, small budgets, cancellations, faults, guesses: every request ends once, the ledger balances after
    each step, and prompts without chunks get their exact tokens throughout."""
    draw = data.draw
    faults = tuple(draw(st.lists(st.integers(1, 60), max_size=2)))
    bench = Bench(
        ArithmeticSplicer(tiny_config, faults=faults),
        num_blocks=draw(st.integers(16, 40)),
        max_num_seqs=draw(st.integers(1, 4)),
        max_batched_tokens=draw(st.integers(4, 80)),
        asynchronous=draw(st.booleans()),
        speculation=draw(st.sampled_from([0, 3])),
        num_recomputed=draw(st.sampled_from([0, 1, 16])),
    )
    plain: dict[str, list[int]] = {}
    for number in range(draw(st.integers(1, 6))):
        passages = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
        use = draw(st.booleans())
        n = draw(st.sampled_from([1, 1, 2]))
        ask(bench, f"{number}", *passages, use=use, n=n)
        if not use:
            plain[f"{number}"] = passages
        for _ in range(draw(st.integers(0, 6))):
            bench.step()
        if draw(st.integers(0, 3)) == 0:
            for _, delta in bench.engine.cancel(Cancel(request=f"{number}", attempt=0)):
                bench.take(delta)
    bench.run()
    for (name, choice), end in bench.ends.items():
        if end.finish == "length":
            assert len(bench.tokens(name, choice)) == NUM
            if name in plain:
                exact = expected(tiny_config, asked(*plain[name])[0], [])
                assert bench.tokens(name, choice) == exact
        else:
            assert end.finish in ("cancelled", "failed")
    assert len(bench.finishes) == number + 1


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_chunks_that_are_fetched_strand_nothing_either(
    tiny_config: ModelConfig, data: st.DataObject
) -> None:
    """Wants answered late, in part or with nothing, for requests that may be gone by then."""
    draw = data.draw
    chance = Random(draw(st.integers(0, 2**32)))  # how often it is asked is up to threads
    store: dict[bytes, bytes] = {}
    for _ in range(2):  # the second engine finds what the first one stored
        courier = Courier(
            ArithmeticSplicer(tiny_config),
            store,
            num_blocks=draw(st.integers(16, 40)),
            max_batched_tokens=draw(st.integers(4, 80)),
            max_num_seqs=4,
            asynchronous=draw(st.booleans()),
        )
        names = [f"{number}" for number in range(draw(st.integers(1, 4)))]
        for name in names:
            passages = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
            ask(courier, name, *passages, use=draw(st.booleans()))
            for _ in range(draw(st.integers(0, 3))):
                courier.step()
            if draw(st.integers(0, 3)) == 0:
                for _, delta in courier.engine.cancel(Cancel(request=name, attempt=0)):
                    courier.take(delta)
            while courier.wants and chance.random() < 0.5:
                _answer(courier, chance.random() < 0.5)
        while (
            len(courier.ends) < len(names)
            or courier.engine._splicing.groups
            or courier.engine.has_work()
        ):
            while courier.wants:
                _answer(courier, chance.random() < 0.5)
            courier.step_or_wait()
        courier.save_all()
        courier.close()
        ledger = courier.engine.ledger()
        assert (ledger["live"], ledger["moving"], ledger["leased"]) == (0, 0, 0), ledger


def _answer(courier: Courier, gives: bool) -> None:
    want = courier.wants.pop(0)
    if gives:
        courier.populate(want, courier.load_of(want))
    else:
        courier.ready(want)


# ------------------------------------------------------------------------------------------------ the native kernels


@pytest.mark.skipif(native_decoder.available() is not None, reason="no native kernels")
@pytest.mark.usefixtures("mode")
def test_on_the_native_kernels_new_and_cached_chunks_give_the_same_bits(tmp_path: Path) -> None:
    """Tokens and log-probabilities of a spliced prompt do not depend on who computed its chunks, when, or in which
    steps; with everything recomputed they are those of the full prefill."""
    folder = make_tiny(tmp_path / "model", "llama", layers=3)
    prepared = open_prepared(folder, tmp_path)

    def run(*orders: tuple[int, ...], use: bool = True, **limits: Any) -> tuple[list[int], Floats]:
        bench = Bench(NativeDecoder(prepared, threads=1), **limits)
        for number, passages in enumerate(orders):
            ask(bench, f"{number}", *passages, use=use, logprobs=0)
            bench.run()
        last = f"{len(orders) - 1}"
        logprobs = [one.logprob for one in bench.logprobs[last, 0]]
        return bench.tokens(last), np.array(logprobs)

    new = run((2, 0, 1))
    assert_equal(run((0, 1), (2, 1), (2, 0, 1), max_batched_tokens=20, max_num_seqs=2), new)
    full = run((2, 0, 1), use=False)
    assert_equal(run((2, 0, 1), num_recomputed=64), full)
    assert not np.array_equal(full[1], new[1])


def assert_equal(found: tuple[list[int], Floats], wanted: tuple[list[int], Floats]) -> None:
    assert found[0] == wanted[0]
    assert np.array_equal(found[1], wanted[1])
