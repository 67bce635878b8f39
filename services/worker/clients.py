"""The clients (gateways) a TE owes tokens: who is alive, and the numbers of the frames each got. Pure.

A client that fell silent takes its work with it: nobody will read those tokens, and its requests come back from
elsewhere if somebody wants them. This module must not know the bus or the engine.
"""

from __future__ import annotations

from typing import Final

from shared.liveness import Liveness

SILENCE_S: Final = 3.0  # a client that beat once and then is silent for this long is gone
GRACE_S: Final = 5.0  # a client that has sent work, but no beat yet, gets this long


class Clients:
    """All clients that are alive or have work here."""

    def __init__(self) -> None:
        self._liveness = Liveness(SILENCE_S)
        self._frames: dict[str, int] = {}

    def beat(self, client: str, now: float) -> None:
        """A beat of `client` came in."""
        self._liveness.beat(client, now)

    def began(self, client: str, now: float) -> None:
        """Work of `client` came in: a newcomer gets the time until its first beat."""
        if not self._liveness.alive(client):
            self._liveness.beat(client, now + GRACE_S - SILENCE_S)

    def alive(self, client: str) -> bool:
        """Whether anybody may still read what is sent to `client`."""
        return self._liveness.alive(client)

    def next_frame(self, client: str) -> int:
        """The number of the next frame to `client`, counted from 1."""
        number = self._frames[client] = self._frames.get(client, 0) + 1
        return number

    def down(self, client: str) -> bool:
        """Somebody who knows says that `client` is dead. True if it counted as alive."""
        self._frames.pop(client, None)
        return self._liveness.down(client)

    def lost(self, now: float) -> list[str]:
        """Clients that have fallen silent since the last call, each once."""
        lost = self._liveness.lost(now)
        for client in lost:
            self._frames.pop(client, None)
        return lost

    def hold(self) -> None:
        """The bus is away: nobody is judged."""
        self._liveness.hold()

    def resume(self, now: float) -> None:
        """The bus is back: every clock starts again."""
        self._liveness.resume(now)
