"""Subjects: encoding is reversible and can never smuggle a separator or a wildcard."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.subjects import Subjects, decode, encode

TEXT = st.text(min_size=1, max_size=40).filter(lambda text: len(text.encode()) <= 256)


@given(value=TEXT)
def test_encoding_is_reversible_and_safe(value: str) -> None:
    """Any text becomes one token of safe characters, and comes back."""
    token = encode(value)

    assert re.fullmatch(r"[A-Za-z0-9_=-]+", token)
    assert decode(token) == value


NAMES = TEXT.filter(lambda text: text != "*")  # the wildcard, as an argument


@given(model=NAMES, te=NAMES)
def test_a_subject_parses_back_into_its_parts(model: str, te: str) -> None:
    """The noun and the variable tokens of a built subject are read back."""
    subjects = Subjects("test")

    assert subjects.parse(subjects.blocks(model, te)) == ("blocks", model, te)


@pytest.mark.parametrize("value", ["", "x" * 257])
def test_an_empty_or_overlong_token_is_refused(value: str) -> None:
    """A token of 0 or more than 256 bytes is a ValueError."""
    with pytest.raises(ValueError, match="1 to 256 bytes"):
        encode(value)


@pytest.mark.parametrize("token", ["a.b", "*", ">", "=4", "=4g", "a b", "ü", ""])
def test_a_token_we_cannot_have_written_is_refused(token: str) -> None:
    """Decoding refuses what encoding never writes."""
    with pytest.raises(ValueError, match="token"):
        decode(token)


def test_no_two_nouns_overlap() -> None:
    """A subscriber to all block events never hears dumps, nor any noun another."""
    subjects = Subjects("r")

    assert subjects.blocks("*", "*") == "r.v1.blocks.*.*"
    assert subjects.blocks_dump("x") == "r.v1.dump.x"
    with pytest.raises(ValueError, match="realm"):
        subjects.parse("other.v1.dump.x")
