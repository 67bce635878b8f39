"""A simulated deployment: it is a function of its arguments, and every request ends once, whatever goes wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepflow.sim.cluster import Cluster, simulate
from deepflow.sim.faults import Beats, Fault, JeDeath, Partition, TeDeath
from deepflow.sim.profile import NPU_34B_TP4, SMOLLM2_CPU
from deepflow.sim.report import Result
from deepflow.sim.scaling import Scaling
from deepflow.sim.scenario import Scenario, TeSpec, constant, noisy, oracle
from deepflow.sim.trace import BLOCK, Call, Shape, conversations
from services.scheduler.policy.roster import NAMES
from shared.config import ConfigError
from shared.messages import Band

LONG = 20 if os.environ.get("DEEPFLOW_SOAK") else 1

pytestmark = pytest.mark.timeout(60 * LONG)

CALLS = conversations(80, 3)
PROFILE = NPU_34B_TP4


def run(calls: list[Call], scenario: Scenario) -> Result:
    """The result, after a proof that nothing is lost, done twice or left behind."""
    cluster = Cluster(calls, scenario)
    result = cluster.run()
    assert [one.number for one in result.requests] == list(range(len(calls)))
    for one, call in zip(result.requests, calls, strict=True):
        assert one.finish in ("length", "refused", "failed")
        assert one.output_tokens == call.output_length if one.ok else one.jct_s > 0
        assert one.cached_tokens < call.input_length
    # What is on its way still, among it the cancels of what nobody wants.
    cluster.clock.run(cluster.clock.now + 30.0)
    for te in cluster.tes.values():
        if not te.is_dead:
            te.check()
            assert not te.held
            blocks = te.engine.pool.ledger()
            assert blocks["free"] + blocks["cached"] == blocks["total"]
    for je in cluster.jes:
        je.trees.check()
    return result


def call(at_s: float, num_prompt: int, num_output: int, first: int = 0) -> Call:
    ids = tuple(range(first, first + -(-num_prompt // BLOCK)))
    return Call(at_s * 1000, num_prompt, num_output, ids)


# --------------------------------------------------------------------------------------------------------- closed forms


def test_one_request_on_one_te_takes_what_the_profile_says() -> None:
    """Two messages there, the prefill, and one back: the first token. The rest is decoding."""
    scenario = Scenario.of(1)
    result = run([call(0.0, 3000, 100)], scenario)
    [one] = result.requests
    assert one.ttft_s == pytest.approx(PROFILE.prefill_s(3000) + 3 * scenario.hop_s)
    assert one.jct_s - (one.ttft_s or 0.0) == pytest.approx(PROFILE.decode_s(1, 3001, 99))
    assert one.tpot_s == pytest.approx(PROFILE.decode_s(1, 3001, 99) / 99)


def test_a_pair_hands_the_pages_over() -> None:
    """One TE prefills, the other decodes; between the two lie a message each way, and the transfer."""
    scenario = Scenario.of(0, num_pairs=1)
    result = run([call(0.0, 3000, 100)], scenario)
    [one] = result.requests
    prefill, decode = result.tes
    assert (one.prefill_te, one.te) == (prefill.te, decode.te)
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert prefill.num_prefilled_tokens == 3000
    assert decode.num_prefilled_tokens == 1  # of the second token's row
    assert one.ttft_s == pytest.approx(PROFILE.prefill_s(3000) + 3 * scenario.hop_s)
    between_s = PROFILE.handover_time_s(3000) + 2 * scenario.hop_s
    rest_s = PROFILE.decode_s(1, 3001, 99)
    assert one.jct_s - (one.ttft_s or 0.0) == pytest.approx(between_s + rest_s, rel=1e-3)


def test_the_second_turn_finds_the_first() -> None:
    """A prompt that goes on where another ended is sent to the TE that has it, among four."""
    result = run([call(0.0, 10 * BLOCK, 50), call(30.0, 14 * BLOCK, 50)], Scenario.of(4))
    first, second = result.requests
    assert second.te == first.te
    assert (first.cached_tokens, second.cached_tokens) == (0, 10 * BLOCK)
    assert result.hit_rate == pytest.approx(10 / 24)


def test_a_full_service_refuses_and_an_insistent_client_comes_back() -> None:
    """With room for two, the others of five that come at once are refused; those who insist are served in the end."""
    profile = replace(PROFILE, max_num_seqs=1)
    calls = [call(0.0, 600, 50, 10 * n) for n in range(5)]
    scenario = Scenario(tes=(TeSpec(profile=profile, max_waiting=1),))
    result = run(calls, scenario)
    assert sorted(one.finish for one in result.requests) == ["length"] * 2 + ["refused"] * 3
    assert run(calls, replace(scenario, insists=True)).num_done == 5


def test_a_prompt_that_fits_nowhere_fails() -> None:
    """It is longer than a TE's memory, and the next one is served."""
    result = run([call(0.0, 20_000, 5), call(1.0, 2_000, 5)], Scenario.of(2, num_blocks=10))
    assert [one.finish for one in result.requests] == ["failed", "length"]


