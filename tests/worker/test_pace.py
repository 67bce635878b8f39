"""What the engine predicts from its own steps."""

from __future__ import annotations

import pytest

from services.worker.flowserve.pace import MAX_SURE_STEPS, SURE_STEPS, TELLING_TOKENS, Pace


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


def test_a_prefill_is_priced_by_tokens_not_by_steps() -> None:
    """A step of few tokens, which takes long for each, says little about a long prompt."""
    pace = Pace()
    assert pace.measured_prefill_s == 0.0
    for _ in range(50):
        pace.observe(0.1, num_decodes=0, num_prefill_tokens=1000)
        pace.observe(0.01, num_decodes=0, num_prefill_tokens=2)
    assert pace.measured_prefill_s < 2e-4
    assert pace.prefill_s(1000) > 0.1


def test_how_long_a_prompt_takes_at_least_is_told_by_full_steps() -> None:
    """Neither the first steps, which are slow, nor those of a few tokens count; what is left is halved, and once more
    for each stage of a pipeline after the first."""
    for num_stages in (1, 4):
        pace = Pace(max_tokens=256, num_stages=num_stages)
        for _ in range(100):
            pace.observe(0.5, num_decodes=0, num_prefill_tokens=5)
        assert pace.least_prefill_s(1000) == 0.0
        for number in range(SURE_STEPS):
            assert pace.least_prefill_s(1000) == 0.0
            pace.observe(30.0 if number < 3 else 0.2, num_decodes=0, num_prefill_tokens=200)
        assert pace.least_prefill_s(1000) == pytest.approx(1.0 / (2 * num_stages))


def test_what_was_measured_on_a_slow_machine_is_doubted_in_the_end() -> None:
    """Each request that is given up for it counts against it, until others are computed again and tell better."""
    pace = Pace(max_tokens=100)
    for _ in range(1000):
        pace.observe(100.0, num_decodes=0, num_prefill_tokens=100)
    given_up = 0
    while pace.least_prefill_s(100) == 50.0:
        pace.doubt()
        given_up += 1
    assert given_up <= MAX_SURE_STEPS
    assert pace.least_prefill_s(100) == 0.0
    for _ in range(SURE_STEPS):
        pace.observe(0.1, num_decodes=0, num_prefill_tokens=100)
    assert pace.least_prefill_s(100) == pytest.approx(0.05)


def test_an_expected_length_goes_before_the_average() -> None:
    """What was predicted of this very choice counts, up to what it may have; at least one more token is to come."""
    pace = Pace()
    pace.observe_output(50)
    assert pace.output_left(10, 1000) == 40
    assert pace.output_left(10, 1000, 300) == 290
    assert pace.output_left(10, 200, 300) == 190
    assert pace.output_left(400, 1000, 300) == 1


def test_what_one_more_sequence_adds_to_a_step() -> None:
    """The slope between the batches measured, and at least a quarter of a share; nothing before the first."""
    pace = Pace()
    assert pace.row_s == 0.0
    pace.observe(0.010, num_decodes=1, num_prefill_tokens=0)
    assert pace.row_s == pytest.approx(0.0025)
    pace.observe(0.031, num_decodes=8, num_prefill_tokens=0)
    assert pace.row_s == pytest.approx(0.003)
    pace.observe(0.008, num_decodes=16, num_prefill_tokens=0)
    assert pace.row_s == pytest.approx(0.008 / 64)


def test_a_dummy_request_tells_others_nothing() -> None:
    """The engine itself goes by few tokens; whoever compares TEs is told once there were more."""
    pace = Pace()
    pace.observe(0.4, num_decodes=0, num_prefill_tokens=6)
    assert pace.measured_prefill_s == pytest.approx(0.4 / 6)
    assert pace.telling_prefill_s == 0
    pace.observe(0.1, num_decodes=0, num_prefill_tokens=TELLING_TOKENS)
    assert pace.telling_prefill_s == pace.measured_prefill_s > 0
