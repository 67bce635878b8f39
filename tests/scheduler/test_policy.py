"""The rules by which TEs are scored."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policy.algorithm1 import Algorithm1
from services.scheduler.policy.base import Candidate, Policy
from services.scheduler.policy.baselines import (
    CacheAware,
    KvCost,
    LeastLoad,
    RoundRobin,
    StrictPrefix,
)
from services.scheduler.policy.roster import DEFAULT, NAMES, make
from services.scheduler.work import Length, Work
from shared.config import ConfigError
from shared.messages import Band, TaskKind


def work(kind: TaskKind = TaskKind.GENERATE, num_pages: int = 10) -> Work:
    """A prompt of so many pages of 16 tokens."""
    return Work(
        request="r", attempt=1, model="m", tenant="t", kind=kind, band=Band.DEFAULT,
        num_known=num_pages * 16 + 1, hashes=[bytes([n]) * 16 for n in range(num_pages)],
        num_choices=1, length=Length(low=1, mid=64),
    )  # fmt: skip


def candidate(te: str, *, matched: int = 0, pages: int = 10, **fields: object) -> Candidate:
    """A TE that computes 1,000 tokens a second."""
    num_tokens = (pages - matched) * 16 + 1
    queued = float(str(fields.get("queued_tokens", 0.0)))
    values: dict[str, object] = {
        "te": te,
        "matched_pages": matched,
        "prefill_tokens": num_tokens,
        "prefill_s": num_tokens * 0.001,
        "ttft_s": (num_tokens + queued) * 0.001,
        "token_s": 0.001,
        "pages_total": 1000,
    }
    return Candidate(**{**values, **fields})  # type: ignore[arg-type]


def best(policy: Policy, *candidates: Candidate, kind: TaskKind = TaskKind.GENERATE) -> str:
    """The TE with the lowest score."""
    scores = policy.scores(work(kind), candidates)
    return min(zip(scores, candidates, strict=True), key=lambda pair: pair[0])[1].te


def test_locality_where_loads_are_alike() -> None:
    """The longest prefix wins among TEs that would give the first token about as soon."""
    tes = candidate("none"), candidate("some", matched=4), candidate("most", matched=9)
    assert best(Algorithm1(), *tes) == "most"


def test_load_where_waiting_costs_more_than_computing() -> None:
    """A prefix is worth the time it saves, and no more."""
    busy: dict[str, Any] = {"outstanding_s": 1.0, "queued_tokens": 1000.0}
    assert best(Algorithm1(), candidate("busy", matched=9, **busy), candidate("idle")) == "idle"
    short: dict[str, Any] = {"outstanding_s": 0.05, "queued_tokens": 50.0}
    assert best(Algorithm1(), candidate("busy", matched=9, **short), candidate("idle")) == "busy"


def test_a_conversation_waits_for_its_te_where_much_runs() -> None:
    """It leaves for one that answers sooner while few requests run; while many do, only a prompt of which nobody holds
    much goes there, since computing a conversation again delays them all."""
    for num_running, chosen in ((0, "idle"), (20, "holder")):
        holder = candidate("holder", matched=9, queued_tokens=500.0, num_running=num_running)
        assert best(Algorithm1(), holder, candidate("idle", num_running=num_running)) == chosen
        little = candidate("holder", matched=1, queued_tokens=500.0, num_running=num_running)
        assert best(Algorithm1(), little, candidate("idle", num_running=num_running)) == "idle"


def test_prompts_are_slowed_by_those_that_decode() -> None:
    """Of two TEs with equal queues the one with the longer decode steps would answer later."""
    quick = candidate("quick", queued_tokens=2000.0, num_running=2, decode_token_s=0.01)
    slow = candidate("slow", queued_tokens=2000.0, num_running=2, decode_token_s=0.02)
    assert best(Algorithm1(), slow, quick) == "quick"


def test_decoding_beside_many_costs_more_than_computing_a_short_prompt() -> None:
    """Prompts that share all they have leave the TE that has it before each slows the steps of many others."""
    few: dict[str, Any] = {"num_running": 2, "decode_row_s": 0.001, "decode_token_s": 0.001}
    assert best(Algorithm1(), candidate("busy", matched=10, **few), candidate("idle")) == "busy"
    many = few | {"num_running": 12}
    assert best(Algorithm1(), candidate("busy", matched=10, **many), candidate("idle")) == "idle"


def test_a_shared_page_does_not_outweigh_the_share_of_late() -> None:
    """A TE that was given far more than its share in the last minute is not given what others have little more of to
    compute, though nobody has anything in flight; a conversation of its own stays with it."""
    rest = [candidate(f"te-{n}", recent_s=1.0) for n in range(7)]
    assert best(Algorithm1(), candidate("full", matched=1, recent_s=2.0), *rest) != "full"
    late = [candidate(f"te-{n}", recent_s=1.7) for n in range(7)]
    assert best(Algorithm1(), candidate("full", matched=9, recent_s=2.0), *late) == "full"


def test_small_prompts_fill_up_and_leave_room_for_a_long_one() -> None:
    """Of two TEs below the level the fuller one is better; a prompt as long as all the others goes to the emptier."""
    tes = [candidate("fuller", recent_s=8.0), candidate("emptier", recent_s=2.0)]
    tes += [candidate(f"te-{n}", recent_s=11.0) for n in range(6)]
    assert best(Algorithm1(), *tes) == "fuller"
    for one in tes:
        one.prefill_tokens, one.prefill_s, one.ttft_s = 7000, 7.0, 7.0
    assert best(Algorithm1(), *tes) == "emptier"


def test_the_emptiest_decodes() -> None:
    """For what only decodes, room for KV comes before load, and load decides between equally full TEs."""
    tes = [
        candidate("full", pages_active=900),
        candidate("busy", pages_active=301, outstanding_s=5.0),
        candidate("idle", pages_active=300, outstanding_s=1.0),
    ]
    assert best(Algorithm1(), *tes, kind=TaskKind.DECODE) == "idle"


def test_the_type_by_heatmap_and_by_load() -> None:
    """At equal load the heatmap's sign decides; a type that is busier by more than the gain is not chosen."""
    whole = candidate("c", decode_s=1.0)
    pair = [candidate("p", role="prefill", decode_s=1.0), candidate("d", role="decode")]
    policy = Algorithm1()
    assert policy.is_split(work(), 0.5, [whole, *pair])
    assert not policy.is_split(work(), -0.5, [whole, *pair])
    pair[0].outstanding_s = 2.0
    assert not policy.is_split(work(), 0.5, [whole, *pair])
    whole.outstanding_s = 4.0
    assert policy.is_split(work(), -0.5, [whole, *pair])


