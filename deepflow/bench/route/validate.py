"""`bench route --validate`: the simulator against the platform itself, on one small trace and this machine.

The engine's steps are measured, the trace is replayed on real TEs, and then in the simulator with the measured profile
and the very same prompts, at the granularity of real pages. What the simulator is good for depends on how near it
comes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.bare import EngineSettings
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.others import Others
from deepflow.bench.processes import CpuTimes
from deepflow.bench.progress import step
from deepflow.bench.report import Bar, Report
from deepflow.bench.sample import Sample
from deepflow.bench.stack import Stack
from deepflow.replay.live import Sent, Shot, send, times_s
from deepflow.replay.prompts import Prompts
from deepflow.sim.calibration import measure
from deepflow.sim.cluster import simulate
from deepflow.sim.report import Result
from deepflow.sim.scenario import Scenario
from deepflow.sim.trace import Call, Shape, conversations
from services.worker.flowserve.config import ModelConfig
from shared.blockhash import chain
from shared.catalog import ModelFolder
from shared.errors import Internal

_PAGE: Final = 16  # tokens, of the CPU's KV
_VOCABULARY: Final = 32_000  # of larger ones as much
_WARM_LEN: Final = 1000  # as in the trace
_MAX_OTHERS: Final = 0.1  # cores
_BUSY: Final = (
    "others used this machine meanwhile (others_cores): what was measured on it says little"
)
BARS: Final = tuple(
    Bar(f"{measure_}_{kind}_error", "<=", 0.2, f"{text}, {kind}: simulated / real, off by")
    for measure_, text in (("ttft", "TTFT"), ("jct", "JCT"))
    for kind in ("mean", "p99")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatePlan:
    """Sizes. The trace is generated; its lengths shrink as `prompts` says."""

    num: int = 80
    num_tes: int = 2
    num_rounds: int = 2  # of the real replay, with other tokens each
    num_calibrations: int = 2  # rounds of measured steps
    shape: Shape = field(
        default_factory=lambda: Shape(
            rate=1.3, first=2500, turn=1000, spread=0.7, num_turns=3.0, think_s=8.0, output=250, max_prompt=12_000
        )
    )  # fmt: skip
    block: int = 64
    max_output: int = 128
    kv_tokens: int = 24_576


QUICK: Final = ValidatePlan(
    num=6,
    num_rounds=1,
    num_calibrations=1,
    shape=Shape(rate=8.0, first=600, turn=600, num_turns=2.0, think_s=0.5, output=60),
    block=32,
    max_output=8,
    kv_tokens=8192,
)


async def bench_validate(
    model: ModelFolder, cache_dir: Path, plan: ValidatePlan, seed: int, progress: Progress
) -> Report:
    """Calibrate, replay, simulate, compare. Raises DeepFlowError if something does not start or a request fails."""
    described = machine.describe("torch", "aiohttp", "nats-py")
    config = ModelConfig.from_folder(model.path)
    settings = EngineSettings.default(kv_tokens=plan.kv_tokens)
    threads = max(1, settings.threads // plan.num_tes)
    profile = await measure(
        model,
        cache_dir,
        progress,
        threads=threads,
        num_rounds=plan.num_calibrations,
        num_engines=plan.num_tes,
        seed=seed,
    )
    profile = profile.with_(kv_tokens=plan.kv_tokens, page=_PAGE)
    calls = conversations(plan.num, seed, plan.shape)
    others = Others()
    real: list[Sample] = []
    simulated: list[Result] = []
    variables = settings.variables() | {
        "DEEPFLOW_THREADS": str(threads),
        "DEEPFLOW_ARENA_BYTES": "off",  # what a host shares among its TEs is not simulated
        "DEEPFLOW_SCHEDULER_SEED": str(seed),
        "DEEPFLOW_GRACE_S": "5",
    }
    async with (
        Stack.start(model.name, cache_dir, variables, num_workers=plan.num_tes) as stack,
        Client.open(stack.url, model.name) as client,
    ):
        for number in range(plan.num_rounds):
            prompts = Prompts(
                block=plan.block,
                context=config.context,
                max_output=plan.max_output,
                vocabulary=min(config.vocab, _VOCABULARY),
                seed=seed * plan.num_rounds + number,
            )
            shots = [Shot(prompts.prompt(call), prompts.output_len(call)) for call in calls]
            with step(progress, f"real, round {number + 1}", plan.num) as advance:
                await _warm(client, plan.num_tes, prompts)
                with others.watched(lambda: _ours_s(stack)):
                    sent = await send(client, shots, times_s(calls, 1.0), advance)
            real += _checked(sent)
            scenario = Scenario.of(plan.num_tes, profile, seed=seed + number)
            simulated.append(simulate(paged(calls, shots), replace(scenario, page=_PAGE)))
            await stack.wait_idle()
    return Report(
        bench="route --validate",
        metrics=_metrics(real, simulated) | {"others_cores": others.cores},
        machine=described,
        settings={"model": model.name, "seed": seed, "threads": threads, **asdict(plan)},
        bars=BARS,
        notes=[
            "errors are |simulated / real - 1|, over the requests of all rounds",
            *([_BUSY] if others.cores > _MAX_OTHERS else []),
        ],
    )


def paged(calls: Sequence[Call], shots: Sequence[Shot]) -> list[Call]:
    """The trace that was really sent: lengths in tokens of the prompts, an id per page in place of one per block."""
    names: dict[bytes, int] = {}
    made: list[Call] = []
    for call, shot in zip(calls, shots, strict=True):
        hashes = chain(b"", shot.prompt, _PAGE)
        ids = [names.setdefault(one, len(names)) for one in hashes]
        if len(shot.prompt) % _PAGE:
            ids.append(-1 - len(made))  # a page that is not full is nobody else's
        made.append(
            replace(
                call,
                input_length=len(shot.prompt),
                output_length=shot.output_len,
                hash_ids=tuple(ids),
            )
        )
    return made


def _ours_s(stack: Stack) -> float:
    """Processor time of the platform and of this process."""
    return sum(stack.cpu_times().since(CpuTimes()).values()) + time.process_time()


async def _warm(client: Client, num_tes: int, prompts: Prompts) -> None:
    """A few requests to each TE, so that none has its first ones timed."""
    calls = [Call(0.0, _WARM_LEN, _WARM_LEN, (-1 - number,)) for number in range(2 * num_tes)]
    shots = [Shot(prompts.prompt(call), prompts.output_len(call)) for call in calls]
    _checked(await send(client, shots, [0.0] * len(shots), lambda: None))


def _checked(sent: Sent) -> list[Sample]:
    for sample in sent.samples:
        if not sample.ok:
            raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
    return sent.samples


def _metrics(real: Sequence[Sample], simulated: Sequence[Result]) -> dict[str, float]:
    """Both sides' figures, and how far off the simulated ones are."""
    requests = [one for result in simulated for one in result.requests]
    pairs = {
        "ttft": (
            [sample.ttft_s for sample in real],
            [one.ttft_s for one in requests if one.ttft_s is not None],
        ),
        "jct": ([sample.e2el_s for sample in real], [one.jct_s for one in requests]),
    }
    found: dict[str, float] = {}
    for name, sides in pairs.items():
        means, tails = [fmean(side) for side in sides], [percentile(side, 99) for side in sides]
        for kind, (truth, guess) in (("mean", means), ("p99", tails)):
            found[f"{name}_{kind}_error"] = abs(guess / truth - 1)
            found[f"real_{name}_{kind}_s"] = truth
            found[f"simulated_{name}_{kind}_s"] = guess
        for percent in (50, 90):
            for side, values in zip(("real", "simulated"), sides, strict=True):
                found[f"{side}_{name}_p{percent}_s"] = percentile(values, percent)
    prompts = sum(sample.prompt_tokens for sample in real)
    found["real_hit_share"] = sum(sample.cached_tokens for sample in real) / prompts
    asked = sum(one.prompt_tokens for one in requests)
    found["simulated_hit_share"] = sum(one.cached_tokens for one in requests) / asked
    return found
