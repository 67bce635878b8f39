"""What came of a simulated run: every request's fate, every TE's share, and what is usually asked about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import orjson

from deepflow.bench.distribution import percentile
from deepflow.sim.scaling import Decision

WINDOW_S: Final = 60.0
DONE: Final = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A request's end. Times are seconds; `ttft_s` and `jct_s` count from the arrival, `arrived_s` from the start.

    `finish`: length (all its tokens came), refused (429), failed (nobody could, or too late). `prefill_te` computed its
    prompt, `te` decoded; `cached_tokens` of the prompt were found by the first attempt.
    """

    number: int
    finish: str
    arrived_s: float
    ttft_s: float | None
    jct_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    wanted_tokens: int
    num_attempts: int
    prefill_te: str
    te: str
    tenant: str
    band: int

    @property
    def ok(self) -> bool:
        return self.finish == DONE

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None where there was none."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.jct_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeShare:
    """What a TE did."""

    te: str
    role: str
    num_tasks: int
    num_prefilled_tokens: int
    num_hit_tokens: int
    num_preemptions: int
    busy_s: float
    up_s: float  # it was there, starting, ready or draining, between the first arrival and the last end


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run. `duration_s` is from the first arrival to the last end; requests are in the order of arrival."""

    policy: str
    duration_s: float
    requests: tuple[Outcome, ...]
    tes: tuple[TeShare, ...]
    num_resubmissions: int
    num_placements: int
    num_events: int
    decisions: tuple[Decision, ...] = ()

    # ------------------------------------------------------------------------------------------------- of requests

    def values(self, of: Callable[[Outcome], float | None]) -> list[float]:
        """A value of all requests that are done, ascending, without those that have none."""
        return sorted(value for one in self.requests if one.ok and (value := of(one)) is not None)

    def ttft_s(self, share: float) -> float:
        """The quantile of the time to the first token; NaN without any."""
        return quantile(self.values(lambda one: one.ttft_s), share)

    def tpot_s(self, share: float) -> float:
        """The quantile of the time per further token."""
        return quantile(self.values(lambda one: one.tpot_s), share)

    def jct_s(self, share: float) -> float:
        """The quantile of the time to the end."""
        return quantile(self.values(lambda one: one.jct_s), share)

    @property
    def num_done(self) -> int:
        """Requests that got all their tokens."""
        return sum(one.ok for one in self.requests)

    def goodput(self, *, ttft_s: float, tpot_s: float) -> float:
        """Requests per second, by arrival, that were done within both bounds."""
        good = sum(
            one.ok
            and one.ttft_s is not None
            and one.ttft_s <= ttft_s
            and (one.tpot_s or 0.0) <= tpot_s
            for one in self.requests
        )
        arrivals = [one.arrived_s for one in self.requests]
        span_s = max(arrivals, default=0.0) - min(arrivals, default=0.0)
        return good / span_s if span_s > 0 else float(good)

    @property
    def te_seconds(self) -> float:
        """What all TEs together were there, which somebody pays for."""
        return math.fsum(te.up_s for te in self.tes)

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens that were found in a cache by the first attempt."""
        asked = sum(one.prompt_tokens for one in self.requests)
        return sum(one.cached_tokens for one in self.requests) / max(asked, 1)

    # ------------------------------------------------------------------------------------------------------ of TEs

    def imbalances(self, window_s: float = WINDOW_S) -> list[float]:
        """max/mean over the TEs that prefill of the prompt tokens computed, window after window of arrivals."""
        names = [share.te for share in self.tes if share.role != "decode"]
        windows: dict[int, dict[str, int]] = {}
        for one in self.requests:
            if one.prefill_te:
                window = windows.setdefault(int(one.arrived_s // window_s), dict.fromkeys(names, 0))
                computed = one.prompt_tokens - one.cached_tokens
                window[one.prefill_te] = window.get(one.prefill_te, 0) + computed
        loads = [windows[number].values() for number in sorted(windows)]
        return [max(load) * len(load) / sum(load) for load in loads if sum(load)]

    def metrics(self, *, slo_ttft_s: float, slo_tpot_s: float) -> dict[str, float]:
        """The usual figures."""
        figures = {
            "num_requests": float(len(self.requests)),
            "num_done": float(self.num_done),
            "num_refused": float(sum(one.finish == "refused" for one in self.requests)),
            "duration_s": self.duration_s,
            "hit_rate": self.hit_rate,
            "imbalance_p99_60s": quantile(self.imbalances(), 0.99),
            "goodput": self.goodput(ttft_s=slo_ttft_s, tpot_s=slo_tpot_s),
            "num_preemptions": float(sum(te.num_preemptions for te in self.tes)),
        }
        for name, of in _TIMES.items():
            values = self.values(of)
            figures[f"{name}_mean_s"] = mean(values)
            for percent in (50, 90, 99):
                figures[f"{name}_p{percent}_s"] = quantile(values, percent / 100)
        return figures

    def to_json(self) -> bytes:
        """All of it; the same bytes for the same run."""
        return orjson.dumps(asdict(self))


_TIMES: Final[dict[str, Callable[[Outcome], float | None]]] = {
    "ttft": lambda one: one.ttft_s,
    "tpot": lambda one: one.tpot_s,
    "jct": lambda one: one.jct_s,
}


def quantile(values: Sequence[float], share: float) -> float:
    """NaN of nothing."""
    return percentile(values, share * 100) if values else math.nan


def mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan
