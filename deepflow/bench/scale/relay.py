"""Weights from one running TE to others: to one, to many at once, and what the source's own work loses by it.

Each node is a process with a cache folder of its own and no weights in it; nothing is shared but the bus. Links are
TCP, and each node's way out is as slow as the plan says, for a machine that plays dozens of hosts cannot move the bytes
of all their networks at once. Nodes read in a chain: each is told of the one before it. All of it goes through what TEs
use (`Forker`), from the question who has weights until their digest was found right. It must not know how that works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import statistics
import tempfile
import time
from asyncio import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final, TypeAlias

import psutil

from deepflow.bench.scale.node import Node, Obtained
from deepflow.bench.scale.plan import RelayPlan
from deepflow.cli.nats_server import NatsServer
from services.worker.flowserve.prepared import open_prepared
from services.worker.loading import takes_prepared
from services.worker.recipe import pick_backend
from services.worker.settings import TeSettings, WorkerSettings
from services.worker.weight_files import files_of
from shared.arena.place import HOST_FILE
from shared.catalog import ModelFolder, models_dir
from shared.errors import Internal, Unavailable

_REALM: Final = "bench"
_START_S: Final = 30.0
_POLL_S: Final = 0.02
_LARGE: Final = ".safetensors"
Work: TypeAlias = Callable[[Node], Coroutine[Any, Any, float]]  # -> tokens a second


async def relay(
    model: ModelFolder, cache_dir: Path, plan: RelayPlan, seed: int, advance: Callable[[], None]
) -> dict[str, float]:
    """All figures of this part. Raises DeepFlowError."""
    if takes_prepared(pick_backend(model, WorkerSettings.load({}))):
        await asyncio.to_thread(open_prepared, model.path, cache_dir)
    hosts = _Hosts(model, cache_dir, plan)
    async with hosts.open(), contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(hosts.source())
        targets = await hosts.targets(stack, plan.num_targets)
        metrics = await _broadcast(source, targets, plan, advance)
        num_bytes = hosts.weights_bytes()
        metrics |= await _alone(hosts, source, targets[0], plan, num_bytes)
        advance()
        metrics |= await _beside_work(source, targets[0], plan, Random(seed), model.vocab)
        advance()
    return metrics | {"relay_mb": num_bytes / 1e6, "relay_link_mb_s": plan.link_bytes_s / 1e6}


async def _broadcast(
    source: Node, targets: Sequence[Node], plan: RelayPlan, advance: Callable[[], None]
) -> dict[str, float]:
    """To one target and to all of them, in turns."""
    took_s: dict[int, list[float]] = {1: [], plan.num_targets: []}
    await source.join(plan.link_bytes_s)
    await source.obtain([])
    for _ in range(plan.num_rounds):
        for num in took_s:
            came = await _chain(source, targets[:num], plan.link_bytes_s)
            took_s[num].append(max(o.ended for o in came) - min(o.began for o in came))
            advance()
    await source.leave()
    one_s, all_s = (statistics.median(times) for times in took_s.values())
    return {
        "relay_1_s": one_s,
        f"relay_{plan.num_targets}_s": all_s,
        f"relay_{plan.num_targets}_vs_1": all_s / one_s,
    }


async def _chain(source: Node, targets: Sequence[Node], bytes_s: float) -> list[Obtained]:
    """Have every target take the weights from the one before it, all at once, and forget them again."""
    await asyncio.gather(*(target.join(bytes_s) for target in targets))
    names = [source.name, *(target.name for target in targets)]
    came = await asyncio.gather(
        *(target.obtain([names[number], source.name]) for number, target in enumerate(targets))
    )
    await asyncio.gather(*(target.leave() for target in targets))
    check(came, "copied")
    return came


async def _alone(
    hosts: _Hosts, source: Node, target: Node, plan: RelayPlan, num_bytes: int
) -> dict[str, float]:
    """To one target, with nothing that slows it down: from another host, and on the same one."""
    copied_s = await _fork(source, target, "copied", plan)
    async with contextlib.AsyncExitStack() as stack:
        beside = await stack.enter_async_context(hosts.source(shared=True))
        (target,) = await hosts.targets(stack, 1, shared=True)
        mapped_s = await _fork(beside, target, "mapped", plan)
    return {
        "fork_copied_s": copied_s,
        "fork_mapped_s": mapped_s,
        "fork_copied_gb_s": num_bytes / copied_s / 1e9,
    }


async def _fork(source: Node, target: Node, how: str, plan: RelayPlan) -> float:
    await source.join(0.0)
    await source.obtain([])
    times_s = []
    for _ in range(plan.num_forks):
        await target.join(0.0)
        came = await target.obtain([source.name])
        await target.leave()
        check([came], how)
        times_s.append(came.seconds)
    await source.leave()
    return statistics.median(times_s)


async def _beside_work(
    source: Node, reader: Node, plan: RelayPlan, random: Random, vocab: int
) -> dict[str, float]:
    """What a source's prefill and decode lose while others read from it, one after the other without a pause: as fast
    as a TE lets them that has requests, and without that limit. Quiet and busy rounds take turns."""
    limit_bytes_s = WorkerSettings.load({}).fork_bytes_s
    prompts = [[random.randrange(vocab) for _ in range(plan.prompt_len)] for _ in range(plan.batch)]
    works: dict[str, Work] = {
        "prefill": lambda node: node.prefill(prompts[0], plan.num_prefills),
        "decode": lambda node: node.decode(prompts, plan.output_len),
    }
    found = {"fork_limit_mb_s": limit_bytes_s / 1e6}
    for name, work in works.items():
        await work(source)  # warm
        for way, bytes_s in (("", limit_bytes_s), ("_unlimited", 0.0)):
            await source.join(0.0)
            await source.obtain([])
            ratios = []
            for _ in range(plan.num_forks):
                quiet = await work(source)
                busy = await _while_read(source, reader, work, bytes_s)
                ratios.append(quiet / busy)
            await source.leave()
            found[f"fork_slowdown_{name}{way}"] = statistics.median(ratios)
    return found


async def _while_read(source: Node, reader: Node, work: Work, bytes_s: float) -> float:
    """How fast the source works while all its weights are read, again and again."""
    await source.limit(bytes_s)
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work(source))
        tasks.create_task(_read(source, reader, working))
        speed = await working
        await source.limit(0.0)  # what is on its way need not be waited for
    return speed


async def _read(source: Node, reader: Node, working: asyncio.Task[float]) -> None:
    while not working.done():
        await reader.join(0.0)
        came = await reader.obtain([source.name])
        await reader.leave()
        check([came], "copied")


def check(came: Sequence[Obtained], how: str) -> None:
    """Raises Internal if weights came in another way than is measured."""
    for one in came:
        if one.how != how:
            raise Internal(f"weights were to be {how}, but were found {one.how}")


class _Hosts:
    """Hosts on this machine: a bus, and folders of which each belongs to one of them."""

    def __init__(self, model: ModelFolder, cache_dir: Path, plan: RelayPlan) -> None:
        self._model = model
        self._cache_dir = cache_dir
        self._plan = plan
        self._folder = Path()
        self._env: dict[str, str] = {}
        self._numbers = count(1)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """For as long as the block runs. Raises Unavailable."""
        one = sum(file.stat().st_size for file in self._model.path.glob(f"*{_LARGE}"))
        place = _tmpfs(one * (self._plan.num_targets + 1))
        with tempfile.TemporaryDirectory(prefix="deepflow-bench-", dir=place) as name:
            self._folder = Path(name)
            self._furnish()
            async with _bus(self._folder / "nats") as (server, url):
                self._env = {
                    "DEEPFLOW_HOME": name,
                    "DEEPFLOW_NATS_URL": url,
                    "DEEPFLOW_NATS_USER": "worker",
                    "DEEPFLOW_NATS_PASSWORD": server.credentials.services["worker"],
                    "DEEPFLOW_REALM": _REALM,
                    "DEEPFLOW_MODELS": self._model.name,
                    "DEEPFLOW_TE_POD": "bench",
                    "DEEPFLOW_KV_TOKENS": str(self._plan.kv_tokens),
                    "DEEPFLOW_THREADS": "1",
                    "DEEPFLOW_LOG_LEVEL": "warning",
                }
                yield

    def _furnish(self) -> None:
        (self._folder / "nats").mkdir()
        shared = self._folder / "shared"
        shared.mkdir(mode=0o700)
        descriptor = os.open(shared / HOST_FILE, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(8))

    def weights_bytes(self) -> int:
        """What one target gets. Only once they are prepared."""
        backend = pick_backend(self._model, TeSettings.load(self._env))
        held = files_of(self._model.path, self._cache_dir, backend).held()
        return sum(one.path.stat().st_size for one in held)

    @contextlib.asynccontextmanager
    async def source(self, *, shared: bool = False) -> AsyncIterator[Node]:
        """Whoever has the weights, on the host of those who are `shared`, or on none of theirs."""
        async with self._node("source", self._cache_dir, shared=shared) as node:
            yield node

    async def targets(
        self, stack: contextlib.AsyncExitStack, num: int, *, shared: bool = False
    ) -> list[Node]:
        """So many others, each with the model's small files alone in its cache folder."""
        nodes = []
        for number in range(num):
            cache_dir = self._folder / f"cache-{number}"
            folder = models_dir(cache_dir) / self._model.path.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in self._model.path.iterdir():
                if file.suffix != _LARGE:
                    shutil.copyfile(file, folder / file.name)
            node = self._node(f"target-{number}", cache_dir, shared=shared)
            nodes.append(await stack.enter_async_context(node))
        return nodes

    @contextlib.asynccontextmanager
    async def _node(self, name: str, cache_dir: Path, *, shared: bool) -> AsyncIterator[Node]:
        number = next(self._numbers)
        arena = self._folder / ("shared" if shared else f"arena-{number}")
        own = {"DEEPFLOW_CACHE": str(cache_dir), "DEEPFLOW_ARENA_DIR": str(arena)}
        async with Node.start(f"{name}-{number}", self._env | own) as node:
            yield node


@contextlib.asynccontextmanager
async def _bus(folder: Path) -> AsyncIterator[tuple[NatsServer, str]]:
    """A bus server of this bench's own, and where it listens. Raises Unavailable."""
    server = NatsServer(folder, _REALM)
    process = await asyncio.create_subprocess_exec(
        *server.command(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        give_up = time.monotonic() + _START_S
        while (url := server.url()) is None:
            if time.monotonic() > give_up:
                raise Unavailable(f"nats-server did not start within {_START_S:g} s")
            await asyncio.sleep(_POLL_S)
        yield server, url
    finally:
        process.terminate()
        await process.wait()


def _tmpfs(num_bytes: int) -> str | None:
    """Where files are memory, if there is room for so many bytes: there the disk's speed is nobody's."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        return None
    room = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available)
    return str(memory) if 1.5 * num_bytes < room else None