# --------------------------------------------------------------------------------------------------------- determinism

_SCRIPT = """
from hashlib import sha256
from deepflow.sim.cluster import simulate
from deepflow.sim.faults import Beats, TeDeath
from deepflow.sim.scenario import Scenario, noisy
from deepflow.sim.trace import conversations
from dataclasses import replace
faults = (TeDeath(at=9.0, te=1, restart_after_s=1.0), Beats(at=5.0, for_s=9.0, lost=0.3, late_s=0.5))
scenario = replace(Scenario.of(3, num_pairs=1, seed=5), num_jes=2, faults=faults, predict=noisy(0.8))
print(sha256(simulate(conversations(120, 3), scenario).to_json()).hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_any_process() -> None:
    """Nothing depends on hash seeds, addresses or clocks; another seed gives another run."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    one, other = (simulate(CALLS, Scenario.of(4, seed=seed)).to_json() for seed in (1, 2))
    assert one == simulate(CALLS, Scenario.of(4, seed=1)).to_json()
    assert one != other


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_serves_everybody(policy: str) -> None:
    """On colocated TEs and pairs at once."""
    result = run(CALLS, replace(Scenario.of(3, num_pairs=1, policy=policy), num_jes=2))
    assert result.num_done == len(CALLS)
    assert result.policy == policy


def test_an_unknown_policy_is_refused() -> None:
    """By name."""
    with pytest.raises(ConfigError, match="nonesuch"):
        simulate(CALLS, Scenario.of(1, policy="nonesuch"))


# ------------------------------------------------------------------------------------------------- faults and scaling


_at = st.floats(0.0, 40.0)
_te = st.integers(0, 4)
_faults: st.SearchStrategy[Fault] = st.one_of(
    st.builds(
        TeDeath,
        at=_at,
        te=_te,
        down_after_s=st.sampled_from([None, 0.05]),
        restart_after_s=st.floats(0.1, 5.0),
    ),
    st.builds(JeDeath, at=_at, je=st.integers(0, 1), restart_after_s=st.floats(0.1, 5.0)),
    st.builds(Partition, at=_at, te=_te, for_s=st.floats(0.01, 8.0)),
    st.builds(
        Beats,
        at=_at,
        for_s=st.floats(0.1, 20.0),
        lost=st.floats(0.0, 1.0),
        late_s=st.floats(0.0, 3.0),
        te=st.none() | _te,
        je=st.none() | st.integers(0, 1),
    ),
)


@settings(max_examples=10 * LONG, deadline=None)
@given(
    faults=st.lists(_faults, max_size=6).map(tuple),
    num_blocks=st.sampled_from([None, 260]),
    seed=st.integers(0, 99),
)
def test_every_request_ends_once_whatever_goes_wrong(
    faults: tuple[Fault, ...], num_blocks: int | None, seed: int
) -> None:
    """TEs and JEs die and come back, TEs are cut off, beats and news of pages get lost, late and out of order."""
    scenario = Scenario.of(3, num_pairs=1, num_blocks=num_blocks, seed=seed)
    scenario = replace(scenario, num_jes=2, faults=faults, insists=True, deadline_s=3600.0)
    result = run(CALLS[:60], scenario)
    assert result.num_done == 60


