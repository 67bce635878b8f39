"""`bench scale`: what is made of beats, of smaps and of a day's answers. Pure parts."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deepflow.bench.sample import Sample
from deepflow.bench.scale.day import TeClock, count, day, named, oracle_te_seconds
from deepflow.bench.scale.memory import Memory, extra_te_mb, family, memory_of, parse
from deepflow.bench.scale.plan import DAY_BARS, JUDGED, QUICK, WAYS, DayPlan, Plan
from deepflow.bench.scale.steps import counts, step_figures, step_table
from shared import catalog
from shared.scaling_messages import PodBeat, PodTe, Start, Step
from tests.worker.peers import MODEL, make_model

ROLLUP = """\
00400000-7ffd2f5fe000 ---p 00000000 00:00 0                              [rollup]
Rss:              200000 kB
Pss:               30000 kB
Pss_Dirty:         18000 kB
Pss_Anon:          20000 kB
Pss_File:           9000 kB
Pss_Shmem:          1000 kB
"""


def start(total_s: float, *, process: str = "warm", weights: str = "dram") -> Start:
    """Of a TE whose loading took all of it."""
    steps = {Step.TE_LOAD.value: total_s}
    return Start(
        te=f"te-{total_s}", model="m", role="colocated", process=process, weights=weights,
        steps=steps, total_s=total_s,
    )  # fmt: skip


def answer(
    status: int, *, num_tokens: int = 1, error: str = "", retry_after_s: float = -1
) -> Sample:
    """What a request brought, half a second after it was sent."""
    return Sample(
        sent_s=1.0,
        status=status,
        times_s=(1.5,) * num_tokens,
        finish="" if error else "length",
        error=error,
        retry_after_s=retry_after_s,
        output_tokens=num_tokens,
    )


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_is_what_the_kernel_shares_out() -> None:
    """PSS in all, and its anonymous and its file part, shared memory counted as file; RSS does not matter."""
    assert parse(ROLLUP) == Memory(30000 << 10, 20000 << 10, 10000 << 10)


def test_one_more_te_is_the_difference_by_number() -> None:
    """What came between two readings is divided among the TEs that came."""
    found = extra_te_mb(
        Memory(10_000_000, 4_000_000, 6_000_000), Memory(50_000_000, 24_000_000, 26_000_000), 4
    )
    assert found == {"extra_te_mb": 10.0, "extra_te_anonymous_mb": 5.0, "extra_te_file_mb": 5.0}


def test_a_process_that_ended_takes_nothing() -> None:
    """A TE may be gone between the list of processes and the reading."""
    assert memory_of([2**22 + 1]) == Memory()
    assert family(2**22 + 1) == []


# ----------------------------------------------------------------------------------------------------------- steps


def test_a_step_that_was_done_ahead_took_no_time() -> None:
    """Medians by step, 0 for a step that a start does not name, and the slowest start."""
    found = step_figures("8", [start(1.0), start(2.0), start(4.0)])
    assert found["step_te_load_s.8"] == found["step_total_s.8"] == 2.0
    assert found["step_te_pre_load_s.8"] == 0.0
    assert found["step_total_max_s.8"] == 4.0


def test_starts_are_counted_by_process_and_by_weights() -> None:
    """So that a way that was not the one meant is seen."""
    starts = [start(1.0), start(2.0, process="fork"), start(3.0, process="fork", weights="disk")]
    assert counts("x", starts) == {
        "starts_warm.x": 1, "starts_fork.x": 2, "weights_dram.x": 2, "weights_disk.x": 1,
    }  # fmt: skip


def test_the_table_has_a_row_for_each_way_that_was_measured() -> None:
    """A way without figures has no row; one with has all five steps."""
    metrics = step_figures("warm_hit", [start(0.125)]) | {"zero_s.warm_hit": 0.25}
    table = step_table(metrics, {"warm_hit": "pre-warmed TE", "exec_miss": "none"})
    screen = Console(file=io.StringIO(), width=200)
    screen.print(table)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert table.row_count == 1
    assert all(step.value in shown for step in Step)
    assert "pre-warmed TE" in shown
    assert "0.25" in shown


# ------------------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize(
    ("to", "steps"), [(64, [2, 8, 32, 64]), (32, [2, 8, 32]), (20, [2, 8, 20]), (2, [2])]
)
def test_the_climb_ends_where_it_is_to(to: int, steps: list[int]) -> None:
    """The paper's numbers of TEs below the last, and the last."""
    assert Plan(to=to).steps() == steps


