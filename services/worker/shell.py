"""The TE-shell: everything a Task Executor says and hears on the bus.

It admits tasks, hands work to the engine's thread, and turns each of the engine's reports into one frame per client,
the changes of the index, and the ends of tasks; where KV comes from and goes to is its module `caching`. All of its
state lives in the event loop. It must not know how tokens are made, and it never waits for a step before it answers a
task.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from services.worker.admission import Admission
from services.worker.caching import Caching
from services.worker.clients import Clients
from services.worker.forking import Forker
from services.worker.linking import Linking
from services.worker.loop import EngineLoop, Report
from services.worker.pulse import Pulse
from services.worker.registrar import Registrar
from services.worker.settings import TeSettings
from shared.bus import failure
from shared.errors import DeepFlowError, TooLarge, Unavailable
from shared.messages import (
    Accepted,
    Band,
    Beat,
    Cancel,
    Delta,
    Down,
    Handover,
    Prefilled,
    Registration,
    Replay,
    Replayed,
    Task,
    TaskEnded,
    TaskKind,
    TeBeat,
    Tokens,
)
from shared.rtc_messages import BlockEvents, BlocksDump, BlocksQuery
from shared.service import Service, host_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from services.worker.flowserve.engine import Engine
    from services.worker.flowserve.outcome import Handed
    from services.worker.loading import Loading

_JUDGE_S: Final = 0.25
_LAST_COPIES_S: Final = 2.0  # for KV to reach the arena, beyond what the requests took
_BATCH_SHARE: Final = 4  # of those that may wait here, band BATCH may be one in so many
_RETRY_S: Final = (1.0, 60.0)  # what a refused task is told to wait, at least and at most


class Shell:
    """One TE on the bus, as `settings` say; `loading` makes its engine, with weights that other TEs may have:
    `sources`, best first."""

    def __init__(
        self,
        service: Service[TeSettings],
        settings: TeSettings,
        loading: Loading,
        sources: Sequence[str] = (),
    ) -> None:
        self._service = service
        self._settings = settings
        self._loading = loading
        self._bus = service.bus
        self._log = service.log
        self._te = service.id
        self._model = settings.model
        self._registration = Registration(
            kind="te",
            id=service.id,
            host=host_name(),
            pid=os.getpid(),
            model=settings.model,
            pod=settings.pod,
            role=settings.role,
            page=loading.backend.page,
            recipe_digest=loading.recipe,
        )
        self._state = "loading"
        self._pulse = Pulse()
        self._clients = Clients()
        self._registrar = Registrar(service.bus, service.log)
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._loop = EngineLoop(loading.load, self._reports.put_nowait, self._pulse)
        self._linking = Linking(
            service.bus,
            self._te,
            fabric=settings.fabric,
            directory=settings.arena_dir,
            backends=settings.distflow,
        )
        self._forker = Forker(
            service.bus, self._linking, loading.folder, settings, loading.backend, loading.recipe
        )
        self._sources = sources
        self._caching = Caching(service, settings, self._loop, self._linking, loading.recipe)
        self._engine: Engine | None = None  # only for what may be asked from another thread
        self._admission: Admission | None = None
        self._before: Counter[str] = Counter()  # the engine's counters when it was ready
        self._ledger: dict[str, Any] = {}
        self._task_ended = asyncio.Event()
        self._num_lost = 0  # messages that the bus would not take
        self._giving_up = False  # the grace is over: what is cancelled now goes on elsewhere
        # The ends of that, until its pages are where it goes on from.
        self._withheld: list[tuple[str, Delta]] = []
        self._patience_s = settings.grace_s  # for what runs to come to its end here

    async def open(self) -> None:
        """Start loading and beating; the rest follows once the engine is ready."""
        service, subjects = self._service, self._bus.subjects
        service.status(self._status, lambda: self._ledger)
        service.on_drain(self._drain)
        service.beat(self._beat)
        self._bus.on_disconnect(self._clients.hold)
        self._bus.on_reconnect(lambda: self._clients.resume(time.monotonic()))
        await self._bus.listen(subjects.beat("gateway", "*"), (Beat,), self._client_beat)
        await self._bus.listen(subjects.down("gateway", "*"), (Down,), self._client_down)
        for name, work in (
            ("load", self._load()),
            ("engine", self._loop.watch()),
            ("serve", self._serve()),
            ("send", self._send()),
            ("judge", self._judge()),
            ("registrar", self._registrar.keep()),
        ):
            service.tasks.create_task(work, name=name)

    def drain(self, migrate_after_s: float) -> None:
        """Leave: what does not come to its end within so many seconds, or the grace, goes on elsewhere."""
        self._patience_s = min(self._patience_s, migrate_after_s)
        self._service.stop()

    async def _load(self) -> None:
        """Get hold of the weights, then let the engine's thread have them."""
        await self._linking.open()
        self._forker.serve()
        await self._loading.obtain(partial(self._forker.obtain, self._sources))
        self._loop.start()

    async def _serve(self) -> None:
        """Wait for the engine, and open the doors."""
        engine = self._engine = await self._loop.ready
        settings, subjects = self._settings, self._bus.subjects
        self._admission = Admission(
            model=self._model,
            max_choices=settings.max_num_seqs + settings.max_waiting,
            # Enough to fill the engine, and to go on with; the rest had better wait where it can be done first.
            max_batch_choices=settings.max_num_seqs + settings.max_waiting // _BATCH_SHARE,
            validate=engine.validate,
            retry_after_s=partial(_retry_after_s, engine),
        )
        self._before = Counter(engine.counters)
        self._ledger = engine.ledger()
        await self._caching.open(engine)
        self._linking.flow.limit_egress(lambda: self._giving_bytes_s(engine))
        kinds: tuple[type[Task | Replay], ...] = (Task, Replay)
        await self._bus.serve(subjects.task(self._te), kinds, self._take)
        await self._bus.serve(subjects.blocks_dump(self._te), (BlocksQuery,), self._dump)
        await self._bus.listen(subjects.cancel(self._te), (Cancel,), self._cancel)
        if not self._service.stopping.is_set():
            self._registrar.put("registrations", self._te, self._registration)
            self._state = "ready"
            self._service.ready()
            await self._service.beat_now()  # whoever waits for a TE need not wait for its next beat
            self._loading.ready()
        self._log.info("te_ready", model=self._model, blocks=engine.load().blocks_total)
        await self._loading.keep()

    def _giving_bytes_s(self, engine: Engine) -> float:
        """How fast others may read the weights: requests go first. From any thread."""
        load = engine.load()
        return self._settings.fork_bytes_s if load.running or load.waiting else 0.0

    # ------------------------------------------------------------------------------------------------ what comes in

    async def _take(self, message: Task | Replay) -> Accepted | Replayed:
        if isinstance(message, Replay):
            replay = message
            return Replayed(deltas=await self._loop.ask(lambda engine, _: engine.replay(replay)))
        assert self._admission is not None
        request, now = message.request, time.monotonic()
        if self._admission.admit(message, now):
            self._clients.began(request.client, now)
            self._caching.expect(message)
            self._loop.post(partial(self._submit, message))
        return Accepted(request=request.request, attempt=request.attempt, by=self._te, te=self._te)

    def _submit(self, task: Task, engine: Engine, report: Report) -> None:
        """In the engine's thread."""
        request, prefill_only = task.request, task.kind is TaskKind.PREFILL
        try:
            engine.submit(
                request,
                prefill_only=prefill_only,
                handover=task.handover,
                expected_output=task.expected_output,
            )
        except DeepFlowError as error:  # a cancel overtook it: it was accepted, so it gets its end
            report.deltas += engine.refuse(request, failure(error))
        for want in engine.take_wants():
            self._caching.want(want, engine)

    def _cancel(self, cancel: Cancel) -> None:
        def drop(engine: Engine, report: Report) -> None:
            report.deltas += engine.cancel(cancel)

        self._loop.post(drop)

    async def _dump(self, _: BlocksQuery) -> BlocksDump:
        return await self._loop.ask(
            lambda engine, seq: BlocksDump(
                te=self._te, model=self._model, seq=seq, hashes=engine.index_snapshot()
            )
        )

    def _client_beat(self, beat: Beat) -> None:
        self._clients.beat(beat.id, time.monotonic())

    def _client_down(self, down: Down) -> None:
        if self._clients.down(down.id):
            self._drop_client(down.id, down.reason)

    async def _judge(self) -> None:
        """Drop the work of clients that have fallen silent."""
        while True:
            await asyncio.sleep(_JUDGE_S)
            for client in self._clients.lost(time.monotonic()):
                self._drop_client(client, "silent")

    def _drop_client(self, client: str, reason: str) -> None:
        self._log.info("client_lost", client=client, reason=reason)
        self._loop.post(lambda engine, _: engine.cancel_client(client))

    # ------------------------------------------------------------------------------------------------ what goes out

    async def _send(self) -> None:
        """Send what the engine reports, in order."""
        while True:
            report = await self._reports.get()
            if report.error is not None:
                self._log.error("step_failed", exc_info=report.error)
            self._ledger = report.ledger
            self._caching.take(report)
            frames: dict[str, list[Delta]] = {}
            for client, delta in report.deltas:
                if self._giving_up and delta.finish == "cancelled":
                    self._withheld.append((client, delta))
                elif self._clients.alive(client):
                    frames.setdefault(client, []).append(delta)
            for client, deltas in frames.items():
                await self._send_tokens(client, deltas)
            if report.ended:
                await self._send_ends(report)
            if report.stored or report.removed:
                subject = self._bus.subjects.blocks(self._model, self._te)
                events = BlockEvents(
                    te=self._te,
                    model=self._model,
                    seq=report.seq,
                    stored=report.stored,
                    removed=report.removed,
                )
                await self._publish(subject, events)
            self._reports.task_done()
            await asyncio.sleep(0)  # neither get() nor publish() yields while there is more

    async def _send_withheld(self) -> None:
        """What was cancelled because the TE leaves has failed, in a way that is worth another try elsewhere."""
        error = Unavailable("the TE was drained before the request was done", retry_after_s=0.0)
        frames: dict[str, list[Delta]] = {}
        for client, delta in self._withheld:
            if self._clients.alive(client):
                failed = replace(delta, finish="failed", failure=failure(error))
                frames.setdefault(client, []).append(failed)
        for client, deltas in frames.items():
            await self._send_tokens(client, deltas)

    async def _send_tokens(self, client: str, deltas: list[Delta]) -> None:
        """One frame, or several where one would pass the bus's limit."""
        frame = Tokens(source=self._te, seq=self._clients.next_frame(client), deltas=deltas)
        try:
            await self._bus.publish(self._bus.subjects.tokens(client), frame)
        except TooLarge as error:
            middle = len(deltas) // 2
            if not middle:
                self._lose(error)
                return
            await self._send_tokens(client, deltas[:middle])
            await self._send_tokens(client, deltas[middle:])
        except DeepFlowError as error:
            self._lose(error)

    async def _send_ends(self, report: Report) -> None:
        """Strike what the engine is done with off the books, then tell the JEs: they may send the next task at once."""
        assert self._admission is not None
        now = time.monotonic()
        ends = [(self._admission.ended(e.request, e.attempt, now), e) for e in report.ended]
        self._task_ended.set()
        prefilled = {(handed.request, handed.attempt): handed for handed in report.prefilled}
        for owed, ended in ends:
            if owed is None:
                continue
            task, since, first = owed.task, owed.since, ended.first_token
            events = self._bus.subjects.events(task.je)
            if (handed := prefilled.get((ended.request, ended.attempt))) is not None:
                await self._publish(events, _prefilled(task, handed, self._te))
            message = TaskEnded(
                task=task.task,
                request=ended.request,
                attempt=ended.attempt,
                te=self._te,
                finish=ended.finish,
                prompt_tokens=ended.prompt_tokens,
                cached_tokens=ended.cached_tokens,
                output_tokens=ended.output_tokens,
                first_token_ms=-1 if first is None else round(max(first - since, 0.0) * 1000),
                total_ms=round((now - since) * 1000),
            )
            await self._publish(events, message)

    async def _publish(self, subject: str, message: object) -> None:
        try:
            await self._bus.publish(subject, message)
        except DeepFlowError as error:
            self._lose(error)

    def _lose(self, error: DeepFlowError) -> None:
        """The bus would not take a message. The engine goes on: clients replay, caches ask for a dump."""
        self._num_lost += 1
        if self._num_lost.bit_count() == 1:  # the first, and then ever more rarely
            self._log.warning("message_lost", num_lost=self._num_lost, error=error.message)

    # -------------------------------------------------------------------------------------------------- life and load

    def _beat(self) -> TeBeat:
        state = "draining" if self._service.stopping.is_set() else self._state
        engine = self._engine
        if engine is None:
            return TeBeat(
                id=self._te,
                model=self._model,
                pod=self._settings.pod,
                role=self._settings.role,
                state=state,
                loading=self._loading.percent,
            )
        load = engine.load()
        counters = Counter(engine.counters)
        counters.subtract(self._before)
        counters.update(self._caching.counters)
        if self._admission is not None:
            counters.update(self._admission.counters)
        return TeBeat(
            id=self._te,
            model=self._model,
            pod=self._settings.pod,
            state=state,
            loading=self._loading.percent,
            role=self._settings.role,
            step=engine.counters["steps"],
            progress_ms=round(self._pulse.age_s(time.monotonic()) * 1000),
            step_ms=load.step_ms,
            running=load.running,
            waiting=load.waiting,
            free_slots=load.free_slots,
            outstanding_s=load.outstanding_s,
            outstanding_batch_s=load.outstanding_batch_s,
            waiting_tokens=load.waiting_tokens,
            prefill_us=load.prefill_us,
            decode_us=load.decode_us,
            decode_row_us=load.decode_row_us,
            blocks_total=load.blocks_total,
            blocks_used=load.blocks_used,
            blocks_cached=load.blocks_cached,
            blocks_leased=load.blocks_leased,
            blocks_reserved=load.blocks_reserved,
            host=self._caching.host,
            counters={name: float(n) for name, n in counters.items()},
        )

    def _status(self) -> dict[str, Any]:
        beat = self._beat()
        return {
            "model": self._model,
            "pod": beat.pod,
            "role": beat.role,
            "state": beat.state,
            "running": beat.running,
            "waiting": beat.waiting,
            "blocks_total": beat.blocks_total,
            "blocks_used": beat.blocks_used,
            "blocks_cached": beat.blocks_cached,
            "blocks_leased": beat.blocks_leased,
            **self._caching.status(),
            "messages_lost": self._num_lost,
            "counters": beat.counters,
        }

    # ---------------------------------------------------------------------------------------------------- draining

    async def _drain(self) -> None:
        """Take nothing new, finish what ends soon, let the rest go on elsewhere, and everything out: KV to the arena
        too. Pages of what was generated are indexed as a request ends, so it ends first, and its client hears of that
        once they are there to be found."""
        if self._admission is not None:
            self._admission.draining = True
            give_up = asyncio.get_running_loop().time() + self._patience_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(give_up):
                    while self._admission.tasks():
                        self._task_ended.clear()
                        await self._task_ended.wait()
            self._giving_up = True
            for task in self._admission.tasks():
                request = task.request
                self._cancel(Cancel(request=request.request, attempt=request.attempt))
            await self._copy_out()
            await self._loop.stop()
            await self._reports.join()
            await self._send_withheld()
            self._caching.close()
        await self._linking.close()
        await self._registrar.remove("registrations", self._te)

    async def _copy_out(self) -> None:
        """All pages that are indexed, to the arena."""
        with contextlib.suppress(TimeoutError, Unavailable):  # Unavailable: the engine has ended
            async with asyncio.timeout(_LAST_COPIES_S):
                await self._loop.ask(lambda *_: None)
                await self._reports.join()  # what the engine did until now is known here
                await self._caching.finish()


def _retry_after_s(engine: Engine, band: Band) -> float:
    """When to come back to a full TE: once half of its work is done, but for what would have given way."""
    (low, high), load = _RETRY_S, engine.load()
    work_s = load.outstanding_s - (0.0 if band is Band.BATCH else load.outstanding_batch_s)
    return min(max(work_s / 2, low), high)


def _prefilled(task: Task, handed: Handed, te: str) -> Prefilled:
    return Prefilled(
        task=task.task,
        request=handed.request,
        attempt=handed.attempt,
        handover=Handover(
            te=te,
            lease=handed.lease,
            num_pages=handed.num_pages,
            ids=handed.ids,
            logprobs=handed.logprobs,
            cached=handed.cached,
        ),
    )
