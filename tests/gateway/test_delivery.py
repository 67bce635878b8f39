"""The state machine of one request: exact delivery through loss, repetition, reordering and dead TEs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.actions import Action, Ask, Drop, Emit, Submit
from services.gateway.delivery import MAX_LOSSES, Delivery, Limits
from shared.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from shared.messages import Failure
from tests.gateway.world import LIMITS, World, delta


def make(n: int = 1, limits: Limits = LIMITS) -> Delivery:
    """A request that was submitted at time 0."""
    delivery = Delivery(n, limits, 0.0, lambda: 0.5)
    delivery.start(0.0)
    return delivery


def emitted(actions: list[Action]) -> list[int]:
    """The tokens that go out."""
    return [token for action in actions if isinstance(action, Emit) for token in action.ids]


# ------------------------------------------------------------------------------------------------- the law, by chance


@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    num_steps=st.integers(0, 120),
)
@settings(max_examples=120, deadline=None)
def test_tokens_arrive_exactly_once_in_order(seed: int, lengths: list[int], num_steps: int) -> None:
    """Whatever is lost, repeated, reordered or killed, the client gets the true tokens, then one end per choice."""
    random = Random(seed)
    world = World(random, [[random.randrange(1000) for _ in range(n)] for n in lengths])
    world.suffer(num_steps)
    world.settle()
    world.check()


# ----------------------------------------------------------------------------------------------------- case by case


def test_a_gap_is_asked_for_and_what_came_after_it_is_kept() -> None:
    """A delta beyond a gap waits; the replay fills the gap and both go out in order."""
    delivery = make()
    delivery.accepted(1, "je", "te", 0.0)
    assert emitted(delivery.tokens("te", delta(0, [1]), 0.1)) == [1]
    assert delivery.tokens("te", delta(2, [3]), 0.2) == [Ask("te", 1, [1])]
    assert delivery.tokens("te", delta(3, [4]), 0.2) == []  # one question at a time
    assert emitted(delivery.replayed("te", 1, [delta(1, [2])], 0.3)) == [2, 3, 4]


def test_an_overlap_is_trimmed() -> None:
    """Of a delta that begins before what the client has, only the rest goes out."""
    delivery = make()
    delivery.tokens("te", delta(0, [1, 2]), 0.1)
    assert emitted(delivery.tokens("te", delta(1, [2, 3]), 0.1)) == [3]
    assert delivery.tokens("te", delta(0, [1, 2]), 0.1) == []


def test_a_stale_attempt_is_dropped_and_its_te_told() -> None:
    """Tokens of an attempt that was given up do not reach the client, and their TE is told to stop."""
    delivery = make()
    delivery.accepted(1, "je", "te-1", 0.0)
    [drop, submit] = delivery.te_lost("te-1", 1.0)
    assert drop == Drop("te-1", 1)
    assert isinstance(submit, Submit)
    assert submit.attempt == 2
    assert delivery.avoid == ["te-1"]
    assert delivery.tokens("te-1", delta(0, [1]), 1.1) == [Drop("te-1", 1)]


def test_silence_is_probed_with_growing_patience() -> None:
    """A TE without news is asked after a second, then after two, and never hurried."""
    delivery = make()
    delivery.accepted(1, "je", "te", 0.0)
    assert delivery.tick(0.9, connected=True) == []
    assert delivery.tick(1.1, connected=True) == [Ask("te", 1, [0])]
    delivery.replayed("te", 1, [], 1.1)
    assert delivery.tick(2.9, connected=True) == []
    assert delivery.tick(3.2, connected=True) == [Ask("te", 1, [0])]


def test_nobody_is_judged_while_the_bus_is_away() -> None:
    """Silence counts for nothing without a bus; when it is back, everything is asked for."""
    delivery = make()
    delivery.accepted(1, "je", "te", 0.0)
    assert delivery.tick(50.0, connected=False) == []
    assert delivery.tick(50.5, connected=True) == []
    assert delivery.reconnected(51.0) == [Ask("te", 1, [0])]


def test_a_forgotten_request_is_submitted_again_with_its_tokens() -> None:
    """A TE that does not know the request any more makes it a loss, and no reason to avoid that TE."""
    delivery = make()
    delivery.tokens("te", delta(0, [1, 2]), 0.1)
    actions = delivery.replay_failed("te", 1, NotFound("?"), 2.0)
    assert [type(action) for action in actions] == [Drop, Submit]
    assert delivery.output == [[1, 2]]
    assert delivery.avoid == []


def test_overload_is_the_clients_to_decide_only_before_the_start() -> None:
    """A first submission that finds everything full fails as such; a resumed one tries on."""
    [end] = make().refused(1, Overloaded("full", retry_after_s=3), 0.1)
    assert isinstance(end, Emit)
    assert isinstance(end.failure, Overloaded)
    started = make()
    started.accepted(1, "je", "te", 0.0)
    started.te_lost("te", 1.0)
    [again] = started.refused(2, Overloaded("full"), 1.1)
    assert isinstance(again, Submit)
    assert again.delay_s > 0


def test_no_capacity_fails_once_the_park_budget_is_spent() -> None:
    """Without any TE a request is tried again until its park budget ends, then fails as unavailable."""
    delivery = make(limits=Limits(deadline_s=600, park_s=5))
    [again] = delivery.refused(1, Unavailable("nobody"), 1.0)
    assert isinstance(again, Submit)
    [end] = delivery.refused(2, Unavailable("nobody"), 5.1)
    assert isinstance(end, Emit)
    assert isinstance(end.failure, Unavailable)
    assert delivery.over


def test_the_deadline_ends_every_live_choice_once() -> None:
    """At the deadline each choice without an end gets one, whatever the TE does, and the TE is told."""
    delivery = make(2, Limits(deadline_s=10, park_s=5))
    delivery.accepted(1, "je", "te", 0.0)
    delivery.tokens("te", delta(0, [1], finish="stop"), 1.0)
    actions = delivery.tick(10.0, connected=False)
    assert actions[0] == Drop("te", 1)
    [end] = [action for action in actions if isinstance(action, Emit)]
    assert end.choice == 1
    assert isinstance(end.failure, DeadlineExceeded)
    assert delivery.tick(11.0, connected=True) == []


def test_what_a_replica_calls_too_late_is_not_tried_again() -> None:
    """It would not be in time elsewhere either; so the client learns it at once."""
    delivery = make(1, Limits(deadline_s=10, park_s=5))
    delivery.accepted(1, "je", "te", 0.0)
    late = Failure(code=DeadlineExceeded.code, message="not to be finished in time")
    actions = delivery.tokens("te", delta(0, [], finish="failed", failure=late), 1.0)
    [end] = [action for action in actions if isinstance(action, Emit)]
    assert isinstance(end.failure, DeadlineExceeded)
    assert delivery.over


def test_a_stop_string_ends_one_choice_and_the_rest_goes_on() -> None:
    """The TE learns how many tokens count; later tokens of that choice, or its cancelled end, are nothing."""
    delivery = make(2)
    delivery.tokens("te", delta(0, [1, 2, 3]), 0.1)
    assert delivery.stop(0, 2) == [Drop("te", 1, 0, 2)]
    assert delivery.tokens("te", delta(3, [4]), 0.2) == []
    assert delivery.tokens("te", delta(4, [], finish="cancelled"), 0.2) == []
    assert emitted(delivery.tokens("te", delta(0, [7], choice=1), 0.2)) == [7]
    assert delivery.output[0] == [1, 2]


def test_a_stop_string_in_the_last_tokens_still_tells_the_te() -> None:
    """A choice that a delta both ends and takes past a stop string: the TE forgets what does not count."""
    for keep, told in ((2, [Drop("te", 1, 0, 2)]), (3, [])):
        delivery = make()
        [emit] = delivery.tokens("te", delta(0, [1, 2, 3], finish="length"), 0.1)
        assert isinstance(emit, Emit)
        assert delivery.over
        assert delivery.stop(0, keep) == told
        assert delivery.over


def test_a_client_that_left_is_cancelled_wherever_its_request_is() -> None:
    """Cancelling reaches the TE, the JE that parks it, or whoever says later that he took it."""
    running = make()
    running.accepted(1, "je", "te", 0.0)
    assert running.cancel() == [Drop("te", 1)]
    parked = make()
    parked.accepted(1, "je", None, 0.0)
    assert parked.cancel() == [Drop("je", 1)]
    asked = make()
    assert asked.cancel() == []
    assert asked.accepted(1, "je", "te", 0.1) == [Drop("te", 1)]


def test_a_dead_or_silent_je_loses_what_it_parked() -> None:
    """A parked request is submitted again when its JE dies, or tells nothing for long."""
    parked = make()
    parked.accepted(1, "je", None, 0.0)
    assert parked.parked
    assert [type(a) for a in parked.je_lost("je", 1.0)] == [Drop, Submit]
    silent = make()
    silent.accepted(1, "je", None, 0.0)
    assert [type(a) for a in silent.tick(5.1, connected=True)] == [Drop, Submit]


@pytest.mark.parametrize("code", ["unavailable", "internal", "overloaded"])
def test_a_failed_attempt_is_tried_again(code: str) -> None:
    """A TE that gives up for reasons of its own costs a resubmission, not the request."""
    delivery = make()
    delivery.accepted(1, "je", "te", 0.0)
    bad = delta(0, [], finish="failed", failure=Failure(code=code, message="no"))
    assert [type(a) for a in delivery.tokens("te", bad, 1.0)] == [Drop, Submit]


def test_a_request_that_cannot_succeed_fails_at_once() -> None:
    """An error of the request's own is not tried again."""
    [end] = make().refused(1, InvalidRequest("too long", param="prompt"), 0.1)
    assert isinstance(end, Emit)
    assert isinstance(end.failure, InvalidRequest)
    delivery = make()
    delivery.accepted(1, "je", "te", 0.0)
    bad = delta(0, [], finish="failed", failure=Failure(code="invalid_request", message="no"))
    [_, end] = delivery.tokens("te", bad, 1.0)
    assert isinstance(end, Emit)
    assert isinstance(end.failure, InvalidRequest)


def test_a_request_that_kills_every_te_is_given_up() -> None:
    """Losses in a row without a new token are bounded, so one request cannot take down TE after TE."""
    delivery = make()
    for number in range(1, MAX_LOSSES + 1):
        delivery.accepted(number, "je", f"te-{number}", float(number))
        assert isinstance(delivery.te_lost(f"te-{number}", float(number))[-1], Submit)
    delivery.accepted(MAX_LOSSES + 1, "je", "te-x", 20.0)
    end = delivery.te_lost("te-x", 20.0)[-1]
    assert isinstance(end, Emit)
    assert isinstance(end.failure, Internal)
