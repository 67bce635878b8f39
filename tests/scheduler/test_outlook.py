"""What a request without a TE may expect: stages, who is held back, refusals, and when to try again."""

from __future__ import annotations

from dataclasses import replace

from services.scheduler.outlook import (
    FRESH_S,
    OFF_RETRY_S,
    QUEUED,
    RETRY_AFTER_S,
    SOON_MS,
    SPREAD_S,
    WARM,
    Outlook,
    Stage,
)
from shared.messages import TeBeat
from shared.scaling_messages import Fleet

ASLEEP = Fleet(model="m", term=1, target=0, ready=0, starting=0, max_tes=8)
WAKING = replace(ASLEEP, target=1, starting=1, progress=40, eta_ms=2000)
OFF = replace(ASLEEP, max_tes=0)


def beat(state: str, loading: int = 0) -> TeBeat:
    """A TE of the model."""
    return TeBeat(id="te-1", model="m", pod="pod-1", state=state, loading=loading)


def outlook(*fleets: Fleet) -> Outlook:
    """One that has heard these at 0 s."""
    made = Outlook()
    for fleet in fleets:
        made.heard(fleet, 0.0)
    return made


def test_the_stage_follows_the_te_that_is_furthest() -> None:
    """Queued while none comes, loading by the manager's word or the TE's own, warm once one is up."""
    assert Outlook().stage("m", [], 0.0) == QUEUED
    assert outlook(ASLEEP).stage("m", [], 0.0) == QUEUED
    assert outlook(WAKING).stage("m", [], 0.0) == Stage("loading", 40)
    assert outlook(WAKING).stage("m", [beat("loading", 70)], 0.0) == Stage("loading", 70)
    assert Outlook().stage("m", [beat("loading", 10)], 0.0) == Stage("loading", 10)
    assert Outlook().stage("m", [beat("draining")], 0.0) == QUEUED
    assert outlook(WAKING).stage("m", [beat("loading", 70), beat("ready")], 0.0) == WARM


def test_what_was_said_long_ago_counts_for_nothing() -> None:
    """Without a manager nobody is refused or held back, and nobody is told of progress."""
    seen = outlook(OFF)
    assert seen.refusal("m", budget_s=9, num_ahead=0, is_alive=False, now=FRESH_S)
    late = FRESH_S + 0.1
    assert seen.refusal("m", budget_s=9, num_ahead=0, is_alive=False, now=late) is None
    assert not outlook(WAKING).is_spreading("m", late)
    assert outlook(WAKING).stage("m", [], late) == QUEUED


def test_a_deposed_manager_is_not_listened_to() -> None:
    """A lower term changes nothing while the one with the higher term speaks, and counts again once that is silent."""
    seen = outlook(replace(WAKING, term=5))
    seen.heard(replace(OFF, term=4), 1.0)
    assert seen.fleet("m", 1.0) == replace(WAKING, term=5)
    seen.heard(replace(OFF, term=4), 1.0 + FRESH_S)
    assert seen.fleet("m", 1.0 + FRESH_S) == replace(OFF, term=4)


def test_a_model_that_may_have_no_te_is_refused_at_once() -> None:
    """Unless one is there yet, whatever the manager says of it."""
    seen = outlook(OFF)
    refusal = seen.refusal("m", budget_s=300, num_ahead=0, is_alive=False, now=0.0)
    assert refusal is not None
    assert refusal.retry_after_s == OFF_RETRY_S
    assert seen.refusal("m", budget_s=300, num_ahead=0, is_alive=True, now=0.0) is None
    assert not outlook(ASLEEP).is_off("m", is_alive=False, now=0.0)


def test_who_cannot_be_served_in_time_is_told_when_to_come_back() -> None:
    """The manager's estimate and those who wait before are held against the budget; without an estimate nobody is
    refused."""
    seen = outlook(WAKING)
    assert seen.refusal("m", budget_s=2.0, num_ahead=0, is_alive=False, now=0.0) is None
    refusal = seen.refusal("m", budget_s=1.9, num_ahead=0, is_alive=False, now=0.0)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (503, 2.0)
    for number in range(20):  # one a second leaves
        seen.left("m", float(number), is_last=False)
    seen.heard(WAKING, 20.0)
    crowd = seen.refusal("m", budget_s=10.0, num_ahead=30, is_alive=False, now=20.0)
    assert crowd is not None
    assert crowd.retry_after_s is not None
    assert 31.0 < crowd.retry_after_s < 33.0
    seen.heard(replace(WAKING, eta_ms=-1), 20.0)
    assert seen.refusal("m", budget_s=0.1, num_ahead=30, is_alive=False, now=20.0) is None


def test_retry_after_comes_from_what_was_seen() -> None:
    """The manager's estimate where there is one, else how long a start took before, and who waits before; bounded."""
    seen = Outlook()
    low, high = RETRY_AFTER_S
    unknown = seen.retry_after_s("m", num_ahead=0, is_ready=False, now=0.0)
    assert low < unknown < high
    seen.waits("m", 10.0)
    seen.woke("m", 22.0)
    seen.woke("m", 99.0)  # another TE; nobody has waited for it
    assert seen.retry_after_s("m", num_ahead=0, is_ready=False, now=22.0) == 12.0
    assert seen.retry_after_s("m", num_ahead=0, is_ready=True, now=22.0) == low
    seen.heard(WAKING, 22.0)
    assert seen.retry_after_s("m", num_ahead=0, is_ready=False, now=22.0) == 2.0
    seen.left("m", 30.0, is_last=False)
    seen.left("m", 31.0, is_last=True)
    assert seen.retry_after_s("m", num_ahead=10**6, is_ready=True, now=31.0) == high


def test_a_long_pause_between_two_herds_is_no_gap() -> None:
    """Who is the last to leave ends the measurement; the next herd begins another."""
    seen = Outlook()
    for start in (0.0, 1000.0):
        for number in range(3):
            seen.left("m", start + number, is_last=number == 2)
    assert seen.retry_after_s("m", num_ahead=10, is_ready=True, now=1002.0) == 10.0


def test_spreading_lasts_as_long_as_tes_come_and_not_for_ever() -> None:
    """From the first word of a TE on its way until none is, at most `SPREAD_S`: what never comes holds up nobody."""
    seen = outlook(WAKING)
    assert seen.is_spreading("m", 0.0)
    assert not seen.is_spreading("other", 0.0)
    seen.heard(WAKING, SPREAD_S)
    assert seen.is_spreading("m", SPREAD_S)
    seen.heard(WAKING, SPREAD_S + 1)
    assert not seen.is_spreading("m", SPREAD_S + 1)
    seen.heard(replace(WAKING, ready=1, starting=0), SPREAD_S + 2)
    seen.heard(WAKING, SPREAD_S + 3)
    assert seen.is_spreading("m", SPREAD_S + 3)


def test_a_burst_is_shared_out_while_others_come_at_any_moment() -> None:
    """Each of the TEs that are wanted has its part of all tasks; where they take long, a TE may have what it runs."""
    soon = replace(WAKING, target=4, eta_ms=SOON_MS)
    assert outlook(soon).share("m", 10, 0.0) == 3
    assert outlook(soon).share("m", 0, 0.0) == 1
    assert outlook(replace(soon, eta_ms=SOON_MS + 1)).share("m", 10, 0.0) is None
    assert outlook(replace(soon, eta_ms=-1)).share("m", 10, 0.0) is None
    assert outlook(soon).share("m", 10, FRESH_S + 1) is None
