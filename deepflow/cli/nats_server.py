"""The embedded nats-server: which binary, its folder with a fresh configuration per run, and where it listens.

This module must not know how processes are supervised.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepflow.deploy.nats_config import NatsConfig
from shared.errors import Unavailable
from shared.permissions import KINDS

PRODUCER: Final = "local"  # the tenant of prompts published on the embedded bus
# Executes a command in a process that the kernel kills together with its parent; argv: the parent's pid, the command.
_TETHERED: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Random passwords of one run: one per kind of service, and the producer's."""

    services: dict[str, str]
    producer: str

    @classmethod
    def random(cls) -> Credentials:
        """New ones; nobody can use those of an earlier run."""
        return cls(
            services={kind: secrets.token_hex(16) for kind in KINDS}, producer=secrets.token_hex(16)
        )


class NatsServer:
    """A server in `folder`: configuration, store, and the file in which it tells its port."""

    def __init__(self, folder: Path, realm: str) -> None:
        self.folder = folder
        self.credentials = Credentials.random()
        self._realm = realm
        self._binary = find_binary()
        self._port = -1
        for old in folder.glob("*.ports"):
            old.unlink(missing_ok=True)

    def command(self) -> list[str]:
        """What to execute; writes the configuration first. After the first start the port stays the same."""
        config = NatsConfig(
            realm=self._realm,
            host="127.0.0.1",
            port=self._port,
            store_dir=str(self.folder),  # in its subfolder "jetstream"
            passwords=self.credentials.services,
            producers={PRODUCER: self.credentials.producer},
            ports_dir=str(self.folder),
        )
        path = self.folder / "nats.conf"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(config.render())
        server = [self._binary, "-c", str(path)]
        if sys.platform != "linux":
            return server
        return [sys.executable, "-I", "-S", "-c", _TETHERED, str(os.getpid()), *server]

    def url(self) -> str | None:
        """Where it listens; None while it starts for the first time."""
        if self._port < 0:
            for path in self.folder.glob("*.ports"):
                try:
                    addresses = json.loads(path.read_bytes())["nats"]
                except (ValueError, OSError):  # half written, or of a server that just died
                    continue
                self._port = int(addresses[0].rsplit(":", 1)[1])
                break
        return f"nats://127.0.0.1:{self._port}" if self._port > 0 else None


def find_binary() -> str:
    """The nats-server to run: of this environment (extra `embedded`), else on PATH. Raises Unavailable."""
    own = Path(sysconfig.get_path("scripts"), "nats-server")
    if own.is_file():
        return str(own)

    from shared.bus import MIN_VERSION  # slow to import, and the children wait for us

    found = shutil.which("nats-server")
    needed = ".".join(map(str, MIN_VERSION))
    if found is None:
        raise Unavailable(
            f"there is no nats-server: `pip install 'deepflow[embedded]'`, or put {needed} or newer on PATH"
        )
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v(\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < MIN_VERSION:
        raise Unavailable(
            f"{found} is {text.strip() or 'not a nats-server'}; {needed} or newer is needed: "
            "`pip install 'deepflow[embedded]'`"
        )
    return found
