"""The FlowServe engine: requests in, one step at a time, token deltas out.

It joins scheduler, RTC, decoder and sampler: plans steps, launches them, and applies what comes back, one step ahead of
the device where it may. It must not know the bus, or text, and its clock is handed in. All calls belong to one thread,
except `load`.

How KV comes and goes is in `traffic.py`. A new request whose pages are not here is reported as a `Want` first, if
`EngineSettings.fetch`.

What is to come finds its place without another shape: the mask of a grammar is one more line of `sampler.adjust` (its
state follows from the tokens; a choice with a grammar is planned only once its tokens are known, as one with guesses
is), and pooled embeddings are one more kind of output row beside `StepInput.sample_rows`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from services.worker.flowserve import pic
from services.worker.flowserve.composer import Composer
from services.worker.flowserve.decoder import Decoder, as_pipeline, can_splice
from services.worker.flowserve.life import Requests, band_tokens
from services.worker.flowserve.load import measure
from services.worker.flowserve.outcome import ClientDelta, EngineLoad, StepOutput
from services.worker.flowserve.pace import Pace
from services.worker.flowserve.plan import StepPlan
from services.worker.flowserve.prepared import Prepared
from services.worker.flowserve.rtc.chunks import ChunkTable
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import HANDED, Status
from services.worker.flowserve.splicing import Splicing
from services.worker.flowserve.spmd.crew import Loss
from services.worker.flowserve.stream import Launch, open_stream
from services.worker.flowserve.traffic import Traffic
from shared import catalog, errors
from shared.messages import Band, Cancel, Delta, Failure, Handover, Replay, Request

COUNTERS = (
    "steps",
    "prompt_tokens",
    "generation_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "yields",
    "spec_proposed",
    "spec_accepted",
    "requests_stop",
    "requests_length",
    "requests_cancelled",
    "requests_failed",
    "requests_handed",
    "leases_broken",
    "tokens_taken_over",
    *map(band_tokens, Band),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Limits. A step computes at most `max_batched_tokens` rows; `max_num_seqs` choices run.

    `asynchronous`: plan a step while the one before it runs. `speculation`: guesses a step may check for one choice,
    0 for none; they are made in steps of up to `speculation_rows` rows. A pipeline is asynchronous in any case, and
    does not guess; `spread_chunks` is about pipelines only, see `Scheduler`. `fetch`: ask for pages that are not here
    before they are computed, where the decoder's blocks can be moved. `num_recomputed`: tokens at the start of a chunk
    that are computed in their place, where the decoder can take over the others (`pic.py`).
    How many may wait is not bounded here: who submits keeps the books (`admission.py`), and knows before it asks.
    """

    num_blocks: int
    page: int = 16
    max_num_seqs: int = 64
    max_batched_tokens: int = 256
    asynchronous: bool = False
    speculation: int = 0
    speculation_rows: int = 16
    spread_chunks: bool = True
    fetch: bool = False
    num_recomputed: int = pic.RECOMPUTED
    keep_finished_s: float = 10.0


