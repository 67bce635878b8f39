"""How much `bench bus` measures, and the bars it measures against. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deepflow.bench.report import Bar
from deepflow.bench.sample import Goal

BARS: Final = (
    Bar("throughput_ratio_1", ">=", 0.97, "tokens/s, HTTP + bus / bare engine, 1 stream"),
    Bar("throughput_ratio_32", ">=", 0.90, "tokens/s, HTTP + bus / bare engine, 32 streams"),
    Bar("added_ttft_p50_ms", "<=", 3.0, "added time to first token, idle, p50, ms"),
    Bar(
        "cancel_over_step_p99_ms",
        "<=",
        5.0,
        "client leaves -> blocks free, beyond one step, p99, ms",
    ),
    Bar("overload_goodput_ratio", ">=", 0.9, "goodput at 5x the peak rate / at peak"),
    Bar("idle_cpu_percent", "<", 3.0, "idle platform, % of one core"),
    Bar(
        "failover_pause_p99_ms", "<=", 3000.0, "kill -9 of a TE, longest pause of a stream, p99, ms"
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes. Lengths are tokens, `_s` seconds. A slow machine stops counting when a part's budget is used up."""

    throughput_budget_s: float = 120.0
    first_token_budget_s: float = 20.0
    cancel_budget_s: float = 25.0
    prompt_len: int = 32
    output_len_1: int = 128
    output_len_32: int = 64
    num_streams: int = 32
    num_rounds: int = 5
    num_first_tokens: int = 40
    num_cancels: int = 40
    idle_s: float = 10.0
    peak_s: float = 12.0
    ramp_s: float = 4.0
    overload_output_len: tuple[int, int] = (8, 24)
    overload_factor: float = 5.0
    # Per request: what somebody who waits before a small machine under heavy load may still call an answer.
    goals: tuple[Goal, ...] = (Goal("ttft", 10_000.0), Goal("tpot", 1_000.0))
    num_kills: int = 4
    num_kill_streams: int = 4
    kill_output_len: int = 96


QUICK: Final = Plan(
    output_len_1=8,
    output_len_32=4,
    num_streams=32,
    num_rounds=1,
    num_first_tokens=3,
    num_cancels=3,
    idle_s=1.0,
    peak_s=2.0,
    ramp_s=0.5,
    overload_output_len=(2, 6),
    num_kills=1,
    num_kill_streams=2,
    kill_output_len=1500,  # still under way when a TE is killed, however small the model
)
