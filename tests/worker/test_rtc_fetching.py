"""Pages that are brought to the device before their request is computed, and whatever may come in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import View
from shared.messages import Cancel
from tests.worker.arithmetic import ArithmeticDecoder, ArithmeticPipeline
from tests.worker.bench import PROMPT, Bench, request
from tests.worker.courier import Courier, StagedDecoder, held

NUM_PAGES = 4  # full ones of PROMPT's 70 tokens

pytestmark = pytest.mark.usefixtures("mode")


@pytest.fixture(params=["addressed", "staged"])
def decoder(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ArithmeticDecoder:
    """Blocks that the host can address, and blocks that it cannot."""
    kinds = {"addressed": ArithmeticDecoder, "staged": StagedDecoder}
    return kinds[request.param](tiny_config)


@pytest.fixture
def truth(tiny_config: ModelConfig) -> list[int]:
    """The tokens of the request where nothing is ever moved."""
    bench = Bench(ArithmeticDecoder(tiny_config))
    bench.submit(request())
    bench.run()
    return bench.tokens()


@pytest.fixture
def store(tiny_config: ModelConfig) -> dict[bytes, bytes]:
    """The pages of the prompt, computed elsewhere."""
    other = Courier(ArithmeticDecoder(tiny_config))
    other.submit(request(max_tokens=1))
    other.ready(other.want())
    other.finish("r")
    other.save_all()
    other.close()
    assert len(other.store) == NUM_PAGES
    return other.store


@pytest.fixture
def courier(decoder: ArithmeticDecoder, store: dict[bytes, bytes]) -> Iterator[Courier]:
    courier = Courier(decoder, store)
    yield courier
    courier.close()


def test_what_was_computed_elsewhere_is_fetched(courier: Courier, truth: list[int]) -> None:
    """A request is wanted with its full pages, finds them once they have landed, and gives the same tokens."""
    courier.submit(request())
    want = courier.want()
    assert want.hashes == request().hashes[:NUM_PAGES]
    assert want.parent == request().root
    assert want.page_s > 0
    load = courier.load_of(want)
    courier.populate(want, load)
    courier.finish("r")
    assert load.calls == [NUM_PAGES]
    assert courier.tokens() == truth
    assert courier.cached["r"] == NUM_PAGES * 16


def test_pages_come_in_several_parts(courier: Courier, truth: list[int]) -> None:
    """Each part goes behind the one before; when all were handed in, nobody has to say so."""
    courier.submit(request())
    want = courier.want()
    first, second = courier.load_of(want), courier.load_of(want, 3)
    courier.populate(want, first, 3)
    courier.populate(want, second, 3)
    courier.finish("r")
    assert (first.calls, second.calls) == ([3], [1])
    assert courier.tokens() == truth
    assert courier.cached["r"] == NUM_PAGES * 16


def test_what_is_here_is_not_wanted(courier: Courier) -> None:
    """Only the pages behind those on the device are asked for, and none at all if there are none."""
    courier.submit(request("short", PROMPT[:40], max_tokens=1))
    courier.ready(courier.want())
    courier.finish("short")
    courier.submit(request("long"))
    want = courier.want()
    assert want.hashes == request().hashes[2:NUM_PAGES]
    assert want.parent == request().hashes[1]
    courier.populate(want, courier.load_of(want))
    courier.finish("long")
    assert courier.cached["long"] == NUM_PAGES * 16
    courier.submit(request("again"), request("tiny", PROMPT[:16]))
    courier.finish("again", "tiny")
    assert not courier.wants


def test_a_request_that_nobody_can_help_is_computed(courier: Courier, truth: list[int]) -> None:
    """`ready` alone lets it go."""
    courier.submit(request())
    courier.ready(courier.want())
    courier.finish("r")
    assert courier.tokens() == truth
    assert courier.cached["r"] == 0


def test_only_what_landed_counts(courier: Courier, truth: list[int]) -> None:
    """Where a load finds fewer pages than it hoped for, the rest is computed."""
    del courier.store[request().hashes[2]]
    courier.submit(request())
    want = courier.want()
    courier.populate(want, courier.load_of(want))
    courier.finish("r")
    assert courier.tokens() == truth
    assert courier.cached["r"] == 2 * 16


def test_a_load_that_raises_is_told_and_costs_time_only(courier: Courier, truth: list[int]) -> None:
    """The fault is reported once, and the request computed."""

    def load(views: list[View]) -> int:
        raise OSError("the arena is gone")

    courier.submit(request())
    want = courier.want()
    courier.engine.populate(want.request, want.attempt, len(want.hashes), load)
    courier.finish("r")
    assert [type(error) for error in courier.errors] == [OSError]
    assert courier.tokens() == truth


def test_there_is_no_work_while_pages_are_on_their_way(courier: Courier) -> None:
    """The engine's thread may sleep: it is woken when pages have landed."""
    courier.submit(request())
    want, load = courier.want(), None
    courier.step()
    assert not courier.engine.has_work()
    load = courier.load_of(want)
    load.gate.clear()
    courier.populate(want, load)
    while courier.engine.has_work():
        courier.step()
    assert not courier.woken.acquire(blocking=False)
    load.gate.set()
    courier.finish("r")


