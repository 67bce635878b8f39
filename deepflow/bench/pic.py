"""`bench pic`: position-independent caching on retrieval-style prompts: how much sooner the first token comes, and what
the predictions lose.

A prompt is passages of a corpus in a shuffled order, then a question that quotes one of them; the answer is how that
passage goes on. Time: an engine that has seen every passage before, but never this prompt. Loss: logits over the answer
(teacher-forced) beside those of the full prefill, which recomputing whole chunks must give bit for bit. This module
must not know how a decoder computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.quality import PROSE, Tally
from deepflow.bench.report import Bar, Report
from services.worker.flowserve import pic
from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.decoder import Decoder, Floats, Span, Splice, StepInput, can_splice
from services.worker.flowserve.engine import Engine, EngineSettings
from services.worker.flowserve.life import local_request
from shared.catalog import ModelFolder
from shared.errors import Internal, InvalidRequest
from shared.messages import Sampling
from shared.text.tokenizer import Tokenizer

RECOMPUTED: Final = (0, 8, 16, 32)  # tokens at the start of each chunk
CHUNK: Final = 512  # tokens of a passage
_PAGE: Final = 16
_ROWS: Final = 256  # of a step
_FULL: Final = 3  # prompts computed in full for each number of tokens recomputed
_CHECKED: Final = 2  # prompts whose chunks are recomputed as a whole
_QUOTE: Final = 32  # tokens in the question
_ANSWER: Final = 64
_INTRO: Final = "Below are passages of a handbook, in no particular order.\n\n"
_QUESTION: Final = "\n\nQuestion: how does the passage go on in which these words stand?\nAnswer: "

BARS: Final = (
    Bar("ttft_ratio_16", "<=", 0.4, "time to first token, 16 tokens recomputed / full prefill"),
    Bar("max_difference_all", "<=", 0.0, "largest difference of logits, all recomputed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`passages` of `corpus` different ones are in each of `num` prompts."""

    num: int = 6
    passages: int = 4
    corpus: int = 6
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """`prompt` ends with what the question quotes; `chunks` are the places of `passages` (of the corpus) in it."""

    prompt: list[int]
    chunks: list[list[int]]
    passages: list[int]
    answer: list[int]


def questions(
    tokenizer: Tokenizer, text: str, settings: Settings
) -> tuple[list[list[int]], list[Question]]:
    """The corpus's passages and the questions about them. Raises InvalidRequest if the text is too short."""
    ids = tokenizer.encode(text)
    random = Random(settings.seed)
    num_passages = len(ids) // CHUNK
    if not settings.passages <= settings.corpus <= num_passages:
        raise InvalidRequest(f"the corpus has from {settings.passages} to {num_passages} passages")
    starts = random.sample(range(num_passages), settings.corpus)
    corpus = [ids[start * CHUNK : (start + 1) * CHUNK] for start in starts]
    intro = tokenizer.encode("", special=True) + tokenizer.encode(_INTRO)
    question = tokenizer.encode(_QUESTION)
    asked = []
    for _ in range(settings.num):
        chosen = random.sample(range(settings.corpus), settings.passages)
        prompt, chunks = intro.copy(), []
        for passage in chosen:
            chunks.append([len(prompt), len(prompt) + CHUNK])
            prompt += corpus[passage]
        quoted = corpus[random.choice(chosen)]
        at = random.randrange(CHUNK - _QUOTE - _ANSWER)
        prompt += question + quoted[at : at + _QUOTE]
        answer = quoted[at + _QUOTE : at + _QUOTE + _ANSWER]
        asked.append(Question(prompt, chunks, chosen, answer))
    return corpus, asked


def bench_pic(
    model: ModelFolder, cache_dir: Path, settings: Settings, *, threads: int, progress: Progress
) -> Report:
    """Measure both for each of `RECOMPUTED`. Raises DeepFlowError if the model cannot be loaded, or cannot splice."""
    described = machine.describe("numpy")
    tokenizer = Tokenizer.load(model.path)
    corpus, asked = questions(tokenizer, PROSE.read_text(encoding="utf-8"), settings)
    if len(asked[0].prompt) + _ANSWER > model.context:
        raise InvalidRequest(f"the prompts are longer than the model's {model.context} tokens")
    decoder = load_decoder(
        model.path, device="cpu", dtype="w8a8", threads=threads, cache_dir=cache_dir
    )
    losses, most = _losses(decoder, corpus, asked, progress)
    metrics = _times(decoder, corpus, asked, progress)
    for recomputed, tally in losses.items():
        found = tally.metrics()
        metrics |= {
            f"{name}_{recomputed}": found[name]
            for name in ("perplexity_ratio", "agreement", "mean_kl")
        }
        metrics["full_perplexity"] = found["reference_perplexity"]
    metrics["max_difference_all"] = most
    return Report(
        bench="pic",
        metrics=metrics,
        machine=described,
        settings={
            "model": model.name,
            "threads": threads,
            "prompt_tokens": len(asked[0].prompt),
            "chunk": CHUNK,
            "passages": settings.passages,
            "corpus": settings.corpus,
            "prompts": settings.num,
            "answer_tokens": _ANSWER,
            "seed": settings.seed,
            "prose": PROSE.name,
        },
        bars=BARS,
        notes=[
            decoder.description,
            "_<k>: the first k tokens of each chunk are recomputed in place, the others taken over, their keys turned.",
            "chunks were computed alone, each as a prompt of its own.",
            "ttft_new_ratio_<k>: no chunk was seen before, so that each is computed alone first.",
        ],
    )


# ----------------------------------------------------------------------------------------------------------------- time


