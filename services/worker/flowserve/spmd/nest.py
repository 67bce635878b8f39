"""What executors are forked off: a zygote of this process's own, made while it had a single thread.

Rank 0 is past that by the time it knows its model, so whoever starts it for a model of several ranks makes the nest
first (`open_nest`); without one, executors are new interpreters. One process has one nest, as it has one memory: that
is why the module holds it. It must not know what an executor computes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

from services.worker.tie import die_with_parent
from services.worker.zygote import rename, serve

_PR_SET_CHILD_SUBREAPER: Final = 36
_ANSWER_BYTES: Final = 4096


class Forked:
    """A process from the nest, as `subprocess.Popen` shows one; `voice` reads what it says."""

    def __init__(self, pid: int, voice: int) -> None:
        self.pid = pid
        self.stdout = os.fdopen(voice, "rb", 0)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if self._code is None:
            if timeout is not None and not self._has_ended(timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        """End it; nothing happens if it was waited for."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def _has_ended(self, within_s: float) -> bool:
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(within_s * 1000))
        finally:
            os.close(pidfd)


class Nest:
    """Our end of it. Used by one thread at a time."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def fork(
        self, module: str, argument: str, env: Mapping[str, str], descriptors: tuple[int, ...]
    ) -> Forked:
        """A child of ours that runs `module` with the descriptors at the numbers that they have here, and nothing on
        its standard input. Raises OSError."""
        heard, said = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            request = {
                "module": module,
                "arguments": [argument],
                "env": dict(env),
                "fds": [0, 1, *descriptors],
            }
            with self._lock:
                data = json.dumps(request).encode()
                socket.send_fds(self._channel, [data], [nothing, said, *descriptors])
                answer = self._channel.recv(_ANSWER_BYTES)
            fields: dict[str, Any] = {"error": "the nest has ended"}
            if answer:
                fields = json.loads(answer)
            if "error" in fields:
                raise OSError(fields["error"])
        except BaseException:
            os.close(heard)
            raise
        finally:
            os.close(said)
            os.close(nothing)
        return Forked(fields["pid"], heard)


_nest: Nest | None = None


def open_nest() -> None:
    """Make this process's nest. Only while it has a single thread, and no device. Raises OSError."""
    global _nest
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # What the nest's child forks is an orphan, and comes to us.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    parent = os.getpid()
    if os.fork():
        theirs.close()
        _nest = Nest(ours)
        return
    try:
        ours.close()
        die_with_parent()
        gc.disable()  # a collection would touch, and so copy, what is shared
        rename("services.worker.zygote")
        if os.getppid() == parent:
            # The tie on our standard input is the TE's: the pod host is to see it end.
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            serve(theirs)
    finally:
        sys.stderr.flush()
        os._exit(0)


def nest() -> Nest | None:
    """This process's nest, if it has one."""
    return _nest
