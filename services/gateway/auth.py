"""Who is asking: API keys to tenants, the guard of a keyless loopback port, and each tenant's secret for hashes.

With keys, everything but the probes needs one. Without keys the port is on loopback, every caller is tenant `local`
and may act as operator; then a web page in the user's browser is the attacker to keep out, by Host, Origin and
Content-Type. This module must not know aiohttp.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from typing import Final
from urllib.parse import urlsplit

from shared.bus import Bus
from shared.errors import Forbidden, InvalidRequest, Unauthorized, Unavailable
from shared.messages import TenantSecret

LOCAL: Final = "local"
OPERATOR: Final = "operator"
_PUBLIC: Final = ":public"  # whose secret shared prefixes are hashed with; no key can name it
SECRET_BYTES: Final = 32
MAX_SECRETS: Final = 4096
_RETRY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys as digests, so that neither memory dumps of this object nor timing tell one."""

    tenants: tuple[tuple[bytes, str], ...] = ()  # (SHA-256 of the key, tenant)

    def __bool__(self) -> bool:
        return bool(self.tenants)

    @classmethod
    def parse(cls, text: str) -> Keys:
        """`tenant:key` pairs, separated by commas or lines; `#` starts a comment line. Raises ValueError."""
        pairs: dict[bytes, str] = {}
        for line in text.splitlines():
            if line.lstrip().startswith("#"):
                continue
            for pair in filter(None, (part.strip() for part in line.split(","))):
                tenant, colon, key = pair.partition(":")
                if not colon or not tenant or not key:
                    raise ValueError("expected tenant:key")  # never show the key
                digest = sha256(key.encode()).digest()
                if pairs.setdefault(digest, tenant) != tenant:
                    raise ValueError(f"tenant {tenant!r} has a key of another tenant")
        return cls(tuple(pairs.items()))

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an Authorization header. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized(
                "You didn't provide an API key: send it as 'Authorization: Bearer KEY'"
            )
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in self.tenants:  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise Unauthorized("Incorrect API key provided")
        return found


def is_loopback(host: str) -> bool:
    """Whether this name or address reaches only this machine."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guard_loopback(host: str | None, origin: str | None) -> None:
    """Keep web pages out of a keyless port: a rebound name shows in Host, another site in Origin. Raises Forbidden."""
    if not _names_loopback(f"//{host or ''}"):
        raise Forbidden(f"Host {host!r} is not this machine; with API keys any name works")
    if origin is not None and not _names_loopback(origin):
        raise Forbidden(f"Origin {origin!r} may not use a port without API keys")


def require_json(content_type: str) -> None:
    """A body must say that it is JSON; also what a cross-site form cannot do. Raises InvalidRequest."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(
            f"Content-Type must be application/json, not {kind[:80] or 'absent'!r}",
            param="Content-Type",
        )


def _names_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    return host is not None and is_loopback(host)


class TenantSecrets:
    """Each tenant's random secret, made once for the whole platform: KV never crosses tenants. While the table cannot
    be reached, whoever wants one waits for up to `patience_s`."""

    def __init__(self, bus: Bus, *, patience_s: float = 0.0) -> None:
        self._bus = bus
        self._patience_s = patience_s
        self._known: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, tenant: str) -> bytes:
        """32 bytes, the same at every gateway. Raises Unavailable; Forbidden for the one name that is no tenant's."""
        if tenant == _PUBLIC:
            raise Forbidden("this name is reserved")
        return await self._get(tenant)

    async def public(self) -> bytes:
        """The secret of what the operator shares with all tenants. Raises Unavailable."""
        return await self._get(_PUBLIC)

    async def _get(self, tenant: str) -> bytes:
        give_up = time.monotonic() + self._patience_s
        while (secret := self._known.get(tenant)) is None:
            try:
                self._known[tenant] = await self._fetch(tenant)
            except Unavailable:
                if time.monotonic() >= give_up:
                    raise
                await asyncio.sleep(_RETRY_S)
            if len(self._known) > MAX_SECRETS:
                self._known.popitem(last=False)
        return secret

    async def _fetch(self, tenant: str) -> bytes:
        table = await self._bus.table("keys")
        for _ in range(3):
            entry = await table.get(tenant, TenantSecret)
            if entry is not None:
                return entry.secret
            made = TenantSecret(tenant=tenant, secret=secrets.token_bytes(SECRET_BYTES))
            if await table.create(tenant, made):
                return made.secret  # else another gateway was faster: read again
        raise Unavailable("the tenant's secret cannot be read")
