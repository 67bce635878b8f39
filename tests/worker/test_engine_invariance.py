"""The engine over a real tiny model and over one that forgives nothing: the same tokens, however they are computed."""

from __future__ import annotations

from typing import Any

import pytest

from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Decoder
from tests.worker.arithmetic import ArithmeticDecoder, ArithmeticPipeline
from tests.worker.bench import GREEDY, PROMPT, Bench, request
from tests.worker.tiny import make_tiny

MODES = {
    "sync": {},
    "async": {"asynchronous": True},
    "guessing": {"speculation": 4},
    "both": {"asynchronous": True, "speculation": 4},
}
pytestmark = pytest.mark.usefixtures("mode")


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "mode", request.param)


@pytest.fixture(scope="module", params=["arithmetic", "model", "pipeline"])
def decoder(
    request: pytest.FixtureRequest,
    tiny_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Decoder:
    if request.param == "arithmetic":
        return ArithmeticDecoder(tiny_config)
    if request.param == "pipeline":
        return ArithmeticPipeline(tiny_config, num_stages=3)
    folder = tmp_path_factory.mktemp("model")
    return load_decoder(make_tiny(folder / "tiny"), threads=1, cache_dir=folder / "cache")


def test_a_cached_prefix_changes_no_token(
    decoder: Decoder, kind: dict[str, Any], alone: list[int]
) -> None:
    """With its prompt in the index a request continues as without."""
    bench = Bench(decoder)
    bench.submit(request("warm", max_tokens=1))
    bench.run()
    bench.submit(request(**kind))
    bench.run()
    assert bench.cached["r"] == 64
    assert bench.tokens() == alone


@pytest.mark.parametrize("budget", [1, 7, 33])
def test_chunks_change_no_token(
    decoder: Decoder, kind: dict[str, Any], alone: list[int], budget: int
) -> None:
    """A prompt computed over many steps continues as one computed in one step."""
    bench = Bench(decoder, max_num_seqs=1, max_batched_tokens=budget)
    bench.submit(request(**kind))
    bench.run()
    assert bench.tokens() == alone


def test_batch_mates_change_no_token(
    decoder: Decoder, kind: dict[str, Any], alone: list[int]
) -> None:
    """Beside eight others of other lengths and settings, some of them prefilling, a request is as alone."""
    bench = Bench(decoder, max_num_seqs=16, max_batched_tokens=48)
    for number in range(4):
        bench.submit(request(f"early{number}", PROMPT[number : 9 + 20 * number], seed=number))
    bench.step()
    bench.submit(request(**kind))
    for number in range(4):
        bench.submit(request(f"late{number}", PROMPT[: 5 + 15 * number], **GREEDY))
    bench.run()
    assert bench.tokens() == alone


def test_preemption_changes_no_token(
    decoder: Decoder, kind: dict[str, Any], alone: list[int]
) -> None:
    """A request that lost its blocks and was computed again goes on as if nothing had been."""
    bench = Bench(decoder, num_blocks=11)
    bench.submit(request("older", PROMPT[::-1], **GREEDY))
    bench.submit(request(**kind))
    bench.run()
    assert bench.engine.counters["preemptions"] > 0
    assert bench.tokens() == alone


@pytest.mark.parametrize("cut", [1, 9, 23])
def test_resubmission_changes_no_token(
    decoder: Decoder, kind: dict[str, Any], alone: list[int], cut: int
) -> None:
    """Another engine, given the tokens so far, goes on at the next index with the same tokens."""
    bench = Bench(decoder)
    bench.submit(request(attempt=1, output=[alone[:cut]], **kind))
    bench.run()
    assert bench.tokens() == alone


def test_choices_share_the_prompt_and_the_first_is_as_alone(
    decoder: Decoder, kind: dict[str, Any], alone: list[int]
) -> None:
    """With n = 3, choice 0 is the single choice; the others differ only by their noise."""
    bench = Bench(decoder)
    bench.submit(request(n=3, **kind))
    computed = 0
    while bench.engine.has_work():
        computed += bench.step().num_computed
    counters = bench.engine.counters
    wasted = counters["spec_proposed"] - counters["spec_accepted"]
    assert computed == 70 + 2 * 6 + 3 * 23 + wasted
    assert bench.tokens() == alone
    choices = {tuple(bench.tokens(choice=choice)) for choice in range(3)}
    assert len(choices) == (1 if kind is GREEDY else 3)
