"""Executes a command as a container would: private mounts and IPC, a file system of its own but for the programs.

Run as `unshare --mount --ipc --propagation private python container.py SPEC`, as root. SPEC is a JSON file: `command`,
`environment`, `workdir`, `hosts` (text of /etc/hosts), `visible` (folders that hold the programs) and `mounts` (list of
source, target, read-only). /tmp, /run, /var and /dev/shm are empty, so that whatever two services share shows in the
compose file. Standard library only, and no import of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

RDONLY, REMOUNT, BIND, REC = 1, 32, 4096, 16384
OWN = ("tmp", "run", "var")  # top-level folders of which the host's are not shown
_LIBC = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str = "", flags: int = 0) -> None:
    """mount(2). Raises OSError."""
    if _LIBC.mount(source.encode(), bytes(target), kind.encode(), flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Show `source`, a file or a folder, at `target`."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(str(source), target, flags=BIND | REC)
    if read_only:
        mount("", target, flags=BIND | REMOUNT | RDONLY)


def main() -> None:
    """Build the file system, enter it, and become the command."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    # Only this mount namespace sees what is mounted here; the kernel unmounts it with the last process in it.
    root = Path(tempfile.mkdtemp(prefix="container-"))
    mount("tmpfs", root, "tmpfs")
    for entry in Path("/").iterdir():
        here = root / entry.name
        if entry.is_symlink():
            here.symlink_to(os.readlink(entry))
        elif entry.name in OWN:
            here.mkdir(mode=0o1777 if entry.name == "tmp" else 0o755)
        elif entry.is_dir():
            bind(entry, here)
    mount("tmpfs", root / "dev/shm", "tmpfs")
    for folder in map(Path, spec["visible"]):
        if folder.parts[1] in OWN:
            bind(folder, root / folder.relative_to("/"), read_only=True)
    for source, target, read_only in spec["mounts"]:
        bind(Path(source), root / target.lstrip("/"), read_only=read_only)
    hosts = root / "tmp/hosts"
    hosts.write_text(spec["hosts"])
    bind(hosts, root / "etc/hosts")
    os.chroot(root)
    os.chdir(spec["workdir"])
    environment = spec["environment"]
    program = shutil.which(spec["command"][0], path=environment["PATH"])
    if program is None:
        sys.exit(f"no {spec['command'][0]} on {environment['PATH']}")
    os.execve(program, spec["command"], environment)


if __name__ == "__main__":
    main()
