"""What the gateway counts: the names existing vLLM dashboards read, and `deepflow_gateway_*` for what is our own.

The only label from outside is the model's name, and only names in the catalogue get one, so the number of series is
bounded. This module must not know how anything is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import Counter

from shared.metrics import LENGTH_BUCKETS, Metrics

MAX_MODELS: Final = 256  # labels beyond it read "other"


class ModelCounts:
    """The metrics of one model, with its label applied: observing costs no look-up."""

    def __init__(self, counts: Counts, model: str) -> None:
        self.time_to_first_token = counts.time_to_first_token.labels(model)
        self.inter_token_latency = counts.inter_token_latency.labels(model)
        self.latency = counts.latency.labels(model)
        self.prompt_tokens = counts.prompt_tokens.labels(model)
        self.generation_tokens = counts.generation_tokens.labels(model)
        self._finished = counts.finished
        self._model = model

    def finished(self, reason: str) -> Counter:
        """Requests that ended so: stop, length, abort or error."""
        return self._finished.labels(self._model, reason)


class Counts:
    """All metrics of the gateway."""

    def __init__(self, metrics: Metrics, num_in_flight: Callable[[], int]) -> None:
        model = ["model_name"]
        self.time_to_first_token = metrics.histogram(
            "vllm:time_to_first_token_seconds", "Request read to first token.", model
        )
        self.inter_token_latency = metrics.histogram(
            "vllm:inter_token_latency_seconds", "One token of a choice to its next.", model
        )
        self.latency = metrics.histogram(
            "vllm:e2e_request_latency_seconds", "Request read to its end.", model
        )
        self.prompt_tokens = metrics.histogram(
            "vllm:request_prompt_tokens", "Prompt length in tokens.", model, LENGTH_BUCKETS
        )
        self.generation_tokens = metrics.histogram(
            "vllm:request_generation_tokens", "Generated tokens.", model, LENGTH_BUCKETS
        )
        self.finished = metrics.counter(
            "vllm:request_success_total",
            "Finished requests by reason: stop, length, abort (client left), error.",
            [*model, "finished_reason"],
        )
        self.band_requests = metrics.counter(
            "deepflow_gateway_requests_total", "Prompts sent, by priority band.", ["band"]
        )
        self.band_first_token = metrics.histogram(
            "deepflow_gateway_time_to_first_token_seconds",
            "Request read to first token, by priority band.",
            ["band"],
        )
        self.resubmissions = metrics.counter(
            "deepflow_gateway_resubmissions_total", "Requests sent again after a loss."
        )
        self.replays = metrics.counter(
            "deepflow_gateway_replays_total", "Times a TE was asked to send tokens again."
        )
        self.gaps = metrics.counter(
            "deepflow_gateway_frame_gaps_total", "Token frames that went missing on the bus."
        )
        self.disconnects = metrics.counter(
            "deepflow_gateway_disconnects_total", "Clients that left before the end."
        )
        self.responses = metrics.counter(
            "deepflow_gateway_responses_total", "HTTP answers by status class.", ["status"]
        )
        self.context_requests = metrics.counter(
            "deepflow_gateway_context_requests_total", "Requests that named a context cache."
        )
        self.context_tokens = metrics.counter(
            "deepflow_gateway_context_cached_tokens_total", "Of its tokens, those found computed."
        )
        metrics.gauge(
            "deepflow_gateway_requests_in_flight", "Requests accepted and not ended."
        ).set_function(num_in_flight)
        self._models: dict[str, ModelCounts] = {}

    def of(self, model: str) -> ModelCounts:
        """The metrics of a model in the catalogue."""
        known = self._models.get(model)
        if known is None:
            if len(self._models) >= MAX_MODELS:
                model = "other"
            known = self._models.setdefault(model, ModelCounts(self, model))
        return known
