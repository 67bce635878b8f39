"""One supervised child process of the launcher: its command, its log file, its life and its end.

A child runs in a process group of its own, so that Ctrl-C in a terminal reaches the launcher alone, which then stops
the children in order. This module must not know what a child does, or when it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import psutil

LOG_LIMIT_BYTES: Final = 64 * 1024 * 1024
_TAIL_BYTES: Final = 64 * 1024


class Child:
    """A place among the children: the same name and log for each process that fills it."""

    def __init__(
        self, name: str, command: Callable[[], list[str]], env: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = env
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start the command anew, its output appended to the log. Raises OSError."""
        # Appending, so that the file can be cut short under the writer.
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )

    async def wait(self) -> int:
        """The exit code of the process that runs now; negative: the signal that killed it."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace_s: float) -> bool:
        """SIGTERM, and SIGKILL to it and all its descendants after `grace_s`. Whether it went by itself."""
        if self.pid is None:
            return True
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to it and to all its descendants."""
        if self.pid is None:
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    one.kill()

    def begin_log(self) -> None:
        """Keep the log of the run before as `<name>.log.1` and start an empty one."""
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        self.log.touch(mode=0o600)

    def bound_log(self, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
        """Move what the log holds to `<name>.log.1` once it has grown past the limit."""
        with contextlib.suppress(
            FileNotFoundError
        ):  # somebody took it away: nothing is left to bound
            if self.log.stat().st_size > limit_bytes:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)


def cause(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def last_error(log: Path) -> str:
    """The last error in a log, as one short line; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    plain = ""
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            # The last line of a traceback, or what a program that knows no JSON said last.
            plain = plain or line.strip()
            continue
        if isinstance(event, dict) and event.get("level") in ("error", "critical"):
            said = event.get("error") or event.get("failure")
            trace = str(event.get("exception", "")).strip().splitlines()
            return f"{event.get('event', '')}: {said or (trace[-1] if trace else '')}".strip(": ")
    return plain[:300]