def test_others_go_on_while_pages_are_on_their_way(courier: Courier) -> None:
    """A younger request overtakes one that waits for its pages."""
    courier.submit(request())
    want = courier.want()
    load = courier.load_of(want)
    load.gate.clear()
    courier.populate(want, load)
    courier.submit(request("quick", [5, 6, 7]))
    courier.finish("quick")
    assert ("r", 0) not in courier.ends
    load.gate.set()
    courier.finish("r")


@pytest.mark.parametrize("stage", ["wanted", "loading", "landed"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "attempt", "client"])
def test_a_request_may_end_at_any_point_of_its_fetch(
    courier: Courier, truth: list[int], stage: str, how: str
) -> None:
    """It ends at once; what is under way lands and is found by the next one; no block is lost, no load forgotten."""
    courier.submit(request(deadline_ms=1000))
    want = courier.want()
    load = courier.load_of(want)
    if stage == "loading":
        load.gate.clear()
    if stage != "wanted":
        courier.populate(want, load)
        while not load.begun.is_set():
            if courier.engine.has_work():
                courier.step()
            load.begun.wait(0.01)
    if how == "cancel":
        for _, delta in courier.engine.cancel(Cancel(request="r", attempt=0)):
            courier.take(delta)
        assert courier.ends["r", 0].finish == "cancelled"
    elif how == "deadline":
        courier.now += 2
        courier.step()
        assert courier.ends.pop(("r", 0)).finish == "failed"
    elif how == "client":
        courier.engine.cancel_client("c")
    else:
        courier.submit(request(attempt=1))
        courier.step()
        assert [delta.finish for delta in courier.superseded] == ["cancelled"]
    if stage == "wanted":
        courier.populate(want, load)  # the shell hears of it later
    courier.ready(want)
    load.gate.set()
    while not load.calls or courier.engine.ledger()["moving"]:
        courier.step_or_wait()
    assert len(load.calls) == 1
    if how == "attempt":
        while courier.wants:
            courier.ready(courier.wants.pop())
        courier.finish("r")
        assert courier.tokens() == truth
    courier.step()
    assert held(courier.engine) == 0
    courier.submit(request("next"))
    while courier.wants or ("next", 0) not in courier.ends:
        while courier.wants:
            courier.ready(courier.wants.pop())
        courier.step_or_wait()
    assert courier.tokens("next") == truth


def test_identical_fetches_coalesce(courier: Courier, truth: list[int]) -> None:
    """Pages that are moving in are waited for, not loaded a second time."""
    courier.submit(request("a"))
    want = courier.want()
    load = courier.load_of(want)
    load.gate.clear()
    courier.populate(want, load)
    courier.step()
    courier.submit(request("b"), request("longer", [*PROMPT, *PROMPT]))
    longer = courier.want()
    assert longer.request == "longer"
    assert longer.parent == request().hashes[NUM_PAGES - 1]
    courier.ready(longer)
    load.gate.set()
    courier.finish("a", "b", "longer")
    assert load.calls == [NUM_PAGES]
    assert courier.tokens("a") == courier.tokens("b") == truth
    assert [courier.cached[name] for name in ("a", "b", "longer")] == [NUM_PAGES * 16] * 3


def test_a_failed_fetch_fails_nobody_who_waited_for_it(
    courier: Courier, truth: list[int], tiny_config: ModelConfig
) -> None:
    """The pages of another's ticket do not come: both compute, and so does who wanted to go on from them."""
    long_prompt = [*PROMPT, *PROMPT]
    source = Courier(ArithmeticDecoder(tiny_config))
    source.submit(request("longer", long_prompt))
    source.ready(source.want())
    source.finish("longer")
    source.save_all()
    source.close()
    for page_hash in courier.store:
        del source.store[page_hash]
    courier.store.clear()
    courier.submit(request("a"))
    want = courier.want()
    load = courier.load_of(want)
    load.gate.clear()
    courier.populate(want, load)
    courier.step()
    courier.submit(request("b"), request("longer", long_prompt))
    longer = courier.want()
    courier.store |= source.store
    courier.populate(longer, courier.load_of(longer))
    load.gate.set()
    courier.finish("a", "b", "longer")
    assert courier.tokens("a") == courier.tokens("b") == truth
    assert courier.tokens("longer") == source.tokens("longer")
    assert courier.cached["a"] == 0


def test_a_fetch_waits_for_room(tiny_config: ModelConfig, store: dict[bytes, bytes]) -> None:
    """Blocks come from whoever ends; until then nothing that runs loses any, and `ready` is the way out."""
    courier = Courier(ArithmeticDecoder(tiny_config), store, num_blocks=8)
    other = [500 - token for token in PROMPT]
    courier.submit(request("busy", other, max_tokens=40))
    courier.ready(courier.want())
    courier.step()
    courier.submit(request("waits"), request("gives-up", [7, *PROMPT]))
    waits, gives_up = courier.want(), courier.want()
    load, none = courier.load_of(waits), courier.load_of(gives_up)
    courier.populate(waits, load)
    courier.populate(gives_up, none)
    for _ in range(5):
        courier.step()
    assert not load.begun.is_set()
    courier.ready(gives_up)
    courier.finish("busy", "waits", "gives-up")
    assert courier.engine.counters["preemptions"] == 0
    assert courier.cached["waits"] == NUM_PAGES * 16
    assert none.calls == [0]
    courier.close()


