"""`python -m services.worker.training`: learns something on the CPU, once, in a process of its own.

Reads a `Training` from standard input and writes its `TrainingEnded` to standard output. What it can learn is the
decode-length predictor (the paper, section 5.4): there a small language model that classifies prompts by the length
bucket of their answer, here a multinomial logistic regression on hashed tokens, which is rounded to the table that Job
Executors answer from. It must not know the bus, and imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson

from services.worker.tie import die_with_parent
from shared import wire
from shared.errors import InvalidRequest
from shared.job_messages import LengthRecord, Training, TrainingEnded
from shared.length_table import BIAS, MAX_BUCKETS, NUM_FEATURES, ZERO, LengthTable, bucket_of
from shared.messages import Failure

MIN_RECORDS: Final = 200
_MAX_TEXT_BYTES: Final = 64 << 20  # of the records when inflated
_MAX_RECORDS: Final = 65_536  # the newest: minutes of learning
_MAX_FEATURES: Final = 1024  # of one record
_MAX_OUTPUT: Final = 1 << 30  # tokens
_LEARNED: Final = 0.8  # of the records, oldest first; the others judge
_BATCH: Final = 64
_EPOCHS: Final = 25  # the prior keeps it from learning by heart: stopping early gained nothing
_RATE: Final = 0.1
_PRIOR: Final = 16.0  # a weight is drawn towards nothing as hard as by so many records
_LONGEST: Final = 0.995  # the quantile of the lengths that the last bucket must hold

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How good a table is on records that it was not learned from, against always saying the commonest bucket."""

    num_records: int
    num_held_out: int
    num_buckets: int
    accuracy: float
    within_one: float  # at most one bucket off
    majority_accuracy: float
    majority_within_one: float
    train_s: float


def read_records(data: bytes) -> list[LengthRecord]:
    """The newest of the deflated lines of recorded traffic, without those that are no records: a full disk may have
    cut them off. Raises InvalidRequest."""
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data, _MAX_TEXT_BYTES)
    except zlib.error as error:
        raise InvalidRequest(f"the records cannot be read: {error}", param="data") from error
    if not inflate.eof:
        raise InvalidRequest("the records are cut off, or too many", param="data")
    records = []
    for line in text.splitlines()[-_MAX_RECORDS:]:
        with contextlib.suppress(wire.WireError):
            records.append(wire.from_json(line, LengthRecord))
    for record in records:
        numbers = record.features
        if len(numbers) > _MAX_FEATURES or not all(0 <= n < NUM_FEATURES for n in numbers):
            raise InvalidRequest("a record has features that no table has", param="data")
        if not 0 <= record.output_tokens <= _MAX_OUTPUT:
            raise InvalidRequest("a record has an impossible length", param="data")
    return records


def held_out(num_records: int) -> int:
    """The first of the records that judge what was learned."""
    return int(num_records * _LEARNED)


def learn(records: list[LengthRecord], *, seed: int = 0) -> tuple[LengthTable, Report]:
    """The table learned from `records`, oldest first: the same for the same records and seed.

    It learns from the first 80 % and is judged, as rounded, by the others. Raises InvalidRequest where there are fewer
    than `MIN_RECORDS`.
    """
    started = time.monotonic()
    if len(records) < MIN_RECORDS:
        raise InvalidRequest(f"{len(records)} records are fewer than {MIN_RECORDS}", param="data")
    longest = float(np.quantile([record.output_tokens for record in records], _LONGEST))
    num_buckets = bucket_of(int(longest), MAX_BUCKETS) + 1
    features = [np.array(record.features, dtype=np.int64) for record in records]
    labels = np.array([bucket_of(r.output_tokens, num_buckets) for r in records], dtype=np.int64)
    first = held_out(len(records))
    random = np.random.default_rng(seed)
    weights = _fit(features[:first], labels[:first], num_buckets, random)
    table = _rounded(weights)
    judged = labels[first:]
    told = np.array([table.bucket(record.features) for record in records[first:]])
    majority = np.bincount(labels[:first], minlength=num_buckets).argmax()
    return table, Report(
        num_records=len(records),
        num_held_out=len(judged),
        num_buckets=num_buckets,
        accuracy=float(np.mean(told == judged)),
        within_one=float(np.mean(np.abs(told - judged) <= 1)),
        majority_accuracy=float(np.mean(judged == majority)),
        majority_within_one=float(np.mean(np.abs(judged - majority) <= 1)),
        train_s=round(time.monotonic() - started, 3),
    )


def _fit(
    features: list[Labels], labels: Labels, num_buckets: int, random: np.random.Generator
) -> Floats:
    """Weights [NUM_FEATURES, num_buckets]: AdaGrad on the cross entropy, with a prior around nothing."""
    weights = np.zeros((NUM_FEATURES, num_buckets), dtype=np.float32)
    squares = np.full_like(weights, 1e-6)
    decay = np.float32(_PRIOR / len(labels))
    # Before anything is learned: how common each bucket is.
    counts = np.bincount(labels, minlength=num_buckets) + 1.0
    weights[BIAS] = np.log(counts / counts.sum())
    for _ in range(_EPOCHS):
        for rows in np.array_split(random.permutation(len(labels)), -(-len(labels) // _BATCH)):
            inputs = _dense([features[row] for row in rows])  # [batch, NUM_FEATURES]
            errors = _softmax(inputs @ weights)
            errors[np.arange(len(rows)), labels[rows]] -= 1.0
            gradient = inputs.T @ (errors / len(rows)) + decay * weights
            squares += gradient**2
            weights -= _RATE * gradient / np.sqrt(squares)
    return weights


def _dense(features: list[Labels]) -> Floats:
    """[len(features), NUM_FEATURES]: one where a record has the feature."""
    inputs = np.zeros((len(features), NUM_FEATURES), dtype=np.float32)
    for row, numbers in zip(inputs, features, strict=True):
        row[numbers] = 1.0
    return inputs


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def _rounded(weights: Floats) -> LengthTable:
    """The weights as bytes. What all buckets of a feature have in common decides nothing and is left out first."""
    centred = (
        weights - (weights.max(axis=1, keepdims=True) + weights.min(axis=1, keepdims=True)) / 2
    )
    scale = (ZERO - 1) / max(float(np.abs(centred).max()), 1e-9)
    rounded = np.rint(centred * scale).astype(np.int64) + ZERO
    return LengthTable(weights.shape[1], rounded.astype(np.uint8).tobytes())


def train(training: Training) -> TrainingEnded:
    """What comes of it, or why nothing can. A table no better than always saying the same is not handed out."""
    ended = TrainingEnded(task=training.task, job=training.job)
    try:
        if training.kind != "predictor":
            raise InvalidRequest(f"kind {training.kind!r} is not trained here", param="kind")
        table, report = learn(read_records(training.data))
    except InvalidRequest as error:
        why = Failure(code=error.code, message=error.message, param=error.param)
        return replace(ended, failure=why)
    useful = report.accuracy > report.majority_accuracy
    return replace(
        ended,
        result=table.to_bytes() if useful else b"",
        report=orjson.dumps(report).decode(),
    )


def main() -> None:
    """One training, from standard input to standard output, with what others leave of the processor."""
    die_with_parent()
    os.nice(19)
    training = wire.decode(sys.stdin.buffer.read(), Training)
    sys.stdout.buffer.write(wire.encode(train(training)))


if __name__ == "__main__":
    main()
