"""Several Job Executors in front of one TE that is soon full: its answer is the admission, so they need not agree."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

from shared.errors import DeepFlowError, Overloaded
from shared.messages import Accepted
from tests.nats_server import NatsServer
from tests.scheduler.players import eventually, process, status, wait_ready
from tests.worker.peers import Peer, Worker

NUM_JES = 3
ROOM = 6  # 3 in the batch and 3 that wait
LONG = 12_000


async def submit(peer: Peer, name: str, max_tokens: int) -> Accepted:
    """Asks whichever JE takes it."""
    request = peer.request(name, max_tokens=max_tokens)
    subject = peer.bus.subjects.request(request.model)
    return await peer.bus.request(subject, request, Accepted, timeout_s=5)


async def insist(peer: Peer, name: str) -> str:
    """Asks as a patient client does, until it is taken; the JE that had it taken."""
    while True:
        with contextlib.suppress(Overloaded):
            return (await submit(peer, name, max_tokens=4)).by
        await asyncio.sleep(0.05)


async def test_job_executors_together_never_overfill_a_te(nats: NatsServer, tmp_path: Path) -> None:
    """Of a burst over three JEs the TE takes as many as it has room for and no more, the others hear that it is full;
    and whatever was taken ends exactly once, whichever JE it came through."""
    env = {"DEEPFLOW_TASK_TIMEOUT_S": "2"}
    worker = Worker(
        nats.url, tmp_path / "worker", DEEPFLOW_MAX_NUM_SEQS="3", DEEPFLOW_MAX_WAITING="3"
    )
    worker.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            peer = await stack.enter_async_context(Peer.on(nats.url))
            starting = (
                stack.enter_async_context(process("scheduler", nats, **env)) for _ in range(NUM_JES)
            )
            jes = [name for _, name in await asyncio.gather(*starting)]
            te = await peer.ready()
            for je in jes:
                await wait_ready(peer.bus, "scheduler", je)

                async def knows(je: str = je) -> bool:
                    seen = await status(peer.bus, "scheduler", je)
                    states = [one["state"] for one in seen["tes"]]
                    return seen["jes"] == NUM_JES and states == ["ready"]

                await eventually(knows)

            names = [f"long-{n}" for n in range(40)]
            answers = await asyncio.gather(
                *(submit(peer, name, LONG) for name in names), return_exceptions=True
            )
            taken = {
                name: answer
                for name, answer in zip(names, answers, strict=True)
                if isinstance(answer, Accepted)
            }
            refused = [answer for answer in answers if isinstance(answer, DeepFlowError)]
            assert len(taken) == ROOM
            assert {error.code for error in refused} == {Overloaded.code}
            assert len(taken) + len(refused) == len(names)
            assert all(answer.te == te for answer in taken.values())
            for name in taken:
                await peer.cancel(te, peer.request(name))
            for name in taken:
                assert (await peer.end(name))[-1].finish == "cancelled"

            short = [f"short-{n}" for n in range(40)]
            async with asyncio.timeout(20):
                assert {*await asyncio.gather(*(insist(peer, name) for name in short))} == {*jes}
            for name in short:
                assert (await peer.end(name))[-1].finish == "length"
            await peer.freed(te)
            ends = Counter(
                delta.request for frame in peer.frames for delta in frame.deltas if delta.finish
            )
            assert ends == Counter([*taken, *short])
    finally:
        worker.stop()
