"""Stores of files: a folder, and a bucket behind a real HTTP server that speaks S3, with one behaviour."""

from __future__ import annotations

import asyncio
import http.client
import os
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.config import ConfigError, Reader
from shared.errors import NotFound, TooLarge, Unavailable
from shared.job_messages import FileRow, JobCall
from shared.store import s3
from shared.store.base import CHUNK_BYTES, Store, read, whole
from shared.store.files import Files
from shared.store.local import LocalStore
from shared.store.settings import StoreSettings
from tests.system.stack import free_port

ENV = {
    "DEEPFLOW_FILES_S3_BUCKET": "files-of-tests",
    "DEEPFLOW_FILES_S3_PREFIX": "deepflow/tests",
    "DEEPFLOW_FILES_S3_ACCESS_KEY_ID": "id",
    "DEEPFLOW_FILES_S3_SECRET_ACCESS_KEY": "secret",
}
TELLING = bytes(range(251)) * 2000


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server with one empty bucket."""
    port = free_port()
    program = Path(sysconfig.get_path("scripts"), "moto_server")
    server = subprocess.Popen([program, "-p", str(port)], stderr=subprocess.DEVNULL)
    signed = "AWS4-HMAC-SHA256 Credential=id/20200101/us-east-1/s3/aws4_request"
    give_up = time.monotonic() + 30
    try:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("PUT", "/files-of-tests", headers={"Authorization": signed})
                assert connection.getresponse().status == 200
                break
            except ConnectionError:
                assert time.monotonic() < give_up
                time.sleep(0.05)
            finally:
                connection.close()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind of store, empty or nearly so."""
    if request.param == "local":
        return StoreSettings(folder=tmp_path / "files").open()
    url = request.getfixturevalue("endpoint")
    env = ENV | {"DEEPFLOW_FILES_S3_ENDPOINT": url, "DEEPFLOW_FILES_S3_PREFIX": tmp_path.name}
    return StoreSettings.read(Reader(env), tmp_path).open()


async def pieces(num_bytes: int, size: int = 300_000) -> AsyncIterator[bytes]:
    """So many bytes that tell where they are."""
    for start in range(0, num_bytes, size):
        yield TELLING[start % 251 :][: min(size, num_bytes - start)]


async def collected(chunks: AsyncIterator[bytes]) -> bytes:
    """All of it."""
    return b"".join([chunk async for chunk in chunks])


async def test_what_is_put_comes_back(store: Store) -> None:
    """A file of several pieces and parts is stored and read whole; an empty one, too."""
    wanted = await collected(pieces(9_000_000))
    assert await store.put("files/a/big", pieces(9_000_000)) == len(wanted)
    chunks = [chunk async for chunk in store.get("files/a/big")]
    assert b"".join(chunks) == wanted
    assert max(map(len, chunks)) < 9 * CHUNK_BYTES
    assert await store.put("files/a/none", pieces(0)) == 0
    assert await collected(store.get("files/a/none")) == b""