def _times(
    decoder: Decoder, corpus: list[list[int]], asked: list[Question], progress: Progress
) -> dict[str, float]:
    """Medians over the questions; a ratio is to the full prefill, measured in turns with it."""
    task = progress.add_task("time to first token", total=len(RECOMPUTED))
    num_blocks = 2 * (len(asked) * len(asked[0].prompt) + len(corpus) * CHUNK) // _PAGE
    metrics: dict[str, float] = {}
    all_full: list[float] = []
    for recomputed in RECOMPUTED:
        settings = EngineSettings(
            num_blocks=num_blocks,
            page=_PAGE,
            max_batched_tokens=_ROWS,
            num_recomputed=recomputed,
        )
        engine = Engine(decoder, settings, eos_ids=[])
        if not can_splice(decoder):
            raise InvalidRequest(f"{decoder.description}: cannot take over chunks")
        new, *others = asked
        new_s = _first_token_s(engine, "new", new.prompt, new.chunks)
        for number, passage in enumerate(corpus):
            _first_token_s(engine, f"passage-{number}", passage, [])
        full, taken = [], []
        for number, one in enumerate(others):
            taken.append(_first_token_s(engine, f"{number}", one.prompt, one.chunks))
            if number < _FULL:
                full.append(_first_token_s(engine, f"full-{number}", one.prompt))
        engine.close()
        all_full += full
        full_s, seconds = statistics.median(full), statistics.median(taken)
        metrics[f"ttft_ms_{recomputed}"] = seconds * 1000
        metrics[f"ttft_ratio_{recomputed}"] = seconds / full_s
        metrics[f"ttft_new_ratio_{recomputed}"] = new_s / full_s
        progress.advance(task)
    return {"ttft_full_ms": statistics.median(all_full) * 1000, **metrics}


def _first_token_s(
    engine: Engine, name: str, prompt: list[int], chunks: list[list[int]] | None = None
) -> float:
    """With None as chunks, nothing in the cache is of use."""
    sampling = Sampling(max_tokens=1, seed=0, temperature=0.0, ignore_eos=True)
    root = bytes(32) if chunks is not None else name.encode()
    request = local_request(name, prompt, sampling, root=root, chunks=chunks)
    began = time.perf_counter()
    engine.submit(request)
    while engine.has_work():
        output = engine.step()
        if output.error is not None:
            raise Internal("the engine failed in a step") from output.error
    return time.perf_counter() - began


# ----------------------------------------------------------------------------------------------------------------- loss


def _losses(
    decoder: Decoder, corpus: list[list[int]], asked: list[Question], progress: Progress
) -> tuple[dict[int, Tally], float]:
    """By number of tokens recomputed; and the largest difference of a logit where all of them are."""
    pages = CHUNK // _PAGE
    most_pages = -(-(len(asked[0].prompt) + _ANSWER) // _PAGE)
    decoder.allocate(most_pages + len(corpus) * pages, _PAGE)
    table = range(most_pages)
    sources = []
    for number, passage in enumerate(corpus):
        first = most_pages + number * pages
        sources.append(range(first, first + pages))
        _read(decoder, passage, sources[-1], [pic.Piece(0, CHUNK)], [], 1)
    tallies = {recomputed: Tally() for recomputed in RECOMPUTED}
    most = 0.0
    task = progress.add_task("predictions beside the full prefill's", total=len(asked))
    for number, one in enumerate(asked):
        text = one.prompt + one.answer[:-1]
        targets = np.array(one.answer, np.int64)
        own = [sources[passage] for passage in one.passages]
        full = _read(decoder, text, table, [pic.Piece(0, len(text))], [], _ANSWER)
        for recomputed in (*RECOMPUTED, *([CHUNK] if number < _CHECKED else [])):
            taken = [pic.taken_over(chunk, len(text), _PAGE, recomputed) for chunk in one.chunks]
            pieces = list(pic.pieces(taken, len(text)))
            splices = [
                Splice(
                    own[piece.chunk],
                    piece.start - one.chunks[piece.chunk][0],
                    table,
                    piece.start,
                    piece.stop - piece.start,
                )
                for piece in pieces
                if piece.chunk is not None
            ]
            found = _read(decoder, text, table, pieces, splices, _ANSWER)
            if recomputed == CHUNK:
                most = max(most, float(np.abs(found - full).max()))
            else:
                tallies[recomputed].add(full, found, targets)
        progress.advance(task)
    return tallies, most


def _read(
    decoder: Decoder,
    text: list[int],
    table: Sequence[int],
    pieces: Sequence[pic.Piece],
    splices: Sequence[Splice],
    num_sampled: int,
) -> Floats:
    """Logits of the last `num_sampled` positions, all in the last piece."""
    first = len(text) - num_sampled
    logits = []
    for step in _steps(text, table, pieces, splices, first):
        found = decoder.forward(step)
        if step.sample_rows:
            logits.append(found.copy())
    return np.concatenate(logits)


def _steps(
    text: list[int],
    table: Sequence[int],
    pieces: Sequence[pic.Piece],
    splices: Sequence[Splice],
    first: int,
) -> Iterator[StepInput]:
    """The computed pieces in steps of `_ROWS` rows at most; the splices with the first of them."""
    for piece in pieces:
        if piece.chunk is not None:
            continue
        for start in range(piece.start, piece.stop, _ROWS):
            stop = min(start + _ROWS, piece.stop)
            rows = list(range(max(first - start, 0), stop - start))
            span = Span(start, stop - start, table)
            before = [splice for splice in splices if splice.start < start]
            splices = [splice for splice in splices if splice.start >= start]
            yield StepInput(text[start:stop], [span], rows, before)
