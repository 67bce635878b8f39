"""Guesses from a sequence's own past."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.speculation import FIRST_PAUSE, NGRAM, SHORTER, Speculator


def test_what_followed_last_time_is_guessed() -> None:
    """The longer match goes first, and of equal ones the most recent."""
    assert Speculator().propose([1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 1, 2, 3], 4) == [4, 5]
    assert Speculator().propose([8, 2, 3, 4, 5, 9, 2, 3, 6, 7, 1, 2, 3], 4) == [6, 7]
    assert Speculator().propose([1, 2, 3, 4], 4) == []
    assert Speculator().propose([1], 4) == []


def test_a_period_goes_on_past_the_end_of_what_is_known() -> None:
    """Where the past runs out before the guesses do, they repeat themselves."""
    speculator = Speculator()
    tokens = [7, 8] * 5
    assert speculator.propose(tokens, 5) == [7, 8]
    speculator.observe(len(tokens), 2, 2)
    assert speculator.propose(tokens, 5) == [7, 8, 7, 8]
    assert speculator.propose(tokens, 3) == [7, 8, 7]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=6),
)
def test_catching_up_is_as_good_as_searching(tokens: list[int], cuts: list[int]) -> None:
    """However many tokens came between two calls, the match is the one a search from the end finds."""
    speculator = Speculator()
    for length in sorted({min(cut, len(tokens)) for cut in (*cuts, len(tokens))}):
        known = tokens[:length]
        draft = speculator.propose(known, 1)
        expected = []
        for size in (SHORTER, NGRAM):  # the longer one has the last word
            for end in range(size, length):
                if length >= size and known[end - size : end] == known[length - size :]:
                    expected = [known[end]]
        assert draft == expected


def test_wrong_guesses_are_followed_by_ever_longer_silence() -> None:
    """Each pause is twice as long as the one before, until all guesses are right again."""
    speculator = Speculator()
    tokens = [1, 2] * 8
    pauses: list[int] = []
    while len(pauses) < 4:
        while draft := speculator.propose(tokens, 4):
            speculator.observe(len(tokens), len(draft), 0)
        silence = 0
        while not speculator.has_match(tokens):
            tokens += [1, 2]
            silence += 2
        pauses.append(silence)
    assert pauses == [FIRST_PAUSE * factor for factor in (1, 2, 4, 8)]
    speculator.observe(len(tokens), 4, 4)
    while draft := speculator.propose(tokens, 4):
        speculator.observe(len(tokens), len(draft), 0)
    assert not speculator.has_match(tokens + [1, 2] * (FIRST_PAUSE // 2 - 1))
    assert speculator.has_match(tokens + [1, 2] * (FIRST_PAUSE // 2))
