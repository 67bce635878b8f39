"""Batches on a real bus and a real store: every line once, in order, whoever dies in the middle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from services.scheduler import batches as batches_module
from services.scheduler import lines as lines_module
from services.scheduler.outcomes import unfinished
from shared.bus import Bus
from shared.errors import DeadlineExceeded, Overloaded
from shared.job_messages import JobRow, JobStatus, Line, LineDone
from tests.nats_server import NatsServer
from tests.scheduler.batching import Desk, Gateway, jsonl, request, said, status, well
from tests.scheduler.players import eventually


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits for a while waits less."""
    monkeypatch.setattr(batches_module, "RECORD_S", 0.1)
    monkeypatch.setattr(batches_module, "_AGAIN_S", 0.05)


@pytest.fixture
async def desk(bus: Bus, tmp_path: Path) -> Desk:
    """A tenant's files and batches."""
    return await Desk.open(bus, tmp_path / "files")


async def test_a_batch_answers_every_line_in_its_order(desk: Desk) -> None:
    """All lines are run once, and the output has their answers in the order of the input, whatever came first."""
    wanted = [f"q{number}" for number in range(40)]

    async def answer(line: Line) -> LineDone:
        await asyncio.sleep(hash(line.key) % 7 / 100)
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer) as gateway, desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(one) for one in wanted]))
        row, result = await desk.over()

    assert row.status is JobStatus.COMPLETED
    assert (row.num_total, row.num_done, row.num_failed) == (40, 40, 0)
    assert (result.prompt_tokens, result.cached_tokens, result.output_tokens) == (120, 40, 80)
    assert (result.model, result.error_file) == ("tiny", "")
    lines = await desk.read(result.output_file)
    assert [line["custom_id"] for line in lines] == wanted
    assert all(
        line["response"]["body"] == {"echo": line["custom_id"]}
        and line["response"]["status_code"] == 200
        and line["error"] is None
        and line["id"].startswith("batch_req_")
        for line in lines
    )
    assert set(gateway.seen.values()) == {1}
    assert not await unfinished(desk.store)


async def test_lines_that_fail_are_in_the_errors_file(desk: Desk) -> None:
    """An answer that is the line's own fault is final; one that is ours is tried again, and then final, too."""

    async def answer(line: Line) -> LineDone:
        codes = {"bad": 400, "broken": 500}
        return status(codes[said(line)]) if said(line) in codes else await well(line)

    async with Gateway(desk.bus, "gw-1", answer) as gateway, desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(one) for one in ("a", "bad", "b", "broken")]))
        row, result = await desk.over()

    assert (row.status, row.num_done, row.num_failed) == (JobStatus.COMPLETED, 2, 2)
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == ["a", "b"]
    errors = await desk.read(result.error_file)
    assert [(line["custom_id"], line["response"]["status_code"]) for line in errors] == [
        ("bad", 400),
        ("broken", 500),
    ]
    assert gateway.seen == {"a": 1, "b": 1, "bad": 1, "broken": batches_module.TRIES}


async def test_an_input_that_is_wrong_is_refused_line_by_line(desk: Desk) -> None:
    """Each wrong line is named with its number and why; then nothing is run."""
    contents = jsonl([request("a"), request("a"), request("b", method="GET")]) + b"\n{no\n"
    async with Gateway(desk.bus, "gw-1") as gateway, desk.je() as jobs:
        await desk.submit(jobs, contents)
        row, result = await desk.over()

    assert (row.status, row.num_total) == (JobStatus.FAILED, 0)
    assert [(error.line, error.code) for error in result.errors] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_method"),
        (5, "invalid_json_line"),
    ]
    assert not gateway.lines


async def test_a_refusal_for_want_of_room_slows_a_batch_down_and_loses_nothing(desk: Desk) -> None:
    """A gateway with room for three at once gets all lines, and hardly ever more than it bears."""
    running = 0

    async def answer(line: Line) -> LineDone:
        nonlocal running
        if running >= 3:
            raise Overloaded("full", retry_after_s=0.05)
        running += 1
        try:
            await asyncio.sleep(0.01)
            return await well(line)
        finally:
            running -= 1

    async with Gateway(desk.bus, "gw-1", answer) as gateway, desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(f"q{number}") for number in range(60)]))
        row, _ = await desk.over()

    assert (row.num_done, row.num_failed) == (60, 0)
    assert gateway.seen.total() < 120, "it asked again and again without slowing down"


