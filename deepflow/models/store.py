"""Publishing a model folder: whole, checked and durable, or not at all.

Everything is built in `models/.tmp-<pid>-<random>` beside its destination and moved there by one rename. The temporary
folder is locked (flock) while its owner lives, so the kernel tells a pull that was killed from one that is at work,
across containers too; what the dead left is swept by the next pull. Two pulls of one model wait for each other on
`models/.lock-<encoded name>`, an empty file that stays. This module must not know where models come from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from deepflow.models.progress import Progress
from shared import catalog, subjects
from shared.catalog import MANIFEST, ModelFolder
from shared.errors import InvalidRequest, Unavailable
from shared.text.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 20


def publish(
    cache_dir: Path,
    name: str,
    source: str,
    build: Callable[[Path, Path], None],
    progress: Progress,
    *,
    state: str = "",
    verify: bool = False,
) -> ModelFolder:
    """The model `name`, built by `build(model_folder, scratch_folder)` unless it is there already.

    `source` says where it comes from, `state` which state of that (a file's size and time). What is there is kept if
    both agree and all files have their recorded sizes, with `verify` also their SHA-256; else it is built anew and
    replaced. Raises InvalidRequest if the name is impossible or taken by another source, or if what was built is no
    model; then nothing is published.
    """
    destination = catalog.models_dir(cache_dir) / _token(name)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _lock(destination.parent / f".lock-{destination.name}", name, progress):
        manifest = _manifest(destination)
        if manifest.get("source", source) != source:
            raise InvalidRequest(
                f"the name {name!r} is taken by {manifest['source']}; choose another one",
                param="name",
            )
        if manifest.get("state") == state and _intact(destination, manifest, verify, progress):
            _sweep(destination.parent)
            return catalog.open_model(cache_dir, name)
        with _temporary(destination.parent) as temporary:
            model, scratch = temporary / "model", temporary / "scratch"
            model.mkdir()
            scratch.mkdir()
            build(model, scratch)
            _write_manifest(model, name, source, state, progress)
            _check(model, name)
            if destination.exists():
                os.rename(destination, temporary / "replaced")
            os.rename(model, destination)
            _sync(destination.parent)
    return catalog.open_model(cache_dir, name)


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file and makes it durable."""
    shutil.copyfile(source, target)
    _sync(target)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object that people can read, durably."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, durably."""
    path.write_text(text, encoding="utf-8")
    _sync(path)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def link_file(source: Path, target: Path) -> None:
    """Makes a large file appear at `target` without copying it: a hard link, which outlives the original's name, or
    across file systems a symbolic one, which does not."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)
    _sync(target)


def hash_file(path: Path, progress: Progress) -> str:
    """Hex SHA-256 of a file's content, advancing the present step."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


def _token(name: str) -> str:
    try:
        token = subjects.encode(name)
    except ValueError as error:
        raise InvalidRequest(f"not a model name: {error}", param="name") from error
    if len(token) > 240:  # with ".lock-" before it, still a file name
        raise InvalidRequest("the model name is too long", param="name")
    return token


def _write_manifest(model: Path, name: str, source: str, state: str, progress: Progress) -> None:
    """The last file of a folder: names every other one, with its size and SHA-256."""
    paths = sorted(path for path in model.iterdir() if path.name != MANIFEST)
    progress.step("checksums", sum(path.stat().st_size for path in paths))
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": hash_file(path, progress)}
        for path in paths
    ]
    weights = hashlib.sha256()
    for file in files:
        if str(file["name"]).endswith(".safetensors"):
            weights.update(f"{file['name']} {file['sha256']}\n".encode())
    write_json(
        model / MANIFEST,
        {
            "name": name,
            "source": source,
            "state": state,
            "created": int(time.time()),
            "weights_digest": weights.hexdigest(),
            "files": files,
        },
    )
    _sync(model)


def _check(model: Path, name: str) -> None:
    """Nothing is published that a service could not open."""
    try:
        catalog.read_model(model, name)
        Tokenizer.load(model)
    except Unavailable as error:
        raise InvalidRequest(f"{name!r} is no model that can be served: {error.message}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; empty if there is none, or none that can be read."""
    try:
        return catalog.read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}


def _intact(folder: Path, manifest: dict[str, Any], verify: bool, progress: Progress) -> bool:
    """Whether the files are those of the manifest, by size, with `verify` by content."""
    try:
        files = [(folder / f["name"], int(f["size"]), str(f["sha256"])) for f in manifest["files"]]
        if any(path.stat().st_size != size for path, size, _ in files):
            return False
    except (OSError, KeyError, TypeError, ValueError):
        return False
    if not verify:
        return True
    progress.step("verifying", sum(size for _, size, _ in files))
    return all(hash_file(path, progress) == sha256 for path, _, sha256 in files)


@contextmanager
def _lock(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """Holds the file lock at `path`; the kernel drops it when its holder dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step(f"waiting for another pull of {name}", 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(models: Path) -> Iterator[Path]:
    """A locked temporary folder, gone afterwards; first sweeps those whose owners died."""
    with _guard(models):
        _sweep_unguarded(models)
        folder = models / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _sweep(models: Path) -> None:
    with _guard(models):
        _sweep_unguarded(models)


@contextmanager
def _guard(models: Path) -> Iterator[None]:
    """A short lock on the folder of all models: no sweep between the making of a temporary folder and its lock."""
    descriptor = os.open(models, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep_unguarded(models: Path) -> None:
    for folder in models.glob(".tmp-*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its owner was faster
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # its owner lives
            continue
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    """Forces a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
