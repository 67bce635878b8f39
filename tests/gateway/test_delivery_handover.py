"""The state machine of a request that moves: one attempt, prefilled on one TE and decoded on another."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.actions import Action, Ask, Drop, Emit, Submit
from services.gateway.delivery import HANDOVER_S, Delivery
from shared.errors import NotFound, Unavailable
from shared.messages import Failure
from tests.gateway.world import LIMITS, World, delta


def make() -> Delivery:
    """A request whose prefill TE `p` was accepted by `je` at time 0."""
    delivery = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    delivery.start(0.0)
    assert delivery.accepted(1, "je", "p", 0.0) == []
    return delivery


def moving() -> Delivery:
    """The same, once the first token (10) came, at time 1."""
    delivery = make()
    assert emitted(delivery.tokens("p", delta(0, [10], moves=True), 1.0)) == [10]
    return delivery


def emitted(actions: list[Action]) -> list[int]:
    """The tokens that go out."""
    return [token for action in actions if isinstance(action, Emit) for token in action.ids]


def kinds(actions: list[Action]) -> list[type[Action]]:
    """What the actions are."""
    return [type(action) for action in actions]


# ------------------------------------------------------------------------------------------------- the law, by chance


@given(seed=st.integers(0, 2**32), length=st.integers(1, 10), num_steps=st.integers(0, 150))
@settings(max_examples=300, deadline=None)
def test_tokens_of_two_tes_arrive_exactly_once_in_order(
    seed: int, length: int, num_steps: int
) -> None:
    """Frames and news of both TEs lost, repeated and reordered, and TEs and JEs that die before, between and after: the
    client gets the true tokens, then one end."""
    random = Random(seed)
    world = World(random, [[random.randrange(1000) for _ in range(length)]], split=True)
    world.suffer(num_steps)
    world.settle()
    world.check()


@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_nobody_works_on_for_a_client_that_left(seed: int, num_steps: int) -> None:
    """Whenever the client leaves, it gets nothing more, and every TE that works on the request, or is about to be asked
    to, is told; what a prefill TE still holds is its lease's to end."""
    world = World(Random(seed), [list(range(500))], split=True)  # nobody gets to the end
    world.suffer(num_steps)
    if world.delivery.over:
        return  # lost again and again
    world.leave()
    world.settle()
    assert all(engine.handed for engine in world.engines.values())
    assert world.events == []


def test_without_losses_a_split_request_is_one_attempt() -> None:
    """Where nothing goes wrong, the order in which the two TEs and the JE are heard costs no second attempt."""
    num_moves = 0
    for seed in range(300):
        random = Random(seed)
        world = World(random, [list(range(8))], split=True)
        for _ in range(200):
            if random.randrange(5) == 0:
                world.generate()
            else:
                verbs = (world.submitted, world.hand_over, world.answer, world.shuffle)
                random.choice(verbs)(chaos=False)
        world.settle()
        world.check()
        assert world.delivery.attempt == 1
        num_moves += world.num_moves
    assert num_moves > 150


# ----------------------------------------------------------------------------------------------------- case by case


@pytest.mark.parametrize(
    "first",
    [
        lambda delivery: delivery.progress("je", 1, "moved", "d", 1.1),
        lambda delivery: delivery.tokens("d", delta(1, [11]), 1.1),
    ],
    ids=["the JE's news first", "the decode TE first"],
)
def test_the_second_te_goes_on(first: Callable[[Delivery], list[Action]]) -> None:
    """Once the first TE is done, whoever the JE names or whoever speaks is the TE, and both orders are the same."""
    delivery = moving()
    got = emitted(first(delivery))
    assert delivery.te == "d"
    assert delivery.progress("je", 1, "moved", "d", 1.2) == []
    got += emitted(delivery.tokens("d", delta(1, [11]), 1.2))
    got += emitted(delivery.tokens("d", delta(2, [12], finish="length"), 1.3))
    assert got == [11, 12]
    assert delivery.over


