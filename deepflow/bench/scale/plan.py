"""What `bench scale` measures, how often, and the bars it measures against. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from deepflow.bench.report import Bar

PARTS: Final = ("up", "zero", "cold", "relay", "peers")
PEERS: Final = ("vllm", "llamacpp", "openvino")
BARS: Final = (
    Bar("to_64_s", "<=", 5.0, "1 -> 64 TEs, each has streamed a first token, s"),
    Bar("extra_te_mb", "<=", 40.0, "memory of one TE more (PSS, weights shared), MB"),
    Bar("zero_to_first_token_s", "<=", 0.5, "no TE -> first token, warm pod, weights in DRAM, s"),
    Bar("zero_to_first_token_no_zygote_s", "<=", 4.0, "the same without zygote, s"),
    Bar("zero_to_first_token_torch_s", "<=", 4.0, "the same, with torch to import, s"),
    Bar("cold_up_s", "<=", 8.0, "cold `deepflow up` -> first token, s"),
    Bar("relay_32_vs_1", "<=", 2.0, "weights to 32 targets / to one"),
)
DAY_BARS: Final = (
    Bar("day_num_404", "<=", 0.0, "404s for a model that sleeps"),
    Bar("day_num_5xx", "<=", 0.0, "5xx beyond the 503 with Retry-After"),
    Bar("day_num_broken", "<=", 0.0, "answers that broke off"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which a TE may come up from none: the paper's optimisations, on or off.

    `settings` are `DEEPFLOW_*` variables; with `cold` the weights are not in the page cache.
    """

    name: str
    text: str
    settings: Mapping[str, str] = field(default_factory=dict)
    cold: bool = False


_NO_POD: Final = {"DEEPFLOW_ZYGOTE": "0", "DEEPFLOW_WARM_TES": "0"}
_POD: Final = {"DEEPFLOW_WARM_TES": "0"}
_WARM: Final = {"DEEPFLOW_WARM_TES": "1"}
_NO_PRELOAD: Final = {"DEEPFLOW_PRELOAD_BYTES": "0"}
WAYS: Final = (
    Way(name="exec_miss", text="none", settings=_NO_POD | _NO_PRELOAD, cold=True),
    Way(name="exec_hit", text="DRAM hit", settings=_NO_POD),
    Way(
        name="exec_torch", text="DRAM hit, torch", settings=_NO_POD | {"DEEPFLOW_KERNELS": "torch"}
    ),
    Way(name="fork_miss", text="pre-warmed pod", settings=_POD | _NO_PRELOAD, cold=True),
    Way(name="fork_hit", text="pre-warmed pod, DRAM hit", settings=_POD),
    Way(name="warm_miss", text="pre-warmed TE", settings=_WARM | _NO_PRELOAD, cold=True),
    Way(name="warm_hit", text="pre-warmed TE, DRAM hit", settings=_WARM),
)
# The ways that have a bar: by metric.
JUDGED: Final = {
    "zero_to_first_token_s": "warm_hit",
    "zero_to_first_token_no_zygote_s": "exec_hit",
    "zero_to_first_token_torch_s": "exec_torch",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayPlan:
    """Weights from one running TE to others. Lengths are tokens."""

    num_targets: int = 32
    link_bytes_s: float = 12.5e6  # out of each node: 100 Mbit/s. Faster ones outrun the processors that play all nodes
    num_rounds: int = 2  # to one and to all; the median counts
    num_forks: int = 5  # to one alone, and beside the source's own work; the median counts
    kv_tokens: int = 4096
    prompt_len: int = 256
    num_prefills: int = 10  # in one round
    batch: int = 8  # sequences that decode
    output_len: int = 96

    @property
    def num_steps(self) -> int:
        """What is shown of its progress."""
        return 2 * self.num_rounds + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes. Lengths are about tokens, `_s` seconds."""

    to: int = 64
    num_rounds: int = 3  # of the climb to `to`; the smaller ones are made once
    prompt_len: int = 32
    output_len: int = 8
    kv_tokens: int = 2048  # per TE
    num_slots: int = 4  # sequences that one TE runs at once
    num_zeros: int = 3  # of each way; the median counts
    ways: tuple[Way, ...] = WAYS
    num_cold: int = 3  # `deepflow up`s; the median counts
    relay: RelayPlan = RelayPlan()
    peers: tuple[str, ...] = PEERS

    def steps(self) -> list[int]:
        """To how many TEs it goes, each time from one."""
        return sorted({num for num in (2, 8, 32) if num < self.to} | {self.to})

    def variables(self) -> dict[str, str]:
        """The platform's settings."""
        return {
            "DEEPFLOW_KV_TOKENS": str(self.kv_tokens),
            "DEEPFLOW_MAX_NUM_SEQS": str(self.num_slots),
            "DEEPFLOW_GRACE_S": "5",
            # A TE among 32 on a core may take longer to answer than a JE waits for one that has a core.
            "DEEPFLOW_TASK_TIMEOUT_S": "5",
        }


QUICK_RELAY: Final = RelayPlan(
    num_targets=3,
    num_rounds=1,
    num_forks=1,
    prompt_len=16,
    num_prefills=1,
    batch=2,
    output_len=2,
    link_bytes_s=1e9,
)
QUICK: Final = Plan(
    to=3, num_rounds=1, prompt_len=8, output_len=2, kv_tokens=512, num_zeros=1,
    ways=WAYS[-1:], num_cold=1, relay=QUICK_RELAY, peers=(),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DayPlan:
    """A day of three models, compressed. Each has waves with nothing between them, at its own hours."""

    day_s: float = 180.0
    num_waves: int = 4  # of each model
    wave_share: float = 0.4  # of the day that a model is asked for at all
    rate: float = 1.2  # requests per second at the height of a wave
    burst: int = 6  # requests that open a wave at once
    prompt_len: int = 64
    output_len: int = 32
    max_tes: int = 4  # of each model
    kv_tokens: int = 4096
    num_slots: int = 8
    keep_up: int = 4  # sequences on one TE beyond which an oracle would have another


QUICK_DAY: Final = DayPlan(
    day_s=8.0, num_waves=1, rate=2.0, burst=2, prompt_len=8, output_len=2, max_tes=2, kv_tokens=512
)
