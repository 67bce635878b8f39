"""What a pod host does about training: one child process at a time, from a JE's `Training` to its `TrainingEnded`.

Idempotent by task: one that is known is not begun again, and its end, once there, is told again to whoever asks. A
`Training` without data asks whether it is known. This module must not know what is learned: the child does
(`training`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from services.worker.settings import compute_env
from shared import wire
from shared.errors import DeepFlowError, Internal, NotFound, Overloaded, Unavailable
from shared.job_messages import Training, TrainingEnded
from shared.messages import Accepted, Failure

if TYPE_CHECKING:
    from services.worker.settings import WorkerSettings
    from shared.service import Service

TIMEOUT_S: Final = 1200.0
_RETRY_AFTER_S: Final = 30.0


class Trainer:
    """The trainings of one pod host."""

    def __init__(self, service: Service[WorkerSettings], env: Mapping[str, str]) -> None:
        self._service = service
        self._bus = service.bus
        self._log = service.log
        self._env = {**env, **compute_env(1)}
        self._running: Training | None = None
        self._task: asyncio.Task[None] | None = None
        self._last: TrainingEnded | None = None

    async def open(self) -> None:
        """Take trainings from now on."""
        subject = self._bus.subjects.task(self._service.id)
        await self._bus.serve(subject, (Training,), self._admit)

    async def leave(self) -> None:
        """Nobody waits for it so much that the pod host would stay: the job comes back to its queue."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _admit(self, training: Training) -> Accepted:
        """Answers `task.<pod>`. Raises Overloaded, NotFound, Unavailable."""
        if self._service.stopping.is_set():
            raise Unavailable("the pod host leaves")
        accepted = Accepted(request=training.task, attempt=0, by=self._service.id)
        if self._running is not None and self._running.task == training.task:
            return accepted
        if self._last is not None and self._last.task == training.task:
            await self._tell(training.je, self._last)
            return accepted
        if not training.data:
            raise NotFound("no such training is here")
        if self._running is not None:
            raise Overloaded("another training is under way", retry_after_s=_RETRY_AFTER_S)
        self._running = training
        self._task = self._service.tasks.create_task(self._train(training), name="training")
        return accepted

    async def _train(self, training: Training) -> None:
        try:
            self._last = await self._child(training)
            await self._tell(training.je, self._last)
        finally:
            self._running = None

    async def _child(self, training: Training) -> TrainingEnded:
        """What the child process says; or else why it said nothing, and whether it is worth another try."""
        try:
            status, answer = await self._run(wire.encode(training))
            return wire.decode(answer, TrainingEnded)
        except OSError as error:
            code, reason = Unavailable.code, f"no process for it: {error}"
        except wire.WireError:
            killed = status < 0  # by the kernel or a person, or because it took too long
            code, reason = (Unavailable if killed else Internal).code, f"it ended with {status}"
        self._log.warning("training_failed", job=training.job, reason=reason)
        why = Failure(code=code, message=f"the training brought nothing: {reason}")
        return TrainingEnded(task=training.task, job=training.job, failure=why)

    async def _run(self, text: bytes) -> tuple[int, bytes]:
        """The child's exit status, and what it wrote. Raises OSError."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "services.worker.training"),
            env=self._env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._log.info("training_started", pid=child.pid)
        answer = b""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    answer, _ = await child.communicate(text)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        return await child.wait(), answer

    async def _tell(self, je: str, ended: TrainingEnded) -> None:
        try:
            await self._bus.publish(self._bus.subjects.events(je), ended)
        except DeepFlowError as error:  # it is asked for again
            self._log.warning("training_not_told", job=ended.job, error=error.message)
