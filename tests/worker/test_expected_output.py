"""A predicted length of the answer, in what an engine says of its load."""

from __future__ import annotations

from services.worker.flowserve.decoder import Decoder
from tests.worker.bench import GREEDY, Bench, request


def reserved(decoder: Decoder, expected_output: int, output: list[int] | None = None) -> int:
    """Blocks that a fresh engine counts on needing for one request of up to 160 tokens."""
    bench = Bench(decoder)
    one = request("r", max_tokens=160, output=[output] if output else [], **GREEDY)
    bench.engine.submit(one, expected_output=expected_output)
    return bench.engine.load().blocks_reserved


def test_a_prediction_counts_in_place_of_what_is_usual(decoder: Decoder) -> None:
    """Fewer blocks and less work are expected of a short answer; what is allowed still bounds a long one."""
    usual = reserved(decoder, 0)  # nothing has been learned: all that is allowed
    assert reserved(decoder, 16) < reserved(decoder, 80) < usual
    assert reserved(decoder, 10_000) == usual


def test_what_was_delivered_before_does_not_count_as_predicted(decoder: Decoder) -> None:
    """A resumed answer is predicted to bring so many tokens more, whatever it had brought."""
    delivered = [5] * 48
    whole, rest = reserved(decoder, 80), reserved(decoder, 32, delivered)
    assert whole == rest
