"""From runs to figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepflow.bench.engine import figures
from deepflow.bench.engine.drive import DecodeRun, PrefillRun
from deepflow.bench.engine.figures import Runs
from deepflow.bench.engine.profile import split_of
from deepflow.bench.engine.runner import Started
from deepflow.bench.engine.table import EngineReport
from deepflow.bench.engine.work import Work
from deepflow.bench.limits import Limits
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.prepared import open_prepared
from tests.worker.tiny import make_tiny

LIMITS = Limits(
    threads=2,
    buffer_bytes=1 << 27,
    read_bytes_per_s=20e9,
    read_cached_bytes_per_s=80e9,
    gemm_int8=1e12,
    gemm_fp32=2e11,
    gemm_bf16=0.0,
)
SPLIT = {"linears": 0.6, "attention": 0.2, "glue": 0.1, "sampling": 0.05, "python": 0.05}


def _decode(batch: int, seconds: float, num_steps: int = 10) -> DecodeRun:
    return DecodeRun(
        seconds=seconds,
        num_tokens=batch * num_steps,
        steps_s=[seconds / num_steps] * num_steps,
        tokens=[batch] * num_steps,
        num_guessed=0,
        num_right=0,
        split={part: share * seconds for part, share in SPLIT.items()},
    )


def _runs() -> Runs:
    runs = Runs()
    runs.decodes[1] += [_decode(1, 0.1), _decode(1, 0.2), _decode(1, 0.4)]
    runs.decodes[8] += [_decode(8, 0.4)]
    for length, seconds in ((128, 1.0), (512, 0.5), (2048, 4.0)):
        split = {part: share * seconds for part, share in SPLIT.items()}
        runs.prefills[length] += [PrefillRun(seconds=seconds, num_tokens=length, split=split)]
    return runs


def test_a_rate_is_the_median_round_with_the_worst_beside_it() -> None:
    """Tokens per second of the median round, of the worst, and milliseconds per token of a sequence."""
    found = figures.speed(_runs())
    assert found["decode_tps_1"] == pytest.approx(50)
    assert found["decode_tps_1_min"] == pytest.approx(25)
    assert found["tpot_1_p50_ms"] == pytest.approx(20)
    assert found["decode_tps_8"] == pytest.approx(200)
    assert found["tpot_8_mean_ms"] == pytest.approx(40)


def test_prefill_is_judged_by_the_slower_of_the_lengths_of_the_bar() -> None:
    """`prefill_tps` is that of 512 or 2,048 tokens, whichever is slower, and never of a shorter prompt."""
    runs = _runs()
    assert figures.speed(runs)["prefill_tps"] == pytest.approx(512)
    ratios = figures.rooflines(runs, Work(10_000, 100), LIMITS, "w8a8")
    assert ratios["prefill_roofline"] == ratios["prefill_roofline_2048"]
    del runs.prefills[512], runs.prefills[2048]
    assert figures.speed(runs)["prefill_tps"] == pytest.approx(128)


def test_rooflines_are_the_figures_over_the_limits() -> None:
    """Decode over bandwidth / bytes of a step; operations of a prompt, the head for its last token only, over peak."""
    work = Work(num_layer_weights=100_000_000, num_head_weights=28_000_000)
    found = figures.rooflines(_runs(), work, LIMITS, "w8a8")
    assert found["model_mb"] == pytest.approx(136)
    assert found["decode_roofline_1"] == pytest.approx(50 / (20e9 / 136e6))
    operations = 2 * (100_000_000 * 512 + 28_000_000)
    assert found["prefill_roofline_512"] == pytest.approx(operations / 0.5 / 1e12)
    in_fp32 = figures.rooflines(_runs(), work, LIMITS, "fp32")
    assert in_fp32["decode_roofline_1"] == pytest.approx(50 / (20e9 / 512e6))
    assert in_fp32["prefill_roofline_512"] == pytest.approx(operations / 0.5 / 2e11)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen3_moe", {"num_experts_per_tok": 8, "mlp_only_layers": [1]}),
    ],
)
def test_bytes_of_a_step_are_those_of_the_prepared_weights(
    tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    """The arithmetic agrees with the file that is mapped, where no size has to be padded and every expert is chosen."""
    shape = {"num_attention_heads": 2, "head_dim": 32}
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False, **shape, **keys)
    prepared = open_prepared(folder, tmp_path)
    work = Work.of(ModelConfig.from_folder(folder))
    assert work.bytes_per_step("w8a8") == prepared.num_bytes


def test_a_row_reads_the_experts_that_it_chose() -> None:
    """Three of eight experts and the shared one, in the layers that have them."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": 1000,
        "max_position_embeddings": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 7,
        "mlp_only_layers": [0],
    }
    work = Work.of(ModelConfig.from_dict(shape | config))
    assert work.num_layer_weights == 2 * 4 * 64 * 64 + 3 * 64 * (1000 + 3 * 10 + 7)


