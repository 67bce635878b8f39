"""The cluster manager's metrics, in the words of other platforms' planners. A model's go with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from services.scheduler.cluster.autoscaler import Cause, Observation, Verdict

if TYPE_CHECKING:
    from shared.metrics import Metrics


class Meters:
    """Of one scheduler: each shows what it thinks, and only the leader's thoughts count."""

    def __init__(self, metrics: Metrics, *, is_leading: Callable[[], bool]) -> None:
        metrics.gauge("deepflow_cluster_leader", "1 where this scheduler leads.").set_function(
            lambda: float(is_leading())
        )
        self._desired = metrics.gauge(
            "deepflow_cluster_desired_replicas", "TEs that are to be up.", ["model"]
        )
        self._ready = metrics.gauge("deepflow_cluster_ready_replicas", "TEs that serve.", ["model"])
        self._starting = metrics.gauge(
            "deepflow_cluster_starting_replicas", "TEs on their way up.", ["model"]
        )
        self._parked = metrics.gauge(
            "deepflow_cluster_parked_requests", "Requests that wait for a TE.", ["model"]
        )
        self._decisions = metrics.counter(
            "deepflow_cluster_decisions_total",
            "Changes of how many TEs are to be up, by direction and cause.",
            ["direction", "cause"],
        )
        self._models: set[str] = set()

    def saw(self, model: str, observation: Observation, verdict: Verdict) -> None:
        """A model was looked at."""
        self._models.add(model)
        self._desired.labels(model).set(verdict.target)
        self._ready.labels(model).set(observation.ready)
        self._starting.labels(model).set(observation.starting)
        self._parked.labels(model).set(observation.parked)

    def decided(self, cause: Cause, *, more: bool) -> None:
        """Another number of TEs is to be up."""
        self._decisions.labels("up" if more else "down", cause.value).inc()

    def forget(self, model: str) -> None:
        """Nobody runs it or asks for it any more."""
        if model in self._models:
            self._models.remove(model)
            for gauge in (self._desired, self._ready, self._starting, self._parked):
                gauge.remove(model)
