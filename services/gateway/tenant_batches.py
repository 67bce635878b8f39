"""A tenant's batches as it sees them: rows of jobs that the JEs work on. This module must not know HTTP."""

from __future__ import annotations

import secrets
import time
from hashlib import blake2b

from services.gateway.calls import Caller
from services.gateway.openai.batches import window_s
from services.gateway.openai.caches import Conflict, QuotaExceeded
from services.gateway.settings import GatewaySettings
from services.gateway.tenant_files import TenantFiles
from shared import wire
from shared.bus import Table, WorkQueue
from shared.errors import InvalidRequest, NotFound
from shared.job_messages import BatchArguments, JobRow, JobStatus
from shared.jobs import FINAL, moved, submit
from shared.subjects import is_token

KIND = "batch"


class TenantBatches:
    """Every method raises Unavailable in trouble, NotFound for what is not the tenant's."""

    def __init__(
        self, rows: Table, queue: WorkQueue, files: TenantFiles, settings: GatewaySettings
    ) -> None:
        self._rows = rows
        self._queue = queue
        self._files = files
        self._settings = settings

    async def create(self, arguments: BatchArguments, caller: Caller) -> JobRow:
        """A new batch; the same one for the same idempotency key. Raises InvalidRequest, Conflict (the key is another
        batch's), QuotaExceeded, Overloaded."""
        id_ = _id(caller)
        if caller.idempotency_key and (known := await self._rows.get(id_, JobRow)) is not None:
            return _same(known, arguments)
        try:
            file = await self._files.get(caller.tenant, arguments.input_file)
        except NotFound as error:
            raise NotFound(error.message, param="input_file_id") from error
        if file.purpose != KIND:
            raise InvalidRequest("the input file's purpose must be 'batch'", param="input_file_id")
        unfinished = [row for row in await self.all(caller.tenant) if row.status not in FINAL]
        if len(unfinished) >= self._settings.tenant_batches:
            raise QuotaExceeded(f"you may have {self._settings.tenant_batches} batches under way")
        row = await submit(
            self._queue,
            self._rows,
            KIND,
            id_,
            tenant=caller.tenant,
            arguments=wire.to_json(arguments).decode(),
            expires_s=window_s(arguments.window),
        )
        if row is not None:
            return row
        # The same key, at the same time.
        return _same(await self.get(caller.tenant, id_), arguments)

    async def all(self, tenant: str) -> list[JobRow]:
        """The oldest first."""
        rows = (await self._rows.all(JobRow)).values()
        return sorted(
            (row for row in rows if row.kind == KIND and row.tenant == tenant),
            key=lambda row: (row.created, row.id),
        )

    async def get(self, tenant: str, id_: str) -> JobRow:
        """One batch."""
        row = await self._rows.get(id_, JobRow) if is_token(id_) else None
        return _own(row, tenant, id_)

    async def cancel(self, tenant: str, id_: str) -> JobRow:
        """Have a batch end, with what is done by then. Raises InvalidRequest if it is over."""

        def step(row: JobRow) -> JobRow:
            _own(row, tenant, id_)
            if row.status in FINAL:
                raise InvalidRequest(f"Cannot cancel a batch with status '{row.status}'.")
            if row.status in (JobStatus.CANCELLING, JobStatus.FINALIZING):
                return row
            return moved(row, JobStatus.CANCELLING, time.time())

        if not is_token(id_):
            return _own(None, tenant, id_)
        row = await self._rows.change(id_, JobRow, step)
        return _own(row, tenant, id_)


def _own(row: JobRow | None, tenant: str, id_: str) -> JobRow:
    if row is None or row.kind != KIND or row.tenant != tenant:
        raise NotFound(f"No batch found with id '{id_[:100]}'.", param="id")
    return row


def _id(caller: Caller) -> str:
    if not caller.idempotency_key:
        return f"batch_{secrets.token_hex(12)}"
    named = f"{caller.tenant}\0{caller.idempotency_key}".encode()
    return f"batch_{blake2b(named, digest_size=12).hexdigest()}"


def _same(known: JobRow, arguments: BatchArguments) -> JobRow:
    """The batch that an Idempotency-Key stands for. Raises Conflict if it is not what is asked for now."""
    if wire.from_json(known.arguments.encode(), BatchArguments) != arguments:
        raise Conflict(
            "this Idempotency-Key was used to make another batch", param="Idempotency-Key"
        )
    return known
