"""A trace sent to a server of the OpenAI API: open loop, every request at its time whatever became of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich.progress import Progress

from deepflow.bench import load, machine
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.progress import step
from deepflow.bench.report import Report
from deepflow.bench.sample import Goal, Sample, figures
from deepflow.replay.prompts import Prompts, num_reusable
from deepflow.sim.trace import Call

_PAGE: Final = 16  # tokens of KV that the ideal counts in; the smallest page of any device


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a trace is sent, and how fast: at `speed` 2, in half of its own time."""

    url: str
    model: str
    speed: float = 1.0
    timeout_s: float = 600.0
    goals: tuple[Goal, ...] = ()
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Shot:
    """A line of the trace, made ready to be sent."""

    prompt: Sequence[int]
    output_len: int


@dataclass(slots=True)
class Sent:
    """What was sent and what came back, in order of end. `late_s`: behind its time, each request as it was sent."""

    samples: list[Sample] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)

    @property
    def hit_share(self) -> float:
        """Prompt tokens that the server had already computed, by its own word."""
        whole = [sample for sample in self.samples if sample.ok]
        asked = sum(sample.prompt_tokens for sample in whole)
        return sum(sample.cached_tokens for sample in whole) / max(asked, 1)


async def replay_live(
    calls: Sequence[Call], name: str, target: Target, prompts: Prompts, progress: Progress
) -> Report:
    """Send the whole trace; failed requests are part of the report, never raised. `name` is what a person calls it."""
    described = machine.describe("aiohttp")
    shots = [Shot(prompts.prompt(call), prompts.output_len(call)) for call in calls]
    async with Client.open(
        target.url, target.model, api_key=target.api_key, timeout_s=target.timeout_s
    ) as client:
        with step(progress, f"replaying {name}", len(calls)) as advance:
            sent = await send(client, shots, times_s(calls, target.speed), advance)
    ideal = hit_share_ideal(shots)
    metrics = figures(sent.samples, target.goals) | {
        "hit_share": sent.hit_share,
        "hit_share_ideal": ideal,
        "hit_vs_ideal": sent.hit_share / ideal if ideal else 1.0,
        "late_p99_ms": 1000 * percentile(sent.late_s, 99),
    }
    notes = sorted({sample.error for sample in sent.samples if sample.error})[:5]
    if num_cut := sum(map(prompts.is_cut, calls)):
        notes.append(f"{num_cut} prompts were cut to fit a context of {prompts.context} tokens")
    return Report(
        bench="replay",
        metrics=metrics,
        machine=described,
        settings={"trace": name, **_shown(target), **asdict(prompts)},
        notes=notes,
    )


async def send(
    client: Client, shots: Sequence[Shot], at_s: Sequence[float], advance: Callable[[], None]
) -> Sent:
    """Every shot at its time after now; `advance` is called at the end of each."""
    sent = Sent()
    start_s = time.perf_counter()
    due_s = {id(shot): start_s + after_s for shot, after_s in zip(shots, at_s, strict=True)}

    async def one(shot: Shot) -> Sample:
        sent.late_s.append(max(time.perf_counter() - due_s[id(shot)], 0.0))
        return await client.complete(shot.prompt, shot.output_len)

    sent.samples = await load.scheduled(one, shots, at_s, done=lambda _: advance())
    return sent


def hit_share_ideal(shots: Sequence[Shot]) -> float:
    """What `Sent.hit_share` would be of one cache without bounds, were each request over before the next."""
    asked = sum(len(shot.prompt) for shot in shots)
    return num_reusable([shot.prompt for shot in shots], _PAGE) / max(asked, 1)


def times_s(calls: Sequence[Call], speed: float) -> list[float]:
    """When each is due, the first at once."""
    first_ms = calls[0].timestamp_ms
    return [(call.timestamp_ms - first_ms) / 1000 / speed for call in calls]


def _shown(target: Target) -> dict[str, Any]:
    """The settings without the key."""
    shown = asdict(target)
    del shown["api_key"]
    return shown