def test_a_split_makes_up_the_whole() -> None:
    """What the decoder does not tell apart is glue or, if it tells nothing, `decoder`; the rest is Python."""
    spent = {
        "decoder": 0.8,
        "sampling": 0.1,
        "decoder.linears": 0.4,
        "decoder.head": 0.1,
        "decoder.attention": 0.2,
        "decoder.norms": 0.05,
    }
    split = split_of(1.0, spent)
    assert split == pytest.approx(
        {"linears": 0.5, "attention": 0.2, "glue": 0.1, "sampling": 0.1, "python": 0.1}
    )
    silent = split_of(1.0, {"decoder": 0.8, "sampling": 0.1})
    assert silent == pytest.approx({"decoder": 0.8, "sampling": 0.1, "python": 0.1})


def test_splits_are_per_step_and_per_prompt() -> None:
    """Milliseconds of one decode step, of one prompt, and shares that add up to one."""
    found = figures.splits(_runs())
    assert found["profile_decode_8_linears_ms"] == pytest.approx(0.6 * 40)
    assert found["profile_prefill_512_attention_ms"] == pytest.approx(0.2 * 500)
    shares = [found[f"profile_decode_1_{part}_share"] for part in SPLIT]
    assert sum(shares) == pytest.approx(1)


def test_a_switch_is_judged_by_on_over_off() -> None:
    """The ratio of the median rates; and how many guesses were right, where any were made."""
    on, off = Runs(), Runs()
    on.decodes[1] += [_decode(1, 0.1)]
    off.decodes[1] += [_decode(1, 0.2)]
    found = figures.compared("async", on, off)
    assert found["async_ratio_1"] == pytest.approx(2)
    assert found["async_on_decode_tps_1"] == pytest.approx(100)
    assert "async_right_share_1" not in found


def test_starts_are_medians_and_any_torch_is_told() -> None:
    """One start that imports torch is enough to be named."""

    def started(start_s: float, torch: bool) -> Started:
        return Started(
            exec_s=start_s + 1,
            start_s=start_s,
            load_s=start_s / 2,
            description="",
            imported_torch=torch,
        )

    found = figures.starts([started(0.1, False), started(0.5, True), started(0.2, False)])
    assert found["start_s"] == 0.2
    assert found["start_max_s"] == 0.5
    assert found["exec_to_first_token_s"] == pytest.approx(1.2)
    assert found["torch_imported"] == 1


def test_people_see_a_line_per_batch_with_its_parts() -> None:
    """Tables have decode and prefill by size, and where the time went; the rest is listed."""
    runs = _runs()
    metrics = figures.speed(runs) | figures.splits(runs)
    metrics |= figures.rooflines(runs, Work(10_000, 100), LIMITS, "w8a8")
    report = EngineReport(
        bench="engine",
        metrics=metrics,
        machine={"cores": 2},
        settings={"batches": (1, 8), "prefill_lengths": (128, 512, 2048)},
    )
    screen = io.StringIO()
    report.write("", Console(file=screen, width=80))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert ["8", "200", "200", "40", "40"] in lines
    assert next(line for line in lines if line[:2] == ["decode", "8"])[2:4] == ["24", "60%"]
    assert next(line for line in lines if line[:2] == ["prefill", "512"])[-2:] == ["25", "5%"]
    assert ["gemm_int8_tops", "1"] in lines
    assert not any(line[:1] == ["decode_tps_8"] for line in lines)


def test_the_higher_of_two_limits_counts() -> None:
    """A disturbance makes a limit look lower, and a ratio to it better than it is."""
    slower = Limits(
        threads=2,
        buffer_bytes=1 << 27,
        read_bytes_per_s=10e9,
        read_cached_bytes_per_s=90e9,
        gemm_int8=9e11,
        gemm_fp32=3e11,
        gemm_bf16=0.0,
    )
    best = LIMITS.best(slower)
    assert (best.read_bytes_per_s, best.gemm_int8) == (20e9, 1e12)
    assert (best.read_cached_bytes_per_s, best.gemm_fp32) == (90e9, 3e11)