def test_round_robin_takes_turns() -> None:
    """Each TE in turn whatever it has, and pairs in proportion to their number."""
    policy = RoundRobin()
    tes = [candidate("b", matched=9), candidate("a", outstanding_s=9.0), candidate("c")]
    assert [best(policy, *tes) for _ in range(4)] == ["a", "b", "c", "a"]
    types = [candidate("c1"), candidate("c2"), candidate("p", role="prefill")]
    splits = [policy.is_split(work(), -9.0, types) for _ in range(6)]
    assert splits == [False, False, True] * 2


def test_the_other_rules() -> None:
    """Least load heeds load alone, strict prefix the prefix alone, and SGLang's and Dynamo's both, in their ways."""
    tes = [candidate("idle"), candidate("busy", matched=9, outstanding_s=9.0, num_running=3)]
    assert best(LeastLoad(), *tes) == "idle"
    assert best(StrictPrefix(), *tes) == "busy"
    assert best(CacheAware(), *tes) == "busy"
    tes[1].num_running = 70
    assert best(CacheAware(), *tes) == "idle"
    tes[1].num_running, tes[1].matched_pages, tes[1].pages_cached = 3, 2, 50
    assert best(CacheAware(), *tes) == "idle"
    assert best(KvCost(), candidate("idle"), candidate("held", matched=9, pages_active=8)) == "held"
    assert (
        best(KvCost(), candidate("idle"), candidate("full", matched=9, pages_active=20)) == "idle"
    )


def test_the_roster_knows_them_by_name() -> None:
    """Every name makes a fresh policy of that name, ours by default, and another name is an error that lists them."""
    assert [make(name).name for name in NAMES] == list(NAMES)
    assert DEFAULT == "deepflow"
    with pytest.raises(ConfigError, match="round-robin"):
        make("fastest")


@settings(max_examples=30)
@given(
    st.lists(
        st.builds(
            candidate,
            te=st.uuids().map(str),
            matched=st.integers(0, 10),
            outstanding_s=st.floats(0, 100),
            recent_s=st.floats(0, 100),
            pages_active=st.integers(0, 1000),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(NAMES),
    st.sampled_from([TaskKind.GENERATE, TaskKind.PREFILL, TaskKind.DECODE]),
)
def test_scores_are_of_each_candidate_alone(
    tes: list[Candidate], name: str, kind: TaskKind
) -> None:
    """Every rule scores every candidate, and the order in which it sees them changes no score."""
    scores = make(name).scores(work(kind), tes)
    again = make(name).scores(work(kind), tes[::-1])
    assert len(scores) == len(tes)
    assert Counter(round(s, 6) for s in again) == Counter(round(s, 6) for s in scores)
