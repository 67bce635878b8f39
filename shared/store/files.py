"""Tenants' files: their contents in the store, and what is known of them in a table. Both sides of a batch use it.

A file exists while its row does: contents are stored before the row is written, and removed after it. This module
must not know what files are for, or how many a tenant may have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from shared.bus import Table
from shared.errors import NotFound, Unavailable
from shared.job_messages import FileRow
from shared.store.base import Store
from shared.subjects import decode, encode, is_token

_FOLDER: Final = "files"
_ORPHANED_S: Final = 3600.0  # contents of this age without a row are nobody's


class Files:
    """Every method raises Unavailable in trouble."""

    def __init__(self, store: Store, table: Table) -> None:
        self._store = store
        self._table = table

    async def store(self, tenant: str, id_: str, chunks: AsyncIterator[bytes]) -> int:
        """Store contents, for `add`; their size. What `chunks` raises ends it, with nothing stored."""
        return await self._store.put(_key(tenant, id_), chunks)

    async def add(self, row: FileRow) -> None:
        """From now on there is this file, whose contents are stored."""
        await self._table.part(row.tenant).put(row.id, row)

    async def get(self, tenant: str, id_: str, now: float) -> FileRow:
        """A tenant's file. Raises NotFound, also for one that has expired."""
        row = await self._table.part(tenant).get(id_, FileRow) if is_token(id_) else None
        if row is None or _expired(row, now):
            raise NotFound(f"No such File object: {id_[:100]}", param="id")
        return row

    def read(self, row: FileRow) -> AsyncIterator[bytes]:
        """Its contents. Raises NotFound."""
        return self._store.get(_key(row.tenant, row.id))

    async def all(self, tenant: str, now: float) -> list[FileRow]:
        """A tenant's files, the oldest first."""
        rows = (await self._table.part(tenant).all(FileRow)).values()
        return sorted(
            (row for row in rows if not _expired(row, now)), key=lambda row: (row.created, row.id)
        )

    async def remove(self, tenant: str, id_: str) -> None:
        """Delete a file; a missing one is fine."""
        await self._table.part(tenant).delete(id_)
        await self._store.delete(_key(tenant, id_))

    async def sweep(self, now: float) -> None:
        """Remove what has expired, and contents that no row speaks of."""
        contents: dict[str, dict[str, float]] = {}
        for stored in await self._store.listing(_FOLDER):
            try:
                _, *tokens = stored.key.split("/")
                tenant, id_ = map(decode, tokens)
            except ValueError:  # somebody else's
                continue
            contents.setdefault(tenant, {})[id_] = stored.modified
        for tenant, found in contents.items():
            rows = await self._table.part(tenant).all(FileRow)
            for id_, modified in found.items():
                row = rows.get(id_)
                if row is not None:
                    is_over = _expired(row, now)
                else:
                    is_over = now - modified > _ORPHANED_S and await self._is_orphan(tenant, id_)
                if is_over:
                    await self.remove(tenant, id_)

    async def _is_orphan(self, tenant: str, id_: str) -> bool:
        """Whether there is no row at all: one that cannot be read, as of a newer release, is left out of a list."""
        try:
            return await self._table.part(tenant).get(id_, FileRow) is None
        except Unavailable:
            return False


def _key(tenant: str, id_: str) -> str:
    return f"{_FOLDER}/{encode(tenant)}/{encode(id_)}"


def _expired(row: FileRow, now: float) -> bool:
    return bool(row.expires) and row.expires <= now
