"""Whom a new TE takes its weights from: a pipelined relay, not everybody from the same one. Pure.

Pod hosts whose TEs are still loading stand in a row, by name; each takes from the one before it, which hands on what it
gets while it gets it, and else from a TE that is ready, of which neighbours in the row begin with different ones. The
row has no circle, and whoever cannot be reached is passed over. This module must not know how weights travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shared.scaling_messages import PodBeat

_MAX_SOURCES: Final = 4


def sources(model: str, pods: Iterable[PodBeat]) -> dict[str, list[str]]:
    """The TEs to take the weights of `model` from, best first, for a new TE on each pod host that can run it."""
    ready: dict[str, list[str]] = {}
    loading: dict[str, list[str]] = {}
    row = []
    for pod in sorted(pods, key=lambda pod: pod.id):
        if not any(one.name == model for one in pod.models):
            continue
        row.append(pod.id)
        for te in pod.tes:
            if te.te and te.model == model and te.state in ("ready", "loading"):
                where = ready if te.state == "ready" else loading
                where.setdefault(pod.id, []).append(te.te)
    givers = sorted(name for names in ready.values() for name in names)
    found: dict[str, list[str]] = {}
    before: list[str] = []  # a TE of the pod host before it in the row that is loading
    for place, pod_id in enumerate(row):
        here = ready.get(pod_id, [])[:1]
        turn = place % len(givers) if givers else 0
        chain = [*here, *before, *givers[turn:], *givers[:turn]]
        found[pod_id] = list(dict.fromkeys(chain))[:_MAX_SOURCES]
        if pod_id not in ready and pod_id in loading:
            before = loading[pod_id][:1]
    return found
