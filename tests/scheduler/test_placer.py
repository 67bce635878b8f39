"""The placer: roles, ties, what it remembers of what it gave; and several of them at once."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.costs import Costs
from services.scheduler.heatmap import Heatmap, Heatmaps
from services.scheduler.lengths import Lengths
from services.scheduler.placer import MAX_TRIES, Placer
from services.scheduler.policy.roster import make
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from services.scheduler.regret import Regrets
from services.scheduler.work import Length, Work
from shared.liveness import Liveness
from shared.messages import Band, TaskEnded, TaskKind, TeBeat
from shared.metrics import Metrics
from shared.rtc_messages import BlocksDump

PAGES = [bytes([n]) * 16 for n in range(200)]


def placer(heat: float = 0.5, seed: int = 1) -> Placer:
    """With a heatmap that says the same of everything; a token costs a millisecond."""
    heatmap = Heatmap(
        prefill_lens=(1,), ratios=(1.0,), rates=(1.0,), values=(((heat,),),), source="engine"
    )
    costs = Costs()
    return Placer(
        policy=make("deepflow"),
        registry=Registry(Liveness(), costs=costs),
        trees=PromptTrees(),
        heatmaps=Heatmaps(heatmap),
        lengths=Lengths(),
        costs=costs,
        random=Random(seed),
    )


def beat(one: Placer, te: str, now: float = 0.0, **fields: Any) -> None:
    """A TE of model `m` beats."""
    message = TeBeat(id=te, model="m", pod="pod", state="ready", **fields)
    one.registry.beat(message, now)
    one._trees.seen(te, "m", message.role)


def holds(one: Placer, te: str, num_pages: int) -> None:
    """The TE says what it has."""
    one._trees.load(BlocksDump(te=te, model="m", seq=1, hashes=PAGES[:num_pages]))


def work(num_pages: int = 64, kind: TaskKind = TaskKind.GENERATE, **fields: Any) -> Work:
    """A prompt of so many pages."""
    values: dict[str, Any] = {
        "request": "r", "attempt": 1, "model": "m", "tenant": "t", "kind": kind,
        "band": Band.DEFAULT, "num_known": num_pages * 16 + 1, "hashes": PAGES[:num_pages],
        "num_choices": 1, "length": Length(low=1, mid=64),
    }  # fmt: skip
    return Work(**{**values, **fields})


def order(one: Placer, task: Work, **fields: Any) -> list[str]:
    """The TEs in the order in which they would be asked."""
    return [c.te for c in one.place(task, 0.0, **fields).candidates]


def test_roles_are_tried_in_turn() -> None:
    """A task goes to the TEs it is meant for, then to others, and to those to avoid only after all of them."""
    one = placer()
    for role in ("prefill", "decode", "colocated"):
        for number in range(5):
            beat(one, f"{role}-{number}", role=role, waiting_tokens=1000 * number)
    away = frozenset({"prefill-0", "decode-0", "colocated-0"})
    decision = one.place(work(avoid=away), 0.0)
    assert [c.te for c in decision.shortlist()] == [
        f"{role}-{n}" for role in ("colocated", "decode", "prefill") for n in (1, 2, 3)
    ]
    assert MAX_TRIES == 3
    assert order(one, work(avoid=away))[-3:] == ["colocated-0", "decode-0", "prefill-0"]
    assert order(one, work(kind=TaskKind.PREFILL)) == [f"prefill-{n}" for n in range(5)]
    decode = work(kind=TaskKind.DECODE)
    assert order(one, decode, holder="prefill-4")[-1] == "prefill-4"
    assert len(order(one, decode, holder="decode-4")) == 5


def test_ties_are_drawn_and_repeatable() -> None:
    """Equal TEs are chosen evenly, and a seed gives the same choices again."""
    one, two = placer(seed=7), placer(seed=7)
    for number in range(4):
        beat(one, str(number))
        beat(two, str(number))
    firsts = [order(one, work())[0] for _ in range(400)]
    assert firsts == [order(two, work())[0] for _ in range(400)]
    assert all(60 < firsts.count(te) < 140 for te in "0123")


def test_what_was_given_is_assumed_to_be_there() -> None:
    """What a TE is asked to take counts as held there before any event says so, for a while; a refusal leaves no load
    behind."""
    one = placer()
    for te in ("a", "b"):
        beat(one, te)
    refused, taken = one.place(work(), 0.0).candidates
    one.asked(refused, work(), "t", 0.0)
    one.refused(refused, "t", 0.0)
    one.asked(taken, work(), "t", 0.0)
    one.accepted(taken, work(), "t", 0.0)
    again = one.place(work(128), 0.1)
    assert {c.te: (c.matched_pages, c.dispatched_s > 0) for c in again.candidates} == {
        taken.te: (64, True),
        refused.te: (64, False),
    }
    for te in ("a", "b"):
        beat(one, te, now=3.0)
    later = one.place(work(128), 3.0)
    assert [c.matched_pages for c in later.candidates] == [0, 0]


@pytest.mark.parametrize(
    ("heat", "num_pages", "held", "fields", "split"),
    [
        (0.5, 64, 0, {}, True),
        (-0.5, 64, 0, {}, False),
        (0.5, 64, 60, {}, False),  # too little is left to compute
        (0.5, 8, 0, {}, False),
        (0.5, 64, 0, {"num_choices": 2}, False),
        (0.5, 64, 0, {"avoid": frozenset({"p"})}, False),
    ],
)
def test_step_one(
    heat: float, num_pages: int, held: int, fields: dict[str, Any], split: bool
) -> None:
    """A pair takes what the heatmap gives it, if there is enough to compute that nobody has, and a pair is up."""
    one = placer(heat)
    for te, role in (("p", "prefill"), ("d", "decode"), ("c", "colocated")):
        beat(one, te, role=role)
    holds(one, "c", held)
    assert one.is_split(work(num_pages, **fields), 0.0) is split


def test_predicted_beside_actual() -> None:
    """A decision can be asked for by the answer's name, and shows what was expected, what came, and the regret."""
    one, regrets = placer(), Regrets(Metrics(), max_requests=2)
    for te in ("a", "b"):
        beat(one, te, waiting_tokens=8000 if te == "b" else 0)
    holds(one, "b", 64)
    decision = one.place(work(request="chatcmpl-1-0"), 0.0)
    regrets.placing("t", decision)
    decision.answers.append(("a", "accepted"))
    regrets.placed(decision, "a")
    regrets.ended(
        TaskEnded(
            task="t", request="chatcmpl-1-0", attempt=1, te="a", finish="stop", prompt_tokens=1025,
            cached_tokens=16, output_tokens=5, first_token_ms=2000, total_ms=3000,
        )
    )  # fmt: skip
    [told] = regrets.of("chatcmpl-1")
    assert told == regrets.of("chatcmpl-1-0")[0]
    assert [(c["te"], c["cached_tokens"]) for c in told["candidates"]] == [("a", 0), ("b", 1024)]
    assert (told["chosen"], told["actual"]["cached_tokens"]) == ("a", 16)
    assert told["regret"] == {"tokens": 1008, "seconds": 0.0}  # the other would have come later
    for name in ("x", "y"):
        regrets.placing("t", one.place(work(request=name), 0.0))
    assert regrets.of("chatcmpl-1") == []
    assert [d["request"] for d in regrets.latest(9)] == ["y", "x"]


