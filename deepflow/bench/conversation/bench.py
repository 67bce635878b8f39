"""A long conversation whose TE dies: how soon does its next turn begin elsewhere, against computing it again?

Tenant `alice` holds a conversation of thousands of tokens; the TE that served it is killed; she goes on, at another TE
of the same host, or of another host. Tenant `bob` then asks the very same, whose pages are not hers: that is computed
again, on the same TE, and its answer must be the same, token for token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepflow.bench import machine
from deepflow.bench.client import Client
from deepflow.bench.conversation.hosts import Cluster
from deepflow.bench.report import Bar, Report
from deepflow.bench.sample import Sample
from shared.catalog import ModelFolder
from shared.errors import Internal
from shared.text.tokenizer import Tokenizer

PROSE: Final = Path(__file__).parents[1] / "prose" / "debian-handbook.txt"
BARS: Final = (
    Bar("one_host_ttft_ratio", ">=", 5.0, "one host: recompute / continued, TTFT"),
    Bar("two_hosts_ttft_ratio", ">=", 1.0, "two hosts: recompute / continued, TTFT"),
    Bar("same_text_share", ">=", 1.0, "answers that are the same, token for token"),
)
_KEYS: Final = {"DEEPFLOW_API_KEYS": "alice:key-a,bob:key-b,operator:key-o"}
_SETTLE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`num_tokens` of conversation, an answer of `output_len` tokens per turn, `rounds` of each kind."""

    num_tokens: int = 6000
    output_len: int = 16
    rounds: int = 3


async def bench_conversation(
    folder: ModelFolder, cache_dir: Path, plan: Plan, advance: Callable[[], None]
) -> Report:
    """Both kinds, one after the other; `advance` is called after each round. Raises Internal, Unavailable."""
    model = folder.name
    tokenizer = Tokenizer.load(folder.path)
    metrics: dict[str, float] = {}
    num_same = num = 0
    for name, num_hosts in (("one_host", 1), ("two_hosts", 2)):
        continued, again = [], []
        for turn in range(plan.rounds):
            async with Cluster.start(
                model,
                cache_dir,
                _KEYS | {"DEEPFLOW_ARENA_BYTES": str(1 << 30)},
                num_hosts=num_hosts,
                num_workers=2 if num_hosts == 1 else 1,
            ) as cluster:
                kept, computed = await _round(cluster, model, tokenizer, plan, turn)
            continued.append(kept)
            again.append(computed)
            num += 1
            num_same += kept.text == computed.text
            advance()
        metrics |= {
            f"{name}_continued_ttft_ms": 1000 * _median([s.ttft_s for s in continued]),
            f"{name}_recomputed_ttft_ms": 1000 * _median([s.ttft_s for s in again]),
            f"{name}_ttft_ratio": min(
                a.ttft_s / c.ttft_s for a, c in zip(again, continued, strict=True)
            ),
            f"{name}_cached_share": min(s.cached_tokens / s.prompt_tokens for s in continued),
        }
    metrics["same_text_share"] = num_same / num
    return Report(
        bench="conversation",
        metrics=metrics,
        machine=machine.describe("torch", "nats-py"),
        settings={"model": model, "num_tokens": plan.num_tokens, "rounds": plan.rounds},
        bars=BARS,
        notes=["ratios and shares are the worst of the rounds, times the median"],
    )


async def _round(
    cluster: Cluster, model: str, tokenizer: Tokenizer, plan: Plan, turn: int
) -> tuple[Sample, Sample]:
    """The second turn, continued by alice and computed again for bob."""
    prose = PROSE.read_text()
    ids = tokenizer.encode(prose[turn * 2000 :][: plan.num_tokens * 8])[: plan.num_tokens]
    first = tokenizer.decode(ids)
    async with (
        Client.open(cluster.url, model, api_key="key-a") as alice,
        Client.open(cluster.url, model, api_key="key-b") as bob,
    ):
        opening = _checked(await alice.complete(first, plan.output_len))
        await asyncio.sleep(_SETTLE_S)  # the next beat tells whose cache has grown
        await cluster.kill_server()
        second = first + opening.text + "\nAnd what does that mean in practice?\n"
        kept = _checked(await alice.complete(second, plan.output_len))
        computed = _checked(await bob.complete(second, plan.output_len))
    return kept, computed


def _checked(sample: Sample) -> Sample:
    if not sample.ok:
        raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
    return sample


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
