"""Prepared weights: a checkpoint quantised and packed once into one file, which later starts only map.

Preparing happens under a lock, so that several processes that start together do it once, and the file appears by a
rename: a process killed at any point leaves nothing that another would take for whole. What the file holds is
`layout.py`'s business. This module must not know who computes with it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.layout import ALIGNMENT, Entry, layout_of, padded, tensors_of
from services.worker.flowserve.tensorfile import NUMPY_TYPES, Array, TensorFile
from shared import log

RECIPE: Final = "w8a8 g32 h64 v2"  # changes with everything that changes a byte of the file
FILE: Final = "packed.safetensors"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model's prepared weights, mapped read-only. `arrays` holds bfloat16 as uint16.

    `num_bytes` is the size of the packed products: what one decode step reads, but for experts that no row chose.
    """

    config: ModelConfig
    arrays: dict[str, Array]
    num_bytes: int
    path: Path


def open_prepared(folder: Path, cache_dir: Path) -> Prepared:
    """Maps the prepared weights of the model in `folder`, after preparing them below `cache_dir` if they are not there.

    The checkpoint's files are known by name, size, time of modification and header. Raises ModelError naming what is
    wrong with the model, or why nothing can be kept in the cache.
    """
    config, checkpoint = ModelConfig.from_folder(folder), Checkpoint(folder)
    # Known before the file is: so a cut, foreign or older file is found out by its header alone.
    layout = layout_of(config)
    root, digest = cache_dir / "prepared", _digest(folder, checkpoint)
    path = root / digest / FILE
    found = _map(path, digest, config, layout)
    if found is not None:
        return found
    try:
        with _locked(root):
            found = _map(path, digest, config, layout)  # another process may have been first
            if found is None:
                _prepare(folder, checkpoint, config, layout, path)
                _sweep(root, keep=path.parent, source=str(folder.resolve()))
    except OSError as error:
        raise ModelError(f"cannot keep prepared weights below {root}: {error}") from error
    found = found or _map(path, digest, config, layout)
    if found is None:
        raise ModelError(f"{path} was changed while it was being opened")
    return found


def _digest(folder: Path, checkpoint: Checkpoint) -> str:
    """32 hex characters over what the prepared bytes depend on, without reading the weights."""
    digest = blake2b(RECIPE.encode(), digest_size=16)
    for file in checkpoint.files():
        mtime_ns = file.path.stat().st_mtime_ns
        digest.update(f"\n{file.path.name}\n{file.num_bytes}\n{mtime_ns}\n".encode())
        digest.update(blake2b(file.header).digest())
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()


def _map(path: Path, digest: str, config: ModelConfig, layout: dict[str, Entry]) -> Prepared | None:
    """The file at `path` if it is whole and ours, else None."""
    try:
        file = TensorFile(path)
        wanted = {name: entry.stored for name, entry in layout.items()}
        names = file.names
        stored = {
            name: {"dtype": file.dtype(name), "shape": list(file.shape(name))} for name in names
        }
        if file.metadata.get("digest") != digest or stored != wanted:
            return None
        arrays = {
            name: file.array(name).reshape(-1)[: math.prod(entry.shape)].reshape(entry.shape)
            for name, entry in layout.items()
        }
    except (ModelError, KeyError, ValueError):
        return None
    packed = ("codes", "scales", "bias")
    num_bytes = sum(array.nbytes for name, array in arrays.items() if name.endswith(packed))
    return Prepared(config, arrays, num_bytes, path)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time prepares; the lock ends with its holder, however that dies."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(
    folder: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    layout: dict[str, Entry],
    path: Path,
) -> None:
    started = time.perf_counter()
    log.note("weights_preparation_started", model=folder.name, recipe=RECIPE)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(
        ".partial"
    )  # always the same: what a killed process left is overwritten
    metadata = {"digest": path.parent.name, "recipe": RECIPE, "source": str(folder.resolve())}
    try:
        with partial.open("wb") as file:
            _write(file, layout, metadata, tensors_of(config, checkpoint))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)
    log.note("weights_prepared", model=folder.name, seconds=round(time.perf_counter() - started, 2))


def _write(
    file: BinaryIO,
    layout: dict[str, Entry],
    metadata: dict[str, str],
    tensors: Iterator[tuple[str, Array]],
) -> None:
    """Writes header and tensors, one alive at a time."""
    header: dict[str, object] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name, entry in layout.items():
        starts[name] = end
        end += entry.padded_bytes
        header[name] = {**entry.stored, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text = text.ljust(padded(8 + len(text), ALIGNMENT) - 8)  # the format allows blanks at its end
    file.write(len(text).to_bytes(8, "little") + text)
    data = file.tell()
    file.truncate(data + end)  # the padding reads as zeros
    for name, array in tensors:
        entry = layout[name]
        if array.shape != entry.shape or array.dtype != NUMPY_TYPES[entry.dtype]:
            raise AssertionError(f"{name}: {array.dtype} {array.shape} is not {entry}")
        file.seek(data + starts[name])
        file.write(np.ascontiguousarray(array).data)


def _sweep(root: Path, *, keep: Path, source: str) -> None:
    """Removes what nobody will open again: of this model's former weights, of models that are gone, of killed
    processes. Who has such a file mapped keeps it until it ends."""
    for folder in root.iterdir():
        if not folder.is_dir() or folder == keep:
            continue
        try:
            of = TensorFile(folder / FILE).metadata.get("source", "")
        except ModelError:
            of = ""
        if of in ("", source) or not Path(of).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
