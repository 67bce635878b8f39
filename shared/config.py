"""Configuration: `DEEPFLOW_*` variables, parsed once in a service's `__main__` into a frozen value and passed down.

A bad value stops the process and names its variable. There is no global configuration object. This module must not
know any service's own settings: each extends `Settings` in its `settings.py` and reads them with a `Reader`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

EXIT_CODE: Final = 2  # of a process that ended for a ConfigError: starting it again cannot help


class ConfigError(ValueError):
    """A variable holds something it must not; the text names the variable."""


class Reader:
    """Typed look-ups in an environment. Every method raises ConfigError naming the variable."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def text(self, name: str, default: str) -> str:
        """The variable as it stands; an empty one counts as unset."""
        return self._env.get(name, "").strip() or default

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        raw = self.text(name, str(default))
        try:
            value = int(raw)
        except ValueError as error:
            raise ConfigError(f"{name}={raw!r} is not a whole number") from error
        if not low <= value <= high:
            raise ConfigError(f"{name}={raw} is not within {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        raw = self.text(name, repr(default))
        try:
            value = float(raw)
        except ValueError as error:
            raise ConfigError(f"{name}={raw!r} is not a number") from error
        if not math.isfinite(value) or not low <= value <= high:
            raise ConfigError(f"{name}={raw} is not within {low:g} to {high:g}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """1, true, yes, on, or 0, false, no, off."""
        raw = self.text(name, "1" if default else "0").lower()
        if raw in ("1", "true", "yes", "on"):
            return True
        if raw in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{name}={raw!r} is not one of 1, true, yes, on, 0, false, no, off")

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """One of `choices`."""
        value = self.text(name, default)
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")
        return value

    def secret(self, name: str) -> str:
        """The variable, or what the file holds that `<name>_FILE` names."""
        file = self.text(f"{name}_FILE", "")
        if not file:
            return self.text(name, "")
        try:
            return Path(file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{name}_FILE: {error}") from error

    def path(self, name: str, default: Path) -> Path:
        """A path, with `~` expanded."""
        return Path(self.text(name, str(default))).expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class BusSettings:
    """How to reach the bus. `password` never shows in a repr or a log."""

    url: str
    user: str = ""
    password: str = ""
    realm: str = "deepflow"
    grace_s: float = 30.0

    def __repr__(self) -> str:
        return f"BusSettings(url={self.url!r}, user={self.user!r}, realm={self.realm!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every service needs."""

    bus: BusSettings
    cache_dir: Path
    home_dir: Path
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0  # 0: any free port
    grace_s: float = 30.0
    log_level: str = "info"
    instance: str = ""  # a name for logs and subjects; empty: the kind's
    parent_pid: int = 0  # die with this process; 0: with nobody

    @classmethod
    def load(cls, env: Mapping[str, str]) -> Self:
        """The settings in an environment. Raises ConfigError."""
        return cls(**cls.read(Reader(env)))

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """The fields' values; a service's settings extend this dictionary with their own."""
        grace_s = reader.number("DEEPFLOW_GRACE_S", 30.0, 0.0, 3600.0)
        home_dir = reader.path("DEEPFLOW_HOME", Path("~/.local/share/deepflow"))
        # When only the home is set, what can be rebuilt lives under it as well.
        below_home = reader.text("DEEPFLOW_HOME", "")
        cache_default = home_dir / "cache" if below_home else Path("~/.cache/deepflow")
        return {
            "bus": BusSettings(
                url=reader.text("DEEPFLOW_NATS_URL", "nats://127.0.0.1:4222"),
                user=reader.text("DEEPFLOW_NATS_USER", ""),
                password=reader.secret("DEEPFLOW_NATS_PASSWORD"),
                realm=reader.text("DEEPFLOW_REALM", "deepflow"),
                grace_s=grace_s,
            ),
            "cache_dir": reader.path("DEEPFLOW_CACHE", cache_default),
            "home_dir": home_dir,
            "metrics_host": reader.text("DEEPFLOW_METRICS_HOST", "127.0.0.1"),
            "metrics_port": reader.integer("DEEPFLOW_METRICS_PORT", 0, 0, 65535),
            "grace_s": grace_s,
            "log_level": reader.choice(
                "DEEPFLOW_LOG_LEVEL", "info", ("debug", "info", "warning", "error")
            ),
            "instance": reader.text("DEEPFLOW_INSTANCE", ""),
            "parent_pid": reader.integer("DEEPFLOW_PARENT_PID", 0, 0, 2**31),
        }
