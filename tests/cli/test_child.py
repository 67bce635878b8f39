"""One supervised child: its end, its log, and what is told about its death."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from deepflow.cli.child import Child, cause, last_error


def child(tmp_path: Path, script: str) -> Child:
    """A child that runs a Python script."""
    return Child(
        "it", lambda: [sys.executable, "-c", script], dict(os.environ), tmp_path / "it.log"
    )


async def has_said(child: Child, text: str) -> None:
    """Wait for a line in its log."""
    async with asyncio.timeout(10):
        while text not in child.log.read_text():
            await asyncio.sleep(0.01)


@pytest.mark.service
async def test_a_child_that_obeys_is_not_killed(tmp_path: Path) -> None:
    """SIGTERM is enough, and its own last words are in its log."""
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('bye')); "
        "print('here', flush=True); time.sleep(60)"
    )
    one = child(tmp_path, script)
    one.begin_log()
    await one.start()
    await has_said(one, "here")
    assert await one.stop(10)
    assert one.pid is None
    assert "bye" in one.log.read_text()


@pytest.mark.service
async def test_a_child_that_does_not_obey_is_killed_with_its_children(tmp_path: Path) -> None:
    """After the grace nothing of it is left, grandchildren in groups of their own included."""
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], process_group=0); "
        "print(p.pid, 'here', flush=True); time.sleep(60)"
    )
    one = child(tmp_path, script)
    one.begin_log()
    await one.start()
    await has_said(one, "here")
    grandchild = psutil.Process(int(one.log.read_text().split()[0]))
    assert not await one.stop(0.1)
    assert one.pid is None
    assert psutil.wait_procs([grandchild], timeout=5)[1] == []


@pytest.mark.service
async def test_a_log_that_has_grown_is_cut_short_under_its_writer(tmp_path: Path) -> None:
    """The writer goes on at the beginning, and what it had written lies in the old log."""
    script = "import time; print('first', flush=True); time.sleep(60)"
    one = child(tmp_path, script)
    one.begin_log()
    await one.start()
    await has_said(one, "first")
    one.bound_log(limit_bytes=1000)
    assert one.log.read_text() == "first\n"
    one.bound_log(limit_bytes=3)
    assert one.log.read_text() == ""
    assert one.log.with_suffix(".log.1").read_text() == "first\n"
    one.kill()
    await one.wait()


def test_a_log_that_was_taken_away_is_bounded(tmp_path: Path) -> None:
    """Somebody who deletes a log file does not end the platform."""
    child(tmp_path, "").bound_log()
    assert not (tmp_path / "it.log").exists()


def test_each_run_begins_a_log(tmp_path: Path) -> None:
    """The log of the run before is kept, the one before that is not."""
    one = child(tmp_path, "")
    for run in ("first", "second", "third"):
        one.begin_log()
        one.log.write_text(run)
    assert one.log.read_text() == "third"
    assert one.log.with_suffix(".log.1").read_text() == "second"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        (['{"level":"info","event":"service_started"}'], ""),
        (
            ['{"level":"error","event":"start_failed","error":"no bus"}', '{"level":"info"}'],
            "start_failed: no bus",
        ),
        (
            [
                json.dumps(
                    {"level": "error", "event": "te_failed", "exception": "Trace\nValueError: x"}
                )
            ],
            "te_failed: ValueError: x",
        ),
        (["Traceback (most recent call last):", "ImportError: torch"], "ImportError: torch"),
    ],
)
def test_the_last_error_of_a_log(tmp_path: Path, lines: list[str], expected: str) -> None:
    """Of JSON lines the last error, else the last plain line."""
    log = tmp_path / "it.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    assert last_error(log) == expected


def test_deaths_have_names() -> None:
    """A code is an exit, a negative one a signal."""
    assert [cause(3), cause(-9), cause(-34)] == [
        "exited with 3",
        "was killed by SIGKILL",
        "was killed by SIGRTMIN",
    ]
