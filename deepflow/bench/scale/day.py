"""`bench scale --day`: three models on one host, each asked for in waves with nothing in between, a day in minutes.

Nobody tells the platform what is to come. What it paid, in seconds of TEs, is held to an oracle that knows every
arrival: it has a TE up whenever one is needed, pays each start, and keeps one through a gap that is shorter than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import orjson
from rich.progress import Progress

from deepflow.bench import machine, workload
from deepflow.bench.client import Client
from deepflow.bench.distribution import summary
from deepflow.bench.progress import step
from deepflow.bench.report import Report
from deepflow.bench.sample import Sample
from deepflow.bench.scale.fleet import FleetWatch
from deepflow.bench.scale.plan import DAY_BARS, DayPlan
from deepflow.bench.stack import Stack
from shared import catalog, subjects
from shared.catalog import ModelFolder
from shared.scaling_messages import PodBeat

_NAMES: Final = ("morning", "noon", "evening")
_REST_S: Final = 10.0  # after the last answer, for the last TE to go


@dataclass(frozen=True, slots=True, kw_only=True)
class DayReport(Report):
    """With what a picture needs: by model, (seconds into the day, TEs) at each change, and when requests came."""

    tes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    arrivals: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request of the day: when it was sent, seconds into the day, and what came."""

    at_s: float
    sample: Sample


def day(plan: DayPlan, number: int, rng: Random) -> list[float]:
    """When model `number` of three is asked for, seconds into the day: a burst opens each wave, which swells and
    ebbs."""
    wave_s = plan.day_s * plan.wave_share / plan.num_waves
    found: list[float] = []
    for wave in range(plan.num_waves):
        begin = (wave + number / len(_NAMES)) * plan.day_s / plan.num_waves
        found += [begin] * plan.burst
        at = rng.expovariate(plan.rate)
        while at < wave_s:  # thinned: the rate is a half sine
            if rng.random() < math.sin(math.pi * at / wave_s):
                found.append(begin + at)
            at += rng.expovariate(plan.rate)
    return sorted(found)


def oracle_te_seconds(
    spans: Sequence[tuple[float, float]], *, keep_up: int, start_s: float
) -> float:
    """The least TE-seconds that would have had a TE up for every `keep_up` of the requests in work.

    `spans` are (begin, end) of each request as it would be served without waiting for a TE.
    """
    edges = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    spells: dict[int, list[list[float]]] = defaultdict(list)  # of the first TE, of the second ...
    in_work = 0
    for at, change in edges:
        before = math.ceil(in_work / keep_up)
        in_work += change
        after = math.ceil(in_work / keep_up)
        for place in range(before, after):
            if not spells[place] or at - spells[place][-1][1] > start_s:
                spells[place].append([at, at])
        for place in range(after, before):
            spells[place][-1][1] = at
    return sum(end - begin + start_s for many in spells.values() for begin, end in many)


class TeClock:
    """How many TEs of each model there were, and the seconds that they were there; fed by beats of pod hosts."""

    def __init__(self, models: Sequence[str], now: float) -> None:
        self._began = now
        self.te_seconds = dict.fromkeys(models, 0.0)
        self.changes: dict[str, list[tuple[float, int]]] = {model: [(0.0, 0)] for model in models}
        self._now = now

    def heard(self, beat: PodBeat, now: float) -> None:
        """Until now it was as last said; from now on as `beat` says. For one pod host."""
        self.pass_to(now)
        for model, changes in self.changes.items():
            num = sum(te.model == model for te in beat.tes)
            if num != changes[-1][1]:
                changes.append((now - self._began, num))

    def pass_to(self, now: float) -> None:
        """The time up to `now` has passed."""
        for model, changes in self.changes.items():
            self.te_seconds[model] += changes[-1][1] * (now - self._now)
        self._now = now


