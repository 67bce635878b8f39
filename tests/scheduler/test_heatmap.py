"""The heatmap: look-up between cells, its file, the analytic default, and the folder that JEs read."""

import os

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.heatmap import Heatmap, Heatmaps
from shared.errors import InvalidRequest

LENGTHS = st.integers(1, 1 << 20)


def small(*values: float) -> Heatmap:
    """Two lengths (100, 400) by two ratios (0.25, 1), one rate; values row by row."""
    a, b, c, d = values
    return Heatmap(
        prefill_lens=(100, 400),
        ratios=(0.25, 1.0),
        rates=(1.0,),
        values=(((a, b), (c, d)),),
        source="engine",
    )


def test_a_cell_has_its_own_value_and_between_cells_it_is_bilinear_on_logarithmic_axes() -> None:
    """100 tokens and a quarter of it are the first cell; 200 and a half lie in the middle of all four."""
    heatmap = small(0.1, 0.3, -0.2, 0.6)
    assert heatmap.value(100, 25) == pytest.approx(0.1)
    assert heatmap.value(400, 400) == pytest.approx(0.6)
    assert heatmap.value(200, 100) == pytest.approx((0.1 + 0.3 - 0.2 + 0.6) / 4)


def test_beyond_the_edge_is_the_edge() -> None:
    """A shape that nobody measured has the value of the nearest one on the edge."""
    heatmap = small(0.1, 0.3, -0.2, 0.6)
    assert heatmap.value(1, 1) == pytest.approx(0.3)
    assert heatmap.value(1 << 20, 1) == pytest.approx(-0.2)
    assert heatmap.value(0, 0) == pytest.approx(0.3)


@settings(max_examples=50)
@given(LENGTHS, LENGTHS)
def test_no_value_lies_outside_what_was_measured(prefill_len: int, decode_len: int) -> None:
    """Interpolation invents no gain and no loss."""
    heatmap = Heatmap.analytic()
    cells = [value for row in heatmap.sums for value in row]
    assert min(cells) - 1e-9 <= heatmap.value(prefill_len, decode_len) <= max(cells) + 1e-9


def test_the_rates_are_summed_cell_by_cell_and_stability_counts_one_sign() -> None:
    """Of two cells one changes its sign between the two rates."""
    heatmap = Heatmap(
        prefill_lens=(100,),
        ratios=(0.5, 1.0),
        rates=(1.0, 2.0),
        values=(((0.2, 0.3),), ((0.1, -0.5),)),
        source="engine",
    )
    assert heatmap.sums[0] == pytest.approx((0.3, -0.2))
    assert heatmap.stability == 0.5


def test_the_analytic_heatmap_has_the_shape_of_the_papers() -> None:
    """A long prompt with a short answer is split, a short one with a long answer is not, and signs are stable."""
    heatmap = Heatmap.analytic()
    assert heatmap.value(2048, 200) > 0 > heatmap.value(256, 1024)
    assert heatmap.value(1024, 4096) < 0
    assert heatmap.stability > 0.8


def test_what_is_written_is_read_again() -> None:
    """The file holds the whole heatmap; what is told beside it is ignored."""
    heatmap = Heatmap.analytic()
    assert Heatmap.from_json(heatmap.to_json(model="m", jct_s=[1])) == heatmap


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("source", 3),
        ("prefill_lens", [400, 100]),
        ("ratios", "0.25"),
        ("rates", [0.0]),
        ("rates", []),
        ("values", [[[0.1, 0.2]]]),
        ("values", [[[0.1, 0.2], [0.3, None]]]),
        ("values", [[[0.1, 0.2], [0.3, -1.0]]]),
    ],
)
def test_a_bad_file_is_refused_and_the_field_named(field: str, value: object) -> None:
    """Whoever wrote the file learns where to look."""
    body = orjson.loads(small(0.1, 0.3, -0.2, 0.6).to_json())
    with pytest.raises(InvalidRequest) as caught:
        Heatmap.from_json(orjson.dumps(body | {field: value}))
    assert caught.value.param == field


def test_a_file_is_loaded_replaced_and_forgotten_while_others_stand(tmp_path) -> None:
    """A JE follows its folder: new, changed, broken and removed files, without a restart."""
    heatmaps = Heatmaps()
    path = tmp_path / "org=2Fname.json"
    default = heatmaps.of("org/name")
    assert heatmaps.load(tmp_path / "missing") == []

    path.write_bytes(small(0.1, 0.1, 0.1, 0.1).to_json())
    assert heatmaps.load(tmp_path) == []
    assert heatmaps.of("org/name").value(200, 100) == pytest.approx(0.1)
    assert heatmaps.of("another") == default

    path.write_bytes(b"{")
    os.utime(path, ns=(1, 1))
    [wrong] = heatmaps.load(tmp_path)
    assert str(path) in wrong.message
    assert heatmaps.load(tmp_path) == []  # told once
    assert heatmaps.of("org/name").value(200, 100) == pytest.approx(0.1)

    path.unlink()
    heatmaps.load(tmp_path)
    assert heatmaps.of("org/name") == default
