"""Weights in memory before anybody asks: files of models kept in the page cache, within a budget of bytes.

The page cache is the store, so that every TE that maps a file finds it there and all share it; nothing is pinned, and
the system may take it back. What is to be here is handed in, most wanted first; what of it is here can be looked up at
any time. This module must not know why a model is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.prepared import prepared_path
from shared.catalog import open_model
from shared.errors import DeepFlowError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

PAGE: Final = mmap.PAGESIZE
WARM_SHARE: Final = (
    0.95  # of a file's bytes that are in memory, for the rest not to be worth a look
)
_SAMPLES: Final = 128  # pages of a file that are asked about, where a share will do
_CHUNK: Final = 8 << 20  # what is asked of the disk at once
_PROT_READ, _MAP_SHARED = 1, 1


class Preloader:
    """The page cache of this host, as far as models below `cache_dir` have a share in it.

    `budget_bytes` bounds what `want` brings in, `prepared` says whether TEs here use prepared weights or the
    checkpoint's own files. One `want` at a time.
    """

    def __init__(self, budget_bytes: int, cache_dir: Path, *, prepared: bool = True) -> None:
        self.budget_bytes = budget_bytes
        self._cache_dir = cache_dir
        self._prepared = prepared
        self._files: dict[str, list[Path]] = {}
        self._kept: list[str] = []  # models that were brought in, and not dropped since

    @property
    def kept(self) -> list[str]:
        """The models that are kept in memory, as far as is up to us; most wanted first."""
        return self._kept.copy()

    def files(self, model: str) -> list[Path]:
        """The files that a TE of `model` maps; none, while its weights are not prepared or it is not here."""
        known = self._files.get(model, [])
        if known and all(path.exists() for path in known):
            return known
        try:
            folder = open_model(self._cache_dir, model).path
            found = weight_files(folder, self._cache_dir, prepared=self._prepared)
        except (DeepFlowError, ModelError, OSError):
            found = []
        self._files[model] = found
        return found

    def weights_bytes(self, model: str) -> int:
        """The size of its weights, as TEs map them; an estimate until they are prepared, 0 if it is not here."""
        files = self.files(model)
        if not files:
            with contextlib.suppress(DeepFlowError, OSError):
                files = sorted(open_model(self._cache_dir, model).path.glob("*.safetensors"))
        return sum(_size(path) for path in files)

    def resident(self, model: str) -> int:
        """Bytes of its weights that are in the page cache. It looks, and brings nothing in."""
        return sum(resident_bytes(path) for path in self.files(model))

    async def want(self, models: Sequence[str]) -> None:
        """Have the weights of these models in memory, most wanted first, as far as the budget goes; let go of what was
        brought in for others. What a TE has mapped stays where it is."""
        await asyncio.to_thread(self._want, list(dict.fromkeys(models)))

    def _want(self, models: list[str]) -> None:
        left, chosen = self.budget_bytes, []
        for model in models:
            num_bytes = sum(map(_size, self.files(model)))
            if 0 < num_bytes <= left:
                left -= num_bytes
                chosen.append(model)
        for model in self._kept:
            if model not in chosen:
                for path in self.files(model):
                    drop(path)
        self._kept = chosen
        for model in chosen:
            for path in self.files(model):
                bring_in(path)


def weight_files(folder: Path, cache_dir: Path, *, prepared: bool) -> list[Path]:
    """The files whose bytes a TE of the model in `folder` computes with; none, while they are not prepared.

    Raises ModelError for a folder that holds no weights.
    """
    if not prepared:
        return sorted(folder.glob("*.safetensors"))
    path = prepared_path(folder, cache_dir)
    return [path] if path.exists() else []


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache (mincore); 0 for one that is not there."""
    with contextlib.suppress(OSError), _opened(path) as (descriptor, size):
        return min(int(np.count_nonzero(_residency(descriptor, size))) * PAGE, size)
    return 0


def warm_share(paths: Sequence[Path]) -> float:
    """Which part of these files is in the page cache, 0 to 1, as an even sample of their pages tells: to ask about each
    page takes milliseconds. 0 where there is nothing to be read."""
    total, here = 0, 0.0
    for path in paths:
        with contextlib.suppress(OSError), _opened(path) as (descriptor, size):
            total += size
            here += _sampled_share(descriptor, size) * size
    return here / total if total else 0.0


def bring_in(path: Path, progress: Callable[[int], None] | None = None) -> int:
    """Have a file in the page cache when this returns; `progress` gets the bytes so far. How many bytes it has, 0 for
    one that is gone meanwhile."""
    done = 0
    with contextlib.suppress(OSError), _opened(path) as (descriptor, size):
        is_here = _residency(descriptor, size)
        buffer = memoryview(bytearray(min(_CHUNK, size)))
        while done < size:
            # The next chunk is on its way from the disk while this one is waited for.
            os.posix_fadvise(descriptor, done + _CHUNK, _CHUNK, os.POSIX_FADV_WILLNEED)
            if not is_here[done // PAGE : (done + _CHUNK) // PAGE].all():
                os.preadv(descriptor, [buffer], done)
            done = min(done + _CHUNK, size)
            if progress is not None:
                progress(done)
    return done


def drop(path: Path) -> None:
    """Let go of what of a file nobody has mapped. A page that was never written to the disk stays."""
    with contextlib.suppress(OSError), _opened(path) as (descriptor, _):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _residency(descriptor: int, size: int) -> npt.NDArray[np.bool_]:
    """Of each page of a file, whether it is in the page cache; none is, where the system does not tell. Raises
    OSError."""
    pages = np.zeros(-(-size // PAGE), np.uint8)
    if not size:
        return pages.astype(bool)
    with _mapped(descriptor, size) as start:
        if _libc().mincore(start, size, pages.ctypes.data):
            return np.zeros(len(pages), bool)
    return (pages & 1).astype(bool)


def _sampled_share(descriptor: int, size: int) -> float:
    """Which part of a file is in the page cache, by no more than `_SAMPLES` of its pages. Raises OSError."""
    num_pages = -(-size // PAGE)
    if not num_pages:
        return 0.0
    num, num_here, is_here = min(num_pages, _SAMPLES), 0, ctypes.c_ubyte()
    address, mincore = ctypes.addressof(is_here), _libc().mincore
    with _mapped(descriptor, size) as start:
        for index in range(num):
            page = start + (2 * index + 1) * num_pages // (2 * num) * PAGE
            num_here += not mincore(page, PAGE, address) and is_here.value & 1
    return num_here / num


@contextlib.contextmanager
def _mapped(descriptor: int, size: int) -> Iterator[int]:
    """The address of a file's bytes, mapped read-only: the module `mmap` tells none of such. Raises OSError."""
    library = _libc()
    start = library.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "the file cannot be mapped")
    try:
        yield start
    finally:
        library.munmap(start, size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
