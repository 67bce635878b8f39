"""The machine as the doctor sees it: files below a root, an environment, tools that may hang.

Everything is read through this one value, so that a test can hand in the files of another machine. It must not know
what a file means.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TOOL_TIMEOUT_S: Final = 15.0
_KILL_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a tool: its exit code, None if it did not end in time, and all that it printed."""

    code: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Host:
    """A machine whose files lie below `root`; tools are looked for on the PATH of `env`."""

    root: Path
    env: Mapping[str, str]

    def path(self, absolute: str | Path) -> Path:
        """Where a file of that machine lies here."""
        return self.root / str(absolute).lstrip("/")

    def text(self, absolute: str | Path) -> str | None:
        """What a file says; None if it is not there or may not be read."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """The files that an absolute pattern names, in order."""
        return sorted(self.root.glob(pattern.lstrip("/")))

    def nodes(self, prefix: str) -> list[str]:
        """Device nodes of a kind by number: "davinci" gives /dev/davinci0, /dev/davinci1, ..."""
        numbers = [
            int(path.name.removeprefix(prefix))
            for path in self.glob(f"/dev/{prefix}*")
            if path.name.removeprefix(prefix).isdigit()
        ]
        return [f"/dev/{prefix}{number}" for number in sorted(numbers)]

    def may_open(self, absolute: str) -> bool:
        """Whether this user may read and write a file."""
        return os.access(self.path(absolute), os.R_OK | os.W_OK)

    def num_pci(self, vendor: str, classes: tuple[str, ...]) -> int:
        """Cards on the bus by a vendor ("0x10de") whose class begins with one of `classes` ("0x03")."""
        return sum(
            (self.text(f"/{path.relative_to(self.root)}") or "").strip() == vendor
            and (self.text(f"/{path.parent.relative_to(self.root)}/class") or "").startswith(
                classes
            )
            for path in self.glob("/sys/bus/pci/devices/*/vendor")
        )

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = _TOOL_TIMEOUT_S,
    ) -> Ran | None:
        """A tool's answer; None if there is no such tool. Whatever it starts ends with it."""
        program = shutil.which(command[0], path=self.env.get("PATH"))
        if program is None:
            return None
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    [program, *command[1:]],
                    env={**self.env, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                return Ran(1, str(error))
            code: int | None = None
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                # Whoever waits inside a driver may not even die of that; then nobody waits for it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_KILL_S)
            output.seek(0)
            return Ran(code, output.read().decode(errors="replace"))
