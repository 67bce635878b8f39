"""One choice's tokens to text: detokenizing, stop strings, and which token's log-probability goes with which piece.

A piece is what one SSE chunk shows: the text of one token, or of several where UTF-8 or a possible stop string held the
first ones back. The pieces' texts joined are the answer. This module must not know JSON or the bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.gateway.actions import Emit
from shared.messages import TokenLogprobs
from shared.text.detokenizer import Detokenizer
from shared.text.stopper import StopStrings
from shared.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token with its log-probability, and where its text begins in the choice's text (in characters)."""

    id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Piece:
    """The next text of one choice. `finish` (an OpenAI finish_reason) is set on the choice's last piece only."""

    choice: int
    text: str
    entries: list[TokenEntry] = field(default_factory=list)
    finish: str | None = None


class ChoiceText:
    """The text of one choice as it grows. `num_tokens` counts what is billed: nothing past a stop string.

    `continues`: the text goes on after a prompt's (a completion), instead of being one of its own (a chat's message).
    """

    def __init__(
        self,
        choice: int,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        min_tokens: int = 0,
        skip_special: bool = True,
        include_stop: bool = False,
        logprobs: bool = False,
        continues: bool = False,
    ) -> None:
        self.choice = choice
        self.finish: str | None = None
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, continues=continues)
        self._stops = StopStrings(stop, include=include_stop) if stop else None
        self._min_tokens = min_tokens
        self._logprobs = logprobs
        self._entries: list[TokenEntry] = []  # not shown yet
        self._num_decoded = 0  # characters the tokens gave so far
        self._num_shown = 0  # characters that went out

    def push(self, emit: Emit) -> tuple[list[Piece], int | None]:
        """The pieces an Emit gives, and after a stop string the number of tokens that count (else None)."""
        if self.finish is not None:
            return [], None
        pieces: list[Piece] = []
        for position, token in enumerate(emit.ids):
            self.num_tokens += 1
            if emit.stop_id is not None and position == len(emit.ids) - 1:
                break  # it ended the choice and is not part of its text
            if self._logprobs and emit.logprobs is not None:
                self._entries.append(TokenEntry(token, emit.logprobs[position], self._num_decoded))
            text = self._detokenizer.push(token)
            if not text:
                continue
            if self._show(text, pieces):
                return pieces, self.num_tokens
        if emit.finish is not None:
            self._end(emit.finish, pieces)
        return pieces, None

    def _show(self, text: str, pieces: list[Piece]) -> bool:
        """Add what may be shown of `text`; True if it completed a stop string, which ends the choice."""
        self._num_decoded += len(text)
        hit: str | None = None
        if self._stops is not None and self.num_tokens > self._min_tokens:
            text, hit = self._stops.push(text)
        if text:
            self._num_shown += len(text)
            pieces.append(Piece(self.choice, text, self._shown_entries()))
        if hit is None:
            return False
        self.finish = "stop"
        pieces.append(Piece(self.choice, "", finish="stop"))
        return True

    def _end(self, finish: str, pieces: list[Piece]) -> None:
        """The engine ended the choice: what was held back goes out."""
        tail = self._detokenizer.finish()
        if tail and self._show(tail, pieces):
            return
        held = self._stops.finish() if self._stops is not None else ""
        self.finish = finish
        if held or self._entries:
            pieces.append(Piece(self.choice, held, self._entries))
            self._entries = []
        pieces.append(Piece(self.choice, "", finish=finish))

    def _shown_entries(self) -> list[TokenEntry]:
        """The entries of tokens whose text has begun to show."""
        if not self._entries:
            return []
        shown = [entry for entry in self._entries if entry.offset < self._num_shown]
        self._entries = self._entries[len(shown) :]
        return shown
