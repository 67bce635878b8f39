"""Perplexity, agreement and divergence of two arithmetics over the committed prose."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from rich.progress import Progress

from deepflow.bench.quality import PROSE, Tally, bench_quality, steps, windows
from deepflow.bench.report import Report
from shared import catalog
from shared.text.tokenizer import Tokenizer
from tests.worker.tiny import IM_START, make_tiny


def _logits(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.normal(scale=4.0, size=(rows, 50)).astype(np.float32)


def test_tally_is_the_textbook_formula() -> None:
    """Likelihood, divergence and agreement equal the definitions written out in float64, however the rows are split."""
    rng = np.random.default_rng(0)
    reference, candidate = _logits(rng, 40), _logits(rng, 40)
    # Near the reference but for a shift of all logits, which means nothing.
    candidate[:25] = reference[:25] + 0.01 * candidate[:25] + 3.0
    targets = rng.integers(0, 50, 40)
    parts = [Tally(), Tally()]
    for tally, part in zip(parts, (slice(0, 13), slice(13, 40)), strict=True):
        tally.add(reference[part], candidate[part], targets[part])
    found = (parts[0] + parts[1]).metrics()

    p, q = (np.exp(x.astype(np.float64)) for x in (reference, candidate))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    rows = np.arange(40)
    perplexities = [float(np.exp(-np.log(x[rows, targets]).mean())) for x in (p, q)]
    assert found["num_predictions"] == 40
    assert found["reference_perplexity"] == pytest.approx(perplexities[0], rel=1e-5)
    assert found["perplexity"] == pytest.approx(perplexities[1], rel=1e-5)
    assert found["perplexity_ratio"] == pytest.approx(perplexities[1] / perplexities[0], rel=1e-5)
    assert found["mean_kl"] == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-4)
    assert found["agreement"] == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert 25 <= 40 * found["agreement"] < 40


def test_windows_begin_as_the_model_wants_a_prompt_to(tmp_path: Path) -> None:
    """Windows cut the text in order, each opened by the tokenizer's BOS if it has one."""
    path = make_tiny(tmp_path / "tiny") / "tokenizer.json"
    plain = Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    ids = plain.encode("It was the best of times, it was the worst of times.")
    text = plain.decode(ids)
    # The one token left over predicts nothing.
    assert windows(plain, text, 15, 7) == [ids[0:7], ids[7:14]]

    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    found = windows(Tokenizer(backend), text, 14, 7)
    assert found == [[IM_START, *ids[start : start + 6]] for start in (0, 6)] + [
        [IM_START, *ids[12:14]]
    ]


def test_steps_read_a_window_as_one_long_prompt() -> None:
    """The chunks cover all but the last token once, in order, with blocks for what has been read and no more."""
    text = list(range(300))
    rows = 0
    tokens: list[int] = []
    for start, step in steps(text):
        (span,) = step.spans
        assert span.start == start == rows
        assert span.length == len(step.tokens)
        assert step.sample_rows == list(range(span.length))
        rows += span.length
        assert 0 <= 16 * len(span.table) - rows < 16
        tokens += step.tokens
    assert tokens == text[:-1]


def test_prose_is_long_enough() -> None:
    """The committed text is the length that the bar asks for (50k tokens, about 4.3 bytes each), running prose."""
    text = PROSE.read_text(encoding="utf-8")
    assert len(text.encode()) >= 220_000
    letters = sum(character.isalpha() or character == " " for character in text)
    assert letters / len(text) > 0.95


def _measure(tmp_path: Path, dtype: str) -> Report:
    make_tiny(tmp_path / "models" / "tiny", context=256)
    with Progress(console=Console(file=io.StringIO()), disable=True) as progress:
        return bench_quality(
            catalog.open_model(tmp_path, "tiny"),
            tmp_path,
            dtype=dtype,
            reference="fp32",
            num_tokens=600,
            threads=1,
            progress=progress,
        )


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    """fp32 beside fp32: the same perplexity, every token agreed on, no divergence."""
    report = _measure(tmp_path, "fp32")
    assert report.metrics["num_predictions"] == 600 - 3  # of each window, the first has no context
    assert report.metrics["perplexity_ratio"] == 1.0
    assert report.metrics["agreement"] == 1.0
    assert report.metrics["mean_kl"] == 0.0
    assert report.settings["window"] == 256
    assert all(bar.met_by(report.metrics[bar.metric]) for bar in report.bars)


def test_int8_is_near_fp32_and_not_equal(tmp_path: Path) -> None:
    """w8a8 beside fp32: a small divergence, most tokens agreed on."""
    metrics = _measure(tmp_path, "w8a8").metrics
    assert 0 < metrics["mean_kl"] < 0.05
    assert metrics["perplexity_ratio"] == pytest.approx(1.0, abs=0.05)
    assert 0.85 < metrics["agreement"] <= 1.0
    assert metrics["worst_window_agreement"] <= metrics["agreement"]