def test_a_dead_te_costs_a_pause_and_no_token() -> None:
    """Its requests go on elsewhere with what their clients have, sooner where its pod host says that it died."""
    calls = [call(0.0, 2000, 400, 10 * n) for n in range(4)]
    told, silent = (
        run(calls, replace(Scenario.of(2), faults=(TeDeath(at=4.0, te=0, down_after_s=after_s),)))
        for after_s in (0.05, None)
    )
    for result in (told, silent):
        assert result.num_resubmissions == 2
        assert {one.te for one in result.requests} == {result.tes[1].te}
    assert told.jct_s(1.0) < silent.jct_s(1.0) < told.jct_s(1.0) + 3.0


def test_a_resubmitted_request_is_expected_to_bring_what_is_left() -> None:
    """The TE that goes on is told of the tokens that its client does not have yet."""
    calls = [call(0.0, 2000, 400, 10 * n) for n in range(4)]
    cluster = Cluster(calls, replace(Scenario.of(2), faults=(TeDeath(at=4.0, te=0),)))
    told = []

    def look() -> None:
        for te in cluster.tes.values():
            told.extend((held.task.num_had, held.sequence.expected) for held in te.held.values())

    cluster.clock.at(4.5, look)
    cluster.run()
    whole = oracle(calls[0], cluster.random).mid
    assert sum(num_had > 0 for num_had, _ in told) == 2
    assert all(expected == whole - num_had for num_had, expected in told)


def test_a_late_word_of_a_dead_te_does_not_bring_it_back() -> None:
    """As in a real Job Executor nobody is asked for the index of a TE whose death was told before its last beats."""
    faults = (Beats(at=0.0, for_s=30.0, late_s=2.0), TeDeath(at=4.0, te=0, down_after_s=0.05))
    cluster = Cluster(CALLS, replace(Scenario.of(2), faults=faults))
    cluster.run()
    assert cluster.jes[0].trees.unsynced() == []


def test_a_short_cut_costs_nothing_a_long_one_a_resubmission() -> None:
    """What a TE did unheard is told when it is back; whom nobody waited for is cancelled there."""
    calls = [call(0.0, 2000, 400, 10 * n) for n in range(4)]
    short, long = (
        run(calls, replace(Scenario.of(2), faults=(Partition(at=4.0, te=0, for_s=for_s),)))
        for for_s in (1.0, 5.0)
    )
    assert (short.num_resubmissions, long.num_resubmissions) == (0, 2)
    assert short.jct_s(1.0) == pytest.approx(run(calls, Scenario.of(2)).jct_s(1.0), abs=1.1)


def test_requests_wait_for_a_model_that_is_coming_up() -> None:
    """With no TE they are parked, and served once the first one has loaded; nobody comes: they fail in time."""
    none = Scenario(tes=(), load_s=2.0, park_s=20.0)
    coming = replace(none, scaling=(Scaling(at=1.0, num=1),))
    calls = [call(0.1 * n, 1000, 10, 10 * n) for n in range(5)]
    result = run(calls, coming)
    assert result.num_done == 5
    assert all(2.0 < (one.ttft_s or math.inf) < 8.0 for one in result.requests)
    assert {one.finish for one in run(calls, none).requests} == {"failed"}


def test_more_tes_help_and_those_that_go_finish_what_they_have() -> None:
    """Three more from the tenth second on take part of the work; two that leave lose nothing."""
    alone = run(CALLS, Scenario.of(1))
    grown = run(CALLS, replace(Scenario.of(1), scaling=(Scaling(at=10.0, num=3),)))
    assert grown.ttft_s(0.99) < alone.ttft_s(0.99)
    assert all(te.num_tasks > 0 for te in grown.tes)
    shrunk = run(CALLS, replace(Scenario.of(4), scaling=(Scaling(at=10.0, num=-2),)))
    assert shrunk.num_done == len(CALLS)
    assert shrunk.num_resubmissions == 0


