"""Brings a model into a TE: weights, KV cache, and a dummy request, whose outcome tells right weights from wrong ones.

`Loading` is one start, from the moment that the model is known until it is served; what it finds out on the way is kept
in the model's profile. This module must not know the bus or the shell.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.child import RANK_LOST
from services.worker.flowserve.config import ModelError
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from services.worker.flowserve.prepared import discard, find_prepared, verify
from services.worker.preloader import WARM_SHARE, bring_in, drop, warm_share, weight_files
from services.worker.profile import Canary, Profile, ProfileKey, read_profile, write_profile
from services.worker.recipe import pick_backend, recipe_digest
from services.worker.tie import Loaded, Ready, StepTook, WeightsCame
from shared import log
from shared.messages import Sampling
from shared.scaling_messages import Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.worker.flowserve.backend import Backend
    from services.worker.flowserve.prepared import Prepared
    from services.worker.flowserve.spmd.crew import Loss
    from services.worker.forking import Weights
    from services.worker.settings import TeSettings
    from services.worker.tie import TeEvent
    from shared.catalog import ModelFolder

    Fetch = Callable[[Callable[[int], None]], Awaitable[Weights]]

# The dummy request: no page is computed whole, not even the smallest, so nothing enters the index.
_PROMPT: Final = 6
# One step has read every weight; where kernels are chosen, or graphs captured, by the shape of a step, decode too.
_NUM_TOKENS: Final = {"native": 1, "torch": 3}
# Of a log-probability. Native products are exact, but the last bits of a logarithm are the machine's; elsewhere the
# order of sums changes with batch, threads and library.
_TOLERANCE: Final = {"native": 1e-3, "torch": 0.1}
_MOST: Final = 0.5  # of the weights: where that came from is where they came from
# How far a start is, in percent: weights lie here, weights are mapped.
_WEIGHTS_HERE, _WEIGHTS_MAPPED = 80, 90


class Loading:
    """One start of one TE. `obtain` runs in the event loop, then `load` in the engine's thread; `ready` and `keep`
    follow once the TE serves.

    `say` may be called from any thread.
    """

    def __init__(
        self,
        folder: ModelFolder,
        settings: TeSettings,
        *,
        say: Callable[[TeEvent], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.percent = 0
        self.weights = ""  # where they came from: disk | dram | fork
        self.backend: Backend = pick_backend(folder, settings)
        self.recipe = recipe_digest(folder, self.backend)
        self.profile: Profile | None = None  # what was known before
        self._key = ProfileKey(
            recipe=self.recipe,
            device=_device(self.backend),
            room=f"{settings.kv_tokens} tokens, {settings.kv_bytes} bytes, {settings.max_num_seqs}"
            f" choices, {settings.max_batched_tokens} rows",
        )
        self._say = say
        self._began = time.monotonic()
        self._mapped = self._began  # when the weights were there
        self._handed: Prepared | None = None  # mapped already
        self._found: Profile | None = None  # to be kept

    async def obtain(self, fetch: Fetch) -> None:
        """Have the weights on this host. `fetch` takes them from another TE where they are not, and tells its listener
        how many percent have come; without them from there, the disk is the source."""
        weights = await fetch(lambda percent: self._progress(percent * _WEIGHTS_HERE // 100))
        self._handed = weights.prepared
        if weights.forked:
            self.weights = "fork"

    def load(self, wake: Callable[[], None]) -> Engine:
        """The engine, proven by its dummy request. Raises DeepFlowError naming what is wrong with model or memory."""
        self._bring_in()
        self.profile = read_profile(self._key, self.settings.cache_dir)
        engine = self._make(wake)
        canary = _run_canary(engine, _NUM_TOKENS[self.backend.kernels])
        if self.profile is None:
            self._found = self._measured(engine, canary)
        elif not self._is_right(canary):
            engine.close()
            del engine  # and with it the mapping
            engine = self._again(canary, wake)
        # What was made so far stays: the collector need not visit it again.
        gc.collect()
        gc.freeze()
        return engine

    def ready(self) -> None:
        """The TE serves: all steps that are its own are done."""
        self.percent = 100
        self._say(StepTook(Step.TE_POST_LOAD, time.monotonic() - self._mapped))
        self._say(Ready())

    async def keep(self) -> None:
        """Keep what was found out, unless the weights turn out not to be what they should. Takes a while."""
        if self._found is not None:
            await asyncio.to_thread(self._keep, self._found)

    # ------------------------------------------------------------------------------------------------------- internals

    def _progress(self, percent: int) -> None:
        if percent > self.percent:
            self.percent = percent
            self._say(Loaded(percent))

    def _files(self) -> list[Path]:
        """Those that are here: the file that was handed to us may lie where only a descriptor of it leads."""
        if self._handed is not None:
            return [self._handed.path] if self._handed.path.exists() else []
        prepared = takes_prepared(self.backend)
        return weight_files(self.folder.path, self.settings.cache_dir, prepared=prepared)

    def _bring_in(self) -> None:
        """Read what lies on the disk alone, in large pieces: page by page, as it is needed, would take longer."""
        files = self._files()
        share = warm_share(files)
        if (
            self.weights != "fork"
        ):  # the system takes back a few pages of whatever rests for a moment
            self.weights = "dram" if share >= _MOST else "disk"
        if files and share < WARM_SHARE:
            total, before = sum(path.stat().st_size for path in files), 0
            for path in files:
                before += bring_in(path, partial(self._read, before, total))
        self._progress(_WEIGHTS_HERE)

    def _read(self, before: int, total: int, num_bytes: int) -> None:
        self._progress((before + num_bytes) * _WEIGHTS_HERE // max(total, 1))

    def _make(self, wake: Callable[[], None]) -> Engine:
        num_blocks = None if self.profile is None else self.profile.num_blocks
        return make_engine(
            self.folder,
            self.settings,
            wake,
            num_blocks=num_blocks,
            prepared=self._handed,
            on_weights=self._on_weights,
        )

    def _on_weights(self) -> None:
        """The decoder has them: what follows is the step after."""
        if self.percent < _WEIGHTS_MAPPED:
            self._mapped = time.monotonic()
            self._say(StepTook(Step.TE_LOAD, self._mapped - self._began))
            self._say(WeightsCame(self.weights))
            self._progress(_WEIGHTS_MAPPED)

    def _is_right(self, canary: Canary) -> bool:
        assert self.profile is not None
        return self.profile.canary.equals(canary, _TOLERANCE[self.backend.kernels])

    def _again(self, canary: Canary, wake: Callable[[], None]) -> Engine:
        """The weights are not those of the profile: read them once more, prepared anew if they are not whole. Raises
        ModelError if that does not mend it."""
        assert self.profile is not None
        prepared = self._prepared()
        whole = prepared is None or verify(prepared)
        log.get(service="te").error(
            "canary_wrong",
            model=self.folder.name,
            weights=self.weights,
            whole=whole,
            came=canary.ids,
        )
        self._handed = None
        gc.collect()
        if prepared is not None and not whole:
            discard(prepared)
        del prepared
        for path in self._files():
            drop(path)
        self.weights = "disk"
        engine = self._make(wake)
        canary = _run_canary(engine, _NUM_TOKENS[self.backend.kernels])
        if self._is_right(canary):
            return engine
        engine.close()
        raise ModelError(
            f"model {self.folder.name!r} does not answer the dummy request as its weights should"
            f" ({canary.ids}, not {self.profile.canary.ids}): `deepflow pull {self.folder.name}` anew, or remove"
            f" {self._key.path(self.settings.cache_dir)} if this machine computes otherwise now"
        )

    def _prepared(self) -> Prepared | None:
        """The weights, if they are of the kind that has a digest."""
        if not takes_prepared(self.backend):
            return None
        return find_prepared(self.folder.path, self.settings.cache_dir)

    def _measured(self, engine: Engine, canary: Canary) -> Profile:
        return Profile(
            recipe=self.recipe,
            device=self._key.device,
            num_blocks=engine.settings.num_blocks,
            canary=canary,
        )

    def _keep(self, profile: Profile) -> None:
        prepared = self._prepared()
        if prepared is not None and not verify(prepared):
            log.get(service="te").error("weights_damaged", model=self.folder.name)
            return
        try:
            write_profile(profile, self._key, self.settings.cache_dir)
        except OSError as error:  # the next one finds it out itself
            log.get(service="te").warning("profile_not_kept", error=str(error))


def make_engine(
    folder: ModelFolder,
    settings: TeSettings,
    wake: Callable[[], None] | None = None,
    *,
    num_blocks: int | None = None,
    prepared: Prepared | None = None,
    on_weights: Callable[[], None] | None = None,
) -> Engine:
    """The engine of a TE with these settings, cold; with `wake`, it asks for pages that it lacks, and calls that when
    some have moved. `num_blocks` of KV cache, else what the settings say; `prepared` weights, if they are mapped.

    Raises DeepFlowError naming what is wrong with the model or the memory.
    """
    kv_tokens = settings.kv_tokens or None
    if num_blocks is not None:
        kv_tokens = num_blocks * pick_backend(folder, settings).page
    return Engine.from_folder(
        folder.path,
        dtype=settings.dtype,
        kv_tokens=kv_tokens,
        kv_bytes=settings.kv_bytes,
        tp=settings.tp,
        pp=settings.pp,
        device=settings.device,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        threads=settings.threads,
        cache_dir=settings.cache_dir,
        kernels=settings.kernels,
        prepared=prepared,
        asynchronous=settings.asynchronous,
        speculation=settings.speculation,
        fetch=wake is not None,
        wake=wake,
        on_loss=_end_process,
        on_weights=on_weights,
    )


def takes_prepared(backend: Backend) -> bool:
    """Whether it computes with prepared weights, not with the checkpoint's own files."""
    return backend.kernels == "native" or (backend.device, backend.dtype) == ("cpu", "w8a8")