async def bench_day(
    model: ModelFolder, cache_dir: Path, plan: DayPlan, seed: int, progress: Progress
) -> DayReport:
    """Live through the day. Raises DeepFlowError if the platform does not start."""
    described = machine.describe("torch", "aiohttp", "nats-py")
    arrivals = {name: day(plan, n, Random(f"{seed}:{n}")) for n, name in enumerate(_NAMES)}
    variables = {
        "DEEPFLOW_KV_TOKENS": str(plan.kv_tokens),
        "DEEPFLOW_MAX_NUM_SEQS": str(plan.num_slots),
        "DEEPFLOW_GRACE_S": "5",
    }
    with named(model, cache_dir) as cache:
        async with Stack.start(
            _NAMES[0], cache, variables, num_workers=0, max_workers=plan.max_tes,
            more_models=_NAMES[1:],
        ) as stack:  # fmt: skip
            watch = await FleetWatch.open(stack)
            total = sum(map(len, arrivals.values()))
            with step(progress, "a day of three models", total) as advance:
                answered, clock = await _live(stack, watch, arrivals, plan, seed, advance)
            starts_s = [start.total_s for start in watch.starts.values()]
    start_s = sum(starts_s) / len(starts_s) if starts_s else 0.0
    metrics = count([one.sample for many in answered.values() for one in many])
    oracle_s = sum(
        oracle_te_seconds(_spans(many), keep_up=plan.keep_up, start_s=start_s)
        for many in answered.values()
    )
    paid_s = sum(clock.te_seconds.values())
    metrics |= {
        "day_te_seconds": paid_s,
        "day_te_seconds_oracle": oracle_s,
        "day_te_seconds_vs_oracle": paid_s / oracle_s if oracle_s else 0.0,
        "day_te_seconds_one_each": len(_NAMES) * plan.day_s,
        "day_num_starts": len(starts_s),
        "day_start_mean_s": start_s,
        "day_most_tes": max(num for changes in clock.changes.values() for _, num in changes),
    }
    return DayReport(
        bench="scale --day",
        metrics=metrics,
        machine=described,
        settings={"model": model.name, "seed": seed, **asdict(plan)},
        bars=DAY_BARS,
        notes=[
            "The three models are one model under three names: weights are alike, TEs are not shared.",
            f"The oracle knows all arrivals, has a TE for every {plan.keep_up} requests in work, and pays each start.",
        ],
        tes=clock.changes,
        arrivals=arrivals,
    )


async def _live(
    stack: Stack,
    watch: FleetWatch,
    arrivals: dict[str, list[float]],
    plan: DayPlan,
    seed: int,
    advance: Callable[[], None],
) -> tuple[dict[str, list[Answered]], TeClock]:
    answered: dict[str, list[Answered]] = {name: [] for name in arrivals}
    prompts = workload.random_prompts(Random(seed), plan.prompt_len)
    began = time.perf_counter()
    clock = TeClock(tuple(arrivals), began)
    watch.on_pod = lambda beat: clock.heard(beat, time.perf_counter())

    async def ask(client: Client, at_s: float, prompt: str) -> None:
        await asyncio.sleep(began + at_s - time.perf_counter())
        sample = await client.complete(prompt, plan.output_len)
        answered[client.model].append(Answered(at_s, sample))
        advance()

    async with contextlib.AsyncExitStack() as open_, asyncio.TaskGroup() as tasks:
        for name, times in arrivals.items():
            client = await open_.enter_async_context(Client.open(stack.url, name, timeout_s=120))
            for at_s in times:
                tasks.create_task(ask(client, at_s, next(prompts)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):  # what is still up after the last answer is paid for
            while any(watch.num_up(name) for name in arrivals):
                await watch.pause(1.0)
    clock.pass_to(time.perf_counter())
    return answered, clock


def count(samples: Sequence[Sample]) -> dict[str, float]:
    """How they were answered. A 503 that tells when to come back is what is documented; any other 5xx is not."""
    told = [one for one in samples if one.status == 503 and one.retry_after_s >= 0]
    server = [one for one in samples if one.status >= 500]
    good = [one for one in samples if one.ok]
    return {
        "day_num_requests": len(samples),
        "day_num_ok": len(good),
        "day_num_404": sum(one.status == 404 for one in samples),
        "day_num_429": sum(one.status == 429 for one in samples),
        "day_num_503": len(told),
        "day_num_5xx": len(server) - len(told),
        "day_num_broken": sum(not one.ok and one.status in (0, 200) for one in samples),
        **summary("day_ttft", "s", [one.ttft_s for one in good]),
    }


def _spans(answered: Sequence[Answered]) -> list[tuple[float, float]]:
    """When each request would have been in work, had it not had to wait for a TE."""
    good = [one for one in answered if one.sample.ok]
    if not good:
        return []
    first_s = min(one.sample.ttft_s for one in good)
    return [(one.at_s, one.at_s + first_s + one.sample.e2el_s - one.sample.ttft_s) for one in good]


@contextlib.contextmanager
def named(model: ModelFolder, cache_dir: Path) -> Iterator[Path]:
    """A cache that holds one model under three names, its weights prepared for all of them."""
    with tempfile.TemporaryDirectory(prefix="deepflow-day-") as folder:
        cache = Path(folder)
        (cache / "prepared").symlink_to(cache_dir / "prepared")
        for name in _NAMES:
            place = catalog.models_dir(cache) / subjects.encode(name)
            place.mkdir(parents=True)
            for source in model.path.iterdir():
                if source.name != catalog.MANIFEST:
                    (place / source.name).symlink_to(source)
            manifest = orjson.loads((model.path / catalog.MANIFEST).read_bytes())
            (place / catalog.MANIFEST).write_bytes(orjson.dumps(manifest | {"name": name}))
        yield cache
