"""The tie between a pod host and a TE: one socket, the TE's standard input, with a line of JSON for each thing said.

Down it come the `Assignment` (what the TE is to be, perhaps long after it was started) and `Drain`; up it come the
`TeEvent`s of a start. The TE cannot outlive the pod host: the kernel kills it when the parent dies, and where the
kernel does not offer that, the end of the socket does. This module must not know what a TE does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from shared.scaling_messages import Step

_PR_SET_PDEATHSIG: Final = 1
_READ_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a TE is to be. `devices`: the variables that show it its accelerators; `sources`: running TEs to take the
    weights from, best first."""

    model: str
    role: str = "colocated"
    devices: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    sources: list[str] = field(default_factory=list)
    since: float = 0.0  # when it was given, by this host's monotonic clock


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new; what still runs after so many seconds goes on elsewhere."""

    migrate_after_s: float


@dataclass(frozen=True, slots=True)
class Named:
    """The TE is on the bus, under this name."""

    te: str


@dataclass(frozen=True, slots=True)
class StepTook:
    """A step of the start is done."""

    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """So far the model is loaded."""

    percent: int


@dataclass(frozen=True, slots=True)
class WeightsCame:
    """Where the weights came from: disk | dram (page cache) | fork (of a running TE)."""

    source: str


@dataclass(frozen=True, slots=True)
class Ready:
    """It has said on the bus that it takes tasks."""


TeEvent = Named | StepTook | Loaded | WeightsCame | Ready
_KINDS: Final = {
    kind.__name__: kind for kind in (Assignment, Drain, Named, StepTook, Loaded, WeightsCame, Ready)
}


def encode(said: Assignment | Drain | TeEvent) -> bytes:
    """One line."""
    return orjson.dumps({type(said).__name__: dataclasses.asdict(said)}) + b"\n"


def decode(line: bytes) -> Any:
    """What `encode` made a line of."""
    ((kind, fields),) = orjson.loads(line).items()
    if kind == StepTook.__name__:
        return StepTook(Step(fields["step"]), fields["seconds"])
    return _KINDS[kind](**fields)


class Tie:
    """The TE's end, made in its event loop. `assigned` is done once it is known what to be; `on_drain` is called for a
    `Drain`."""

    def __init__(self, on_drain: Callable[[Drain], None]) -> None:
        self.assigned: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        self._on_drain = on_drain
        self._socket = socket.socket(fileno=os.dup(sys.stdin.fileno()))
        self._heard = b""
        die_with_parent()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._hear)

    def say(self, event: TeEvent) -> None:
        """From whichever thread. Lost if the pod host has long stopped listening: it must not hold up the TE."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._socket.send(encode(event), socket.MSG_DONTWAIT)

    def _hear(self) -> None:
        data = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        if not data:  # this is the end of the parent
            os.kill(os.getpid(), signal.SIGKILL)
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            said = decode(line)
            if isinstance(said, Drain):
                self._on_drain(said)
            elif not self.assigned.done():
                self.assigned.set_result(said)


def die_with_parent() -> None:
    """Ask the kernel to kill us when the parent dies, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
