"""The order of block events: what was heard of and could not be kept is never taken for known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import block_feed
from shared.block_feed import BlockFeeds
from shared.rtc_messages import BlockEvents, BlocksDump


def event(seq: int, num_pages: int = 1) -> BlockEvents:
    """An event of the one holder."""
    pages = [(seq * 1000 + number).to_bytes(16, "big") for number in range(num_pages)]
    return BlockEvents(te="te", model="m", seq=seq, stored=pages)


def dump(seq: int) -> BlocksDump:
    """Its index as of an event."""
    return BlocksDump(te="te", model="m", seq=seq, hashes=[])


def test_a_dump_older_than_what_was_dropped_is_not_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events that waited and found no room are missed: the holder, though it is silent from then on, is asked again."""
    monkeypatch.setattr(block_feed, "MAX_WAITING_PAGES", 10)
    feeds = BlockFeeds()
    feeds.seen("te", "m")
    for seq in range(4, 7):
        assert feeds.take(event(seq, 4)) == []
        feeds.check()
    assert feeds.load(dump(3)) == []
    assert feeds.unsynced() == [("te", "m")]
    feeds.check()
    assert feeds.load(dump(6)) == []
    assert feeds.unsynced() == []
    feeds.check()


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(list(range(1, 13))),
    dumps=st.dictionaries(st.integers(0, 11), st.integers(0, 12), max_size=4),
    room=st.integers(2, 12),
)
def test_a_feed_in_step_has_everything_that_was_heard_of(
    order: list[int], dumps: dict[int, int], room: int
) -> None:
    """In whatever order events come, with dumps of any age between them and little room to wait: a feed that counts
    as synced has applied, or had from a dump, all up to the highest number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_feed, "MAX_WAITING_PAGES", room)
        feeds, known, heard = BlockFeeds(), 0, 0
        feeds.seen("te", "m")
        for step, seq in enumerate(order):
            heard = max(heard, seq)
            applied = feeds.take(event(seq))
            if step in dumps:
                later = feeds.load(dump(dumps[step]))
                if later is not None:
                    known, applied = dumps[step], later
                    heard = max(heard, known)
            for one in applied:
                assert one.seq == known + 1 or step in dumps
                known = one.seq
            feeds.check()
            assert feeds.unsynced() or known == heard
