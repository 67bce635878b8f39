"""TEs that do not get ready: whose weights answer wrongly, and who are not wanted any more before they have loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.worker.flowserve.prepared import Place
from shared import subjects
from shared.messages import TeBeat
from shared.scaling_messages import Scaled, ScaleOrder, Target
from tests.nats_server import NatsServer
from tests.worker.peers import MODEL, Peer, Worker

pytestmark = pytest.mark.service


@pytest.fixture
def worker(nats: NatsServer, tmp_path: Path) -> Iterator[Worker]:
    """A pod host that is still to be started, of TEs that map prepared weights; patient with those that leave."""
    worker = Worker(nats.url, tmp_path / "worker", DEEPFLOW_DTYPE="w8a8", DEEPFLOW_GRACE_S="60")
    yield worker
    worker.stop()


async def loading(peer: Peer) -> TeBeat:
    """Wait for a TE that says that it loads."""
    beat: TeBeat = await peer.until(
        lambda: next((one for one in peer.beats.values() if one.state == "loading"), None)
    )
    return beat


async def test_wrong_answers_to_the_dummy_request_are_no_start(
    worker: Worker, nats: NatsServer, tmp_path: Path
) -> None:
    """Where the weights do not do what the profile says no TE gets ready, and the log names the model and the way out;
    without that profile the next one comes up."""
    async with Peer.on(nats.url) as peer:
        worker.start()
        te = await peer.ready()
        profiles = tmp_path / "worker" / "cache" / "profiles"
        await peer.until(lambda: list(profiles.glob("*.json")))
        (path,) = profiles.glob("*.json")
        raw = json.loads(path.read_bytes())
        raw["canary"]["logprobs"] = [value - 5.0 for value in raw["canary"]["logprobs"]]
        path.write_text(json.dumps(raw))
        worker.tes()[0].kill()
        await peer.until(lambda: any(down.id == te for down in peer.downs))

        def refused() -> bool:
            return any(
                f"model '{MODEL}' does not answer the dummy request" in line and path.name in line
                for line in worker.log.read_text().splitlines()
            )

        await peer.until(refused)
        assert not any(one.state == "ready" for name, one in peer.beats.items() if name != te)
        path.unlink()
        assert await peer.ready(but=te)


async def test_a_te_that_still_loads_leaves_at_once(
    worker: Worker, nats: NatsServer, tmp_path: Path
) -> None:
    """Scaled down before it is ready, it waits neither for its weights, which another holds back, nor for its grace."""
    cache = tmp_path / "worker" / "cache"
    place = Place(cache / "models" / subjects.encode(MODEL), cache)
    with place.locked():
        async with Peer.on(nats.url) as peer:
            worker.start()
            beat = await loading(peer)
            (process,) = worker.tes()
            target = Target(model=MODEL, role="colocated", num=0)
            order = ScaleOrder(by="test", term=1, targets=[target])
            await peer.bus.request(peer.bus.subjects.scale(beat.pod), order, Scaled, timeout_s=5)
            await peer.until(lambda: not worker.tes())
            assert not process.is_running()
            assert not any(one.state == "ready" for one in peer.beats.values())
