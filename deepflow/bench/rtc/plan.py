"""How much `bench rtc` measures, and the bars it measures against. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from deepflow.bench.report import Bar

BARS: Final = (
    Bar("hash_4096_ms", "<=", 0.4, "hash of 4,096 tokens, ms"),
    Bar("match_4096_ms", "<=", 0.1, "match of them in a full index, ms"),
    Bar("append_us", "<=", 1.0, "append, amortised per token, us"),
    Bar("populate_vs_memcpy", ">=", 0.5, "populate of 4,096 tokens / memcpy"),
    Bar("shm_vs_memcpy", ">=", 0.7, "DistFlow over shared memory / memcpy"),
    Bar("tcp_vs_socket", ">=", 0.7, "DistFlow over TCP loopback / raw sockets"),
    Bar("directory_vs_budget", "<=", 1.0, "memory of the directory / its budget, 1M pages offered"),
)
PROMPT_LEN: Final = 4096
# SmolLM2-135M: what a page weighs where no model is at hand.
MODEL: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes. `page` is in tokens."""

    page: int = 16
    num_blocks: int = 300_000
    num_inserts: int = 1_000_000
    num_matches: int = 300
    match_lens: tuple[int, ...] = (256, 1024, 4096, 16_384)  # tokens
    num_rounds: int = 9  # of what is compared in turns; the median counts
    transfer_bytes: int = 128 << 20
    num_small: int = 300  # transfers of one page
    num_directory_pages: int = 1_000_000
    directory_bytes: int = 64 << 20


QUICK: Final = Plan(
    num_blocks=3000,
    num_inserts=10_000,
    num_matches=20,
    match_lens=(256, 4096),
    num_rounds=2,
    transfer_bytes=4 << 20,
    num_small=5,
    num_directory_pages=20_000,
    directory_bytes=1 << 20,
)
