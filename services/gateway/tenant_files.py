"""A tenant's files as it sees them, and how much of them it may have. This module must not know HTTP.

The quota is checked before an upload against what is there and what is on its way here; several gateways may together
let in a little more.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable

from services.gateway.openai.caches import QuotaExceeded
from services.gateway.openai.files import FileOrder
from services.gateway.settings import GatewaySettings
from shared.errors import Overloaded
from shared.job_messages import FileRow
from shared.store.files import Files


class TenantFiles:
    """Every method raises Unavailable in trouble, NotFound for what is not the tenant's."""

    def __init__(self, files: Files, settings: GatewaySettings) -> None:
        self._files = files
        self._settings = settings
        self._coming: dict[str, list[int]] = {}  # tenant -> sizes of its uploads

    async def upload(
        self,
        tenant: str,
        chunks: AsyncIterator[bytes],
        describe: Callable[[], FileOrder],
        max_bytes: int,
    ) -> FileRow:
        """Keep what `chunks` brings, at most `max_bytes`; `describe` tells at its end what it is.

        Raises QuotaExceeded, Overloaded, and what the two raise: then nothing is kept.
        """
        most = self._settings.max_uploads
        coming = self._coming.get(tenant, [])
        # One tenant never takes all the places.
        if sum(map(len, self._coming.values())) >= most or len(coming) >= max(1, most // 2):
            raise Overloaded("too many files are being uploaded", retry_after_s=5.0)
        self._coming[tenant] = coming
        coming.append(max_bytes)
        try:
            await self._check_quota(tenant)
            id_ = f"file-{secrets.token_hex(12)}"
            orders: list[FileOrder] = []

            async def described() -> AsyncIterator[bytes]:
                async for chunk in chunks:
                    yield chunk
                orders.append(describe())  # what it raises leaves nothing stored

            num_bytes = await self._files.store(tenant, id_, described())
            [order] = orders
            now = int(time.time())
            row = FileRow(
                id=id_,
                tenant=tenant,
                name=order.name,
                purpose=order.purpose,
                num_bytes=num_bytes,
                created=now,
                expires=now + order.ttl_s if order.ttl_s else 0,
            )
            await self._files.add(row)
            return row
        finally:
            coming.remove(max_bytes)
            if not coming:
                self._coming.pop(tenant, None)

    async def _check_quota(self, tenant: str) -> None:
        rows = await self.all(tenant)
        coming = self._coming[tenant]
        if len(rows) + len(coming) > self._settings.tenant_files:
            raise QuotaExceeded(f"you may have {self._settings.tenant_files} files: delete some")
        if sum(row.num_bytes for row in rows) + sum(coming) > self._settings.tenant_file_bytes:
            raise QuotaExceeded(
                f"your files may have {self._settings.tenant_file_bytes} bytes: delete some"
            )

    async def all(self, tenant: str) -> list[FileRow]:
        """The oldest first."""
        return await self._files.all(tenant, time.time())

    async def get(self, tenant: str, id_: str) -> FileRow:
        """One file."""
        return await self._files.get(tenant, id_, time.time())

    def read(self, row: FileRow) -> AsyncIterator[bytes]:
        """A file's contents."""
        return self._files.read(row)

    async def remove(self, tenant: str, id_: str) -> None:
        """Delete a file."""
        await self._files.get(tenant, id_, time.time())
        await self._files.remove(tenant, id_)
