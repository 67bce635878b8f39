"""Memory that processes of one host share: files without a name on a tmpfs.

Whoever holds the file descriptor may map it, so a peer gets access by being handed one over a Unix socket, and nothing
is left behind by whoever dies. It must not know regions or links.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python names it from 3.13 on


class SharedBuffer:
    """`num_bytes` of zeroed memory in an unnamed file of `directory` (of a memfd without one), all of it there from the
    beginning. `fd` is the file. Raises OSError where there is no room, now and not later."""

    def __init__(self, num_bytes: int, directory: Path | None = None) -> None:
        if num_bytes <= 0:
            raise ValueError(f"a buffer of {num_bytes} bytes")
        self.num_bytes: Final = num_bytes
        self.fd: Final = _unnamed_file(directory)
        try:
            os.ftruncate(self.fd, num_bytes)
            self._map = mmap.mmap(self.fd, num_bytes)
            _populate(self._map, self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._view: memoryview | None = memoryview(self._map)

    @property
    def view(self) -> memoryview:
        """The memory. Raises ValueError once it is closed."""
        if self._view is None:
            raise ValueError("the buffer is closed")
        return self._view

    def close(self) -> None:
        """Give back the file and, once nobody uses a view of it any more, the memory. Idempotent."""
        if self._view is not None:
            self._view = None
            del self._map  # the last view unmaps it
            os.close(self.fd)


class Mapped:
    """A file of another process, mapped to be read. The mapping lives as long as somebody has `bytes`."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.bytes: Final[npt.NDArray[np.uint8]] = np.frombuffer(
            mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8
        )


def reopen_read_only(fd: int) -> int:
    """A descriptor of the same file, unnamed or not, that cannot be written to. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _unnamed_file(directory: Path | None) -> int:
    if directory is not None:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    return os.memfd_create("distflow", os.MFD_CLOEXEC)


def _populate(memory: mmap.mmap, fd: int, num_bytes: int) -> None:
    """Have all pages now: later, a full tmpfs would be a SIGBUS."""
    with contextlib.suppress(OSError):  # not every kernel has huge pages for files
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OSError(
                errno.ENOSPC, f"no room for {num_bytes} bytes of shared memory"
            ) from error
        os.posix_fallocate(fd, 0, num_bytes)