def end(te: str, **fields: Any) -> TaskEnded:
    """A TE is done with task `t` of request `r`."""
    values: dict[str, Any] = {
        "task": "t", "request": "r", "attempt": 1, "te": te, "finish": "stop", "prompt_tokens": 1025,
        "cached_tokens": 0, "output_tokens": 5, "first_token_ms": 2000, "total_ms": 3000,
    }  # fmt: skip
    return TaskEnded(**{**values, **fields})


def test_a_decision_keeps_what_explains_it() -> None:
    """Of a thousand TEs the best are kept, and the one with the longest prefix however busy it is; all are counted."""
    one, regrets = placer(), Regrets(Metrics(), max_requests=2)
    for number in range(1000):
        beat(one, f"te-{number}", waiting_tokens=99_000 if number == 500 else number)
    holds(one, "te-500", 64)
    decision = one.place(work(), 0.0)
    assert decision.num_candidates == 1000
    assert len(decision.candidates) <= 10
    assert [c.te for c in decision.shortlist()] == ["te-0", "te-1", "te-2"]
    regrets.placing("t", decision)
    regrets.placed(decision, "te-0")
    regrets.ended(end("te-0"))
    assert regrets.of("r")[0]["regret"]["tokens"] == 1024


def test_nobody_regrets_a_te_that_was_full() -> None:
    """A TE that refused was no alternative, however soon it would have answered; an end may overtake the answer."""
    one, metrics = placer(), Metrics()
    regrets = Regrets(metrics, max_requests=2)
    beat(one, "full")
    beat(one, "taken", waiting_tokens=500)
    decision = one.place(work(), 0.0)
    regrets.placing("t", decision)
    decision.answers += [("full", "overloaded"), ("taken", "accepted")]
    regrets.ended(end("taken"))
    regrets.placed(decision, "taken")
    assert regrets.of("r")[0]["regret"] == {"tokens": None, "seconds": None}
    counted = metrics.registry.get_sample_value(
        "deepflow_scheduler_prompt_tokens_total", {"of": "all"}
    )
    assert counted == 1025


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(2, 6),
    st.lists(
        st.tuples(
            st.integers(0, 3),  # the JE that gets the request
            st.floats(0.0, 0.3),  # until the next request
            st.integers(0, 9),  # 0 to 5: that TE's beat reaches that JE, as it was then or before
            st.integers(0, 3),  # how many beats late it is
            st.booleans(),  # whether the answer comes before the next request
        ),
        min_size=1,
        max_size=60,
    ),
)
def test_beats_late_lost_or_out_of_turn(
    num_jes: int, num_tes: int, events: list[tuple[int, float, int, int, bool]]
) -> None:
    """Whatever of the beats and answers comes when: no TE holds more than it admits, each request is held by one TE or
    refused because all that were asked are full, and no JE believes in less than nothing."""
    jes = [placer(seed=n) for n in range(num_jes)]
    tes = [f"te-{n}" for n in range(num_tes)]
    room = 3
    held: dict[str, set[int]] = {te: set() for te in tes}
    past: dict[str, list[TeBeat]] = {te: [] for te in tes}
    for one in jes:
        one.registry.num_peers = num_jes
        for te in tes:
            beat(one, te)
    now, late = 0.0, []
    for number, (je, wait_s, which, lag, prompt) in enumerate(events):
        now += wait_s
        one = jes[je % num_jes]
        task = work(8, request=str(number))
        decision = one.place(task, now)
        assert all(c.load_s >= 0 and c.queued_tokens >= 0 for c in decision.candidates)
        full = 0
        for candidate in decision.shortlist():
            one.asked(candidate, task, str(number), now)
            if len(held[candidate.te]) < room:
                held[candidate.te].add(number)
                late.append((one, candidate, task))
                break
            full += 1
            one.refused(candidate, str(number), now)
        placed = sum(number in numbers for numbers in held.values())
        assert placed == 1 or full == min(MAX_TRIES, num_tes)
        if prompt:
            for asker, candidate, given_work in late:
                asker.accepted(candidate, given_work, given_work.request, now)
            late.clear()
        for te, numbers in held.items():
            assert len(numbers) <= room
            past[te].append(
                TeBeat(
                    id=te, model="m", pod="pod", state="ready", step=number,
                    running=len(numbers), outstanding_s=0.1 * len(numbers),
                )
            )  # fmt: skip
        if which < num_tes:
            beats = past[tes[which]]
            one.registry.beat(beats[max(0, len(beats) - 1 - lag)], now)
        if which >= 8 and held[tes[number % num_tes]]:
            over = held[tes[number % num_tes]].pop()
            for other in jes:
                other.ended(tes[number % num_tes], str(over))


def test_job_executors_do_not_herd() -> None:
    """Four JEs that see the same beats, one TE being emptier, fill it up to the others but not past them."""
    jes = [placer(seed=n) for n in range(4)]
    for one in jes:
        one.registry.num_peers = len(jes)
        for number in range(8):
            beat(one, f"te-{number}", waiting_tokens=0 if number == 0 else 2000)
    given: list[str] = []
    for number in range(80):
        one = jes[number % len(jes)]
        task = work(0, request=str(number), num_known=200)
        best = one.place(task, 0.0).candidates[0]
        one.asked(best, task, str(number), 0.0)
        given.append(best.te)
    most = max(given.count(f"te-{n}") for n in range(1, 8))
    assert 8 <= given.count("te-0") <= 8 + 2 * most
