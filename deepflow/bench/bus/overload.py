"""Five times more requests than the platform can serve: does it still serve as many as it can?

The peak is what it completes with as many requests under way as the batch has places; overload is an even stream of
requests at a multiple of that rate, whatever becomes of them (as far as this machine can send them beside: see
`overload_offered_per_s`). Goodput counts the requests that are answered in full
and in good time (`Plan.goals`), per second of the window after the ramp.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from random import Random

from deepflow.bench import load
from deepflow.bench.bus.plan import Plan
from deepflow.bench.client import Client
from deepflow.bench.distribution import summary
from deepflow.bench.sample import Goal, Sample, num_good
from deepflow.bench.stack import Stack


async def overload(
    client: Client,
    stack: Stack,
    plan: Plan,
    max_num_seqs: int,
    prompts: Iterator[str],
    rng: Random,
) -> dict[str, float]:
    """Peak, then overload, each in a window of its own."""

    num_sent = 0

    async def send(prompt: str) -> Sample:
        nonlocal num_sent
        num_sent += 1
        # Of different lengths, so that they do not end in waves.
        low, high = plan.overload_output_len
        return await client.complete(prompt, rng.randint(low, high))

    seconds = plan.ramp_s + plan.peak_s
    started = time.perf_counter()
    samples = await load.window(send, prompts, seconds, concurrency=max_num_seqs)
    peak = _Window(samples, started + plan.ramp_s, plan.peak_s, plan.goals)
    await stack.wait_idle()
    if peak.completed_per_s == 0:
        return {"peak_requests_per_s": 0.0}
    rate = plan.overload_factor * peak.completed_per_s
    num_sent, started = 0, time.perf_counter()
    samples = await load.window(send, prompts, seconds, rate=rate)
    over = _Window(samples, started + plan.ramp_s, plan.peak_s, plan.goals)
    await stack.wait_idle()
    refused = [sample for sample in samples if sample.status == 429]
    found = {
        "peak_requests_per_s": peak.completed_per_s,
        "peak_goodput_per_s": peak.good_per_s,
        "overload_offered_per_s": num_sent / seconds,
        "overload_requests_per_s": over.completed_per_s,
        "overload_goodput_per_s": over.good_per_s,
        "overload_completed_ratio": over.completed_per_s / peak.completed_per_s,
        "overload_refused": len(refused),
        "overload_failed_otherwise": sum(not one.ok for one in samples) - len(refused),
    }
    if peak.good_per_s > 0:
        found["overload_goodput_ratio"] = over.good_per_s / peak.good_per_s
    for name, window in (("peak", peak), ("overload", over)):
        found |= summary(f"{name}_ttft", "ms", [1000 * sample.ttft_s for sample in window.whole])
        found |= summary(f"{name}_tpot", "ms", [1000 * sample.tpot_s for sample in window.whole])
    return found


class _Window:
    """What ended within the `seconds` after `start_s`."""

    def __init__(
        self, samples: Sequence[Sample], start_s: float, seconds: float, goals: Sequence[Goal]
    ) -> None:
        self.whole = [
            sample
            for sample in samples
            if sample.ok and start_s <= sample.times_s[-1] < start_s + seconds
        ]
        self.completed_per_s = len(self.whole) / seconds
        self.good_per_s = num_good(self.whole, goals) / seconds
