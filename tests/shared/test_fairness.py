"""Whose turn it is: bands, shares, ages, and how far one that waits can be overtaken."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fairness import MAX_SHARES, FairQueue

HIGH, LOW = 1, 3


def queue_of(*items: tuple[int, str, int]) -> FairQueue[tuple[int, str, int]]:
    """What waits, as (band, tenant, age)."""
    queue: FairQueue[tuple[int, str, int]] = FairQueue(lambda item: (item[2],))
    for item in items:
        queue.add(queue.share(item[0], item[1]), item)
    return queue


def serve(queue: FairQueue[tuple[int, str, int]], cost: int = 1) -> tuple[int, str, int]:
    """Serve who is next."""
    item = queue.first()
    assert item is not None
    share = queue.share(item[0], item[1])
    share.served += cost
    queue.remove(share, item)
    return item


def test_bands_go_in_order_and_a_tenants_own_by_age() -> None:
    """A lower band waits for a higher one, and of one tenant the oldest goes first, however they were added."""
    queue = queue_of((LOW, "a", 0), (HIGH, "a", 5), (HIGH, "a", 2))
    assert len(queue) == len(list(queue)) == 3
    assert [serve(queue)[2] for _ in range(3)] == [2, 5, 0]
    assert not queue
    assert queue.first() is None


def test_tenants_take_turns_by_what_they_got() -> None:
    """Whoever sends many gets no more than one that sends few, and what costs twice counts twice."""
    queue = queue_of(
        *((HIGH, "many", age) for age in range(20)), (HIGH, "few", 20), (HIGH, "few", 21)
    )
    turns = [serve(queue, 2 if number == 0 else 1)[1] for number in range(5)]
    assert turns == ["many", "few", "few", "many", "many"]


def test_what_was_not_asked_for_is_not_saved_up() -> None:
    """Who was away while others were served does not get it all at once when it comes."""
    queue = queue_of(*((HIGH, "busy", age) for age in range(100)))
    for _ in range(50):
        serve(queue)
    for age in range(100, 150):
        queue.add(queue.share(HIGH, "new"), (HIGH, "new", age))
    turns = [serve(queue)[1] for _ in range(20)]
    assert turns.count("busy") == 10
    alone = queue_of((HIGH, "busy", 0))
    serve(alone, 1000)
    alone.add(alone.share(HIGH, "new"), (HIGH, "new", 1))
    assert alone.share(HIGH, "new").served == 1000  # nobody waited: as the one that went last


def test_who_has_to_wait_again_keeps_what_it_is_owed() -> None:
    """Sent back to waiting, a tenant that got little is next, however much those that wait have got."""
    queue = queue_of((HIGH, "less", 0), (HIGH, "more", 1), (HIGH, "more", 2))
    sent_back = serve(queue, 2)
    assert serve(queue, 9)[1] == "more"
    queue.add(queue.share(HIGH, "less"), sent_back, is_new=False)
    assert [share.served for share in map(queue.share, [HIGH] * 2, ["less", "more"])] == [2, 9]
    assert serve(queue) == sent_back


def test_coming_and_going_saves_nothing() -> None:
    """A tenant that sends its next prompt when it has the answer to the last gets no more than its share."""
    queue = queue_of(*((HIGH, "a", age) for age in range(100)), (HIGH, "b", 100))
    turns = []
    for age in range(101, 121):
        turns.append(serve(queue)[1])
        if turns[-1] == "b":
            queue.add(queue.share(HIGH, "b"), (HIGH, "b", age))
    assert turns.count("b") == 10


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=120),
    comers=st.lists(st.tuples(st.integers(0, 119), st.sampled_from("cdef")), max_size=40),
)
def test_two_that_wait_all_the_time_get_the_same(
    costs: list[int], comers: list[tuple[int, str]]
) -> None:
    """Whoever else comes and goes, they never differ by more than one of them can get between two turns, and neither is
    overtaken for longer than that: the bound of which the module speaks."""
    age = 0
    queue = queue_of()

    def send(tenant: str) -> None:
        nonlocal age
        queue.add(queue.share(HIGH, tenant), (HIGH, tenant, age))
        age += 1

    send("a")
    send("b")
    for step, cost in enumerate(costs):
        for _, tenant in (comer for comer in comers if comer[0] == step):
            send(tenant)
        _, tenant, _ = serve(queue, cost)
        if tenant in "ab":
            send(tenant)
        shares = [queue.share(HIGH, one).served for one in "ab"]
        assert abs(shares[0] - shares[1]) <= max(costs)
        assert min(shares) >= max(
            share.served for share in map(queue.share, [HIGH] * 4, "cdef")
        ) - max(costs)


def test_what_is_remembered_is_bounded_and_nobody_that_waits_is_forgotten() -> None:
    """Ten thousand tenants come and go; one that waits all the while keeps its share."""
    queue = queue_of((LOW, "patient", 0))
    share = queue.share(LOW, "patient")
    share.served = 7
    for number in range(5 * MAX_SHARES):
        queue.add(queue.share(HIGH, str(number)), (HIGH, str(number), number))
        serve(queue)
    assert queue.share(LOW, "patient") is share
    assert len(queue._shares) <= MAX_SHARES
    assert serve(queue) == (LOW, "patient", 0)
