"""/v1/files and /v1/batches over real HTTP: streamed both ways, bounded, each tenant's own."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared.bus import Bus
from shared.job_messages import JobCall, JobRow, JobStatus
from shared.store.settings import StoreSettings
from tests.gateway.running import RunningGateway
from tests.gateway.tenants import Caller

Start = Callable[..., Awaitable[RunningGateway]]
MIB = 1024 * 1024
LINES = b'{"custom_id": "a"}\n'
BATCH = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


class Tenant(Caller):
    """A tenant that also sends and fetches files."""

    async def upload(
        self, contents: Any = LINES, *, name: str = "in.jsonl", **fields: str
    ) -> tuple[int, Any]:
        """Status and body of POST /v1/files; the file comes last, as most clients send it."""
        form = aiohttp.FormData()
        for field, value in ({"purpose": "batch"} | fields).items():
            form.add_field(field, value)
        form.add_field("file", contents, filename=name)
        async with self._http.post(
            self._url + "/v1/files", data=form, headers=self.headers
        ) as response:
            return response.status, await response.json()

    async def file(self, contents: Any = LINES) -> str:
        """The id of a new file."""
        status, body = await self.upload(contents)
        assert status == 200, body
        id_: str = body["id"]
        return id_

    async def content(self, id_: str) -> tuple[int, bytes]:
        """Status and body of GET /v1/files/{id}/content."""
        async with self._http.get(
            f"{self._url}/v1/files/{id_}/content", headers=self.headers
        ) as response:
            return response.status, await response.read()


@pytest.fixture
async def gateway(start: Start, tmp_path: Path) -> RunningGateway:
    """A gateway with small quotas, and a store of its own."""
    return await start(
        store=StoreSettings(folder=tmp_path / "files"),
        max_file_bytes=12 * MIB,
        tenant_files=4,
        tenant_file_bytes=20 * MIB,
        tenant_batches=2,
    )


@pytest.fixture
async def alice(gateway: RunningGateway, session: aiohttp.ClientSession) -> Tenant:
    """One tenant."""
    return Tenant(session, gateway, "alice")


@pytest.fixture
async def bob(gateway: RunningGateway, session: aiohttp.ClientSession) -> Tenant:
    """Another one."""
    return Tenant(session, gateway, "bob")


def stored(gateway: RunningGateway) -> list[Path]:
    """Every file of the store, with those that are not whole."""
    return [path for path in gateway.settings.store.folder.rglob("*") if path.is_file()]


# ----------------------------------------------------------------------------------------------------------- files


async def test_a_file_comes_back_as_it_was_sent(alice: Tenant) -> None:
    """A file larger than any other body may be is kept, described as OpenAI does, and sent back byte for byte."""
    contents = bytes(range(256)) * 4 * 10_000  # 10 MiB

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(contents), 100_000):
            yield contents[start : start + 100_000]

    status, made = await alice.upload(pieces(), name="my-input.jsonl")
    assert status == 200, made
    assert made == {
        "id": made["id"],
        "object": "file",
        "bytes": len(contents),
        "created_at": made["created_at"],
        "expires_at": None,
        "filename": "my-input.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert await alice.call("GET", f"/v1/files/{made['id']}") == (200, made)
    assert await alice.content(made["id"]) == (200, contents)
    assert await alice.content(await alice.file(b"")) == (200, b"")


async def test_a_file_is_its_tenants_own(alice: Tenant, bob: Tenant) -> None:
    """Another tenant's file is not found, whatever is done with it."""
    id_ = await alice.file()
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        status, body = await bob.call(method, f"/v1/files/{id_}{path}")
        assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = await bob.call("POST", "/v1/batches", BATCH | {"input_file_id": id_})
    assert (status, body["error"]["param"]) == (404, "input_file_id")
    assert (await bob.call("GET", "/v1/files"))[1]["data"] == []
    assert (await alice.content(id_))[0] == 200


