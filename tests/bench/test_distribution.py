"""Percentiles."""

from __future__ import annotations

from itertools import pairwise

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepflow.bench.distribution import percentile, summary

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values, st.floats(0, 100))
def test_percentile_is_numpys(sample: list[float], percent: float) -> None:
    """A percentile is the one that numpy computes."""
    assert percentile(sample, percent) == pytest.approx(
        float(numpy.percentile(sample, percent)), rel=1e-9, abs=1e-6
    )


@given(values)
def test_percentiles_lie_between_least_and_greatest(sample: list[float]) -> None:
    """Percentiles grow from the least to the greatest value."""
    found = [percentile(sample, percent) for percent in (0, 50, 90, 99, 100)]
    assert found[0] == min(sample)
    assert found[-1] == pytest.approx(max(sample))
    assert all(late >= early - 1e-6 for early, late in pairwise(found))


@pytest.mark.parametrize(("sample", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_refuses_what_has_none(sample: list[float], percent: float) -> None:
    """No values, or a percentage outside 0 to 100, is an error."""
    with pytest.raises(ValueError, match="percentile"):
        percentile(sample, percent)


def test_summary_names_its_figures_by_unit() -> None:
    """A summary is flat, with the unit in each name, and empty without values."""
    assert summary("ttft", "ms", [3.0, 1.0, 2.0]) == {
        "ttft_mean_ms": 2.0,
        "ttft_p50_ms": 2.0,
        "ttft_p90_ms": pytest.approx(2.8),
        "ttft_p99_ms": pytest.approx(2.98),
    }
    assert summary("ttft", "ms", []) == {}
