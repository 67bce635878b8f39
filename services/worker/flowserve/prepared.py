"""Prepared weights: a checkpoint quantised and packed once into one file, which later starts only map.

Preparing happens under a lock, so that several processes that start together do it once, and the file appears by a
rename: a process killed at any point leaves nothing that another would take for whole. Its bytes say nothing of the
host that made them, so that another host may be given them; a sidecar beside the file says what is known of it here:
which checkpoint it stands for, and a digest of all its bytes. What the file holds is `layout.py`'s business. This
module must not know who computes with it, nor how a file comes from elsewhere.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import xxhash

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.filelock import locked
from services.worker.flowserve.layout import ALIGNMENT, layout_of, padded, tensors_of
from services.worker.flowserve.tensorfile import NUMPY_TYPES, Array, TensorFile
from shared import log
from shared.catalog import MANIFEST, read_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from _typeshed import ReadableBuffer

    from services.worker.flowserve.layout import Entry

RECIPE: Final = "w8a8 g32 h64 v2"  # changes with everything that changes a byte of the file
FILE: Final = "packed.safetensors"
_SIDECAR: Final = "packed.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model's prepared weights, mapped read-only. `arrays` holds bfloat16 as uint16.

    `num_bytes` is the size of the packed products: what one decode step reads, but for experts that no row chose.
    `digest` is `digest_of` all bytes of the file, as whoever prepared it wrote them.
    """

    config: ModelConfig
    arrays: dict[str, Array]
    num_bytes: int
    path: Path
    digest: bytes


class Place:
    """Where the prepared weights of the model in `folder` lie below `cache_dir`, whether they are there or not.

    The checkpoint's files are known by name, size, time of modification and header; where they are not here, by the
    digest that the model's manifest has of them. Raises ModelError naming what is wrong with the model.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder: Final = folder
        self.config: Final = ModelConfig.from_folder(folder)
        self.root: Final = cache_dir / "prepared"
        # Known before the file is: so a cut, foreign or older file is found out by its header alone.
        self._layout: Final = layout_of(self.config)
        try:
            self._checkpoint: Checkpoint | None = Checkpoint(folder)
        except ModelError as error:
            self._checkpoint = None
            self._key = _key_by_manifest(folder, error)
        else:
            self._key = _key_by_files(folder, self._checkpoint)
        self.path: Final = self.root / self._key / FILE

    def find(self) -> Prepared | None:
        """The prepared weights if they are there, whole, and of this checkpoint."""
        try:
            sidecar = read_json(self.path.with_name(_SIDECAR))
            digest = bytes.fromhex(str(sidecar["digest"]))
            if sidecar["key"] != self._key:
                return None
            return self.map(TensorFile(self.path), digest)
        except (OSError, ValueError, KeyError, ModelError):
            return None

    def map(self, file: TensorFile, digest: bytes) -> Prepared | None:
        """The weights in this file, wherever it lies; None if it is not what preparing them here would make."""
        try:
            wanted = {name: entry.stored for name, entry in self._layout.items()}
            stored = {
                name: {"dtype": file.dtype(name), "shape": list(file.shape(name))}
                for name in file.names
            }
            if file.metadata.get("recipe") != RECIPE or stored != wanted:
                return None
            arrays = {
                name: file.array(name).reshape(-1)[: math.prod(entry.shape)].reshape(entry.shape)
                for name, entry in self._layout.items()
            }
        except (ModelError, KeyError, ValueError):
            return None
        packed = ("codes", "scales", "bias")
        num_bytes = sum(array.nbytes for name, array in arrays.items() if name.endswith(packed))
        return Prepared(self.config, arrays, num_bytes, file.path, digest)

    def locked(self, *, wait: bool = True) -> AbstractContextManager[None]:
        """One process at a time fills the place (`filelock.locked`)."""
        return locked(self.path.with_name("lock"), wait=wait)

    def prepare(self) -> None:
        """Make the file from the checkpoint. Only under the lock. Raises ModelError, OSError."""
        started = time.perf_counter()
        checkpoint = self._checkpoint or Checkpoint(self.folder)  # which says what is missing
        log.note("weights_preparation_started", model=self.folder.name, recipe=RECIPE)
        # Always the same name: what a killed process left is overwritten.
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                _write(file, self._layout, tensors_of(self.config, checkpoint))
                file.flush()
                os.fsync(file.fileno())
            self.adopt(partial, digest_of_file(partial))
            _sync_folder(self.path.parent)
        finally:
            partial.unlink(missing_ok=True)
        log.note(
            "weights_prepared",
            model=self.folder.name,
            seconds=round(time.perf_counter() - started, 2),
        )
        _sweep(self.root, keep=self.path.parent, source=str(self.folder.resolve()))

    def adopt(self, whole: Path, digest: bytes) -> None:
        """Put a whole file in its place; what it is is said before it is there. Only under the lock. Raises OSError."""
        sidecar = self.path.with_name(_SIDECAR)
        about = {"key": self._key, "digest": digest.hex(), "source": str(self.folder.resolve())}
        new = sidecar.with_suffix(".new")
        new.write_text(json.dumps(about), encoding="utf-8")
        new.rename(sidecar)
        whole.rename(self.path)


def open_prepared(folder: Path, cache_dir: Path) -> Prepared:
    """Maps the prepared weights of the model in `folder`, after preparing them below `cache_dir` if they are not there.

    Raises ModelError naming what is wrong with the model, or why nothing can be kept in the cache.
    """
    place = Place(folder, cache_dir)
    found = place.find()
    if found is not None:
        return found
    try:
        with place.locked():
            if (found := place.find()) is None:  # another process may have been first
                place.prepare()
                found = place.find()
    except OSError as error:
        raise ModelError(f"cannot keep prepared weights below {place.root}: {error}") from error
    if found is None:
        raise ModelError(f"{place.path} was changed while it was being opened")
    return found


def find_prepared(folder: Path, cache_dir: Path) -> Prepared | None:
    """As `open_prepared`, but None where they would have to be prepared first. Raises ModelError."""
    return Place(folder, cache_dir).find()


def prepared_path(folder: Path, cache_dir: Path) -> Path:
    """Where the prepared weights of the model in `folder` lie, if they are there. Raises ModelError."""
    return Place(folder, cache_dir).path


def verify(prepared: Prepared) -> bool:
    """Whether the file still holds, byte for byte, what was written when it was prepared. It reads all of it."""
    try:
        return digest_of_file(prepared.path) == prepared.digest
    except (OSError, ValueError):
        return False


def discard(prepared: Prepared) -> None:
    """Removes the file, so that the next one who wants it makes it anew; who has it mapped keeps it until it ends."""
    prepared.path.unlink(missing_ok=True)


def digest_of(data: ReadableBuffer) -> bytes:
    """The 128 bits of XXH3 over all of it: it tells what broke, not what was forged."""
    return xxhash.xxh3_128_digest(data)


def digest_of_file(path: Path) -> bytes:
    """`digest_of` a file's bytes. Raises OSError, ValueError for an empty one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return digest_of(data)


