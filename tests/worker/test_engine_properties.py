"""The engine under random loads: whatever comes, goes and fails, the tokens are those of each request alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.config import ModelConfig
from shared.messages import Band, Cancel, Request
from tests.worker.arithmetic import CYCLE, ArithmeticDecoder, ArithmeticPipeline
from tests.worker.bench import PROMPT, Bench, request

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2, "min_tokens": 6},
    {"temperature": 0, "repetition_penalty": 1.3, "stop_token_ids": [5, 9]},
    {"temperature": 0.7, "top_k": 20, "logprobs": 0},
    {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.5, "min_p": 0.05, "logit_bias": {0: 6.0}},
]


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and when it is cancelled (all of it, or choice 0 with `keep` tokens), if it is."""

    step: int
    prompt_length: int
    prompt_start: int
    max_tokens: int
    n: int
    kind: int
    cancel_after: int | None
    keep: int | None
    band: Band
    tenant: str

    def request(self, name: str) -> Request:
        start = 20 * self.prompt_start
        prompt = PROMPT[start : start + self.prompt_length]
        fields = {"max_tokens": self.max_tokens, "n": self.n, "ignore_eos": False}
        whose: dict[str, Any] = {"band": self.band, "tenant": self.tenant}
        return request(name, prompt, seed=self.kind, **whose, **fields, **KINDS[self.kind])


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 25),
    prompt_length=st.integers(1, 50),
    prompt_start=st.integers(0, 1),
    max_tokens=st.integers(1, 40),
    n=st.integers(1, 3),
    kind=st.integers(0, len(KINDS) - 1),
    cancel_after=st.none() | st.integers(0, 20),
    keep=st.none() | st.integers(0, 8),
    band=st.sampled_from([Band.DEFAULT, *Band]),
    tenant=st.sampled_from("aab"),
)


@pytest.fixture(scope="module")
def truths() -> dict[tuple[Arrival, int], Bench]:
    """What each request brings alone, one step after the other, nothing guessed; filled as it is asked for, by the
    request and the number of layers."""
    return {}


@settings(max_examples=60, deadline=None)
@given(
    load=st.lists(arrivals, min_size=1, max_size=7),
    num_blocks=st.integers(6, 14),
    max_num_seqs=st.integers(1, 6),
    spare_tokens=st.integers(0, 40),
    asynchronous=st.booleans(),
    speculation=st.sampled_from([0, 1, 4, 7]),
    faults=st.sets(st.integers(1, 60), max_size=2),
    num_stages=st.sampled_from([1, 1, 2, 4]),
    eagerness=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    spread_chunks=st.booleans(),
)
def test_no_load_changes_a_token_or_loses_a_block(
    load: list[Arrival],
    num_blocks: int,
    max_num_seqs: int,
    spare_tokens: int,
    asynchronous: bool,
    speculation: int,
    faults: set[int],
    num_stages: int,
    eagerness: float,
    spread_chunks: bool,
    tiny_config: ModelConfig,
    truths: dict[tuple[Arrival, int], Bench],
) -> None:
    """In whichever bands, in pools far too small, a step ahead or not, guessing or not, in a pipeline or not, with
    cancels and faults:
    every choice ends once, with the tokens (and logprobs) it has alone or the first of them, and the ledger balances
    after each step."""
    decoder = (
        ArithmeticDecoder(tiny_config, habit=6, faults=tuple(faults))
        if num_stages == 1
        else ArithmeticPipeline(
            tiny_config,
            habit=6,
            faults=tuple(faults),
            num_stages=num_stages,
            eagerness=eagerness,
        )
    )
    bench = Bench(
        decoder,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_seqs + spare_tokens,
        asynchronous=asynchronous,
        speculation=speculation,
        spread_chunks=spread_chunks,
    )
    num_steps, num_errors = 0, 0
    while num_steps <= 50 or bench.engine.has_work():
        for number, one in enumerate(load):
            if one.step == num_steps:
                bench.submit(one.request(str(number)))
            if one.cancel_after is not None and one.step + one.cancel_after == num_steps:
                choice = None if one.keep is None else 0
                cancel = Cancel(request=str(number), attempt=0, choice=choice, keep=one.keep)
                for _, delta in bench.engine.cancel(cancel):
                    bench.take(delta)
        output = bench.step()
        num_errors += output.error is not None
        num_steps += 1
        assert num_steps < 5000, "does not end"
    bench.run()
    assert num_errors <= len(faults)
    for number, one in enumerate(load):
        alone = _alone(one, num_stages, tiny_config, truths)
        for choice in range(one.n):
            key = str(number), choice
            whole, got, end = alone.ids["r", choice], bench.ids[key], bench.ends[key]
            assert alone.logprobs["r", choice][: len(got)] == bench.logprobs[key]
            if end.finish in ("stop", "length"):
                assert got == whole
                assert (end.finish, end.stop_id) == (
                    alone.ends["r", choice].finish,
                    alone.ends["r", choice].stop_id,
                )
            else:
                assert got == whole[: len(got)]
                assert end.finish == "cancelled" or num_errors


