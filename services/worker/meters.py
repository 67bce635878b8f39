"""The pod's /metrics: what its TEs tell in their beats, under the names that vLLM's dashboards know.

A TE is labelled by its place in the pod, not by its instance name, so that series live on over restarts and their
number stays bounded. This module must not know processes or the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from services.worker.tally import Tally

if TYPE_CHECKING:
    from shared.messages import TeBeat
    from shared.metrics import Metrics

_LABELS: Final = ("model_name", "te")
_GAUGES: Final = {
    "running": ("vllm:num_requests_running", "Sequences in the batch."),
    "waiting": ("vllm:num_requests_waiting", "Sequences waiting for a place in the batch."),
    "kv": ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
}
_COUNTERS: Final = {  # by the names in `TeBeat.counters`
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens taken in."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens generated."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the cache."),
    "preemptions": ("vllm:num_preemptions", "Sequences sent back to waiting for want of blocks."),
}


class Meters:
    """The metrics of all TEs of one pod."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauges = {key: metrics.gauge(*names, _LABELS) for key, names in _GAUGES.items()}
        self._counters = {key: metrics.counter(*names, _LABELS) for key, names in _COUNTERS.items()}
        self._restarts = metrics.counter(
            "deepflow_te_restarts", "TEs started again after a death.", _LABELS
        )
        self._tally = Tally()

    def beat(self, place: str, beat: TeBeat) -> None:
        """What the TE in `place` says of itself."""
        labels = (beat.model, place)
        usage = beat.blocks_used / beat.blocks_total if beat.blocks_total else 0.0
        for key, value in (("running", beat.running), ("waiting", beat.waiting), ("kv", usage)):
            self._gauges[key].labels(*labels).set(value)
        for key, growth in self._tally.grown(beat.id, beat.counters).items():
            if key in self._counters:
                self._counters[key].labels(*labels).inc(growth)

    def died(self, model: str, place: str, te: str) -> None:
        """The TE `te` in `place` is gone: it runs nothing and holds nothing."""
        self._tally.forget(te)
        for gauge in self._gauges.values():
            gauge.labels(model, place).set(0)

    def restarted(self, model: str, place: str) -> None:
        """A new TE was started in `place`."""
        self._restarts.labels(model, place).inc()
