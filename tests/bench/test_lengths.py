"""The bench of predicted lengths: its prompts, what a model answers, and what is reported."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
from rich.console import Console
from rich.progress import Progress

from deepflow.bench.lengths import bench
from deepflow.bench.lengths.bench import (
    Answer,
    bench_lengths,
    model_answers,
    read_answers,
    write_answers,
)
from deepflow.bench.lengths.instructions import MAX_TOKENS, instruction, passages_of
from shared import catalog
from shared.errors import InvalidRequest
from tests.scheduler.prompts import records
from tests.worker.tiny import make_tiny

PASSAGES = ["A passage about something."]


def test_instructions_are_seeded_and_of_many_kinds() -> None:
    """The same seed asks the same; each tenant asks several things, with and without a system prompt."""
    first, again = ([instruction(Random(seed), PASSAGES) for seed in range(99)] for _ in range(2))
    assert first == again
    assert {one.tenant for one in first} == {"chat", "desk", "writer"}
    assert {one.max_tokens for one in first} == set(MAX_TOKENS)
    assert {one.messages[0]["role"] for one in first} == {"system", "user"}
    assert len({one.messages[-1]["content"][:12] for one in first}) > 15
    assert not [one for one in first if "{" in one.messages[-1]["content"]]


def test_passages_are_whole_paragraphs_of_some_length() -> None:
    """What is too short or too long is left out, and lines are joined."""
    text = "\n\n".join(["short", "a b\n" * 60, "x" * 5000])
    assert passages_of(text) == [" ".join(["a b"] * 60)]


def test_the_report_sets_the_predictor_beside_what_needs_no_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prompts tell the length the gain is met; kept answers give the same report again."""
    monkeypatch.setattr(bench, "_TIMED", 20)
    answers = [Answer("t", record) for record in records(Random(1), 400)]
    report = bench_lengths(answers, seed=0, settings={})
    found = report.metrics
    assert found["gain"] == found["accuracy"] - found["majority_accuracy"] > 0.3
    assert found["quartiles_accuracy"] < found["accuracy"]
    assert found["answer_p50_ms_100k"] > 0
    write_answers(tmp_path / "kept.jsonl", answers)
    kept = read_answers(tmp_path / "kept.jsonl")
    again = bench_lengths(kept, seed=0, settings={}).metrics
    assert again["accuracy"] == found["accuracy"]
    (tmp_path / "kept.jsonl").write_bytes(b"{}\n")
    for wrong in ("kept.jsonl", "none"):
        with pytest.raises(InvalidRequest):
            read_answers(tmp_path / wrong)
    with pytest.raises(InvalidRequest):
        bench_lengths(answers[:20], seed=0, settings={})


def test_a_model_answers_every_instruction_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer has a length within what was allowed, in the order asked, whatever the batch."""
    monkeypatch.setattr("deepflow.bench.lengths.instructions.MAX_TOKENS", (4, 8))
    make_tiny(catalog.models_dir(tmp_path) / "tiny", name="tiny")
    folder = catalog.open_model(tmp_path, "tiny")
    with Progress(console=Console(file=io.StringIO()), disable=True) as progress:
        found = model_answers(folder, tmp_path, 6, 3, threads=1, progress=progress)
    assert len(found) == 6
    for answer in found:
        assert 1 <= answer.record.output_tokens <= answer.record.max_tokens
        assert answer.record.max_tokens in (4, 8)
        assert answer.record.features