def test_late_rows_do_not_spoil_what_moves_in(tiny_config: ModelConfig, truth: list[int]) -> None:
    """Blocks of a cancelled request are filled only once no step on its way can write to them."""
    for num_stages in (1, 2, 4):
        decoder = (
            ArithmeticDecoder(tiny_config)
            if num_stages == 1
            else ArithmeticPipeline(tiny_config, num_stages=num_stages, eagerness=0.3)
        )
        source = Courier(decoder)
        source.submit(request())
        source.ready(source.want())
        source.finish("r")
        source.save_all()
        courier = Courier(decoder, source.store, num_blocks=9, asynchronous=True)
        courier.submit(request("late", PROMPT[::-1], max_tokens=60))
        courier.ready(courier.want())
        for _ in range(4):
            courier.step()
        courier.submit(request())
        want = courier.want()
        for _, delta in courier.engine.cancel(Cancel(request="late", attempt=0)):
            courier.take(delta)
        courier.populate(want, courier.load_of(want))
        courier.finish("r")
        assert courier.cached["r"] == NUM_PAGES * 16
        assert courier.tokens() == source.tokens()
        courier.close()
        source.close()


def test_a_resubmission_fetches_what_it_had_computed(courier: Courier, truth: list[int]) -> None:
    """The pages of prompt and output so far are wanted alike."""
    courier.submit(replace(request(), attempt=1, output=[truth[:12]]))
    want = courier.want()
    assert len(want.hashes) == 5
    courier.populate(want, courier.load_of(want))
    courier.finish("r")
    assert courier.tokens() == truth
    assert courier.cached["r"] == NUM_PAGES * 16


def test_a_part_that_others_bring_may_be_dropped(courier: Courier) -> None:
    """A request that waits for another's pages only, and for a step on its way, is cancelled: nothing is given back
    twice."""
    courier.submit(request("first"), request("second"), request("busy", PROMPT[:20]))
    wants = {want.request: want for want in (courier.want(), courier.want(), courier.want())}
    courier.ready(wants["busy"])
    loads = {name: courier.load_of(wants[name]) for name in ("first", "second")}
    loads["first"].gate.clear()
    courier.populate(wants["first"], loads["first"])
    courier.step()
    courier.populate(wants["second"], loads["second"])
    courier.step()
    for _, delta in courier.engine.cancel(Cancel(request="second", attempt=0)):
        courier.take(delta)
    courier.step()
    loads["first"].gate.set()
    courier.finish("first", "busy")
    assert loads["second"].calls == [0]
    assert courier.cached["first"] == NUM_PAGES * 16


def test_what_comes_for_younger_requests_waits_for_older_ones(
    tiny_config: ModelConfig, store: dict[bytes, bytes]
) -> None:
    """A request that waits for room gets it from whoever ends, however many younger ones have pages brought."""
    courier = Courier(ArithmeticDecoder(tiny_config), store, num_blocks=9)
    other = [500 - token for token in PROMPT]
    large = request("large", [*other[:60], *PROMPT], max_tokens=4)
    courier.submit(request("busy", other, max_tokens=8), large)
    for _ in range(2):
        courier.ready(courier.want())
    courier.step()
    loads = []
    for number in range(3):
        courier.submit(request(f"young-{number}", [number, *PROMPT[:60]]))
        want = courier.want()
        loads.append(courier.load_of(want))
        loads[-1].gate.clear()
        courier.populate(want, loads[-1])
    courier.finish("busy", "large")
    assert not any(load.begun.is_set() for load in loads)
    for load in loads:
        load.gate.set()
    courier.finish(*(f"young-{number}" for number in range(3)))
    assert [load.calls for load in loads] == [[3]] * 3
    courier.close()


def test_a_fetch_that_ends_makes_room_for_an_older_one(
    tiny_config: ModelConfig, store: dict[bytes, bytes]
) -> None:
    """It is enough that the younger one is cancelled; nothing else has to happen."""
    courier = Courier(ArithmeticDecoder(tiny_config), store, num_blocks=6)
    other = [500 - token for token in PROMPT]
    courier.submit(request("older", other, max_tokens=4), request("younger", max_tokens=4))
    older, younger = courier.want(), courier.want()
    courier.populate(younger, courier.load_of(younger), 3)
    while courier.engine.ledger()["leased"] != 3:
        courier.step_or_wait()
    load = courier.load_of(older)
    courier.populate(older, load)
    courier.step()
    courier.engine.cancel(Cancel(request="younger", attempt=0))
    courier.finish("older")
    assert load.calls == [NUM_PAGES]
    courier.close()
