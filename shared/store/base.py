"""What a store of files can do, whatever it is made of. This module must not know what is in the files.

A key is a path of one to eight plain names, `batches/batch_1/000001`. What is put appears whole or not at all; it
replaces what was there. Both ways it is streamed, so that a file's size costs no memory.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

CHUNK_BYTES: Final = 1024 * 1024
_GATHERED_BYTES: Final = 256 * 1024
# Never a dot in front: neither `..` nor what a store keeps for itself.
_KEY: Final = re.compile(
    r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,254}(/[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,254}){0,7}"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry of a listing. `modified` is in seconds since the epoch, by the store's clock."""

    key: str
    num_bytes: int
    modified: float


class Store(Protocol):
    """Every method raises Unavailable in trouble, and ValueError for what is no key."""

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all that `chunks` brings; its length in bytes. What `chunks` raises ends it, with nothing stored."""
        ...

    def get(self, key: str) -> AsyncIterator[bytes]:
        """What is stored, in pieces of a few MiB at the most, however slowly they are taken. Raises NotFound at the
        first."""
        ...

    async def delete(self, key: str) -> None:
        """Remove it; a missing key is fine."""
        ...

    async def listing(self, prefix: str) -> list[Stored]:
        """Everything below the path `prefix`, by key."""
        ...


def is_key(key: str) -> bool:
    """Whether it can be one: a listing leaves out what somebody else put there."""
    return _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """The key. Raises ValueError."""
    if not is_key(key):
        raise ValueError(f"not a key: {key!r}")
    return key


async def whole(data: bytes) -> AsyncIterator[bytes]:
    """Bytes in hand, as what `put` takes."""
    yield data


async def gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Many small pieces as fewer ones, for `put`."""
    held: list[bytes] = []
    size = 0
    async for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _GATHERED_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


async def read(store: Store, key: str, limit: int) -> bytes:
    """All of a small file. Raises NotFound, Unavailable, and ValueError past `limit` bytes."""
    data = bytearray()
    async for chunk in store.get(key):
        data += chunk
        if len(data) > limit:
            raise ValueError(f"{key} has more than {limit} bytes")
    return bytes(data)
