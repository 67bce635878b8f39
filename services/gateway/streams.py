"""All requests in flight on the bus: carries out what each `Delivery` decides, and tells it what happens.

One subscription brings every token of this gateway. TEs and JEs are judged by their beats; while our own bus
connection is away nobody is. Each stream ends exactly once, at its deadline if nobody ended it before. This module
must not know text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol, TypeVar

from services.gateway.actions import Action, Ask, Drop, Emit, Submit
from services.gateway.counts import Counts
from services.gateway.delivery import Delivery, Limits
from shared.bus import Bus, Subscription
from shared.errors import DeepFlowError, Internal, Unavailable
from shared.liveness import Liveness
from shared.log import Logger
from shared.messages import (
    Accepted,
    Beat,
    Cancel,
    Down,
    Progress,
    Replay,
    Replayed,
    Request,
    TeBeat,
    Tokens,
)

M = TypeVar("M")

TICK_S: Final = 0.2
REPLAY_TIMEOUT_S: Final = 2.0
STALLED_MS: Final = 1500  # without progress, beyond the predicted step
MAX_SOURCES: Final = 4096  # sequence numbers remembered
STRAY_S: Final = 1.0  # how often a TE is told again that nobody wants a request
MAX_DROPPED: Final = 4096


class Sink(Protocol):
    """Where a stream's tokens go."""

    def push(self, emit: Emit, now: float) -> int | None:
        """Take tokens; a number means: a stop string ended the choice after so many."""

    def tick(self, now: float, *, parked: bool) -> None:
        """Time has passed."""

    def waits(self, stage: str, percent: int, now: float) -> None:
        """What the request waits for, as `Progress` says it; `warm` also once a TE has it."""


class Stream:
    """One internal request in flight; `request` lacks what each sending fills in: attempt, budgets, output."""

    def __init__(self, request: Request, sink: Sink, delivery: Delivery) -> None:
        self.request = request
        self.sink = sink
        self.delivery = delivery


