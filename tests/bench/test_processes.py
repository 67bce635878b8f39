"""CPU time of real processes, told apart by role and thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deepflow.bench.processes import CpuTimes, Thread, cpu_times

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")

# A main thread that idles, and a thread that burns half a second of CPU under the name argv[1].
_BURN = """
import ctypes, sys, threading, time
def burn():
    ctypes.CDLL(None).prctl(15, sys.argv[1].encode())
    end = time.thread_time() + 0.5
    while time.thread_time() < end: pass
    print("burnt", flush=True)
    sys.stdin.read()
threading.Thread(target=burn).start()
"""


def _burnt(name: str, role: str) -> CpuTimes:
    command = [sys.executable, "-c", _BURN, name, role]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        times = cpu_times(process.pid)
        process.stdin.close()  # type: ignore[union-attr]
    return times


def test_a_thread_named_engine_is_the_engine() -> None:
    """What a thread called `engine` uses counts as the engine's, the rest as its process's role."""
    times = _burnt("engine", "services.worker.te")
    used = times.since(CpuTimes())
    assert times.names_engine
    assert set(used) == {"engine", "te"}
    assert used["engine"] >= 0.4


def test_threads_without_a_name_count_for_their_process() -> None:
    """A thread with any other name counts for the role that the command line gives away."""
    used = _burnt("tokenizer", "services.gateway").since(CpuTimes())
    assert set(used) == {"gateway"}
    assert used["gateway"] >= 0.4


def test_without_a_named_engine_a_te_counts_by_its_main_thread() -> None:
    """If nothing is called `engine`, all threads of a TE but the main one are taken for it."""
    times = _burnt("python", "services.worker.te")
    assert not times.names_engine
    assert times.since(CpuTimes())["engine"] >= 0.4


def test_children_belong_to_the_tree() -> None:
    """A child without a role of its own takes its parent's."""
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\ninput()\nchild.communicate()"
    )
    command = [sys.executable, "-c", code, "services.cache"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        roles = {pid: thread.role for (pid, _), thread in cpu_times(process.pid).threads.items()}
        process.communicate(b"\n")
    assert roles == {process.pid: "cache", child: "cache"}


def test_only_what_was_used_since_counts() -> None:
    """A difference leaves out what was used before; a thread that began in between counts whole."""
    before = CpuTimes({(1, 1): Thread("nats", "nats", True, 5.0)})
    after = CpuTimes(
        {(1, 1): Thread("nats", "nats", True, 6.0), (1, 2): Thread("nats", "nats", False, 0.5)}
    )
    assert after.since(before) == {"nats": pytest.approx(1.5)}


def test_a_process_that_is_gone_has_used_nothing() -> None:
    """The tree of a dead process is empty."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert cpu_times(process.pid).threads == {}
