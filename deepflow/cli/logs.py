"""`deepflow logs`: the services' log files, their JSON lines turned into lines for people."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from deepflow.cli.home import Home
from deepflow.cli.screen import console, fail

_POLL_S: Final = 0.2
_NUM_LINES: Final = 50
_STYLES: Final = {"warning": "yellow", "error": "red", "critical": "red"}


def show(home: Home, service: str | None, *, follow: bool) -> None:
    """Print the last lines of one service's log, or of all, and with `follow` what comes after."""
    found = sorted(home.logs.glob("*.log"))
    paths = [path for path in found if service in (None, path.stem)]
    if not paths:
        known = ", ".join(path.stem for path in found)
        fail(
            f"no log of {service!r}; there are: {known}"
            if known
            else f"no logs in {home.logs} yet: `deepflow up` starts an instance"
        )
    last: list[tuple[str, str, str]] = []
    tails = []
    for path in paths:
        tail = Tail(path)
        tails.append(tail)
        last += [(_time(line), path.stem, line) for line in deque(tail.lines(), maxlen=_NUM_LINES)]
    # Lines without a time (of nats-server, of a crash) keep their place within their file.
    for _, name, line in sorted(last, key=lambda entry: entry[0])[-_NUM_LINES:]:
        _print(name, line)
    while follow:
        for tail in tails:
            for line in tail.lines():
                _print(tail.path.stem, line)
        time.sleep(_POLL_S)


class Tail:
    """A growing file's complete lines; starts over when the file is cut short or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> Iterator[str]:
        """The lines that have come since the last call."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        if self._file is not None:
            mine = self._file.seek(0, 1)
            if now.st_size < mine or now.st_ino != _inode(self._file):
                self.close()
        if self._file is None:
            self._file = self.path.open("rb")
            self._rest = b""
        while chunk := self._file.read(1 << 16):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _inode(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _time(line: str) -> str:
    return str(_event(line).get("timestamp", ""))


def _print(name: str, line: str) -> None:
    event = _event(line)
    if not event:
        console.print(f"{name:10} {line}", markup=False)
        return
    level = str(event.pop("level", ""))
    clock = str(event.pop("timestamp", ""))[11:23]
    what = str(event.pop("event", ""))
    trace = event.pop("exception", "")
    event.pop("service", None)
    fields = " ".join(f"{key}={value}" for key, value in event.items())
    text = f"{clock} {name:10} {level:7} {what} {fields}".rstrip()
    if trace:
        text += f"\n{trace}"
    console.print(text, markup=False, style=_STYLES.get(level))
