"""Pulling from a hub: a local server speaks the Hugging Face hub's protocol for one tiny repository."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from shared import catalog
from shared.errors import ModelNotFound
from tests.worker.tiny import make_tiny

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository `org/tiny`, to those who show the token."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: list[str] = []
        self.broken: set[str] = set()
        self.corrupted: set[str] = set()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few routes that a download of a snapshot asks for."""

    server: Hub

    def do_HEAD(self) -> None:
        """Metadata of one file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Metadata of the repository, or one file."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"}, {"X-Error-Code": "GatedRepo"})
        match parts:
            case ["api", "models", "org", "tiny", *rest] if rest in ([], ["revision", COMMIT]):
                files = [self._entry(path) for path in self._files()]
                info = {"id": "org/tiny", "sha": COMMIT, "siblings": files, "tags": []}
                return self._send(200, info)
            case ["api", "models", "org", "tiny", "tree", revision] if revision == COMMIT:
                return self._send(200, [self._entry(path) for path in self._files()])
            case ["org", "tiny", "resolve", revision, name] if revision == COMMIT:
                return self._send_file(self.server.folder / name, body)
        return self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def _files(self) -> list[Path]:
        return sorted(self.server.folder.iterdir())

    def _entry(self, path: Path) -> dict[str, Any]:
        """A file as the repository's metadata (`rfilename`) and its tree (`path`) tell it."""
        content = path.read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": path.name, "rfilename": path.name}
        entry |= {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.suffix == ".safetensors":
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 9}
        return entry

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), headers or {}, body=True)

    def _send_file(self, path: Path, body: bool) -> None:
        content = path.read_bytes()
        if body:
            self.server.fetched.append(path.name)
        if body and path.name in self.server.broken:
            return self._send(500, {"error": "disk on fire"})
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path.name in self.server.corrupted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self._send_bytes(200, content, headers, body)

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with one repository, which also holds what must not be downloaded."""
    folder = make_tiny(tmp_path / "repository")
    for stranger in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "README.md"):
        (folder / stranger).write_text("no")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pull(hub: Hub, reference: str, cache: Path, token: str = TOKEN) -> list[str]:
    """The lines of a child that pulls through HF_ENDPOINT."""
    home = cache.parent / "hf_home"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home)}
    command = [sys.executable, "-m", "tests.cli.puller", reference, str(cache), "", "0"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_downloads_what_a_model_needs_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """The served name is the repository's; neither pickles nor code are fetched; again asks nobody."""
    cache = tmp_path / "cache"
    lines = pull(hub, "hf:org/tiny", cache)
    assert lines[-1].startswith("pulled ")
    assert lines[0] == "downloading hf:org/tiny"
    model = catalog.open_model(cache, "org/tiny")
    assert sorted(hub.fetched) == sorted(
        path.name for path in model.path.iterdir() if path.name != "manifest.json"
    )
    for path in model.path.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (hub.folder / path.name).read_bytes()
    hub.fetched.clear()
    assert pull(hub, "hf:org/tiny", cache)[-1] == lines[-1]
    assert hub.fetched == []
    assert not list(cache.glob("models/.tmp-*"))


@pytest.mark.parametrize(
    ("reference", "token", "expected"),
    [
        ("hf:org/absent", TOKEN, "failed NotFound"),
        ("hf:org/tiny", "hf_wrong", "failed NotFound"),
        ("hf:not a name/at all/", TOKEN, "failed InvalidRequest"),
    ],
)
def test_a_repository_out_of_reach_is_named(
    hub: Hub, tmp_path: Path, reference: str, token: str, expected: str
) -> None:
    """Absent, not open to us, or no repository at all: each a typed error, nothing published."""
    assert any(
        line.startswith(expected) for line in pull(hub, reference, tmp_path / "cache", token)
    )
    assert not list(tmp_path.glob("cache/models/[!.]*"))


def test_a_repository_of_pickles_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Without safetensors nothing is downloaded, and the error says why."""
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "consolidated.safetensors").unlink()
    last = pull(hub, "hf:org/tiny", tmp_path / "cache")[-1]
    assert last.startswith("failed InvalidRequest: hf:org/tiny has no safetensors")
    assert hub.fetched == []


def test_a_download_that_fails_publishes_nothing(hub: Hub, tmp_path: Path) -> None:
    """A file the hub cannot give ends the pull with an error, and leaves nothing."""
    hub.broken.add("tokenizer.json")
    lines = pull(hub, "hf:org/tiny", tmp_path / "cache")
    assert any(line.startswith("failed Unavailable: hf:org/tiny") for line in lines)
    with pytest.raises(ModelNotFound):
        catalog.open_model(tmp_path / "cache", "org/tiny")
    assert not list(tmp_path.glob("cache/models/.tmp-*"))


def test_corrupted_weights_are_refused(hub: Hub, tmp_path: Path) -> None:
    """Weights whose hash is not the one the hub states are not published."""
    hub.corrupted.add("model.safetensors")
    last = pull(hub, "hf:org/tiny", tmp_path / "cache")[-1]
    assert last.startswith("failed Unavailable: hf:org/tiny: model.safetensors is not what")
    assert not list(tmp_path.glob("cache/models/[!.]*"))
