"""Recorded traffic: which answers count, what is written of them, and how much of it is kept."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from services.scheduler import traffic
from services.scheduler.lengths import Features, Lengths
from services.scheduler.traffic import Records, Traffic
from shared import wire
from shared.job_messages import LengthRecord
from tests.scheduler.prompts import ended, orders, request


def lines_of(data: bytes) -> list[LengthRecord]:
    """What was read back."""
    return [wire.from_json(line, LengthRecord) for line in zlib.decompress(data).splitlines()]


def line(number: int, size: int = 10) -> bytes:
    """A line of any record."""
    record = LengthRecord(
        kind="chat", prompt_tokens=1, max_tokens=1, output_tokens=number, features=[0] * size
    )
    return wire.to_json(record)


def test_only_answers_that_came_to_their_own_end_count() -> None:
    """What was cancelled, failed or handed on says nothing; several choices count by their mean."""
    lengths = Lengths()
    kept = Traffic(lengths, records=True)
    for name, n, finish in (
        ("stopped", 2, "stop"),
        ("full", 1, "length"),
        ("left", 1, "cancelled"),
        ("broken", 1, "failed"),
        ("moved", 1, "handed"),
    ):
        kept.asked(request(name, n=n))
        kept.ended(ended(name, 100, finish))
    kept.ended(ended("unknown", 100))
    kept.asked(request("cache", kind="cache"))
    assert kept.num_recorded == {"m": 2}
    assert len(kept) == 1  # the one that was handed on
    kept.ended(ended("moved", 30))
    written = [wire.from_json(text, LengthRecord) for _, text in kept.take_lines()]
    assert [record.output_tokens for record in written] == [50, 100, 30]
    assert kept.take_lines() == []


def test_the_end_of_an_older_attempt_is_not_that_of_the_request() -> None:
    """A resubmitted request counts when its newest attempt ends, though the cancelled one is told of in between."""
    kept = Traffic(Lengths(), records=True)
    for attempt in (1, 2):
        kept.asked(request("r", attempt=attempt))
    assert kept.ended(ended("r", 7, "cancelled")) is None
    assert kept.ended(replace(ended("r", 300), attempt=2)) == 1
    assert (kept.num_recorded, len(kept)) == ({"m": 1}, 0)


def test_answers_feed_the_running_quartiles_whether_recorded_or_not() -> None:
    """Without recording nothing is kept for disk, and predictions still follow the answers."""
    lengths = Lengths()
    kept = Traffic(lengths, records=False)
    off = []
    for number in range(9):
        kept.asked(request(f"r{number}"))
        off.append(kept.ended(ended(f"r{number}", 400)))
    assert off == [2] * 8 + [0]  # buckets from the prior, then none
    assert lengths.predict(request()).mid == 400
    assert kept.take_lines() == []


def test_requests_without_an_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost ends do not pile up."""
    monkeypatch.setattr(traffic, "_MAX_OPEN", 10)
    kept = Traffic(Lengths(), records=False)
    for number in range(50):
        kept.asked(request(f"r{number}"))
    assert len(kept) == 10


def test_a_line_holds_lengths_and_hashes_alone(tmp_path: Path) -> None:
    """Neither token ids, nor the tenant, nor the request's name reach the disk; nobody else may read it."""
    kept = Traffic(Lengths(), records=True)
    [(one, length)] = orders(Random(1), 1, tenant="acme-corporation")
    kept.asked(one)
    kept.ended(ended(one.request, length))
    records = Records(tmp_path / "traffic", "je-1", max_bytes=1 << 20)
    records.write(kept.take_lines())
    [path] = (tmp_path / "traffic").glob("*/*")
    assert path.parent.name == "m"
    text = path.read_bytes()
    assert b"acme" not in text
    [record] = lines_of(records.latest("m", 1 << 20))
    assert record.features == Features.of(one).numbers.tolist()
    assert json.loads(text).keys() == {
        *("t", "kind", "prompt_tokens", "max_tokens", "output_tokens", "features")
    }
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path.parent.parent.stat().st_mode & 0o077 == 0


def test_the_newest_records_of_all_executors_are_read(tmp_path: Path) -> None:
    """Oldest first, from every JE's file of that model; what does not fit is left out from the old end."""
    first, second = (Records(tmp_path, je, max_bytes=1 << 20) for je in ("je-1", "je-2"))
    first.write([("m", line(1)), ("m", line(2)), ("other", line(99))])
    second.write([("m", line(3))])
    for number, path in enumerate(sorted(tmp_path.glob("m/*"))):
        os.utime(path, (1000 + number, 1000 + number))
    assert [r.output_tokens for r in lines_of(first.latest("m", 1 << 20))] == [1, 2, 3]
    assert lines_of(first.latest("none", 1 << 20)) == []
    random = Random(1)
    noise = [("m", line(100 + n, random.randrange(1, 90))) for n in range(500)]
    first.write(noise)
    few = lines_of(first.latest("m", 2000))
    assert 1 < len(few) < 500
    assert len(first.latest("m", 2000)) <= 2000


def test_files_are_rolled_and_the_oldest_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder never holds more than its budget, of all models and JEs together."""
    monkeypatch.setattr(traffic, "_FILE_BYTES", 2000)
    records = Records(tmp_path, "je-1", max_bytes=8000)
    for number in range(200):
        records.write([(f"m{number % 2}", line(number))])
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 8000
    newest = lines_of(records.latest("m1", 1 << 20))
    assert newest[-1].output_tokens == 199
    assert len(list(tmp_path.glob("*/*"))) > 2


def test_a_half_written_line_is_not_read(tmp_path: Path) -> None:
    """A JE that died while it wrote costs its last line."""
    records = Records(tmp_path, "je-1", max_bytes=1 << 20)
    records.write([("m", line(1))])
    [path] = tmp_path.glob("m/*")
    with path.open("ab") as file:
        file.write(line(2)[:20])
    assert [r.output_tokens for r in lines_of(records.latest("m", 1 << 20))] == [1]
