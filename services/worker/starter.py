"""Starts TEs the fastest way there is: a pre-warmed one, a fork of the zygote, or a new interpreter.

Every TE starts without a model and is told over its tie what to be; so a warm TE is one that has not been told yet.
This module must not know which TEs are wanted, nor import torch.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from services.worker.child import Child
from services.worker.process import ending, spawn
from services.worker.recipe import pick_backend
from services.worker.settings import WorkerSettings, for_te
from services.worker.zygote import Zygote
from shared.catalog import open_model
from shared.errors import DeepFlowError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.worker.tie import Assignment
    from shared.service import Service

_TE: Final = "services.worker.te"
_PR_SET_CHILD_SUBREAPER: Final = 36
# Until another zygote, or warm TE, is tried when one has died: twice as long each time, up to the second number.
_AGAIN_S: Final = 0.5
_AGAIN_MOST_S: Final = 60.0
_SWEEP_S: Final = 1.0


class Starter:
    """One pod host's. All that it starts are children of this process."""

    def __init__(self, service: Service[WorkerSettings], env: Mapping[str, str]) -> None:
        self._service = service
        self._settings = service.settings
        self._log = service.log
        self._env = for_te(env, pod=service.id)
        self._pools: dict[bool, Pool] = {}  # by whether torch computes
        self._torch: dict[str, bool] = {}  # model -> whether torch computes it
        self._num_coming = 0  # starts that have no process yet
        self._started: set[Child] = set()  # told what to be, and perhaps not ready yet

    @property
    def num_warm(self) -> int:
        """Pre-warmed TEs that are on the bus."""
        return sum(len(pool.warm) for pool in self._pools.values())

    async def open(self) -> None:
        """Begin with what makes starts fast; they wait for it where that is the shorter way."""
        if not self._settings.zygote or sys.platform != "linux":
            why = (
                "DEEPFLOW_ZYGOTE=0"
                if sys.platform == "linux"
                else f"{sys.platform} hands orphans to nobody"
            )
            self._log.info("zygote_off", why=why)
            return
        # What a zygote's child forks is an orphan, and comes to us: ours to wait for.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for torch in sorted({self._takes_torch(model) for model in self._settings.models}):
            pool = self._pools[torch] = Pool(self._zygote(torch))
            name = "torch" if torch else "native"
            self._service.tasks.create_task(self._keep(pool, torch), name=f"zygote-{name}")
        self._service.tasks.create_task(_bury_orphans(), name="orphans")

    async def close(self) -> None:
        """End what no TE has become of."""
        for pool in self._pools.values():
            pool.zygote.close()
            for child in pool.warm:
                child.kill()
            await pool.zygote.process.wait()
            for child in pool.warm:
                child.kill()  # one more may have come meanwhile
                await child.wait()

    async def start(self, assignment: Assignment) -> Child:
        """A process that becomes this TE. Raises OSError where there can be none."""
        since = time.monotonic()
        pool = self._pools.get(self._takes_torch(assignment.model))
        self._num_coming += 1
        try:
            child = (pool and pool.take()) or await self._make(pool)
        finally:
            self._num_coming -= 1
        self._started = {one for one in self._started if one.is_starting} | {child}
        child.assign(replace(assignment, since=time.monotonic()))
        self._log.info(
            "te_process_taken",
            process=child.process,
            pid=child.pid,
            took_ms=round((time.monotonic() - since) * 1000, 1),
        )
        return child

    async def _make(self, pool: Pool | None) -> Child:
        """A TE without a model, by fork or else by exec. Raises OSError."""
        if pool is not None:
            try:
                return await self._fork(pool.zygote)
            except OSError as error:
                self._log.warning("zygote_cannot_fork", error=str(error))
        return self._exec()

    async def _fork(self, zygote: Zygote) -> Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                pid = await zygote.fork(_TE, theirs)
        except BaseException:  # what may still come of it sees that its tie is cut, and ends
            ours.close()
            raise
        return Child(pid, ours, "fork", self._changed)

    def _exec(self) -> Child:
        ours, theirs = socket.socketpair()
        with theirs:
            pid = spawn([sys.executable, "-m", _TE], self._env, theirs.fileno())
        return Child(pid, ours, "exec", self._changed)

    # ---------------------------------------------------------------------------------------------- zygote and warm TEs

    def _zygote(self, torch: bool) -> Zygote:
        return Zygote(self._env, torch=torch, changed=self._changed)

    async def _keep(self, pool: Pool, torch: bool) -> None:
        """Have a zygote, and the pool full whenever nobody waits for a TE."""
        while not self._service.stopping.is_set():
            pool.news.clear()
            pool.warm = [child for child in pool.warm if child.running]
            if (code := pool.zygote.process.code) is not None:
                self._log.warning("zygote_died", torch=torch, reason=ending(code))
                if pool.zygote.ready_s is not None:
                    pool.num_failed = 0
                await asyncio.sleep(pool.delay_s())
                pool.zygote = self._zygote(torch)
            elif self._may_warm_up(pool):
                await self._warm_up(pool)
            else:
                await pool.news.wait()

    def _may_warm_up(self, pool: Pool) -> bool:
        wanted = len(pool.warm) < self._settings.warm_tes and pool.zygote.ready_s is not None
        is_starting = self._num_coming > 0 or any(child.is_starting for child in self._started)
        return wanted and not is_starting

    async def _warm_up(self, pool: Pool) -> None:
        try:
            child = await self._make(pool)
        except OSError as error:
            self._log.warning("no_warm_te", error=str(error))
            await asyncio.sleep(pool.delay_s())
            return
        try:
            if te := await child.name():
                self._log.info("te_warm", te=te, pid=child.pid)
                child.process = "warm"
                pool.warm.append(child)
                pool.num_failed = 0
            else:
                self._log.warning("no_warm_te", error=await child.wait())
                await asyncio.sleep(pool.delay_s())
        finally:
            if child not in pool.warm:
                child.kill()

    def _changed(self) -> None:
        """A child got ready or ended, or a zygote did."""
        for pool in self._pools.values():
            pool.news.set()

    def _takes_torch(self, model: str) -> bool:
        """Whether torch computes this model; what cannot be told is told by the TE, in full."""
        if model not in self._torch:
            try:
                folder = open_model(self._settings.cache_dir, model)
                self._torch[model] = pick_backend(folder, self._settings).kernels != "native"
            except DeepFlowError:
                return False
        return self._torch[model]


