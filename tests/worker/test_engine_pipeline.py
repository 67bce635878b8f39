"""The engine over pipelines: the tokens are those of one stage, and faults and interrupts hit nobody else."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import (
    Decoder,
    Floats,
    Pipeline,
    Span,
    StepInput,
    as_pipeline,
)
from services.worker.flowserve.pace import FIRST_PREFILL_S
from services.worker.flowserve.plan import StepPlan
from services.worker.flowserve.stream import Launch, open_stream
from tests.worker.arithmetic import ArithmeticDecoder, ArithmeticPipeline, DelayedPipeline
from tests.worker.bench import GREEDY, PROMPT, SEEDED, Bench, request
from tests.worker.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny = make_tiny(folder / "tiny", "qwen3")
    return load_decoder(tiny, threads=1, cache_dir=folder / "cache")


def _serve(decoder: Decoder, **limits: Any) -> Bench:
    """A mixed load: long and short prompts, choices, late arrivals, blocks for about two thirds of it."""
    bench = Bench(decoder, num_blocks=30, max_num_seqs=12, max_batched_tokens=24, **limits)
    for number in range(5):
        kind = GREEDY if number % 2 else SEEDED
        bench.submit(request(f"early{number}", PROMPT[number : 10 + 15 * number], **kind))
    for _ in range(3):
        bench.step()
    bench.submit(request("three", PROMPT[:33], n=3, **SEEDED), request("long", PROMPT, **GREEDY))
    bench.run()
    return bench


@pytest.mark.parametrize("eager", [False, True], ids=["at finish", "at begin"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_pipeline_changes_no_token(model: Decoder, num_stages: int, eager: bool) -> None:
    """A real model served in two or four micro-batches, with preemptions, gives the tokens it gives in one."""
    plain = _serve(model)
    pipeline = DelayedPipeline(model, num_stages=num_stages, eager=eager)
    bench = _serve(pipeline)
    assert bench.ids == plain.ids
    assert bench.logprobs == plain.logprobs
    assert pipeline.max_inside == num_stages
    assert bench.engine.counters["preemptions"] > 0


@pytest.mark.parametrize(
    "limits",
    [{"asynchronous": True}, {"speculation": 4}, {"spread_chunks": False}],
    ids=lambda limits: next(iter(limits)),
)
def test_no_switch_breaks_a_pipeline(tiny_config: ModelConfig, limits: dict[str, Any]) -> None:
    """What is for one stage is of no account with several; keeping chunks together changes no token."""
    plain = _serve(ArithmeticDecoder(tiny_config, num_layers=4, habit=6))
    bench = _serve(ArithmeticPipeline(tiny_config, num_stages=4, habit=6), **limits)
    assert bench.ids == plain.ids
    assert bench.engine.counters["spec_proposed"] == 0


def test_one_stage_is_no_pipeline(tiny_config: ModelConfig, model: Decoder) -> None:
    """A decoder that could have stages but has one is used as any other."""
    single = DelayedPipeline(model, num_stages=1, eager=True)
    assert isinstance(single, Pipeline)
    assert as_pipeline(single) is None
    assert as_pipeline(ArithmeticDecoder(tiny_config)) is None
    assert as_pipeline(ArithmeticPipeline(tiny_config, num_stages=2)) is not None


@pytest.mark.parametrize("fault", [4, 5], ids=["in begin", "in finish"])
def test_a_fault_ends_the_sequences_of_its_step(tiny_config: ModelConfig, fault: int) -> None:
    """The other micro-batches, inside at the same time, go on; the further chunks of a prompt that failed are void."""
    alone = Bench(ArithmeticDecoder(tiny_config, num_layers=4))
    alone.submit(request(max_tokens=9))
    alone.run()
    decoder = ArithmeticPipeline(tiny_config, num_stages=4, faults=(fault,))
    # Step 1 computes "fine" whole; the chunks of "hit" are in all steps from there on.
    bench = Bench(decoder, max_num_seqs=4, max_batched_tokens=74)
    bench.submit(request("fine", max_tokens=9), request("hit", PROMPT * 6))
    errors = []
    while bench.engine.has_work():
        output = bench.step()
        errors += [output.error] if output.error else []
    assert [type(error) for error in errors] == [FloatingPointError]
    assert bench.ends["hit", 0].finish == "failed"
    assert bench.ends["fine", 0].finish == ("length" if fault == 4 else "failed")
    assert bench.tokens("fine") == alone.tokens()[: len(bench.tokens("fine"))]
    assert bench.engine.ledger()["live"] == 0


class _Interrupted(ArithmeticPipeline):
    """Ctrl-C before the third step goes in, before the fifth comes out, and in the sampling of the eighth."""

    num_begins = num_finishes = 0

    def begin(self, step: StepInput) -> None:
        self.num_begins += 1
        if self.num_begins == 3:
            raise KeyboardInterrupt
        super().begin(step)

    def finish(self) -> Floats:
        self.num_finishes += 1
        if self.num_finishes == 5:
            raise KeyboardInterrupt
        logits = super().finish()
        return logits.view(_Impatient) if self.num_finishes == 8 else logits


class _Impatient(np.ndarray[Any, Any]):
    """Logits whose second row cannot be read the first time."""

    has_raised = False

    def __getitem__(self, index: Any) -> Any:
        if index == 1 and not self.has_raised:
            self.has_raised = True
            raise KeyboardInterrupt
        return np.asarray(self)[index]


def test_an_interrupted_pipeline_goes_on(tiny_config: ModelConfig) -> None:
    """Who interrupts the library and goes on gets the tokens as if nothing had been."""
    benches = []
    for decoder in (
        ArithmeticDecoder(tiny_config, num_layers=2),
        _Interrupted(tiny_config, num_stages=2),
    ):
        bench = Bench(decoder, max_batched_tokens=64)
        for number in range(4):
            bench.submit(request(f"r{number}", PROMPT[number:], **SEEDED))
        num_interrupts = 0
        while bench.engine.has_work():
            try:
                bench.step()
            except KeyboardInterrupt:
                num_interrupts += 1
        benches.append(bench)
    assert num_interrupts == 3
    assert benches[0].ids == benches[1].ids


def test_an_engine_that_closes_empties_its_pipeline(tiny_config: ModelConfig) -> None:
    """The steps inside come out, and nobody waits for them."""
    decoder = ArithmeticPipeline(tiny_config, num_stages=4)
    bench = Bench(decoder, max_batched_tokens=16, max_num_seqs=4)
    bench.submit(request())
    bench.step()
    assert decoder.num_inside == 3
    bench.engine.close()
    assert decoder.num_inside == 0


def test_steps_that_overlap_are_not_counted_twice(tiny_config: ModelConfig) -> None:
    """What each step held up the others adds up to no more than the time that passed: the engine's pace is right."""
    decoder = ArithmeticPipeline(tiny_config, num_stages=4)
    decoder.allocate(4, 16)
    stream = open_stream(decoder, asynchronous=True)
    started = perf_counter()
    launches = []
    for number in range(4):
        tokens = StepInput([5] * 16, [Span(0, 16, [number])], [])
        launches.append(
            Launch(plan=StepPlan([]), input=tokens, rows=[], drafts=None, unknown=[], before=None)
        )
        stream.launch(launches[-1])
    for launch in launches:
        stream.collect(launch)
    assert all(launch.duration_s > 0 for launch in launches)
    assert sum(launch.duration_s for launch in launches) <= perf_counter() - started


def test_a_micro_batch_decodes_its_share_at_a_time(tiny_config: ModelConfig) -> None:
    """With as many requests, a pipeline of four predicts four times the steps, each of a quarter of them."""
    outstanding = []
    for decoder in (ArithmeticDecoder(tiny_config), ArithmeticPipeline(tiny_config, num_stages=4)):
        bench = Bench(decoder, max_num_seqs=8)
        bench.submit(*(request(str(number), [5], max_tokens=10) for number in range(8)))
        outstanding.append(bench.engine.load().outstanding_s)
    known_s = 8 * FIRST_PREFILL_S
    assert outstanding[1] - known_s == pytest.approx(4 * (outstanding[0] - known_s))
