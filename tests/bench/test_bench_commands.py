"""`deepflow bench` as a person types it, on a tiny random model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import psutil
import pytest

from tests.worker.tiny import make_tiny


def _bench(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DEEPFLOW_")}
    return subprocess.run(
        [sys.executable, "-m", "deepflow.cli.main", "bench", *arguments],
        env=env | {"DEEPFLOW_CACHE": str(cache), "TMPDIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.system
@pytest.mark.apart
@pytest.mark.timeout(160)
def test_bench_bus_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """`bench bus --quick --json -` prints every metric it promises, and leaves neither process nor home behind."""
    make_tiny(tmp_path / "models" / "tiny", context=2048)
    done = _bench(tmp_path, "bus", "--quick", "--model", "tiny", "--json", "-")
    assert done.returncode == 0, done.stderr
    body = orjson.loads(done.stdout)
    assert body["metrics"].keys() >= {
        "throughput_ratio_1",
        "throughput_ratio_32",
        "added_ttft_p50_ms",
        "cpu_ms_per_1000_tokens",
        "cancel_to_free_p99_ms",
        "cancel_over_step_p99_ms",
        "overload_goodput_ratio",
        "idle_cpu_percent",
        "failover_pause_p99_ms",
    }
    assert all(isinstance(value, int | float) for value in body["metrics"].values())
    assert body["metrics"]["failover_same_text_share"] == 1
    assert {"cpu", "cores", "python", "torch"} <= body["machine"].keys()
    assert body["settings"]["model"] == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "prepared", "profiles"]
    left = [one for one in psutil.process_iter() if str(tmp_path) in " ".join(_environ(one))]
    assert left == []


def _environ(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except psutil.Error:
        return []


@pytest.mark.system
@pytest.mark.apart
@pytest.mark.timeout(120)
def test_bench_engine_measures_everything(tmp_path: Path) -> None:
    """`bench engine --json -` prints every metric it promises, with ratios that follow from its figures."""
    make_tiny(tmp_path / "models" / "tiny", context=1024)
    sizes = ("--batch", "1,3", "--prompt-len", "20", "--output-len", "6", "--threads", "1")
    short = ("--rounds", "1", "--starts", "1", "--compare", "async", "--compare", "speculation")
    done = _bench(tmp_path, "engine", "--model", "tiny", *sizes, *short, "--json", "-")
    assert done.returncode == 0, done.stderr
    body = orjson.loads(done.stdout)
    metrics = body["metrics"]
    for name in ("decode_tps_1", "decode_tps_3", "prefill_tps", "prefill_tps_512", "start_s"):
        assert metrics[name] > 0
    for name in ("gemm_int8_tops", "gemm_fp32_tflops", "read_bandwidth_gb_s", "read_cached_ratio"):
        assert metrics[name] > 0
    assert "gemm_bf16_tflops" not in metrics
    assert metrics["prefill_tps"] == metrics["prefill_tps_512"]
    limit = metrics["read_bandwidth_gb_s"] * 1000 / metrics["model_mb"]  # steps per second
    assert metrics["decode_roofline_1"] == pytest.approx(metrics["decode_tps_1"] / limit, rel=0.01)
    assert metrics["exec_to_first_token_s"] > metrics["start_s"] > metrics["load_s"]
    assert metrics["memory_peak_mib"] >= metrics["memory_anonymous_mib"] > 0
    for switch in ("async", "speculation"):
        rates = [metrics[f"{switch}_{how}_decode_tps_3"] for how in ("on", "off")]
        assert metrics[f"{switch}_ratio_3"] == pytest.approx(rates[0] / rates[1], rel=0.01)
    for step in ("decode_1", "decode_3", "prefill_20", "prefill_512"):
        shares = [
            value
            for name, value in metrics.items()
            if name.startswith(f"profile_{step}_") and name.endswith("_share")
        ]
        assert sum(shares) == pytest.approx(1, abs=0.001)
    assert body["settings"]["batches"] == [1, 3]
    assert body["bars"].keys() == {"decode_roofline_1", "prefill_roofline", "start_s"}


def test_bench_engine_refuses_what_the_model_has_no_room_for(tmp_path: Path) -> None:
    """Batch sizes that are no numbers and lengths beyond the context are told before anything is measured."""
    make_tiny(tmp_path / "models" / "tiny", context=256)
    wrong = _bench(tmp_path, "engine", "--model", "tiny", "--batch", "1,zero")
    assert wrong.returncode == 2
    assert "1,zero" in wrong.stderr
    long = _bench(tmp_path, "engine", "--model", "tiny", "--prompt-len", "250")
    assert long.returncode == 1
    assert "context of 256" in long.stderr


def test_bench_serve_says_when_nobody_answers(tmp_path: Path) -> None:
    """Without a server the report counts the failures, and the command fails with the reason."""
    url = "http://127.0.0.1:9"  # discard: nobody listens
    done = _bench(
        tmp_path, "serve", "--url", url, "--num", "2", "--num-warmups", "0", "--json", "-"
    )
    assert done.returncode == 1
    assert orjson.loads(done.stdout)["metrics"]["failed_no_answer"] == 2
    assert "Cannot connect" in done.stderr


def test_bench_serve_takes_goodput_as_vllm_does(tmp_path: Path) -> None:
    """`--goodput ttft:500 tpot:50` are two limits; a limit that makes no sense is refused with the reason."""
    arguments = ("serve", "--url", "http://127.0.0.1:9", "--num", "1", "--num-warmups", "0")
    done = _bench(tmp_path, *arguments, "--json", "-", "--goodput", "ttft:500", "tpot:50")
    goals = orjson.loads(done.stdout)["settings"]["goals"]
    assert goals == [
        {"measure": "ttft", "limit_ms": 500.0},
        {"measure": "tpot", "limit_ms": 50.0},
    ]
    refused = _bench(tmp_path, *arguments, "--goodput", "speed:1")
    assert refused.returncode == 2
    assert "speed:1" in refused.stderr