class Pool:
    """A zygote, and the warm TEs that it made."""

    def __init__(self, zygote: Zygote) -> None:
        self.zygote = zygote
        self.warm: list[Child] = []
        self.news = asyncio.Event()
        self.num_failed = 0  # zygotes and warm TEs that died, since one of these did well

    def delay_s(self) -> float:
        """How long to wait after something has died, before it is tried again."""
        self.num_failed += 1
        return min(_AGAIN_S * 2.0 ** min(self.num_failed - 1, 10), _AGAIN_MOST_S)

    def take(self) -> Child | None:
        """A warm TE, if there is one."""
        while self.warm:
            if (child := self.warm.pop(0)).running:
                self.news.set()
                return child
        return None


async def _bury_orphans() -> None:
    """Wait for those that came to us when their parents died, as an init would: a TE's executors, say. Whoever has
    children here waits for them at once, so what stays dead from look to look is nobody's."""
    seen = 0
    while True:
        await asyncio.sleep(_SWEEP_S)
        number = _dead()
        if number and number == seen:
            os.waitpid(number, os.WNOHANG)  # noqa: ASYNC222  # it has ended
        seen = number


def _dead() -> int:
    """A child that has ended and was not waited for; 0 if there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there are no children at all
        return 0
    return found.si_pid if found is not None else 0
