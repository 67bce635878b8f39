"""`bench route --throughput`: what a Job Executor can place per second on one core, by number of TEs and prompt length.

The parts that ship, without a bus: a request's bytes are decoded, the type of TE and the TE are chosen, the books are
kept, and the task is encoded; beside that what keeps the JE's view fresh, block events and beats. Half of the prompts
are new but for a system prompt that every TE holds, half are the next turn of a conversation that some TEs hold. All
times are processor time of this thread, so what else the machine does counts but for the caches it takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random
from typing import Final

from rich.progress import Progress
from rich.table import Table

from deepflow.bench import machine
from deepflow.bench.distribution import percentile
from deepflow.bench.report import Bar, Report, number
from services.scheduler.costs import Costs
from services.scheduler.heatmap import Heatmaps
from services.scheduler.lengths import Lengths
from services.scheduler.placer import Placer
from services.scheduler.policy.roster import DEFAULT, make
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from shared import wire
from shared.liveness import Liveness
from shared.messages import Request, Sampling, Task, TaskKind, TeBeat
from shared.rtc_messages import BlockEvents

BARS: Final = (
    Bar("placements_per_s.100.8192", ">=", 1000.0, "placements/s/core, 100 TEs, 8k-token prompts"),
)
_MODEL: Final = "model"
_BEAT_S: Final = 0.2
_VOCAB: Final = 49152
_DECISION: Final = ("split", "place", "books")
_PARTS: Final = ("decode", *_DECISION, "encode", "event", "beat")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputPlan:
    """Sizes; lengths in tokens."""

    num_tes: tuple[int, ...] = (10, 100, 1000)
    prompt_lens: tuple[int, ...] = (8192, 102_400)
    page: int = 16
    system_len: int = 1024
    turn_len: int = 512  # what a conversation grows by
    num_holders: int = 2  # TEs that hold a conversation
    num_conversations: int = 64
    num_tokens: int = 2_000_000  # in the prompts of one point, but at least 32 prompts


QUICK: Final = ThroughputPlan(
    num_tes=(10, 100), prompt_lens=(2048,), num_conversations=8, num_tokens=65_536
)


class ThroughputReport(Report):
    """One line for each number of TEs and each length."""

    def tables(self) -> list[Table]:
        """See `Report`."""
        points = [name.split(".", 1)[1] for name in self.metrics if name.startswith("place_us.")]
        names = [name.split(".", 1)[0] for name in self.metrics if name.endswith(f".{points[0]}")]
        heads = [" TEs, ".join(point.split(".")) for point in points]
        table = Table("tokens:", *heads, box=None)
        for name in names:
            table.add_row(name, *(number(self.metrics[f"{name}.{point}"]) for point in points))
        return [table]


def bench_throughput(plan: ThroughputPlan, seed: int, progress: Progress) -> Report:
    """Every number of TEs with every length of prompt."""
    points = [(num_tes, length) for length in plan.prompt_lens for num_tes in plan.num_tes]
    task = progress.add_task("placements", total=len(points))
    metrics: dict[str, float] = {}
    for num_tes, length in points:
        found = _Point(plan, num_tes, length, seed).run()
        metrics |= {f"{name}.{num_tes}.{length}": value for name, value in found.items()}
        progress.advance(task)
    return ThroughputReport(
        bench="route throughput",
        metrics=metrics,
        machine=machine.describe("msgpack"),
        settings=asdict(plan) | {"policy": DEFAULT, "seed": seed},
        bars=BARS if plan.page == 16 else (),
        notes=[
            "us are processor time; event: one request's pages announced; beat: one beat of one TE",
            "placements_per_s: split, place and books (which type, which TE, and what it was given)",
            "with_codec_per_s: and the bytes of request and task",
            "with_upkeep_per_s: and its events, and the beats of all TEs, five a second each",
        ],
    )


class _Point:
    """One number of TEs and one length of prompt."""

    def __init__(self, plan: ThroughputPlan, num_tes: int, length: int, seed: int) -> None:
        self._plan = plan
        self._length = length
        self._random = Random(seed)
        self._trees = PromptTrees()
        costs = Costs()
        self._registry = Registry(Liveness(), costs=costs, page=plan.page)
        self._placer = Placer(
            policy=make(DEFAULT),
            registry=self._registry,
            trees=self._trees,
            heatmaps=Heatmaps(),
            lengths=Lengths(),
            costs=costs,
            random=self._random,
        )
        self._now = 0.0
        self._tes = {f"te-{index}": 0 for index in range(num_tes)}  # name -> its last event
        self._times_s: dict[str, list[float]] = {name: [] for name in _PARTS}

    def run(self) -> dict[str, float]:
        """Sets a JE up, places what comes, and says what it took."""
        plan = self._plan
        self._beats()
        system = self._hashes(plan.system_len)
        for te in self._tes:
            self._trees.seen(te, _MODEL, "colocated")
            self._stored(te, system)
        held = [
            [*system, *self._hashes(self._length - plan.system_len - plan.turn_len)]
            for _ in range(plan.num_conversations)
        ]
        for chain in held:
            for te in self._random.sample(sorted(self._tes), plan.num_holders):
                self._stored(te, chain)
        for times in self._times_s.values():
            times.clear()  # all that was but setting up
        self._beats()
        for turn in range(max(32, plan.num_tokens // self._length)):
            past = held[turn % len(held)] if turn % 2 else system
            self._place(turn, [*past, *self._hashes(self._length - len(past) * plan.page)])
        self._trees.check()
        return self._figures()

    def _place(self, turn: int, hashes: list[bytes]) -> None:
        """One request, as a JE sees it from its arrival to its end."""
        request = Request(
            request=f"request-{turn}",
            attempt=1,
            client="gateway",
            model=_MODEL,
            tenant="local",
            prompt=[self._random.randrange(_VOCAB) for _ in range(self._length)],
            root=bytes(16),
            hashes=hashes,
            sampling=Sampling(max_tokens=512, seed=0),
            deadline_ms=60_000,
            park_ms=30_000,
        )
        raw = wire.encode(request)
        task = f"task-{turn}"
        with self._timed("decode"):
            request = wire.decode(raw, Request)
        with self._timed("split"):
            work = self._placer.work(request, TaskKind.GENERATE)
            self._placer.is_split(work, self._now)
        with self._timed("place"):
            work = self._placer.work(request, TaskKind.GENERATE)
            decision = self._placer.place(work, self._now)
            candidate = decision.shortlist()[0]
        with self._timed("encode"):
            message = Task(task=task, job=task, je="je", kind=TaskKind.GENERATE, request=request)
            wire.encode(message)
        with self._timed("books"):
            self._placer.asked(candidate, work, task, self._now)
            self._placer.accepted(candidate, work, task, self._now)
            decision.chosen = candidate.te
        self._stored(candidate.te, request.hashes[candidate.matched_pages :])
        self._now += 0.001
        if turn % 32 == 31:  # what the beats say by then is no longer in our books
            self._placer.ended(candidate.te, task)
            self._beats()

    def _beats(self) -> None:
        """Every TE beats."""
        self._now += _BEAT_S
        beats = [
            wire.encode(
                TeBeat(
                    id=te,
                    model=_MODEL,
                    pod="pod",
                    state="ready",
                    step=round(self._now * 100),
                    outstanding_s=self._random.random(),
                    running=8,
                    blocks_total=16_384,
                    prefill_us=100.0,
                    decode_us=1000.0,
                )
            )
            for te in self._tes
        ]
        for beat in beats:
            with self._timed("beat"):
                self._registry.beat(wire.decode(beat, TeBeat), self._now)

    def _stored(self, te: str, hashes: list[bytes]) -> None:
        """A TE says that it holds these pages."""
        self._tes[te] += 1
        raw = wire.encode(BlockEvents(te=te, model=_MODEL, seq=self._tes[te], stored=hashes))
        with self._timed("event"):
            self._trees.apply(wire.decode(raw, BlockEvents))

    def _hashes(self, num_tokens: int) -> list[bytes]:
        return [self._random.randbytes(16) for _ in range(num_tokens // self._plan.page)]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._times_s[name].append(time.thread_time() - began)

    def _figures(self) -> dict[str, float]:
        mean_s = {name: statistics.fmean(times) for name, times in self._times_s.items()}
        parts = (self._times_s[name] for name in _DECISION)
        decisions_s = [sum(each) for each in zip(*parts, strict=True)]
        decision_s = statistics.fmean(decisions_s)
        codec_s = mean_s["decode"] + decision_s + mean_s["encode"]
        left = max(0.0, 1.0 - mean_s["beat"] * len(self._tes) / _BEAT_S)
        return {
            "placements_per_s": 1.0 / decision_s,
            "with_codec_per_s": 1.0 / codec_s,
            "with_upkeep_per_s": left / (codec_s + mean_s["event"]),
            "decision_p99_us": 1e6 * percentile(decisions_s, 99),
            **{f"{name}_us": 1e6 * value for name, value in mean_s.items()},
            "tree_mb": self._trees.num_bytes / 1e6,
        }