class Streams:
    """The streams of one gateway."""

    def __init__(
        self,
        bus: Bus,
        client: str,
        tasks: asyncio.TaskGroup,
        counts: Counts,
        log: Logger,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self._bus = bus
        self._tasks = tasks
        self._counts = counts
        self._log = log
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._online = asyncio.Event()
        self._online.set()
        self._tes = Liveness()
        self._jes = Liveness()
        self._sequence: dict[str, int] = {}  # TE -> number of its latest frame
        self._dropped: dict[tuple[str, str], float] = {}  # (TE, request) -> when it was told so
        self._outbox: asyncio.Queue[tuple[str, Cancel]] = asyncio.Queue()
        self._subscriptions: list[Subscription] = []

    def __len__(self) -> int:
        return len(self._streams)

    async def start(self) -> None:
        """Subscribe and begin to watch. Runs until the TaskGroup ends."""
        subjects = self._bus.subjects
        listen = self._bus.listen
        self._subscriptions = [
            await listen(subjects.tokens(self.client), (Tokens, Progress), self._frame),
            await listen(subjects.beat("te", "*"), (TeBeat,), self._te_beat),
            await listen(subjects.beat("scheduler", "*"), (Beat,), self._je_beat),
            await listen(subjects.down("te", "*"), (Down,), self._te_down),
            await listen(subjects.down("scheduler", "*"), (Down,), self._je_down),
        ]
        self._bus.on_disconnect(self._disconnected)
        self._bus.on_reconnect(self._reconnected)
        self._tasks.create_task(self._ticker(), name="streams-tick")
        self._tasks.create_task(self._sender(), name="streams-cancel")

    def open(self, request: Request, sink: Sink, limits: Limits) -> Stream:
        """Put a request on its way. The sink hears of it until its last Emit, or until `close`."""
        now = self._clock()
        delivery = Delivery(request.sampling.n, limits, now, random.random)
        stream = Stream(request, sink, delivery)
        self._streams[request.request] = stream
        self._do(stream, delivery.start(now))
        return stream

    def close(self, stream: Stream) -> None:
        """The client is done or left: whatever still runs is cancelled. Safe to call twice."""
        if not stream.delivery.over:
            self._do(stream, stream.delivery.cancel())
        self._streams.pop(stream.request.request, None)

    # ------------------------------------------------------------------------------------------------------- actions

    def _do(self, stream: Stream, actions: list[Action]) -> None:
        delivery = stream.delivery
        for action in actions:
            if type(action) is Emit:
                self._emit(stream, action)
            elif type(action) is Submit:
                if action.attempt > 1:
                    self._counts.resubmissions.inc()
                    self._log.info(
                        "request_resubmitted",
                        request=stream.request.request,
                        attempt=action.attempt,
                        delay_s=round(action.delay_s, 3),
                    )
                self._tasks.create_task(self._submit(stream, action))
            elif type(action) is Drop:
                self._cancel(stream.request.request, action)
            elif type(action) is Ask:
                self._counts.replays.inc()
                self._tasks.create_task(self._ask(stream, action))
        if delivery.over:
            self._streams.pop(stream.request.request, None)

    def _emit(self, stream: Stream, emit: Emit) -> None:
        try:
            keep = stream.sink.push(emit, self._clock())
        except Exception:
            # A fault in one request's text must cost neither the others anything nor this one its end.
            self._log.exception("stream_failed", request=stream.request.request)
            error = Internal("the answer cannot be written")
            failed = Emit(emit.choice, [], finish="failed", failure=error)
            self._do(stream, [failed, *stream.delivery.fail(error)])
            return
        if keep is not None:
            self._do(stream, stream.delivery.stop(emit.choice, keep))

    async def _submit(self, stream: Stream, action: Submit) -> None:
        delivery = stream.delivery
        if action.delay_s:
            await asyncio.sleep(action.delay_s)
        # Sent while the bus is away it would lie in the client's buffer, and every later attempt behind it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delivery.park_s(self._clock())):
                await self._online.wait()
        if not delivery.awaits(action.attempt):
            return
        now = self._clock()
        if not self._online.is_set():
            away = Unavailable("the bus is away", retry_after_s=1.0)
            self._do(stream, delivery.refused(action.attempt, away, now))
            return
        request = replace(
            stream.request,
            attempt=action.attempt,
            deadline_ms=round(delivery.remaining_s(now) * 1000),
            park_ms=round(delivery.park_s(now) * 1000),
            output=[list(ids) for ids in delivery.output] if any(delivery.have) else [],
            ended=[choice for choice, ended in enumerate(delivery.ended) if ended],
            avoid=delivery.avoid,
        )
        subject = self._bus.subjects.request(request.model)
        try:
            answer = await self._request(subject, request, Accepted, action.timeout_s)
        except DeepFlowError as error:
            self._do(stream, delivery.refused(action.attempt, error, self._clock()))
        else:
            now = self._clock()
            if answer.te is not None:
                self._tes.beat(answer.te, now)  # it answered the JE just now
            else:
                self._jes.beat(answer.by, now)
            was_parked = delivery.parked  # and it was told already what for
            self._do(stream, delivery.accepted(action.attempt, answer.by, answer.te, now))
            if delivery.parked and not (was_parked or delivery.over):
                stream.sink.waits("queued", 0, now)

    async def _request(
        self, subject: str, message: Request | Replay, kind: type[M], timeout_s: float
    ) -> M:
        """`Bus.request`. What nobody foresaw must end one attempt, and not the gateway: it is logged, and Internal."""
        try:
            return await self._bus.request(subject, message, kind, timeout_s=timeout_s)
        except DeepFlowError:
            raise
        except Exception as error:
            self._log.exception("request_failed", subject=subject, request=message.request)
            raise Internal("the request could not be sent") from error

    async def _ask(self, stream: Stream, action: Ask) -> None:
        delivery = stream.delivery
        replay = Replay(request=stream.request.request, attempt=action.attempt, have=action.have)
        try:
            subject = self._bus.subjects.task(action.te)
            answer = await self._request(subject, replay, Replayed, REPLAY_TIMEOUT_S)
        except DeepFlowError as error:
            if not self._bus.connected:
                return  # nobody could answer; `reconnected` asks again
            actions = delivery.replay_failed(action.te, action.attempt, error, self._clock())
        else:
            actions = delivery.replayed(action.te, action.attempt, answer.deltas, self._clock())
        self._do(stream, actions)

    def _cancel(self, request: str, action: Drop) -> None:
        key = (action.to, request)
        if key not in self._dropped and len(self._dropped) >= MAX_DROPPED:
            self._dropped.pop(next(iter(self._dropped)))
        self._dropped[key] = self._clock()
        message = Cancel(
            request=request, attempt=action.attempt, choice=action.choice, keep=action.keep
        )
        self._outbox.put_nowait((self._bus.subjects.cancel(action.to), message))

    async def _sender(self) -> None:
        while True:
            subject, message = await self._outbox.get()
            try:
                await self._bus.publish(subject, message)
            except DeepFlowError as error:
                # The TE drops the work of a silent gateway by itself, and stray frames are answered again.
                self._log.warning("cancel_lost", request=message.request, error=error.message)
            finally:
                self._outbox.task_done()

    async def flush(self) -> None:
        """Wait until every cancel has been handed to the bus."""
        await self._outbox.join()

    # -------------------------------------------------------------------------------------------------------- events

    def _frame(self, frame: object) -> None:
        now = self._clock()
        if isinstance(frame, Progress):
            self._progress(frame, now)
        elif isinstance(frame, Tokens):
            self._tokens(frame, now)

    def _tokens(self, frame: Tokens, now: float) -> None:
        source = frame.source
        if self._tes.alive(source):
            self._tes.beat(source, now)
        touched = set()
        for delta in frame.deltas:
            stream = self._streams.get(delta.request)
            if stream is None:
                if delta.finish is None:
                    self._stray(source, delta.request, delta.attempt, now)
                continue
            touched.add(delta.request)
            if stream.delivery.parked and delta.ids and stream.delivery.awaits(delta.attempt):
                stream.sink.waits("warm", 0, now)  # the tokens were faster than the JE's word
            actions = stream.delivery.tokens(source, delta, now)
            if actions:
                self._do(stream, actions)
        before = self._sequence.get(source)
        if before is None or frame.seq > before:
            if len(self._sequence) >= MAX_SOURCES and before is None:
                self._sequence.pop(next(iter(self._sequence)))
            self._sequence[source] = frame.seq
            if before is not None and frame.seq > before + 1:
                self._gap(source, touched)

    def _gap(self, source: str, touched: set[str]) -> None:
        """A whole frame is missing. Requests in the present frame have found their own gaps by index."""
        self._counts.gaps.inc()
        self._log.warning("frame_gap_seen", source=source)
        for stream in list(self._streams.values()):
            if stream.request.request not in touched:
                self._do(stream, stream.delivery.gap(source))

    def _stray(self, source: str, request: str, attempt: int, now: float) -> None:
        """Tokens nobody waits for: the cancel was lost, or the TE never heard it."""
        told = self._dropped.get((source, request))
        if told is None or now - told >= STRAY_S:
            self._cancel(request, Drop(source, attempt))

    def _progress(self, progress: Progress, now: float) -> None:
        stream = self._streams.get(progress.request)
        if stream is None:
            if progress.state in ("parked", "moved"):  # a cancel did not reach them in time
                holder = progress.te or progress.source
                self._stray(holder, progress.request, progress.attempt, now)
            return
        if progress.te is not None:
            self._tes.beat(progress.te, now)
        else:
            self._jes.beat(progress.source, now)
        delivery = stream.delivery
        was_parked = delivery.parked
        actions = delivery.progress(
            progress.source, progress.attempt, progress.state, progress.te, now
        )
        self._do(stream, actions)
        if not delivery.over and (was_parked or delivery.parked):
            stage = progress.stage if delivery.parked else "warm"
            stream.sink.waits(stage, progress.percent, now)

    def _te_beat(self, beat: TeBeat) -> None:
        stalled = beat.progress_ms > STALLED_MS + beat.step_ms
        self._tes.beat(beat.id, self._clock(), stalled=stalled)

    def _je_beat(self, beat: Beat) -> None:
        self._jes.beat(beat.id, self._clock())

    def _te_down(self, down: Down) -> None:
        self._tes.down(down.id)
        self._te_lost(down.id)

    def _je_down(self, down: Down) -> None:
        self._jes.down(down.id)
        self._je_lost(down.id)

    def _te_lost(self, te: str) -> None:
        now = self._clock()
        self._sequence.pop(te, None)
        for stream in list(self._streams.values()):
            if stream.delivery.te == te:
                self._log.warning("te_lost", te=te, request=stream.request.request)
                self._do(stream, stream.delivery.te_lost(te, now))

    def _je_lost(self, je: str) -> None:
        now = self._clock()
        for stream in list(self._streams.values()):
            self._do(stream, stream.delivery.je_lost(je, now))

    def _disconnected(self) -> None:
        self._online.clear()
        self._tes.hold()
        self._jes.hold()

    def _reconnected(self) -> None:
        now = self._clock()
        self._online.set()
        self._tes.resume(now)
        self._jes.resume(now)
        for stream in list(self._streams.values()):
            self._do(stream, stream.delivery.reconnected(now))

    async def _ticker(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            for te in self._tes.lost(now):
                self._te_lost(te)
            for je in self._jes.lost(now):
                self._je_lost(je)
            connected = self._bus.connected
            for stream in list(self._streams.values()):
                actions = stream.delivery.tick(now, connected=connected)
                if actions:
                    self._do(stream, actions)
                stream.sink.tick(now, parked=stream.delivery.parked)
