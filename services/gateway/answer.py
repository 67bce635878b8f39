"""One API call's answer while it grows: the pieces of all its prompts and choices, waiting to be written.

The bus side pushes, the client side takes; neither waits for the other. A client that reads more slowly than the
model writes finds its pieces merged: past `MAX_PIECES` waiting, a new piece's text is added to the waiting one of its
choice. So a slow reader costs memory for text, which `max_tokens` bounds, and nothing is lost. This module must not
know JSON, HTTP or the bus.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.gateway.actions import Emit
from services.gateway.choices import ChoiceText, Piece
from shared.errors import DeepFlowError

MAX_PIECES = 256
MAX_NOTICES = 8


@dataclass(slots=True)
class Usage:
    """Token counts of one answer."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


class Answer:
    """What the client will read. `streaming` False wakes the reader once, at the end."""

    def __init__(
        self, texts: list[ChoiceText], *, streaming: bool, keep_alive_s: float, now: float
    ) -> None:
        self.texts = texts
        self.usage = Usage()
        self.error: DeepFlowError | None = None
        self.num_live = len(texts)
        self._streaming = streaming
        self._keep_alive_s = keep_alive_s
        self._pieces: list[Piece] = []
        self._latest: dict[int, Piece] = {}  # per choice, the last waiting piece
        self._notices: list[str] = []
        self._said = ""  # the latest notice
        self._changed = asyncio.Event()
        self._moved = now

    @property
    def finished(self) -> bool:
        """Whether nothing more will be pushed."""
        return self.num_live == 0 or self.error is not None

    @property
    def complete(self) -> bool:
        """Whether everything came, without an error, and was taken."""
        return self.num_live == 0 and self.error is None and not self._pieces

    # -------------------------------------------------------------------------------------------------- the bus side

    def push(self, choice: int, emit: Emit, now: float) -> int | None:
        """Take an Emit; after a stop string, the number of tokens of the choice that count."""
        if emit.failure is not None:
            self.fail(emit.failure)
            return None
        text = self.texts[choice]
        pieces, keep = text.push(emit)
        if pieces and pieces[-1].finish is not None:
            self.num_live -= 1
            self.usage.completion += text.num_tokens
        if pieces:
            self._moved = now
            if len(self._pieces) < MAX_PIECES:
                self._pieces += pieces
            else:
                self._merge(pieces)
        if (pieces and self._streaming) or self.finished:
            self._changed.set()
        return keep

    def fail(self, error: DeepFlowError) -> None:
        """End the whole answer with an error; the first one counts."""
        if not self.finished:
            self.error = error
            self._changed.set()

    def notice(self, text: str, now: float) -> None:
        """Tell the client what it is waiting for, again only after a silence. To one that reads slowly, what is the
        case now."""
        is_news = text != self._said or now - self._moved > self._keep_alive_s
        if not self._streaming or self.finished or not is_news:
            return
        del self._notices[MAX_NOTICES - 1 :]
        self._notices.append(text)
        self._said, self._moved = text, now
        self._changed.set()

    def tick(self, now: float, *, parked: bool) -> None:
        """Time has passed: a silent stream gets a notice, so that nobody between us and the client closes it."""
        if now - self._moved > self._keep_alive_s:
            self.notice(self._said or "queued" if parked else "keep-alive", now)

    def _merge(self, pieces: list[Piece]) -> None:
        if not self._latest:
            self._latest = {piece.choice: piece for piece in self._pieces}
        for piece in pieces:
            waiting = self._latest.get(piece.choice)
            if waiting is None:
                self._latest[piece.choice] = piece
                self._pieces.append(piece)
                continue
            if piece.text or piece.entries:
                waiting.text += piece.text
                waiting.entries += piece.entries
            if piece.finish is not None:
                self._pieces.append(piece)

    # ----------------------------------------------------------------------------------------------- the client side

    async def take(self) -> tuple[list[Piece], list[str]]:
        """All pieces and notices that wait; waits for the first. Both empty at the end.

        Raises the answer's error once everything before it has been taken.
        """
        while not self._pieces and not self._notices and not self.finished:
            self._changed.clear()
            await self._changed.wait()
        if not self._pieces and not self._notices and self.error is not None:
            raise self.error
        pieces, self._pieces = self._pieces, []
        notices, self._notices = self._notices, []
        self._latest = {}
        return pieces, notices

    async def whole(self) -> list[Piece]:
        """All pieces, once the answer is complete. Raises its error."""
        while not self.finished:
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        pieces, self._pieces = self._pieces, []
        return pieces
