"""Where a host's arena lives, which host it makes of this machine, and who owns it.

The arena is a folder on a tmpfs that every container of the host shares. The cache service that holds the flock on its
`lock` file owns it; the file `host` names it, and so the host: TEs and peers that read the same name share memory. This
module must not know what a segment holds.

Nobody else may plant files here: the folder is ours alone (0700 as made; one of another user, or one that others may
write to, is refused), files are 0600, and no symbolic link is followed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from hashlib import blake2b
from pathlib import Path
from typing import Final

from shared.config import Reader

HOST_FILE: Final = "host"
LOCK_FILE: Final = "lock"

_HOST: Final = re.compile(r"[0-9a-f]{16}")
_EPOCH_BYTES: Final = 8


class ArenaError(RuntimeError):
    """The arena's folder cannot be used; the text says why."""


def arena_dir(reader: Reader, home: Path) -> Path:
    """`DEEPFLOW_ARENA_DIR`; by default one folder in /dev/shm for each user and `DEEPFLOW_HOME`."""
    digest = blake2b(str(home.absolute()).encode(), digest_size=4).hexdigest()
    return reader.path(
        "DEEPFLOW_ARENA_DIR", Path(f"/dev/shm/deepflow-{os.getuid()}-{digest}")
    ).absolute()


def read_host(directory: Path) -> str:
    """The name of the host whose arena this is; "" where no arena is, or not one of ours. Cheap: ask again at will."""
    try:
        _check_folder(directory)
        fd = open_file(directory / HOST_FILE, os.O_RDONLY)
    except (OSError, ArenaError):
        return ""
    try:
        name = os.read(fd, 64).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
    return name if _HOST.fullmatch(name) else ""


def automatic_bytes(directory: Path) -> int:
    """How large an arena may be if nobody says: a quarter of this machine's (or container's) memory, at most half of
    what its file system has room for. What is the arena's already counts as room."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        memory = min(memory, int(limit))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    folder = directory
    while not folder.exists():
        folder = folder.parent
    free = os.statvfs(folder)
    room = free.f_bavail * free.f_frsize
    if folder == directory:
        room += sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory))
    return min(memory // 4, room // 2)


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a regular file of ours, made 0600 where `flags` say so. Never follows a link; not inherited by
    programs that this process starts. Raises OSError; PermissionError for what is not a file of ours."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(f"{path} is not a file of this user")
    return fd


def _check_folder(directory: Path) -> None:
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise ArenaError(f"{directory} is not a folder")
    if info.st_uid != os.geteuid():
        raise ArenaError(f"{directory} belongs to user {info.st_uid}, not to us")
    if info.st_mode & 0o022:
        raise ArenaError(f"others may write to {directory}: chmod go-w it")


def lock_folder(directory: Path) -> int | None:
    """Makes a folder of ours if need be, and takes the flock on its `lock` file: a descriptor that holds it until it is
    closed, or None if another process has it. Raises ArenaError if the folder is not fit for use."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(directory)
        fd = open_file(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ArenaError(f"{directory} cannot be used: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


class Place:
    """The arena's folder, owned: made if need be, locked until `close`.

    `host` is its name, the same as long as the folder lives. `epoch` grows by one with every owner, so that what an
    earlier one gave out (generations of slots) is not given out again.
    """

    def __init__(self, directory: Path, fd: int) -> None:
        self.directory = directory
        self._fd = fd
        self.epoch = int.from_bytes(os.pread(fd, _EPOCH_BYTES, 0), "little") + 1
        os.pwrite(fd, self.epoch.to_bytes(_EPOCH_BYTES, "little"), 0)
        self.host = read_host(directory) or self._name_host()

    @classmethod
    def own(cls, directory: Path) -> Place | None:
        """Takes the folder; None if another cache service has it. Raises ArenaError if it is not fit for use."""
        fd = lock_folder(directory)
        if fd is None:
            return None
        try:
            return cls(directory, fd)
        except OSError as error:  # a full file system
            os.close(fd)
            raise ArenaError(f"{directory} cannot be used: {error}") from error

    def close(self) -> None:
        """Gives the folder up; its files stay."""
        os.close(self._fd)

    def _name_host(self) -> str:
        host = secrets.token_hex(8)
        fresh = self.directory / f"{HOST_FILE}.{host}"
        fd = open_file(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            if os.write(fd, host.encode()) != len(host):
                raise OSError("its name was written in part")
            fresh.rename(self.directory / HOST_FILE)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return host