async def test_a_deleted_file_is_gone(alice: Tenant, gateway: RunningGateway) -> None:
    """Deleted, a file is not found, and nothing of it is left in the store."""
    id_ = await alice.file()
    assert len(stored(gateway)) == 1
    gone = {"id": id_, "object": "file", "deleted": True}
    assert await alice.call("DELETE", f"/v1/files/{id_}") == (200, gone)
    assert (await alice.call("GET", f"/v1/files/{id_}"))[0] == 404
    assert (await alice.call("DELETE", f"/v1/files/{id_}"))[0] == 404
    assert stored(gateway) == []


async def test_files_are_listed_in_parts(alice: Tenant) -> None:
    """The newest first, in parts that follow each other; with `order` the other way round."""
    ids = {await alice.file() for _ in range(3)}
    _, first = await alice.call("GET", "/v1/files?limit=2")
    assert (len(first["data"]), first["has_more"]) == (2, True)
    _, second = await alice.call("GET", f"/v1/files?limit=2&after={first['last_id']}")
    assert (len(second["data"]), second["has_more"]) == (1, False)
    listed = [one["id"] for one in first["data"] + second["data"]]
    assert set(listed) == ids
    _, upward = await alice.call("GET", "/v1/files?order=asc")
    assert [one["id"] for one in upward["data"]] == listed[::-1]
    assert (await alice.call("GET", "/v1/files?purpose=fine-tune"))[1]["data"] == []
    for query in ("limit=0", "limit=x", "after=nobody", "order=up"):
        assert (await alice.call("GET", f"/v1/files?{query}"))[0] == 400


def expiry(anchor: str, seconds: str) -> dict[str, str]:
    """The fields that say when a file goes."""
    return {"expires_after[anchor]": anchor, "expires_after[seconds]": seconds}


