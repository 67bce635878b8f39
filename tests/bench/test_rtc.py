"""`deepflow bench rtc`: every part measures what it says, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import psutil
import pytest

from deepflow.bench.rtc import index, transport
from deepflow.bench.rtc.plan import BARS, QUICK
from deepflow.sim.trace import generate

ROOT = Path(__file__).parents[2]
BENCH = (sys.executable, "-m", "deepflow.cli.main", "bench", "rtc")


def test_the_command_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """`bench rtc --quick --trace FILE --json -` prints every metric it promises, and no process of it is left."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(generate(60, seed=1)))
    done = subprocess.run(
        [*BENCH, "--quick", "--json", "-", "--trace", str(trace)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body = orjson.loads(done.stdout)
    assert body["metrics"].keys() >= {bar.metric for bar in BARS}
    assert body["bars"].keys() == {bar.metric for bar in BARS}
    assert body["metrics"].keys() >= {"trace_hit_ideal", "trace_hit_1000", "index_bytes_per_block"}
    assert body["settings"]["trace"] == "trace.jsonl"
    left = [
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if "deepflow.bench.rtc.peer" in (one.info["cmdline"] or []) and one.ppid() == 1
    ]
    assert left == []


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    """The command ends with 2 and says which line is wrong, before it measures anything."""
    (tmp_path / "bad.jsonl").write_text(next(generate(1, seed=1)) + "\n{}\n")
    done = subprocess.run(
        [*BENCH, "--trace", str(tmp_path / "bad.jsonl")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
        check=False,
    )
    assert done.returncode == 2
    assert "line 2" in done.stderr + done.stdout


def test_the_index_is_full_and_under_eviction_when_it_is_measured() -> None:
    """More goes in than fits, and every match finds all it asks for."""
    assert QUICK.num_inserts > 2 * QUICK.num_blocks
    found = index.index(QUICK, seed=0)
    assert {"match_4096_ms", "append_us", "insert_ops_s"} <= found.keys()
    assert all(value > 0 for value in found.values())


def test_the_directory_stays_within_its_budget() -> None:
    """Offered four times what it has room for, it takes what fits, in fact and not only by its own account."""
    found = index.memory(QUICK, seed=0)
    assert found["directory_pages"] < QUICK.num_directory_pages
    assert 0 < found["directory_vs_budget"] <= 1


@pytest.mark.parametrize("part", [transport.populate, transport.distflow])
def test_bytes_are_compared_with_what_is_bare(part: object) -> None:
    """Every way brings the right bytes (the part checks them itself), and has a figure beside the bare one's."""
    found = part(QUICK)  # type: ignore[operator]
    ratios = {name: value for name, value in found.items() if "_vs_" in name}
    assert ratios
    assert all(value > 0 for value in ratios.values())
