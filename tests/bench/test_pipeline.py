"""`bench pipeline`: spreading a prompt's chunks over the micro-batches, in virtual time under the real engine."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from deepflow.bench.cli import app
from deepflow.bench.pipeline import (
    BARS,
    Clock,
    Load,
    SimulatedPipeline,
    StageTimes,
    bench_pipeline,
    simulate,
)
from services.worker.flowserve.decoder import Span, StepInput

SMALL = Load(num=30, long_every=6, long_len=4096, output_len=32)


def test_spreading_chunks_brings_long_prompts_their_first_token_sooner() -> None:
    """By 20 % and more of the mean TTFT with 2 and 4 stages, and not at the cost of the time per token."""
    report = bench_pipeline(SMALL, seed=3)
    assert {bar.metric for bar in BARS} == {"pp2_long_ttft_ratio", "pp4_long_ttft_ratio"}
    assert all(bar.met_by(report.metrics[bar.metric]) for bar in BARS)
    assert report.metrics["pp2_tpot_ratio"] < 1
    assert report.metrics["pp4_tpot_ratio"] < 1


def test_virtual_time_is_the_same_in_every_run() -> None:
    """A seed gives its figures to the last digit."""
    runs = [
        simulate(SMALL, num_stages=4, spread_chunks=True, times=StageTimes(), seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_lone_prompt_passes_the_stages_as_fast_as_they_go() -> None:
    """Spread, a prompt of n chunks takes n + stages - 1 stage times; kept, n times all the stages."""
    times = StageTimes(step_s=0.4, row_s=0.0, pair_s=0.0, hop_s=0.0)
    load = Load(num=1, long_every=1, long_len=512 * 8, output_len=2)
    ttft = [
        simulate(load, num_stages=4, spread_chunks=spread, times=times, seed=0)["long_ttft_mean_ms"]
        for spread in (True, False)
    ]
    assert ttft == pytest.approx([(8 + 3) * 100, 8 * 4 * 100])


def test_a_stage_takes_one_step_at_a_time() -> None:
    """The second step waits at each stage for the first, and only there."""
    clock = Clock()
    times = StageTimes(step_s=0.0, row_s=2.0, pair_s=0.0, hop_s=0.0)
    pipeline = SimulatedPipeline(2, times, clock)
    for length in (3, 1):
        pipeline.begin(StepInput([0] * length, [Span(0, length, [0])], [length - 1]))
    assert pipeline.finish().shape == (1, pipeline.config.vocab)
    assert clock.now == 6
    pipeline.finish()
    assert clock.now == 7


def test_pairs_are_of_rows_and_what_they_attend_to() -> None:
    """A row at position p attends to p + 1 positions."""
    times = StageTimes(step_s=0.0, row_s=0.0, pair_s=1.0, hop_s=0.0)
    step = StepInput([0] * 4, [Span(10, 3, [0]), Span(5, 1, [0])], [3])
    assert times.stage_s(step, 2) == (11 + 12 + 13 + 6) / 2


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    """`bench pipeline --json FILE` has mean and p99 of TTFT and TPOT both ways, ratios, bars and settings."""
    target = tmp_path / "report.json"
    small = ["--num", "12", "--long-every", "6", "--output-len", "8", "--seed", "5"]
    done = CliRunner().invoke(app, ["pipeline", *small, "--json", str(target)])
    assert done.exit_code == 0, done.output
    body = orjson.loads(target.read_bytes())
    for stages in (2, 4):
        for how in ("spread", "kept"):
            for what in ("long_ttft", "chat_ttft", "tpot"):
                for figure in ("mean", "p99"):
                    assert body["metrics"][f"pp{stages}_{how}_{what}_{figure}_ms"] > 0
        assert body["bars"][f"pp{stages}_long_ttft_ratio"]["met"]
    assert body["settings"]["seed"] == 5
    assert body["settings"]["long_every"] == 6


def test_a_load_without_long_prompts_is_refused() -> None:
    """There would be nothing to compare."""
    done = CliRunner().invoke(app, ["pipeline", "--num", "5", "--long-every", "6"])
    assert done.exit_code == 2
