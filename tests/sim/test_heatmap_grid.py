"""`deepflow heatmap`: the grid, simulated hardware, and the file that a JE reads."""

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from deepflow.heatmap.cli import app
from deepflow.heatmap.grid import Grid, Shape, measure
from deepflow.heatmap.simulated import Simulated
from deepflow.sim.profile import NPU_34B_TP4
from services.scheduler.heatmap import Heatmap, Heatmaps
from shared.errors import InvalidRequest


async def test_a_long_prompt_with_a_short_answer_gains_by_a_pair_and_a_long_answer_loses() -> None:
    """The structure of the paper's heatmaps, on simulated TEs; the same grid gives the same map."""
    grid = Grid(prefill_lens=(2048,), ratios=(0.0625, 2.0), rates=(2.0,), num_requests=24)
    with Progress(disable=True) as progress:
        measured = await measure(Simulated(NPU_34B_TP4), grid, progress)
        again = await measure(Simulated(NPU_34B_TP4), grid, progress)
    assert measured == again
    assert measured.heatmap.value(2048, 128) > 0 > measured.heatmap.value(2048, 4096)
    assert Heatmap.from_json(measured.to_json(model="m")) == measured.heatmap


async def test_rates_follow_from_what_the_colocated_tes_can_take() -> None:
    """A higher load is a higher rate; none reaches the capacity of the middle shape."""
    grid = Grid(prefill_lens=(256,), ratios=(0.25,), loads=(0.2, 0.6), num_requests=4)
    hardware = Simulated(NPU_34B_TP4)
    with Progress(disable=True) as progress:
        rates = (await measure(hardware, grid, progress)).heatmap.rates
    capacity = await hardware.capacity(Shape.of(256, 0.25))
    assert rates == pytest.approx((0.2 * capacity, 0.6 * capacity), rel=0.06)


@pytest.mark.parametrize("axis", ["prefill_lens", "ratios", "rates", "loads"])
def test_an_axis_that_does_not_ascend_is_refused(axis: str) -> None:
    """The axis is named."""
    axes = {"prefill_lens": (1, 2), "ratios": (1.0,), "rates": (1.0,), "loads": (0.5,)}
    with pytest.raises(InvalidRequest) as caught:
        Grid(**(axes | {axis: (2, 1)}))
    assert caught.value.param == axis


def test_the_command_keeps_the_heatmap_where_the_schedulers_look(tmp_path, monkeypatch) -> None:
    """What was measured decides for that model, without a restart; the picture and the report are written too."""
    monkeypatch.setenv("DEEPFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("DEEPFLOW_HEATMAPS", raising=False)
    arguments = [
        "--on",
        "simulator",
        "--profile",
        "34b-tp4-npu",
        "--model",
        "org/name",
        "--num",
        "4",
    ]
    arguments += ["--prefill-lens", "256,512", "--ratios", "0.25", "--rates", "1,2"]
    arguments += ["--picture", str(tmp_path / "map.png"), "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    heatmaps = Heatmaps()
    assert heatmaps.load(tmp_path / "heatmaps") == []
    assert heatmaps.of("org/name").source == "simulator"
    assert heatmaps.of("org/name").prefill_lens == (256, 512)
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert b'"stability"' in (tmp_path / "report.json").read_bytes()


def test_the_command_names_what_it_cannot_read() -> None:
    """Exit 2 for a list that is none, and for an axis that does not ascend."""
    run = CliRunner().invoke
    assert run(app, ["--ratios", "x"]).exit_code == 2
    assert run(app, ["--rates", "2,1"]).exit_code == 2
