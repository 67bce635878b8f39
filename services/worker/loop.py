"""The engine's thread: it applies what the shell hands in between two steps, steps, and hands over once per step.

Why a thread of the shell's process and not a process of its own: one process is one TE, so that killing it kills all
of it and nothing has to be kept in step; a hand-over is a queue and a wake-up, not an encoding; and a step spends
nearly all its time in native code, which lets go of the interpreter lock. This
module must not know the bus, nor what is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shared.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.flowserve.engine import Engine
    from services.worker.flowserve.outcome import ClientDelta, Ended, Handed, KeptPages
    from services.worker.pulse import Pulse

    Act = Callable[[Engine, "Report"], object]
    Load = Callable[[Callable[[], None]], Engine]

T = TypeVar("T")

# How long the engine's Python may keep the interpreter from the shell: with the default of 5 ms, each answer and each
# frame may come that much later.
SWITCH_INTERVAL_S: Final = 0.0005
_PR_SET_NAME: Final = 15
_MAX_AHEAD: Final = 64  # reports the engine may be ahead of the shell


@dataclass(slots=True, kw_only=True)
class Report:
    """What the engine did since the last report. The engine's thread fills it in, and then lets go of it.

    `seq` numbers the changes of the index, from 1.
    """

    deltas: list[ClientDelta] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    seq: int = 0
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    kept: list[KeptPages] = field(default_factory=list)
    prefilled: list[Handed] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class EngineLoop:
    """One engine and its thread.

    `load` makes the engine, in the thread; it is given what wakes that up when bytes have moved. `deliver` gets each
    report, in the event loop. `ended` is done when the thread has ended: with None after `stop`, else with what killed
    it.
    """

    def __init__(self, load: Load, deliver: Callable[[Report], None], pulse: Pulse) -> None:
        self._load = load
        self._deliver = deliver
        self._pulse = pulse
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[Act | _Question] = SimpleQueue()
        self._ahead = threading.Semaphore(_MAX_AHEAD)
        self._seq = 0
        self._stopping = False
        self._questions: list[_Question] = []  # of this turn
        self.ready: asyncio.Future[Engine] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # ----------------------------------------------------------------------------------------------- the shell's side

    def start(self) -> None:
        """Start the thread, which begins to load."""
        self._thread.start()

    def post(self, act: Act) -> None:
        """Do `act` before the next step, with the engine and the report to come."""
        self._inbox.put(act)

    def wake(self) -> None:
        """Have a step made, though nothing is handed in. From whichever thread."""
        self._inbox.put(lambda *_: None)

    async def ask(self, question: Callable[[Engine, int], T]) -> T:
        """What `question` answers, asked after the next step: by then every change of the index has been reported.

        It is given the engine and the number of the last change. Raises what it raises, Unavailable without a thread.
        """
        return await self._put(question, at_once=False)

    async def do(self, act: Callable[[Engine], T]) -> T:
        """What `act` returns, done before the next step: what it changes has not been reported by then.

        Raises what it raises, Unavailable without a thread.
        """
        return await self._put(lambda engine, _: act(engine), at_once=True)

    async def _put(self, question: Callable[[Engine, int], T], *, at_once: bool) -> T:
        if self.ended.done():
            raise Unavailable("the engine has ended")
        asked = _Question(question, self._loop.create_future(), at_once)
        self._inbox.put(asked)
        answer: T = await asked.answer
        return answer

    async def stop(self) -> None:
        """End the thread, after doing and reporting what has been handed in so far."""

        def stop(*_: object) -> None:
            self._stopping = True

        self.post(stop)
        await asyncio.wait([self.ended])

    async def watch(self) -> None:
        """Wait for the end of the thread. Raises what killed it."""
        await asyncio.wait([self.ended])
        self.ended.result()

    # ---------------------------------------------------------------------------------------------- the thread's side

    def _main(self) -> None:
        _name_thread(b"engine")  # threads that torch starts from here take the name over
        try:
            engine = self._load(self.wake)
            self.call(_resolve, self.ready, engine)
            while not self._stopping:
                self._turn(engine)
            engine.close()
        except BaseException as error:
            self.call(self._close, error)
        else:
            self.call(self._close, None)

    def _turn(self, engine: Engine) -> None:
        """Take in, step, hand over, answer."""
        report = Report()
        self._take_in(engine, report)
        output = engine.step()
        self._pulse.busy(time.monotonic())
        if output.stored or output.removed:
            self._seq += 1
        report.deltas += output.deltas
        report.ended = output.ended
        report.seq = self._seq
        report.stored, report.removed = output.stored, output.removed
        report.kept, report.prefilled = output.kept, output.prefilled
        report.ledger = engine.ledger()
        report.error = output.error
        self._ahead.acquire()
        self.call(self._take, report)
        for question in self._questions:
            question.put(engine, self._seq, self.call)
        self._questions = []

    def _take_in(self, engine: Engine, report: Report) -> None:
        """Do what has been handed in, after waiting for it if there is nothing else to do; keep questions for later."""
        block = not engine.has_work()
        if block:
            self._pulse.idle()
        while True:
            try:
                item = self._inbox.get(block)
            except Empty:
                return
            if block:
                block = False
                self._pulse.busy(time.monotonic())
            if not isinstance(item, _Question):
                item(engine, report)
            elif item.at_once:
                item.put(engine, self._seq, self.call)
            else:
                self._questions.append(item)

    def _take(self, report: Report) -> None:
        self._ahead.release()
        self._deliver(report)

    def _close(self, error: BaseException | None) -> None:
        """In the event loop, after the last report: the end, and no question without an answer."""
        if error is None:
            _resolve(self.ended, None)
        else:
            _reject(self.ended, error)
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Question):
                self._questions.append(item)
        for question in self._questions:
            _reject(question.answer, Unavailable("the engine has ended"))

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back in the event loop, from whichever thread."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self._stopping = True  # the process is on its way out, and nobody listens any more


class _Question:
    """A function of the engine, and the future that waits for its value. `at_once`: before the next step, not after."""

    def __init__(
        self, ask: Callable[[Engine, int], Any], answer: asyncio.Future[Any], at_once: bool
    ) -> None:
        self._ask = ask
        self.answer = answer
        self.at_once = at_once

    def put(self, engine: Engine, seq: int, call: Callable[..., None]) -> None:
        try:
            value = self._ask(engine, seq)
        except Exception as error:  # answered: it is raised where the question was asked
            call(_reject, self.answer, error)
        else:
            call(_resolve, self.answer, value)


def _name_thread(name: bytes) -> None:
    """Show `name` in /proc and in profilers: Python before 3.14 tells the kernel nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
