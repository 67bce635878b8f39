"""The zygote, `python -m services.worker.zygote MODULE...`: has imported what a TE needs, and forks TEs off itself.

The process, and the pod host's end of it. It reads requests from a socket, its standard input, one message each, and
answers each with a process number. What it forks becomes the child of the pod host: the process in between ends at
once, and the pod host takes in orphans.

What makes the fork safe: this process has one thread, which is looked at before every fork; it has no event loop, no
connection and no device, and has computed nothing; of its descriptors the child keeps but what it was sent. This module
must not know what a TE does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from services.worker.process import Process, spawn
from services.worker.tie import die_with_parent

# Everything a TE imports before it is ready; what is missing here is imported in each TE. What depends on who computes
# is named on the command line.
_MODULES: Final = ("services.worker.te", "services.worker.loading")
NATIVE: Final = ("services.worker.flowserve.native_decoder",)
TORCH: Final = (
    "torch",
    "services.worker.flowserve.torch_decoder",
    "services.worker.flowserve.spmd.decoder",
    "services.worker.flowserve.spmd.executor",
)
_MESSAGES: Final = (
    "TeBeat",
    "Registration",
    "Task",
    "Accepted",
    "Tokens",
    "TaskEnded",
    "Beat",
    "Down",
)
_IMPORTS_S: Final = 60.0
_ANSWER_S: Final = 20.0  # a fork takes milliseconds, but hundreds may be asked for at once
_REQUEST_BYTES: Final = 1 << 17
_MAX_FDS: Final = 64
_FREE_FD: Final = 1000  # received descriptors are moved out of the way of where they belong
_NAME: Final = "services.worker.zygote"


class Zygote:
    """The pod host's end. `changed` is called when it can fork, and when it has ended."""

    def __init__(self, env: Mapping[str, str], *, torch: bool, changed: Callable[[], None]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [sys.executable, "-m", _NAME, *(TORCH if torch else NATIVE)]
            self.process = Process(spawn(arguments, env, theirs.fileno()), self._close)
        self.ready_s: float | None = None  # what its imports took
        self._changed = changed
        self._ready = asyncio.Event()  # or ended
        self._asked: deque[asyncio.Future[int]] = deque()
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)

    async def fork(self, module: str, stdin: socket.socket) -> int:
        """The number of a new child of ours, which runs `module` with that standard input. Raises OSError."""
        try:
            async with asyncio.timeout(_IMPORTS_S):
                await self._ready.wait()
        except TimeoutError:
            raise OSError(f"it has not imported everything after {_IMPORTS_S:g} s") from None
        if self._channel.fileno() < 0:
            raise OSError("it has ended")
        request = {"module": module, "arguments": [], "env": {}, "fds": [0]}
        socket.send_fds(self._channel, [json.dumps(request).encode()], [stdin.fileno()])
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            self.close()  # it stands still: another is made
            raise OSError(f"it gave no answer for {_ANSWER_S:g} s") from None

    def close(self) -> None:
        """End it. What it forked lives on."""
        self.process.signal(signal.SIGKILL)

    def _hear(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._channel.recv(_REQUEST_BYTES, socket.MSG_DONTWAIT)
        answer = json.loads(data) if data else {}
        if "ready_s" in answer:
            self.ready_s = answer["ready_s"]
        elif "pid" in answer:
            self._resolve(self._asked.popleft(), answer["pid"])
        elif "error" in answer:
            self._reject(self._asked.popleft(), answer["error"])
        else:
            self._close()
        self._ready.set()
        self._changed()

    def _close(self) -> None:
        """It has ended. A fork that it did not answer for has lost its tie, and ends too."""
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        while self._asked:
            self._reject(self._asked.popleft(), "it has ended")
        self._ready.set()
        self._changed()

    @staticmethod
    def _resolve(answer: asyncio.Future[int], pid: int) -> None:
        if not answer.done():
            answer.set_result(pid)

    @staticmethod
    def _reject(answer: asyncio.Future[int], why: str) -> None:
        if not answer.done():
            answer.set_exception(OSError(why))


# ------------------------------------------------------------------------------------------------------ the process


def main(arguments: list[str]) -> None:
    """Import, these modules too, then fork until the pod host ends."""
    die_with_parent()
    channel = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    began = time.monotonic()
    for name in (*_MODULES, *arguments):
        importlib.import_module(name)
    _warm_up()
    gc.collect()
    gc.disable()  # a collection would touch, and so copy, what is shared
    gc.freeze()
    _answer(channel, ready_s=time.monotonic() - began)
    serve(channel)


def serve(channel: socket.socket) -> None:
    """Fork for each request, until there is nobody to make one."""
    while True:
        data, fds, _, _ = socket.recv_fds(channel, _REQUEST_BYTES, _MAX_FDS)
        if not data:
            return
        request: dict[str, Any] = json.loads(data)
        try:
            if (num := num_threads()) != 1:
                raise OSError(f"it has {num} threads")
            _answer(channel, pid=_fork(channel, request, fds))
        except OSError as error:
            _answer(channel, error=str(error))
        for fd in fds:
            os.close(fd)


def num_threads() -> int:
    """Of this process, as far as the kernel tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _fork(channel: socket.socket, request: dict[str, Any], fds: list[int]) -> int:
    """The number of a new process, which is the pod host's child by now. Raises OSError."""
    heard, said = os.pipe()
    middle = os.fork()
    if not middle:
        os.close(heard)
        _be_middle(channel, request, fds, said)
    os.close(said)
    with open(heard, "rb") as pipe:
        number = pipe.read()
    os.waitpid(middle, 0)
    if not number:
        raise OSError("it cannot fork")
    return int(number)


def _be_middle(
    channel: socket.socket, request: dict[str, Any], fds: list[int], said: int
) -> NoReturn:
    """Fork once more, and end: whoever is forked here is an orphan then."""
    try:
        middle = os.getpid()
        child = os.fork()
        if not child:
            os.close(said)
            channel.close()
            _be_child(middle, request, fds)
        os.write(said, str(child).encode())
    finally:
        os._exit(0)


def _be_child(middle: int, request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Become what the request names: a module whose `run` takes the rest of its arguments and does not return."""
    try:
        _wait_end(middle)
        os.setsid()
        _place(fds, request["fds"])
        if 1 not in request["fds"]:
            os.dup2(2, 1)  # whatever a library prints is log
        os.environ.update(request["env"])
        rename(request["module"])
        gc.enable()
        importlib.import_module(request["module"]).run(*request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _wait_end(pid: int) -> None:
    """Until our parent has ended, and we are the pod host's."""
    with contextlib.suppress(OSError):  # it is gone; or the kernel does not offer this
        pidfd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os.close(pidfd)
    while os.getppid() == pid:
        time.sleep(0.001)


def _place(fds: list[int], numbers: list[int]) -> None:
    """Have the descriptors that were received at the numbers that they are known by."""
    import fcntl

    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FREE_FD) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def rename(module: str) -> None:
    """Show what we became, where processes are listed: written over the command line that we were started with."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        line = b"\0".join((sys.executable.encode(), b"-m", module.encode()))
        room = end - start - 1
        ctypes.memmove(start, line[:room].ljust(room + 1, b"\0"), room + 1)


def _answer(channel: socket.socket, **fields: object) -> None:
    channel.send(json.dumps(fields).encode())


def _warm_up() -> None:
    """Do ahead what every TE would do once: patterns, codecs, kernels."""
    from services.worker.flowserve.native_decoder import available
    from services.worker.settings import TeSettings
    from shared import config, messages, wire

    "localhost".encode("idna")  # loads the codec that names of hosts take
    wire.prepare(*(getattr(messages, name) for name in _MESSAGES))
    available()
    with contextlib.suppress(config.ConfigError):  # a TE says so itself
        TeSettings.load(os.environ)


if __name__ == "__main__":
    main(sys.argv[1:])
