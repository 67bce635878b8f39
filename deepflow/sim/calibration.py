"""From measured runs of an engine to its `Profile`: least squares over the steps that each run consisted of.

The runs are those of `deepflow bench engine`: batches that decode, prompts alone. `measure` makes some that tell the
parts of a step apart; a report of the bench does as well, as far as its points go.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, TypeAlias

import numpy as np
import orjson
from rich.progress import Progress

from deepflow.bench.engine.drive import budget
from deepflow.bench.engine.plan import START_PROMPT_LEN, prompts
from deepflow.bench.engine.runner import Runner, RunnerSettings
from deepflow.bench.progress import step
from deepflow.sim.profile import PRESETS, SMOLLM2_CPU, Profile, pairs
from services.worker.flowserve.config import ModelConfig
from services.worker.settings import num_cores
from shared.catalog import ModelFolder
from shared.errors import InvalidRequest

_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
_PREFILLS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_LONG_BATCHES: Final = (1, 8)  # that decode on a long context too
_SHORT: Final = 64  # tokens of context
_LONG: Final = 1024
_STEPS: Final = 8  # of a decode run
_SPARE_TOKENS: Final = 64
_PULL: Final = (
    0.02  # towards the profile that is taken where the runs say nothing, in relative errors
)

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What some steps took together. `rows` counts them by the number of their rows."""

    seconds: float
    rows: Mapping[int, int]
    num_tokens: int = 0  # sampled
    prefill_pairs: float = 0.0
    decode_pairs: float = 0.0

    @classmethod
    def of_decode(cls, batch: int, context: float, step_s: float) -> Run:
        """One step of `batch` sequences of `context` positions each."""
        return cls(seconds=step_s, rows={batch: 1}, num_tokens=batch, decode_pairs=batch * context)

    @classmethod
    def of_prefill(cls, length: int, rows: int, seconds: float) -> Run:
        """A prompt alone, in chunks of `rows`."""
        num_whole, rest = divmod(length, rows)
        counted = Counter({rows: num_whole, rest: 1 if rest else 0})
        return cls(seconds=seconds, rows=+counted, num_tokens=1, prefill_pairs=pairs(0, length))


@dataclass(slots=True)
class _Rounds:
    """Seconds by what was run: (batch, context) and length."""

    decodes: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    prefills: dict[int, list[float]] = field(default_factory=dict)

    def runs(self, rows: int) -> list[Run]:
        """The best round of each: what disturbs a measurement only ever makes it longer."""
        decodes = [
            Run.of_decode(batch, context + _STEPS / 2, min(rounds))
            for (batch, context), rounds in self.decodes.items()
        ]
        return decodes + [
            Run.of_prefill(length, rows, min(rounds)) for length, rounds in self.prefills.items()
        ]


def fit(runs: Sequence[Run], like: Profile, **changes: Any) -> Profile:
    """The profile under which the runs' relative errors are least; what they do not tell is as in `like`.

    Raises InvalidRequest where there are no runs.
    """
    if not runs:
        raise InvalidRequest("no measured run to take a profile from")
    knots = sorted({rows for run in runs for rows in run.rows})
    # Unknown: the time of each number of rows, of a token, of a pair of each kind; counted in what `like` says of them
    # on a machine as much slower as its predictions are too short.
    slower = statistics.median(1.0 / (1.0 + error) for error in errors(like, runs))
    units = slower * np.array(
        [*map(like.rows_s, knots), like.token_s, like.prefill_pair_s, like.decode_pair_s]
    )
    counts = np.array(
        [
            [
                *(run.rows.get(k, 0) for k in knots),
                run.num_tokens,
                run.prefill_pairs,
                run.decode_pairs,
            ]
            for run in runs
        ],
        dtype=float,
    )
    shares = counts * units / np.array([run.seconds for run in runs])[:, None]
    pulled = np.vstack([shares, _PULL * np.eye(len(units))])
    wanted = np.concatenate([np.ones(len(runs)), np.full(len(units), _PULL)])
    found = _non_negative(pulled, wanted) * units
    times = np.maximum.accumulate(found[: len(knots)])
    token_s, prefill_pair_s, decode_pair_s = map(float, found[len(knots) :])
    return like.with_(
        rows=tuple(zip(knots, map(float, times), strict=True)),
        token_s=token_s,
        prefill_pair_s=prefill_pair_s,
        decode_pair_s=decode_pair_s,
        **changes,
    )


def errors(profile: Profile, runs: Sequence[Run]) -> list[float]:
    """Of each run, predicted / measured - 1."""
    return [_predicted(profile, run) / run.seconds - 1.0 for run in runs]


