"""How two ends of a new connection prove to each other that they know the same secret, without sending it.

A token (16 bytes that name it, 32 that are secret) comes to the opener by another way and opens one link. Both sides
prove themselves over everything said so far with HMAC-SHA256, and derive fresh keys for the connection and, from a
token's connection, the secret of the link, with which more connections may join it. It must not know addresses.
"""

from __future__ import annotations

import hmac
import secrets
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from shared.distflow.channel import Channel, Kind, Remaining
from shared.distflow.faults import Fault, LinkError, TransferError

ID_BYTES: Final = 16
SECRET_BYTES: Final = 32
_MAGIC: Final = b"DFL1"
_HELLO: Final = struct.Struct(
    "<4sB16s32s255p"
)  # magic, what the id names, id, nonce, name of the opener
_ANSWER: Final = struct.Struct("<B32s32s")  # whether it goes on, nonce, proof
_TOKEN, _LINK = 1, 2
_MAX_OFFERS: Final = 4096
_MAX_LINKS: Final = 4096
_LINGER_S: Final = 30.0  # a link without any connection may be joined again for so long


@dataclass(frozen=True, slots=True)
class Credential:
    """What opens a connection: a token's, or an open link's."""

    id: bytes
    secret: bytes = field(repr=False)
    is_token: bool = True

    @staticmethod
    def of_token(token: bytes) -> Credential:
        """As it came in an offer. Raises LinkError."""
        if len(token) != ID_BYTES + SECRET_BYTES:
            raise LinkError(Fault.REFUSED, "the token of the offer is none")
        return Credential(token[:ID_BYTES], token[ID_BYTES:])


@dataclass(slots=True)
class _Known:
    """An offer or a link, at the side that made the offer."""

    by: str
    secret: bytes
    expires: float
    num_connections: int = 0


class Gate:
    """Who may come in: the offers that are open and the links that are. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._offers: dict[bytes, _Known] = {}
        self._links: dict[bytes, _Known] = {}

    def offer(self, by: str, ttl_s: float) -> bytes:
        """A new token for the opener of that name. The oldest offers go when there are too many."""
        token = secrets.token_bytes(ID_BYTES + SECRET_BYTES)
        with self._lock:
            self._drop_expired()
            while len(self._offers) >= _MAX_OFFERS:
                del self._offers[next(iter(self._offers))]
            self._offers[token[:ID_BYTES]] = _Known(by, token[ID_BYTES:], self._clock() + ttl_s)
        return token

    def admit(self, channel: Channel, remaining: Remaining) -> bytes:
        """The answering side of a new connection: the id of the link that it now belongs to. Raises TransferError."""
        hello = bytearray(_HELLO.size)
        channel.read_into(memoryview(hello), remaining)
        magic, what, name, _, by = _HELLO.unpack(hello)
        known = self._find(what, name) if magic == _MAGIC else None
        nonce = secrets.token_bytes(32)
        if known is None or known.by.encode() != by:
            channel.write([memoryview(_ANSWER.pack(0, nonce, bytes(32)))], remaining)
            raise TransferError(
                Fault.REFUSED, f"a link for {by.decode(errors='replace')!r} was refused"
            )
        said = bytes(hello) + nonce
        proof = _derive(known.secret, b"holder", said)
        channel.write([memoryview(_ANSWER.pack(1, nonce, proof))], remaining)
        theirs = bytearray(32)
        channel.read_into(memoryview(theirs), remaining)
        if not hmac.compare_digest(theirs, _derive(known.secret, b"opener", said)):
            raise TransferError(Fault.TAMPERED, f"{known.by!r} could not prove itself")
        link = name if what == _LINK else _derive(known.secret, b"id", said)[:ID_BYTES]
        with self._lock:
            if what == _TOKEN:
                if len(self._links) >= _MAX_LINKS:
                    raise TransferError(Fault.REFUSED, "there are too many links")
                secret = _derive(known.secret, b"link", said)
                self._links[link] = _Known(known.by, secret, float("inf"))
            entry = self._links.get(link)
            if entry is None:
                raise TransferError(Fault.REFUSED, "the link is gone")
            entry.num_connections += 1
            entry.expires = float("inf")
        channel.secure(_derive(known.secret, b"down", said), _derive(known.secret, b"up", said))
        try:
            channel.send(Kind.READY, b"", remaining)
        except TransferError:
            self.left(link)
            raise
        return link

    def left(self, link: bytes) -> None:
        """A connection that `admit` let in has ended."""
        with self._lock:
            known = self._links[link]
            known.num_connections -= 1
            if not known.num_connections:
                known.expires = self._clock() + _LINGER_S

    @property
    def num_links(self) -> int:
        """Links that have a connection."""
        with self._lock:
            return sum(known.num_connections > 0 for known in self._links.values())

    def _find(self, what: int, name: bytes) -> _Known | None:
        """The offer, which is used up by this, or the link."""
        with self._lock:
            self._drop_expired()
            return self._offers.pop(name, None) if what == _TOKEN else self._links.get(name)

    def _drop_expired(self) -> None:
        now = self._clock()
        for known in (self._offers, self._links):
            for name in [name for name, entry in known.items() if entry.expires <= now]:
                del known[name]


def enter(channel: Channel, credential: Credential, name: str, remaining: Remaining) -> Credential:
    """The opening side of a new connection. What more connections of the same link come in with. Raises LinkError, or
    TransferError where the connection itself fails."""
    what = _TOKEN if credential.is_token else _LINK
    nonce = secrets.token_bytes(32)
    hello = _HELLO.pack(_MAGIC, what, credential.id, nonce, name.encode())
    channel.write([memoryview(hello)], remaining)
    answer = bytearray(_ANSWER.size)
    channel.read_into(memoryview(answer), remaining)
    goes_on, theirs, proof = _ANSWER.unpack(answer)
    if not goes_on:
        raise LinkError(
            Fault.REFUSED, "the peer refused the link: the token is used, expired or for another"
        )
    secret, said = credential.secret, hello + theirs
    if not hmac.compare_digest(proof, _derive(secret, b"holder", said)):
        raise LinkError(Fault.TAMPERED, "the peer could not prove itself")
    channel.write([memoryview(_derive(secret, b"opener", said))], remaining)
    channel.secure(_derive(secret, b"up", said), _derive(secret, b"down", said))
    kind, _, _ = channel.receive(remaining)
    if kind != Kind.READY:
        raise LinkError(Fault.TAMPERED, "the peer did not say that it is ready")
    if not credential.is_token:
        return credential
    link = _derive(secret, b"id", said)[:ID_BYTES]
    return Credential(link, _derive(secret, b"link", said), is_token=False)


def _derive(secret: bytes, label: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, label + b"\0" + sha256(said).digest(), "sha256")