class Engine(Traffic):
    """Continuous batching over one decoder and its paged cache.

    `context` is the longest a sequence gets here: the model's context, or the whole pool where that is smaller.
    `counters` only grow. `wake` is called, in another thread, when bytes have moved and `has_work` may be true again.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: EngineSettings,
        *,
        eos_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.context = min(decoder.config.context, settings.num_blocks * settings.page)
        self.vocab = decoder.config.vocab
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._eos_ids = frozenset(eos_ids)
        rtc = RtcMaster(settings.num_blocks)
        pipeline = as_pipeline(decoder)
        self._num_stages = 1 if pipeline is None else pipeline.num_stages
        self._scheduler = Scheduler(
            rtc,
            page=settings.page,
            max_num_seqs=settings.max_num_seqs,
            max_batched_tokens=settings.max_batched_tokens,
            max_draft=settings.speculation,
            max_draft_rows=settings.speculation_rows,
            num_stages=self._num_stages,
            spread_chunks=settings.spread_chunks,
        )
        self._pace = Pace(max_tokens=settings.max_batched_tokens, num_stages=self._num_stages)
        self._requests = Requests(
            self._scheduler,
            context=self.context,
            vocab=self.vocab,
            page=settings.page,
            eos_ids=self._eos_ids,
            keep_finished_s=settings.keep_finished_s,
            counters=self.counters,
            pace=self._pace,
        )
        self._composer = Composer(self._eos_ids, self.vocab)
        # Predicted, of the step under way; kept past its end, for until that is noticed the step counts as under way.
        self._step_s = 0.0
        decoder.allocate(settings.num_blocks, settings.page)
        table = ChunkTable(rtc, page=settings.page, num_recomputed=settings.num_recomputed)
        self._splicing = Splicing(self._scheduler, table if can_splice(decoder) else None)
        self._stream = open_stream(decoder, asynchronous=settings.asynchronous)
        self._launches: deque[Launch] = deque()  # on their way, oldest first
        super().__init__(
            decoder,
            rtc,
            self._scheduler,
            self._launches,
            page=settings.page,
            clock=clock,
            wake=wake,
        )

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        kv_tokens: int | None = None,
        kv_bytes: int = 1 << 30,
        device: str = "auto",
        tp: int = 1,
        pp: int = 1,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 256,
        threads: int | None = None,
        cache_dir: Path | None = None,
        kernels: str | None = None,
        prepared: Prepared | None = None,
        asynchronous: bool = False,
        speculation: int = 0,
        fetch: bool = False,
        on_loss: Callable[[Loss], None] | None = None,
        wake: Callable[[], None] | None = None,
        on_weights: Callable[[], None] | None = None,
    ) -> Engine:
        """An engine over the model in a folder, with room for `kv_tokens` tokens or, without, in `kv_bytes` bytes of
        each executor. `prepared` weights are used where the decoder computes with such. `on_loss` is called from a
        thread of its own when one of several executors is lost, `on_weights` once the weights are there.

        Raises ModelError for what is wrong with the model, InvalidRequest if the room is less than one block.
        """
        from services.worker.flowserve.backend import Backend  # what it loads is its choice

        backend = Backend.of(folder, device=device, dtype=dtype, kernels=kernels, tp=tp, pp=pp)
        decoder = backend.load(
            folder, threads=threads, cache_dir=cache_dir, prepared=prepared, on_loss=on_loss
        )
        if on_weights is not None:
            on_weights()
        page = backend.page
        num_blocks = kv_bytes // decoder.bytes_per_block(page)
        if kv_tokens:
            num_blocks = -(-kv_tokens // page)
        if num_blocks < 1:
            raise errors.InvalidRequest(f"{kv_bytes} bytes hold not one block of {page} tokens")
        settings = EngineSettings(
            num_blocks=num_blocks,
            page=page,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            asynchronous=asynchronous,
            speculation=speculation,
            fetch=fetch,
        )
        return cls(decoder, settings, eos_ids=catalog.read_eos_ids(folder), wake=wake)

    def close(self) -> None:
        """Let the steps and bytes on their way come to their end. Nothing may be called afterwards."""
        while self._launches:
            self._stream.collect(self._launches.popleft())
        self._close()
        self._stream.close()

    # --------------------------------------------------------------------------------------------------- requests

    def submit(
        self,
        request: Request,
        *,
        prefill_only: bool = False,
        handover: Handover | None = None,
        expected_output: int = 0,
    ) -> None:
        """Take responsibility for a request: each of its live choices will end in exactly one terminal delta.

        Idempotent by (request, attempt); a newer attempt replaces an older one, which ends as cancelled. Tokens in
        `request.output` are known: computed again like a prompt, not sent again.

        `prefill_only`: after its next token, unless that ends it, it is over here: its last delta `moves`, its pages
        are leased, and `StepOutput.prefilled` says what the next TE has to know. `handover`: this is that TE; the
        tokens in there, the last ones of `request.output`, can be replayed from here. The engine that handed a request
        over may go on with it itself. Both are for one choice. `expected_output`: tokens of a choice that `load` counts
        on; 0: what choices bring here on average.
        Raises InvalidRequest if the request can never run here or comes too late.
        """
        group = self._requests.submit(
            request,
            self._clock(),
            prefill_only=prefill_only,
            handover=handover,
            expected_output=expected_output,
        )
        if group is None:
            return
        self._is_stuck = False
        self._bequests.expect(group)
        groups = self._splicing.begin(group)
        if self.settings.fetch and self._fetches is not None:
            for one in groups:
                self._fetches.begin(one, page_s=self._pace.prefill_s(self.settings.page))

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest, naming the field, for what would harm the batch or never end."""
        self._requests.validate(request)

    def cancel(self, cancel: Cancel) -> list[ClientDelta]:
        """Drop (request, attempts up to `attempt`), or one choice; the terminal deltas of what was still alive.

        Idempotent. What is past `keep` output tokens leaves the prefix index, also of a choice that has just ended.
        """
        self._is_stuck = False
        if cancel.choice is None:
            self._bequests.withdraw(cancel.request, cancel.attempt)
        return self._requests.cancel(cancel, self._clock())

    def cancel_client(self, client: str) -> None:
        """Drop all requests of a client that fell silent; nobody is left to hear of it."""
        self._is_stuck = False
        self._requests.cancel_client(client, self._clock())

    def refuse(self, request: Request, failure: Failure) -> list[ClientDelta]:
        """The ends of a request that was accepted on the engine's behalf but that `submit` would not take."""
        return self._requests.refuse(request, failure)

    def replay(self, replay: Replay) -> list[Delta]:
        """Everything from the asked positions on, one delta per choice that has any. Raises NotFound if unknown."""
        return self._requests.replay(replay)

    # ------------------------------------------------------------------------------------------------------- step

    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report.

        Not while all requests wait for pages: then something is handed in before long, or `wake` is called.
        """
        requests = self._requests
        if requests.deltas or requests.ended or self._launches or self._has_moved:
            return True
        return bool(requests.live or self._splicing.groups) and not self._is_stuck

    def step(self) -> StepOutput:
        """Launch what can be planned, then wait for the oldest step on its way and apply it.

        Never raises for a fault in it: that ends the step's sequences and is reported.
        """
        now = self._clock()
        self._requests.pass_time(now)
        self._rtc.expire(now)
        num_preemptions = self._scheduler.num_preemptions
        if self._take_moved():
            while len(self._launches) < self._stream.depth and self._launch():
                pass
        if not self._launches:  # after a preemption there is room to try again
            self._is_stuck = num_preemptions == self._scheduler.num_preemptions
            return self._report(0, None)
        self._is_stuck = False
        launch = self._launches[0]
        self._predict()
        try:
            self._stream.collect(launch)
        except BaseException:  # an interrupt, which a user of the library may survive
            self._interrupted(launch)
            raise
        self._launches.popleft()
        self.counters["steps"] += 1
        if launch.error is not None:
            self._fail(launch)
            return self._report(0, launch.error)
        self._apply(launch)
        return self._report(launch.plan.num_rows, None)

    def _launch(self) -> bool:
        """Plan the next step and send it on its way; False if there is none, or none yet."""
        before = self._launches[-1] if self._launches and self._stream.fills_in else None
        if before is not None and before.drafts is not None:
            return False  # it is not known how many tokens it will bring
        plan = self._scheduler.schedule(ahead=len(self._launches))
        if not plan.chunks:
            return False
        launch = None
        try:
            launch = self._composer.compose(plan, before)
            self._launches.append(launch)
            self._predict()
            self._stream.launch(launch)
        except BaseException:  # an interrupt
            if launch is None or not launch.is_sent:
                self._withdraw(plan)
            raise
        return True

    def _predict(self) -> None:
        """How long the engine may now be silent: until the oldest step is done, in a pipeline until all inside are."""
        inside = list(self._launches) if self._num_stages > 1 else [self._launches[0]]
        self._step_s = sum(
            self._pace.step_s(launch.plan.num_decodes, launch.plan.num_prefill_tokens)
            for launch in inside
        )

    def _apply(self, launch: Launch) -> None:
        plan, results, now = launch.plan, launch.results, self._clock()
        counts = self._scheduler.update(plan, ([s.token for s in run] for run in results))
        for sequence, count, run in zip(plan.sampled, counts, results, strict=True):
            if not count or self._splicing.ended(sequence):
                continue
            self.counters["generation_tokens"] += count
            if run[0].logprobs is not None:
                sequence.logprobs += [s.logprobs for s in run[:count] if s.logprobs is not None]
            self._requests.extend(sequence, count, now)
            if sequence.finish is not None:
                if sequence.finish == HANDED:
                    self._bequests.hand(sequence, now)
                else:
                    self._pace.observe_output(sequence.num_output)
                self._requests.settle(sequence.group, now)
        self._bequests.keep(now)
        self._pace.observe(
            launch.duration_s,
            num_decodes=plan.num_decodes,
            num_prefill_tokens=plan.num_prefill_tokens,
        )

    def _fail(self, launch: Launch) -> None:
        """End the sequences of a step that raised. What was launched behind it and builds on its tokens has not run,
        and is planned again. In a pipeline the others inside have nothing of it but further chunks of its prompts."""
        failure = Failure(code=errors.Internal.code, message="the engine failed in this step")
        for chunk in launch.plan.chunks:
            sequence = chunk.sequence
            if sequence.status is not Status.ENDED and not self._splicing.fail(sequence):
                self._requests.fail(chunk.sequence, failure, self._clock())
        while self._launches and self._stream.fills_in:
            self._stream.collect(self._launches[0])
            self._scheduler.undo(self._launches.popleft().plan)

    def _interrupted(self, launch: Launch) -> None:
        """While it was collected. What only that runs is as if never planned; what is on a thread goes on; what is in a
        pipeline is collected later, with fresh rows."""
        if not launch.is_sent:
            self._withdraw(launch.plan)
        elif not self._stream.fills_in:
            launch.rows = [
                self._composer.row(sequence) if sequence.row is row else row
                for sequence, row in zip(launch.plan.sampled, launch.rows, strict=True)
            ]

    def _withdraw(self, plan: StepPlan) -> None:
        """Take back the youngest plan, which nobody is going to compute."""
        if self._launches and self._launches[-1].plan is plan:
            self._launches.pop()
        self._scheduler.undo(plan)
        for sequence in plan.sampled:
            sequence.row = None  # it may have taken note of a token that is sampled again

    def _report(self, num_computed: int, error: Exception | None) -> StepOutput:
        requests, scheduler = self._requests, self._scheduler
        output = StepOutput(
            deltas=requests.deltas, ended=requests.ended, num_computed=num_computed, error=error
        )
        requests.deltas, requests.ended = [], []
        self._report_pages(output)
        self.counters["preemptions"] = scheduler.num_preemptions
        self.counters["yields"] = scheduler.num_yields
        self.counters["prefix_queries"] = scheduler.num_queried_tokens
        self.counters["prefix_hits"] = scheduler.num_hit_tokens
        self.counters["spec_proposed"] = scheduler.drafts.num_guessed_tokens
        self.counters["spec_accepted"] = scheduler.drafts.num_right_tokens
        self.counters["tokens_taken_over"] = scheduler.num_taken_tokens
        self.counters["leases_broken"] = self._rtc.num_broken
        return output

    # ------------------------------------------------------------------------------------------------ introspection

    def load(self) -> EngineLoad:
        """How busy the engine is. May be called from another thread."""
        return measure(self._scheduler, self._rtc, self._pace, step_s=self._step_s)

    def ledger(self) -> dict[str, int | dict[str, int]]:
        """Blocks by state, and live block references by owner "request#attempt/choice"."""
        owners = {s.name: sum(map(len, s.tables())) for s in self._scheduler.running}
        return {**self._rtc.ledger(), "owners": owners}

    def check(self) -> None:
        """Prove that the ledger balances. Raises AssertionError otherwise; costs O(pool)."""
        groups = [*self._requests.live.values(), *self._splicing.groups.values()]
        self._rtc.check(table for g in groups for s in g.live() for table in s.tables())

    def index_snapshot(self) -> list[bytes]:
        """The hashes of all indexed pages."""
        return self._rtc.index_snapshot()
