"""Last in the ring, after everything the other files did to the stack: nothing has leaked, and it rests quietly."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from tests.system.conftest import MODEL
from tests.system.stack import Stack, body, stream_all

pytestmark = [pytest.mark.system, pytest.mark.smollm2, pytest.mark.timeout(120)]


async def test_the_ledger_balances(stack: Stack) -> None:
    """No TE holds a live block; the blocks of each TE, and the slots of the arena, are each in one state."""
    stack.wait_tes()
    stack.wait_idle()
    (arena,) = stack.arenas()
    assert arena["total"] > 0
    assert arena["total"] == sum(
        arena[state] for state in ("cached", "kept", "leased", "writing", "free")
    )
    assert not arena["leased"], arena


async def test_requests_leave_no_file_or_task_behind(stack: Stack) -> None:
    """Forty more requests change neither the number of open files of any process nor of threads of any of ours."""
    requests = [body(MODEL, f"File number {i}", 3) for i in range(20)]

    def threads(process: psutil.Process) -> int:
        # Go's runtime gives nats-server threads as it pleases, one more now and then.
        return 0 if process.name() == "nats-server" else process.num_threads()

    def counts() -> dict[int, tuple[int, int]]:
        return {p.pid: (p.num_fds(), threads(p)) for p in stack.processes()}

    await stream_all(stack.url, requests)
    await asyncio.sleep(1.0)
    before = counts()
    await stream_all(stack.url, requests)
    give_up = time.monotonic() + 10
    while (after := counts()) != before:
        # keep-alive connections and scrape threads come and go; a leak stays
        grown = {
            pid
            for pid in before
            if any(a > b for a, b in zip(after[pid], before[pid], strict=True))
        }
        if not grown or time.monotonic() > give_up:
            assert not grown, (before, after)
            break
        await asyncio.sleep(0.5)


async def test_the_processes_are_those_that_should_be(stack: Stack) -> None:
    """After all restarts there are exactly the launcher, nats, four services with a zygote, two TEs and a warm one, and
    the tokenizer pool."""

    def commands() -> list[str]:
        return [" ".join(process.cmdline()) + " " for process in stack.processes()]

    def num_tes() -> int:
        return sum("services.worker.te " in name for name in commands())

    give_up = time.monotonic() + 10
    while num_tes() != 3 and time.monotonic() < give_up:  # a warm one was used a moment ago
        await asyncio.sleep(0.2)
    names = commands()
    for module in ("services.gateway", "services.scheduler", "services.cache"):
        assert sum(f"-m {module} " in name for name in names) == 1, names
    assert sum("nats-server" in name for name in names) == 1, names
    assert sum("services.worker.te " in name for name in names) == 3, names
    assert sum("services.worker.zygote" in name for name in names) == 1, names
    assert all(process.status() != psutil.STATUS_ZOMBIE for process in stack.processes())


async def test_an_idle_stack_rests(stack: Stack) -> None:
    """The platform without requests does almost nothing: its processes sleep nearly all the time."""
    stack.wait_idle()
    await asyncio.sleep(2)

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in stack.processes())

    before = cpu_s()
    await asyncio.sleep(4)
    used = (cpu_s() - before) / 4

    # The bar that `deepflow bench bus` reports is 3 % of a core; a busy loop anywhere would show as 100 %.
    assert used < 0.25


async def test_ctrl_c_leaves_nothing_behind(stack: Stack) -> None:
    """SIGINT drains, the exit code is 0, and no process of the instance is left."""
    processes = stack.processes()
    code = await asyncio.to_thread(stack.stop)
    _, alive = psutil.wait_procs(processes, timeout=5)

    assert code == 0, stack.output()
    assert not alive
