"""Learning to predict lengths: what is learned, when it is handed out, and what the child process does with rubbish."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from random import Random

import pytest

from services.scheduler.lengths import Features, Lengths
from services.worker import training as training_module
from services.worker.training import MIN_RECORDS, learn, read_records, train
from shared import wire
from shared.errors import InvalidRequest
from shared.job_messages import LengthRecord, PredictorEntry, Training, TrainingEnded
from tests.scheduler.prompts import orders, record_of, records, request


def packed(lines: list[LengthRecord]) -> bytes:
    """As a JE sends them."""
    return zlib.compress(b"".join(wire.to_json(one) + b"\n" for one in lines))


def training(data: bytes, kind: str = "predictor") -> Training:
    """An order."""
    return Training(task="j.1", job="j", je="je-1", kind=kind, model="m", data=data)


def test_a_length_that_the_prompt_tells_is_learned() -> None:
    """Most answers to prompts that were not learned from fall into the predicted bucket, in the table as it ships."""
    known = records(Random(1), 900)
    table, report = learn(known)
    assert report.num_held_out == 180
    assert report.accuracy > report.majority_accuracy + 0.3
    assert report.within_one > 0.85
    lengths = Lengths()
    lengths.load(PredictorEntry(model="m", created=1, table=table.to_bytes()))
    fresh = orders(Random(2), 200)
    near = [abs(lengths.predict(one).mid - length) <= 192 for one, length in fresh]
    assert sum(near) > 160


def test_the_same_records_give_the_same_table() -> None:
    """Learning is deterministic."""
    known = records(Random(3), 250)
    assert learn(known)[0] == learn(known)[0]


def test_what_says_nothing_gives_no_table() -> None:
    """Where lengths do not depend on prompts, or are all alike, the report says so and no table is handed out."""
    random = Random(4)
    for length in (lambda: 10, lambda: random.choice([10] * 6 + [200, 400])):
        lines = [record_of(one, length()) for one, _ in orders(random, 300)]
        done = train(training(packed(lines)))
        assert done.failure is None
        report = json.loads(done.report)
        assert not done.result
        assert report["accuracy"] <= report["majority_accuracy"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zlib",
        zlib.compress(b"{}"),
        zlib.compress(b"\xff\n"),
        packed(records(Random(5), MIN_RECORDS))[:-9],
        packed([record_of(request(), 5)] * (MIN_RECORDS - 1)),
        packed([record_of(request(), -5)] * MIN_RECORDS),
        packed([record_of(request(), 2**62)] * MIN_RECORDS),
    ],
)
def test_records_that_cannot_be_used_are_refused(data: bytes) -> None:
    """A failure, never an exception or a table."""
    done = train(training(data))
    assert done.failure is not None
    assert done.failure.code == "invalid_request"
    assert not done.result


def test_a_line_that_was_torn_costs_no_other() -> None:
    """A disk that was full for a moment leaves half a line among whole ones: these are learned from."""
    known = records(Random(5), 4)
    lines = [wire.to_json(one) for one in known]
    torn = [lines[0], lines[1][:30] + lines[2], b"", lines[3]]
    assert read_records(zlib.compress(b"\n".join(torn))) == [known[0], known[3]]


def test_too_many_records_are_not_all_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are, up to a bound on the time that learning takes; a text beyond all bounds is refused."""
    known = records(Random(5), 6)
    monkeypatch.setattr(training_module, "_MAX_RECORDS", 4)
    assert read_records(packed(known)) == known[2:]
    monkeypatch.setattr(training_module, "_MAX_TEXT_BYTES", 500)
    with pytest.raises(InvalidRequest):
        read_records(packed(known))


def test_features_that_no_table_has_are_refused() -> None:
    """A record made for tables of another size is not learned from."""
    record = LengthRecord(
        kind="chat", prompt_tokens=1, max_tokens=1, output_tokens=1, features=[8192]
    )
    with pytest.raises(InvalidRequest):
        read_records(packed([record]))


@pytest.mark.service
def test_the_child_process_answers_on_its_standard_output() -> None:
    """Bytes in, bytes out: what the process says is what learning in place says."""
    order = training(packed(records(Random(6), 250)))
    child = subprocess.run(
        [sys.executable, "-m", "services.worker.training"],
        input=wire.encode(order),
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    done = wire.decode(child.stdout, TrainingEnded)
    assert (done.task, done.job, done.failure) == ("j.1", "j", None)
    assert done.result == train(order).result != b""


def test_what_was_recorded_can_be_trained_on() -> None:
    """The features of a request and those of its record are the same numbers."""
    [(one, length)] = orders(Random(7), 1)
    assert read_records(packed([record_of(one, length)]))[0].features == list(
        Features.of(one).numbers
    )
