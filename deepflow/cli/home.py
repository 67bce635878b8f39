"""A DeepFlow home: its folders, the lock that keeps it to one instance, and the file that describes the running one.

This module must not know how an instance is started or stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from shared.config import BusSettings, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A running platform, as `status`, `down`, `chat` and `logs` find it. Holds credentials: mode 0600."""

    pid: int  # of the launcher
    url: str  # of the gateway, no trailing slash
    models: list[str]
    ready: bool
    nats_url: str
    realm: str
    user: str
    password: str
    producer: str  # an account on the bus that may publish prompts
    producer_password: str
    services: dict[str, int] = field(default_factory=dict)  # name -> pid

    @property
    def bus(self) -> BusSettings:
        """How the command line reaches the bus."""
        return BusSettings(
            url=self.nats_url, user=self.user, password=self.password, realm=self.realm, grace_s=2.0
        )


class Home:
    """The folder `DEEPFLOW_HOME` and its neighbour `DEEPFLOW_CACHE`."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path = path
        self.cache = cache
        self.logs = path / "logs"
        self.nats = path / "nats"
        self._instance = path / "instance.json"
        self._lock = path / "lock"
        self._held: int | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """The home that the variables name. Raises ConfigError."""
        settings = Settings.load(env)
        # Children run elsewhere: what they are told must not depend on the working directory.
        return cls(settings.home_dir.absolute(), settings.cache_dir.absolute())

    def take(self) -> bool:
        """Become the instance of this home until the process ends. False if another one is."""
        for folder in (self.path, self.logs, self.nats):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # os.open makes it close in children: one that outlived us would hold the lock.
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        for _ in range(5):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)  # it may be an `is_taken` of somebody else
                continue
            self._held = descriptor
            return True
        os.close(descriptor)
        return False

    def release(self) -> None:
        """Give the home back; the last thing an instance does."""
        self._instance.unlink(missing_ok=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def is_taken(self) -> bool:
        """Whether an instance runs (or is starting or stopping) in this home."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def running(self) -> Instance | None:
        """The instance of this home; a file that a killed one left behind does not count."""
        if not self.is_taken():
            return None
        try:
            return Instance(**json.loads(self._instance.read_bytes()))
        except FileNotFoundError:
            return None

    def describe(self, instance: Instance) -> None:
        """Write the instance file, whole or not at all."""
        draft = self._instance.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(instance), file, indent=2)
        draft.replace(self._instance)

    def log(self, service: str) -> Path:
        """The log file of one service."""
        return self.logs / f"{service}.log"
