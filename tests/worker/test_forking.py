"""Weights from one TE to another: a real bus, real DistFlow, real prepared weights of a model without a checkpoint."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.prepared import FILE, digest_of, open_prepared, verify
from services.worker.forking import Weights
from services.worker.linking import Linking
from shared.bus import Bus
from shared.catalog import MANIFEST, models_dir, open_model
from shared.config import BusSettings
from shared.errors import InvalidRequest, NotFound
from shared.rtc_messages import WeightsFile, WeightsOffer, WeightsRequest
from tests.nats_server import NatsServer
from tests.worker.givers import Giver, Process
from tests.worker.peers import MODEL
from tests.worker.tiny import make_tiny

SLOW = 8 << 20  # bytes a second: weights of that width take about one
HIDDEN = 16384


class World:
    """Hosts without shared folders, one cache each; the first one has the checkpoint and prepared weights."""

    def __init__(self, server: NatsServer, folder: Path) -> None:
        self.url = server.url
        self.folder = folder
        self.source = make_tiny(models_dir(folder / "source") / MODEL, intermediate_size=HIDDEN)
        manifest = {"name": MODEL, "weights_digest": "tiny-0", "created": 1}
        (self.source / MANIFEST).write_text(json.dumps(manifest))
        self.whole = open_prepared(self.source, folder / "source").path.read_bytes()
        self._processes: list[Process] = []

    def cache(self, name: str, *, checkpoint: bool = False) -> Path:
        """Another host's: it knows the model, but has no weights."""
        cache = self.folder / name
        folder = cache / self.source.relative_to(self.folder / "source")
        ignored = () if checkpoint else ("*.safetensors*",)
        shutil.copytree(self.source, folder, ignore=shutil.ignore_patterns(*ignored))
        return cache

    def process(self, name: str, *sources: str, rate: int = 0) -> Process:
        """A TE of another process; without sources it is where the weights are."""
        cache = self.cache(name) if sources else self.folder / "source"
        arena = self.folder / f"arena-{name}"
        process = Process(self.url, cache, arena, name, *sources, rate=rate)
        self._processes.append(process)
        return process

    @asynccontextmanager
    async def te(self, name: str, cache: Path, dtype: str = "w8a8") -> AsyncIterator[Giver]:
        """A TE of this process, on a host of its own."""
        giver = await Giver.open(self.url, cache, self.folder / f"arena-{name}", name, dtype)
        try:
            yield giver
        finally:
            await giver.close()

    def close(self) -> None:
        for process in self._processes:
            process.kill()

    def is_whole(self, cache: Path, weights: Weights) -> bool:
        """Whether the file is in its place, bit for bit, and what was handed out is that."""
        assert weights.prepared is not None
        path = open_prepared(open_model(cache, MODEL).path, cache).path
        left = sorted(one.name for one in path.parent.iterdir())
        return (
            path.read_bytes() == self.whole
            and weights.prepared.path == path
            and verify(weights.prepared)
            and left == ["lock", "packed.json", FILE]
        )


@pytest.fixture
def world(nats: NatsServer, tmp_path: Path) -> Iterator[World]:
    with closing(World(nats, tmp_path)) as world:
        yield world


async def test_a_file_arrives_bit_for_bit(world: World) -> None:
    """A host that has neither checkpoint nor prepared weights has the source's file afterwards, and tells how far it
    is; the next TE there finds it."""
    cache, percents = world.cache("b"), list[int]()
    async with world.te("a", world.folder / "source") as a, world.te("b", cache) as b:
        assert not (await a.forker.obtain([])).forked
        a.linking.flow.limit_egress(SLOW)
        weights = await b.forker.obtain(["a"], percents.append)
        assert weights.forked
        assert world.is_whole(cache, weights)
        assert percents == sorted(percents)
        assert any(0 < percent < 100 for percent in percents)
        async with world.te("c", cache) as c:
            found = await c.forker.obtain(["a"])
            assert not found.forked
            assert found.prepared is not None


