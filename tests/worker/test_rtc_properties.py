"""Two engines that fetch from one store, copy to it, lease and hand over, under random loads: no token changes, and no
block is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import View
from services.worker.flowserve.outcome import Want
from services.worker.flowserve.rtc.promise import Lease
from shared.messages import Band, Cancel, Delta, Keep, Request
from tests.worker.arithmetic import ArithmeticDecoder, ArithmeticPipeline
from tests.worker.bench import PROMPT, Bench, request
from tests.worker.courier import Courier, StagedDecoder, handover_of, held

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3},
]


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and when it is cancelled, if it is. `splits`: it is handed over after a token."""

    step: int
    prompt_length: int
    prompt_start: int
    max_tokens: int
    n: int
    kind: int
    cancel_after: int | None
    splits: bool
    keeps: bool
    band: Band
    tenant: str

    def request(self, name: str) -> Request:
        prompt = PROMPT[20 * self.prompt_start :][: self.prompt_length]
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "n": 1 if self.splits else self.n}
        keep = Keep(id=f"k{self.prompt_start}", ttl_ms=5000) if self.keeps else None
        fields |= {"seed": self.kind, "ignore_eos": False, **KINDS[self.kind]}
        fields |= {"band": self.band, "tenant": self.tenant}
        return replace(request(name, prompt, deadline_ms=10**7, **fields), keep=keep)


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 25),
    prompt_length=st.integers(1, 50),
    prompt_start=st.integers(0, 1),
    max_tokens=st.integers(1, 40),
    n=st.integers(1, 3),
    kind=st.integers(0, len(KINDS) - 1),
    cancel_after=st.none() | st.integers(0, 20),
    splits=st.booleans(),
    keeps=st.booleans(),
    band=st.sampled_from([Band.DEFAULT, Band.BATCH, *Band]),
    tenant=st.sampled_from("aab"),
)


class Town:
    """The engines, their store, and a shell that does at random, sooner or later, whatever a shell may do."""

    def __init__(self, couriers: list[Courier], random: Random) -> None:
        self.couriers = couriers
        self.random = random
        self.store = couriers[0].store
        self.num_steps = 0
        self.due: list[tuple[int, Callable[[], object]]] = []
        self.requests: dict[str, Request] = {}
        for other in couriers[1:]:  # one client hears them all
            other.ids, other.logprobs, other.ends = (
                couriers[0].ids,
                couriers[0].logprobs,
                couriers[0].ends,
            )

    def later(self, act: Callable[[], object]) -> None:
        self.due.append((self.num_steps + self.random.choice([0, 0, 1, 2, 7]), act))

    def step(self) -> None:
        self.num_steps += 1
        for when, act in self.due.copy():
            if when <= self.num_steps:
                self.due.remove((when, act))
                act()
        for courier in self.couriers:
            courier.now += 0.2
            if courier.engine.has_work():
                courier.step()
            for want in courier.wants:
                self.answer(courier, want)
            for handed in courier.handed:
                self.later(lambda h=handed: self.go_on(h))  # type: ignore[misc]
            courier.wants, courier.handed = [], []
        if self.random.random() < 0.3:
            self.copy(self.random.choice(self.couriers))
        if self.random.random() < 0.2:
            self.lease(self.random.choice(self.couriers))
        if self.store and self.random.random() < 0.1:
            self.store.pop(self.random.choice(list(self.store)), None)

    def rest(self) -> None:
        """Nothing is due: what has to happen, happens in the other threads."""
        if not self.due and not any(courier.engine.has_work() for courier in self.couriers):
            assert any(courier.woken.acquire(timeout=5) for courier in self.couriers), "stuck"

    def answer(self, courier: Courier, want: Want, start: int = 0) -> None:
        """Bring the next few pages, or say that nothing more comes; one after the other, as a shell does."""

        def act() -> None:
            if start < len(want.hashes) and self.random.random() < 0.8:
                length = self.random.randint(1, len(want.hashes) - start)
                courier.populate(want, courier.load_of(want, start), length)
                self.answer(courier, want, start + length)
            else:
                courier.ready(want)

        self.later(act)

    def go_on(self, handed: Any) -> None:
        """On the other engine, or on the same, and after a cancel that overtook it on none."""
        asked = self.requests[handed.request]
        if (asked.request, 0) not in self.couriers[0].ends:
            courier = self.random.choice(self.couriers)
            given = replace(asked, output=[handed.ids], keep=None)
            courier.engine.submit(given, handover=handover_of(handed))

    def copy(self, courier: Courier) -> None:
        index = courier.engine.index_snapshot()
        self.random.shuffle(index)

        def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
            for page_hash, view in pages:
                assert self.store.setdefault(page_hash, bytes(view)) == bytes(view)
            return [page_hash for page_hash, _ in pages]

        courier.engine.copy_out(index[: self.random.randint(1, 6)], save)

    def lease(self, courier: Courier) -> None:
        if not self.requests:
            return
        asked = self.random.choice(list(self.requests.values()))
        lease = courier.engine.lease(asked.hashes, "peer", self.random.choice([0.5, 3]))
        if lease is not None:
            before = self.read(courier, lease)
            self.later(lambda: self.release(courier, lease, before))

    def read(self, courier: Courier, lease: Lease) -> list[bytes]:
        data = courier.engine.decoder.read_blocks(lease.blocks)  # type: ignore[attr-defined]
        return [row.tobytes() for row in data]

    def release(self, courier: Courier, lease: Lease, before: list[bytes]) -> None:
        read = self.read(courier, lease)
        if courier.engine.release(lease.id):
            assert read == before


