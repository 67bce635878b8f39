"""Both ends of the tie between a pod host and a child process of it. Must not know what the child does.

The child has a process group of its own (Ctrl-C in a terminal reaches the pod host alone, which then drains it), says
its name in one line on standard output, and cannot outlive its parent: the kernel kills it when the parent dies, and
where the kernel does not offer that, the end of its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Mapping

_PR_SET_PDEATHSIG: Final = 1
RANK_LOST: Final = 3  # exit code of a TE that lost one of the executors that hold its model


class Child:
    """The parent's end: one running Python module."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, module: str, env: Mapping[str, str]) -> Child:
        """Run `python -m module` in the environment `env`; what it prints goes to our standard error."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                env=env,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        )

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    async def name(self) -> str:
        """The name that the child gave itself, once it did; "" if it ended without one."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    async def wait(self) -> str:
        """Wait for its end; how it ended, in words ("killed by SIGKILL", "exited with 1")."""
        code = await self._process.wait()
        if code == RANK_LOST:
            return f"lost a rank of its model, exited with {code}"
        if code >= 0:
            return f"exited with {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    def terminate(self) -> None:
        """Ask it to end (SIGTERM); nothing happens if it has."""
        if self.running:
            self._process.terminate()

    def kill(self) -> None:
        """End it (SIGKILL), stopped or not; nothing happens if it has ended."""
        if self.running:
            self._process.kill()


def attach(name: str) -> None:
    """The child's end, called in its event loop: tell `name`, and tie our life to the parent's."""
    os.write(sys.stdout.fileno(), f"{name}\n".encode())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is log
    die_with_parent()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_if_orphaned)


def die_with_parent() -> None:
    """Ask the kernel to kill us when the parent dies, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_if_orphaned() -> None:
    if not os.read(sys.stdin.fileno(), 4096):  # nobody writes: this is the end of the parent
        os.kill(os.getpid(), signal.SIGKILL)
