"""Pages that are copied out, leased, handed over and kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import View
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.handover import LEASE_S
from shared import errors
from shared.messages import Cancel, Keep, Replay
from tests.worker.arithmetic import ArithmeticDecoder, ArithmeticPipeline
from tests.worker.bench import PROMPT, Bench, request
from tests.worker.courier import Courier, StagedDecoder, handover_of, held

pytestmark = pytest.mark.usefixtures("mode")


@pytest.fixture(params=["addressed", "staged", "pipeline"])
def decoder(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ArithmeticDecoder:
    if request.param == "pipeline":
        return ArithmeticPipeline(tiny_config, num_stages=3)
    kinds = {"addressed": ArithmeticDecoder, "staged": StagedDecoder}
    return kinds[request.param](tiny_config)


@pytest.fixture
def courier(decoder: ArithmeticDecoder) -> Iterator[Courier]:
    courier = Courier(decoder)
    yield courier
    courier.close()


def compute(courier: Courier, *requests: Any) -> None:
    """Without any help."""
    courier.submit(*requests)
    while not all((one.request, 0) in courier.ends for one in requests):
        while courier.wants:
            courier.ready(courier.wants.pop())
        courier.step_or_wait()


def bytes_of(engine: Engine, block: int) -> bytes:
    memory, size = engine.memory(), engine.page_bytes
    assert memory is not None
    return bytes(memory[block * size : (block + 1) * size])


# -------------------------------------------------------------------------------------------------------- copied out


def test_pages_are_copied_out_while_steps_go_on(courier: Courier) -> None:
    """What is saved is what the device has, page by page; unknown pages are left out."""
    compute(courier, request(max_tokens=1))
    seen: list[list[bytes]] = []
    done = threading.Event()

    def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
        seen.append([page_hash for page_hash, _ in pages])
        courier.store |= {page_hash: bytes(view) for page_hash, view in pages}
        done.set()
        return seen[-1]

    courier.submit(request("other", PROMPT[::-1]))
    courier.engine.copy_out([b"unknown", *request().hashes], save)
    while courier.wants or ("other", 0) not in courier.ends:
        while courier.wants:
            courier.ready(courier.wants.pop())
        courier.step_or_wait()
    courier.settle(done)
    assert seen == [request().hashes]
    other = Courier(courier.engine.decoder, courier.store)
    other.submit(request())
    want = other.want()
    other.populate(want, other.load_of(want))
    other.finish("r")
    assert other.cached["r"] == 64
    other.close()


def test_a_page_is_not_copied_twice_at_a_time(courier: Courier) -> None:
    """A second call leaves out what is under way, and is answered all the same."""
    compute(courier, request(max_tokens=1))
    gate, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
        assert gate.wait(10)
        seen.append(len(pages))
        if len(seen) == 2:
            done.set()
        return []

    courier.engine.copy_out(request().hashes, save)
    courier.engine.copy_out(request().hashes, save)
    gate.set()
    courier.settle(done)
    assert sorted(seen) == [0, 4]


def test_a_copy_that_raises_holds_nothing(courier: Courier) -> None:
    """The fault is reported, and the pages are free to be evicted again."""
    compute(courier, request(max_tokens=1))

    def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
        raise OSError("no space")

    courier.engine.copy_out(request().hashes, save)
    while not courier.errors:
        courier.step_or_wait()
    assert held(courier.engine) == 0


def test_what_is_being_copied_out_is_not_overwritten(tiny_config: ModelConfig) -> None:
    """In a pool that is full of pages being copied, the oldest request waits for the end of that, and is not preempted;
    the pages are saved as they were."""
    courier = Courier(ArithmeticDecoder(tiny_config), num_blocks=8)
    compute(courier, request(max_tokens=1))
    gate, done = threading.Event(), threading.Event()

    def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
        before = [bytes(view) for _, view in pages]
        assert gate.wait(10)
        assert [bytes(view) for _, view in pages] == before
        done.set()
        return []

    courier.engine.copy_out(request().hashes, save)
    courier.submit(request("long", [9, 8, 7], max_tokens=100))
    while courier.engine.has_work():
        courier.step()
    assert ("long", 0) not in courier.ends
    assert courier.engine.counters["preemptions"] == 0
    gate.set()
    courier.settle(done)
    courier.finish("long")
    assert courier.ends["long", 0].finish == "length"
    assert courier.engine.counters["preemptions"] == 0
    courier.close()


# ------------------------------------------------------------------------------------------------------------ leased


def test_a_lease_keeps_pages_from_eviction_until_it_ends(courier: Courier) -> None:
    """Blocks of a lease stay what they are; its end tells that it held, and then they may go."""
    compute(courier, request(max_tokens=1))
    lease = courier.engine.lease([*request().hashes, b"unknown"], "peer", 10)
    assert lease is not None
    assert courier.engine.leased(lease.id) is lease
    assert len(lease.blocks) == held(courier.engine, ["leased"]) == 4
    compute(courier, *[request(str(n), [n + 3, *PROMPT], max_tokens=9) for n in range(30)])
    assert courier.engine.release(lease.id)
    assert courier.engine.leased(lease.id) is None
    assert not courier.engine.release(lease.id)
    assert courier.engine.lease([b"unknown"], "peer", 10) is None


def test_a_lease_ends_by_itself(courier: Courier) -> None:
    """Past its time it does not hold, whoever believes it."""
    compute(courier, request(max_tokens=1))
    lease = courier.engine.lease(request().hashes, "peer", 10)
    assert lease is not None
    courier.now += 11
    courier.step()
    assert not courier.engine.release(lease.id)
    assert held(courier.engine) == 0


def test_a_lease_gives_way_to_a_request_that_needs_the_room(tiny_config: ModelConfig) -> None:
    """Whoever holds it learns that what it read may be something else by now."""
    courier = Courier(ArithmeticDecoder(tiny_config), num_blocks=8)
    compute(courier, request(max_tokens=1))
    lease = courier.engine.lease(request().hashes, "peer", 1000)
    assert lease is not None
    before = [bytes_of(courier.engine, block) for block in lease.blocks]
    compute(courier, request("small", [4, 5], max_tokens=50))
    assert [bytes_of(courier.engine, block) for block in lease.blocks] == before
    compute(courier, request("large", [5, 4], max_tokens=120))
    assert not courier.engine.release(lease.id)
    assert courier.engine.counters["leases_broken"] == 1
    courier.close()


# ------------------------------------------------------------------------------------------------------- handed over


@pytest.fixture
def truth(decoder: ArithmeticDecoder) -> Bench:
    bench = Bench(decoder)
    bench.submit(request(logprobs=1))
    bench.run()
    return bench


def prefill(courier: Courier) -> None:
    courier.engine.submit(request(logprobs=1), prefill_only=True)
    while not courier.handed:
        while courier.wants:
            courier.ready(courier.wants.pop())
        courier.step_or_wait()


def test_a_request_is_handed_over_after_its_first_token(
    courier: Courier, truth: Bench, decoder: ArithmeticDecoder
) -> None:
    """The first TE leases its pages and gives one token without an end, the second goes on from there: together they
    give what one gives alone, and each can be asked again for what it gave."""
    prefill(courier)
    (handed,) = courier.handed
    assert courier.finishes["r"] == "handed"
    assert not courier.ends
    assert courier.tokens() == truth.tokens()[:1]
    assert (handed.ids, handed.num_pages, handed.cached) == (courier.tokens(), 4, 0)
    assert courier.engine.leased(handed.lease) is not None
    assert held(courier.engine) == 4
    (again,) = courier.engine.replay(Replay(request="r", attempt=0, have=[0]))
    assert (again.ids, again.finish, again.moves) == (handed.ids, None, True)

    courier.save_all()
    first, second = courier, Courier(decoder, courier.store)
    given = replace(request(logprobs=1), output=[handed.ids])
    second.ids["r", 0] = handed.ids.copy()
    second.logprobs["r", 0] = list(handed.logprobs or [])
    second.engine.submit(given, handover=handover_of(handed))
    want = second.want()
    assert want.handover == handover_of(handed)
    second.populate(want, second.load_of(want))
    second.finish("r")
    assert second.tokens() == truth.tokens()
    assert second.logprobs["r", 0] == truth.logprobs["r", 0]
    (replayed,) = second.engine.replay(Replay(request="r", attempt=0, have=[0]))
    assert (replayed.index, replayed.ids, replayed.cached) == (0, truth.tokens(), 0)
    assert replayed.logprobs == truth.logprobs["r", 0]
    assert first.engine.release(handed.lease)
    assert held(first.engine) == 0
    second.close()


def test_a_request_that_ends_at_once_is_not_handed_over(courier: Courier) -> None:
    """A first token that is the last one is an ordinary end."""
    courier.engine.submit(request(max_tokens=1), prefill_only=True)
    courier.ready(courier.want())
    courier.finish("r")
    assert courier.ends["r", 0].finish == "length"
    assert not courier.handed
    assert held(courier.engine) == 0


def test_who_handed_it_over_may_go_on_itself(courier: Courier, truth: Bench) -> None:
    """It finds its own pages, and the lease ends; a second copy of either task changes nothing."""
    prefill(courier)
    (handed,) = courier.handed
    given = replace(request(logprobs=1), output=[handed.ids])
    for _ in range(2):
        courier.engine.submit(given, handover=handover_of(handed))
        courier.engine.submit(request(logprobs=1), prefill_only=True)
    assert not courier.engine.release(handed.lease)
    courier.finish("r")
    assert courier.tokens() == truth.tokens()
    assert not courier.wants
    assert held(courier.engine) == 0


def test_a_cancel_ends_what_was_handed_over(courier: Courier) -> None:
    """Its lease ends at once, and nobody goes on with it here."""
    prefill(courier)
    (handed,) = courier.handed
    assert courier.engine.cancel(Cancel(request="r", attempt=0)) == []
    assert held(courier.engine) == 0
    given = replace(request(logprobs=1), output=[handed.ids])
    with pytest.raises(errors.InvalidRequest, match="cancelled"):
        courier.engine.submit(given, handover=handover_of(handed))


def test_nobody_fetches_what_was_handed_over(courier: Courier) -> None:
    """The lease runs out."""
    prefill(courier)
    courier.now += LEASE_S + 1
    courier.step()
    assert held(courier.engine) == 0


def test_several_choices_are_not_handed_over(courier: Courier) -> None:
    """Nor is a request with other tokens than those that were handed over."""
    with pytest.raises(errors.InvalidRequest) as caught:
        courier.engine.submit(request(n=2), prefill_only=True)
    assert caught.value.param == "n"
    prefill(courier)
    handover = handover_of(courier.handed[0])
    with pytest.raises(errors.InvalidRequest) as caught:
        courier.engine.submit(request("s"), handover=handover)
    assert caught.value.param == "output"


# -------------------------------------------------------------------------------------------------------------- kept


def test_a_named_prompt_is_kept(courier: Courier) -> None:
    """Its pages are reported once they are computed, and outlive everything that is not named, until they are dropped
    or their time comes."""
    keep = Keep(id="c", ttl_ms=5000)
    for end in ("drop", "time"):
        courier.submit(replace(request(end, max_tokens=1), keep=keep))
        while courier.wants or (end, 0) not in courier.ends:
            while courier.wants:
                courier.ready(courier.wants.pop())
            output = courier.step()
        assert [(kept.keep, kept.hashes) for kept in output.kept] == [(keep, request().hashes)]
        assert held(courier.engine) == 4
        compute(courier, *[request(f"{end}{n}", [n + 3, *PROMPT], max_tokens=9) for n in range(40)])
        assert set(request().hashes) <= courier.index
        if end == "drop":
            courier.engine.drop("c")
        else:
            courier.now += 6
            courier.step()
        assert held(courier.engine) == 0
