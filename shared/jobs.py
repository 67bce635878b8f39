"""Rows of jobs, as both sides of them see them: how a job comes into being, and which of its statuses are final.

This module must not know what any kind of job does, nor who runs it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Final

from shared.bus import Table, WorkQueue
from shared.errors import DeepFlowError
from shared.job_messages import JobCall, JobRow, JobStatus

FINAL: Final = frozenset(
    {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED}
)


async def submit(
    queue: WorkQueue,
    table: Table,
    kind: str,
    id_: str,
    *,
    tenant: str,
    arguments: str,
    expires_s: float,
) -> JobRow | None:
    """Put a new job on its way: first its row, then its entry. None if a job of that id exists: it is left alone.

    Raises Overloaded, Unavailable; then there is no such job, or the JEs find the row without an entry.
    """
    now = time.time()
    row = JobRow(
        id=id_,
        kind=kind,
        tenant=tenant,
        status=JobStatus.VALIDATING,
        created=int(now),
        expires=int(now + expires_s),
        arguments=arguments,
    )
    if not await table.create(id_, row):
        return None
    try:
        await queue.put(row.kind, row.id, JobCall(id=row.id))
    except DeepFlowError:
        await table.delete(row.id)
        raise
    return row


def moved(row: JobRow, status: JobStatus, now: float, **fields: Any) -> JobRow:
    """The row in its next status, stamped with the time it got there first."""
    stamps = {str(status): int(now), **row.stamps}
    return replace(row, status=status, stamps=stamps, **fields)
