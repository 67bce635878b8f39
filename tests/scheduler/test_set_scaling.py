"""What operators set about a model's TEs, at real Job Executors: kept, shared, asked for, and refused by name."""

from __future__ import annotations

import pytest

from shared.bus import Bus
from shared.errors import InvalidRequest, ModelNotFound
from shared.scaling_messages import PodBeat, PodModel, ScalingEntry, SetScaling
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, eventually, process, publish_model, status, wait_ready

# Somebody who could run it: of models that nobody runs or asks for no scheduler tells.
RUNS = PodModel(name=MODEL, min_tes=0, max_tes=8, te_bytes=1, weights_bytes=1)
POD = PodBeat(kind="pod", id="pod-1", host="h", models=[RUNS], max_tes=8, num_bytes=1 << 30)


async def ask(bus: Bus, model: str = MODEL, **bounds: float) -> ScalingEntry:
    """The answer of some scheduler."""
    order = SetScaling(model=model, by="me", **bounds)  # type: ignore[arg-type]
    return await bus.request(bus.subjects.scaling(model), order, ScalingEntry, timeout_s=5)


async def test_bounds_are_kept_and_every_scheduler_hears_of_them(
    nats: NatsServer, bus: Bus
) -> None:
    """Whichever scheduler is asked; a question changes nothing; what makes no sense is refused and named."""
    await publish_model(bus)
    async with process("scheduler", nats) as (_, one), process("scheduler", nats) as (_, two):
        for name in (one, two):
            await wait_ready(bus, "scheduler", name)
        assert await ask(bus) == ScalingEntry(model=MODEL)
        table = await bus.table("scaling")
        assert await table.all(ScalingEntry) == {}
        entry = await ask(bus, min_tes=1, max_tes=3)
        assert entry == ScalingEntry(model=MODEL, min_tes=1, max_tes=3)

        async def known() -> bool:
            await bus.publish(bus.subjects.beat("pod", POD.id), POD)
            bounds = []
            for name in (one, two):
                models = (await status(bus, "scheduler", name))["cluster"]["models"]
                bounds.append((models.get(MODEL, {}).get("min"), models.get(MODEL, {}).get("max")))
            return bounds == [(1, 3)] * 2

        assert await ask(bus, keep_alive_s=2.0) == ScalingEntry(
            model=MODEL, min_tes=1, max_tes=3, keep_alive_s=2.0
        )
        assert await ask(bus, max_tes=-1, min_tes=-1) == ScalingEntry(model=MODEL, keep_alive_s=2.0)
        await ask(bus, min_tes=1, max_tes=3)
        with pytest.raises(InvalidRequest) as refused:
            await ask(bus, max_tes=0)
        assert refused.value.param == "max"
        for unknown in ("nobody", "x" * 300):
            order = SetScaling(model=unknown, by="me", max_tes=3)
            with pytest.raises(ModelNotFound):
                await bus.request(bus.subjects.scaling(MODEL), order, ScalingEntry, timeout_s=5)
        # Known at once, before anybody has read of it or says that it runs it.
        await publish_model(bus, "new")
        assert (await ask(bus, "new", min_tes=1)).min_tes == 1
        assert (await ask(bus)).max_tes == 3
        await eventually(known)
