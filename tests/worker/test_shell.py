"""The TE-shell on a real bus: a pod host with one TE of a tiny model, a peer that plays gateway and job executor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.errors import InvalidRequest, NotFound, Overloaded
from shared.messages import Band, Cancel, ModelEntry, Registration, Replay, Replayed, TaskKind
from shared.rtc_messages import BlocksDump, BlocksQuery
from tests.nats_server import NatsServer
from tests.worker.peers import KV_TOKENS, MODEL, PROMPT, Peer, Worker, tokens

pytestmark = pytest.mark.service
LONG = 12_000  # tokens: more than any test waits for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One nats-server for the tests of this module, each of which leaves it as it was."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def worker(server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One pod host for the tests of this module."""
    folder: Path = tmp_path_factory.mktemp("worker")
    worker = Worker(server.url, folder, DEEPFLOW_MAX_NUM_SEQS="4", DEEPFLOW_MAX_WAITING="2")
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
async def peer(server: NatsServer, worker: Worker) -> AsyncIterator[Peer]:
    """A fresh gateway and job executor; at the end of the test no block may be in use."""
    assert worker.process is not None
    async with Peer.on(server.url) as peer:
        te = await peer.ready()
        yield peer
        peer.beating = False  # whatever a test left running goes with its client
        await peer.freed(te)


async def test_a_task_is_answered_and_streamed_to_its_end(peer: Peer) -> None:
    """A task is accepted, each step's tokens come in one numbered frame, then the end, for client and JE."""
    te = await peer.ready()
    accepted = await peer.send(te, peer.request("a1", max_tokens=12))
    assert (accepted.request, accepted.attempt, accepted.te) == ("a1", 0, te)
    deltas = await peer.end("a1")
    assert len(tokens(deltas)) == 12
    assert deltas[0].cached is not None
    assert deltas[-1].finish == "length"
    assert [frame.seq for frame in peer.frames] == list(range(1, len(peer.frames) + 1))
    assert all(frame.source == te for frame in peer.frames)
    await peer.until(lambda: peer.ended)
    (ended,) = peer.ended
    assert (ended.task, ended.finish, ended.te) == ("a1.0", "length", te)
    assert (ended.prompt_tokens, ended.output_tokens) == (len(PROMPT), 12)
    assert 0 <= ended.first_token_ms <= ended.total_ms
    await peer.until(lambda: peer.beats[te].counters["tokens_default"] >= len(PROMPT) + 12)
    assert peer.beats[te].prefill_us > 0
    assert peer.beats[te].decode_us > 0


async def test_several_streams_share_the_frames_of_a_step(peer: Peer) -> None:
    """The choices of a request and of others in the batch come in one frame per step, and each is whole."""
    te = await peer.ready()
    await peer.send(te, peer.request("b-wide", max_tokens=40, n=2))
    await peer.send(te, peer.request("b-other", max_tokens=40))
    ends = [await peer.end("b-wide", choice=0), await peer.end("b-wide", choice=1)]
    ends.append(await peer.end("b-other"))
    assert {len(tokens(deltas)) for deltas in ends} == {40}
    assert tokens(ends[0]) == tokens(ends[1]) == tokens(ends[2])  # greedy, equal prompts
    num_deltas = sum(len(frame.deltas) for frame in peer.frames)
    assert len(peer.frames) < num_deltas


async def test_a_repeated_task_runs_once(peer: Peer) -> None:
    """A task that is sent again, while it runs or after its end, is accepted again and sends nothing twice."""
    te = await peer.ready()
    request = peer.request("c1", max_tokens=30)
    first, second = await asyncio.gather(peer.send(te, request), peer.send(te, request))
    assert first == second
    assert len(tokens(await peer.end("c1"))) == 30
    assert await peer.send(te, request) == first
    await peer.send(te, peer.request("c2"))
    await peer.end("c2")
    assert len(tokens(peer.deltas("c1"))) == 30
    assert [ended.request for ended in peer.ended].count("c1") == 1


