"""Forms that try to break the reader: each is refused as the client's fault, and nothing of it is kept."""

from __future__ import annotations

import asyncio
import gzip
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from shared.store.settings import StoreSettings
from tests.gateway.running import RunningGateway
from tests.gateway.test_files import MIB, Start

KIND = {"Content-Type": "multipart/form-data; boundary=x"}
HEAD = b'--x\r\nContent-Disposition: form-data; name="'
PURPOSE = HEAD + b'purpose"\r\n\r\nbatch\r\n'
END = b"\r\n--x--\r\n"


def file_part(contents: bytes, name: bytes = b"f", more: bytes = b"") -> bytes:
    """The part of a form that holds the file."""
    return HEAD + b'file"; filename="' + name + b'"\r\n' + more + b"\r\n" + contents


@pytest.fixture
async def gateway(start: Start, tmp_path: Path) -> RunningGateway:
    """A gateway with small bounds."""
    return await start(
        store=StoreSettings(folder=tmp_path / "files"),
        max_file_bytes=2 * MIB,
        tenant_file_bytes=3 * MIB,
        max_uploads=2,
        read_timeout_s=0.5,
    )


async def post(gateway: RunningGateway, body: bytes, **headers: str) -> tuple[int, Any]:
    """Status and body of the answer."""
    given = KIND | {"Authorization": "Bearer key-alice"} | headers
    async with (
        aiohttp.ClientSession() as http,
        http.post(gateway.url + "/v1/files", data=io.BytesIO(body), headers=given) as response,
    ):
        return response.status, await response.json()


async def test_a_file_may_have_any_name(gateway: RunningGateway) -> None:
    """A name is only told back: it is no path, and need not even be text."""
    names = {
        b"\xff\xfe": "\ufffd\ufffd",
        b"../../etc/passwd": "../../etc/passwd",
        "ü.jsonl".encode(): "ü.jsonl",
        b"": "file",
    }
    for name, told in names.items():
        status, made = await post(gateway, PURPOSE + file_part(b"{}", name) + END)
        assert (status, made.get("filename")) == (200, told), made
    folder = gateway.settings.store.folder
    assert {path.parent for path in folder.rglob("file-*")} == {folder / "files" / "alice"}


BROKEN = [
    PURPOSE + file_part(b"", more=b"X: " + b"y" * 100_000 + b"\r\n") + END,
    PURPOSE + file_part(b"", more=b"X: y\r\n" * 10_000) + END,
    PURPOSE + file_part(b"{}", more=b"no header\r\n") + END,
    HEAD + b'\xff"\r\n\r\n' + b"z" * 5000 + b"\r\n" + file_part(b"{}") + END,
    PURPOSE.replace(b"batch", b"\xff") + file_part(b"{}") + END,
    b"".join(PURPOSE.replace(b"purpose", b"%d" % n) for n in range(40)) + file_part(b"{}") + END,
    b"x" * MIB + END,
    b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n--y--" + END,
    b"--x\r\nContent-Type: multipart/mixed\r\n\r\n" + END,
    b"--x",
    b"",
]


async def test_a_broken_form_is_the_clients_fault(gateway: RunningGateway) -> None:
    """Whatever is wrong with a form, the answer says so, and nothing is kept."""
    for body in BROKEN:
        status, answer = await post(gateway, body)
        assert 400 <= status < 500, (status, answer, body[:200])
    folder = gateway.settings.store.folder
    assert [path for path in folder.rglob("*") if path.is_file()] == []


async def test_a_packed_form_counts_as_what_it_may_become(gateway: RunningGateway) -> None:
    """A body's length says nothing of a packed file's: it is bounded, and booked, as the largest there may be."""
    packed = {"Content-Encoding": "gzip"}
    small = gzip.compress(PURPOSE + file_part(b"{}") + END)
    large = gzip.compress(PURPOSE + file_part(bytes(2 * MIB)) + END)
    bomb = gzip.compress(PURPOSE + file_part(bytes(3 * MIB)) + END)
    assert (await post(gateway, small, **packed))[0] == 200
    assert (await post(gateway, bomb, **packed))[0] == 413
    assert (await post(gateway, large, **packed))[0] == 200
    status, answer = await post(gateway, small, **packed)
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")


async def test_a_client_that_trickles_keeps_nobody_out(gateway: RunningGateway) -> None:
    """A tenant has no more than its share of the uploads, and loses it if nearly nothing comes."""

    async def trickle() -> AsyncIterator[bytes]:
        yield PURPOSE + file_part(b"")
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    given = KIND | {"Authorization": "Bearer key-alice"}
    async with aiohttp.ClientSession() as http:
        url = gateway.url + "/v1/files"
        slow = asyncio.create_task(http.post(url, data=trickle(), headers=given))
        await asyncio.sleep(0.2)
        assert (await post(gateway, PURPOSE + file_part(b"{}") + END))[0] == 429
        bob = {"Authorization": "Bearer key-bob"}
        assert (await post(gateway, PURPOSE + file_part(b"{}") + END, **bob))[0] == 200
        answer = await asyncio.wait_for(slow, 10)
        assert answer.status == 408


async def test_an_id_of_any_form_is_not_found(gateway: RunningGateway) -> None:
    """What cannot be an id is none."""
    given = {"Authorization": "Bearer key-alice"}
    batch = {"endpoint": "/v1/completions", "completion_window": "24h"}
    async with aiohttp.ClientSession(headers=given) as http:
        for id_ in ("x" * 300, "x" * 6000, "%FF", "..%2F..%2Fetc", "*", "%3E", "a.b", "%00"):
            for path in ("files", "batches"):
                async with http.get(URL(f"{gateway.url}/v1/{path}/{id_}", encoded=True)) as got:
                    assert got.status == 404, (path, id_, await got.text())
        for id_ in ("é" * 256, "*", "../x"):
            async with http.post(
                f"{gateway.url}/v1/batches", json=batch | {"input_file_id": id_}
            ) as got:
                assert got.status == 404, (id_, await got.text())


async def test_a_head_gets_no_body(gateway: RunningGateway) -> None:
    """HEAD of a file's contents is refused, and leaves nothing on the connection that could pass for an answer."""
    _, made = await post(gateway, PURPOSE + file_part(b"12345") + END)
    given = {"Authorization": "Bearer key-alice"}
    url = f"{gateway.url}/v1/files/{made['id']}/content"
    async with aiohttp.ClientSession(headers=given) as http:
        async with http.head(url) as got:
            assert got.status == 405
        async with http.get(url) as got:
            assert await got.read() == b"12345"
