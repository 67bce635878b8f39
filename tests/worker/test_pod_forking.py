"""A pod host on a machine without weights: its TE takes them from a TE of another machine, as its order says."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.catalog import open_model
from shared.scaling_messages import PodBeat, Scaled, ScaleOrder, Target
from tests.nats_server import NatsServer
from tests.worker.peers import MODEL, Peer, Worker, tokens

pytestmark = pytest.mark.service


def start(nats: NatsServer, folder: Path, workers: str) -> Worker:
    """A pod host on a machine of its own: no folder is another's."""
    worker = Worker(
        nats.url,
        folder,
        DEEPFLOW_DTYPE="w8a8",
        DEEPFLOW_KV_TOKENS="2048",
        DEEPFLOW_WORKERS=workers,
        DEEPFLOW_ARENA_DIR=str(folder / "arena"),
    )
    if workers.startswith("0"):
        for file in open_model(folder / "cache", MODEL).path.glob("*.safetensors"):
            file.unlink()
    worker.start()
    return worker


async def test_weights_come_from_another_host(nats: NatsServer, tmp_path: Path) -> None:
    """The TE that has neither checkpoint nor prepared weights answers as the one it took them from, and its start says
    so."""
    workers = [start(nats, tmp_path / "a", "1"), start(nats, tmp_path / "b", "0..1")]
    try:
        async with Peer.on(nats.url) as peer:
            pods: dict[str, PodBeat] = {}
            hear = peer._hear(lambda beat: pods.update({beat.id: beat}))
            await peer.bus.listen(peer.bus.subjects.beat("pod", "*"), (PodBeat,), hear)
            source = await peer.ready()
            (pod,) = await peer.until(
                lambda: [pod for pod, beat in pods.items() if not beat.tes and len(pods) == 2]
            )
            target = Target(model=MODEL, role="colocated", num=1, sources=[source])
            order = ScaleOrder(by="scheduler-1", term=1, targets=[target])
            subject = peer.bus.subjects.scale(pod)
            await peer.bus.request(subject, order, Scaled, timeout_s=5)
            te = await peer.ready(but=source)
            (begun,) = await peer.until(lambda: pods[pod].starts)
            assert (begun.te, begun.weights) == (te, "fork")
            for name, by in (("x", source), ("y", te)):
                await peer.send(by, peer.request(name))
            assert tokens(await peer.end("x")) == tokens(await peer.end("y"))
    finally:
        for worker in workers:
            worker.stop()