async def measure(
    model: ModelFolder,
    cache_dir: Path,
    progress: Progress,
    *,
    threads: int = 0,
    num_rounds: int = 3,
    num_engines: int = 1,
    seed: int = 0,
) -> Profile:
    """The profile of an engine in a process of its own on this machine, as the platform starts it, but with so many
    threads (0: one per core).

    Of several engines all do the same at the same time: what they share (memory, caches, clock) makes each of them
    slower. Raises Unavailable if one does not start or fails.
    """
    config = ModelConfig.from_folder(model.path)
    settings = _settings(threads)
    rows = settings.max_batched_tokens
    streams = itertools.count()

    def texts(length: int) -> list[list[int]]:
        rng = Random(f"{seed}/{next(streams)}")
        return list(itertools.islice(prompts(rng, config.vocab, length, repetitive=False), 64))

    batches = [batch for batch in _BATCHES if batch <= settings.max_num_seqs]
    decodes = [(batch, _SHORT) for batch in batches]
    decodes += [(b, _LONG) for b in _LONG_BATCHES if b in batches and config.context > 2 * _LONG]
    lengths = [length for length in _PREFILLS if length < config.context]
    longest = max(b * (context + 2 * _LONG) for b, context in decodes)
    settings = replace(settings, kv_tokens=max(longest, max(lengths) + _SPARE_TOKENS))
    rounds = _Rounds()
    total = num_rounds * (len(decodes) + len(lengths))
    async with AsyncExitStack() as stack:
        first = texts(START_PROMPT_LEN)[0]
        runners = [
            await stack.enter_async_context(Runner.start(model.path, cache_dir, settings, first))
            for _ in range(num_engines)
        ]
        with step(progress, "steps of all sizes", total) as advance:
            for _ in range(num_rounds):
                for batch, context in decodes:
                    room = budget(batch, context, _STEPS, rows, settings.speculation)
                    runs = await asyncio.gather(
                        *(one.decode(texts(context)[:batch], _STEPS, room) for one in runners)
                    )
                    taken = rounds.decodes.setdefault((batch, context), [])
                    taken.append(fmean(statistics.median(run.steps_s) for run in runs))
                    advance()
                for length in lengths:
                    prefills = await asyncio.gather(
                        *(one.prefill(texts(length)[0]) for one in runners)
                    )
                    seconds = fmean(prefill.seconds for prefill in prefills)
                    rounds.prefills.setdefault(length, []).append(seconds)
                    advance()
    return fit(
        rounds.runs(rows),
        SMOLLM2_CPU,
        name=f"{model.name} on this machine",
        max_batched_tokens=rows,
        max_num_seqs=settings.max_num_seqs,
    )


def of_bench(body: Mapping[str, Any]) -> Profile:
    """The profile that a report of `deepflow bench engine --json` tells. Raises InvalidRequest for another thing."""
    metrics, settings = body.get("metrics"), body.get("settings")
    if (
        body.get("bench") != "engine"
        or not isinstance(metrics, dict)
        or not isinstance(settings, dict)
    ):
        raise InvalidRequest("not a report of `deepflow bench engine --json`", param="bench")
    try:
        rows, context = (
            settings["max_batched_tokens"],
            settings["prompt_len"] + settings["output_len"] / 2,
        )
        lengths, batches = settings["prefill_lengths"], settings["batches"]
        runs = [Run.of_decode(b, context, b / metrics[f"decode_tps_{b}"]) for b in batches]
        runs += [Run.of_prefill(n, rows, n / metrics[f"prefill_tps_{n}"]) for n in lengths]
        return fit(
            runs,
            SMOLLM2_CPU,
            name=str(settings["model"]),
            max_batched_tokens=rows,
            max_num_seqs=settings["max_num_seqs"],
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InvalidRequest(f"a report of the engine's bench that lacks {error}") from error


def open_profile(text: str) -> Profile:
    """A preset's name, or a file: a profile, or a report of `deepflow bench engine`. Raises InvalidRequest."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        raw = Path(text).read_bytes()
        body = orjson.loads(raw)
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"no profile {text!r}: a file, or one of {', '.join(PRESETS)}"
        ) from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise InvalidRequest(f"{text}: {error}") from error
    if isinstance(body, dict) and "bench" in body:
        return of_bench(body)
    return Profile.from_json(raw)


# ------------------------------------------------------------------------------------------------------- the arithmetic


def _non_negative(matrix: Vector, wanted: Vector) -> Vector:
    """Least squares with no negative unknown: the most negative one is held at 0, until there is none."""
    free = list(range(matrix.shape[1]))
    found = np.zeros(matrix.shape[1])
    while free:
        part, *_ = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)
        if part.min() >= 0.0:
            found[free] = part
            break
        del free[int(part.argmin())]
    return found


def _predicted(profile: Profile, run: Run) -> float:
    layers = sum(number * profile.rows_s(rows) for rows, number in run.rows.items())
    attention = (
        profile.prefill_pair_s * run.prefill_pairs + profile.decode_pair_s * run.decode_pairs
    )
    return layers + profile.token_s * run.num_tokens + attention


def _settings(threads: int) -> RunnerSettings:
    """Of an engine like a TE's."""
    return RunnerSettings(
        dtype="auto",
        device="auto",
        threads=threads or num_cores(),
        kernels="auto",
        asynchronous=False,
        speculation=0,
        max_num_seqs=64,
        max_batched_tokens=256,
        kv_tokens=0,
    )
