"""Tokens per second through HTTP and bus against the bare engine, and the CPU time that the way costs.

Both sides get the same prompts, in turns within each round and in turning order, so that what else the machine does
hits both; the side that waits is idle. A round's ratio compares neighbours; the report is the rounds' median, and
the worst. Greedy text must be the same on both sides, and how much of it is, is reported.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from deepflow.bench import load
from deepflow.bench.bare import BareEngine, Run
from deepflow.bench.bus.plan import Plan
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.sample import Sample, tokens_per_s
from deepflow.bench.stack import Stack
from shared.errors import Internal


@dataclass(slots=True)
class _Legs:
    """What all rounds at one number of streams brought."""

    served: list[float] = field(default_factory=list)  # tokens/s
    bare: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    num_same: int = 0
    num_texts: int = 0

    def figures(self, name: str) -> dict[str, float]:
        ratios = [served / bare for served, bare in zip(self.served, self.bare, strict=True)]
        return {
            f"throughput_ratio_{name}": statistics.median(ratios),
            f"throughput_ratio_{name}_worst": min(ratios),
            f"throughput_ratio_{name}_best": max(ratios),
            f"served_tps_{name}": statistics.median(self.served),
            f"bare_tps_{name}": statistics.median(self.bare),
            f"served_itl_p50_{name}_ms": percentile(self.gaps_ms, 50),
            f"served_itl_p99_{name}_ms": percentile(self.gaps_ms, 99),
            f"same_text_share_{name}": self.num_same / self.num_texts,
        }


class Throughput:
    """The comparison. `prompts` never repeat themselves."""

    def __init__(
        self, client: Client, bare: BareEngine, stack: Stack, plan: Plan, prompts: Iterator[str]
    ) -> None:
        self._client = client
        self._bare = bare
        self._stack = stack
        self._plan = plan
        self._prompts = prompts
        self._cpu_s: Counter[str] = Counter()
        self._client_cpu_s = 0.0
        self._num_tokens = 0  # over which the CPU time was used

    async def measure(self, advance: Callable[[], None]) -> dict[str, float]:
        """All rounds. Raises Internal if a request fails: then there is nothing to compare."""
        plan = self._plan
        one, many = _Legs(), _Legs()
        await self._serve(list(islice(self._prompts, plan.num_streams)), 2)
        await self._bare.generate(list(islice(self._prompts, plan.num_streams)), 2)
        give_up = time.monotonic() + plan.throughput_budget_s
        for number in range(plan.num_rounds):
            if one.served and time.monotonic() > give_up:
                break
            await self._round(one, 1, plan.output_len_1, number % 2 == 0)
            advance()
            await self._round(many, plan.num_streams, plan.output_len_32, number % 2 == 0)
            advance()
        found = one.figures("1") | many.figures("32") | self._cpu_figures()
        return found | {"num_rounds": len(one.served)}

    async def _round(self, legs: _Legs, num: int, output_len: int, served_first: bool) -> None:
        prompts = list(islice(self._prompts, num))
        run: Run | None = None
        if not served_first:
            run = await self._bare.generate(prompts, output_len)
        samples = await self._served_leg(prompts, output_len)
        if run is None:
            run = await self._bare.generate(prompts, output_len)
        legs.served.append(tokens_per_s(samples))
        legs.bare.append(run.tokens_per_s)
        legs.gaps_ms += [1000 * gap_s for sample in samples for gap_s in sample.itl_s]
        served = Counter(sample.text for sample in samples)
        legs.num_same += (served & Counter(run.texts)).total()
        legs.num_texts += num

    async def _served_leg(self, prompts: list[str], output_len: int) -> list[Sample]:
        before, own_before_s = self._stack.cpu_times(), _own_cpu_s()
        samples = await self._serve(prompts, output_len)
        own_s = _own_cpu_s() - own_before_s
        if len(prompts) > 1:
            self._client_cpu_s += own_s
            self._cpu_s.update(self._stack.cpu_times().since(before))
            self._num_tokens += sum(sample.output_tokens for sample in samples)
        return samples

    async def _serve(self, prompts: list[str], output_len: int) -> list[Sample]:
        async def send(prompt: str) -> Sample:
            return await self._client.complete(prompt, output_len)

        samples = await load.closed(send, prompts, len(prompts))
        for sample in samples:
            if not sample.ok or sample.output_tokens != output_len:
                raise Internal(
                    f"a request of the bench failed: status {sample.status}, "
                    f"{sample.output_tokens} of {output_len} tokens, {sample.error!r}"
                )
        return samples

    def _cpu_figures(self) -> dict[str, float]:
        """CPU milliseconds per 1,000 tokens at many streams: in all but the engine, and by role."""
        per_s = 1000 * 1000 / self._num_tokens
        outside_s = sum(cpu_s for role, cpu_s in self._cpu_s.items() if role != "engine")
        found = {
            "cpu_ms_per_1000_tokens": outside_s * per_s,
            "client_cpu_ms_per_1000_tokens": self._client_cpu_s * per_s,
        }
        for role, cpu_s in sorted(self._cpu_s.items()):
            found[f"cpu_ms_per_1000_tokens_{role}"] = cpu_s * per_s
        return found


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
