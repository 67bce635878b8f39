"""One host's end of a fork, both ends of the pipe: what a TE does to take weights and to give them, in a process alone.

`Forker` and `Linking` are the TE's own, on a real bus; a source may have an engine to work with while it gives. It must
not know who reads from whom, or what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import uvloop

from deepflow.bench.child import Child, conversation

if TYPE_CHECKING:
    from deepflow.bench.engine.drive import Driver
    from services.worker.flowserve.backend import Backend
    from services.worker.forking import Forker, Weights
    from services.worker.linking import Linking
    from services.worker.settings import TeSettings
    from shared.bus import Bus
    from shared.catalog import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Obtained:
    """Weights that came, between two moments of this machine's clock. `how`: here | mapped | copied | disk."""

    began: float
    ended: float
    how: str

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.ended - self.began


class Node:
    """The parent's end; make it with `start`. `name` is what others know it by, from `join` to `leave`."""

    def __init__(self, child: Child, name: str) -> None:
        self.name = name
        self._child = child
        self._names = (f"{name}-{number}" for number in count(1))

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, name: str, env: Mapping[str, str]) -> AsyncIterator[Node]:
        """A process with these `DEEPFLOW_*` variables (a TE's), for as long as the block runs. Raises Unavailable."""
        async with Child.start(__name__, f"node {name} of the relay", env) as child:
            yield cls(child, name)

    async def join(self, bytes_s: float) -> None:
        """Answer on the bus, by a new name, and hand out no more than so many bytes a second (0: as many as can be)."""
        self.name = next(self._names)
        await self._child.ask({"join": self.name, "bytes_s": bytes_s})

    async def limit(self, bytes_s: float) -> None:
        """From now on, hand out no more than so many bytes a second; 0: as many as can be."""
        await self._child.ask({"limit": bytes_s})

    async def obtain(self, sources: Sequence[str]) -> Obtained:
        """Have the weights, from these if they are not here."""
        return Obtained(**await self._child.ask({"obtain": list(sources)}))

    async def leave(self) -> None:
        """Leave the bus, and forget the weights that came."""
        await self._child.ask({"leave": True})

    async def prefill(self, prompt: Sequence[int], num: int) -> float:
        """Tokens a second over so many prompts, one after the other."""
        answer = await self._child.ask({"prefill": list(prompt), "num": num})
        return float(answer["tokens_s"])

    async def decode(self, prompts: Sequence[Sequence[int]], output_len: int) -> float:
        """Tokens a second of a batch, each of whose sequences decodes so many."""
        question = {"decode": [list(prompt) for prompt in prompts], "output_len": output_len}
        return float((await self._child.ask(question))["tokens_s"])


# ----------------------------------------------------------------------------------------------------- the child's end


class _Host:
    """What is at work in this process."""

    def __init__(
        self, folder: ModelFolder, settings: TeSettings, backend: Backend, recipe: str
    ) -> None:
        self._bus: Bus | None = (
            None  # one for each stay: what it serves is held by it, weights and all
        )
        self._folder = folder
        self._settings = settings
        self._backend = backend
        self._recipe = recipe
        self._linking: Linking | None = None
        self._forker: Forker | None = None
        self._driver: Driver | None = None
        self._came: Weights | None = None

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a question of the parent asks for."""
        if "join" in question:
            return await self._join(question["join"], question["bytes_s"])
        if "limit" in question:
            assert self._linking is not None
            self._linking.flow.limit_egress(question["limit"])
            return {}
        if "obtain" in question:
            return await self._obtain(question["obtain"])
        if "leave" in question:
            return await self.leave()
        return await asyncio.to_thread(self._work, question)

    async def _join(self, name: str, bytes_s: float) -> dict[str, Any]:
        from services.worker.forking import Forker
        from services.worker.linking import Linking
        from shared.bus import Bus

        settings = self._settings
        self._bus = await Bus.connect(settings.bus, name=name, inbox="te")
        self._linking = Linking(
            self._bus, name, fabric=settings.fabric, directory=settings.arena_dir
        )
        self._linking.flow.limit_egress(bytes_s)
        await self._linking.open()
        self._forker = Forker(
            self._bus, self._linking, self._folder, settings, self._backend, self._recipe
        )
        self._forker.serve()
        await self._bus.flush()
        return {}

    async def _obtain(self, sources: list[str]) -> dict[str, Any]:
        assert self._forker is not None
        began = time.monotonic()
        came = self._came = await self._forker.obtain(sources)
        ended = time.monotonic()
        how = "disk" if came.prepared is None else "here"
        if came.forked:
            is_mine = came.prepared is None or came.prepared.path.exists()
            how = "copied" if is_mine else "mapped"
        return {"began": began, "ended": ended, "how": how}

    async def leave(self) -> dict[str, Any]:
        """Also what is done at the end."""
        forked = self._came is not None and self._came.forked
        self._forker = self._came = None
        if self._linking is not None:
            await self._linking.close()
            self._linking = None
        if self._bus is not None:
            await self._bus.close()
            self._bus = None
        gc.collect()  # what came is mapped by objects that know each other
        if forked:
            rmtree(self._settings.cache_dir / "prepared", ignore_errors=True)
        return {}

    def _work(self, question: dict[str, Any]) -> dict[str, Any]:
        """In a thread beside the event loop, as a TE's engine."""
        driver = self._driver = self._driver or self._make()
        if "prefill" in question:
            runs = [driver.prefill(question["prefill"]) for _ in range(question["num"])]
            num_tokens = sum(run.num_tokens for run in runs)
            return {"tokens_s": num_tokens / sum(run.seconds for run in runs)}
        length = question["output_len"]
        run = driver.decode(question["decode"], length, 2 * length)
        return {"tokens_s": run.num_tokens / run.seconds}

    def _make(self) -> Driver:
        from deepflow.bench.engine.drive import Driver
        from deepflow.bench.engine.profile import Clocks
        from services.worker.loading import make_engine

        engine = make_engine(self._folder, self._settings)
        return Driver(engine, Clocks(engine))


async def _serve() -> None:
    from services.worker.recipe import pick_backend, recipe_digest
    from services.worker.settings import TeSettings
    from shared.catalog import open_model

    settings = TeSettings.load(os.environ)
    folder = open_model(settings.cache_dir, settings.models[0], text=False)
    backend = pick_backend(folder, settings)
    host = _Host(folder, settings, backend, recipe_digest(folder, backend))
    with conversation() as (questions, answer):
        while (question := await asyncio.to_thread(next, questions, None)) is not None:
            answer(await host.answer(question))
        await host.leave()


if __name__ == "__main__":
    uvloop.run(_serve())
