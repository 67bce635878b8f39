"""The seam behind which fabrics other than sockets and shared files stand: CUDA IPC, HCCL, Mooncake.

DistFlow hands a handle over the authenticated link, and leaves the copying to the backend. It must not know any of
them.
"""

from __future__ import annotations

from typing import Final, Protocol

from shared.distflow.memory import Memory, Source
from shared.errors import InvalidRequest

BACKENDS: Final = ("", "mooncake")  # what DEEPFLOW_DISTFLOW may be


class Attached(Protocol):
    """A peer's region, reachable from here."""

    def read(
        self, offset: int, length: int, into: memoryview | Memory, start: int, timeout_s: float
    ) -> None:
        """Copy `length` bytes at `offset` to `start` of `into`; returns when they are there. Raises TransferError, also
        when `timeout_s` has passed."""

    def close(self) -> None:
        """Let go of it."""


class Backend(Protocol):
    """One fabric. Both sides of a link must have one of the same `scheme` for it to be used; sockets otherwise."""

    @property
    def scheme(self) -> str:
        """Its name, and what has to be equal on both sides (`cuda-ipc`, `mooncake-tcp`)."""

    def export(self, memory: Source) -> bytes | None:
        """What a peer needs in order to read this memory; None: not by this way."""

    def withdraw(self, memory: Source) -> None:
        """Peers will not read this memory any more."""

    def attach(self, handle: bytes, num_bytes: int, timeout_s: float) -> Attached:
        """The peer's side of `export`. Raises TransferError; DistFlow then falls back to sockets."""

    def close(self) -> None:
        """Give back what it holds."""


def chosen(name: str, ip: str) -> list[Backend]:
    """The backends that DEEPFLOW_DISTFLOW asks for beside those that are always there: `name` is its value, one of
    BACKENDS; `ip` the address of this machine on the fabric. Mooncake's engine has no authentication: whoever reaches
    its port reads what is registered, so it is for a fabric that only instances reach.

    Raises InvalidRequest for another name, Unavailable where what is asked for cannot be had.
    """
    if not name:
        return []
    if name != "mooncake":
        raise InvalidRequest(f"DEEPFLOW_DISTFLOW={name}: there is only mooncake")
    from shared.distflow.mooncake import MooncakeBackend

    return [MooncakeBackend(ip)]
