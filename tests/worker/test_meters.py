"""The pod's metrics: blocks by state, what TEs fetched and copied over the restart of one, and their starts."""

from __future__ import annotations

from dataclasses import replace

from services.worker.meters import Meters
from shared.messages import TeBeat
from shared.metrics import Metrics
from shared.scaling_messages import Start, Step


def beat(te: str, **counters: float) -> TeBeat:
    return TeBeat(
        id=te,
        model="m",
        pod="pod-1",
        state="ready",
        blocks_total=100,
        blocks_used=30,
        blocks_cached=20,
        blocks_leased=10,
        counters=counters,
    )


def test_the_states_of_all_blocks_add_up_to_the_pool() -> None:
    """Each block is in one state; those of a TE that died are in none."""
    metrics = Metrics()
    meters = Meters(metrics)
    meters.beat("0", beat("te-1"))
    states = {"live": 30, "cached": 20, "leased": 10, "free": 40}
    for state, number in states.items():
        line = f'deepflow_kv_blocks{{model_name="m",state="{state}",te="0"}} {number:.1f}'
        assert line in metrics.text().decode()
    meters.died("m", "0", "te-1")
    for state in states:
        line = f'deepflow_kv_blocks{{model_name="m",state="{state}",te="0"}} 0.0'
        assert line in metrics.text().decode()


def test_counters_of_fetches_and_copies_live_on_over_a_restart() -> None:
    """The series of a place goes on growing when its TE was replaced by one that counts from zero."""
    metrics = Metrics()
    meters = Meters(metrics)
    meters.beat("0", beat("te-1", copied_pages=5, fetched_arena=2))
    meters.died("m", "0", "te-1")
    meters.beat("0", beat("te-2", copied_pages=3, fetched_arena=0))
    text = metrics.text().decode()
    assert 'deepflow_kv_copied_pages_total{model_name="m",te="0"} 8.0' in text
    assert 'deepflow_kv_fetched_arena_total{model_name="m",te="0"} 2.0' in text


def test_what_bands_got_and_were_refused_is_told_apart() -> None:
    """A series for each band, of tokens and of refusals; and how much of the work taken on yields."""
    metrics = Metrics()
    meters = Meters(metrics)
    told = beat(
        "te-1", tokens_batch=70, tokens_default=30, refused_batch=2, yields=4, tokens_taken_over=9
    )
    meters.beat("0", replace(told, outstanding_s=3.0, outstanding_batch_s=2.0, waiting_tokens=11))
    text = metrics.text().decode()
    for line in (
        'deepflow_te_band_tokens_total{band="batch",model_name="m",te="0"} 70.0',
        'deepflow_te_band_tokens_total{band="default",model_name="m",te="0"} 30.0',
        'deepflow_te_refusals_total{band="batch",model_name="m",te="0"} 2.0',
        'deepflow_te_yields_total{model_name="m",te="0"} 4.0',
        'deepflow_kv_tokens_taken_over_total{model_name="m",te="0"} 9.0',
        'deepflow_te_outstanding_batch_seconds{model_name="m",te="0"} 2.0',
        'deepflow_te_waiting_tokens{model_name="m",te="0"} 11.0',
    ):
        assert line in text
    assert 'band="taken_over"' not in text


def test_the_steps_of_starts_are_counted_by_how_they_were_done() -> None:
    """Each start adds its five steps to the histograms of its kind of process and source of weights."""
    metrics = Metrics()
    meters = Meters(metrics)
    steps = {step.value: 0.02 for step in Step}
    for process in ("fork", "fork", "warm"):
        meters.started(
            Start(
                te="te-1",
                model="m",
                role="colocated",
                process=process,
                weights="dram",
                steps=steps,
                total_s=0.1,
            )
        )
    text = metrics.text().decode()
    for step in Step:
        for process, number in (("fork", 2.0), ("warm", 1.0)):
            labels = f'process="{process}",step="{step.value}",weights="dram"'
            assert f"deepflow_scaling_step_seconds_count{{{labels}}} {number}" in text