@pytest.fixture(scope="module")
def truths() -> dict[Any, Bench]:
    """What each request brings alone, with nothing moved; filled as it is asked for."""
    return {}


@settings(max_examples=60, deadline=None)
@given(
    load=st.lists(arrivals, min_size=1, max_size=7),
    sizes=st.tuples(st.integers(6, 14), st.integers(6, 30)),
    kinds=st.tuples(*[st.sampled_from(["addressed", "staged", "pipeline"])] * 2),
    asynchronous=st.booleans(),
    speculation=st.sampled_from([0, 4]),
    max_num_seqs=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
)
def test_no_traffic_changes_a_token_or_loses_a_block(
    load: list[Arrival],
    sizes: tuple[int, int],
    kinds: tuple[str, str],
    asynchronous: bool,
    speculation: int,
    max_num_seqs: int,
    seed: int,
    tiny_config: ModelConfig,
    truths: dict[Any, Bench],
) -> None:
    """In pools far too small, with bands, fetches, copies, leases, hand-overs and named caches at any time: every
    choice has the tokens and logprobs it has alone, pages read under a lease that held are what they were, the ledger
    balances after each step, and in the end nobody holds anything."""
    store: dict[bytes, bytes] = {}
    couriers = []
    # Pages of a pipeline have as many layers as it has stages: then both are of two layers.
    num_layers = 2 if "pipeline" in kinds else 1
    for size, kind in zip(sizes, kinds, strict=True):
        decoder: ArithmeticDecoder
        if kind == "pipeline":
            decoder = ArithmeticPipeline(tiny_config, habit=6, num_stages=2)
        else:
            made = StagedDecoder if kind == "staged" else ArithmeticDecoder
            decoder = made(tiny_config, habit=6, num_layers=num_layers)
        limits = {"max_num_seqs": max_num_seqs, "max_batched_tokens": max_num_seqs + 20}
        limits |= {"asynchronous": asynchronous, "speculation": speculation}
        couriers.append(Courier(decoder, store, num_blocks=size, **limits))
    town = Town(couriers, Random(seed))
    first = couriers[0]
    keys = [(str(number), choice) for number, one in enumerate(load) for choice in range(one.n)]
    keys = [key for key in keys if key[1] == 0 or not load[int(key[0])].splits]
    while not all(key in first.ends for key in keys) or town.due:
        for number, one in enumerate(load):
            name = str(number)
            if one.step == town.num_steps:
                town.requests[name] = one.request(name)
                first.engine.submit(town.requests[name], prefill_only=one.splits)
            if one.cancel_after is not None and one.step + one.cancel_after == town.num_steps:
                ends = [
                    d for c in couriers for _, d in c.engine.cancel(Cancel(request=name, attempt=0))
                ]
                for delta in ends:
                    first.take(delta)
                if one.splits and not ends and (name, 0) not in first.ends:
                    first.ends[name, 0] = _cancelled(name)  # between the two
        town.step()
        assert town.num_steps < 5000, "does not end"
        if town.num_steps > 50:
            town.rest()
    for courier in couriers:
        courier.now += 100
        courier.step()
        courier.engine.close()
        courier.step()
        assert held(courier.engine) == 0
        assert courier.errors == []
    for number, one in enumerate(load):
        alone = _alone(one, num_layers, tiny_config, truths)
        for choice in range(1 if one.splits else one.n):
            key = str(number), choice
            whole, got, end = alone.ids["r", choice], first.ids[key], first.ends[key]
            assert alone.logprobs["r", choice][: len(got)] == first.logprobs[key]
            expected = whole[: len(got)] if end.finish == "cancelled" else whole
            assert (key, end.finish, got) == (key, end.finish, expected)


def _cancelled(name: str) -> Delta:
    return Delta(request=name, attempt=0, choice=0, index=0, ids=[], finish="cancelled")


def _alone(one: Arrival, num_layers: int, config: ModelConfig, truths: dict[Any, Bench]) -> Bench:
    key = replace(one, step=0, cancel_after=None, keeps=False), num_layers
    if key not in truths:
        decoder = ArithmeticDecoder(config, habit=6, num_layers=num_layers)
        truths[key] = Bench(decoder, max_num_seqs=1)
        truths[key].submit(one.request("r"))
        truths[key].run()
    return truths[key]
