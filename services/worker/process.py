"""A child process, however it came to be: run, or forked off by a process of ours whose child became our own.

It is waited for by its descriptor, so that it makes no difference who started it. This module must not know what it
does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping


class Process:
    """One child of this process, made in the event loop; `ended` is called once it has ended."""

    def __init__(self, pid: int, ended: Callable[[], None]) -> None:
        self.pid = pid
        self.code: int | None = None  # its exit code, negative for a signal
        self._over = asyncio.Event()
        self._ended = ended
        self._watch()

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return self.code is None

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self.running:
            os.kill(self.pid, number)  # until we waited for it, the number is its own

    async def wait(self) -> int:
        """Wait for its end; its exit code."""
        await self._over.wait()
        assert self.code is not None
        return self.code

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        if (pidfd := _pidfd(self.pid)) is not None:

            def ended() -> None:
                loop.remove_reader(pidfd)
                os.close(pidfd)
                self._end(os.waitpid(self.pid, 0)[1])

            loop.add_reader(pidfd, ended)
            return

        def wait() -> None:
            status = os.waitpid(self.pid, 0)[1]
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._end, status)

        threading.Thread(target=wait, name=f"wait-{self.pid}", daemon=True).start()

    def _end(self, status: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        self._over.set()
        self._ended()


def _pidfd(pid: int) -> int | None:
    """A descriptor that tells of a process's end; None where the kernel, or a container's rules, offer none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def spawn(arguments: list[str], env: Mapping[str, str], stdin: int) -> int:
    """Run a program in a session of its own, with that standard input; what it prints goes to our standard error. Its
    process number. Raises OSError."""
    return os.posix_spawn(
        arguments[0],
        arguments,
        dict(env),
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, 2, 1)],
        setsid=True,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores, and a child would
    )


def ending(code: int) -> str:
    """How a process ended, in words ("killed by SIGKILL", "exited with 1")."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
