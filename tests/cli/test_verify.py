"""`deepflow verify`: it passes where it should, and what it compares with is sharp enough to fail where it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepflow.verify import models
from deepflow.verify.answerer import Answerer
from deepflow.verify.compare import TOLERANCES, compare
from deepflow.verify.replay import Blocks, Trace, choose, replay
from deepflow.verify.report import Outcome, Verification
from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Decoder

ROOT = Path(__file__).parents[2]
PROMPTS = [[5], list(range(1, 40)), list(range(100, 230))]  # the last is longer than any window


def load(folder: Path, dtype: str = "fp32") -> Decoder:
    """The torch decoder on the CPU."""
    return load_decoder(
        folder, dtype=dtype, device="cpu", kernels="torch", cache_dir=folder / "cache"
    )


def reference(folder: Path) -> list[Trace]:
    """What the model of a folder chooses after PROMPTS."""
    decoder = load(folder)
    pool = Blocks(decoder, 16, 300, len(PROMPTS))
    return [choose(decoder, pool, prompt, 8) for prompt in PROMPTS]


def replayed(decoder: Decoder, traces: list[Trace]) -> list[Any]:
    """The traces on another decoder, all together."""
    return replay(decoder, Blocks(decoder, 16, 400, len(traces)), traces, chunk=20)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_each_family_is_one_that_is_served(tmp_path: Path, family: str) -> None:
    """Its config is read, its weights are there and are numbers of bfloat16, and a seed gives them again."""
    folder = models.write(tmp_path / "one", models.describe(family))
    ModelConfig.from_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    assert not any((tensor.view(np.uint32) & 0xFFFF).any() for tensor in tensors.values())
    again = models.write(tmp_path / "two", models.describe(family))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_the_same_model_counts_as_the_same(tmp_path: Path, family: str, dtype: str) -> None:
    """In every arithmetic, and however it is batched."""
    folder = models.write(tmp_path / family, models.describe(family))
    traces = reference(folder)
    difference = compare(traces, replayed(load(folder, dtype), traces), dtype, routed=False)
    assert difference.faults == ()
    assert difference.numbers["num_tokens"] == 8 * len(PROMPTS)


def rolled_router(tensors: dict[str, Any]) -> None:
    """Every token goes to the neighbours of its experts."""
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name] = np.roll(tensors[name], 1, axis=0)


def swapped_heads(tensors: dict[str, Any]) -> None:
    """The two key heads change places."""
    for name in tensors:
        if name.endswith("k_proj.weight"):
            tensors[name] = np.roll(tensors[name], len(tensors[name]) // 2, axis=0)


def lost_bias(tensors: dict[str, Any]) -> None:
    """The queries have no bias."""
    for name in tensors:
        if name.endswith("q_proj.bias"):
            tensors[name] = np.zeros_like(tensors[name])


@pytest.mark.parametrize(
    ("family", "change", "overrides"),
    [
        ("mistral", None, {"sliding_window": 44}),  # a window that is a few tokens short
        ("llama", None, {"rope_theta": 12000.0}),
        ("llama", swapped_heads, {}),
        ("qwen2", lost_bias, {}),
        ("qwen3_moe", rolled_router, {}),
        ("qwen3_moe", None, {"norm_topk_prob": False}),
    ],
)
def test_a_model_that_is_computed_wrongly_is_found_out(
    tmp_path: Path, family: str, change: Any, overrides: dict[str, Any]
) -> None:
    """The faults that a device's operators invite are outside the tolerance of bfloat16."""
    traces = reference(models.write(tmp_path / "right", models.describe(family)))
    wrong = models.write(tmp_path / "wrong", models.describe(family, **overrides))
    if change is not None:
        tensors = load_file(wrong / "model.safetensors")
        change(tensors)
        save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    difference = compare(
        traces, replayed(load(wrong, "bf16"), traces), "bf16", routed=family.endswith("moe")
    )
    assert difference.faults


def test_logits_that_are_no_numbers_are_a_fault(tmp_path: Path) -> None:
    """An operator that leaves rows unwritten cannot pass by comparisons that are all false."""
    traces = [Trace([1], [2], np.zeros((1, 8), np.float32))]
    difference = compare(traces, [np.full((1, 8), np.nan, np.float32)], "bf16", routed=False)
    assert difference.faults == ("logits that are no numbers",)


async def test_a_process_that_dies_or_hangs_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next question gets a new one."""
    monkeypatch.chdir(ROOT)
    async with Answerer("tests.cli.answers", within_s=3.0) as asked:
        first = await asked.ask({"do": "answer"})
        assert first["state"] == "passed"
        assert "ended" in (await asked.ask({"do": "die"}))["reason"]
        assert "no answer within" in (await asked.ask({"do": "hang"}))["reason"]
        last = await asked.ask({"do": "answer"})
        assert last["state"] == "passed"
        assert last["pid"] != first["pid"]


@pytest.mark.parametrize(
    ("states", "passed"),
    [
        (["passed", "skipped"], True),
        (["passed", "failed"], False),
        (["skipped", "skipped"], False),  # nothing was shown
        ([], False),
    ],
)
def test_a_verification_passes_only_if_something_was_shown(states: list[str], passed: bool) -> None:
    """One failure is enough to fail, and skipping everything is no success."""
    outcomes = [Outcome(check="x", state=state, seconds=0.0) for state in states]
    found = Verification(device="cpu", started="", machine={}, findings=[], outcomes=outcomes)
    assert found.passed is passed
    assert json.loads(found.json())["passed"] is passed


def command(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`deepflow verify` in a home of its own."""
    return subprocess.run(
        [sys.executable, "-m", "deepflow.cli.main", "verify", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "DEEPFLOW_HOME": str(home)},
    )  # fmt: skip


@pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="there is an NPU here")
def test_a_refusal_leaves_no_report(tmp_path: Path) -> None:
    """Nothing that somebody could take for one: what is missing is said instead."""
    report = tmp_path / "report.json"
    done = command("--device", "npu", "--json", str(report), home=tmp_path)
    assert done.returncode == 1
    assert "CANN" in done.stderr
    assert not report.exists()


@pytest.mark.service  # a process for each check; beside others, because they run one after the other
@pytest.mark.timeout(240)
def test_the_cpu_passes(tmp_path: Path) -> None:
    """Every check that makes sense on it, in one command, and a report that says on what it was found."""
    report = tmp_path / "report.json"
    done = command("--device", "cpu", "--quick", "--json", str(report), home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_bytes())
    states = {check["check"]: check["state"] for check in found["checks"]}
    assert found["passed"] is True
    assert [name for name, state in states.items() if state != "passed"] == ["graphs"]
    assert {"devices", "collectives", "send and receive", "bench engine"} <= set(states)
    for dtype in ("fp32", "bf16", "w8a8", "fp32 tp2", "fp32 pp2"):
        assert states[f"parity llama {dtype}"] == states[f"parity qwen3_moe {dtype}"] == "passed"
    assert found["machine"]["torch"].startswith("2.")
    assert found["machine"]["deepflow"]
    assert all(check["seconds"] >= 0 for check in found["checks"])
    bench = next(check for check in found["checks"] if check["check"] == "bench engine")
    assert bench["details"]["decode_tps_1"] > 0
