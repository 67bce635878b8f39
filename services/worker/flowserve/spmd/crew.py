"""The executors' processes: started, heard, watched, ended. What rank 0 keeps of ranks 1 and up.

A thread starts them and watches over them, because rank 0's own thread may stand in a collective that nobody else will
ever enter: when a rank is lost, the thread ends the others and says so (`on_loss`). The kernel ties the children's
lives to the thread that started them, so the thread lives as long as they do. This module must not know what an
executor computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.spmd.heartbeat import (
    BEAT_S,
    HUNG_LOADING_S,
    HUNG_S,
    Heartbeats,
    Judge,
)
from services.worker.flowserve.spmd.nest import Forked, nest
from shared import errors, log

_READ_BYTES: Final = 1 << 16
_KILLED_S: Final = 5.0  # the kernel may take its time with a process that holds much memory


@dataclass(frozen=True, slots=True)
class Command:
    """How to start one executor: a module, its argument, and the descriptors that it is to have."""

    module: str
    argument: str
    descriptors: tuple[int, ...]  # equal in parent and child
    env: Mapping[str, str]

    def start(self) -> subprocess.Popen[bytes] | Forked:
        """Off the nest, if there is one; else by a new interpreter. Raises OSError."""
        if (from_ := nest()) is not None:
            try:
                return from_.fork(self.module, self.argument, self.env, self.descriptors)
            except OSError as error:
                log.note("nest_cannot_fork", error=str(error))
        return subprocess.Popen(
            [sys.executable, "-m", self.module, self.argument],
            env=self.env,
            pass_fds=self.descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for rank 0
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """A rank that is no more."""

    rank: int
    pid: int
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid}) {self.reason}"


@dataclass(slots=True)
class _Member:
    rank: int
    process: subprocess.Popen[bytes] | Forked
    pidfd: int
    heard: bytes = b""  # said, but no whole line yet
    loaded: bool = False
    error: dict[str, str] = field(default_factory=dict)  # its last words, if it had any

    def ending(self) -> str:
        """How it ended, in words."""
        code = self.process.wait()
        if "message" in self.error:
            return f"failed: {self.error['message']}"
        if code >= 0:
            return f"exited with {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"


class Crew:
    """Ranks 1 to len(commands) of one model.

    `on_loss` is called, once and in the watching thread, when one of them ended or hung after all had loaded, or rank 0
    itself cannot go on (`broken`); the others are on their way out by then.
    """

    def __init__(
        self,
        commands: list[Command],
        heartbeats: Heartbeats,
        on_loss: Callable[[Loss], None] | None = None,
    ) -> None:
        self._commands = commands
        self._heartbeats = heartbeats
        self._on_loss = on_loss
        self._members: list[_Member] = []
        self._changed = threading.Condition()
        self._error: errors.DeepFlowError | None = None  # why it never came to be
        self._closing_s: float | None = None  # how long they may take to end by themselves
        self._complaint = ""  # of rank 0
        self._thread = threading.Thread(target=self._main, name="crew", daemon=True)
        self.loss: Loss | None = None

    # ------------------------------------------------------------------------------------------------ rank 0's side

    def start(self) -> None:
        """Start them all, and watch from now on."""
        self._thread.start()

    def wait_loaded(self) -> None:
        """Wait until every rank has its weights. Raises ModelError with a rank's own words for what is wrong with the
        model, Internal for any other end of one; all are gone then."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._is_loaded())
            if self._error is not None:
                raise self._error

    def broken(self, error: Exception | None = None) -> errors.DeepFlowError:
        """Rank 0 failed within a step, so no rank can go on. Returns what to raise, if `on_loss` lets us.

        Most often another rank's end is the cause, and is about to be noticed: it is the better reason.
        """
        if error is not None and not self._wait_loss(HUNG_S + 1.0):
            self._complaint = f"{type(error).__name__}: {error}"
            self._wait_loss(_KILLED_S)
        return self._error or errors.Internal(f"rank 0 failed in a step: {error}")

    def close(self, within_s: float = 0.0) -> None:
        """End them: by themselves (they were told) within the time, else by force. Does nothing the second time."""
        if self._closing_s is None and self._thread.is_alive():
            self._closing_s = within_s
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _wait_loss(self, within_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.loss is not None, within_s)

    # ------------------------------------------------------------------------------------------- the watching thread

    def _main(self) -> None:
        try:
            self._start()
            self._watch()
        except Exception as error:
            self._give_up(0, os.getpid(), f"cannot watch the others: {error!r}")
        finally:
            self._kill()

    def _start(self) -> None:
        for rank, command in enumerate(self._commands, 1):
            process = command.start()
            self._members.append(_Member(rank, process, os.pidfd_open(process.pid)))
        log.note("executors_started", pids=[member.process.pid for member in self._members])

    def _watch(self) -> None:
        """Until told to close, or somebody is lost."""
        poll = select.poll()
        for member in self._members:
            poll.register(member.pidfd, select.POLLIN)
            poll.register(_voice(member), select.POLLIN)
        judge = Judge()
        while True:
            ready = {fd for fd, _ in poll.poll(BEAT_S * 1000)}
            if self._closing_s is not None:
                self._wait_ends(self._closing_s)
                return
            if self._complaint:
                self._give_up(0, os.getpid(), f"failed in a step: {self._complaint}")
                return
            for member in self._members:
                if _voice(member) in ready and not self._hear(member):
                    poll.unregister(_voice(member))
            if any(member.pidfd in ready for member in self._members):
                first = self._first_to_end()
                if first is None:
                    self._wait_ends(_KILLED_S)
                else:
                    self._give_up(first.rank, first.process.pid, first.ending())
                return
            within_s = HUNG_S if self._is_loaded() else HUNG_LOADING_S
            for rank in judge.hung(self._heartbeats.counts(), time.monotonic(), within_s=within_s):
                pid = self._members[rank - 1].process.pid
                self._give_up(rank, pid, f"gave no sign of life for {within_s:g} s")
                return

    def _is_loaded(self) -> bool:
        return len(self._members) == len(self._commands) and all(m.loaded for m in self._members)

    def _hear(self, member: _Member) -> bool:
        """Take in what a rank says; False once it has said everything."""
        data = os.read(_voice(member), _READ_BYTES)
        *lines, member.heard = (member.heard + data).split(b"\n")
        for line in lines:
            words: dict[str, Any] = json.loads(line)
            with self._changed:
                if "error" in words:
                    member.error = words["error"]
                else:
                    member.loaded = True
                self._changed.notify_all()
        return bool(data)

    def _first_to_end(self) -> _Member | None:
        """Of those that ended, the one that took the others along; None if all did as they were told.

        Whoever is in a step with a rank that dies fails too, and says so; who was killed says nothing.
        """
        time.sleep(BEAT_S)
        ended = [member for member in self._members if _is_ready(member.pidfd)]
        for member in ended:
            while self._hear(member):
                pass
        faults = [member for member in ended if not member.loaded or member.process.wait()]
        return min(faults, key=lambda member: bool(member.error), default=None)

    def _give_up(self, rank: int, pid: int, reason: str) -> None:
        """End the others and say so; first to `on_loss`, before rank 0's thread can tell anybody that a step failed."""
        was_loaded = self._is_loaded()
        loss = Loss(rank, pid, reason)
        for member in self._members:
            member.process.kill()
        if was_loaded and self._on_loss is not None:
            self._on_loss(loss)
        self._kill()
        with self._changed:
            last_words = self._members[rank - 1].error if rank else {}
            self._error = _error(last_words, loss)
            self.loss = loss
            self._changed.notify_all()

    def _wait_ends(self, within_s: float) -> None:
        give_up = time.monotonic() + within_s
        for member in self._members:
            _is_ready(member.pidfd, max(0.0, give_up - time.monotonic()))

    def _kill(self) -> None:
        """End everybody, stopped or not, and let go of their descriptors. Does nothing the second time."""
        members = [member for member in self._members if member.pidfd >= 0]
        for member in members:
            member.process.kill()
        for member in members:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel will come to it
                member.process.wait(_KILLED_S)
            os.close(member.pidfd)
            member.pidfd = -1
            assert member.process.stdout is not None
            member.process.stdout.close()


def _is_ready(fd: int, within_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def _voice(member: _Member) -> int:
    assert member.process.stdout is not None
    return member.process.stdout.fileno()


def _error(last_words: Mapping[str, str], loss: Loss) -> errors.DeepFlowError:
    """What to raise for a rank that did not get as far as having its weights."""
    if last_words.get("kind") == "model":
        return ModelError(last_words["message"])
    return errors.Internal(f"the model lost {loss}")