async def test_a_batch_goes_on_at_another_je_without_a_finished_line(desk: Desk) -> None:
    """A JE that leaves in the middle is succeeded by another: what was written down is not run again."""
    hold = asyncio.Event()

    async def answer(line: Line) -> LineDone:
        if int(said(line)[1:]) >= 20:
            await hold.wait()
        return await well(line)

    wanted = [f"q{number}" for number in range(30)]
    async with Gateway(desk.bus, "gw-1", answer) as gateway:
        async with desk.je("je-1") as jobs:
            await desk.submit(jobs, jsonl([request(one) for one in wanted]))

            async def twenty() -> bool:
                return (await desk.row()).num_done == 20

            await eventually(twenty)
        hold.set()
        async with desk.je("je-2"):
            row, result = await desk.over()

    assert (row.status, row.num_done, row.attempt) == (JobStatus.COMPLETED, 30, 2)
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == wanted
    assert {gateway.seen[f"q{number}"] for number in range(20)} == {1}


async def test_an_owner_that_was_replaced_unawares_adds_nothing_twice(desk: Desk) -> None:
    """Of two JEs that both take a batch for theirs one ends it; each line is in the output once."""
    hold = asyncio.Event()

    async def answer(line: Line) -> LineDone:
        await hold.wait()
        return await well(line)

    wanted = [f"q{number}" for number in range(6)]
    async with Gateway(desk.bus, "gw-1", answer) as gateway, desk.je("je-1") as jobs:
        await desk.submit(jobs, jsonl([request(one) for one in wanted]))
        await eventually(lambda: len(gateway.seen) == len(wanted))
        await desk.rows.change("batch_1", JobRow, lambda row: replace(row, owner="", attempt=2))
        async with desk.je("je-2"):
            hold.set()
            row, result = await desk.over()

    assert (row.status, row.num_done) == (JobStatus.COMPLETED, 6)
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == wanted


async def test_a_cancelled_batch_keeps_what_is_done(desk: Desk) -> None:
    """Cancelled in the middle, what is done is in the output, and the rest is named in the errors file."""

    async def answer(line: Line) -> LineDone:
        if said(line) != "first":
            await asyncio.Event().wait()
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer), desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(one) for one in ("first", "second", "third")]))

        async def one() -> bool:
            return (await desk.row()).num_done == 1

        await eventually(one)
        await desk.rows.change(
            "batch_1", JobRow, lambda row: replace(row, status=JobStatus.CANCELLING)
        )
        row, result = await desk.over()

    assert (row.status, row.num_done) == (JobStatus.CANCELLED, 1)
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == ["first"]
    errors = await desk.read(result.error_file)
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        ("second", "batch_cancelled"),
        ("third", "batch_cancelled"),
    ]
    assert all(line["response"] is None for line in errors)


async def test_a_batch_that_is_cancelled_before_it_is_looked_at_ends(desk: Desk) -> None:
    """A batch cancelled while it waits is over as soon as a JE takes it, with nothing run."""
    async with Gateway(desk.bus, "gw-1") as gateway:
        async with desk.je("je-1") as jobs:
            await jobs.leave()
            await desk.submit(jobs, jsonl([request("a")]))
        await desk.rows.change(
            "batch_1", JobRow, lambda row: replace(row, status=JobStatus.CANCELLING)
        )
        async with desk.je("je-2"):
            row, _ = await desk.over()
    assert row.status is JobStatus.CANCELLED
    assert not gateway.lines


async def test_a_batch_whose_time_is_over_expires(desk: Desk) -> None:
    """At the end of its window a batch ends with what is done; the rest is named as expired."""

    async def answer(line: Line) -> LineDone:
        if said(line) == "slow":
            await asyncio.Event().wait()
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer), desk.je() as jobs:
        await desk.submit(jobs, jsonl([request("quick"), request("slow")]), expires_s=1)
        row, result = await desk.over()

    assert (row.status, row.num_done) == (JobStatus.EXPIRED, 1)
    assert time.time() >= row.expires
    [error] = await desk.read(result.error_file)
    assert (error["custom_id"], error["error"]["code"]) == ("slow", "batch_expired")