async def test_a_wrong_field_leaves_nothing_behind(alice: Tenant, gateway: RunningGateway) -> None:
    """What the form says is checked, and a file that is refused is not kept; one that is taken may expire."""
    wrong: list[tuple[dict[str, str], str]] = [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        (expiry("created_at", "5"), "expires_after[seconds]"),
        (expiry("now", "3600"), "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
    ]
    for fields, param in wrong:
        status, body = await alice.upload(**fields)
        assert (status, body["error"]["param"]) == (400, param)
    assert stored(gateway) == []
    _, made = await alice.upload(**expiry("created_at", "3600"))
    assert made["expires_at"] == made["created_at"] + 3600


async def test_a_file_that_is_too_large_is_refused_while_it_comes(
    alice: Tenant, gateway: RunningGateway
) -> None:
    """Past the bound the upload ends with 413, and nothing is kept."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(13):
            yield bytes(MIB)

    status, body = await alice.upload(pieces())
    assert (status, body["error"]["code"]) == (413, "too_large")
    assert stored(gateway) == []


async def test_a_tenants_files_are_bounded(alice: Tenant, bob: Tenant) -> None:
    """Past its number, or its bytes, a tenant gets a quota error; another tenant does not."""
    for _ in range(4):
        await alice.file()
    status, body = await alice.upload()
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    for _ in range(2):
        await bob.file(io.BytesIO(bytes(9 * MIB)))
    status, body = await bob.upload(io.BytesIO(bytes(3 * MIB)))
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    await bob.file()


async def test_what_is_no_form_is_refused(alice: Tenant, gateway: RunningGateway) -> None:
    """JSON, a form without a file, a broken form and an upload that breaks off are refused, and nothing is kept."""
    assert (await alice.call("POST", "/v1/files", {"purpose": "batch"}))[0] == 415
    url = gateway.url + "/v1/files"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    bodies = {
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n': "file",
        b"nothing of the kind": None,
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nhalf': None,
    }
    async with aiohttp.ClientSession() as http:
        for body, param in bodies.items():
            async with http.post(url, data=body, headers=alice.headers | kind) as response:
                answer = await response.json()
                assert response.status == 400, (body, answer)
                assert answer["error"]["param"] == param
    assert stored(gateway) == []


# --------------------------------------------------------------------------------------------------------- batches


async def test_a_batch_is_a_row_and_an_entry(alice: Tenant, bus: Bus) -> None:
    """Making a batch writes its row, puts an entry in the queue, and describes it as OpenAI does."""
    file = await alice.file()
    given = BATCH | {"input_file_id": file, "metadata": {"run": "7"}}
    status, made = await alice.call("POST", "/v1/batches", given)
    assert status == 200, made
    stamps = (
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    )
    assert made == {
        "id": made["id"],
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "model": None,
        "errors": None,
        "input_file_id": file,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": made["created_at"],
        "expires_at": made["created_at"] + 86_400,
        **{f"{name}_at": None for name in stamps},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": {"run": "7"},
    }
    entry = await (await bus.work_queue()).take("batch", JobCall, 2.0)
    assert entry is not None
    assert entry.message.id == made["id"]
    row = await (await bus.table("jobs")).get(made["id"], JobRow)
    assert row is not None
    assert (row.kind, row.tenant, row.status) == ("batch", "alice", JobStatus.VALIDATING)
    assert await alice.call("GET", f"/v1/batches/{made['id']}") == (200, made)


async def test_a_batch_is_its_tenants_own(alice: Tenant, bob: Tenant) -> None:
    """Another tenant's batch is not found, and not listed."""
    _, made = await alice.call("POST", "/v1/batches", BATCH | {"input_file_id": await alice.file()})
    for method, path in (("GET", ""), ("POST", "/cancel")):
        assert (await bob.call(method, f"/v1/batches/{made['id']}{path}"))[0] == 404
    assert (await bob.call("GET", "/v1/batches"))[1]["data"] == []
    assert (await alice.call("GET", "/v1/batches"))[1]["data"] == [made]


async def test_a_cancelled_batch_says_so_until_a_je_ends_it(alice: Tenant, bus: Bus) -> None:
    """Cancelling is a status with a stamp, and idempotent; a batch that is over cannot be cancelled."""
    _, made = await alice.call("POST", "/v1/batches", BATCH | {"input_file_id": await alice.file()})
    path = f"/v1/batches/{made['id']}/cancel"
    for _ in range(2):
        status, body = await alice.call("POST", path)
        assert (status, body["status"]) == (200, "cancelling")
        assert body["cancelling_at"] >= made["created_at"]
    rows = await bus.table("jobs")
    row = await rows.get(made["id"], JobRow)
    assert row is not None
    await rows.put(made["id"], JobRow(**{**_fields(row), "status": JobStatus.COMPLETED}))
    status, body = await alice.call("POST", path)
    assert status == 400
    assert "completed" in body["error"]["message"]


def _fields(row: JobRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


async def test_the_same_idempotency_key_is_one_batch(alice: Tenant, bob: Tenant) -> None:
    """Sent twice with one key, a batch is made once; the key is the tenant's own."""
    given = BATCH | {"input_file_id": await alice.file()}
    first = await alice.call("POST", "/v1/batches", given, Idempotency_Key="k")
    assert first[0] == 200
    assert await alice.call("POST", "/v1/batches", given, Idempotency_Key="k") == first
    other = BATCH | {"input_file_id": await alice.file()}
    status, body = await alice.call("POST", "/v1/batches", other, Idempotency_Key="k")
    assert (status, body["error"]["param"]) == (409, "Idempotency-Key")
    given = BATCH | {"input_file_id": await bob.file()}
    _, others = await bob.call("POST", "/v1/batches", given, Idempotency_Key="k")
    assert others["id"] != first[1]["id"]


async def test_a_tenants_batches_are_bounded(alice: Tenant, bob: Tenant) -> None:
    """Past its number of unfinished batches a tenant gets a quota error; another tenant does not."""
    given = BATCH | {"input_file_id": await alice.file()}
    for _ in range(2):
        assert (await alice.call("POST", "/v1/batches", given))[0] == 200
    status, body = await alice.call("POST", "/v1/batches", given)
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    given = BATCH | {"input_file_id": await bob.file()}
    assert (await bob.call("POST", "/v1/batches", given))[0] == 200


async def test_a_wrong_batch_is_refused(alice: Tenant) -> None:
    """Each field is checked, and named where it is wrong."""
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "25h"}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
    ]
    for change, param in wrong:
        given = BATCH | {"input_file_id": "file-1"} | change
        status, body = await alice.call("POST", "/v1/batches", given)
        assert (status, body["error"]["param"]) == (400, param)