def _key_by_files(folder: Path, checkpoint: Checkpoint) -> str:
    """32 hex characters over what the prepared bytes depend on, without reading the weights."""
    digest = blake2b(RECIPE.encode(), digest_size=16)
    for file in checkpoint.files():
        mtime_ns = file.path.stat().st_mtime_ns
        digest.update(f"\n{file.path.name}\n{file.num_bytes}\n{mtime_ns}\n".encode())
        digest.update(blake2b(file.header).digest())
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()


def _key_by_manifest(folder: Path, missing: ModelError) -> str:
    """The same for a model whose checkpoint is elsewhere. Raises `missing` where nothing is known of it."""
    try:
        weights = str(read_json(folder / MANIFEST)["weights_digest"])
    except (OSError, ValueError, KeyError):
        raise missing from None
    digest = blake2b(f"{RECIPE}\n{weights}\n".encode(), digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()


def _write(
    file: BinaryIO,
    layout: dict[str, Entry],
    tensors: Iterator[tuple[str, Array]],
) -> None:
    """Writes header and tensors, one alive at a time."""
    header: dict[str, object] = {"__metadata__": {"recipe": RECIPE}}
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
    processes. Who has such a file mapped keeps it until it ends; who fills its place now is left alone."""
    for folder in root.iterdir():
        if not folder.is_dir() or folder == keep:
            continue
        try:
            of = str(read_json(folder / _SIDECAR)["source"]) if (folder / FILE).exists() else ""
        except (OSError, ValueError, KeyError):
            of = ""
        if of in ("", source) or not Path(of).exists():
            with suppress(OSError), locked(folder / "lock", wait=False):
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
