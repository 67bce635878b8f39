"""Traces: read, generated, changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepflow.sim.trace import BLOCK, TOOLAGENT, Call, Shape, conversations, faster, lines, read
from shared.errors import InvalidRequest
from shared.messages import Band


def test_mooncakes_format_is_read(tmp_path: Path) -> None:
    """A line is a request; band and tenant may be named; the order is that of the times."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 20, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}\n\n'
        '{"timestamp": 10, "input_length": 5, "output_length": 1, "hash_ids": [3], "band": 3, "tenant": "a"}\n'
    )
    assert read(path) == [
        Call(10.0, 5, 1, (3,), "a", Band.BATCH),
        Call(20.0, 600, 7, (1, 2)),
    ]


def test_azures_format_is_read(tmp_path: Path) -> None:
    """Times count from the first request, and no two prompts share a block."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,1025,10\n"
        "2023-11-16 18:17:04.4799600,3,8\n"
    )
    first, second = read(path)
    assert (first.timestamp_ms, first.input_length, first.output_length) == (0.0, 1025, 10)
    assert second.timestamp_ms == pytest.approx(500.0)
    assert (len(first.hash_ids), len(second.hash_ids)) == (3, 1)
    assert not set(first.hash_ids) & set(second.hash_ids)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no requests"),
        ('{"timestamp": 1}', "line 1"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1]}\nwhat',
            "line 2",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,x,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,0,1\n", "line 2"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1,0\n2023-11-16 00:00+00:00,1,1\n",
            "line 3",
        ),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, named: str) -> None:
    """The message names the line at fault; so is a file that is not there."""
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=named):
        read(path)
    with pytest.raises(InvalidRequest, match="missing"):
        read(tmp_path / "missing")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([Shape(num_tenants=3), TOOLAGENT]))
def test_generated_conversations_grow(seed: int, shape: Shape) -> None:
    """Requests come in order, each block of a prompt has an id, and equal ids have equal ids before them: a prefix."""
    calls = conversations(200, seed, shape)
    assert calls == conversations(200, seed, shape)
    assert len(calls) == 200
    assert [c.timestamp_ms for c in calls] == sorted(c.timestamp_ms for c in calls)
    before: dict[int, tuple[int, ...]] = {}
    for call in calls:
        assert len(call.hash_ids) == -(-call.input_length // BLOCK)
        for number, one in enumerate(call.hash_ids):
            assert before.setdefault(one, call.hash_ids[:number]) == call.hash_ids[:number]


def test_a_generated_trace_survives_a_file(tmp_path: Path) -> None:
    """What is written is what is read."""
    calls = conversations(50, 3, Shape(num_tenants=2))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines(calls)))
    assert read(path) == calls


def test_a_faster_trace_has_the_same_requests() -> None:
    """Only the times shrink."""
    calls = conversations(20, 1)
    quick = faster(calls, 4.0)
    assert [c.hash_ids for c in quick] == [c.hash_ids for c in calls]
    assert quick[-1].timestamp_ms == calls[-1].timestamp_ms / 4
