"""Liveness: silence and stalls are death, our own absence is not."""

from __future__ import annotations

from shared.liveness import Liveness


def test_silence_is_reported_once() -> None:
    """An instance silent for longer than the time-out is lost once, and a later beat revives it."""
    liveness = Liveness(1.5)
    liveness.beat("te", 0.0)
    reports = [liveness.lost(now / 10) for now in range(30)]

    assert [name for report in reports for name in report] == ["te"]
    assert reports[16] == ["te"]
    liveness.beat("te", 3.0)
    assert liveness.alive("te")


def test_a_beating_but_stalled_instance_is_lost() -> None:
    """Beats without progress do not keep an instance alive."""
    liveness = Liveness(1.5)
    liveness.beat("te", 0.0)
    lost = []
    for tick in range(20):
        liveness.beat("te", tick / 10, stalled=True)
        lost += liveness.lost(tick / 10)

    assert lost == ["te"]


def test_our_own_stall_is_forgiven() -> None:
    """If the judge itself did not run for a while, silence during that time is nobody's fault."""
    liveness = Liveness(1.5)
    liveness.beat("te", 0.0)
    assert liveness.lost(0.1) == []
    assert liveness.lost(60.0) == []
    assert liveness.lost(60.5) == []
    liveness.lost(61.0)
    assert liveness.lost(61.6) == ["te"]


def test_nobody_is_judged_while_the_bus_is_away() -> None:
    """During hold nobody is lost, and after resume every clock starts anew."""
    liveness = Liveness(1.5)
    liveness.beat("te", 0.0)
    liveness.hold()
    assert [liveness.lost(now / 2) for now in range(20)] == [[]] * 20
    liveness.resume(10.0)
    assert liveness.lost(10.4) == []
    assert [liveness.lost(10.5 + i / 2) for i in range(4)][-1] == ["te"]


def test_down_is_believed_at_once() -> None:
    """A declared death takes effect immediately and is not reported again."""
    liveness = Liveness(1.5)
    liveness.beat("te", 0.0)

    assert liveness.down("te")
    assert not liveness.down("te")
    assert not liveness.alive("te")
    assert liveness.lost(5.0) == []
