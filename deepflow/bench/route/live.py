"""`bench route --live`: the platform's own policy against another, on real TEs of this machine, in one run.

Users hold conversations of several turns, all under one system prompt; each turn is sent when its user has read the
answer before. The same conversations are held under each policy, each time on a platform of its own, in turning order,
so that what else the machine does hits both.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine, workload
from deepflow.bench.client import Client, Endpoint
from deepflow.bench.distribution import summary
from deepflow.bench.progress import step
from deepflow.bench.report import Bar, Report
from deepflow.bench.sample import Sample, tokens_per_s
from deepflow.bench.stack import Stack
from shared.catalog import ModelFolder
from shared.errors import Internal

OURS: Final = "deepflow"
BARS: Final = (
    Bar("live_ttft_ratio", ">=", 1.0, "TTFT of later turns, other policy / ours, mean"),
    Bar("live_throughput_ratio", ">=", 1.0, "output tokens/s, ours / other policy"),
    Bar("live_same_text_share", ">=", 1.0, "answers that are the same under both"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """Sizes. Lengths are about tokens, `_s` seconds."""

    num_tes: int = 4
    num_rounds: int = 2  # of both policies
    num_users: int = 16
    num_turns: int = 5
    system_len: int = 256
    turn_len: int = 128
    output_len: int = 32
    read_s: float = 1.0  # mean time from an answer to the next turn
    stagger_s: float = 0.5  # mean time from one user's beginning to the next
    kv_tokens: int = 24_576  # per TE


QUICK: Final = LivePlan(
    num_tes=2, num_rounds=1, num_users=3, num_turns=2, system_len=64, turn_len=16, output_len=4,
    read_s=0.05, stagger_s=0.05, kv_tokens=4096,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class User:
    """What one user will say, and how long they wait before each turn, seconds after the last answer."""

    turns: Sequence[str]
    waits_s: Sequence[float]


@dataclass(slots=True)
class _Leg:
    """What one policy brought in all rounds: samples by user and turn."""

    answers: list[list[list[Sample]]]  # per round, per user, per turn

    @property
    def samples(self) -> list[Sample]:
        return [sample for answers in self.answers for turns in answers for sample in turns]

    @property
    def later(self) -> list[Sample]:
        """All but first turns: where there is something to be found."""
        return [sample for answers in self.answers for turns in answers for sample in turns[1:]]

    def figures(self, policy: str) -> dict[str, float]:
        rates = [_rate(answers) for answers in self.answers]
        asked = sum(sample.prompt_tokens for sample in self.samples)
        found = {
            "live_tokens_per_s": statistics.fmean(rates),
            "live_hit_share": sum(sample.cached_tokens for sample in self.samples) / asked,
        }
        found |= summary("live_ttft", "ms", [1000 * sample.ttft_s for sample in self.samples])
        found |= summary("live_later_ttft", "ms", [1000 * sample.ttft_s for sample in self.later])
        found |= summary("live_tpot", "ms", [1000 * sample.tpot_s for sample in self.samples])
        return {f"{name}.{policy}": value for name, value in found.items()}


async def bench_live(
    model: ModelFolder,
    cache_dir: Path,
    plan: LivePlan,
    other: str,
    seed: int,
    progress: Progress,
    *,
    shared_tier: bool = True,
) -> Report:
    """Ours against `other`, named as in DEEPFLOW_POLICY.

    Without `shared_tier` there is no arena, so that the TEs are as far from each other as on hosts of their own. Raises
    DeepFlowError if something does not start or a request fails.
    """
    described = machine.describe("torch", "aiohttp", "nats-py")
    settings = {
        "DEEPFLOW_KV_TOKENS": str(plan.kv_tokens),
        "DEEPFLOW_SCHEDULER_SEED": str(seed),
        "DEEPFLOW_GRACE_S": "5",
        **({} if shared_tier else {"DEEPFLOW_ARENA_BYTES": "off"}),
    }
    legs: dict[str, _Leg] = defaultdict(lambda: _Leg([]))
    for number in range(plan.num_rounds):
        talks = users(plan, Random(f"{seed}:{number}"))
        for policy in (OURS, other) if number % 2 == 0 else (other, OURS):
            title = f"round {number + 1}, {policy}"
            with step(progress, title, plan.num_users * plan.num_turns) as advance:
                variables = settings | {"DEEPFLOW_POLICY": policy}
                async with Stack.start(
                    model.name, cache_dir, variables, num_workers=plan.num_tes
                ) as stack:
                    answers = await _converse(stack.url, model.name, talks, plan, advance)
            legs[policy].answers.append(answers)
    return Report(
        bench="route --live",
        metrics=_compare(legs[OURS], legs[other])
        | legs[OURS].figures(OURS)
        | legs[other].figures(other),
        machine=described,
        settings={
            "model": model.name,
            "other": other,
            "seed": seed,
            "shared_tier": shared_tier,
            **asdict(plan),
        },
        bars=BARS,
        notes=["ratios are the mean over rounds; a round's policies hold the same conversations"],
    )


def users(plan: LivePlan, rng: Random) -> list[User]:
    """All that will be said; the system prompt opens every conversation."""
    system = workload.words(rng, plan.system_len)
    begin_s, talks = 0.0, []
    for _ in range(plan.num_users):
        waits_s = [begin_s] + [rng.expovariate(1 / plan.read_s) for _ in range(plan.num_turns - 1)]
        turns = [system] + [workload.words(rng, plan.turn_len) for _ in range(plan.num_turns)]
        talks.append(User(turns, waits_s))
        begin_s += rng.expovariate(1 / plan.stagger_s)
    return talks


async def _converse(
    url: str, model: str, talks: Sequence[User], plan: LivePlan, advance: Callable[[], None]
) -> list[list[Sample]]:
    """Per user, the samples of all turns. Raises Internal if a request fails."""
    async with Client.open(url, model, endpoint=Endpoint.CHAT) as client:

        async def hold(user: User) -> list[Sample]:
            system, *turns = user.turns
            said = [{"role": "system", "content": system}]
            samples = []
            for turn, wait_s in zip(turns, user.waits_s, strict=True):
                await asyncio.sleep(wait_s)
                said.append({"role": "user", "content": turn})
                sample = await client.complete(said, plan.output_len)
                if not sample.ok:
                    raise Internal(
                        f"a request of the bench failed: {sample.status}, {sample.error!r}"
                    )
                said.append({"role": "assistant", "content": sample.text})
                samples.append(sample)
                advance()
            return samples

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(hold(user)) for user in talks]
        return [task.result() for task in running]


def _compare(ours: _Leg, other: _Leg) -> dict[str, float]:
    """Round by round: neighbours in time are compared with each other only."""
    ttfts, rates = [], []
    for mine, theirs in zip(ours.answers, other.answers, strict=True):
        ttfts.append(_later_ttft_s(theirs) / _later_ttft_s(mine))
        rates.append(_rate(mine) / _rate(theirs))
    pairs = list(zip(ours.samples, other.samples, strict=True))
    return {
        "live_ttft_ratio": statistics.fmean(ttfts),
        "live_ttft_ratio_worst": min(ttfts),
        "live_throughput_ratio": statistics.fmean(rates),
        "live_throughput_ratio_worst": min(rates),
        "live_same_text_share": sum(a.text == b.text for a, b in pairs) / len(pairs),
    }


def _later_ttft_s(answers: Sequence[Sequence[Sample]]) -> float:
    return statistics.fmean(sample.ttft_s for turns in answers for sample in turns[1:])


def _rate(answers: Sequence[Sequence[Sample]]) -> float:
    return tokens_per_s([sample for turns in answers for sample in turns])
