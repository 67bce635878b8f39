"""`bench route`: what it compares with, what it sends, and what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepflow.bench.cli import app
from deepflow.bench.report import Report
from deepflow.bench.route.ladder import Cell, run_all, run_one
from deepflow.bench.route.live import LivePlan, users
from deepflow.bench.route.oracle import ideal, pooled
from deepflow.bench.route.picture import curves, draw
from deepflow.bench.route.plan import Plan, capacity, rate_of
from deepflow.bench.route.spread import spread
from deepflow.bench.route.validate import paged
from deepflow.replay.live import Shot
from deepflow.replay.prompts import Prompts
from deepflow.sim.trace import BLOCK, Call, conversations
from services.scheduler.policy.roster import NAMES


def call(*ids: int, tail: int = 1) -> Call:
    """A prompt of these blocks in full, and `tail` tokens more."""
    return Call(0.0, len(ids) * BLOCK + tail, 10, (*ids, -1))


def test_the_ideal_finds_what_came_before() -> None:
    """Leading blocks that any earlier prompt left are found, later ones only behind them."""
    assert ideal([call(1, 2), call(1, 2, 3), call(4, 2)]) == 2 * BLOCK


def test_a_pool_forgets_what_was_not_used() -> None:
    """Of more blocks than fit the least recently used ones go, and the end of a prompt before its beginning."""
    calls = [call(1, 2, 3), call(4), call(1, 2, 3)]
    assert pooled(calls, 4) == 3 * BLOCK
    assert pooled(calls, 3) == 2 * BLOCK
    assert pooled(calls, 1) == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), small=st.integers(1, 300), more=st.integers(0, 300))
def test_more_room_finds_no_less(seed: int, small: int, more: int) -> None:
    """A larger pool finds at least what a smaller one finds, and at most the ideal."""
    calls = conversations(80, seed)
    found = pooled(calls, small)
    assert 0 <= found <= pooled(calls, small + more) <= ideal(calls)


def test_users_share_a_system_prompt_and_nothing_else() -> None:
    """A seed gives the same conversations; all open with one prompt and say things of their own."""
    plan = LivePlan(num_users=4, num_turns=3)
    talks = users(plan, Random(1))
    assert talks == users(plan, Random(1)) != users(plan, Random(2))
    assert {talk.turns[0] for talk in talks} == {talks[0].turns[0]}
    own = [turn for talk in talks for turn in talk.turns[1:]]
    assert len(own) == len(set(own)) == 12
    assert all(len(talk.waits_s) == 3 for talk in talks)


METRICS = {
    "hit_vs_ideal": 0.99,
    "ttft_p99_s.deepflow.2": 1.0,
    "ttft_p99_s.deepflow.0.5": 0.5,
    "ttft_p99_s.round-robin.2": 9.0,
    "goodput.deepflow.2": 1.9,
}


def test_metrics_become_curves() -> None:
    """`name.policy.rate` is a point of that policy's curve, in the order of the rates."""
    assert curves(METRICS, "ttft_p99_s") == {
        "deepflow": [(0.5, 0.5), (2.0, 1.0)],
        "round-robin": [(2.0, 9.0)],
    }
    assert curves(METRICS, "tpot_p99_s") == {}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """In the format of its file's name, whatever part of the figures there is."""
    path = tmp_path / "ladder.png"
    draw(Report(bench="route", metrics=METRICS, machine={}, settings={}), path)
    assert path.stat().st_size > 1000


SMALL = Plan(num=60, num_tes=2, policies=NAMES[:2], loads=(0.5,), num_blocks=(500,))


def test_a_run_is_the_same_in_every_process() -> None:
    """Cells computed elsewhere, in whatever order, bring what they bring here."""
    calls = conversations(60, 3)
    cells = [Cell(policy=policy, label="2", speed=2.0) for policy in SMALL.policies]
    done: list[None] = []
    runs = run_all(cells, calls, SMALL, 1, lambda: done.append(None))
    assert len(done) == 2
    assert runs == {cell: run_one(cell, calls, SMALL, 1) for cell in cells}


