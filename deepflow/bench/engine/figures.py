"""From runs to figures: rates, percentiles, shares of the machine's limits, the split of a step. Pure.

A rate is the median of its rounds, and the worst round is given beside it.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepflow.bench.distribution import summary
from deepflow.bench.engine.drive import DecodeRun, PrefillRun
from deepflow.bench.engine.plan import PREFILL_LENGTHS
from deepflow.bench.engine.profile import Split
from deepflow.bench.engine.runner import Started
from deepflow.bench.engine.work import Work
from deepflow.bench.limits import Limits


@dataclass(frozen=True, slots=True)
class Runs:
    """What one engine did, round by round: by batch size, and by length of the prompt."""

    decodes: dict[int, list[DecodeRun]] = field(default_factory=lambda: defaultdict(list))
    prefills: dict[int, list[PrefillRun]] = field(default_factory=lambda: defaultdict(list))

    def decode_tps(self, batch: int) -> list[float]:
        """Tokens per second of each round."""
        return [run.num_tokens / run.seconds for run in self.decodes[batch]]

    def prefill_tps(self, length: int) -> list[float]:
        """Tokens of the prompt per second, of each round."""
        return [run.num_tokens / run.seconds for run in self.prefills[length]]


def speed(runs: Runs) -> dict[str, float]:
    """Decode by batch size, prefill by length, and `prefill_tps`: the slower of the lengths that the bars are about."""
    figures: dict[str, float] = {}
    for batch, decodes in runs.decodes.items():
        figures |= _rate(f"decode_tps_{batch}", runs.decode_tps(batch))
        per_token = [
            batch * seconds / tokens * 1000
            for run in decodes
            for seconds, tokens in zip(run.steps_s, run.tokens, strict=True)
            if tokens
        ]
        figures |= summary(f"tpot_{batch}", "ms", per_token)
    for length in runs.prefills:
        figures |= _rate(f"prefill_tps_{length}", runs.prefill_tps(length))
    length = slowest_prefill(runs)
    figures["prefill_tps"] = figures[f"prefill_tps_{length}"]
    return figures


def slowest_prefill(runs: Runs) -> int:
    """Of the lengths that the bars are about, the one with the lowest rate; of all, where none of those was run."""
    lengths = [length for length in runs.prefills if length in PREFILL_LENGTHS]
    return min(
        lengths or list(runs.prefills), key=lambda one: statistics.median(runs.prefill_tps(one))
    )


def rooflines(runs: Runs, work: Work, limits: Limits, dtype: str) -> dict[str, float]:
    """The limits, and how near decode at batch 1 and prefill came to them."""
    figures = limits.metrics() | {"model_mb": work.bytes_per_step(dtype) / 1e6}
    if 1 in runs.decodes:
        tokens_per_s = statistics.median(runs.decode_tps(1))
        figures["decode_roofline_1"] = work.decode_roofline(
            tokens_per_s, dtype, limits.read_bytes_per_s
        )
    for length in runs.prefills:
        seconds = length / statistics.median(runs.prefill_tps(length))
        figures[f"prefill_roofline_{length}"] = work.prefill_roofline(
            length, seconds, limits.gemm(dtype)
        )
    figures["prefill_roofline"] = figures[f"prefill_roofline_{slowest_prefill(runs)}"]
    return figures


def starts(started: Sequence[Started]) -> dict[str, float]:
    """Seconds to the first token, the median of some starts, and whether torch came along."""
    return {
        "start_s": statistics.median(one.start_s for one in started),
        "start_max_s": max(one.start_s for one in started),
        "load_s": statistics.median(one.load_s for one in started),
        "exec_to_first_token_s": statistics.median(one.exec_s for one in started),
        "torch_imported": float(any(one.imported_torch for one in started)),
    }


def compared(name: str, on: Runs, off: Runs) -> dict[str, float]:
    """The rates of a switch off and on, and on / off: above 1 it pays."""
    figures: dict[str, float] = {}
    for batch in on.decodes:
        with_it = statistics.median(on.decode_tps(batch))
        without = statistics.median(off.decode_tps(batch))
        figures[f"{name}_on_decode_tps_{batch}"] = with_it
        figures[f"{name}_off_decode_tps_{batch}"] = without
        figures[f"{name}_ratio_{batch}"] = with_it / without
        num_guessed = sum(run.num_guessed for run in on.decodes[batch])
        if num_guessed > sum(run.num_guessed for run in off.decodes[batch]):
            num_right = sum(run.num_right for run in on.decodes[batch])
            figures[f"{name}_right_share_{batch}"] = num_right / num_guessed
    return figures


def splits(runs: Runs) -> dict[str, float]:
    """Milliseconds of a decode step, and of a prompt, by part; and each part's share."""
    figures: dict[str, float] = {}
    for batch, decodes in runs.decodes.items():
        num_steps = sum(len(run.steps_s) for run in decodes)
        figures |= _split(f"profile_decode_{batch}", [run.split for run in decodes], num_steps)
    for length, prefills in runs.prefills.items():
        name = f"profile_prefill_{length}"
        figures |= _split(name, [run.split for run in prefills], len(prefills))
    return figures


def _rate(name: str, rounds: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(rounds), f"{name}_min": min(rounds)}


def _split(name: str, rounds: Sequence[Split], divisor: int) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for split in rounds:
        spent.update(split)
    whole = sum(spent.values())
    times = {f"{name}_{part}_ms": seconds / divisor * 1000 for part, seconds in spent.items()}
    return times | {f"{name}_{part}_share": seconds / whole for part, seconds in spent.items()}