def _device(backend: Backend) -> str:
    """What computes, in words that are equal where profiles may be."""
    return f"{backend.device} {backend.kernels} {backend.dtype} {backend.tp}x{backend.pp}"


def _end_process(loss: Loss) -> None:
    """A TE without one of its ranks is a dead TE: its pod host and the gateways know what to do about those."""
    log.get(service="te").error("rank_lost", rank=loss.rank, pid=loss.pid, reason=loss.reason)
    sys.stderr.flush()
    os._exit(RANK_LOST)


def _run_canary(engine: Engine, num_tokens: int) -> Canary:
    """One short request: the first real one does not pay for lazy initialisation, and wrong weights show. Raises
    ModelError if it fails."""
    num_prompt = max(1, min(_PROMPT, engine.context - num_tokens))
    prompt = [(7919 * index + 17) % engine.vocab for index in range(num_prompt)]
    sampling = Sampling(max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True, logprobs=2)
    engine.submit(local_request("canary", prompt, sampling))
    ids: list[int] = []
    logprobs: list[float] = []
    gaps: list[float] = []
    while engine.has_work():
        output = engine.step()
        for _, delta in output.deltas:
            if delta.failure is not None:
                raise ModelError(
                    f"the dummy request failed: {delta.failure.message}"
                ) from output.error
            ids += delta.ids
            for one in delta.logprobs or []:
                logprobs.append(float(one.logprob))
                best, *others = one.top_logprobs
                gaps.append(float(best - others[0]) if others else 0.0)
    return Canary(ids=ids, logprobs=logprobs, gaps=gaps)