def test_what_was_not_done_does_not_look_quick() -> None:
    """A request that fits no TE counts with its deadline, and not as a good one."""
    calls = [call(1), call(*range(200))]
    run = run_one(Cell(policy="deepflow", label="1", num_blocks=50), calls, SMALL, 0)
    assert run.figures["failed_share"] == 0.5
    assert run.figures["ttft_p99_s"] > 500
    assert run.figures["ttft_p50_s"] > 250


def test_without_time_ours_finds_nearly_all_there_is() -> None:
    """Blocks go where their prompt's beginning is, the others everywhere; a seed gives the same places."""
    calls = conversations(400, 1)
    free = spread(calls, "deepflow", num_tes=4)
    assert free == spread(calls, "deepflow", num_tes=4)
    assert 0.9 * ideal(calls) <= free.found <= ideal(calls)
    assert max(free.imbalances) < 2.5
    assert spread(calls, "round-robin", num_tes=4).found < free.found
    assert spread(calls, "deepflow", num_tes=4, num_blocks=50).found < free.found
    assert spread(calls, "deepflow", num_tes=1, num_blocks=300).found == pooled(calls, 300)


def test_the_ladder_spans_what_the_tes_can_take() -> None:
    """Twice the TEs take twice the rate; rates that are given go before shares of it."""
    calls = conversations(60, 3)
    one, two = (capacity(calls, SMALL.profile, num) for num in (1, 2))
    assert two == pytest.approx(2 * one)
    assert list(SMALL.ladder(calls)) == pytest.approx([0.5 * two], rel=0.05)
    assert replace(SMALL, rates=(3.0, 1.5)).ladder(calls) == (1.5, 3.0)
    assert rate_of([call(1), replace(call(1), timestamp_ms=500.0)]) == pytest.approx(4.0)


def test_the_command_reports_every_policy_at_every_rate(tmp_path: Path) -> None:
    """Each promised metric is there, hits are shares of what there was, and a picture is drawn."""
    picture, target = tmp_path / "ladder.svg", tmp_path / "report.json"
    what = ("--rates", "1,2", "--policies", "deepflow,least-load")
    where = ("--picture", str(picture), "--json", str(target))
    done = CliRunner().invoke(app, ["route", "--quick", *what, *where])
    assert done.exit_code == 0, done.output
    assert "TTFT p99" in done.output
    metrics = orjson.loads(target.read_bytes())["metrics"]
    for policy in ("deepflow", "least-load"):
        for rate in ("1", "2"):
            for name in ("ttft_p99_s", "tpot_p99_s", "jct_p99_s", "goodput"):
                assert metrics[f"{name}.{policy}.{rate}"] > 0
        for name in ("hit_vs_ideal", "hit_vs_pooled_1000", "hit_vs_pooled_2000"):
            assert 0 < metrics[f"{name}.{policy}"] < 1.2  # a split LRU may beat a pooled one
    assert metrics["hit_vs_ideal"] == metrics["hit_vs_ideal.deepflow"]
    assert metrics["imbalance_p99_60s"] >= 1
    assert 0 < metrics["loaded_hit_vs_ideal.deepflow.1"] <= 1.01
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies", "deepflow,chance"], "there is no 'chance'"),
        (["--rates", "1,-2"], "no list of numbers above 0"),
        (["--live", "--validate"], "one question at a time"),
        (["--profile", "none.json"], "no profile 'none.json'"),
        (["--trace", "none.jsonl"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str) -> None:
    """Before anything is computed, with the reason."""
    done = CliRunner().invoke(app, ["route", "--quick", *arguments])
    assert done.exit_code != 0
    assert said in done.output


def test_a_simulated_replay_knows_the_pages_that_were_really_sent() -> None:
    """Each full page of a prompt is a block to simulate, equal where the prompts are; what is not full is its own."""
    prompts = Prompts(block=32)
    calls = [call(1, 2, tail=8), call(1, 3, tail=8)]
    shots = [Shot(prompts.prompt(one), 5) for one in calls]
    first, second = paged(calls, shots)
    assert first.input_length == second.input_length == len(shots[0].prompt)
    assert first.output_length == 5
    assert len(first.hash_ids) == -(-first.input_length // 16)
    shared = [a == b for a, b in zip(first.hash_ids, second.hash_ids, strict=True)]
    assert shared == [True, True] + [False] * (len(shared) - 2)