async def test_a_gateway_that_dies_costs_one_round(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines at a gateway that dies are run by another one."""
    monkeypatch.setattr(lines_module, "ROUND_S", 0.5)

    async def hang(line: Line) -> LineDone:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        Gateway(desk.bus, "gw-1", hang) as dying,
        Gateway(desk.bus, "gw-2") as living,
        desk.je() as jobs,
    ):
        await asyncio.sleep(0.3)  # both have been heard
        await desk.submit(jobs, jsonl([request(f"q{number}") for number in range(16)]))
        await eventually(lambda: len(dying.seen) > 0 and len(dying.seen) + len(living.seen) == 16)
        await dying.die()
        row, _ = await desk.over()
    assert row.num_done == 16


async def test_a_batch_survives_a_killed_bus(desk: Desk, nats: NatsServer) -> None:
    """kill -9 of nats-server in the middle: the batch goes on when it is back, and every line is answered once."""
    wanted = [f"q{number}" for number in range(30)]

    async def answer(line: Line) -> LineDone:
        await asyncio.sleep(0.1)
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer) as gateway, desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(one) for one in wanted]))
        await eventually(lambda: gateway.seen.total() >= 10)
        back = asyncio.Event()
        desk.bus.on_reconnect(back.set)
        await asyncio.to_thread(nats.restart)
        await back.wait()
        row, result = await desk.over(within_s=40)

    assert (row.status, row.num_done) == (JobStatus.COMPLETED, 30)
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == wanted


async def test_a_line_that_takes_long_is_asked_for_again(desk: Desk) -> None:
    """An answer that is not there at the end of a round is asked for at the same gateway, with the same key."""
    asked: list[str] = []

    async def answer(line: Line) -> LineDone:
        asked.append(line.key)
        if len(asked) < 4:
            raise DeadlineExceeded("not yet")
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer), desk.je() as jobs:
        await desk.submit(jobs, jsonl([request("a")]))
        row, _ = await desk.over()
    assert (row.num_done, row.num_failed) == (1, 0)
    assert asked == ["batch_1-1"] * 4


async def test_an_input_that_is_deleted_in_the_middle_costs_what_was_not_done(desk: Desk) -> None:
    """A batch whose input goes away while it runs fails, with the answers that were there."""
    hold = asyncio.Event()

    async def answer(line: Line) -> LineDone:
        if said(line) == "second":
            await hold.wait()
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer):
        async with desk.je("je-1") as jobs:
            await desk.submit(jobs, jsonl([request("first"), request("second")]))

            async def one() -> bool:
                return (await desk.row()).num_done == 1

            await eventually(one)
        await desk.files.remove("alice", "file-batch_1")
        async with desk.je("je-2"):
            row, result = await desk.over()
    assert (row.status, row.num_done) == (JobStatus.FAILED, 1)
    assert [failure.code for failure in row.failures] == ["not_found"]
    assert [line["custom_id"] for line in await desk.read(result.output_file)] == ["first"]


async def test_an_input_that_was_deleted_fails_the_batch(desk: Desk) -> None:
    """A batch whose input is gone ends as failed, and says so."""
    async with Gateway(desk.bus, "gw-1"):
        async with desk.je("je-1") as jobs:
            await jobs.leave()
            await desk.submit(jobs, jsonl([request("a")]))
        await desk.files.remove("alice", "file-batch_1")
        async with desk.je("je-2"):
            row, _ = await desk.over()
    assert row.status is JobStatus.FAILED
    assert [failure.code for failure in row.failures] == ["not_found"]


async def test_a_batch_that_does_not_get_on_gives_its_place_to_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of a model for which there is no room never keep those of another one waiting for ever."""
    monkeypatch.setattr(batches_module, "_STUCK_S", 0.3)
    monkeypatch.setattr(batches_module, "_STUCK_AGAIN_S", 0.3)
    awake = asyncio.Event()

    async def answer(line: Line) -> LineDone:
        if orjson.loads(line.body)["model"] == "asleep" and not awake.is_set():
            return status(503)
        return await well(line)

    async with Gateway(desk.bus, "gw-1", answer), desk.je(limit=2) as jobs:
        for number in range(2):
            await desk.submit(jobs, jsonl([request("a", "asleep")]), f"batch_asleep{number}")
        await desk.submit(jobs, jsonl([request("b")]))
        row, _ = await desk.over()
        assert (row.status, row.num_done) == (JobStatus.COMPLETED, 1)
        awake.set()
        for number in range(2):
            row, _ = await desk.over(f"batch_asleep{number}")
            assert (row.status, row.num_done) == (JobStatus.COMPLETED, 1)


async def test_a_store_that_is_slow_slows_a_batch_down(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While outcomes cannot be written down, few more lines are run; a cancellation is heeded meanwhile."""
    monkeypatch.setattr(batches_module, "_PENDING_BYTES", 2000)
    monkeypatch.setattr(batches_module, "_WINDOW_LINES", 4)
    put, go = desk.store.put, asyncio.Event()

    async def slow(key: str, chunks: AsyncIterator[bytes]) -> int:
        if key.startswith("batches/"):
            await go.wait()
        return await put(key, chunks)

    monkeypatch.setattr(desk.store, "put", slow)
    async with Gateway(desk.bus, "gw-1") as gateway, desk.je() as jobs:
        await desk.submit(jobs, jsonl([request(f"q{number}") for number in range(200)]))
        await eventually(lambda: gateway.seen.total() >= 5)
        await asyncio.sleep(0.3)
        assert gateway.seen.total() < 30
        await desk.rows.change(
            "batch_1", JobRow, lambda row: replace(row, status=JobStatus.CANCELLING)
        )
        go.set()
        row, result = await desk.over()
    assert row.status is JobStatus.CANCELLED
    assert 5 <= row.num_done <= gateway.seen.total() < 40
    assert len(await desk.read(result.error_file)) == 200 - row.num_done