def test_each_judged_way_is_measured() -> None:
    """A bar is about a way that the plan goes, and the quick plan goes one of them."""
    assert set(JUDGED.values()) <= {way.name for way in WAYS}
    assert {way.name for way in QUICK.ways} & set(JUDGED.values())


# ------------------------------------------------------------------------------------------------------------- day


@given(seed=st.integers(0, 1000), number=st.integers(0, 2))
def test_a_day_has_its_waves_and_nothing_between_them(seed: int, number: int) -> None:
    """Each wave opens with its burst, and requests come only inside waves."""
    plan = DayPlan()
    period_s = plan.day_s / plan.num_waves
    times = day(plan, number, Random(seed))
    begins = [(wave + number / 3) * period_s for wave in range(plan.num_waves)]
    assert times == sorted(times)
    for begin in begins:
        assert times.count(begin) == plan.burst
    for at in times:
        assert any(0 <= at - begin < plan.wave_share * period_s for begin in begins)


def test_the_oracle_keeps_a_te_through_short_gaps_only() -> None:
    """A gap shorter than a start is bridged, a longer one is not; each start is paid."""
    spans = [(0.0, 10.0), (11.0, 20.0), (30.0, 40.0)]
    assert oracle_te_seconds(spans, keep_up=4, start_s=2.0) == pytest.approx(20 + 2 + 10 + 2)
    assert oracle_te_seconds(spans, keep_up=4, start_s=0.5) == pytest.approx(10 + 9 + 10 + 3 * 0.5)


def test_the_oracle_has_a_second_te_for_what_one_does_not_keep_up_with() -> None:
    """Only while that many are in work."""
    spans = [(0.0, 10.0)] * 4 + [(5.0, 7.0)]
    assert oracle_te_seconds(spans, keep_up=4, start_s=0.0) == pytest.approx(10 + 2)
    assert oracle_te_seconds([], keep_up=4, start_s=1.0) == 0.0


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 20)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.floats(0, 5),
)
def test_the_oracle_pays_at_least_for_the_work_and_a_start(
    works: list[tuple[float, float]], keep_up: int, start_s: float
) -> None:
    """`keep_up` requests at most share a TE's second."""
    spans = [(begin, begin + took) for begin, took in works]
    found = oracle_te_seconds(spans, keep_up=keep_up, start_s=start_s)
    assert found >= sum(took for _, took in works) / keep_up + start_s - 1e-6


def test_tes_are_paid_from_beat_to_beat() -> None:
    """Whatever state they are in; a model that no beat names has none."""
    clock = TeClock(["a", "b"], 10.0)
    clock.heard(_beat("a", "a"), 11.0)
    clock.heard(_beat("a", "b"), 13.0)
    clock.pass_to(14.0)
    assert clock.te_seconds == {"a": 5.0, "b": 1.0}
    assert clock.changes == {"a": [(0.0, 0), (1.0, 2), (3.0, 1)], "b": [(0.0, 0), (3.0, 1)]}


def _beat(*models: str) -> PodBeat:
    tes = [PodTe(te="", model=model, role="colocated", state="loading") for model in models]
    return PodBeat(kind="pod", id="pod-1", host="here", tes=tes)


def test_a_503_that_tells_when_to_come_back_is_no_failure() -> None:
    """One that does not is, as is every other 5xx, a 404, and a stream that broke off."""
    found = count(
        [
            answer(200),
            answer(503, num_tokens=0, error="model_not_ready", retry_after_s=2),
            answer(503, num_tokens=0, error="unavailable"),
            answer(500, num_tokens=0, error="internal"),
            answer(404, num_tokens=0, error="model_not_found"),
            answer(200, error="the stream broke off"),
        ]
    )
    assert found["day_num_ok"] == 1
    assert found["day_num_503"] == 1
    assert found["day_num_5xx"] == 2
    assert found["day_num_404"] == 1
    assert found["day_num_broken"] == 1
    assert {bar.metric for bar in DAY_BARS} <= found.keys()


def test_one_model_is_three_in_the_days_cache(tmp_path: Path) -> None:
    """Each name opens as a model of its own, and the weights that were prepared serve them all."""
    make_model(tmp_path)
    model = catalog.open_model(tmp_path, MODEL)
    (tmp_path / "prepared").mkdir(exist_ok=True)
    with named(model, tmp_path) as cache:
        for name in ("morning", "noon", "evening"):
            opened = catalog.open_model(cache, name)
            assert opened.name == name
            assert orjson.loads((opened.path / "config.json").read_bytes())
        assert (cache / "prepared").resolve() == tmp_path / "prepared"
    assert not cache.exists()
