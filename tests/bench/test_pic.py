"""Retrieval-style prompts, and what the bench makes of them."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from deepflow.bench.pic import CHUNK, RECOMPUTED, Settings, bench_pic, questions
from deepflow.bench.quality import PROSE
from services.worker.flowserve import native_decoder
from shared import catalog
from shared.errors import InvalidRequest
from shared.text.tokenizer import Tokenizer
from tests.worker.tiny import make_tiny

NAME = "tiny"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    make_tiny(catalog.models_dir(cache) / NAME, name=NAME)
    return cache


def test_questions_are_about_passages_in_their_prompts(cache: Path) -> None:
    """Each chunk is a passage of the corpus, and what is quoted and answered stands in one of them."""
    tokenizer = Tokenizer.load(catalog.models_dir(cache) / NAME)
    text = PROSE.read_text(encoding="utf-8")[:40_000]
    corpus, asked = questions(tokenizer, text, Settings(num=5, passages=2, corpus=4))
    assert len(corpus) == 4
    assert len(asked) == 5
    for one in asked:
        chunks = [one.prompt[start:stop] for start, stop in one.chunks]
        assert chunks == [corpus[passage] for passage in one.passages]
        assert len({len(chunk) for chunk in chunks}) == 1
        told = one.prompt[-32:] + one.answer
        assert any(
            told == chunk[start : start + len(told)] for chunk in chunks for start in range(CHUNK)
        )
    assert len({tuple(one.passages) for one in asked}) > 1
    with pytest.raises(InvalidRequest):
        questions(tokenizer, text, Settings(corpus=10_000))


@pytest.mark.skipif(native_decoder.available() is not None, reason="no native kernels")
def test_the_report_has_times_and_losses_for_each_number_of_tokens(cache: Path) -> None:
    """On a random model no figure is good, but each is there, and recomputing everything loses nothing."""
    with Progress(console=Console(file=io.StringIO()), disable=True) as progress:
        report = bench_pic(
            catalog.open_model(cache, NAME),
            cache,
            Settings(num=2, passages=2, corpus=2),
            threads=1,
            progress=progress,
        )
    names = ("ttft_ratio", "ttft_new_ratio", "perplexity_ratio", "agreement", "mean_kl")
    for recomputed in RECOMPUTED:
        for name in names:
            assert math.isfinite(report.metrics[f"{name}_{recomputed}"])
        assert report.metrics[f"mean_kl_{recomputed}"] > 0
    assert report.metrics["max_difference_all"] == 0
    assert report.settings["prompt_tokens"] > 2 * CHUNK
