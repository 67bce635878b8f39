"""Makes a TE's engine: weights, KV cache, one warm-up request. Runs in the engine's thread.

This module must not know the bus or the shell.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Final

from services.worker.child import RANK_LOST
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from shared import log
from shared.messages import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.flowserve.spmd.crew import Loss
    from services.worker.settings import TeSettings
    from shared.catalog import ModelFolder

# With three tokens of output no page is computed whole, not even the smallest: nothing enters the index.
_WARM_UP_PROMPT: Final = 13


def load_engine(
    folder: ModelFolder, settings: TeSettings, wake: Callable[[], None] | None = None
) -> Engine:
    """The engine for one model, warmed up; it asks for pages that it lacks, and calls `wake` when some have moved.

    Raises DeepFlowError naming what is wrong with the model or the memory.
    """
    engine = Engine.from_folder(
        folder.path,
        dtype=settings.dtype,
        kv_tokens=settings.kv_tokens or None,
        kv_bytes=settings.kv_bytes,
        tp=settings.tp,
        pp=settings.pp,
        device=settings.device,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        threads=settings.threads,
        cache_dir=settings.cache_dir,
        kernels=settings.kernels,
        asynchronous=settings.asynchronous,
        speculation=settings.speculation,
        fetch=wake is not None,
        wake=wake,
        on_loss=_end_process,
    )
    _warm_up(engine)
    # What was made so far stays: the collector need not visit it again.
    gc.collect()
    gc.freeze()
    return engine


def _end_process(loss: Loss) -> None:
    """A TE without one of its ranks is a dead TE: its pod host and the gateways know what to do about those."""
    log.get(service="te").error("rank_lost", rank=loss.rank, pid=loss.pid, reason=loss.reason)
    sys.stderr.flush()
    os._exit(RANK_LOST)


def _warm_up(engine: Engine) -> None:
    """One short request, so that the first real one does not pay for lazy initialisation."""
    prompt = [0] * min(_WARM_UP_PROMPT, engine.context - 1)
    sampling = Sampling(max_tokens=3, seed=0, temperature=0.0, ignore_eos=True)
    engine.submit(local_request("warm-up", prompt, sampling))
    while engine.has_work():
        engine.step()