def _alone(
    one: Arrival,
    num_layers: int,
    config: ModelConfig,
    truths: dict[tuple[Arrival, int], Bench],
) -> Bench:
    plain = replace(one, step=0, cancel_after=None, keep=None, band=Band.DEFAULT, tenant="a")
    key = plain, num_layers
    if key not in truths:
        decoder = ArithmeticDecoder(config, habit=6, num_layers=num_layers)
        truths[key] = Bench(decoder, max_num_seqs=1)
        truths[key].submit(one.request("r"))
        truths[key].run()
    return truths[key]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_guesses_save_steps_where_text_repeats_itself(
    tiny_config: ModelConfig, asynchronous: bool
) -> None:
    """Of a text that runs in circles several tokens come per step, and they are the same."""
    steps, tokens = [], []
    circle = dict.fromkeys(range(3, 3 + CYCLE), 20.0)
    for speculation in (0, 4):
        decoder = ArithmeticDecoder(tiny_config, habit=8)
        bench = Bench(decoder, asynchronous=asynchronous, speculation=speculation)
        bench.submit(request(max_tokens=120, temperature=0, logit_bias=circle))
        bench.run()
        steps.append(bench.engine.counters["steps"])
        tokens.append(bench.tokens())
    assert tokens[0] == tokens[1]
    assert steps[1] < steps[0] / 2
    counters = bench.engine.counters
    assert 0 < counters["spec_accepted"] <= counters["spec_proposed"]


def test_guesses_are_given_up_where_they_are_wrong(tiny_config: ModelConfig) -> None:
    """A text that never does what it did before costs few rows more than without guesses."""
    bench = Bench(ArithmeticDecoder(tiny_config, habit=0), num_blocks=64, speculation=4)
    # Of five likely tokens, so that every pair was there before.
    bias = dict.fromkeys(range(10, 15), 50.0)
    bench.submit(request(max_tokens=900, temperature=1.0, logit_bias=bias))
    bench.run()
    counters = bench.engine.counters
    assert counters["spec_proposed"] - counters["spec_accepted"] < 200


def test_a_step_behind_a_fault_is_planned_again(tiny_config: ModelConfig) -> None:
    """Who was only in the step launched behind one that failed goes on as if nothing had been."""
    alone = Bench(ArithmeticDecoder(tiny_config))
    alone.submit(request("next", max_tokens=9))
    alone.run()
    decoder = ArithmeticDecoder(tiny_config, faults=(1,))
    # A budget of one prompt: "hit" fills the first step, "next" the one launched behind it.
    bench = Bench(decoder, asynchronous=True, max_num_seqs=4, max_batched_tokens=70)
    bench.submit(request("hit"), request("next", PROMPT, max_tokens=9))
    output = bench.step()
    assert isinstance(output.error, FloatingPointError)
    assert decoder.num_steps == 1, "the step behind has run"
    bench.run()
    assert bench.ends["hit", 0].finish == "failed"
    assert bench.ends["next", 0].finish == "length"
    assert bench.tokens("next") == alone.tokens("next")