async def test_a_newer_attempt_goes_on_where_the_older_one_was(peer: Peer) -> None:
    """The next attempt, with the tokens so far, ends the older one and continues it token for token."""
    te = await peer.ready()
    await peer.send(te, peer.request("d-whole", max_tokens=24))
    whole = tokens(await peer.end("d-whole"))
    await peer.send(te, peer.request("d1", max_tokens=LONG))
    await peer.until(lambda: len(peer.deltas("d1")) >= 5)
    again = peer.request("d1", attempt=1, max_tokens=24, output=[whole[:10]])
    await peer.send(te, again)
    rest = await peer.end("d1", attempt=1)
    assert rest[0].index == 10
    assert whole[:10] + tokens(rest) == whole
    assert (await peer.end("d1", attempt=0))[-1].finish == "cancelled"
    await peer.until(lambda: len(peer.ended) == 3)


async def test_a_replay_gives_everything_from_a_position_on(peer: Peer) -> None:
    """Lost frames are sent again from the asked position, the end included; what is not known is not found."""
    te = await peer.ready()
    await peer.send(te, peer.request("e1", max_tokens=20))
    ids = tokens(await peer.end("e1"))
    subject = peer.bus.subjects.task(te)
    ask = Replay(request="e1", attempt=0, have=[5])
    replayed = await peer.bus.request(subject, ask, Replayed, timeout_s=5)
    (delta,) = replayed.deltas
    assert (delta.index, delta.ids, delta.finish) == (5, ids[5:], "length")
    unknown = Replay(request="nobody", attempt=0, have=[0])
    with pytest.raises(NotFound):
        await peer.bus.request(subject, unknown, Replayed, timeout_s=5)


async def test_what_cannot_run_is_refused_with_the_reason(peer: Peer) -> None:
    """Another model, a kind that is not served, a prompt longer than the context: refused, and nothing is owed."""
    te = await peer.ready()
    with pytest.raises(InvalidRequest, match="serves"):
        await peer.send(te, peer.request("f1", model="other"))
    with pytest.raises(InvalidRequest, match="kind"):
        await peer.send(te, peer.request("f2"), TaskKind.TRAIN)
    with pytest.raises(InvalidRequest) as refused:
        await peer.send(te, peer.request("f3", prompt=[5] * (KV_TOKENS + 1)))
    assert refused.value.param == "prompt"
    assert not peer.frames


async def test_a_full_te_says_so_at_once(peer: Peer) -> None:
    """Past its bound a TE answers overloaded with a time to come again; what it had taken goes on."""
    te = await peer.ready()
    names = [f"g{number}" for number in range(6)]
    for name in names:
        await peer.send(te, peer.request(name, max_tokens=LONG))
    with pytest.raises(Overloaded) as refused:
        await peer.send(te, peer.request("g-late"))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    await peer.until(lambda: peer.beats[te].running == 4 and peer.beats[te].waiting == 2)
    await peer.cancel(te, peer.request(names[0]))
    await peer.end(names[0])
    await peer.send(te, peer.request("g-late"))
    for name in names[1:]:
        await peer.cancel(te, peer.request(name))
    assert len(tokens(await peer.end("g-late"))) == 8


async def test_band_batch_fills_a_te_and_yields_to_whoever_comes(peer: Peer) -> None:
    """It is refused where it would wait for long; what comes in another band is taken, run at once, and ends long
    before; the beats tell how much of the work yields."""
    te = await peer.ready()
    names = [f"y{number}" for number in range(4)]
    for name in names:
        await peer.send(te, peer.request(name, max_tokens=LONG, band=Band.BATCH))
    with pytest.raises(Overloaded):
        await peer.send(te, peer.request("y-late", band=Band.BATCH))
    await peer.until(lambda: peer.beats[te].running == 4)
    assert peer.beats[te].outstanding_batch_s == peer.beats[te].outstanding_s > 0
    yields = peer.beats[te].counters["yields"]
    await peer.send(te, peer.request("y-now"))
    assert len(tokens(await peer.end("y-now"))) == 8
    assert not any(ended.request in names for ended in peer.ended)
    await peer.until(lambda: peer.beats[te].counters["yields"] == yields + 1)
    assert peer.beats[te].counters["refused_batch"] >= 1
    for name in names:
        await peer.cancel(te, peer.request(name))


async def test_a_cancel_ends_the_stream_and_frees_its_blocks(peer: Peer) -> None:
    """A cancelled request ends with `cancelled`, and nothing of it stays in the ledger; a second cancel is nothing."""
    te = await peer.ready()
    request = peer.request("h1", max_tokens=LONG)
    await peer.send(te, request)
    await peer.until(lambda: len(peer.deltas("h1")) > 10)
    ledger = await peer.status(te, "ledger")
    assert ledger["owners"]["h1#0/0"] > 0
    await peer.cancel(te, request)
    await peer.cancel(te, request)
    deltas = await peer.end("h1")
    assert deltas[-1].finish == "cancelled"
    tokens(deltas)
    ledger = await peer.freed(te)
    assert not ledger["owners"]


