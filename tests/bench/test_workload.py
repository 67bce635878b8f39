"""Prompts and arrivals."""

from __future__ import annotations

from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepflow.bench import workload


def test_prompts_are_as_long_as_asked_and_repeat_with_the_seed() -> None:
    """A seed gives the same prompts again, each of the length asked, all different."""
    first = list(islice(workload.random_prompts(Random(1), 32), 20))
    assert first == list(islice(workload.random_prompts(Random(1), 32), 20))
    assert {len(prompt.split()) for prompt in first} == {32}
    assert len({prompt.split()[0] + prompt.split()[1] for prompt in first}) > 1
    assert len(set(first)) == 20


def test_prefixes_repeat_and_suffixes_do_not() -> None:
    """Prompts of the prefix dataset share a few beginnings and end each in its own way."""
    source = workload.prefix_repetition(Random(2), prefix_len=16, suffix_len=8, num_prefixes=3)
    prompts = [prompt.split() for prompt in islice(source, 60)]
    assert {len(prompt) for prompt in prompts} == {24}
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 3
    assert len({tuple(prompt[16:]) for prompt in prompts}) == 60


@given(st.integers(1, 200), st.floats(0.01, 1000), st.floats(0.1, 10), st.integers(0, 9))
def test_arrivals_keep_the_rate(num: int, rate: float, burstiness: float, seed: int) -> None:
    """Arrivals begin at 0, never go back, and the last comes when the rate says."""
    times_s = workload.arrivals(Random(seed), num, rate, burstiness)
    assert len(times_s) == num
    assert times_s[0] == 0.0
    assert times_s == sorted(times_s)
    assert times_s[-1] == pytest.approx((num - 1) / rate) or num == 1


def test_burstiness_sets_the_spread_of_the_gaps() -> None:
    """Low burstiness bunches arrivals, high burstiness evens them out."""

    def variation(burstiness: float) -> float:
        times_s = workload.arrivals(Random(3), 4000, 1.0, burstiness)
        gaps = [late - early for early, late in pairwise(times_s)]
        mean = sum(gaps) / len(gaps)
        return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)

    assert variation(0.2) > 1.8
    assert variation(1.0) == pytest.approx(1.0, abs=0.15)
    assert variation(25.0) < 0.3


def test_an_infinite_rate_is_all_at_once() -> None:
    """Without a rate everything arrives at 0."""
    assert workload.arrivals(Random(0), 5, float("inf")) == [0.0] * 5