def test_the_second_te_before_the_first_ones_last_word() -> None:
    """A TE that speaks before the first one is done is not believed but asked about; then it is asked for the rest."""
    delivery = make()
    assert delivery.tokens("d", delta(1, [11]), 0.5) == [Ask("p", 1, [0])]
    actions = delivery.tokens("p", delta(0, [10], moves=True), 0.6)
    assert emitted(actions) == [10]
    assert [action for action in actions if isinstance(action, Ask)] == [Ask("d", 1, [0])]
    assert delivery.te == "d"
    assert delivery.replay_failed("p", 1, NotFound("forgotten"), 0.7) == []  # no longer of interest
    both = [delta(0, [10]), delta(1, [11])]
    assert emitted(delivery.replayed("d", 1, both, 0.7)) == [11]


def test_the_second_te_answers_for_the_first_ones_token() -> None:
    """The frame with the first token is lost: the TE that decodes is asked for it, and gives all in order."""
    delivery = make()
    assert delivery.progress("je", 1, "moved", "d", 1.0) == []
    assert delivery.tokens("d", delta(1, [11]), 1.1) == [Ask("d", 1, [0])]
    assert emitted(delivery.replayed("d", 1, [delta(0, [10]), delta(1, [11])], 1.2)) == [10, 11]
    assert delivery.tokens("p", delta(0, [10], moves=True), 1.3) == []  # late, and nothing new
    assert delivery.te == "d"
    assert delivery.tick(1.3 + HANDOVER_S, connected=True) == [Ask("d", 1, [2])]


def test_two_tes_where_nothing_moves() -> None:
    """If the first one goes on by itself, the other is one too many and is told."""
    delivery = make()
    assert delivery.tokens("x", delta(0, [10]), 0.5) == [Ask("p", 1, [0])]
    actions = delivery.tokens("p", delta(0, [10]), 0.6)
    assert actions[0] == Drop("x", 1)
    assert emitted(actions) == [10]


@pytest.mark.parametrize("named", [True, False])
def test_the_first_te_takes_the_second_task(named: bool) -> None:
    """No decode TE had room: the prefill TE goes on, whether the JE's news of it came or not."""
    delivery = moving()
    if named:
        assert delivery.progress("je", 1, "moved", "p", 1.1) == []
    assert emitted(delivery.tokens("p", delta(1, [11]), 1.2)) == [11]
    assert delivery.tokens("p", delta(0, [10], moves=True), 1.3) == []  # repeated
    assert delivery.tick(1.2 + HANDOVER_S, connected=True) == [Ask("p", 1, [2])]
    assert kinds(delivery.te_lost("p", 4.0)) == [Drop, Submit]


def test_nobody_goes_on() -> None:
    """`Prefilled` or its JE was lost without a trace: the next attempt comes after a moment, and both are told."""
    delivery = moving()
    assert delivery.tick(1.0 + HANDOVER_S, connected=True) == []
    drop, also, again = delivery.tick(1.1 + HANDOVER_S, connected=True)
    assert (drop, also) == (Drop("p", 1), Drop("je", 1))
    assert isinstance(again, Submit)
    assert (again.attempt, again.delay_s) == (2, 0.0)
    assert delivery.output == [[10]]
    assert delivery.avoid == []


def test_a_dead_je_between_the_two() -> None:
    """The JE that was to hand over is dead: no need to wait. Another JE, or a later time, is nothing to us."""
    delivery = moving()
    assert delivery.je_lost("another", 1.1) == []
    assert kinds(delivery.je_lost("je", 1.1)) == [Drop, Drop, Submit]
    moved = moving()
    moved.progress("je", 1, "moved", "d", 1.1)
    assert moved.je_lost("je", 1.2) == []


def test_the_je_finds_nobody() -> None:
    """A JE that can place the second task nowhere says so: the next attempt is made at once."""
    failure = Failure(code="unavailable", message="nobody", retry_after_s=0.0)
    delivery = moving()
    actions = delivery.tokens("je", delta(1, [], finish="failed", failure=failure), 1.1)
    assert kinds(actions) == [Drop, Drop, Submit]


