"""What the engine predicts from its own steps."""

from __future__ import annotations

import pytest

from services.worker.flowserve.pace import Pace


def learned() -> Pace:
    """A pace that has seen decode steps of 8 at 20 ms, and prefills of 100 tokens beside 8 decodes at 70 ms."""
    pace = Pace()
    for _ in range(200):
        pace.observe(0.02, num_decodes=8, num_prefill_tokens=0)
        pace.observe(0.07, num_decodes=8, num_prefill_tokens=100)
    return pace


def test_a_step_is_priced_by_its_decodes_and_its_prefill() -> None:
    """The prefill part of a mixed step is what exceeds its decode part."""
    pace = learned()
    assert pace.step_s(8, 0) == pytest.approx(0.02)
    assert pace.step_s(0, 200) == pytest.approx(0.1)
    assert pace.step_s(8, 100) == pytest.approx(0.07)
    assert pace.step_s(0, 0) == 0


def test_a_batch_size_not_seen_is_priced_as_the_nearest_one() -> None:
    """Sizes are told apart by powers of two."""
    pace = learned()
    pace.observe(0.1, num_decodes=64, num_prefill_tokens=0)
    assert pace.decode_s(1) == pace.decode_s(5) == pytest.approx(0.02)
    assert pace.decode_s(33) == pace.decode_s(500) == pytest.approx(0.1)


def test_the_first_step_is_predicted_slow() -> None:
    """Before anything is measured a step may take long without the engine counting as hung."""
    assert Pace().step_s(1, 256) > 1


def test_output_still_to_come_is_bounded_by_what_is_allowed() -> None:
    """Average length less what is done, at least one token, at most what max_tokens leaves."""
    pace = Pace()
    assert pace.output_left(10, 300) == 290
    pace.observe_output(100)
    assert pace.output_left(10, 300) == 90
    assert pace.output_left(200, 300) == 1
    assert pace.output_left(10, 20) == 10


def test_work_outstanding_is_prefill_plus_shared_decode_steps() -> None:
    """Eight choices of 50 tokens each take 50 steps together."""
    assert learned().outstanding_s(200, 400, 8) == pytest.approx(0.1 + 50 * 0.02)
