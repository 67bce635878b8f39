"""Tokens to text: UTF-8 and stop strings over token borders, what is billed, and logprobs that stay with their text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.actions import Emit
from services.gateway.answer import MAX_PIECES, Answer
from services.gateway.choices import ChoiceText, Piece
from shared.errors import Internal
from shared.messages import TokenLogprobs
from shared.text.tokenizer import Tokenizer
from tests.shared.test_text_tokenizer import sentencepiece_backend
from tests.worker.tiny import IM_END


def say(
    tokenizer: Tokenizer, text: str, *, finish: str = "length", **options: Any
) -> tuple[list[Piece], int | None, ChoiceText]:
    """The pieces of a text that arrives token by token, and where a stop string ended it."""
    options = {"stop": [], **options}
    choice = ChoiceText(0, tokenizer, **options)
    pieces: list[Piece] = []
    ids = tokenizer.encode(text)
    for number, token in enumerate(ids):
        emit = Emit(
            0,
            [token],
            [TokenLogprobs(logprob=-1.0)] if options.get("logprobs") else None,
            finish if number == len(ids) - 1 else None,
        )
        more, keep = choice.push(emit)
        pieces += more
        if keep is not None:
            return pieces, keep, choice
    return pieces, None, choice


@given(text=st.text(min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Whatever the characters, no piece holds half of one, and together they are the text."""
    pieces, _, _ = say(tokenizer, text)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokenizer.encode(text))
    assert [piece.finish for piece in pieces][-1] == "length"
    assert sum(piece.finish is not None for piece in pieces) == 1


def test_one_piece_per_token(tokenizer: Tokenizer) -> None:
    """Plain text comes token by token; the end is a piece of its own."""
    ids = tokenizer.encode("Hello there")
    pieces, _, _ = say(tokenizer, "Hello there")
    assert len(pieces) == len(ids) + 1


@given(text=st.text("ab ", min_size=1, max_size=12), stop=st.text("ab ", min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stop_string_cuts_the_text(tokenizer: Tokenizer, text: str, stop: str) -> None:
    """The text ends before the first stop string, wherever token borders fall; what is past it is not billed."""
    pieces, keep, choice = say(tokenizer, text, stop=[stop])
    shown = "".join(piece.text for piece in pieces)
    before, found, _ = text.partition(stop)
    assert shown == before
    assert (keep is not None) == bool(found)
    assert choice.finish == ("stop" if found else "length")
    if keep is not None:
        ids = tokenizer.encode(text)
        assert stop in tokenizer.decode(ids[:keep])
        assert stop not in tokenizer.decode(ids[: keep - 1])
        assert choice.num_tokens == keep


def test_the_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    """vLLM's include_stop_str_in_output shows the stop string itself."""
    pieces, _, _ = say(tokenizer, "one two three", stop=["two"], include_stop=True)
    assert "".join(piece.text for piece in pieces) == "one two"


def test_no_stop_string_before_min_tokens(tokenizer: Tokenizer) -> None:
    """A stop string within the first min_tokens tokens does not count."""
    num = len(tokenizer.encode("one two"))
    pieces, keep, _ = say(tokenizer, "one two three two four", stop=["two"], min_tokens=num)
    assert "".join(piece.text for piece in pieces) == "one two three "
    assert keep is not None


def test_the_ending_token_has_no_text_but_counts(tokenizer: Tokenizer) -> None:
    """The end of sequence, or a stop id, is billed and not shown."""
    choice = ChoiceText(0, tokenizer, stop=[], skip_special=False)
    ids = [*tokenizer.encode("Hi"), IM_END]
    pieces, _ = choice.push(Emit(0, ids, finish="stop", stop_id=IM_END))
    assert "".join(piece.text for piece in pieces) == "Hi"
    assert choice.num_tokens == len(ids)


def test_logprobs_go_with_their_text(tokenizer: Tokenizer) -> None:
    """Every token's entry comes once, with the piece that shows its text; none for text a stop string cut off."""
    pieces, _, _ = say(tokenizer, "héllo", logprobs=True)
    entries = [entry for piece in pieces for entry in piece.entries]
    assert [entry.id for entry in entries] == tokenizer.encode("héllo")
    assert all(piece.entries for piece in pieces[:-1])
    pieces, keep, _ = say(tokenizer, "one two", logprobs=True, stop=["two"])
    text = "".join(piece.text for piece in pieces)
    entries = [entry for piece in pieces for entry in piece.entries]
    assert keep is not None
    assert len(entries) < keep
    assert all(entry.offset < len(text) for entry in entries)


def test_a_completion_keeps_its_first_space() -> None:
    """Text that goes on after a prompt keeps the space SentencePiece begins with; a message of its own does not."""
    tokenizer = Tokenizer(sentencepiece_backend())
    ids = tokenizer.encode("hello")
    for continues, expected in ((True, " hello"), (False, "hello")):
        choice = ChoiceText(0, tokenizer, stop=[], continues=continues)
        pieces, _ = choice.push(Emit(0, ids, finish="length"))
        assert "".join(piece.text for piece in pieces) == expected


async def test_a_slow_reader_gets_merged_pieces(tokenizer: Tokenizer) -> None:
    """Past the bound pieces are merged: memory is bounded, the text is whole, the end comes last."""
    ids = tokenizer.encode("word " * (2 * MAX_PIECES))
    answer = Answer([ChoiceText(0, tokenizer, stop=[])], streaming=True, keep_alive_s=9, now=0.0)
    for number, token in enumerate(ids):
        finish = "stop" if number == len(ids) - 1 else None
        answer.push(0, Emit(0, [token], finish=finish), 0.0)
    pieces, _ = await answer.take()
    assert len(pieces) <= MAX_PIECES + 2
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert [piece.finish for piece in pieces if piece.finish] == ["stop"]
    assert pieces[-1].finish == "stop"
    assert answer.complete


async def test_an_error_comes_after_what_was_said(tokenizer: Tokenizer) -> None:
    """Text that arrived before a failure is delivered before it."""
    answer = Answer([ChoiceText(0, tokenizer, stop=[])], streaming=True, keep_alive_s=9, now=0.0)
    answer.push(0, Emit(0, tokenizer.encode("a")), 0.0)
    answer.push(0, Emit(0, [], finish="failed", failure=Internal("gone")), 0.0)
    pieces, _ = await answer.take()
    assert [piece.text for piece in pieces] == ["a"]
    with pytest.raises(Internal, match="gone"):
        await answer.take()