async def test_a_source_that_is_killed_is_left_for_the_next(world: World) -> None:
    """Half of it has come when the source dies: the other half comes from another one, and it is the whole."""
    first = world.process("a", rate=SLOW)
    cache = world.cache("b")
    async with world.te("z", world.folder / "source") as z, world.te("b", cache) as b:
        await z.forker.obtain([])

        def kill(percent: int) -> None:
            if percent >= 30:
                first.kill()

        weights = await b.forker.obtain(["a", "z"], kill)
        assert weights.forked
        assert world.is_whole(cache, weights)


async def test_without_any_source_the_disk_is_one(world: World) -> None:
    """The only source dies half way, or there never was one: nothing is left behind, and preparing goes its way."""
    first = world.process("a", rate=SLOW)
    cache = world.cache("b", checkpoint=True)
    async with world.te("b", cache) as b:
        weights = await b.forker.obtain(["a"], lambda percent: percent >= 30 and first.kill())
        assert weights == Weights(False, None)
        assert not list(cache.rglob("*.partial"))
        assert await b.forker.obtain(["a", "nobody", "b"]) == Weights(False, None)
    prepared = await asyncio.to_thread(open_prepared, open_model(cache, MODEL).path, cache)
    assert prepared.path.read_bytes() == world.whole


async def test_a_target_reads_from_one_that_is_still_filling(world: World) -> None:
    """Of a chain each reads from the one before it, long before that has all: three take hardly longer than one, and
    all are whole."""
    caches = [world.cache(name) for name in "bcd"]
    async with (
        world.te("a", world.folder / "source") as a,
        world.te("b", caches[0]) as b,
        world.te("c", caches[1]) as c,
        world.te("d", caches[2]) as d,
    ):
        await a.forker.obtain([])
        a.linking.flow.limit_egress(SLOW)
        come = {"b": 0, "c": 0, "d": 0}

        def seen(name: str) -> Callable[[int], None]:
            return lambda percent: come.update({name: percent})

        tasks = [
            asyncio.create_task(b.forker.obtain(["a"], seen("b"))),
            asyncio.create_task(c.forker.obtain(["b"], seen("c"))),
            asyncio.create_task(d.forker.obtain(["c"], seen("d"))),
        ]
        async with asyncio.timeout(20):
            while not come["d"]:
                await asyncio.sleep(0.01)
        assert come["b"] < 100  # the last one has something, and the first one not all
        for cache, weights in zip(caches, await asyncio.gather(*tasks), strict=True):
            assert weights.forked
            assert world.is_whole(cache, weights)


async def test_a_link_of_the_chain_is_gone_round(world: World) -> None:
    """The TE in the middle is killed while it relays: the one behind it goes on from the one before."""
    cache = world.cache("c")
    async with world.te("a", world.folder / "source") as a, world.te("c", cache) as c:
        await a.forker.obtain([])
        a.linking.flow.limit_egress(SLOW)
        middle = world.process("b", "a")

        def kill(percent: int) -> None:
            if percent >= 30:
                middle.kill()

        weights = await c.forker.obtain(["b", "a"], kill)
        assert weights.forked
        assert world.is_whole(cache, weights)


