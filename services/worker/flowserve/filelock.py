"""A lock between processes: a file that one of them holds, until it lets go or dies, however it dies.

It must not know what is locked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock at `path`, whose folder is made. Who holds it may remove it. Raises OSError: BlockingIOError where
    another holds it and one does not wait."""
    while (file := _lock(path, wait)) is None:
        pass
    with file:
        yield


def _lock(path: Path, wait: bool) -> BinaryIO | None:
    """The file, locked; None if it was removed meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("wb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None
