"""What a request brought, and goodput."""

from __future__ import annotations

import pytest

from deepflow.bench.sample import Goal, Sample, figures, num_good, tokens_per_s

GOOD = Sample(
    sent_s=10.0,
    status=200,
    times_s=(10.1, 10.2, 10.4),
    finish="length",
    prompt_tokens=5,
    output_tokens=5,
)
REFUSED = Sample(sent_s=10.0, status=429, error="busy")
CUT = Sample(sent_s=10.0, status=200, times_s=(10.5,), error="the stream broke off")


def test_latencies_are_vllms() -> None:
    """TTFT is sent to first token, E2EL sent to last, TPOT the mean over the tokens after the first."""
    assert GOOD.ttft_s == pytest.approx(0.1)
    assert GOOD.e2el_s == pytest.approx(0.4)
    assert GOOD.tpot_s == pytest.approx(0.3 / 4)
    assert GOOD.itl_s == pytest.approx([0.1, 0.2])


def test_a_single_token_has_no_time_per_further_token() -> None:
    """TPOT of one token is 0, and does not enter the distribution."""
    single = Sample(sent_s=0.0, status=200, times_s=(1.0,), finish="stop", output_tokens=1)
    assert single.tpot_s == 0.0
    assert "tpot_p50_ms" not in figures([single])


@pytest.mark.parametrize(
    ("goals", "number"),
    [
        ((), 1),
        (("ttft:101",), 1),
        (("ttft:99",), 0),
        (("ttft:101", "tpot:74"), 0),
        (("ttft:101", "tpot:76", "e2el:401"), 1),
    ],
)
def test_a_good_request_keeps_every_limit(goals: tuple[str, ...], number: int) -> None:
    """Goodput counts whole answers that keep all limits; refused and broken ones never count."""
    parsed = [Goal.parse(goal) for goal in goals]
    assert num_good([GOOD, REFUSED, CUT], parsed) == number


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "speed:3", "ttft:-1", "ttft:nan", ""])
def test_a_goal_that_makes_no_sense_is_refused(text: str) -> None:
    """A goal is a known measure, a colon, and a positive number."""
    with pytest.raises(ValueError, match=r"goal|limit|float"):
        Goal.parse(text)


def test_figures_count_all_and_rate_what_was_answered() -> None:
    """Failures are counted by status; rates run from the first request sent to the last token."""
    found = figures([GOOD, REFUSED, CUT], [Goal("ttft", 200.0)])
    assert (found["num_requests"], found["num_completed"], found["num_failed"]) == (3, 1, 2)
    assert (found["failed_429"], found["failed_no_answer"]) == (1, 1)
    assert found["duration_s"] == pytest.approx(0.5)
    assert found["output_tokens_per_s"] == pytest.approx(10)
    assert found["goodput_per_s"] == pytest.approx(2)
    assert found["good_share"] == pytest.approx(1 / 3)


def test_nothing_answered_is_no_rate() -> None:
    """Without any answer there are counts, and neither rates nor latencies."""
    found = figures([REFUSED])
    assert found["num_failed"] == 1
    assert not any(name.endswith(("_per_s", "_ms")) for name in found)
    assert tokens_per_s([REFUSED]) == 0.0
