"""Pages brought to the device between bands: what is brought for one has no room that a higher one waits for."""

from __future__ import annotations

import pytest

from services.worker.flowserve.config import ModelConfig
from shared.messages import Band
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.bench import PROMPT, Bench, request
from tests.worker.courier import Courier

NUM_PAGES = 4  # full ones of PROMPT's 70 tokens

pytestmark = pytest.mark.usefixtures("mode")


@pytest.fixture
def store(tiny_config: ModelConfig) -> dict[bytes, bytes]:
    """The pages of the prompt, computed elsewhere."""
    other = Courier(ArithmeticDecoder(tiny_config))
    other.submit(request(max_tokens=1))
    other.ready(other.want())
    other.finish("r")
    other.save_all()
    other.close()
    return other.store


def prompt_of(number: int, length: int = 70) -> list[int]:
    """One that shares no page with others."""
    return [number, *(500 - token for token in PROMPT), *PROMPT][:length]


def compute(courier: Courier, name: str, prompt: list[int], band: Band, max_tokens: int) -> None:
    """Have a request computed, whose pages nobody has."""
    courier.submit(request(name, prompt, band=band, max_tokens=max_tokens))
    if len(prompt) > 16:
        courier.ready(courier.want())
    courier.step()


def test_pages_brought_for_band_batch_make_room_for_a_higher_band(
    tiny_config: ModelConfig, store: dict[bytes, bytes]
) -> None:
    """They are held for one that waits for a slot; a prompt of a higher band that needs the room gets it, while others
    of that band run on."""
    courier = Courier(ArithmeticDecoder(tiny_config), store, num_blocks=14, max_num_seqs=2)
    compute(courier, "long", [1, 2, 3], Band.DEFAULT, 80)
    compute(courier, "short", [3, 2, 1], Band.DEFAULT, 20)
    courier.submit(request(band=Band.BATCH))
    want = courier.want()
    courier.populate(want, courier.load_of(want))
    for _ in range(3):
        courier.step()
    while courier.engine.ledger()["leased"] != NUM_PAGES:
        assert courier.woken.acquire(timeout=10)  # not with steps, which end the short one
        courier.step()
    compute(courier, "urgent", prompt_of(7, 140), Band.DEFAULT, 2)
    courier.finish("urgent")
    assert ("long", 0) not in courier.ends
    courier.finish("long", "r")
    alone = Bench(ArithmeticDecoder(tiny_config))
    alone.submit(request())
    alone.run()
    assert courier.tokens() == alone.tokens()
    courier.close()


def test_band_batch_gives_way_to_pages_brought_for_a_higher_band(
    tiny_config: ModelConfig, store: dict[bytes, bytes]
) -> None:
    """Its running sequences hold all blocks: as many of them as are needed give them up at once, the others run on."""
    courier = Courier(ArithmeticDecoder(tiny_config), store, num_blocks=17, max_num_seqs=8)
    for number in range(3):
        compute(courier, f"filler-{number}", prompt_of(number, 66), Band.BATCH, 14)
    courier.submit(request())
    want = courier.want()
    load = courier.load_of(want)
    courier.populate(want, load)
    for _ in range(3):
        courier.step()
    assert courier.engine.counters["yields"] == 1
    assert not courier.ends
    courier.finish("r", *(f"filler-{number}" for number in range(3)))
    assert load.calls == [NUM_PAGES]
    assert courier.cached["r"] == NUM_PAGES * 16
    assert courier.engine.counters["yields"] == 1
    for number in range(3):
        alone = Bench(ArithmeticDecoder(tiny_config))
        alone.submit(request("r", prompt_of(number, 66), max_tokens=14))
        alone.run()
        assert courier.tokens(f"filler-{number}") == alone.tokens()
    courier.close()