async def test_a_cancel_that_overtakes_its_request_ends_it(peer: Peer) -> None:
    """A request whose cancel came first is accepted or refused, but if accepted it has an end."""
    te = await peer.ready()
    request = peer.request("i1", max_tokens=LONG)
    await peer.cancel(te, request)
    await peer.send(te, request)
    deltas = await peer.end("i1")
    assert [delta.finish for delta in deltas] == ["failed"]
    await peer.until(lambda: peer.ended)


async def test_one_choice_can_be_cancelled_alone(peer: Peer) -> None:
    """Cancelling one choice leaves the others running to their own end."""
    te = await peer.ready()
    await peer.send(te, peer.request("j1", max_tokens=400, n=2))
    await peer.until(lambda: peer.deltas("j1", choice=1))
    cancel = Cancel(request="j1", attempt=0, choice=1, keep=1)
    await peer.bus.publish(peer.bus.subjects.cancel(te), cancel)
    assert (await peer.end("j1", choice=1))[-1].finish == "cancelled"
    assert len(tokens(await peer.end("j1", choice=0))) == 400


async def test_the_work_of_a_silent_client_is_dropped(peer: Peer) -> None:
    """When a gateway's beats stop, as after kill -9, its requests end and their blocks are free within five seconds."""
    te = await peer.ready()
    await asyncio.sleep(0.3)  # the TE has heard it
    await peer.send(te, peer.request("k1", max_tokens=LONG))
    await peer.until(lambda: peer.deltas("k1"))
    peer.beating = False
    await peer.freed(te, timeout_s=5)
    await peer.until(lambda: peer.ended)
    assert peer.ended[0].finish == "cancelled"


async def test_block_events_and_the_dump_agree(peer: Peer) -> None:
    """The events, applied in order to a dump, give the next dump: nothing is missing and nothing is counted twice."""
    te = await peer.ready()
    subject = peer.bus.subjects.blocks_dump(te)
    query = BlocksQuery(by="test")
    before = await peer.bus.request(subject, query, BlocksDump, timeout_s=5)
    for number in range(3):
        request = peer.request(f"l{number}", max_tokens=40, prompt=[7 + number] * 50)
        await peer.send(te, request)
        await peer.end(f"l{number}")
    after = await peer.bus.request(subject, query, BlocksDump, timeout_s=5)
    assert after.seq > before.seq
    await peer.until(lambda: peer.events and peer.events[-1].seq >= after.seq)
    index, seq = set(before.hashes), before.seq
    for event in peer.events:
        if before.seq < event.seq <= after.seq:
            assert event.seq == seq + 1
            index = (index - set(event.removed)) | set(event.stored)
            seq = event.seq
    assert seq == after.seq
    assert index == set(after.hashes)


async def test_beats_and_status_tell_the_same_story(peer: Peer) -> None:
    """A beat carries load and counters that grow with what was done; the status answer shows them to people."""
    te = await peer.ready()
    before = peer.beats[te].counters
    await peer.send(te, peer.request("m1", max_tokens=10))
    await peer.end("m1")
    await peer.until(lambda: peer.beats[te].counters["requests_length"] > before["requests_length"])
    beat = peer.beats[te]
    assert beat.counters["generation_tokens"] - before["generation_tokens"] == 10
    assert beat.blocks_total == KV_TOKENS // 16
    assert beat.progress_ms == 0
    status = await peer.status(te)
    assert (status["model"], status["state"], status["running"]) == (MODEL, "ready", 0)


async def test_model_and_instances_are_registered(peer: Peer) -> None:
    """The catalogue holds the model, the registrations its pod and its TE, with one recipe."""
    te = await peer.ready()
    entries = await (await peer.bus.table("models")).all(ModelEntry)
    found = await (await peer.bus.table("registrations")).all(Registration)
    entry = entries[MODEL]
    assert (entry.context, entry.page, entry.vocab) == (16384, 16, 512)
    assert found[te].recipe_digest == entry.recipe_digest
    assert found[te].pod == peer.beats[te].pod
    assert found[found[te].pod].kind == "pod"
