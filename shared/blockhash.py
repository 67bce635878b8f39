"""Chained hashes of KV pages: the name under which a page's keys and values are found, anywhere in the platform.

Page i's hash covers its parent's hash and its own token ids, so equal hashes mean equal prefixes (the paper, section
3.2, calls the structure over them a radix tree; with a chain a flat table does). The root is keyed with the tenant's
secret, so nothing crosses tenants and nobody outside can guess a hash. What the operator shares with all tenants is a
chain of its own; `extend` is the keyed step that leads from it into a tenant's. This module must not know where pages
live.

Algorithm: BLAKE2b with a 128 bit digest; token ids are packed as little-endian unsigned 32 bit integers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from sys import byteorder
from typing import Final

DIGEST_BYTES: Final = 16
_EXTEND: Final = b"extend"  # BLAKE2b's personalisation: no root can equal an extension


def root(secret: bytes, *parts: str) -> bytes:
    """The hash every chain starts from: `secret` is the tenant's (at most 64 bytes), `parts` what KV depends on."""
    digest = blake2b(digest_size=DIGEST_BYTES, key=secret)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def extend(parent: bytes, secret: bytes) -> bytes:
    """The hash from which a tenant's own pages go on after a shared prefix whose last page's hash is `parent`.

    `secret` is the tenant's (at most 64 bytes): equal pages after the same prefix have other hashes for other tenants.
    """
    return blake2b(parent, digest_size=DIGEST_BYTES, key=secret, person=_EXTEND).digest()


def chain(parent: bytes, ids: Sequence[int], page: int) -> list[bytes]:
    """Hashes of the full pages of `ids` (`len(ids) // page` of them), in order, continuing from `parent`."""
    packed = array("I", ids)
    if byteorder == "big":
        packed.byteswap()
    raw = packed.tobytes()
    width = page * packed.itemsize
    hashes = []
    for start in range(0, len(raw) - width + 1, width):
        parent = blake2b(parent + raw[start : start + width], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)
    return hashes
