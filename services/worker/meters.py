"""The pod's /metrics: what its TEs tell in their beats, under the names that vLLM's dashboards know.

A TE is labelled by its place in the pod, not by its instance name, so that series live on over restarts and their
number stays bounded. This module must not know processes or the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from services.worker.tally import Tally
from shared.messages import Band

if TYPE_CHECKING:
    from shared.messages import TeBeat
    from shared.metrics import Metrics
    from shared.scaling_messages import Start

_LABELS: Final = ("model_name", "te")
_BAND_LABELS: Final = (*_LABELS, "band")
_BLOCK_LABELS: Final = (*_LABELS, "state")
_STEP_LABELS: Final = ("step", "process", "weights")
_BANDS: Final = frozenset(band.name.lower() for band in Band)
_STATES: Final = ("live", "cached", "leased", "free")
_GAUGES: Final = {
    "running": ("vllm:num_requests_running", "Sequences in the batch."),
    "waiting": ("vllm:num_requests_waiting", "Sequences waiting for a place in the batch."),
    "outstanding": ("deepflow_te_outstanding_seconds", "Predicted work taken on."),
    "outstanding_batch": (
        "deepflow_te_outstanding_batch_seconds",
        "Of it, what yields to all other (band batch).",
    ),
    "waiting_tokens": (
        "deepflow_te_waiting_tokens",
        "Tokens to compute before their next token can come, band batch apart.",
    ),
    "kv": ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
}
_COUNTERS: Final = {  # by the names in `TeBeat.counters`
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens taken in."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens generated."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the cache."),
    "fetches": ("deepflow_kv_fetches", "Prompts whose KV was asked for elsewhere."),
    "fetch_hits": ("deepflow_kv_fetch_hits", "Of these, some KV came."),
    "fetch_late": ("deepflow_kv_fetch_late", "Of these, the deadline came first."),
    "fetch_failures": ("deepflow_kv_fetch_failures", "Caches and peers that failed a fetch."),
    "fetch_lost": ("deepflow_kv_fetch_lost", "Pages gone from the arena before they were read."),
    "fetched_arena": ("deepflow_kv_fetched_arena", "Pages that came from the host's arena."),
    "fetched_peer": ("deepflow_kv_fetched_peer", "Pages that came from another TE's device."),
    "fetched_bytes": ("deepflow_kv_fetched_bytes", "Bytes of both."),
    "copied_pages": ("deepflow_kv_copied_pages", "Pages copied to the host's arena."),
    "copied_bytes": ("deepflow_kv_copied_bytes", "Bytes of these."),
    "copy_refused": ("deepflow_kv_copy_refused", "Pages for which the arena had no room."),
    "copy_failures": ("deepflow_kv_copy_failures", "Batches of pages that could not be copied."),
    "tokens_taken_over": ("deepflow_kv_tokens_taken_over", "Prompt tokens taken from chunks."),
    "leases": ("deepflow_kv_leases", "Leases on pages given to other TEs."),
    "preemptions": ("vllm:num_preemptions", "Sequences sent back to waiting for want of blocks."),
    "yields": ("deepflow_te_yields", "Of these, those of band batch that made room for others."),
}
_BAND_COUNTERS: Final = {  # likewise, each followed by the band's name
    "tokens_": ("deepflow_te_band_tokens", "Tokens of ended requests, prompt and output, by band."),
    "refused_": ("deepflow_te_refusals", "Tasks refused for want of room, by band."),
}


class Meters:
    """The metrics of all TEs of one pod."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauges = {key: metrics.gauge(*names, _LABELS) for key, names in _GAUGES.items()}
        self._counters = {key: metrics.counter(*names, _LABELS) for key, names in _COUNTERS.items()}
        self._bands = {
            key: metrics.counter(*names, _BAND_LABELS) for key, names in _BAND_COUNTERS.items()
        }
        self._blocks = metrics.gauge("deepflow_kv_blocks", "KV blocks by state.", _BLOCK_LABELS)
        self._restarts = metrics.counter(
            "deepflow_te_restarts", "TEs started again after a death.", _LABELS
        )
        self._steps = metrics.histogram(
            "deepflow_scaling_step_seconds", "Steps of a TE's start.", _STEP_LABELS
        )
        self._tally = Tally()

    def beat(self, place: str, beat: TeBeat) -> None:
        """What the TE in `place` says of itself."""
        labels = (beat.model, place)
        usage = beat.blocks_used / beat.blocks_total if beat.blocks_total else 0.0
        values = {
            "running": beat.running,
            "waiting": beat.waiting,
            "outstanding": beat.outstanding_s,
            "outstanding_batch": beat.outstanding_batch_s,
            "waiting_tokens": beat.waiting_tokens,
            "kv": usage,
        }
        for key, value in values.items():
            self._gauges[key].labels(*labels).set(value)
        held = (
            beat.blocks_used,
            beat.blocks_cached,
            beat.blocks_leased,
        )  # that is on the move is leased
        for state, number in zip(_STATES, (*held, beat.blocks_total - sum(held)), strict=True):
            self._blocks.labels(*labels, state).set(number)
        for key, growth in self._tally.grown(beat.id, beat.counters).items():
            if key in self._counters:
                self._counters[key].labels(*labels).inc(growth)
            for prefix, counter in self._bands.items():
                if key.startswith(prefix) and (band := key.removeprefix(prefix)) in _BANDS:
                    counter.labels(*labels, band).inc(growth)

    def died(self, model: str, place: str, te: str) -> None:
        """The TE `te` in `place` is gone: it runs nothing and holds nothing."""
        self._tally.forget(te)
        for gauge in self._gauges.values():
            gauge.labels(model, place).set(0)
        for state in _STATES:
            self._blocks.labels(model, place, state).set(0)

    def restarted(self, model: str, place: str) -> None:
        """A new TE was started in `place`."""
        self._restarts.labels(model, place).inc()

    def started(self, start: Start) -> None:
        """A TE has come up."""
        for step, seconds in start.steps.items():
            self._steps.labels(step, start.process, start.weights).observe(seconds)
