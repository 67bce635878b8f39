"""The thread that moves blocks: what raises in it, or beside it, costs what it was to move and nothing else."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence

import pytest

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import View
from services.worker.flowserve.rtc.executor import MAX_ERRORS, RtcExecutor
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.courier import WAIT_S, StagedDecoder

PAGES = [(b"one", 1), (b"two", 2)]


class FullDevice(StagedDecoder):
    """One that has no room left for what is copied on its way in or out."""

    def read_blocks(self, blocks: Sequence[int]) -> View:
        raise MemoryError("to read")

    def write_blocks(self, blocks: Sequence[int], data: View) -> None:
        raise MemoryError("to write")


def flag(event: threading.Event, results: list[object]) -> Callable[[object], None]:
    """Note a result, and that it is there."""

    def done(result: object) -> None:
        results.append(result)
        event.set()

    return done


def apply_all(executor: RtcExecutor, is_over: threading.Event) -> None:
    while not is_over.is_set():
        executor.apply(is_quiet=True)


@pytest.fixture(params=[ArithmeticDecoder, StagedDecoder], ids=["addressed", "staged"])
def decoder(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ArithmeticDecoder:
    made: ArithmeticDecoder = request.param(tiny_config)
    made.allocate(4, 16)
    return made


@pytest.fixture
def full(tiny_config: ModelConfig) -> FullDevice:
    made = FullDevice(tiny_config)
    made.allocate(4, 16)
    return made


def test_blocks_that_cannot_be_written_count_as_not_filled(full: FullDevice) -> None:
    """The engine goes on, hears why, and is told that nothing came."""
    executor, over = RtcExecutor(full), threading.Event()
    filled: list[object] = []
    executor.fill([1, 2], len, flag(over, filled))
    apply_all(executor, over)
    assert filled == [0]
    assert [str(error) for error in executor.errors] == ["to write"]
    executor.close()


def test_blocks_that_cannot_be_read_are_not_saved(full: FullDevice) -> None:
    """`save` is called all the same, with nothing, for whoever waits for it."""
    executor, over = RtcExecutor(full), threading.Event()
    seen: list[object] = []

    def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
        seen.append(pages)
        return []

    executor.save(PAGES, save, flag(over, seen))
    apply_all(executor, over)
    assert seen == [[], []]
    assert [str(error) for error in executor.errors] == ["to read"]
    executor.close()


def test_those_behind_a_job_that_raises_run(decoder: ArithmeticDecoder) -> None:
    """And of many errors the first are told."""
    executor, over = RtcExecutor(decoder), threading.Event()
    filled: list[object] = []

    def fail(_: list[View]) -> int:
        raise OSError("no such page")

    for _ in range(MAX_ERRORS + 1):
        executor.fill([1], fail, filled.append)
    executor.fill([1, 2], len, flag(over, filled))
    apply_all(executor, over)
    assert filled == [0] * (MAX_ERRORS + 1) + [2]
    assert len(executor.errors) == MAX_ERRORS
    executor.close()


def test_the_thread_ends_with_its_executor(decoder: ArithmeticDecoder) -> None:
    """Also if that is not closed, and has worked before."""
    before = set(threading.enumerate())
    executor, over = RtcExecutor(decoder), threading.Event()
    executor.fill([1, 2], len, lambda _: over.set())
    apply_all(executor, over)
    [thread] = set(threading.enumerate()) - before
    del executor
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