# --------------------------------------------------------------------------------------------------- several JEs, bands


def test_any_number_of_jes_never_overfills_a_te() -> None:
    """Eight JEs that hear of beats late or never give no TE more than it takes: its answer is the admission."""
    profile = replace(PROFILE, max_num_seqs=2)
    tes = tuple(TeSpec(profile=profile, max_waiting=2) for _ in range(3))
    beats = Beats(at=0.0, for_s=1e6, lost=0.5, late_s=3.0)
    scenario = Scenario(tes=tes, num_jes=8, faults=(beats,), insists=True, deadline_s=1e5)
    cluster = Cluster(CALLS[:50], scenario)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, *(len(te.held) for te in cluster.tes.values()))
        cluster.clock.after(0.2, look)

    cluster.clock.at(0.0, look)
    assert cluster.run().num_done == 50
    assert most == 4


def test_batch_work_fills_what_others_leave() -> None:
    """With a pile of work that nobody waits for, others get their first token nearly as soon as without it."""
    shape = Shape(rate=1.0, first=1500)
    calls = conversations(60, 1, shape)
    pile = [
        replace(
            one, band=Band.BATCH, timestamp_ms=0.0, hash_ids=tuple(-1 - i for i in one.hash_ids)
        )
        for one in conversations(60, 2, shape)
    ]
    alone = run(calls, Scenario.of(2))
    beside = run(sorted([*pile, *calls], key=lambda c: c.timestamp_ms), Scenario.of(2))
    waited = sorted(
        one.ttft_s for one in beside.requests if one.band != Band.BATCH and one.ttft_s is not None
    )
    assert len(waited) == 60
    assert waited[30] < 2 * alone.ttft_s(0.5)


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_counts_what_happened() -> None:
    """Percentiles are ordered, goodput is bounded by throughput, and no window is better than balanced."""
    result = run(CALLS, Scenario.of(4))
    figures = result.metrics(slo_ttft_s=5.0, slo_tpot_s=0.1)
    assert figures["num_done"] == len(CALLS)
    assert figures["ttft_p50_s"] <= figures["ttft_p90_s"] <= figures["ttft_p99_s"]
    assert result.goodput(ttft_s=1e9, tpot_s=1e9) >= figures["goodput"] > 0
    assert result.goodput(ttft_s=0.0, tpot_s=0.0) == 0.0
    assert all(1.0 <= one <= 4.0 for one in result.imbalances())
    prefilled = sum(te.num_prefilled_tokens for te in result.tes)
    assert prefilled == sum(one.prompt_tokens - one.cached_tokens for one in result.requests)


def test_predictors_are_as_good_as_they_say() -> None:
    """The oracle names the bucket, the noisy one as often as it should, the constant one always the same."""
    from random import Random

    random = Random(1)
    calls = conversations(1000, 4)
    assert all(
        oracle(c, random).low <= max(c.output_length, 1) < oracle(c, random).low + 129
        for c in calls
    )
    right = sum(noisy(0.8)(c, random) == oracle(c, random) for c in calls)
    assert 760 <= right <= 840
    short = [replace(c, output_length=5) for c in calls]
    right = sum(noisy(0.8)(c, random) == oracle(c, random) for c in short)
    assert 760 <= right <= 840
    assert len({constant(256)(c, random) for c in calls}) == 1


def test_a_small_cpu_is_simulated_as_well() -> None:
    """The other preset, with pages of its own size."""
    calls = [Call(500.0 * n, 100, 20, tuple(range(7))) for n in range(10)]
    scenario = replace(Scenario.of(2, SMOLLM2_CPU), page=16)
    result = run(calls, scenario)
    assert result.num_done == 10
    assert result.requests[-1].cached_tokens == 96
