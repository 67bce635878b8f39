"""Why a request went where it went, asked over HTTP."""

from __future__ import annotations

import json

import aiohttp

from shared.bus import Bus
from shared.messages import StatusQuery, StatusReply


async def test_all_job_executors_are_asked(http: aiohttp.ClientSession, bus: Bus) -> None:
    """What every JE remembers of a request is told, each decision with its JE; of an unknown one nothing is: 404."""

    async def answer(query: StatusQuery) -> StatusReply:
        assert query.verb == "placement"
        known = query.argument == "chatcmpl-1"
        body = json.dumps({"decisions": [{"chosen": "te-a"}] if known else []})
        return StatusReply(kind="scheduler", id="je-1", pid=1, body=body)

    served = await bus.serve(bus.subjects.status("scheduler", "all"), (StatusQuery,), answer)
    try:
        for _ in range(20):  # a JE that is slow to answer is not waited for
            async with http.get("/debug/requests/chatcmpl-1/placement") as response:
                told = await response.json()
            if response.status == 200:
                break
        assert told == {"id": "chatcmpl-1", "decisions": [{"je": "je-1", "chosen": "te-a"}]}
        async with http.get("/debug/requests/other/placement") as response:
            assert response.status == 404
    finally:
        await served.stop()
