"""The engine's thread, with a real engine over a tiny model and an event loop beside it, but no bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.worker.flowserve.engine import Engine
from services.worker.loading import make_engine
from services.worker.loop import EngineLoop, Report
from services.worker.pulse import Pulse
from services.worker.settings import TeSettings
from shared.catalog import open_model
from shared.errors import NotFound, Unavailable
from shared.messages import Cancel, Replay, Request, Sampling
from tests.worker.peers import MODEL, make_model


def make_request(name: str, max_tokens: int) -> Request:
    return Request(
        request=name,
        attempt=0,
        client="gateway-1",
        model=MODEL,
        tenant="t",
        prompt=list(range(3, 40)),
        root=b"",
        hashes=[],
        sampling=Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True),
        deadline_ms=60_000,
        park_ms=0,
    )


class Side:
    """The shell's side: an engine loop and what it delivered."""

    def __init__(self, cache: Path, asynchronous: bool = False) -> None:
        env = {
            "DEEPFLOW_TE_MODEL": MODEL,
            "DEEPFLOW_TE_POD": "pod-1",
            "DEEPFLOW_DTYPE": "fp32",
            "DEEPFLOW_KV_TOKENS": "4096",
            "DEEPFLOW_THREADS": "1",
            "DEEPFLOW_ASYNC": str(int(asynchronous)),
        }
        folder, settings = open_model(cache, MODEL), TeSettings.load(env)
        self.reports: list[Report] = []
        self.news = asyncio.Event()
        self.pulse = Pulse()
        self.loop = EngineLoop(lambda _: make_engine(folder, settings), self._deliver, self.pulse)

    def _deliver(self, report: Report) -> None:
        self.reports.append(report)
        self.news.set()

    def submit(self, name: str, max_tokens: int) -> None:
        self.loop.post(lambda engine, _: engine.submit(make_request(name, max_tokens)))

    async def end(self, name: str) -> str:
        """Wait for the end of a request; how it ended."""
        async with asyncio.timeout(20):
            while True:
                for report in self.reports:
                    for ended in report.ended:
                        if ended.request == name:
                            return ended.finish
                self.news.clear()
                await self.news.wait()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
async def side(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    """A loop whose engine is ready; it is stopped, and its ledger balanced, at the end."""
    make_model(tmp_path)
    side = Side(tmp_path, request.param)
    side.loop.start()
    engine: Engine = await side.loop.ready
    yield side
    await side.loop.stop()
    await side.loop.watch()
    engine.check()
    assert engine.ledger()["live"] == 0


async def test_what_is_posted_is_done_and_reported_step_by_step(side: Side) -> None:
    """A submitted request comes back as one delta per step, in order, and the warm-up left nothing in the index."""
    assert await side.loop.ask(lambda engine, seq: (engine.index_snapshot(), seq)) == ([], 0)
    side.submit("a", 13)
    assert await side.end("a") == "length"
    indexes = [delta.index for report in side.reports for _, delta in report.deltas]
    assert indexes == list(range(13))
    assert [report.seq for report in side.reports if report.stored] == [1, 2]  # prompt, then output


async def test_a_cancel_takes_effect_in_the_next_report(side: Side) -> None:
    """The report that carries the end of a cancelled request shows its blocks as free already."""
    side.submit("a", 3000)
    side.news.clear()
    await side.news.wait()
    assert side.pulse.age_s(asyncio.get_running_loop().time()) < 10
    side.loop.post(
        lambda engine, report: report.deltas.extend(engine.cancel(Cancel(request="a", attempt=0)))
    )
    assert await side.end("a") == "cancelled"
    last = next(report for report in side.reports if report.ended)
    assert last.ledger["live"] == 0
    assert [delta.finish for _, delta in last.deltas][-1:] == ["cancelled"]


async def test_a_question_is_answered_in_the_middle_of_work_and_its_error_comes_back(
    side: Side,
) -> None:
    """A question asked while the engine works is answered after a step; what it raises is raised to who asked."""
    side.submit("a", 3000)
    replay = Replay(request="nobody", attempt=0, have=[0])
    with pytest.raises(NotFound):
        await side.loop.ask(lambda engine, _: engine.replay(replay))
    assert await side.loop.ask(lambda engine, _: engine.load().running) == 1
    side.loop.post(lambda engine, _: engine.cancel_client("gateway-1"))
    assert await side.end("a") == "cancelled"


async def test_an_idle_engine_reports_nothing_and_has_no_age(side: Side) -> None:
    """Without work the thread sleeps: no report comes, and the pulse shows no age."""
    side.submit("a", 3)
    await side.end("a")
    before = len(side.reports)
    await asyncio.sleep(0.3)
    assert len(side.reports) == before
    assert side.pulse.age_s(0.0) == 0.0


async def test_a_failed_load_ends_the_loop_with_its_error(tmp_path: Path) -> None:
    """What goes wrong while loading is raised to the watcher, and nobody waits for an answer for ever."""
    make_model(tmp_path)
    side = Side(tmp_path)
    (open_model(tmp_path, MODEL).path / "model.safetensors").unlink()
    asked = asyncio.ensure_future(side.loop.ask(lambda engine, _: engine.load()))
    side.loop.start()
    with pytest.raises(Exception, match="safetensors"):
        await side.loop.watch()
    with pytest.raises(Unavailable):
        await asked
    with pytest.raises(Unavailable):
        await side.loop.ask(lambda engine, _: engine.load())


async def test_an_error_outside_the_steps_care_ends_the_loop(tmp_path: Path) -> None:
    """An error that no step answers for ends the thread, and the watcher raises it: a TE rather dies than lies."""
    make_model(tmp_path)
    side = Side(tmp_path)
    side.loop.start()
    await side.loop.ready
    side.loop.post(lambda engine, _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        await side.loop.watch()
