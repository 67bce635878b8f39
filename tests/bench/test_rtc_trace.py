"""Replaying a trace: what bounded tiers find of what is there to be found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepflow.bench.rtc.trace import Tiers, replay
from deepflow.sim.trace import BLOCK, Call, generate, read
from shared.errors import InvalidRequest


def call(*ids: int, tail: int = 1) -> Call:
    """A prompt of these blocks in full, and `tail` tokens more."""
    return Call(0, len(ids) * BLOCK + tail, 10, ids)


def calls(tmp_path: Path, num: int, seed: int) -> list[Call]:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(generate(num, seed)))
    return read(path)


def test_a_seed_makes_one_trace(tmp_path: Path) -> None:
    """The same seed gives the same trace, line by line, in the format of the real ones."""
    assert list(generate(50, 3)) == list(generate(50, 3)) != list(generate(50, 4))
    for one in calls(tmp_path, 50, 3):
        assert len(one.hash_ids) == -(-one.input_length // BLOCK)


def test_what_came_before_is_found() -> None:
    """A prompt that goes on where another ended finds all of that; one with another beginning finds nothing."""
    hits = replay([call(1, 2), call(1, 2, 3), call(4, 2)], Tiers(100, 0))
    assert (hits.asked, hits.device, hits.ideal) == (7, 2, 2)


def test_the_block_of_the_last_token_is_not_asked_for() -> None:
    """A prompt of exactly two blocks may use one: its last token has to be computed."""
    hits = replay([call(1, 2, tail=0), call(1, 2, tail=0)], Tiers(100, 0))
    assert (hits.asked, hits.device, hits.ideal) == (2, 1, 1)


def test_what_the_device_lost_the_host_has() -> None:
    """Pages that were evicted from a small device come back from the host's tier, and only without one are lost."""
    prompts = [call(1, 2, 3), call(4, 5, 6), call(1, 2, 3)]
    assert replay(prompts, Tiers(4, 0)).device <= 1
    hits = replay(prompts, Tiers(4, 100))
    assert hits.device + hits.host == hits.ideal == 3


def test_a_prompt_larger_than_the_device_costs_only_itself() -> None:
    """It finds and leaves nothing, and the next one is served as ever."""
    hits = replay([call(1, 2), call(*range(10, 40)), call(1, 2)], Tiers(8, 0))
    assert hits.device == 2


def test_with_room_for_everything_hits_are_ideal(tmp_path: Path) -> None:
    """Unbounded, the real index finds exactly what an oracle finds."""
    trace = calls(tmp_path, 150, 1)
    hits = replay(trace, Tiers(20_000, 0))
    assert hits.device == hits.ideal > 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), device=st.integers(1, 200), host=st.sampled_from([0, 300]))
def test_bounded_tiers_find_no_more_than_there_is(
    tmp_path_factory: pytest.TempPathFactory, seed: int, device: int, host: int
) -> None:
    """Whatever the sizes: hits of all tiers together never exceed the ideal, and that not what was asked."""
    hits = replay(calls(tmp_path_factory.mktemp("t"), 60, seed), Tiers(device, host))
    assert 0 <= hits.device + hits.host <= hits.ideal <= hits.asked


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"timestamp": 0, "input_length": "x"}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, or a line that is no request, is an error of the caller."""
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequest):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """So is a file that is not there."""
    with pytest.raises(InvalidRequest, match="No such file"):
        read(tmp_path / "none.jsonl")