async def test_a_slow_reader_gets_it_all(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long one takes between two pieces, as a batch does over its input, no request's time is over."""
    monkeypatch.setattr(s3, "_TIMEOUT_S", 1)
    monkeypatch.setattr(s3, "_RETRIES", 0)
    env = ENV | {"DEEPFLOW_FILES_S3_ENDPOINT": endpoint}
    store = StoreSettings.read(Reader(env), tmp_path).open()
    size = 24_000_000
    await store.put("slow", pieces(size))
    num_bytes = 0
    async for chunk in store.get("slow"):
        await asyncio.sleep(0.0 if num_bytes else 1.2)
        num_bytes += len(chunk)
    assert num_bytes == size


async def test_a_put_that_fails_leaves_what_was_there(store: Store) -> None:
    """What the chunks raise is raised, small or large, and the old file stays."""

    async def failing(num_bytes: int) -> AsyncIterator[bytes]:
        async for piece in pieces(num_bytes):
            yield piece
        raise TooLarge("enough")

    await store.put("files/a", whole(b"old"))
    for num_bytes in (10, 9_000_000):
        with pytest.raises(TooLarge, match="enough"):
            await store.put("files/a", failing(num_bytes))
        with pytest.raises(TooLarge, match="enough"):
            await store.put("files/b", failing(num_bytes))
    assert await read(store, "files/a", 100) == b"old"
    assert [one.key for one in await store.listing("files")] == ["files/a"]


async def test_what_is_listed_is_what_is_there(store: Store) -> None:
    """A listing has the files below a path, by key, with sizes and times; what was deleted is not in it."""
    before = time.time() - 2
    for key, data in (("x/b", b"12"), ("x/a/c", b"3"), ("xy", b""), ("x/a/d", b"")):
        await store.put(key, whole(data))
    await store.put("x/b", whole(b"123"))
    await store.delete("x/a/d")
    await store.delete("x/a/d")
    found = await store.listing("x")
    assert [(one.key, one.num_bytes) for one in found] == [("x/a/c", 1), ("x/b", 3)]
    assert all(before <= one.modified <= time.time() + 2 for one in found)
    assert await store.listing("nothing") == []
    with pytest.raises(NotFound):
        await collected(store.get("x/a/d"))


async def test_what_is_no_key_is_refused(store: Store) -> None:
    """A key cannot lead out of the store, nor name what the store keeps for itself."""
    for key in ("", "/etc/passwd", "../x", "a/../b", "a//b", ".parts/x", "a/.b", "a b", "a" * 300):
        with pytest.raises(ValueError, match="not a key"):
            await store.put(key, whole(b""))
        with pytest.raises(ValueError, match="not a key"):
            await collected(store.get(key))


async def test_a_bucket_that_is_not_there_is_said_to_be(endpoint: str, tmp_path: Path) -> None:
    """A store that cannot work is unavailable, whatever is asked of it, and does not take for ever to say so."""
    env = ENV | {"DEEPFLOW_FILES_S3_ENDPOINT": endpoint, "DEEPFLOW_FILES_S3_BUCKET": "nobodys"}
    missing = StoreSettings.read(Reader(env), tmp_path).open()
    with pytest.raises(Unavailable):
        await missing.put("a", whole(b"1"))
    with pytest.raises((Unavailable, NotFound)):
        await missing.listing("a")


def test_settings_name_the_variable_that_is_wrong(tmp_path: Path) -> None:
    """A bucket needs its key, an endpoint is a URL, and no secret is in what is printed."""
    for name, value in (
        ("DEEPFLOW_FILES_S3_SECRET_ACCESS_KEY", ""),
        ("DEEPFLOW_FILES_S3_ACCESS_KEY_ID", ""),
        ("DEEPFLOW_FILES_S3_ENDPOINT", "ftp://x"),
    ):
        with pytest.raises(ConfigError, match=name):
            StoreSettings.read(Reader(ENV | {name: value}), tmp_path)
    assert "secret" not in repr(StoreSettings.read(Reader(ENV), tmp_path))
    assert StoreSettings.read(Reader({}), tmp_path) == StoreSettings(folder=tmp_path / "files")


async def test_a_folder_keeps_nothing_of_what_was_never_whole(tmp_path: Path) -> None:
    """An upload that is cancelled leaves nothing, and what a killed process left is removed by a later upload."""
    store = LocalStore(tmp_path)
    stale = tmp_path / ".parts" / "stale"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))

    async def endless() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await store.put("a/b", endless())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_expired_files_and_orphans_are_swept(bus: Bus, tmp_path: Path) -> None:
    """A sweep removes what has expired and contents without a row, once they are old; nothing else."""
    store = LocalStore(tmp_path)
    files = Files(store, await bus.table("files"))
    now = time.time()
    for id_, expires in (("kept", 0), ("gone", int(now) - 1), ("later", int(now) + 100)):
        size = await files.store("a tenant", id_, whole(b"123"))
        await files.add(
            FileRow(
                id=id_,
                tenant="a tenant",
                name="n",
                purpose="batch",
                num_bytes=size,
                created=int(now) - 10,
                expires=expires,
            )
        )
    await files.store("other", "orphan", whole(b"1"))
    await files.store("other", "newer", whole(b"2"))
    await (await bus.table("files")).part("other").put("newer", JobCall(id="of a newer release"))
    strange = tmp_path / "files" / "what somebody put here"
    strange.write_bytes(b"?")
    (tmp_path / "files" / "lone").write_bytes(b"a key, but not of ours")
    with pytest.raises(NotFound):
        await files.get("a tenant", "gone", now)
    await files.sweep(now)
    assert len(await store.listing("files")) == 5, "an upload may be about to write its row"
    await files.sweep(now + 7200)
    left = await files.all("a tenant", now)
    assert [row.id for row in left] == ["kept"]
    assert [one.key for one in await store.listing("files")] == [
        "files/a=20tenant/kept",
        "files/lone",
        "files/other/newer",
    ]
    assert strange.exists()