def test_the_first_te_dies() -> None:
    """Before its token that is a loss; afterwards the one that decodes does without it."""
    assert kinds(make().te_lost("p", 0.5)) == [Drop, Submit]
    between = moving()
    assert between.te_lost("p", 1.1) == []
    assert emitted(between.tokens("d", delta(1, [11]), 1.2)) == [11]
    assert between.te_lost("p", 1.3) == []


def test_the_second_te_dies() -> None:
    """That is a loss like any: the next attempt carries all tokens, and keeps away from the dead one."""
    delivery = moving()
    delivery.tokens("d", delta(1, [11]), 1.2)
    actions = delivery.te_lost("d", 1.3)
    assert actions[:2] == [Drop("d", 1), Drop("p", 1)]
    assert isinstance(actions[2], Submit)
    assert delivery.output == [[10, 11]]
    assert delivery.avoid == ["d"]
    assert delivery.accepted(2, "je", "p", 1.4) == []  # which may move again
    delivery.tokens("p", delta(2, [12], 2, moves=True), 1.5)
    assert emitted(delivery.tokens("d2", delta(3, [13], 2), 1.6)) == [13]


def test_a_cancel_reaches_everybody() -> None:
    """The client leaves before the token, between the two, or afterwards: both TEs and the JE between them are told."""
    assert make().cancel() == [Drop("p", 1)]
    assert moving().cancel() == [Drop("p", 1), Drop("je", 1)]
    moved = moving()
    moved.progress("je", 1, "moved", "d", 1.1)
    assert moved.cancel() == [Drop("d", 1), Drop("p", 1)]
    late = moving()
    late.cancel()
    assert late.progress("je", 1, "moved", "d", 1.1) == [Drop("d", 1)]
    assert late.tokens("d", delta(1, [11]), 1.1) == [Drop("d", 1)]


def test_a_stop_string_in_the_first_token() -> None:
    """It ends the request for all of them; its TE learns what counts."""
    delivery = moving()
    assert delivery.stop(0, 0) == [Drop("p", 1, 0, 0), Drop("je", 1)]
    assert delivery.over


def test_nobody_is_judged_between_the_two_while_the_bus_is_away() -> None:
    """Whoever goes on cannot be heard then: its time begins when the bus is back."""
    delivery = moving()
    assert delivery.tick(50.0, connected=False) == []
    assert delivery.reconnected(51.0) == [Ask("p", 1, [1])]
    assert delivery.replay_failed("p", 1, Unavailable("gone"), 51.1) == []
    assert delivery.tick(51.0 + HANDOVER_S, connected=True) == []
    assert kinds(delivery.tick(51.1 + HANDOVER_S, connected=True)) == [Drop, Drop, Submit]


def test_the_jes_answer_comes_last() -> None:
    """The answer to the submission names the first TE after both were heard: it changes nothing."""
    delivery = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    delivery.start(0.0)
    delivery.tokens("p", delta(0, [10], moves=True), 0.1)
    delivery.tokens("d", delta(1, [11]), 0.2)
    assert delivery.accepted(1, "je", "p", 0.3) == []
    assert delivery.te == "d"
    assert emitted(delivery.tokens("d", delta(2, [12]), 0.4)) == [12]


def test_the_first_te_is_named_after_the_second_spoke() -> None:
    """The JE's answer comes when the decode TE was heard, and asked, already: that stays the attempt's TE, as the first
    one may have nothing left to say."""
    delivery = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    delivery.start(0.0)
    assert delivery.tokens("d", delta(1, [11]), 0.2) == [Ask("d", 1, [0])]
    assert delivery.accepted(1, "je", "p", 0.3) == []
    both = [delta(0, [10]), delta(1, [11])]
    assert emitted(delivery.replayed("d", 1, both, 0.4)) == [10, 11]
    assert delivery.tokens("p", delta(0, [10], moves=True), 0.5) == []
    assert emitted(delivery.tokens("d", delta(2, [12]), 0.6)) == [12]
    assert delivery.cancel() == [Drop("d", 1), Drop("p", 1)]
