"""Stop strings against the naive search over the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import InvalidRequest
from shared.text.stopper import StopStrings

TEXTS = st.text("ab\u00e9", max_size=40)
STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The law: at the first end where any stop string is complete, the longest of those."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            hit = max(complete, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    """`text` in pieces."""
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 40)), st.booleans())
@example("xabcabd", ["abcabe", "bd"], [1, 3, 4], False)
@example("aab", ["ab", "aab"], [2], False)
@example("abcd", ["abcd", "bc"], [1, 2, 3], True)
def test_equals_naive_search_however_the_text_is_cut(
    text: str, stops: list[str], places: list[int], include: bool
) -> None:
    """Pieces joined are the text before (with `include`: through) the first complete stop string."""
    stopper = StopStrings(stops, include=include)
    shown, hit = "", None
    for piece in cut(text, places):
        emitted, hit = stopper.push(piece)
        shown += emitted
        if hit is not None:
            break
    assert (shown + stopper.finish(), hit) == naive(text, stops, include)


@given(TEXTS, STOPS)
def test_holds_back_exactly_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    """Until a hit, what is held is the longest suffix that is a proper prefix of a stop string."""
    stopper = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, 1):
        emitted, hit = stopper.push(character)
        if hit is not None:
            return
        shown += emitted
        held = text[len(shown) : end]
        suffixes = [text[start:end] for start in range(end)]
        expected = next((s for s in suffixes if any(stop.startswith(s) for stop in stops)), "")
        assert expected == held


def test_says_nothing_after_a_hit() -> None:
    """What follows a stop string never shows, and the hit stays known."""
    stopper = StopStrings(["END"])
    assert stopper.push("one EN") == ("one ", None)
    assert stopper.push("D two") == ("", "END")
    assert stopper.push("three") == ("", "END")
    assert stopper.hit == "END"
    assert stopper.finish() == ""


def test_refuses_the_empty_stop_string() -> None:
    """An empty stop string would stop everything: it is the caller's error."""
    with pytest.raises(InvalidRequest) as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"
