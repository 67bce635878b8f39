"""The models of a pod host: what computes each, what a TE of it takes, and what of its weights is in memory.

This module must not know which TEs there are or are to be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from services.worker.budget import OWN_BYTES, Cost, kv_pool_bytes, memory_bytes, own_bytes
from services.worker.preloader import WARM_SHARE, Preloader
from services.worker.recipe import model_entry, pick_backend, served_context
from shared.catalog import open_model
from shared.scaling_messages import PodModel

if TYPE_CHECKING:
    from services.worker.flowserve.backend import Backend
    from services.worker.settings import WorkerSettings
    from shared.messages import ModelEntry

_LOOK_S: Final = 1.0  # from look to look at what of the weights is in memory
# What the system took back is fetched again, but not at once, and in no more than this part of the time: it may have
# had its reasons.
_AGAIN_S: Final = 5.0
_SHARE: Final = 0.05


class Stock:
    """All that `settings` name. Raises ModelNotFound, ModelError, Unavailable for one that cannot be served."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self.entries: list[ModelEntry] = []
        self._backends: dict[str, Backend] = {}
        for name in settings.models:
            folder = open_model(settings.cache_dir, name)
            backend = self._backends[name] = pick_backend(folder, settings)
            context = served_context(backend, settings)
            self.entries.append(model_entry(folder, backend, context=context))
        backends = self._backends.values()
        memory = settings.preload_bytes
        self._preloader = Preloader(
            memory_bytes() // 4 if memory < 0 else memory,
            settings.cache_dir,
            prepared=all((one.device, one.dtype) == ("cpu", "w8a8") for one in backends),
        )
        self._costs = {
            name: self._cost(name, OWN_BYTES[backend.kernels])
            for name, backend in self._backends.items()
        }
        self._measured: set[str] = set()
        self._resident: dict[str, int] = {}
        self._preload: Sequence[str] = settings.models  # most wanted first

    def __contains__(self, model: str) -> bool:
        return model in self._backends

    @property
    def costs(self) -> Mapping[str, Cost]:
        """What TEs of each model take, as far as is known by now."""
        return self._costs

    @property
    def resident(self) -> Mapping[str, int]:
        """Bytes of each model's weights in the page cache, a moment ago."""
        return self._resident

    def is_native(self, model: str) -> bool:
        """Whether our own kernels compute it."""
        return self._backends[model].kernels == "native"

    def describe(self) -> list[PodModel]:
        """The models, in the pod host's beat."""
        settings = self._settings
        return [
            PodModel(
                name=model,
                min_tes=settings.min_tes,
                max_tes=settings.max_tes,
                te_bytes=cost.te_bytes,
                weights_bytes=cost.weights_bytes,
                resident_bytes=self._resident.get(model, 0),
                num_slots=settings.max_num_seqs,
            )
            for model, cost in self._costs.items()
        ]

    def preload(self, models: Sequence[str]) -> None:
        """Have the weights of these in memory, soon: the first as far as there is room."""
        self._preload = models

    async def measure(self, model: str, pid: int) -> bool:
        """Look at what a TE of `model` that has come up takes; whether that is news."""
        if model in self._measured:
            return False
        self._measured.add(model)
        kv_bytes = kv_pool_bytes(self._backends[model], self._settings)
        own = await asyncio.to_thread(own_bytes, pid, kv_bytes)
        if own:
            self._costs[model] = self._cost(model, own)
        else:  # it has ended
            self._measured.discard(model)
        return own > 0

    async def keep(self) -> None:
        """Keep in memory what is to be there, and know what is, for ever."""
        done: Sequence[str] | None = None
        again_at = 0.0
        while True:
            wanted, now = self._preload, time.monotonic()
            if done is None or set(wanted) != set(done):
                due = True
            elif now >= again_at:
                cooled = any(self._cooled(model) for model in self._preloader.kept)
                due = cooled or (wanted != done and not self._fits(wanted))
            else:
                due = False
            if due:
                await self._preloader.want(wanted)
                took_s = time.monotonic() - now
                done, again_at = wanted, now + max(_AGAIN_S, took_s / _SHARE)
            self._resident = await asyncio.to_thread(self._look)
            await asyncio.sleep(_LOOK_S)

    def _fits(self, models: Sequence[str]) -> bool:
        """Whether all of them may be in memory, so that it does not matter which is wanted most."""
        weights = self._preloader.weights_bytes
        return sum(map(weights, models)) <= self._preloader.budget_bytes

    def _look(self) -> dict[str, int]:
        return {model: self._preloader.resident(model) for model in self._backends}

    def _cooled(self, model: str) -> bool:
        """Whether the system took back much of what was brought in."""
        return self._resident.get(model, 0) < WARM_SHARE * self._preloader.weights_bytes(model)

    def _cost(self, model: str, own: int) -> Cost:
        kv_bytes = kv_pool_bytes(self._backends[model], self._settings)
        return Cost(kv_bytes + own, self._preloader.weights_bytes(model))
