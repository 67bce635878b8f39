"""`bench quality`: what a cheaper arithmetic does to a model's predictions, token by token over real prose.

Both decoders read the same text (teacher-forced), a window at a time with an empty cache at its start, in chunks as
the engine would feed a long prompt. From their logits: perplexity of both, how often they agree on the likeliest
token, and KL(reference || candidate). This module must not know how a decoder computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.report import Bar, Report
from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.decoder import Decoder, Floats, Span, StepInput
from shared.catalog import ModelFolder
from shared.text.tokenizer import Tokenizer

PROSE: Final = Path(__file__).parent / "prose" / "debian-handbook.txt"
WINDOW: Final = 1024  # tokens that see each other
_PAGE: Final = 16
_CHUNK: Final = 128  # rows of one step: their logits take CHUNK * vocab * 4 bytes in each decoder

BARS: Final = (
    Bar("perplexity_ratio", "<=", 1.02, "perplexity / the reference's"),
    Bar("agreement", ">=", 0.95, "share of tokens where both put the same one first"),
)


@dataclass(slots=True)
class Tally:
    """Sums over predictions, so that windows add up; `nll` is the negative log likelihood of the text in nats."""

    num: int = 0
    reference_nll: float = 0.0
    candidate_nll: float = 0.0
    kl: float = 0.0
    num_agreed: int = 0

    def add(self, reference: Floats, candidate: Floats, targets: npt.NDArray[np.int64]) -> None:
        """Count rows of logits [T, vocab] of both decoders; `targets` [T] are the tokens that the text goes on with."""
        rows = np.arange(len(targets))
        reference_log_sum, candidate_log_sum = _log_sum_exp(reference), _log_sum_exp(candidate)
        self.num += len(targets)
        self.reference_nll += float((reference_log_sum - reference[rows, targets]).sum())
        self.candidate_nll += float((candidate_log_sum - candidate[rows, targets]).sum())
        probabilities = np.exp(reference - reference_log_sum[:, None])  # [T, vocab]
        gap = np.einsum("tv,tv->t", probabilities, reference - candidate)
        self.kl += float((gap - (reference_log_sum - candidate_log_sum)).sum())
        self.num_agreed += int((reference.argmax(axis=1) == candidate.argmax(axis=1)).sum())

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num + other.num,
            self.reference_nll + other.reference_nll,
            self.candidate_nll + other.candidate_nll,
            self.kl + other.kl,
            self.num_agreed + other.num_agreed,
        )

    @property
    def agreement(self) -> float:
        """Share of the predictions in which both have the same likeliest token."""
        return self.num_agreed / self.num

    def metrics(self) -> dict[str, float]:
        """The flat numbers."""
        reference_nll, candidate_nll = self.reference_nll / self.num, self.candidate_nll / self.num
        return {
            "num_predictions": self.num,
            "reference_perplexity": math.exp(reference_nll),
            "perplexity": math.exp(candidate_nll),
            "perplexity_ratio": math.exp(candidate_nll - reference_nll),
            "agreement": self.agreement,
            "mean_kl": self.kl / self.num,
        }


def bench_quality(
    model: ModelFolder,
    cache_dir: Path,
    *,
    dtype: str,
    reference: str,
    num_tokens: int,
    threads: int,
    progress: Progress,
) -> Report:
    """Compare `dtype` with `reference` (each w8a8, fp32 or bf16) over the first `num_tokens` of the prose, or all of
    it if it has fewer. Raises DeepFlowError if the model cannot be loaded."""
    described = machine.describe("torch", "numpy")
    tokenizer = Tokenizer.load(model.path)
    window = min(WINDOW, model.context)
    texts = windows(tokenizer, PROSE.read_text(encoding="utf-8"), num_tokens, window)
    decoders = [
        load_decoder(model.path, device="cpu", dtype=name, threads=threads, cache_dir=cache_dir)
        for name in (reference, dtype)
    ]
    for decoder in decoders:
        decoder.allocate(_num_blocks(window), _PAGE)
    comparison = Comparison(*decoders)
    if progress.disable:  # no terminal
        progress.console.print(f"{len(texts)} windows of {window} tokens", markup=False)
    for text in progress.track(texts, description=f"{dtype} beside {reference}, windows"):
        comparison.read(text)
    return Report(
        bench="quality",
        metrics=comparison.metrics(),
        machine=described,
        settings={
            "model": model.name,
            "dtype": dtype,
            "reference": reference,
            "tokens": sum(map(len, texts)),
            "window": window,
            "prose": PROSE.name,
            "threads": threads,
        },
        bars=BARS,
        notes=[f"{dtype}: {decoders[1].description}", f"{reference}: {decoders[0].description}"],
    )


class Comparison:
    """Two decoders with room for one window each, and what has come of reading so far."""

    def __init__(self, reference: Decoder, candidate: Decoder) -> None:
        self._decoders = (reference, candidate)
        self._seconds = [0.0, 0.0]  # of each
        self._tallies: list[Tally] = []  # of each window

    def read(self, text: list[int]) -> None:
        """Both read one window of at least two tokens, which overwrites the one before."""
        tally = Tally()
        for start, step in steps(text):
            targets = np.array(text[start + 1 : start + 1 + len(step.tokens)], dtype=np.int64)
            tally.add(self._forward(0, step), self._forward(1, step), targets)
        self._tallies.append(tally)

    def metrics(self) -> dict[str, float]:
        """Of all windows read. The standard error is the agreement's over the windows (0 for a single one)."""
        agreements = [tally.agreement for tally in self._tallies]
        spread = float(np.std(agreements, ddof=1)) if len(agreements) > 1 else 0.0
        return {
            **sum(self._tallies, Tally()).metrics(),
            "agreement_standard_error": spread / math.sqrt(len(agreements)),
            "worst_window_agreement": min(agreements),
            "reference_s": self._seconds[0],
            "candidate_s": self._seconds[1],
        }

    def _forward(self, which: int, step: StepInput) -> Floats:
        started = time.perf_counter()
        logits = self._decoders[which].forward(step)
        self._seconds[which] += time.perf_counter() - started
        return logits


def windows(tokenizer: Tokenizer, text: str, num_tokens: int, window: int) -> list[list[int]]:
    """The first `num_tokens` of `text` in windows of `window` tokens, each opened by what the model wants before a bare
    prompt (a BOS, or nothing). A last one too short to predict anything is dropped."""
    opening = tokenizer.encode("", special=True)
    ids = tokenizer.encode(text)[:num_tokens]
    size = window - len(opening)
    parts = (opening + ids[start : start + size] for start in range(0, len(ids), size))
    return [part for part in parts if len(part) > 1]


def steps(text: list[int]) -> Iterator[tuple[int, StepInput]]:
    """A window in chunks, each with the position of its first row. The last token has no successor and is not read."""
    num_rows = len(text) - 1
    for start in range(0, num_rows, _CHUNK):
        tokens = text[start : min(start + _CHUNK, num_rows)]
        span = Span(start, len(tokens), range(_num_blocks(start + len(tokens))))
        yield start, StepInput(tokens, [span], list(range(len(tokens))))


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // _PAGE)


def _log_sum_exp(logits: Floats) -> npt.NDArray[np.float64]:
    """[T, vocab] -> [T], summed in float64."""
    highest = logits.max(axis=1)
    total = np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)
    return np.asarray(highest + np.log(total))
