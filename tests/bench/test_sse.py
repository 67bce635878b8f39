"""Reading a recorded event stream."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from deepflow.bench import sse


def _event(body: object) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


STREAM = (
    b": queued\n\n"
    + _event({"choices": [{"text": "", "finish_reason": None}]})
    + _event({"choices": [{"text": "Paris é", "finish_reason": None}]})
    + _event({"choices": [{"delta": {"content": "!"}, "finish_reason": None}]})
    + _event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    + _event({"choices": [], "usage": {"completion_tokens": 3}})
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_an_answer_does_not_depend_on_how_it_was_cut(cuts: list[int]) -> None:
    """Wherever the network cut the bytes, text, end and usage are the same, and each chunk has its last byte's time."""
    ends = sorted({*cuts, len(STREAM)} - {0})
    starts = [0, *ends[:-1]]
    answer = sse.read(
        [(float(end), STREAM[start:end]) for start, end in zip(starts, ends, strict=True)]
    )
    assert (answer.text, answer.finish, answer.is_done) == ("Paris é!", "stop", True)
    assert answer.usage == {"completion_tokens": 3}
    assert answer.error == ""
    line_ends = [STREAM.index(b"\n", STREAM.index(mark)) + 1 for mark in (b"Paris", b"!")]
    assert answer.times_s == [min(end for end in ends if end >= line) for line in line_ends]


def test_an_error_in_the_stream_is_told() -> None:
    """An error event ends up in the answer, which is then not whole."""
    answer = sse.read([(1.0, _event({"error": {"message": "the replica was lost"}}))])
    assert answer.error == "the replica was lost"
    assert not answer.is_done


def test_bytes_that_are_no_json_are_an_error() -> None:
    """What is not JSON ends the reading with an error that shows it."""
    answer = sse.read([(1.0, b"data: <html>\n\n"), (2.0, STREAM)])
    assert "<html>" in answer.error
    assert answer.times_s == []
