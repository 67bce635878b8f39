"""Driving an engine by hand: what is counted is what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from deepflow.bench.engine.drive import Driver, budget
from deepflow.bench.engine.memory import memory_bytes
from deepflow.bench.engine.plan import prompts
from deepflow.bench.engine.profile import Clocks
from services.worker.flowserve import sampler
from services.worker.flowserve.engine import Engine
from shared.errors import InvalidRequest
from tests.worker.tiny import make_tiny

VOCAB = 512


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """A tiny engine with a step small enough that prompts take several."""
    for name in ("sample", "sample_drafts"):  # the clocks replace them: put back afterwards
        monkeypatch.setattr(sampler, name, getattr(sampler, name))
    folder = make_tiny(tmp_path / "tiny", context=512, vocab=VOCAB)
    engine = Engine.from_folder(
        folder,
        cache_dir=tmp_path,
        threads=1,
        kv_tokens=4096,
        max_batched_tokens=64,
        asynchronous=request.param,
    )
    yield engine
    engine.close()


def test_decode_counts_whole_batches_only(engine: Engine) -> None:
    """Every counted step brought one token for each sequence, as many steps as tokens were asked for; the prompts were
    computed before, and nothing is left in the engine afterwards."""
    driver = Driver(engine, Clocks(engine))
    batch = list(islice(prompts(Random(0), VOCAB, 40, repetitive=False), 4))
    run = driver.decode(batch, 12, budget(4, 40, 12, 64, 0))
    assert run.tokens == [4] * 12
    assert run.num_tokens == 48
    assert len(run.steps_s) == 12
    assert sum(run.steps_s) == pytest.approx(run.seconds)
    assert not engine.has_work()
    assert engine.counters["prefix_hits"] == 0


def test_the_parts_of_a_step_make_up_its_time(engine: Engine) -> None:
    """Linears, attention, glue, sampling and Python, or decoder, sampling and Python, add up to the wall clock."""
    driver = Driver(engine, Clocks(engine))
    text = prompts(Random(0), VOCAB, 100, repetitive=False)
    for run in (driver.prefill(next(text)), driver.decode([next(text)], 8, 64)):
        assert sum(run.split.values()) == pytest.approx(run.seconds)
        assert run.split["sampling"] > 0
        if not engine.settings.asynchronous:  # else the parts overlap with what is called Python
            assert min(run.split.values()) >= 0


def test_counting_ends_with_the_first_sequence(engine: Engine) -> None:
    """A batch is whole only until one of its sequences is over; nothing is counted beyond that."""
    driver = Driver(engine, Clocks(engine))
    batch = list(islice(prompts(Random(0), VOCAB, 10, repetitive=False), 2))
    run = driver.decode(batch, 100, 20)
    assert run.num_tokens <= 2 * 20
    assert not engine.has_work()


def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    """What the engine cannot take is an error, not a figure."""
    driver = Driver(engine, Clocks(engine))
    with pytest.raises(InvalidRequest):
        driver.prefill([5] * 600)


def test_guesses_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With speculation a step brings more than one token where guesses are right, and both are counted."""
    for name in ("sample", "sample_drafts"):
        monkeypatch.setattr(sampler, name, getattr(sampler, name))
    folder = make_tiny(tmp_path / "tiny", context=2048, vocab=VOCAB)
    engine = Engine.from_folder(
        folder, cache_dir=tmp_path, threads=1, kv_tokens=4096, speculation=4
    )
    driver = Driver(engine, Clocks(engine))
    text = next(prompts(Random(1), VOCAB, 100, repetitive=True))
    run = driver.decode([text], 200, 1000)
    assert 0 < run.num_right <= run.num_guessed
    assert run.num_tokens == len(run.steps_s) + run.num_right
    assert run.split["sampling"] < run.seconds


def test_prompts_share_nothing_unless_they_repeat_themselves() -> None:
    """Random prompts differ from the first page on; a repetitive one says its own phrase over and over."""
    plain = list(islice(prompts(Random(0), VOCAB, 40, repetitive=False), 50))
    assert len({tuple(prompt[:16]) for prompt in plain}) == 50
    repeated = list(islice(prompts(Random(0), VOCAB, 40, repetitive=True), 50))
    assert len({tuple(prompt[:16]) for prompt in repeated}) == 50
    assert all(prompt == (prompt[:16] * 3)[:40] for prompt in repeated)


def test_memory_is_its_own_and_that_of_files() -> None:
    """What is resident is either anonymous or of a mapped file, and either private or shared."""
    memory = memory_bytes()
    assert memory["peak"] > 0
    assert memory["resident"] == memory["anonymous"] + memory["file"]
    assert memory["resident"] == memory["private"] + memory["shared"]
    assert memory_bytes("no-such-process") == {}