async def test_wrong_bytes_are_found_by_their_digest(world: World) -> None:
    """A source whose file was damaged since it was prepared is left, also by those behind it; another one is right."""
    damaged = world.folder / "damaged"
    shutil.copytree(world.folder / "source", damaged, copy_function=shutil.copy2)
    path = open_prepared(open_model(damaged, MODEL).path, damaged).path
    with path.open("r+b") as file:
        file.seek(len(world.whole) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    cache, other = world.cache("b"), world.cache("c")
    async with (
        world.te("a", damaged) as a,
        world.te("z", world.folder / "source") as z,
        world.te("b", cache) as b,
        world.te("c", other) as c,
    ):
        for giver in (a, z):
            await giver.forker.obtain([])
        assert await b.forker.obtain(["a"]) == Weights(False, None)
        assert not list(cache.rglob("packed*"))
        weights = await c.forker.obtain(["a", "z"])
        assert weights.forked
        assert world.is_whole(other, weights)


async def test_a_source_that_lies_is_left(world: World) -> None:
    """Bytes that hold what their source says, but are no such weights, are not taken; nor are names of other files."""
    junk = bytes(range(256)) * 4096
    async with world.te("a", world.folder / "source") as a:
        await a.forker.obtain([])
        bus = await Bus.connect(BusSettings(url=world.url, grace_s=1), name="liar")
        liar = Linking(bus, "liar", fabric="127.0.0.1", directory=world.folder / "none")
        await liar.open()
        region = liar.flow.register(junk)
        told = WeightsFile(
            name=FILE,
            num_bytes=len(junk),
            region=region.id,
            generation=region.generation,
            digest=digest_of(junk),
        )

        for number, file in enumerate((told, replace(told, name="../../../manifest.json"))):

            async def lie(_: WeightsRequest, file: WeightsFile = file) -> WeightsOffer:
                return WeightsOffer(files=[file], ttl_ms=1000)

            liar.answer(WeightsRequest, lie)
            await bus.flush()
            cache = world.cache(f"b{number}")
            async with world.te(f"b{number}", cache) as b:
                weights = await b.forker.obtain(["liar", "a"])
                assert weights.forked
                assert world.is_whole(cache, weights)
        await liar.close()
        await bus.close()


async def test_on_one_host_it_is_mapped(world: World) -> None:
    """Two TEs of a host whose caches are not the same: the file is mapped where it is, copied nowhere, and given on."""
    arena = world.folder / "arena"
    arena.mkdir(mode=0o700)
    (arena / "host").write_text("0123456789abcdef\n")
    (arena / "host").chmod(0o600)
    caches = [world.folder / "source", world.cache("b"), world.cache("c")]
    a, b, c = [
        await Giver.open(world.url, cache, arena, name)
        for name, cache in zip("abc", caches, strict=True)
    ]
    assert (await a.forker.obtain([])).prepared is not None
    for giver, cache, source in ((b, caches[1], "a"), (c, caches[2], "b")):
        weights = await giver.forker.obtain([source])
        assert weights.forked
        assert weights.prepared is not None
        wanted = open_prepared(world.source, world.folder / "source")
        for name, array in weights.prepared.arrays.items():
            assert np.array_equal(array, wanted.arrays[name])
            assert not array.flags.writeable
        assert not list(cache.rglob("packed*"))
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = {line.split()[4] for line in lines if str(world.folder) in line and FILE in line}
        assert mapped == {str(wanted.path.stat().st_ino)}  # all of them one file
    for giver in (c, b, a):
        await giver.close()


async def test_checkpoints_travel_too(world: World) -> None:
    """Where weights are computed with as they are published, their files are what comes, shards and index."""
    checkpoint = Checkpoint(world.source)
    (single,) = (file.path for file in checkpoint.files())
    names = checkpoint.files()[0].names
    for number in range(3):
        shutil.copy(single, world.source / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(names)}
    single.unlink()
    (world.source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    cache = world.cache("b")
    async with (
        world.te("a", world.folder / "source", "fp32") as a,
        world.te("b", cache, "fp32") as b,
    ):
        await a.forker.obtain([])
        assert await b.forker.obtain(["a"]) == Weights(True, None)
    folder = open_model(cache, MODEL).path
    for path in world.source.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.glob("*.partial"))


async def test_who_may_ask_for_what(world: World) -> None:
    """A TE gives its weights to those that compute the same, says so when it has none, and reads from nobody that reads
    from it."""
    cache = world.cache("b")
    async with world.te("a", world.folder / "source") as a, world.te("b", cache) as b:
        await a.forker.obtain([])
        subject = b.bus.subjects.link("a")
        asked = WeightsRequest(by="b", model=MODEL, recipe="another")
        with pytest.raises(InvalidRequest, match="other weights"):
            await b.bus.request(subject, asked, WeightsOffer, timeout_s=2)
        await b.forker.obtain([])
        asked = replace(asked, recipe=b.forker._recipe)
        with pytest.raises(NotFound, match="no weights yet"):
            await a.bus.request(a.bus.subjects.link("b"), asked, WeightsOffer, timeout_s=2)
        # Two that were told of each other, and of nobody else: neither waits for the other's bytes.
        async with world.te("c", world.cache("c")) as c:
            async with asyncio.timeout(15):
                both = await asyncio.gather(c.forker.obtain(["b"]), b.forker.obtain(["c"]))
            assert both == [Weights(False, None)] * 2
