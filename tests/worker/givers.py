"""A TE that does nothing but give its weights away, and take them first if it is told from whom: a process of its own.

`python -m tests.worker.givers URL CACHE ARENA NAME RATE SOURCES...`: RATE bounds its way out, in bytes a second (0: not
at all). It prints "open" once it can be asked, then what it came to: "fork" or "here". It must not know which test it
is in.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from services.worker.forking import Forker
from services.worker.linking import Linking
from services.worker.recipe import pick_backend, recipe_digest
from services.worker.settings import TeSettings
from shared.bus import Bus
from shared.catalog import open_model
from shared.config import BusSettings
from tests.worker.peers import MODEL


@dataclass(frozen=True)
class Giver:
    """One such TE in this process. `cache` is its own: nothing in it is shared with others."""

    bus: Bus
    linking: Linking
    forker: Forker

    @classmethod
    async def open(
        cls, url: str, cache: Path, arena: Path, name: str, dtype: str = "w8a8"
    ) -> Giver:
        """On the bus, and answering."""
        env = {
            "DEEPFLOW_HOME": str(cache),
            "DEEPFLOW_CACHE": str(cache),
            "DEEPFLOW_ARENA_DIR": str(arena),
            "DEEPFLOW_TE_MODEL": MODEL,
            "DEEPFLOW_TE_POD": "pod-1",
            "DEEPFLOW_DTYPE": dtype,
        }
        folder, settings = open_model(cache, MODEL), TeSettings.load(env)
        bus = await Bus.connect(BusSettings(url=url, grace_s=1), name=name)
        linking = Linking(bus, name, fabric="127.0.0.1", directory=arena)
        backend = pick_backend(folder, settings)
        recipe = recipe_digest(folder, backend)
        giver = cls(bus, linking, Forker(bus, linking, folder, settings, backend, recipe))
        await linking.open()
        giver.forker.serve()
        await bus.flush()
        return giver

    async def close(self) -> None:
        """Give nothing any more."""
        await self.linking.close()
        await self.bus.close()


class Process:
    """One such TE in a process of its own, which can be killed."""

    def __init__(
        self, url: str, cache: Path, arena: Path, name: str, *sources: str, rate: int = 0
    ) -> None:
        command = [sys.executable, "-m", "tests.worker.givers"]
        command += [url, str(cache), str(arena), name, str(rate), *sources]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "open"

    def line(self) -> str:
        """The next thing it says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """Kill -9, once or again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


async def main(url: str, cache: str, arena: str, name: str, rate: str, *sources: str) -> None:
    """Its life."""
    giver = await Giver.open(url, Path(cache), Path(arena), name)
    giver.linking.flow.limit_egress(float(rate))
    print("open", flush=True)  # noqa: T201 - the protocol
    weights = await giver.forker.obtain(sources)
    print("fork" if weights.forked else "here", flush=True)  # noqa: T201 - the protocol
    await asyncio.to_thread(sys.stdin.read)  # the test's end is ours


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
