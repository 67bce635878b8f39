"""The record of a TE's start: its five steps, whatever order the news of them came in."""

from __future__ import annotations

import pytest

from services.worker.starts import KEPT, RECENT_S, Starting, Starts
from services.worker.tie import Loaded, Ready, StepTook, WeightsCame
from shared.scaling_messages import Start, Step


def came_up(*, heard_first: bool) -> Start | None:
    starting = Starting(100.0)
    starting.made("fork", 100.25)
    for event in (
        StepTook(Step.TE_PRE_LOAD, 0.1),
        Loaded(40),
        StepTook(Step.TE_LOAD, 0.2),
        WeightsCame("dram"),
        StepTook(Step.TE_POST_LOAD, 0.3),
    ):
        starting.take(event, 101.0)
    assert starting.progress == 40
    assert starting.done("te-1", "m", "colocated") is None
    if heard_first:
        starting.heard(101.5)
        assert starting.done("te-1", "m", "colocated") is None
        starting.take(Ready(), 101.75)
    else:
        starting.take(Ready(), 101.5)
        starting.heard(101.75)
        starting.heard(109.0)  # a later beat is no news
    return starting.done("te-1", "m", "colocated")


@pytest.mark.parametrize(("heard_first", "scaler_post"), [(False, 0.25), (True, 0.0)])
def test_a_start_is_told_once_both_ends_of_it_are_known(
    heard_first: bool, scaler_post: float
) -> None:
    """The pod host measures before and after, the TE what lies between; the whole is as long as it took."""
    start = came_up(heard_first=heard_first)
    assert start is not None
    assert (start.te, start.process, start.weights, start.total_s) == ("te-1", "fork", "dram", 1.75)
    assert start.steps == {
        "scaler_pre": 0.25,
        "te_pre_load": 0.1,
        "te_load": 0.2,
        "te_post_load": 0.3,
        "scaler_post": scaler_post,
    }


def test_starts_are_remembered_and_the_latest_told_for_a_while() -> None:
    """The last ones are kept for people; a beat holds those that are seconds old."""
    start = came_up(heard_first=False)
    assert start is not None
    starts = Starts()
    for number in range(KEPT + 6):
        starts.add(start, float(number))
    assert len(starts.all()) == KEPT
    now = float(KEPT + 6)
    assert len(starts.recent(now)) == RECENT_S
    assert starts.recent(now + RECENT_S) == []
