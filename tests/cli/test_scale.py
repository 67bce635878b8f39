"""`deepflow scale`: what is asked for, and when it is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deepflow.cli.main import app
from deepflow.cli.scale import Watch, Wish, steps_table
from shared.scaling_messages import Fleet, PodBeat, PodTe, ScalingEntry, SetScaling, Start, Step

FLEET = Fleet(model="m", term=1, target=4, ready=4, starting=0, min_tes=4, max_tes=4)
FOUR = ScalingEntry(model="m", min_tes=4, max_tes=4)


def start(te: str, total_s: float) -> Start:
    """How a TE came up: each step took a hundredth of all."""
    return Start(
        te=te, model="m", role="colocated", process="fork", weights="dram",
        steps=dict.fromkeys(Step, total_s / 100), total_s=total_s,
    )  # fmt: skip


def pod(*roles: str, starts: tuple[Start, ...] = ()) -> PodBeat:
    """A pod host with a TE of each of these roles."""
    tes = [PodTe(te=f"te-{n}", model="m", role=r, state="ready") for n, r in enumerate(roles)]
    return PodBeat(kind="pod", id="pod-1", host="h", tes=tes, starts=list(starts))


def test_a_wish_changes_only_what_it_names() -> None:
    """What is not named stays, unless all is taken back first."""
    assert Wish().is_empty
    asked = SetScaling(model="m", by="me", min_tes=2, max_tes=2)
    assert Wish(least=2, most=2).order("m", "me") == asked
    back = SetScaling(model="m", by="me", min_tes=-1, max_tes=-1, keep_alive_s=-1)
    assert Wish(is_reset=True).order("m", "me") == back
    assert Wish(is_reset=True, most=3).order("m", "me") == replace(back, max_tes=3)


@pytest.mark.parametrize(
    ("fleet", "done"),
    [
        (FLEET, True),
        (replace(FLEET, ready=3, starting=1), False),
        (replace(FLEET, starting=1), False),
        (replace(FLEET, ready=5), False),  # one is still draining
        (replace(FLEET, min_tes=2, max_tes=2), False),  # said before the manager knew
        (replace(FLEET, target=2, ready=2), False),
    ],
)
def test_it_is_done_when_the_fleet_is_as_it_is_to_be(fleet: Fleet, done: bool) -> None:
    """The bounds are heeded, the target is inside, and so many TEs are up."""
    watch = Watch(FOUR)
    assert not watch.is_done
    watch.on_fleet(fleet, 0.0)
    assert watch.is_done == done


def test_fixed_roles_stand_beside_the_bounds() -> None:
    """A fleet counts the prefill and decode TEs, which no bound is for."""
    watch = Watch(FOUR)
    watch.on_fleet(replace(FLEET, target=6, ready=6, min_tes=6, max_tes=6), 0.0)
    assert not watch.is_done
    watch.on_pod(pod("prefill", "decode", "colocated"))
    assert watch.is_done


def test_it_is_stuck_only_when_nothing_moves_any_more() -> None:
    """No room, nobody on the way, and no change for a while."""
    watch = Watch(FOUR)
    short = replace(FLEET, ready=2, short=True)
    for now, fleet in ((0.0, replace(short, ready=1, starting=1)), (10.0, short)):
        watch.on_fleet(fleet, now)
        assert not watch.is_stuck(now)
    watch.on_fleet(short, 14.0)
    assert watch.is_stuck(14.0)
    watch.on_fleet(replace(short, term=0, short=False), 14.0)  # a deposed manager
    assert watch.is_stuck(14.0)


def test_only_new_starts_of_the_model_are_shown() -> None:
    """Each once, however often pod hosts tell of it; the slowest are shown one by one, then the median."""
    watch = Watch(FOUR, frozenset({"te-old"}))
    other = replace(start("te-x", 1.0), model="other")
    new = tuple(start(f"te-{n}", 1.0 + n) for n in range(10))
    for _ in range(2):
        watch.on_pod(pod(starts=(start("te-old", 9.0), other, *new)))
    assert list(watch.starts) == [one.te for one in new]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(steps_table(watch.starts.values()))
    text = shown.get()
    assert "te-9" in text
    assert "te-0" not in text
    assert "median of 10" in text
    assert "5500 ms" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "3", "--min", "2"], "--to"),
        (["--min", "3", "--max", "2"], "--max"),
        (["--to", "2"], "Nothing runs"),
    ],
)
def test_what_cannot_be_meant_says_why(
    arguments: list[str], said: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contradictions, and a home in which nothing runs, end with one line."""
    monkeypatch.setenv("DEEPFLOW_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["scale", "m", *arguments])
    assert result.exit_code != 0
    assert said in result.stderr
