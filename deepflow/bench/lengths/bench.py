"""`bench lengths`: how often the predicted bucket of an answer's length is right, on answers of a real model.

A model answers seeded instructions of several tenants (or recorded traffic is read); the predictor learns from the
first part and is judged by the last, beside two that need no learning: always the commonest bucket, and the median of
the latest answers to the same tenant. Everything but the answers is the code that ships: features, records, learning,
table. This module must not know how lengths are learned.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.lengths.instructions import Instruction, instruction, passages_of
from deepflow.bench.quality import PROSE
from deepflow.bench.report import Bar, Report
from services.scheduler.lengths import Lengths, Quartiles
from services.scheduler.traffic import Traffic
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from services.worker.training import held_out, learn
from shared import wire
from shared.catalog import ModelFolder
from shared.errors import Internal, InvalidRequest
from shared.job_messages import LengthRecord, PredictorEntry
from shared.length_table import LengthTable, bucket_of
from shared.messages import Request, Sampling, TaskEnded
from shared.text.template import ChatTemplate
from shared.text.tokenizer import Tokenizer

BARS: Final = (
    Bar("gain", ">=", 0.1, "accuracy beyond always saying the commonest bucket"),
    Bar("answer_p99_ms", "<=", 1.0, "ms of a prediction, prompt of 100k tokens, p99"),
)
_MAX_NUM_SEQS: Final = 64
_WAITING: Final = 2 * _MAX_NUM_SEQS  # requests the engine has in hand
_TEMPERATURE: Final = 0.7
_TIMED: Final = 2000
_PROMPTS: Final = (8_000, 100_000)
_KIND: Final = "chat"


@dataclass(frozen=True, slots=True)
class Answer:
    """How long one answer was, and to whom."""

    tenant: str
    record: LengthRecord


def read_answers(path: Path) -> list[Answer]:
    """Recorded traffic, as a JE writes it or `write_answers`. Raises InvalidRequest."""
    try:
        lines = path.read_bytes().splitlines()
        return [Answer("", wire.from_json(line, LengthRecord)) for line in lines]
    except (OSError, wire.WireError) as error:
        raise InvalidRequest(f"{path} is no recorded traffic: {error}") from error


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """For `read_answers`; the tenants are told apart by their hashes alone."""
    path.write_bytes(b"".join(wire.to_json(answer.record) + b"\n" for answer in answers))


def model_answers(
    folder: ModelFolder,
    cache_dir: Path,
    num: int,
    seed: int,
    *,
    threads: int | None,
    progress: Progress,
) -> list[Answer]:
    """What the model answers to `num` instructions, in the order asked. Raises DeepFlowError."""
    random = Random(seed)
    passages = passages_of(PROSE.read_text(encoding="utf-8"))
    asked = [instruction(random, passages) for _ in range(num)]
    tokenizer, template = Tokenizer.load(folder.path), ChatTemplate.load(folder.path)
    requests = [
        _request(str(number), one, tokenizer.encode(template.render(one.messages)), seed)
        for number, one in enumerate(asked)
    ]
    engine = Engine.from_folder(
        folder.path, threads=threads, cache_dir=cache_dir, max_num_seqs=_MAX_NUM_SEQS
    )
    traffic = Traffic(Lengths(), records=True)
    records: dict[str, LengthRecord] = {}
    bar = progress.add_task("answers", total=num)
    waiting, num_open = iter(requests), 0
    try:
        while len(records) < num:
            while num_open < _WAITING and (request := next(waiting, None)) is not None:
                traffic.asked(request)
                engine.submit(request)
                num_open += 1
            output = engine.step()
            if output.error is not None:
                raise Internal("the engine failed in a step") from output.error
            for ended in output.ended:
                traffic.ended(
                    TaskEnded(
                        task="",
                        request=ended.request,
                        attempt=ended.attempt,
                        te="",
                        finish=ended.finish,
                        prompt_tokens=ended.prompt_tokens,
                        cached_tokens=ended.cached_tokens,
                        output_tokens=ended.output_tokens,
                    )
                )
                [(_, line)] = traffic.take_lines()
                records[ended.request] = wire.from_json(line, LengthRecord)
                num_open -= 1
                progress.advance(bar)
    finally:
        engine.close()
    return [
        Answer(one.tenant, records[request.request])
        for one, request in zip(asked, requests, strict=True)
    ]


def _request(name: str, asked: Instruction, prompt: list[int], seed: int) -> Request:
    sampling = Sampling(
        max_tokens=asked.max_tokens, seed=seed + int(name), temperature=_TEMPERATURE
    )
    return replace(local_request(name, prompt, sampling), tenant=asked.tenant, kind=_KIND)


def bench_lengths(answers: Sequence[Answer], *, seed: int, settings: dict[str, object]) -> Report:
    """Learn and judge. Raises InvalidRequest if the answers are too few."""
    described = machine.describe("numpy")
    table, report = learn([answer.record for answer in answers], seed=seed)
    metrics = {name: float(value) for name, value in asdict(report).items()}
    metrics["gain"] = report.accuracy - report.majority_accuracy
    metrics |= _by_quartiles(answers, report.num_buckets)
    for num_tokens in _PROMPTS:
        times = _answer_ms(table, num_tokens)
        metrics[f"answer_p50_ms_{num_tokens // 1000}k"] = float(np.median(times))
        metrics["answer_p99_ms"] = float(np.quantile(times, 0.99))
    metrics["table_bytes"] = float(len(table.to_bytes()))
    return Report(
        bench="lengths",
        metrics=metrics,
        machine=described,
        settings=settings,
        bars=BARS,
        notes=[
            "buckets of 128 tokens; accuracy: the right one, within_one: at most one off, on answers not learned from",
            "majority: always the commonest bucket; quartiles: the median of the tenant's latest answers",
        ],
    )


def _by_quartiles(answers: Sequence[Answer], num_buckets: int) -> dict[str, float]:
    """How good the answer without any table is, on the same answers: each is predicted by those before it."""
    seen: defaultdict[tuple[str, str], Quartiles] = defaultdict(Quartiles)
    off = []
    for answer in answers:
        record, quartiles = answer.record, seen[answer.tenant, answer.record.kind]
        told = quartiles.length().mid if len(quartiles) else 1
        told = min(told, record.max_tokens)
        right = bucket_of(record.output_tokens, num_buckets)
        off.append(abs(bucket_of(told, num_buckets) - right))
        quartiles.add(record.output_tokens)
    judged = off[held_out(len(answers)) :]
    return {
        "quartiles_accuracy": float(np.mean([distance == 0 for distance in judged])),
        "quartiles_within_one": float(np.mean([distance <= 1 for distance in judged])),
    }


def _answer_ms(table: LengthTable, num_tokens: int) -> list[float]:
    """Milliseconds of predictions for prompts of that length, of the processor's time: others may be busy here."""
    random = Random(0)
    lengths = Lengths()
    lengths.load(PredictorEntry(model="", created=1, table=table.to_bytes()))
    prompt = [random.randrange(50_000) for _ in range(num_tokens)]
    times = []
    for number in range(_TIMED):
        request = local_request(str(number), prompt, Sampling(max_tokens=512, seed=0))
        begun = time.thread_time()
        lengths.predict(request)
        times.append((time.thread_time() - begun) * 1000)
    return times
