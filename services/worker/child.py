"""The pod host's end of the tie: one TE's process, however it came to be. Must not know what the process does.

The process has a session of its own: Ctrl-C in a terminal reaches the pod host alone, which then drains it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Final

from services.worker.process import Process, ending
from services.worker.tie import Assignment, Drain, Named, Ready, TeEvent, decode, encode

_READ_BYTES: Final = 1 << 16
RANK_LOST: Final = 3  # exit code of a TE that lost one of the executors that hold its model


class Child:
    """A child process of ours, and our end of its tie. `process`: exec | fork (of the zygote) | warm (pre-warmed).

    `changed` is called when it got ready, and when it ended. One reader at a time: `name` or `events`.
    """

    def __init__(
        self, pid: int, tie: socket.socket, process: str, changed: Callable[[], None]
    ) -> None:
        self.pid = pid
        self.process = process
        self.is_ready = False
        self._process = Process(pid, self._on_end)
        self._changed = changed
        self._name: str | None = None
        self._tie = tie
        self._heard = b""
        self._events: asyncio.Queue[TeEvent | None] = asyncio.Queue()  # None: that was all
        asyncio.get_running_loop().add_reader(tie.fileno(), self._hear)

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.running

    @property
    def is_starting(self) -> bool:
        """Whether it may yet get ready."""
        return self.running and not self.is_ready

    async def name(self) -> str:
        """The name that the TE gave itself, once it did; "" if it ended without one."""
        if self._name is None:
            first = await self._next()
            self._name = first.te if isinstance(first, Named) else ""
        return self._name

    async def events(self) -> AsyncIterator[TeEvent]:
        """What the TE says of its start, name and all, until it ends."""
        if name := await self.name():
            yield Named(name)
        while (event := await self._next()) is not None:
            yield event

    def assign(self, assignment: Assignment) -> None:
        """Tell it what to be. Once."""
        self._say(assignment)

    def terminate(self, migrate_after_s: float | None = None) -> None:
        """Ask it to end, with its own grace or as `Drain` says; nothing happens if it has."""
        if migrate_after_s is not None:
            self._say(Drain(migrate_after_s))
        else:
            self._process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it (SIGKILL), stopped or not; nothing happens if it has ended."""
        self._process.signal(signal.SIGKILL)

    async def wait(self) -> str:
        """Wait for its end; how it ended, in words ("killed by SIGKILL", "exited with 1")."""
        code = await self._process.wait()
        return ("lost a rank of its model, " if code == RANK_LOST else "") + ending(code)

    async def _next(self) -> TeEvent | None:
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)  # for whoever asks again
        return event

    def _say(self, said: Assignment | Drain) -> None:
        with contextlib.suppress(OSError):  # it has ended, or hears nothing: either will be noticed
            self._tie.send(encode(said), socket.MSG_DONTWAIT)

    def _hear(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._tie.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            event: TeEvent = decode(line)
            self._events.put_nowait(event)
            if isinstance(event, Ready):
                self.is_ready = True
                self._changed()
        if not data:
            self._close()

    def _on_end(self) -> None:
        """It has ended: hear what it said before that, which is all there is to hear."""
        while self._tie.fileno() >= 0:
            try:
                self._hear()
            except BlockingIOError:  # a child of its own has the socket too
                self._close()
        self._changed()

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._tie.fileno())
        self._tie.close()
        self._events.put_nowait(None)
