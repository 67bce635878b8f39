"""The order in which TEs are asked."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.policy import (
    MAX_TRIES,
    TIE_S,
    Candidate,
    Costs,
    order,
    order_by_room,
    order_for,
    shortlist,
)
from shared.messages import Request, Sampling, TaskKind


def request(**fields: object) -> Request:
    """A small request."""
    values: dict[str, object] = {
        "request": "r",
        "attempt": 1,
        "client": "gateway-1",
        "model": "m",
        "tenant": "t",
        "prompt": [1, 2, 3],
        "root": b"r" * 16,
        "hashes": [],
        "sampling": Sampling(max_tokens=10, seed=1),
        "deadline_ms": 60_000,
        "park_ms": 5_000,
    }
    return Request(**{**values, **fields})  # type: ignore[arg-type]


def test_least_outstanding_work_first() -> None:
    """The score is the TE's own prediction plus what this JE dispatched since."""
    tes = [
        Candidate(te="busy", outstanding_s=2.0),
        Candidate(te="fresh", outstanding_s=0.0, dispatched_s=1.0),
        Candidate(te="idle", outstanding_s=0.1),
    ]
    assert [c.te for c in order(tes, Random(1))] == ["idle", "fresh", "busy"]


def test_avoided_come_last() -> None:
    """A TE to avoid is asked only after all others, however idle it is."""
    tes = [
        Candidate(te="left", outstanding_s=0.0, avoid=True),
        Candidate(te="busy", outstanding_s=9.0),
    ]
    assert [c.te for c in order(tes, Random(1))] == ["busy", "left"]


def test_equal_load_prefers_the_longer_prefix() -> None:
    """Matched pages decide between equally loaded TEs, and never against load."""
    tes = [
        Candidate(te="none", outstanding_s=0.0),
        Candidate(te="some", outstanding_s=0.001, matched_pages=4),
        Candidate(te="most", outstanding_s=1.0, matched_pages=400),
    ]
    assert [c.te for c in order(tes, Random(1))] == ["some", "none", "most"]


def test_ties_are_drawn_and_repeatable() -> None:
    """Equal TEs are chosen evenly, and a seed gives the same choices again."""
    tes = [Candidate(te=str(n), outstanding_s=0.0) for n in range(4)]
    firsts = [order(tes, random)[0].te for random in [Random(7)] for _ in range(400)]
    again = [order(tes, random)[0].te for random in [Random(7)] for _ in range(400)]
    assert firsts == again
    assert all(60 < firsts.count(te) < 140 for te in "0123")


@given(
    st.lists(
        st.builds(
            Candidate,
            te=st.uuids().map(str),
            outstanding_s=st.floats(0, 100),
            dispatched_s=st.floats(0, 10),
            avoid=st.booleans(),
            matched_pages=st.integers(0, 3),
        ),
        unique_by=lambda c: c.te,
        max_size=12,
    ),
    st.integers(),
)
def test_order_is_a_permutation_by_score(tes: list[Candidate], seed: int) -> None:
    """Every candidate appears once; within avoided and not, scores never fall by more than a tie."""
    ordered = order(tes, Random(seed))
    assert sorted(c.te for c in ordered) == sorted(c.te for c in tes)
    for one, two in pairwise(ordered):
        assert one.avoid <= two.avoid
        if one.avoid == two.avoid:
            assert one.score <= two.score + TIE_S * 1.01


def test_the_emptiest_decodes() -> None:
    """For what only decodes, room for KV comes before load, and load decides between equally full TEs."""
    tes = [
        Candidate(te="full", outstanding_s=0.0, kv_use=0.9),
        Candidate(te="busy", outstanding_s=5.0, kv_use=0.301),
        Candidate(te="idle", outstanding_s=1.0, kv_use=0.3),
        Candidate(te="left", outstanding_s=0.0, kv_use=0.0, avoid=True),
    ]
    assert [c.te for c in order_by_room(tes, Random(1))] == ["idle", "busy", "full", "left"]


def test_roles_are_tried_in_turn() -> None:
    """A task goes to the TEs it is meant for, then to others, and to those to avoid only after all of them."""
    tes = [
        Candidate(te=f"{role}-{load}", outstanding_s=float(load), role=role, avoid=load == 0)
        for role in ("prefill", "decode", "colocated")
        for load in range(6)
    ]
    asked = [c.te for c in shortlist(order_for(TaskKind.GENERATE, tes, Random(1)))]
    assert asked == [f"{r}-{n}" for r in ("colocated", "decode", "prefill") for n in (1, 2, 3)]
    assert MAX_TRIES == 3
    for kind in (TaskKind.PREFILL, TaskKind.DECODE):
        names = [c.te for c in order_for(kind, tes, Random(1))]
        assert names[0] == f"{kind}-1"
        assert names[-1] == f"{kind}-0"
        assert len(names) == 6
    few = [c.te for c in order_for(TaskKind.GENERATE, tes[-6:-4], Random(1))]
    assert few == ["colocated-1", "colocated-0"]
    assert [c.te for c in order_for(TaskKind.GENERATE, [*tes[:1], *tes[-2:]], Random(1))] == [
        "colocated-4",
        "colocated-5",
        "prefill-0",
    ]


def test_a_pair_shares_the_work() -> None:
    """What a prefill task and a decode task are predicted to take is together what the whole would."""
    costs = Costs(prefill_tokens_per_s=10, decode_tokens_per_s=1, expected_output=4)
    whole = request(prompt=[1] * 20)
    assert costs.work_s(whole, TaskKind.PREFILL) == 2
    assert costs.work_s(whole, TaskKind.DECODE) == 4
    assert costs.num_tokens(whole) == 24


def test_work_counts_live_choices_and_delivered_tokens() -> None:
    """Predicted work grows with the prompt, with delivered tokens, and with the choices still to run."""
    costs = Costs(prefill_tokens_per_s=10, decode_tokens_per_s=1, expected_output=4)
    plain = request(prompt=[1] * 20)
    assert costs.work_s(plain) == 2 + 4
    two = request(prompt=[1] * 20, sampling=Sampling(max_tokens=2, seed=1, n=3), ended=[0])
    assert costs.work_s(two) == 2 + 2 * 2
    resumed = request(prompt=[1] * 20, output=[[1] * 10])
    assert costs.work_s(resumed) == 3 + 4
