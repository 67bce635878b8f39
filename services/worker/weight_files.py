"""The files that a TE computes with: which there are, where they lie, and how others that come get into their places.

Two kinds: the one prepared file, and the checkpoint's own where the decoder reads those. This module must not know how
files travel.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelError
from services.worker.flowserve.filelock import locked
from services.worker.flowserve.prepared import FILE, Place, Prepared, digest_of, digest_of_file
from services.worker.flowserve.tensorfile import TensorFile
from shared.catalog import MANIFEST, read_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from services.worker.flowserve.backend import Backend

_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Held:
    """A whole file of this host, and `digest_of` its bytes."""

    path: Path
    digest: bytes


class WeightFiles(Protocol):
    """One model's weights on this host."""

    def find(self) -> bool:
        """Whether all files are here."""

    @property
    def prepared(self) -> Prepared | None:
        """What `find` found or `map` was given, where that is a prepared file."""

    def held(self) -> list[Held]:
        """All files, in the order in which others are to get them; none while they are not here. It may read all their
        bytes."""

    def map(self, fd: int, digest: bytes) -> bool:
        """Compute with this file of the same host, which need not be in its place; False where that cannot be."""

    def place(self, name: str) -> Path:
        """Where a file of this name belongs. Raises ModelError for one that is none of them."""

    def locked(self) -> AbstractContextManager[None]:
        """One process at a time fills these places (`filelock.locked`, without waiting)."""

    def adopt(self, incoming: Incoming, digest: bytes) -> None:
        """Put a file that came, whose digest is right, in its place. Only under the lock. Raises OSError; ModelError
        for one that these weights do not have."""


class Incoming:
    """A file on its way to `path`: as large as it will be, mapped, and beside its place. Raises OSError.

    It is not synced: what a power cut spoils, the digest tells.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path: Final = path
        self.partial: Final = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.unlink(missing_ok=True)  # of one who was killed: others may still map that
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.fd: Final = os.open(self.partial, flags, 0o644)
        try:
            os.ftruncate(self.fd, num_bytes)
            self.view: Final = memoryview(mmap.mmap(self.fd, num_bytes))
        except BaseException:
            self.close()
            raise

    def reserve(self) -> None:
        """Have room for all of it: before the first byte, for without it a full disk would be a SIGBUS. It takes a
        while where files are memory. Raises OSError."""
        os.posix_fallocate(self.fd, 0, self.view.nbytes)

    def digest(self) -> bytes:
        """`digest_of` what has come."""
        return digest_of(self.view)

    def close(self) -> None:
        """Give back the descriptor, and the file where it is not in its place. The mapping lasts while it is viewed."""
        os.close(self.fd)
        self.partial.unlink(missing_ok=True)


class PreparedFile:
    """The prepared weights (`flowserve.prepared`). `mappable`: the decoder computes in this process, with the mapping
    it is given. Raises ModelError."""

    def __init__(self, folder: Path, cache_dir: Path, *, mappable: bool) -> None:
        self._place = Place(folder, cache_dir)
        self._mappable = mappable
        self.prepared: Prepared | None = None

    def find(self) -> bool:
        """See `WeightFiles`."""
        self.prepared = self._place.find()
        return self.prepared is not None

    def held(self) -> list[Held]:
        """See `WeightFiles`."""
        found = self._place.find()
        return [] if found is None else [Held(found.path, found.digest)]

    def map(self, fd: int, digest: bytes) -> bool:
        """See `WeightFiles`."""
        if self._mappable:
            self.prepared = self._place.map(TensorFile(self._place.path, fd), digest)
        return self.prepared is not None

    def place(self, name: str) -> Path:
        """See `WeightFiles`."""
        if name != FILE:
            raise ModelError(f"{name!r} is no prepared file")
        return self._place.path

    def locked(self) -> AbstractContextManager[None]:
        """See `WeightFiles`."""
        return self._place.locked(wait=False)

    def adopt(self, incoming: Incoming, digest: bytes) -> None:
        """See `WeightFiles`."""
        if self._place.map(TensorFile(incoming.partial), digest) is None:
            raise ModelError("what came is not what preparing these weights makes")
        self._place.adopt(incoming.partial, digest)


class CheckpointFiles:
    """The safetensors files of a model folder, and their index."""

    prepared: Prepared | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[Path, bytes] = {}  # each takes a while

    def find(self) -> bool:
        """See `WeightFiles`."""
        return bool(self._paths())

    def held(self) -> list[Held]:
        """See `WeightFiles`."""
        for path in (paths := self._paths()):
            if path not in self._digests:
                self._digests[path] = digest_of_file(path)
        return [Held(path, self._digests[path]) for path in paths]

    def map(self, fd: int, digest: bytes) -> bool:
        """See `WeightFiles`: a checkpoint is read from its folder."""
        return False

    def place(self, name: str) -> Path:
        """See `WeightFiles`."""
        path = self._folder / name
        if path.parent != self._folder or not (name == _INDEX or name.endswith(".safetensors")):
            raise ModelError(f"{name!r} is no file of a checkpoint")
        return path

    def locked(self) -> AbstractContextManager[None]:
        """See `WeightFiles`."""
        return locked(self._folder / ".lock", wait=False)

    def adopt(self, incoming: Incoming, digest: bytes) -> None:
        """See `WeightFiles`. The manifest, too, says what is in a file, where it was pulled from elsewhere."""
        name = incoming.path.name
        for known in read_json(self._folder / MANIFEST).get("files", []):
            if (
                known["name"] == name
                and known["sha256"] != hashlib.sha256(incoming.view).hexdigest()
            ):
                raise ModelError(f"{name!r} is not the file that the manifest names")
        incoming.partial.rename(incoming.path)
        self._digests[incoming.path] = digest

    def _paths(self) -> list[Path]:
        """All that there have to be; none if one is missing. The index comes last: without it, they are not taken for
        whole."""
        try:
            paths = [file.path for file in Checkpoint(self._folder).files()]
        except ModelError:
            return []
        index = self._folder / _INDEX
        return [*paths, index] if index.exists() and len(paths) > 1 else paths


def files_of(folder: Path, cache_dir: Path, backend: Backend) -> WeightFiles:
    """Those that `backend` computes the model in `folder` with. Raises ModelError."""
    if (backend.device, backend.dtype) == ("cpu", "w8a8"):
        return PreparedFile(folder, cache_dir, mappable=backend.kernels == "native")
    return CheckpointFiles(folder)
