"""The counter-based noise of sampling."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.worker.flowserve.noise import uniform

seeds = st.integers(0, 2**64 - 1)


@given(seed=seeds, choice=st.integers(0, 127), index=st.integers(0, 2**31))
def test_noise_is_a_function_of_its_arguments_in_the_half_open_interval(
    seed: int, choice: int, index: int
) -> None:
    """Equal arguments give equal noise, and it never reaches 1."""
    noise = uniform(seed, choice, index)
    assert noise == uniform(seed, choice, index)
    assert 0 <= noise < 1


def test_noise_never_changes_between_versions() -> None:
    """A resubmitted request may be continued by an engine of another release: these values are fixed."""
    assert uniform(0, 0, 0) == 0.86275875086926
    assert uniform(2**64 - 1, 1, 7) == 0.20591847385394613


def test_neighbouring_counters_are_unrelated() -> None:
    """Over seeds, choices and indices the noise is spread evenly: mean 1/2, lag-one correlation about 0."""
    for draws in (
        [uniform(7, 0, index) for index in range(4000)],
        [uniform(seed, 0, 0) for seed in range(4000)],
        [uniform(7, choice, 3) for choice in range(4000)],
    ):
        mean = sum(draws) / len(draws)
        pairs = pairwise(draws)
        covariance = sum((a - mean) * (b - mean) for a, b in pairs) / len(draws)
        assert abs(mean - 0.5) < 0.02
        assert abs(covariance) < 0.006
