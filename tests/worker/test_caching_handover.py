"""Prefill here, decode there: two TEs on a real bus, with the arena of their host between them, or without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from shared.messages import Handover, TaskKind
from tests.nats_server import NatsServer
from tests.worker.host import LONG, PAGE, Host, counter, generate, pair, settled
from tests.worker.peers import Peer, tokens

pytestmark = pytest.mark.service


@pytest.fixture
async def host(nats: NatsServer, tmp_path: Path) -> AsyncIterator[Host]:
    """A host with a cache service, and no TE yet."""
    host = Host(nats, tmp_path)
    await host.cache.start()
    yield host
    host.stop()


async def prefill(peer: Peer, te: str, name: str, **fields: object) -> Handover:
    """Have a TE prefill a request; what it hands over."""
    fields = {"prompt": LONG, **fields}
    await peer.send(te, peer.request(name, **fields), TaskKind.PREFILL)  # type: ignore[arg-type]
    await peer.until(lambda: any(p.request == name for p in peer.prefilled))
    (prefilled,) = [p for p in peer.prefilled if p.request == name]
    await peer.until(lambda: any(end.request == name for end in peer.ended))
    (ended,) = [end for end in peer.ended if end.request == name]
    assert ended.finish == "handed"
    (delta,) = peer.deltas(name)
    assert delta.moves
    assert delta.finish is None
    handover = prefilled.handover
    assert (handover.te, handover.ids, handover.num_pages) == (te, delta.ids, len(LONG) // PAGE)
    return handover


async def decode(
    peer: Peer,
    te: str,
    name: str,
    handover: Handover,
    max_tokens: int,
    prompt: list[int] = LONG,
) -> list[int]:
    """Have a TE decode what was handed over; all tokens of the request."""
    request = peer.request(name, prompt=prompt, max_tokens=max_tokens, output=[handover.ids])
    await peer.send(te, request, TaskKind.DECODE, handover)
    await peer.end(name)
    return tokens(peer.deltas(name))


async def test_a_decode_te_goes_on_where_the_prefill_te_stopped(host: Host) -> None:
    """The tokens of a request prefilled here and decoded there are those of one served in one place."""
    async with pair(host) as (peer, one, other):
        handover = await prefill(peer, one, "a", max_tokens=12)
        moved = await decode(peer, other, "a", handover, 12)
        await peer.until(lambda: peer.beats[other].counters["fetch_hits"] == 1)
        counters = peer.beats[other].counters
        assert counters["fetched_arena"] + counters["fetched_peer"] == len(LONG) // PAGE
        whole, _ = await generate(peer, one, "whole", max_tokens=12)
        assert moved == whole


async def test_what_the_decode_te_has_already_is_let_go_at_once(host: Host) -> None:
    """Where the decode TE lacks nothing it fetches nothing, and the lease at the prefill TE ends all the same."""
    async with pair(host) as (peer, one, other):
        whole, _ = await generate(peer, other, "whole", max_tokens=12)
        handover = await prefill(peer, one, "a", max_tokens=12)
        assert (await peer.status(one, "ledger"))["leased"] > 0
        assert await decode(peer, other, "a", handover, 12) == whole
        assert peer.beats[other].counters["fetched_peer"] == 0


async def test_a_prefill_te_decodes_what_nobody_else_takes(host: Host) -> None:
    """The same TE runs the decode task of an attempt that it prefilled, without fetching or computing it again."""
    async with pair(host) as (peer, one, _):
        handover = await prefill(peer, one, "a", max_tokens=12)
        moved = await decode(peer, one, "a", handover, 12)
        assert peer.beats[one].counters["fetched_peer"] == 0
        whole, _ = await generate(peer, one, "whole", max_tokens=12)
        assert moved == whole


async def test_pages_come_from_the_peers_device_where_there_is_no_arena(
    nats: NatsServer, tmp_path: Path
) -> None:
    """Without any cache service the decode TE reads under the lease, and what was leased is free afterwards. The pool
    is so small that there is no room for another lease on the same pages."""
    host = Host(nats, tmp_path)
    try:
        async with pair(host, DEEPFLOW_KV_TOKENS="9600") as (peer, one, other):
            handover = await prefill(peer, one, "a", max_tokens=12)
            assert handover.lease
            moved = await decode(peer, other, "a", handover, 12)
            await counter(peer, other, "fetch_hits")
            assert peer.beats[other].counters["fetched_peer"] == len(LONG) // PAGE
            assert (await generate(peer, one, "whole", max_tokens=12))[0] == moved
    finally:
        for worker in host.workers:
            worker.stop()


async def test_a_prefill_te_that_died_is_done_without(nats: NatsServer, tmp_path: Path) -> None:
    """The prefill TE stops without a word, and is killed: the decode TE computes what it cannot have."""
    host = Host(nats, tmp_path)
    try:
        worker = host.worker("worker", DEEPFLOW_WORKERS="2")
        async with Peer.on(nats.url) as peer:
            one = await peer.ready()
            other = await peer.ready(but=one)
            whole, _ = await generate(peer, other, "whole", max_tokens=12)
            prompt = [7, *LONG[1:]]
            handover = await prefill(peer, one, "a", max_tokens=12, prompt=prompt)
            pid = (await peer.status(one))["pid"]
            (process,) = [te for te in worker.tes() if te.pid == pid]
            process.suspend()
            moved = await decode(peer, other, "a", handover, 12, prompt=prompt)
            process.kill()
            assert len(moved) == len(whole)
            await settled(peer, other)
            again, cached = await generate(peer, other, "again", max_tokens=12, prompt=prompt)
            assert again == moved
            assert cached == len(LONG) // PAGE * PAGE
            assert peer.beats[other].counters["fetched_peer"] == 0
    finally:
        for worker in host.workers:
            worker.stop()


async def test_split_or_not_killed_or_cancelled_the_tokens_are_the_same(host: Host) -> None:
    """Random requests over two TEs with small pools, split and whole, some cancelled: each has the tokens that it has
    in one place, as far as it got, and no block stays held."""
    random = Random(7)
    host.worker(
        "worker", DEEPFLOW_WORKERS="2", DEEPFLOW_KV_TOKENS="3072", DEEPFLOW_MAX_NUM_SEQS="8"
    )
    async with Peer.on(host.server.url) as peer:
        one = await peer.ready()
        other = await peer.ready(but=one)
        stems = [[random.randrange(3, 500) for _ in range(900)] for _ in range(3)]
        got: dict[str, tuple[list[int], int, list[int]]] = {}

        async def serve(name: str) -> None:
            stem = random.choice(stems)[: random.randrange(20, 900)]
            prompt = [*stem, *(random.randrange(3, 500) for _ in range(random.randrange(1, 60)))]
            max_tokens, first = random.randrange(2, 30), random.choice((one, other))
            request = peer.request(name, prompt=prompt, max_tokens=max_tokens)
            leaves = random.random() < 0.2
            if random.random() < 0.7:
                await peer.send(first, request, TaskKind.PREFILL)
                await peer.until(lambda: any(p.request == name for p in peer.prefilled), 60)
                (prefilled,) = [p for p in peer.prefilled if p.request == name]
                handover, second = prefilled.handover, random.choice((one, other))
                await peer.until(lambda: any(end.request == name for end in peer.ended))
                await peer.send(
                    second,
                    replace(request, output=[handover.ids]),
                    TaskKind.DECODE,
                    handover,
                )
            else:
                second = first
                await peer.send(first, request)
            if leaves:
                await asyncio.sleep(random.random() / 5)
                await peer.cancel(one, request)
                await peer.cancel(other, request)
            await peer.until(lambda: any(d.finish for d in peer.deltas(name)), 60)
            finish = peer.deltas(name)[-1].finish
            assert finish == "length" or leaves
            got[name] = prompt, max_tokens, tokens(peer.deltas(name))

        for turn in range(4):
            async with asyncio.TaskGroup() as tasks:
                for number in range(8):
                    tasks.create_task(serve(f"r{turn}-{number}"))
        for name, (prompt, max_tokens, found) in got.items():
            await peer.send(
                one, peer.request(f"{name}-whole", prompt=prompt, max_tokens=max_tokens)
            )
            whole = tokens(await peer.end(f"{name}-whole"))
            assert found == whole[: len(found)]
        assert sum(len(found) == n for _, n, found in got.values()) > len(got) / 2
        # Whether pages of so short a prompt come before it is computed is the machine's affair; they were asked for.
        assert sum(peer.beats[te].counters["fetches"] for te in (one, other)) > 0
        await settled(peer, one)
        await settled(peer, other)
