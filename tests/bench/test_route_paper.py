"""`deepflow bench route --paper`: the trace it makes, and a short run of it."""

from rich.progress import Progress

from deepflow.bench.route.paper import POLICIES, QUICK, bench_paper, code_generation


def test_the_trace_has_the_papers_lengths_and_shares_nothing() -> None:
    """About 2,000 tokens in and 200 out at the rate asked for; no block occurs twice; a seed is a trace."""
    calls = code_generation(2000, 5.0, 1)
    assert calls == code_generation(2000, 5.0, 1)
    assert 1900 < sum(call.input_length for call in calls) / 2000 < 2400
    assert 190 < sum(call.output_length for call in calls) / 2000 < 240
    assert 360 < calls[-1].timestamp_ms / 1000 < 440
    blocks = [block for call in calls for block in call.hash_ids]
    assert len(blocks) == len(set(blocks))


async def test_every_request_is_done_by_every_policy_and_a_seed_gives_the_same_numbers() -> None:
    """A short run: nothing is lost at any load, and the run can be repeated."""
    with Progress(disable=True) as progress:
        report = await bench_paper(QUICK, 3, progress)
        again = await bench_paper(QUICK, 3, progress)
    assert report.metrics == again.metrics
    for load, _ in QUICK.rates:
        assert all(report.metrics[f"done_share.{name}.{load}"] == 1.0 for name in POLICIES.values())
        assert report.metrics[f"jct_ratio.{load}"] > 0
