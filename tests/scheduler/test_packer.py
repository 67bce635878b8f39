"""Where TEs go: within budgets, minima first, as few moves as there can be, and the same plan whoever makes it."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cluster.chain import sources
from services.scheduler.cluster.packer import Cost, Plan, Pod, Rank, Wish, pack, planned, taken
from services.scheduler.cluster.shortage import Shortages
from shared.scaling_messages import PodBeat, PodModel, PodTe

MODELS = ("a", "b", "c")
SMALL = Cost(te_bytes=10, weights_bytes=50)


def pod(id_: str = "p", **changes: object) -> Pod:
    """A pod host with room for four TEs of two models."""
    values: dict[str, object] = {
        "max_tes": 4,
        "num_bytes": 1000,
        "cores": 4,
        "costs": {"a": SMALL, "b": SMALL},
    }
    return Pod(id=id_, **(values | changes))  # type: ignore[arg-type]


def wish(model: str, target: int, **changes: object) -> Wish:
    """All of it is needed now."""
    return Wish(model=model, target=target, **({"needed": target} | changes))  # type: ignore[arg-type]


COSTS = st.builds(
    Cost,
    te_bytes=st.integers(0, 100),
    weights_bytes=st.integers(0, 300),
    resident_bytes=st.integers(0, 300),
)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Pod], list[Wish], Plan]:
    """Pod hosts, wishes, and a plan that was made for the same pod hosts and other wishes."""
    pods = [
        Pod(
            id=f"p{number}",
            max_tes=draw(st.integers(0, 8)),
            num_bytes=draw(st.integers(0, 1500)),
            cores=draw(st.integers(0, 8)),
            costs={name: draw(COSTS) for name in draw(st.sets(st.sampled_from(MODELS)))},
            caps=draw(st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3), max_size=1)),
            closed=draw(st.booleans()) if number == 2 else False,
        )
        for number in range(draw(st.integers(0, 3)))
    ]
    before = pack(pods, draw(WISHES), {})
    return pods, draw(WISHES), before


WISHES = st.lists(
    st.builds(
        Wish,
        model=st.sampled_from(MODELS),
        target=st.integers(0, 8),
        min_tes=st.integers(0, 3),
        needed=st.integers(0, 8),
        value=st.floats(0, 100),
        may_shrink=st.booleans(),
    ),
    unique_by=lambda one: one.model,
)


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_no_budget_is_exceeded_and_no_model_gets_more_than_it_wants(
    cluster: tuple[list[Pod], list[Wish], Plan],
) -> None:
    """Neither of TEs nor of bytes nor of what a pod host can have; a surplus is what was there and may not go yet."""
    pods, wishes, before = cluster
    plan = pack(pods, wishes, before)
    for one in pods:
        assert sum(plan[one.id].values()) <= one.max_tes
        assert taken(one, plan[one.id]) <= one.num_bytes
        for model, num in plan[one.id].items():
            assert 0 < num <= one.caps.get(model, num)
            assert model in one.costs
            if one.closed:
                assert num <= before[one.id].get(model, 0)
    for one_wish in wishes:
        num = planned(plan, one_wish.model)
        assert num <= max(one_wish.target, planned(before, one_wish.model))
        if one_wish.may_shrink:
            assert num <= one_wish.target


@given(clusters(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_in_which_things_are_named_is_irrelevant(
    cluster: tuple[list[Pod], list[Wish], Plan], random: Random
) -> None:
    """Two managers with the same books make the same plan."""
    pods, wishes, before = cluster
    plan = pack(pods, wishes, before)
    pods, wishes = random.sample(pods, len(pods)), random.sample(wishes, len(wishes))
    names = random.sample(list(before), len(before))
    shuffled = {name: dict(reversed(before[name].items())) for name in names}
    assert pack(pods, wishes, shuffled) == plan


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_a_plan_is_its_own_next_plan(cluster: tuple[list[Pod], list[Wish], Plan]) -> None:
    """Nothing moves without a need: the same wishes again, and again, change nothing."""
    pods, wishes, before = cluster
    plan = pack(pods, wishes, before)
    assert pack(pods, wishes, plan) == plan


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_who_has_too_few_finds_no_room_left(
    cluster: tuple[list[Pod], list[Wish], Plan],
) -> None:
    """No wish is left open where a TE more would fit; and no minimum, where it would if one above its own yielded."""
    pods, wishes, before = cluster
    plan = pack(pods, wishes, before)
    least = {one.model: one.min_tes for one in wishes}
    for one in wishes:
        num = planned(plan, one.model)
        if num >= one.target:
            continue
        for host in pods:
            held = plan[host.id]
            had = held.get(one.model, 0)
            if one.model not in host.costs or host.closed or had >= host.caps.get(one.model, 9):
                continue
            more = held | {one.model: had + 1}
            is_spare = one.rank(num + 1) > Rank.FIRST
            assert not fits(host, more) or (is_spare and sum(more.values()) > host.cores > 0)
            if num >= one.min_tes:
                continue
            for other in held.keys() - {one.model}:
                if planned(plan, other) > least.get(other, 0):
                    assert not fits(host, more | {other: held[other] - 1})


def fits(host: Pod, held: dict[str, int]) -> bool:
    """Whether there is room for so many of each."""
    return sum(held.values()) <= host.max_tes and taken(host, held) <= host.num_bytes


def test_minima_come_first_then_the_first_of_each_then_what_is_needed() -> None:
    """With room for three: the minimum of one, and one TE for each of the others, however valuable their second is."""
    wishes = [
        wish("a", 4, value=1000.0),
        wish("b", 1, value=1.0),
        wish("c", 3, min_tes=1, needed=0, value=0.0),
    ]
    host = pod(max_tes=3, costs=dict.fromkeys(MODELS, SMALL))
    assert pack([host], wishes, {}) == {"p": {"a": 1, "b": 1, "c": 1}}
    wishes[2] = wish("c", 3, min_tes=2, needed=0)
    assert pack([host], wishes, {})["p"]["c"] == 2


def test_what_is_merely_kept_yields_to_the_first_request() -> None:
    """Of the idle ones the least valuable; what is in use stays."""
    host = pod(max_tes=3, costs=dict.fromkeys(MODELS, SMALL))
    before = {"p": {"a": 2, "b": 1}}
    wishes = [wish("a", 2, value=5.0), wish("b", 1, needed=0, value=0.1), wish("c", 1, value=1.0)]
    assert pack([host], wishes, before) == {"p": {"a": 2, "c": 1}}
    wishes = [wish("a", 2, value=5.0), wish("b", 1, value=0.1), wish("c", 1, value=1.0)]
    assert pack([host], wishes, before) == {"p": {"a": 1, "b": 1, "c": 1}}


def test_what_is_in_use_moves_for_much_more_only() -> None:
    """Two models that both want a full host share it, and do not take from each other again and again."""
    before = {"p": {"a": 2, "b": 2}}
    both = [wish("a", 4, value=10.0), wish("b", 4, value=11.0)]
    assert pack([pod()], both, before) == before
    both = [wish("a", 4, value=1.0), wish("b", 4, value=11.0)]
    assert pack([pod()], both, before) == {"p": {"a": 1, "b": 3}}


def test_a_new_te_goes_where_the_weights_are_unless_the_cores_are_taken() -> None:
    """Beside one that runs, else where they are in memory; a host whose cores are all in use comes last."""
    warm = Cost(te_bytes=10, weights_bytes=50, resident_bytes=50)
    cold, held = pod("p1", cores=2), pod("p2", cores=2, costs={"a": warm, "b": SMALL})
    assert pack([cold, held], [wish("a", 1)], {}) == {"p1": {}, "p2": {"a": 1}}
    plan = pack([cold, held], [wish("a", 3)], {"p1": {}, "p2": {"a": 2}})
    assert plan == {"p1": {"a": 1}, "p2": {"a": 2}}


def test_a_minimum_in_the_way_of_another_moves_once_it_has_a_place_elsewhere() -> None:
    """The one pod host that knows `c` is taken by the first `b`, whose second TE finds room on the other."""
    warm = Cost(te_bytes=10, weights_bytes=50, resident_bytes=50)
    only_b = pod("p0", max_tes=1, costs={"b": SMALL})
    knows_c = pod("p1", max_tes=1, costs={"b": warm, "c": SMALL})
    wishes = [wish("b", 2, min_tes=1), wish("c", 1, min_tes=1)]
    plan = pack([only_b, knows_c], wishes, {})
    assert plan == {"p0": {"b": 1}, "p1": {"c": 1}}
    assert pack([only_b, knows_c], wishes, plan) == plan


def test_tes_beyond_the_cores_are_had_by_name_only() -> None:
    """Demand and habit bring no more TEs than there are cores; a minimum does, and so does the first of a model."""
    host = pod(max_tes=8, cores=2)
    assert pack([host], [wish("a", 5)], {}) == {"p": {"a": 2}}
    assert pack([host], [wish("a", 5, min_tes=5)], {}) == {"p": {"a": 5}}
    assert pack([host], [wish("a", 5), wish("b", 3)], {"p": {"a": 2}}) == {"p": {"a": 2, "b": 1}}
    assert pack([pod(cores=0)], [wish("a", 4)], {}) == {"p": {"a": 4}}


def test_the_idlest_te_goes_first() -> None:
    """And not one that has work, on whichever host it is."""
    pods = [pod("p1", loads={"a": [3, 4]}), pod("p2", loads={"a": [0, 5]})]
    assert pack(pods, [wish("a", 3)], {}) == {"p1": {"a": 2}, "p2": {"a": 1}}
    assert pack(pods, [wish("a", 3, may_shrink=False)], {}) == {"p1": {"a": 2}, "p2": {"a": 2}}


def test_tes_that_nobody_plans_take_room() -> None:
    """Theirs of TEs, and of memory; they stay."""
    host = pod(fixed={"a": 3})
    assert pack([host], [wish("a", 4)], {}) == {"p": {"a": 1}}
    host = pod(fixed={"a": 3}, num_bytes=89)
    assert pack([host], [wish("a", 4), wish("b", 1)], {}) == {"p": {}}


# ------------------------------------------------------------------------------------------------- shortages, chains


def beat(id_: str = "p", **tes: str) -> PodBeat:
    """A pod host with these TEs, name -> state, all of model "a"."""
    models = [PodModel(name="a", min_tes=0, max_tes=8, te_bytes=1, weights_bytes=1)]
    seats = [
        PodTe(te=name, model="a", role="colocated", state=state, since_ms=60_000)
        for name, state in tes.items()
    ]
    return PodBeat(kind="pod", id=id_, host="h", models=models, tes=seats)


def test_a_pod_host_that_cannot_is_left_alone_for_longer_each_time() -> None:
    """After a second of patience, for 5 s, then 10 s; until it shows that it can after all."""
    short, has = Shortages(), beat(te1="ready")
    short.saw(has, {"a": 2}, 0.0, others=set())
    short.saw(has, {"a": 2}, 0.9, others=set())
    assert short.caps(0.9) == {}
    short.saw(has, {"a": 2}, 1.0, others=set())
    assert short.caps(1.1) == {"p": {"a": 1}}
    short.saw(has, {"a": 1}, 2.0, others=set())
    assert short.caps(5.9) == {"p": {"a": 1}}
    assert short.caps(6.0) == {}
    for now in (6.1, 7.1):
        short.saw(has, {"a": 2}, now, others=set())
    assert short.caps(17.0) == {"p": {"a": 1}}
    short.saw(beat(te1="ready", te2="starting"), {"a": 2}, 17.0, others=set())
    assert short.caps(17.0) == {}


def test_a_pod_host_that_makes_room_is_given_time() -> None:
    """As long as something drains there it is about it."""
    short, has = Shortages(), beat(te1="ready", te2="draining")
    for now in (0.0, 1.5, 3.0):
        short.saw(has, {"a": 2}, now, others=set())
    assert short.caps(3.0) == {}


def test_tes_that_die_again_and_again_are_tried_elsewhere() -> None:
    """Where another pod host could run the model; else they stay, and are started again in time. The plan follows."""
    has = beat(te1="waiting")
    for others, caps in ((set[str](), {}), ({"a"}, {"p": {"a": 0}})):
        short = Shortages()
        for now in (0.0, 1.0):
            short.saw(has, {"a": 1}, now, others=others)
        assert short.caps(1.0) == caps
    pods = [pod("p", loads={"a": [0]}, caps={"a": 0}), pod("q")]
    assert pack(pods, [wish("a", 1)], {"p": {"a": 1}}) == {"p": {}, "q": {"a": 1}}


def test_weights_go_down_a_row_of_pod_hosts() -> None:
    """Each takes from its own, from the one before it that loads, then from those that are ready; in no circle."""
    pods = [
        beat("p1", te1="ready"),
        beat("p2", te2="loading"),
        beat("p3", te3="loading"),
        beat("p4"),
        beat("p5", te5="draining"),
    ]
    assert sources("a", reversed(pods)) == {
        "p1": ["te1"],
        "p2": ["te1"],
        "p3": ["te2", "te1"],
        "p4": ["te3", "te1"],
        "p5": ["te3", "te1"],
    }
    assert sources("b", pods) == {}
